"""masked_lstsq on every instruction set against its float64 reference, at the sizes where tiling could go wrong."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.shapes import layer_problem
from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops import masked_lstsq as module
from sparsebert.ops.masked_lstsq import masked_lstsq, masked_lstsq_ref

# Around the rows of a tile (4, 8) and the columns of a panel (4, 12, 24), and several panels with a remainder.
SUPPORTS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 23, 24, 25, 31, 47, 48, 49, 97)
# Largest |V - reference| in units of the largest |reference|. A solve loses at most as many digits of 2^-53 as the
# condition number has, and Cholesky and LU lose different ones.
TOLERANCE = {"condition 1e6": 1e-9, "well conditioned": 1e-12}


def problem(rows: int, n_in: int, condition: float = 10.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """T and H. H's eigenvalues are spaced evenly in their logarithm. Its part below the diagonal must not be read."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((n_in, n_in)))
    h = (q * np.geomspace(1.0, 1.0 / condition, n_in)) @ q.T
    weight = rng.standard_normal((rows, n_in))
    return torch.from_numpy(weight @ h), torch.from_numpy(np.triu(h) + 7.0 * np.tril(np.ones_like(h), -1))


def random_mask(rows: int, n_in: int, kept: float, group: int = 1, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.random((rows // group, n_in)) < kept).repeat(group, 0))


def check(v: torch.Tensor, target, h, mask, tolerance: float = TOLERANCE["well conditioned"]) -> None:
    expected = masked_lstsq_ref(target, h, mask)
    assert v.dtype == torch.float64 and v.shape == target.shape
    assert (v[~mask] == 0).all()
    np.testing.assert_allclose(v, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max()))


@pytest.mark.parametrize("kept", SUPPORTS)
def test_matches_the_reference_at_every_remainder(isa, kept):
    target, h = problem(5, 201)
    mask = torch.zeros(5, 201, dtype=torch.bool)
    for row in range(5):
        mask[row, torch.randperm(201, generator=torch.Generator().manual_seed(row))[:kept]] = True
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask)


@pytest.mark.parametrize("group", [1, 2, 8, 9, 25, 50])
def test_matches_the_reference_for_every_number_of_equal_rows(isa, group):
    target, h = problem(2 * group, 61)
    for kept in (0.3, 0.9):
        mask = random_mask(2 * group, 61, kept, group)
        check(masked_lstsq(target, h, mask, isa=isa), target, h, mask)


@pytest.mark.parametrize("n_in", [1, 2, 7, 24, 31, 130])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_matches_the_reference_at_every_density(isa, n_in, kept):
    target, h = problem(40, n_in)
    mask = random_mask(40, n_in, kept)
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.75])
def test_an_ill_conditioned_moment_costs_only_its_digits(isa, kept):
    target, h = problem(120, 96, condition=1e6)
    mask = random_mask(120, 96, kept)
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask, TOLERANCE["condition 1e6"])


@pytest.mark.parametrize(
    ("rows", "n_in", "group", "kept"), [(128, 384, 1, 0.125), (64, 384, 32, 0.5), (8, 768, 1, 0.3)]
)
def test_matches_the_reference_on_encoder_layers(isa, rows, n_in, group, kept):
    weight, h = map(torch.from_numpy, layer_problem(rows, n_in, gelu=True))
    target = weight @ h
    mask = random_mask(rows, n_in, kept, group)
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask, TOLERANCE["condition 1e6"])


def test_equal_rows_need_not_be_neighbours(isa):
    target, h = problem(12, 40)
    mask = random_mask(3, 40, 0.4).repeat(4, 1)
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask)


def test_an_empty_row_is_zero_and_a_full_one_the_dense_optimum(isa):
    target, h = problem(2, 50)
    mask = torch.stack([torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)])
    v = masked_lstsq(target, h, mask, isa=isa)
    assert (v[0] == 0).all()
    check(v, target, h, mask)


def test_both_ways_to_solve_agree(isa, monkeypatch):
    target, h = problem(300, 45)
    mask = random_mask(300, 45, 0.7)
    calls = []
    solve = module._solve
    monkeypatch.setattr(module, "_solve", lambda *a: calls.append((a[5], len(a[3]))) or solve(*a))
    indirect = masked_lstsq(target, h, mask, isa=isa)
    assert dict(calls)[True] > 250  # most rows are solved by their complement
    direct = torch.cat([masked_lstsq(t, h, m, isa=isa) for t, m in zip(target.split(1), mask.split(1), strict=True)])
    assert sum(rows for complement, rows in calls if not complement) >= 300
    np.testing.assert_allclose(indirect, direct, rtol=0, atol=1e-12)


def test_a_singular_moment_is_no_fault_where_no_support_is(isa):
    target, h = problem(300, 45)
    h[3] = h[:, 3] = 0.0
    mask = random_mask(300, 45, 0.7)
    mask[:, 3] = False
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask)


@pytest.mark.parametrize("kept", [0.2, 0.8])
def test_any_number_of_threads_gives_the_same_bits(isa, kept):
    target, h = problem(120, 80)
    mask = random_mask(120, 80, kept, 2)
    expected = masked_lstsq(target, h, mask, isa=isa, threads=1).numpy().tobytes()
    for threads in (2, 3, 8):
        assert masked_lstsq(target, h, mask, isa=isa, threads=threads).numpy().tobytes() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_the_residual_is_zero_on_the_support(rows, n_in, kept, seed):
    target, h = problem(rows, n_in, seed=seed)
    mask = random_mask(rows, n_in, kept, seed=seed)
    v = masked_lstsq(target, h, mask)
    symmetric = torch.triu(h) + torch.triu(h, 1).T
    assert ((v @ symmetric - target)[mask].abs() < 1e-11).all()


@pytest.mark.parametrize(
    ("rows", "n_in", "kept"), [(1, 1, 1.0), (1, 30, 0.5), (7, 1, 1.0), (12, 31, 0.2), (16, 24, 0.7)]
)
def test_rows_that_count_together_match_the_reference(rows, n_in, kept):
    target, h = problem(rows, n_in, condition=100.0)
    _, metric = problem(1, rows, condition=100.0, seed=1)
    metric = torch.triu(metric) + torch.triu(metric, 1).T
    mask = random_mask(rows, n_in, kept)
    v = masked_lstsq(target, h, mask, row_metric=metric)
    expected = masked_lstsq_ref(target, h, mask, row_metric=metric)
    assert (v[~mask] == 0).all()
    h = torch.triu(h) + torch.triu(h, 1).T

    def objective(v):
        return float((v * (metric @ (v @ h - 2 * target))).sum())

    rowwise = objective(masked_lstsq(target, h, mask))
    gap = objective(v) - objective(expected)
    assert -1e-9 <= gap <= 1e-4 * (rowwise - objective(expected)) + 1e-12


def test_a_row_metric_changes_nothing_where_rows_are_independent_or_keep_the_same():
    target, h = problem(10, 40)
    mask = random_mask(10, 40, 0.5)
    diagonal = torch.diag(torch.linspace(0.1, 9.0, 10, dtype=torch.float64))
    torch.testing.assert_close(masked_lstsq(target, h, mask, row_metric=diagonal), masked_lstsq(target, h, mask))
    _, metric = problem(1, 10, seed=1)
    metric = torch.triu(metric) + torch.triu(metric, 1).T
    same = mask[:1].repeat(10, 1)
    torch.testing.assert_close(masked_lstsq(target, h, same, row_metric=metric), masked_lstsq(target, h, same))


def test_the_row_and_pivot_that_fail_are_named(isa):
    target, h = problem(4, 60)
    h[17, 17] = -1.0
    mask = torch.zeros(4, 60, dtype=torch.bool)
    mask[:, :10] = True
    mask[2:, 12:40:5] = True  # 17 is the twelfth column of rows 2 and 3
    with pytest.raises(InputError, match="every support, pivot 11 of row 2 is not above 0; raise the damping"):
        masked_lstsq(target, h, mask, isa=isa)
    mask[2:, 17] = False
    check(masked_lstsq(target, h, mask, isa=isa), target, h, mask)


WITHOUT_MEMORY = """
import resource, torch
from sparsebert.ops.masked_lstsq import masked_lstsq
h = torch.zeros(9_000, 9_000, dtype=torch.float64)
target, mask = torch.ones(2, 9_000, dtype=torch.float64), torch.ones(2, 9_000, dtype=torch.bool)
small = torch.ones(2, 30, dtype=torch.float64), torch.eye(30, dtype=torch.float64), torch.ones(2, 30, dtype=torch.bool)
masked_lstsq(*small)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
try:
    masked_lstsq(target, h, mask)
except MemoryError:
    assert torch.equal(masked_lstsq(*small), small[0])
else:
    raise AssertionError("324 MB were had of 64")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
def test_memory_that_a_thread_cannot_have_is_an_error_of_the_call():
    subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], check=True)


def call(target=None, h=None, mask=None, **options):
    """A call that is valid except for the given arguments."""
    target = torch.zeros(2, 3, dtype=torch.float64) if target is None else target
    h = torch.eye(3, dtype=torch.float64) if h is None else h
    mask = torch.ones(2, 3, dtype=torch.bool) if mask is None else mask
    return masked_lstsq(target, h, mask, **options)


NAN = torch.tensor([[1.0, torch.nan, 0.0]], dtype=torch.float64)
BAD_CALLS = {
    "target must be 2-d contiguous torch.float64 on the CPU, got torch.float32 [2, 3]": lambda: call(torch.zeros(2, 3)),
    "target must be 2-d contiguous torch.float64 on the CPU, got torch.float64 [3]": lambda: call(NAN[0]),
    "h must be 2-d contiguous torch.float64 on the CPU, got torch.float64 [3, 3]": lambda: call(
        h=torch.ones(3, 6, dtype=torch.float64)[:, ::2]
    ),
    "h must be [n_in = 3, n_in], got [2, 3]": lambda: call(h=torch.ones(2, 3, dtype=torch.float64)),
    "target must be [rows >= 1, n_in >= 1], got [0, 3]": lambda: call(torch.zeros(0, 3, dtype=torch.float64)),
    "mask must be 2-d contiguous torch.bool on the CPU, got torch.uint8": lambda: call(
        mask=torch.ones(2, 3, dtype=torch.uint8)
    ),
    "mask must match target [2, 3], got [1, 3]": lambda: call(mask=torch.ones(1, 3, dtype=torch.bool)),
    "target must be finite, got inf or NaN": lambda: call(NAN, mask=torch.ones(1, 3, dtype=torch.bool)),
    "h must be finite, got inf or NaN": lambda: call(h=torch.full((3, 3), torch.inf, dtype=torch.float64)),
    "row_metric must be 2-d contiguous torch.float64 on the CPU, got torch.float32": lambda: call(
        row_metric=torch.eye(2)
    ),
    "row_metric must be [rows = 2, rows], got [3, 3]": lambda: call(row_metric=torch.eye(3, dtype=torch.float64)),
    "row_metric must be finite, got inf or NaN": lambda: call(row_metric=torch.full((2, 2), torch.nan).double()),
    "threads must be an integer of at least 1, got 0": lambda: call(threads=0),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as error:
        BAD_CALLS[message]()
    assert message in str(error.value)


def test_a_mask_of_other_bytes_than_0_and_1_means_what_torch_says():
    mask = torch.tensor([[2, 0, 255], [0, 128, 1]], dtype=torch.uint8).view(torch.bool)
    target, h = torch.randn(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert torch.equal(masked_lstsq(target, h, mask), target * (mask.view(torch.uint8) != 0))
    metric = torch.eye(2, dtype=torch.float64)
    got = masked_lstsq(target, h, mask, row_metric=metric)
    torch.testing.assert_close(got, target * (mask.view(torch.uint8) != 0))
    rows, ends = np.arange(2, dtype=np.int32), np.arange(3)
    arrays = target.numpy(), h.numpy(), mask.numpy(), ends, rows, False, np.zeros((2, 3))
    with pytest.raises(ValueError, match="masks must hold 0 and 1"):
        _dispatch.core().masked_lstsq(*arrays, "scalar", 1)
