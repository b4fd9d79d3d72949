"""Tests Triton's kernels without a GPU, in separate processes, as Triton reads TRITON_INTERPRET when it is first
imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import require


def prepare_interpreter() -> None:
    """`bench.interpreter.prepare_interpreter`, which imports triton."""
    from bench import interpreter

    interpreter.prepare_interpreter()


def run_here(script: str, job: str, *args: object, **environment: str) -> None:
    """Runs `script` with a job's name and arguments. Fails unless it exits with 0."""
    if importlib.util.find_spec("triton") is None:
        require("triton", "triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, script, job, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def interpreted_by(script: str, folder: Path) -> dict:
    """The tensors that the job `interpret` of a script writes: the results of interpreted kernels."""
    run_here(script, "interpret", folder / "results.safetensors", TRITON_INTERPRET="1")
    from safetensors.torch import load_file

    return load_file(folder / "results.safetensors")


def compiled_by(script: str, folder: Path) -> dict[str, dict[str, int]]:
    """What the job `compile` of a script writes: the resources that kernels use on a GPU of compute capability 9.0."""
    run_here(script, "compile", folder / "usage.json", TRITON_CACHE_DIR=str(folder))
    return json.loads((folder / "usage.json").read_text())


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
