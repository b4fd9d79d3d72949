"""sparse_matmul for V:2:M on sparse tensor cores (csrc/cuda/sparse_matmul.cu): y = activation(W x + b) + residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsebert.errors import InputError, UnsupportedError
from sparsebert.kernels import cuda_core
from sparsebert.patterns import VNM, require_fits

ACTIVATIONS = ("none", "gelu", "relu", "tanh")  # in the order of csrc/ops.h
PIECE = 8  # values of bf16 that are copied at once, 16 bytes
MAX_N_IN = 1 << 16  # column indices are 16 bits wide


@dataclass(frozen=True, eq=False)
class PackedVNM:
    """A weight W [n_out, n_in] in V:2:M and bf16, as csrc/cuda/sparse_matmul.h describes it. `pack_vnm` makes one.

    cols: int16, the bits of uint16 [groups, chunks, 32]: the kept columns of each group of v rows.
    values: int32 [strips, chunks, tiles, 32 lanes, 4], two bf16 each. metadata: int32 [strips, chunks, tiles / 2, 32
    lanes]: 2 bits per value, which of 4 columns it stands in. Both in the order in which lanes of mma.sp hold them.
    """

    cols: torch.Tensor
    values: torch.Tensor
    metadata: torch.Tensor
    pattern: VNM
    strip_rows: int
    chunks: int
    n_in: int
    n_out: int

    def to(self, device: torch.device | str) -> PackedVNM:
        """The same weight on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("cols", "values", "metadata")}
        return PackedVNM(**{**self.__dict__, **tensors})


def pack_vnm(weight: torch.Tensor, pattern: VNM) -> PackedVNM:
    """Packs W for `sparse_matmul`, rounded to bf16, on the host; `.to("cuda")` moves the result.

    weight: float32 or bfloat16 [n_out, n_in] on the CPU, finite, n_in at most 65536. pattern: V:2:M that W keeps to.
    Raises InputError if that does not hold, naming the rows and columns that break the pattern; UnsupportedError if the
    CUDA kernels are not built, or if n is not 2, which is all that sparse tensor cores multiply.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.ndim != 2 or weight.is_cuda:
        raise InputError(
            f"weight must be 2-d float32 or bfloat16 on the CPU, got {weight.dtype} {list(weight.shape)} on "
            f"{weight.device}",
            fix="convert it first",
        )
    n_out, n_in = weight.shape
    if n_in > MAX_N_IN:
        raise InputError(f"weight must have at most {MAX_N_IN} inputs, got {n_in}", fix="split its columns")
    if pattern.n != 2:
        raise UnsupportedError(f"sparse tensor cores multiply V:2:M, got {pattern}", fix="prune with n = 2")
    require_fits(pattern, n_out, n_in, 0.0)
    bits = weight.detach().to(torch.bfloat16).contiguous()
    if not bits.isfinite().all():
        raise InputError("weight in bf16 must be finite, got inf or NaN", fix="check how it was computed")
    try:
        cols, values, metadata, strip_rows, chunks = cuda_core().pack_vnm(
            bits.view(torch.uint16).numpy(), pattern.v, pattern.m
        )
    except ValueError as error:
        raise InputError(f"weight must keep to {pattern}: {error}", fix=f"prune it with --pattern {pattern}") from error
    # torch computes little with unsigned types; the kernel reads the bits.
    tensors = (torch.from_numpy(array) for array in (cols.view("i2"), values.view("i4"), metadata.view("i4")))
    return PackedVNM(*tensors, pattern, strip_rows, chunks, n_in, n_out)


def sparse_matmul(
    x: torch.Tensor,
    weight: PackedVNM,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = activation(W x + b) + residual, with the tokens innermost: x and y are the transposes of what
    `sparsebert.ops.sparse_matmul.sparse_matmul` takes and gives, so that a kept column of W is a row of x.

    x: bfloat16 [n_in, tokens]; rows next to each other if tokens is a multiple of 8, else it is copied once.
    bias: float32 [n_out]. residual: bfloat16 [n_out, tokens]. All are on the GPU of `weight`.
    activation: "none", "gelu" (the exact form), "relu" or "tanh".
    Returns y: bfloat16 [n_out, tokens], a new tensor, whose rows are a multiple of 8 apart. Sums are float32, in an
    order that depends on nothing but W; y is rounded once. A token's result does not depend on other tokens. inf and
    NaN of x may also reach rows of W that have a zero there.
    Raises InputError for a wrong type, shape or device, UnsupportedError if the CUDA kernels are not built, or do not
    run on this GPU (they need sm_80 or later).

    Unmeasured: it has not run on a GPU yet, so no op calls it.
    """
    _check(x, weight, bias, activation, residual)
    core = cuda_core()
    tokens = x.shape[1]
    stride = -(-tokens // PIECE) * PIECE
    x = _rows_apart(x, stride)
    y = torch.empty(weight.n_out, stride, dtype=torch.bfloat16, device=x.device)[:, :tokens]
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    with torch.cuda.device_of(x):
        try:
            core.sparse_matmul_vnm(
                cols=weight.cols.data_ptr(),
                values=weight.values.data_ptr(),
                metadata=weight.metadata.data_ptr(),
                v=weight.pattern.v,
                strip_rows=weight.strip_rows,
                chunks=weight.chunks,
                n_out=weight.n_out,
                x=x.data_ptr(),
                x_stride=x.stride(0),
                tokens=tokens,
                bias=0 if bias is None else bias.data_ptr(),
                activation=ACTIVATIONS.index(activation),
                residual=0 if residual is None else residual.data_ptr(),
                residual_stride=0 if residual is None else residual.stride(0),
                y=y.data_ptr(),
                y_stride=stride,
                stream=torch.cuda.current_stream().cuda_stream,
            )
        except RuntimeError as error:
            raise UnsupportedError(
                f"sparse_matmul's CUDA kernel cannot run here: {error}", fix="use the engine on the CPU"
            ) from error
    return y


def _rows_apart(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x, or a copy, whose rows begin on 16 bytes and may be read up to a multiple of 8 values."""
    offset, apart = x.storage_offset(), x.stride(0)
    fits = offset + (x.shape[0] - 1) * apart + stride <= x.untyped_storage().nbytes() // x.element_size()
    if x.stride(1) == 1 and apart >= stride and apart % PIECE == 0 and x.data_ptr() % 16 == 0 and fits:
        return x
    copy = x.new_empty(x.shape[0], stride)[:, : x.shape[1]]
    return copy.copy_(x)


def _check(
    x: torch.Tensor, weight: PackedVNM, bias: torch.Tensor | None, activation: str, residual: torch.Tensor | None
) -> None:
    if not isinstance(weight, PackedVNM):
        raise InputError(f"weight must be packed, got {type(weight).__name__}", fix="pass pack_vnm(weight, pattern)")
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[0] != weight.n_in:
        raise InputError(
            f"x must be bfloat16 [n_in = {weight.n_in}, tokens], got {x.dtype} {list(x.shape)}",
            fix="match x and weight; the tokens are its columns",
        )
    if bias is not None and (bias.dtype != torch.float32 or list(bias.shape) != [weight.n_out] or bias.stride(0) != 1):
        raise InputError(
            f"bias must be contiguous float32 [n_out = {weight.n_out}], got {bias.dtype} {list(bias.shape)}",
            fix="match weight",
        )
    if activation not in ACTIVATIONS:
        raise InputError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}", fix="pass one of these"
        )
    wanted = [weight.n_out, x.shape[1]]
    if residual is not None and (residual.dtype != torch.bfloat16 or list(residual.shape) != wanted):
        raise InputError(
            f"residual must be bfloat16 [n_out, tokens] = {wanted}, got {residual.dtype} {list(residual.shape)}",
            fix="match weight and x",
        )
    devices = {str(tensor.device) for tensor in (x, weight.cols, bias, residual) if tensor is not None}
    if not x.is_cuda or len(devices) > 1:
        raise InputError(
            f"x, weight, bias and residual must be on one GPU, got {', '.join(sorted(devices))}",
            fix="move them to one GPU",
        )
