"""Tests Triton's kernels without a GPU, in separate processes, as Triton reads TRITON_INTERPRET when it is first
imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import require


def run_here(script: str, job: str, *args: object, **environment: str) -> None:
    """Runs `script` with a job's name and arguments. Fails unless it exits with 0."""
    if importlib.util.find_spec("triton") is None:
        require("triton", "triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, script, job, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def prepare_interpreter() -> None:
    """Fills fresh memory with NaN, refuses to load or store outside the tensors that a kernel was given, which the
    interpreter would do in silence, and repairs its dot, which multiplies the bits of bfloat16 as integers instead of
    their values.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    given: list[tuple[int, int]] = []  # first address, and the one after the last, of each tensor
    to_host = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def recorded(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor) and arg.numel()]
        given[:] = [
            (arg.data_ptr(), arg.data_ptr() + (1 + sum(map(_span, arg.shape, arg.stride()))) * arg.element_size())
            for arg in tensors
        ]
        return args, kwargs

    def require_inside(pointers: TensorHandle, mask: TensorHandle) -> None:
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if used.size:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            first, last = int(used.min()), int(used.max()) + size
            assert any(begin <= first and last <= end for begin, end in given), "a kernel leaves its tensors"

    def checked_load(self, pointers, mask, *rest):
        require_inside(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        require_inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = recorded
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN


def _span(size: int, stride: int) -> int:
    return (size - 1) * stride


def usage_on_sm_90(kernel, types: dict[str, str], constants: dict, options: dict, binary: Path) -> dict[str, int]:
    """Resources that a kernel uses on a GPU of compute capability 9.0: registers, stack, shared memory; and COPIES, its
    instructions that copy 16 bytes while it goes on. types: of the arguments that are not constants. binary: the file
    that the compiled kernel is written to.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    # BERT's sizes and torch's addresses are multiples of 16, which a launch tells the compiler.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name] != "constexpr"}
    source = ASTSource(kernel, types, constants, aligned)
    code = triton.compile(source, GPUTarget("cuda", 90, 32), options).asm
    binary.write_bytes(code["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    fields = (field.split(":") for field in text.split(f"Function {kernel.__name__}:")[1].split())
    used = {name: int(value) for name, value in fields if value.isdigit()}
    return used | {"COPIES": len(re.findall(r"cp\.async\.cg\.\S*\s.*, (?:0x10|16)\b", code["ptx"]))}
