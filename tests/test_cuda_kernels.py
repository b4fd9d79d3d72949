"""The calls of the CUDA kernels: what they refuse, and on a GPU if there is one, their results."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import require
from test_cuda_layout import vnm_weight

from sparsebert import machine
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.kernels import cuda_core
from sparsebert.kernels import masked_lstsq as lstsq
from sparsebert.kernels import sparse_matmul as matmul
from sparsebert.ops.masked_lstsq import masked_lstsq_ref
from sparsebert.ops.sparse_matmul import ACTIVATIONS
from sparsebert.patterns import VNM


@pytest.fixture
def built() -> None:
    try:
        cuda_core()
    except UnsupportedError as error:
        require("nvcc", str(error))


@pytest.fixture
def gpu(built) -> str:
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")
    return "cuda"


def packed(n_out: int = 64, n_in: int = 32, pattern: VNM | None = None) -> matmul.PackedVNM:
    """A packed weight of zeros, as the checks see it."""
    nothing = torch.zeros(1, dtype=torch.int32)
    return matmul.PackedVNM(nothing, nothing, nothing, pattern or VNM(32, 2, 8), 32, 1, n_in, n_out)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


BAD_PRODUCTS = {
    "x must be bfloat16 [n_in = 32, tokens], got torch.float32": lambda: matmul.sparse_matmul(
        torch.zeros(32, 3), packed()
    ),
    "got torch.bfloat16 [3, 32]": lambda: matmul.sparse_matmul(bf16(3, 32), packed()),
    "bias must be contiguous float32 [n_out = 64], got torch.float32 [32]": lambda: matmul.sparse_matmul(
        bf16(32, 3), packed(), torch.zeros(32)
    ),
    "activation must be one of none, gelu, relu, tanh, got 'silu'": lambda: matmul.sparse_matmul(
        bf16(32, 3), packed(), activation="silu"
    ),
    "residual must be bfloat16 [n_out, tokens] = [64, 3]": lambda: matmul.sparse_matmul(
        bf16(32, 3), packed(), residual=bf16(3, 64)
    ),
    "x, weight, bias and residual must be on one GPU, got cpu": lambda: matmul.sparse_matmul(bf16(32, 3), packed()),
    "weight must be 2-d float32 or bfloat16 on the CPU, got torch.float64": lambda: matmul.pack_vnm(
        torch.zeros(64, 32, dtype=torch.float64), VNM(32, 2, 8)
    ),
    "pattern 32:2:8 needs a multiple of 32 outputs": lambda: matmul.pack_vnm(torch.zeros(40, 32), VNM(32, 2, 8)),
    "at most 65536 inputs": lambda: matmul.pack_vnm(torch.zeros(32, 65544), VNM(32, 2, 8)),
    "weight in bf16 must be finite": lambda: matmul.pack_vnm(torch.full((32, 32), torch.nan), VNM(32, 2, 8)),
}


@pytest.mark.parametrize("message", BAD_PRODUCTS)
def test_a_bad_product_is_named(message):
    with pytest.raises(InputError) as error:
        BAD_PRODUCTS[message]()
    assert message in str(error.value)


def test_only_two_of_four_are_packed():
    with pytest.raises(UnsupportedError, match="multiply V:2:M, got 32:1:8"):
        matmul.pack_vnm(torch.zeros(32, 32), VNM(32, 1, 8))


def test_a_weight_off_its_pattern_is_named(built):
    with pytest.raises(InputError, match="weight must keep to 32:2:8: rows 0 to 31 must share 4 columns of 8"):
        matmul.pack_vnm(torch.ones(32, 32), VNM(32, 2, 8))


def test_a_packed_weight_has_the_size_of_its_chunks(built):
    weight = matmul.pack_vnm(torch.from_numpy(vnm_weight(128, 160, 64, 16)), VNM(64, 2, 16))
    # 40 kept columns make two chunks of 32; a tile of 16 rows stores 16 of them per row.
    assert (weight.strip_rows, weight.chunks, weight.cols.numel()) == (64, 2, 2 * 2 * 32)
    assert weight.values.numel() * 2 == 128 * 2 * 16
    assert weight.metadata.numel() * 16 == 128 * 2 * 16
    assert weight.to("cpu").pattern == weight.pattern


def test_activations_have_the_order_of_the_core():
    assert matmul.ACTIVATIONS == ACTIVATIONS


def test_rows_are_copied_only_if_they_do_not_begin_on_16_bytes():
    x = bf16(5, 24)
    assert matmul._rows_apart(x, 24) is x
    assert matmul._rows_apart(x[:, :17], 24).data_ptr() == x.data_ptr()
    for other in (bf16(5, 17), x[:, 1:9], x.T, bf16(24, 5).T):
        stride = -(-other.shape[1] // 8) * 8
        copy = matmul._rows_apart(other, stride)
        assert copy.data_ptr() != other.data_ptr() and copy.stride() == (stride, 1) and torch.equal(copy, other)


def test_a_view_that_ends_with_its_memory_is_copied():
    short = bf16(5 * 24 - 7).as_strided((5, 17), (24, 1))
    assert matmul._rows_apart(short, 24).data_ptr() != short.data_ptr()


@pytest.mark.parametrize("complement", [False, True])
def test_equal_rows_form_a_group_and_the_largest_systems_come_first(complement):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, 30, generator=generator) < 0.5)[torch.randint(7, (40,), generator=generator)]
    groups = lstsq.groups_of(lstsq.supports_of(mask), 30, complement)
    sizes = (~mask if complement else mask).sum(1)
    members = [part.long() for part in groups.rows.tensor_split(groups.row_ptr[1:-1])]
    assert sorted(groups.rows.tolist()) == list(range(40)) and groups.row_ptr[-1] == 40
    assert all((mask[own] == mask[own[0]]).all() for own in members)
    assert len({tuple(mask[own[0]].tolist()) for own in members}) == len(members)
    assert [int(sizes[own[0]]) for own in members] == sorted((int(sizes[own[0]]) for own in members), reverse=True)
    assert groups.k == sizes.max() and groups.g == max(map(len, members))


def test_doctor_says_whether_the_kernels_are_built(monkeypatch):
    assert "unmeasured" in machine._cuda_kernels() or "install the package again" in machine._cuda_kernels()
    monkeypatch.setitem(sys.modules, "sparsebert._cuda", None)
    monkeypatch.delattr("sparsebert._cuda", raising=False)
    said = machine._cuda_kernels()
    assert said.startswith("off: the CUDA kernels sparsebert._cuda cannot be imported") and "nvcc" in said


@pytest.mark.parametrize(("n_out", "n_in", "v", "m", "tokens"), [
    (32, 8, 32, 8, 1), (30, 70, 15, 10, 9), (128, 160, 64, 16, 129), (256, 12, 128, 6, 33), (3072, 768, 128, 16, 640),
])  # fmt: skip
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_product_on_a_gpu_matches_torch(gpu, n_out, n_in, v, m, tokens, activation):
    dense = torch.from_numpy(vnm_weight(n_out, n_in, v, m))
    weight = matmul.pack_vnm(dense, VNM(v, 2, m)).to(gpu)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_in, tokens, generator=generator).bfloat16().to(gpu)
    bias = torch.randn(n_out, generator=generator).to(gpu)
    residual = torch.randn(n_out, tokens, generator=generator).bfloat16().to(gpu)
    got = matmul.sparse_matmul(x, weight, bias, activation=activation, residual=residual)
    want = dense.double().to(gpu) @ x.double() + bias[:, None].double()
    want = (torch.nn.functional.gelu(want) if activation == "gelu" else want) + residual.double()
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("rows", "n_in", "share"), [(1, 1, 1.0), (13, 31, 0.5), (40, 300, 0.9), (64, 768, 0.1)])
def test_least_squares_on_a_gpu_match_the_reference(gpu, rows, n_in, share):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n_in + 20, n_in, generator=generator, dtype=torch.float64)
    h = x.T @ x / n_in + 0.1 * torch.eye(n_in, dtype=torch.float64)
    target = torch.randn(rows, n_in, generator=generator, dtype=torch.float64)
    mask = (torch.rand(-(-rows // 3), n_in, generator=generator) < share).repeat(3, 1)[:rows]
    want = masked_lstsq_ref(target, h, mask)
    got = lstsq.masked_lstsq(target.to(gpu), h.to(gpu), mask.to(gpu))
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=1e-9)
    inverse = torch.linalg.inv(h)
    start = (target @ inverse).to(gpu)
    got = lstsq.masked_lstsq(start, ((inverse + inverse.T) / 2).to(gpu), mask.to(gpu), complement=True)
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=1e-8)
    assert (got[~mask.to(gpu)] == 0).all()
    if mask[0].any():
        h[mask[0].nonzero()[0], mask[0].nonzero()[0]] = -1.0
        with pytest.raises(InputError, match="is not above 0"):
            lstsq.masked_lstsq(target.to(gpu), h.to(gpu), mask.to(gpu))
