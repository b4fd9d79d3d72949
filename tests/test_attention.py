"""attention and its gradients on every instruction set against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.attention import attention, attention_ref


class Case(NamedTuple):
    sequences: int
    tokens: int
    heads: int
    size: int
    keep: str = "all"

    def __str__(self) -> str:
        return "x".join(map(str, self[:4])) + f"-{self.keep}"


# Kernels take 8, 16 or 32 queries at a time, 8 keys, and 4, 8 or 16 values of a head.
CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 2, 5),
    Case(1, 8, 1, 8),
    Case(2, 9, 3, 16),
    Case(1, 31, 2, 17),
    Case(1, 33, 1, 32),
    Case(2, 40, 2, 64),
    Case(1, 65, 1, 48),
    Case(1, 130, 2, 33),
    Case(3, 20, 2, 32, "padded"),
    Case(3, 70, 1, 64, "padded"),
    Case(3, 41, 2, 20, "scattered"),
    Case(2, 12, 1, 32, "first not"),
    Case(0, 4, 2, 8),
    Case(2, 0, 2, 8),
]
DTYPES = [torch.float32, torch.bfloat16]
# Relative to the largest value. float32: sums, and powers of 2 that are good to 2e-7; bfloat16: rounding of the result.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8}


def operands(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """([q, k, v, d_out], keep)."""
    rng = torch.Generator().manual_seed(case.tokens)
    values = [torch.randn(case[:4], generator=rng).to(dtype) for _ in range(4)]
    if case.keep == "all":
        return values, None
    places = torch.arange(case.tokens)
    if case.keep == "padded":
        keep = places < torch.tensor([case.tokens, 1, case.tokens // 2])[:, None]
    elif case.keep == "scattered":
        keep = torch.rand(case.sequences, case.tokens, generator=rng) < 0.6
    else:
        keep = torch.stack([places < 0, places >= 0])
    return values, keep


def results(function, values: list[torch.Tensor], keep: torch.Tensor | None, **options) -> list[torch.Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [value.detach().clone().requires_grad_() for value in values[:3]]
    out = function(*leaves, keep, **options)
    out.backward(values[3].to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(got: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> None:
    for here, there in zip(got, wanted, strict=True):
        assert here.dtype == dtype
        size = max(1.0, float(there.abs().max())) if there.numel() else 1.0
        torch.testing.assert_close(here.double(), there.double(), rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_gradients_match_the_reference(isa, case, dtype, p):
    values, keep = operands(case, dtype)
    options = {"dropout": p, "seed": 2**63 + 12345, "scale": 0.3}
    assert_close(
        results(attention, values, keep, isa=isa, **options), results(attention_ref, values, keep, **options), dtype
    )


def test_attention_is_that_of_torch_by_default():
    values, _ = operands(Case(2, 50, 3, 32), torch.float32)

    def stock(q, k, v, keep):
        by_head = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)

    assert_close(results(attention, values, None), results(stock, values, None), torch.float32)


def test_attention_takes_any_strides():
    values, keep = operands(Case(3, 20, 2, 32, "padded"), torch.float32)
    turned = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in values]
    for here, there in zip(results(attention, turned, keep), results(attention, values, keep), strict=True):
        assert torch.equal(here, there)


def test_results_are_the_same_bits_on_any_number_of_threads_and_any_vectors():
    values, keep = operands(Case(3, 70, 2, 64, "padded"), torch.float32)
    wanted = results(attention, values, keep, dropout=0.1, seed=3, threads=1)
    for isa in set(_dispatch.supported_isas()) - {"scalar"}:
        for here, there in zip(
            results(attention, values, keep, dropout=0.1, seed=3, threads=3, isa=isa), wanted, strict=True
        ):
            assert torch.equal(here, there)


def test_a_nan_reaches_the_result_and_large_scores_do_not_overflow(isa):
    values, _ = operands(Case(1, 20, 1, 32), torch.float32)
    q, k, v, d_out = values
    large = results(attention, [300 * q, k, v, d_out], None, isa=isa)
    assert all(torch.isfinite(part).all() for part in large)
    torch.testing.assert_close(large[0].double(), attention_ref(300 * q, k, v), rtol=0, atol=1e-3)
    k[0, 7, 0, 3] = torch.nan
    assert attention(q, k, v, isa=isa).isnan().all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(InputError, match="seed must be"):
        attention(*[torch.zeros(1, 1, 1, 1)] * 3, dropout=0.1, seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "q must be"),
        ({"k": torch.zeros(2, 4, 1, 8)}, "k must be"),
        ({"v": torch.zeros(2, 3, 1, 8, dtype=torch.bfloat16)}, "v must be"),
        ({"v": torch.zeros(2, 3, 1, 8, dtype=torch.float64)}, "v must be float32 or bfloat16"),
        ({"keep": torch.ones(2, 3)}, "keep must be bool"),
        ({"keep": torch.ones(3, 2, dtype=torch.bool)}, "keep must be bool"),
    ],
)
def test_bad_operands_are_refused(change, message):
    operands = {name: torch.zeros(2, 3, 1, 8) for name in "qkv"} | change
    with pytest.raises(InputError, match=message):
        attention(**operands)


def test_a_mask_of_other_bytes_than_0_and_1_means_what_torch_says():
    q, k, v = torch.randn(3, 2, 5, 1, 4).unbind()
    bytes_ = torch.tensor([[2, 0, 255, 1, 0], [128, 1, 0, 0, 3]], dtype=torch.uint8)
    assert torch.equal(attention(q, k, v, bytes_.view(torch.bool)), attention(q, k, v, bytes_ != 0))
