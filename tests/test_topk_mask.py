"""topk_mask on every instruction set against a stable sort; pattern_mask against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsebert import patterns
from sparsebert.errors import InputError
from sparsebert.ops.topk_mask import pattern_mask, topk_mask, topk_mask_ref, topk_threshold

# Rows of up to 64, which are ranked, with a partial vector of groups; single rows; vectors of one chunk (16,384), one
# more, and several with a remainder.
SHAPES = ((1,), (3,), (64,), (65,), (97, 4), (50, 8), (7, 33), (5, 64), (4, 65), (9, 384), (3, 5000), (2, 3, 70),
          (16,), (33, 16), (7, 8), (16384,), (16385,), (100_003,), (2, 40_000))  # fmt: skip


def scores(shape, kind: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"distinct": x, "ties": x.round(), "equal": torch.zeros(shape), "tiny": x * 1e-41, "squares": x**2}[kind]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "tiny", "squares"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exactly_k_highest_and_ties_by_index(isa, shape, kind):
    x = scores(shape, kind)
    n = shape[-1]
    for k in sorted({0, 1, n // 8, n // 2, n - 1, n}):
        got = topk_mask(x, k, isa=isa)
        assert (got.sum(-1) == k).all()
        assert torch.equal(got, topk_mask_ref(x, k)), k


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "tiny"])
@pytest.mark.parametrize("shape", [(1,), (7, 33), (97, 4), (3, 5000), (100_003,), (2, 3, 70)], ids=str)
def test_the_threshold_is_the_kth_highest_score(isa, shape, kind):
    x = scores(shape, kind)
    n = shape[-1]
    for k in sorted({1, n // 2, n} - {0}):
        got = topk_threshold(x, k, isa=isa)
        assert torch.equal(got, torch.kthvalue(x, n - k + 1).values), k
        assert ((x >= got[..., None]).sum(-1) >= k).all() and ((x > got[..., None]).sum(-1) < k).all()


def test_a_threshold_may_be_infinite_and_needs_a_score():
    x = torch.tensor([torch.inf, 1.0, -torch.inf])
    assert [topk_threshold(x, k).item() for k in (1, 2, 3)] == [torch.inf, 1.0, -torch.inf]
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        topk_threshold(x, 0)


@pytest.mark.parametrize("sampled", [-1.0, 0.5, 2.0])
def test_a_sample_that_misleads_costs_time_only(isa, sampled):
    n, size = 100_003, 8192  # the sample from which a long vector's threshold is first guessed
    places = torch.arange(size) * (n // size) + ((torch.arange(size) * 2654435761) % 2**32 // 256) % (n // size)
    x = torch.rand(n, generator=torch.Generator().manual_seed(0))
    x[places] = sampled
    for k in (1, size - 1, size, size + 1, n // 2, n - size, n - 1):
        assert torch.equal(topk_mask(x, k, isa=isa), topk_mask_ref(x, k)), k


@pytest.mark.parametrize("order", ["rising", "falling", "blocks"])
def test_ordered_scores_are_no_exception(isa, order):
    x = torch.arange(70_000.0)
    x = {"rising": x, "falling": x.flip(0), "blocks": x // 10_000}[order].contiguous()
    for k in (1, 777, 35_000, 69_999):
        assert torch.equal(topk_mask(x, k, isa=isa), topk_mask_ref(x, k)), k


def test_both_zeros_are_equal_and_infinities_are_ordered(isa):
    for n in (6, 70, 40_000):
        x = torch.full((n,), -1.0)
        x[:6] = torch.tensor([-0.0, 0.0, -0.0, torch.inf, -torch.inf, 0.0])
        assert topk_mask(x, 3, isa=isa)[:6].tolist() == [True, True, False, True, False, False]
        assert not topk_mask(x, n - 1, isa=isa)[4]


@pytest.mark.parametrize("shape", [(5,), (70,), (40_000,), (3, 4), (3, 70)], ids=str)
def test_nan_is_refused(isa, shape):
    x = torch.zeros(shape)
    x.view(-1)[-1] = torch.nan
    for k in (0, 1, shape[-1]):
        with pytest.raises(InputError, match="scores must have no NaN"):
            topk_mask(x, k, isa=isa)


@pytest.mark.parametrize("shape", [(1000, 4), (50, 384), (200_000,)], ids=str)
def test_any_number_of_threads_gives_the_same_mask(isa, shape):
    x = scores(shape, "ties")
    expected = topk_mask(x, shape[-1] // 3, isa=isa, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(topk_mask(x, shape[-1] // 3, isa=isa, threads=threads), expected)


BAD_CALLS = {
    "got torch.float64 [4]": lambda: topk_mask(torch.zeros(4, dtype=torch.float64), 1),
    "got torch.float32 [] on": lambda: topk_mask(torch.tensor(1.0), 1),
    "must be contiguous": lambda: topk_mask(torch.zeros(4, 4).T[:, ::2], 1),
    "k must be between 0 and n = 4, got 5": lambda: topk_mask(torch.zeros(4), 5),
    "k must be between 0 and n = 4, got -1": lambda: topk_mask(torch.zeros(4), -1),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as error:
        BAD_CALLS[message]()
    assert message in str(error.value)


def best(values: np.ndarray, k: int) -> np.ndarray:
    """The definition for one vector: the k highest, lower index first."""
    keep = np.zeros(len(values), bool)
    keep[sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]] = True
    return keep


MATRICES = hnp.arrays(np.float32, (8, 12), elements=st.integers(0, 6).map(float))


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95]), st.booleans())
def test_unstructured_keeps_the_highest_of_the_matrix_or_of_each_row(x, sparsity, per_row):
    got = pattern_mask(torch.from_numpy(x), patterns.Unstructured(), sparsity, per_row=per_row).numpy()
    if per_row:
        expected = np.stack([best(row, 12 - patterns.zeros_in(12, sparsity)) for row in x])
    else:
        expected = best(x.ravel(), x.size - patterns.zeros_in(x.size, sparsity)).reshape(x.shape)
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_n_of_m_keeps_n_of_every_m(x):
    got = pattern_mask(torch.from_numpy(x), patterns.NofM(1, 3), 2 / 3).numpy()
    expected = np.stack([np.concatenate([best(part, 1) for part in row.reshape(-1, 3)]) for row in x])
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from([0.0, 0.3, 0.5, 0.8]))
def test_grouped_keeps_the_columns_of_highest_sums(x, sparsity):
    sums = x.reshape(2, 4, 12).sum(1)
    kept = sums.size - patterns.zeros_in(sums.size, sparsity)
    got = pattern_mask(torch.from_numpy(x), patterns.Grouped(4), sparsity).numpy()
    np.testing.assert_array_equal(got, best(sums.ravel(), kept).reshape(2, 12).repeat(4, 0))
    chunked = pattern_mask(torch.from_numpy(x), patterns.Grouped(4, 3), sparsity).numpy()[::4]
    assert chunked.sum() == kept // 3 * 3 and (chunked.sum(1) % 3 == 0).all()
    for row, total in zip(chunked, sums, strict=True):
        np.testing.assert_array_equal(row, best(total, int(row.sum())))
    # Exchanging the last kept chunk of a group for the first removed one of another would not be better.
    chunks = np.sort(sums, 1)[:, ::-1].reshape(2, 4, 3).sum(2)
    counts = chunked.sum(1) // 3
    lasts = [chunks[g, c - 1] for g, c in enumerate(counts) if c]
    firsts = [chunks[g, c] for g, c in enumerate(counts) if c < 4]
    assert not lasts or not firsts or min(lasts) >= max(firsts)


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_v_n_m_keeps_four_shared_columns_and_n_of_them_a_row(x):
    got = pattern_mask(torch.from_numpy(x), patterns.VNM(4, 2, 6), 2 / 3).numpy()
    for group in range(0, 8, 4):
        for start in range(0, 12, 6):
            block = x[group : group + 4, start : start + 6]
            shared = np.flatnonzero(best(block.sum(0), 4))
            for row in range(4):
                expected = np.zeros(6, bool)
                expected[shared[best(block[row, shared], 2)]] = True
                np.testing.assert_array_equal(got[group + row, start : start + 6], expected)
