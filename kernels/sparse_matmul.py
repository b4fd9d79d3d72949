"""sparse_matmul on a GPU: y = activation(W x + b) + residual. Activations are stored by feature, [n, tokens]: a kept
column is then one row of x in one piece, and the rows of a group may be any rows of W.

Groups of rows that share their columns, and zeros anywhere, run by Triton kernels of this file, V:2:M by sparse tensor
cores (csrc/cuda/sparse_matmul.cu), 2:4 by cuSPARSELt and a plain matrix by cuBLAS, both through torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT

from sparsebert.errors import InputError, UnsupportedError, first_line
from sparsebert.kernels import cuda_core
from sparsebert.patterns import VNM, require_fits

HEIGHTS = (16, 32, 64)  # rows of a group
TOKENS = 64  # per program
# Tensor cores do not multiply float32, which therefore uses more warps and shorter steps. The values were chosen so
# that no register spills on sm_90, not by timing.
STEPS = {torch.float32: 16, torch.bfloat16: 32}  # columns that are multiplied at a time
OPTIONS = {torch.float32: {"num_warps": 8, "num_stages": 3}, torch.bfloat16: {"num_warps": 4, "num_stages": 3}}
ROWS = 32  # per program of `_finish`
TILE_ROWS, TILE_COLS = 16, 64  # of a bitmask: the least rows of a tensor core, and the bits of a mask
PROGRAMS = 256  # of a bitmask with few tokens, which are to keep all of a GPU's multiprocessors busy
ACTIVATIONS = ("none", "gelu", "relu", "tanh")  # in the order of csrc/ops.h
PIECE = 8  # values of bf16 that are copied at once, 16 bytes
MAX_N_IN = 1 << 16  # column indices of V:2:M are 16 bits wide


@dataclass(frozen=True, eq=False)
class Groups:
    """A weight W [n_out, n_in] on the device, as groups of rows that share one list of kept columns. HEIGHT is one of
    HEIGHTS.

    rows: int32 [groups, HEIGHT], row numbers of W, -1 if a group has fewer; each row of W occurs once.
    begin: int32 [groups + 1], start of a group's places in `cols` and `values`.
    cols: int32 [places], below n_in, in any order; None if every group keeps all columns, in their order.
    values: float32 or bfloat16 [places, HEIGHT], 0 for a missing row.
    """

    rows: torch.Tensor
    begin: torch.Tensor
    cols: torch.Tensor | None
    values: torch.Tensor
    n_out: int


@dataclass(frozen=True, eq=False)
class Bitmask:
    """A weight W [n_out, n_in] with zeros anywhere, on the device, in tiles of TILE_ROWS rows by TILE_COLS columns. The
    last tiles are filled up with zeros. `pack_bitmask` makes one.

    masks: int64 [tiles of rows, tiles of columns, TILE_ROWS], bit c of a row for its column c: not zero.
    begin: int32 [tiles of rows, tiles of columns], start of a tile's values.
    values: float32 or bfloat16 [non-zeros], of each tile row by row.
    parts: programs that share the columns of a row of tiles.
    """

    masks: torch.Tensor
    begin: torch.Tensor
    values: torch.Tensor
    parts: int
    n_in: int
    n_out: int


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


Weight = Groups | Bitmask | PackedVNM | torch.Tensor  # what `sparse_matmul` multiplies


def pack_bitmask(weight: torch.Tensor) -> Bitmask:
    """Packs W, float32 or bfloat16 [n_out, n_in] with fewer than 2^31 non-zeros, on its device."""
    n_out, n_in = weight.shape
    rows, cols = triton.cdiv(n_out, TILE_ROWS), triton.cdiv(n_in, TILE_COLS)
    whole = torch.nn.functional.pad(weight, (0, cols * TILE_COLS - n_in, 0, rows * TILE_ROWS - n_out))
    tiles = whole.view(rows, TILE_ROWS, cols, TILE_COLS).transpose(1, 2)
    kept = tiles != 0
    bits = torch.ones((), dtype=torch.int64, device=weight.device) << torch.arange(TILE_COLS, device=weight.device)
    counts = kept.sum((2, 3))
    return Bitmask(
        masks=(kept * bits).sum(-1),
        begin=(counts.view(-1).cumsum(0).view_as(counts) - counts).to(torch.int32),
        values=tiles[kept],
        parts=min(cols, max(1, PROGRAMS // rows)),
        n_in=n_in,
        n_out=n_out,
    )


def pack_two_four(weight: torch.Tensor) -> SparseSemiStructuredTensor:
    """Packs W, bfloat16 [n_out, n_in] on a GPU, multiples of 16, with at most 2 non-zeros in every 4 columns of a row,
    for cuSPARSELt. Raises UnsupportedError if torch is built without it, or if it does not run here.
    """
    if not torch.backends.cusparselt.is_available():
        raise UnsupportedError(
            f"2:4 needs cuSPARSELt, torch {torch.__version__} is built without it",
            fix="install a torch of pytorch.org that is built for CUDA",
        )
    with warnings.catch_warnings(), _cusparselt_told(weight):
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        return SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)


@contextmanager
def _cusparselt_told(weight: torch.Tensor) -> Iterator[None]:
    """Raises UnsupportedError if cuSPARSELt does not take this matrix on this GPU."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedError(
            f"cuSPARSELt does not run a matrix {list(weight.shape)} of {weight.dtype} here: {first_line(error)}",
            fix="use another form",
        ) from error


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
    weight: Weight,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    *,
    residual: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = activation(W x + b) + residual, with sums in float32 and y rounded once.

    x: contiguous [n_in, T], of the weight's dtype; for PackedVNM bfloat16, and copied unless T is a multiple of 8.
    weight: groups, a bitmask, V:2:M, 2:4 as `pack_two_four` makes it, or W [n_out, n_in], multiplied by torch's matmul.
    With the first three a token's result is bit-equal whatever the other tokens and their number, and float32 is never
    rounded to TF32, whatever torch's settings. With 2:4 and W both are up to torch, and W x is rounded once before the
    bias. V:2:M and 2:4: inf and NaN of x may also reach rows of W that have a zero there.
    bias: contiguous float32 [n_out]. activation: "none", "gelu" (y Φ(y), the exact form), "relu" or "tanh".
    residual: contiguous [n_out, T]. tokens: int32 [1] on the device, at most T: only the first so many columns of the
    result are defined. None: all. Values are loaded and stored several at a time if T is a multiple of 16.
    Returns out, or a new tensor of x's dtype: contiguous [n_out, T].
    Raises, for PackedVNM, InputError for a wrong type, shape or device, and UnsupportedError if the CUDA kernels are
    not built, or do not run on this GPU (they need sm_80 or later); for 2:4 likewise if cuSPARSELt does not.

    Unmeasured: it has not run on a GPU yet.
    """
    if isinstance(weight, PackedVNM):
        return _vnm(x, weight, bias, activation, residual, out)
    n_out = len(weight) if isinstance(weight, torch.Tensor) else weight.n_out
    if out is None:
        out = torch.empty(n_out, x.shape[1], dtype=x.dtype, device=x.device)
    width = x.shape[1]
    if not width:
        return out
    with torch.cuda.device_of(x):  # a launch goes to the current device
        if isinstance(weight, Groups):
            groups, height = weight.rows.shape
            # Programs of the same tokens follow each other, so that these tokens stay in L2.
            _product[groups, triton.cdiv(width, TOKENS)](
                x, weight.rows, weight.begin, weight.cols, weight.values, bias, residual, out, tokens, width,
                ACTIVATION=activation, HEIGHT=height, TOKENS=TOKENS, STEP=STEPS[x.dtype], **OPTIONS[x.dtype],
            )  # fmt: skip
        elif isinstance(weight, Bitmask):
            rows, cols = weight.begin.shape
            sums = torch.empty(weight.parts, n_out, width, dtype=torch.float32, device=x.device)
            _expand[rows, triton.cdiv(width, TOKENS), weight.parts](
                x, weight.masks, weight.begin, weight.values, sums, tokens, cols, weight.n_in, n_out, width,
                ROWS=TILE_ROWS, COLS=TILE_COLS, TOKENS=TOKENS, **OPTIONS[x.dtype],
            )  # fmt: skip
            _finish[triton.cdiv(n_out, ROWS), triton.cdiv(width, TOKENS)](
                sums, bias, residual, out, tokens, weight.parts, n_out, width,
                ACTIVATION=activation, ROWS=ROWS, TOKENS=TOKENS,
            )  # fmt: skip
        else:
            packed = isinstance(weight, SparseSemiStructuredTensor)  # which gives its product in memory of its own
            if packed:
                with _cusparselt_told(weight):
                    product = torch.mm(weight, x).contiguous()  # a part of it in torch 2.11, if T is padded
            else:
                product = torch.mm(weight, x, out=out)
            if bias is not None or residual is not None or activation != "none":
                _finish[triton.cdiv(n_out, ROWS), triton.cdiv(width, TOKENS)](
                    product, bias, residual, out, tokens, 1, n_out, width,
                    ACTIVATION=activation, ROWS=ROWS, TOKENS=TOKENS,
                )  # fmt: skip
            elif packed:
                out.copy_(product)
    return out


def _vnm(
    x: torch.Tensor,
    weight: PackedVNM,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`sparse_matmul` by csrc/cuda/sparse_matmul.cu, whose rows of x and y begin on 16 bytes."""
    _check(x, weight, bias, activation, residual)
    core = cuda_core()
    tokens = x.shape[1]
    stride = -(-tokens // PIECE) * PIECE
    x = _rows_apart(x, stride)
    y = out
    if y is None or y.stride(0) % PIECE or y.data_ptr() % 16:
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
                y_stride=y.stride(0),
                stream=torch.cuda.current_stream().cuda_stream,
            )
        except RuntimeError as error:
            raise UnsupportedError(
                f"sparse_matmul's CUDA kernel cannot run here: {error}", fix="use the engine on the CPU"
            ) from error
    return y.contiguous() if out is None or out is y else out.copy_(y)


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


@triton.jit
def _product(
    x_ptr,  # [n_in, width]
    rows_ptr,  # int32 [groups, HEIGHT]; -1: no row
    begin_ptr,  # int32 [groups + 1]
    cols_ptr,  # int32 [places], or None: all columns
    values_ptr,  # [places, HEIGHT], of x's type
    bias_ptr,  # float32 [n_out], or None
    residual_ptr,  # [n_out, width], or None
    out_ptr,  # [n_out, width]
    tokens_ptr,  # int32 [1], or None: width
    width,
    ACTIVATION: tl.constexpr,
    HEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    tokens = width
    if tokens_ptr is not None:
        tokens = tl.load(tokens_ptr)
    first = tl.program_id(1) * TOKENS
    if first >= tokens:
        return
    token = first + tl.arange(0, TOKENS)
    # Not `tokens`, whose multiples the compiler does not know: it would load and store values one by one.
    inside = (token < width)[None, :]
    own = tl.arange(0, HEIGHT)
    row = tl.load(rows_ptr + tl.program_id(0) * HEIGHT + own)
    begin, end = tl.load(begin_ptr + tl.program_id(0)), tl.load(begin_ptr + tl.program_id(0) + 1)
    sums = tl.zeros([HEIGHT, TOKENS], tl.float32)
    for start in range(begin, end, STEP):
        place = start + tl.arange(0, STEP)
        there = place < end
        if cols_ptr is not None:
            col = tl.load(cols_ptr + place, mask=there, other=0)
        else:
            col = place - begin
        values = tl.load(
            values_ptr + place.to(tl.int64)[:, None] * HEIGHT + own[None, :], mask=there[:, None], other=0.0
        )
        x = tl.load(x_ptr + col.to(tl.int64)[:, None] * width + token[None, :], mask=there[:, None] & inside, other=0.0)
        sums = tl.dot(tl.trans(values), x, sums, input_precision="ieee")
    _store(sums, row, row >= 0, token, bias_ptr, residual_ptr, out_ptr, width, ACTIVATION)


@triton.jit
def _expand(
    x_ptr,  # [n_in, width]
    masks_ptr,  # int64 [tiles of rows, cols, ROWS]
    begin_ptr,  # int32 [tiles of rows, cols]
    values_ptr,  # [non-zeros], of x's type
    sums_ptr,  # float32 [parts, n_out, width]
    tokens_ptr,  # int32 [1], or None: width
    cols,  # tiles of columns
    n_in,
    n_out,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = width
    if tokens_ptr is not None:
        tokens = tl.load(tokens_ptr)
    first = tl.program_id(1) * TOKENS
    if first >= tokens:
        return
    token = first + tl.arange(0, TOKENS)
    inside = (token < width)[None, :]
    own, bit = tl.arange(0, ROWS), tl.arange(0, COLS)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    # Each part has every so many-th tile, so that the parts that run together read what stands together.
    for tile in range(tl.program_id(2), cols, tl.num_programs(2)):
        at = tl.program_id(0) * cols + tile
        mask = tl.load(masks_ptr + at.to(tl.int64) * ROWS + own)
        kept = ((mask[:, None] >> bit[None, :].to(tl.int64)) & 1).to(tl.int32)
        # The values stand row by row: before one are those of the rows above, and those on its left.
        counts = tl.sum(kept, 1)
        place = (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(kept, 1) - kept
        values = tl.load(values_ptr + tl.load(begin_ptr + at) + place, mask=kept != 0, other=0.0)
        col = tile * COLS + bit
        there = (col < n_in)[:, None] & inside
        x = tl.load(x_ptr + col.to(tl.int64)[:, None] * width + token[None, :], mask=there, other=0.0)
        sums = tl.dot(values, x, sums, input_precision="ieee")
    row = tl.program_id(0) * ROWS + own
    to = (tl.program_id(2).to(tl.int64) * n_out + row)[:, None] * width + token[None, :]
    tl.store(sums_ptr + to, sums, mask=(row < n_out)[:, None] & inside)


@triton.jit
def _finish(
    product_ptr,  # [parts, n_out, width], to be added up
    bias_ptr,  # float32 [n_out], or None
    residual_ptr,  # [n_out, width], or None
    out_ptr,  # [n_out, width], may be product_ptr
    tokens_ptr,  # int32 [1], or None: width
    parts,
    n_out,
    width,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = width
    if tokens_ptr is not None:
        tokens = tl.load(tokens_ptr)
    first = tl.program_id(1) * TOKENS
    if first >= tokens:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first + tl.arange(0, TOKENS)
    inside = (row < n_out)[:, None] & (token < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + token[None, :]
    product = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, parts):
        product += tl.load(product_ptr + at + part * n_out * width, mask=inside, other=0.0).to(tl.float32)
    _store(product, row, row < n_out, token, bias_ptr, residual_ptr, out_ptr, width, ACTIVATION)


@triton.jit
def _store(y, row, real, token, bias_ptr, residual_ptr, out_ptr, width, ACTIVATION: tl.constexpr):
    """Writes activation(y + bias) + residual of these rows and tokens, y float32 [rows, tokens]. real: rows of W."""
    inside = real[:, None] & (token < width)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=real, other=0.0)[:, None]
    y = _activated(y, ACTIVATION)
    at = row.to(tl.int64)[:, None] * width + token[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    """The activation of float32 values; NaN stays NaN."""
    if ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "relu":
        return tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == "tanh":
        # exp of a negative number cannot overflow. Off by less than 1e-7, which of a tiny y is not a tiny share.
        e = tl.exp(-2.0 * tl.abs(y))
        tanh = (1.0 - e) / (1.0 + e)
        return tl.where(y < 0.0, -tanh, tanh)
    return y
