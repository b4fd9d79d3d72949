"""Triton's interpreter, made strict: for tests and rehearsals of kernels without a GPU, in processes that were started
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def prepare_interpreter() -> None:
    """Fills fresh memory with NaN, refuses to load or store outside the tensors that a kernel was given, which the
    interpreter would do in silence, and repairs its dot: it multiplies the bits of bfloat16 as integers instead of
    their values, and leaves the order of a sum to a BLAS, by which it may depend on where a row or a column stands in
    the tile, as it never does on a GPU.
    """
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

    def values(operand: TensorHandle) -> np.ndarray:
        if operand.dtype.scalar != tl.bfloat16:
            return operand.data
        return (operand.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, c, *rest):
        product = np.einsum("...mk,...kn->...mn", values(a), values(b), dtype=c.data.dtype)
        return TensorHandle(product + c.data, c.dtype.scalar)

    InterpreterBuilder.create_dot = dot
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN


def _span(size: int, stride: int) -> int:
    return (size - 1) * stride
