"""admm_prune: the weights it keeps, against its float64 reference and against other ways to choose a support."""

import functools

import numpy as np
import pytest
import torch

from bench.shapes import layer_problem, low_rank_metric
from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.admm_prune import admm_path, admm_path_ref, admm_prune, admm_prune_ref
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.ops.obs_prune import obs_prune
from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.patterns import VNM, Grouped, Pattern, kept_in, parse

# Pattern and sparsity; all fit 64 x 192.
PATTERNS = [
    ("unstructured", 0.5), ("unstructured", 0.875), ("unstructured", 0.95), ("2:4", 0.5), ("32x1", 0.75),
    ("16x1/16", 0.75), ("32:2:16", 0.875),
]  # fmt: skip


def problem(rows: int, n_in: int, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    weight, h = layer_problem(rows, n_in, gelu)
    return torch.from_numpy(weight), torch.from_numpy(h)


def separated(rows: int, n_in: int, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A problem without near-ties: nearly independent inputs; weights to keep are at least three times the others."""
    generator = torch.Generator().manual_seed(0)
    h = 0.02 * torch.randn(n_in, n_in, generator=generator, dtype=torch.float64)
    h = h @ h.T + torch.eye(n_in, dtype=torch.float64)
    weight = torch.rand(rows * n_in, generator=generator, dtype=torch.float64)
    chosen = torch.randperm(rows * n_in, generator=generator)[: kept_in(parse("unstructured"), rows, n_in, sparsity)]
    weight *= 0.3
    weight[chosen] = 1.0 + weight[chosen]
    return weight.view(rows, n_in), h


def error(weight: torch.Tensor, h: torch.Tensor, keep: torch.Tensor, metric: torch.Tensor | None = None) -> float:
    """tr(B (V - W*) H (V - W*)ᵀ) of the best V on a support; B = I without a metric."""
    lost = masked_lstsq(weight @ h, h, keep, row_metric=metric) - weight
    return float(((lost @ h) * (lost if metric is None else metric @ lost)).sum())


@functools.cache
def error_of_reference(name: str, sparsity: float, gelu: bool) -> float:
    weight, h = problem(64, 192, gelu)
    return error(weight, h, admm_prune_ref(weight, h, parse(name), sparsity))


def magnitude(weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    return pattern_mask((weight**2 * h.diagonal()).float(), pattern, sparsity)


@pytest.mark.parametrize(("name", "sparsity"), PATTERNS)
def test_keeps_what_the_pattern_says(isa, name, sparsity):
    weight, h = problem(64, 192)
    pattern = parse(name)
    keep = admm_prune(weight, h, pattern, sparsity, iterations=20, isa=isa)
    assert keep.dtype == torch.bool and keep.shape == weight.shape
    assert keep.sum() == kept_in(pattern, 64, 192, sparsity)
    # A projection of the support on its pattern changes nothing.
    assert torch.equal(pattern_mask(keep.float(), pattern, sparsity), keep)


@pytest.mark.parametrize(("rows", "n_in"), [(1, 1), (1, 50), (7, 31), (8, 47), (32, 48), (33, 49), (20, 97)])
@pytest.mark.parametrize("sparsity", [0.2, 0.75])
def test_equals_the_reference_where_nothing_is_nearly_tied(isa, rows, n_in, sparsity):
    weight, h = separated(rows, n_in, sparsity)
    expected = admm_prune_ref(weight, h, parse("unstructured"), sparsity)
    assert torch.equal(admm_prune(weight, h, parse("unstructured"), sparsity, isa=isa), expected)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("name", "sparsity"), PATTERNS)
def test_the_error_is_the_references_and_below_that_of_the_magnitudes(isa, name, sparsity, gelu):
    weight, h = problem(64, 192, gelu)
    pattern = parse(name)
    ours = error(weight, h, admm_prune(weight, h, pattern, sparsity, isa=isa))
    # Near-ties fall differently in float32 and float64, and the iterations amplify them.
    assert ours == pytest.approx(error_of_reference(name, sparsity, gelu), rel=0.015)
    assert ours <= error(weight, h, magnitude(weight, h, pattern, sparsity))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("sparsity", [0.75, 0.875, 0.95])
def test_is_at_least_as_good_as_exact_obs_over_all_rows(sparsity, gelu):
    weight, h = problem(64, 192, gelu)
    obs = obs_prune(weight, h, parse("unstructured"), sparsity, per_row=False) != 0
    assert error(weight, h, admm_prune(weight, h, parse("unstructured"), sparsity)) <= error(weight, h, obs)


@pytest.mark.parametrize(("name", "sparsity"), PATTERNS)
def test_with_a_row_metric_the_error_is_the_references_and_below_what_ignores_it(name, sparsity):
    weight, h = problem(64, 192)
    pattern, metric = parse(name), low_rank_metric(64)
    keep = admm_prune(weight, h, pattern, sparsity, row_metric=metric)
    assert keep.sum() == kept_in(pattern, 64, 192, sparsity)
    assert torch.equal(pattern_mask(keep.float(), pattern, sparsity), keep)
    expected = admm_prune_ref(weight, h, pattern, sparsity, row_metric=metric)
    ours = error(weight, h, keep, metric)
    # 64 rows have two groups of 32: few and large choices, so float32 and float64 choose differently.
    groups = isinstance(pattern, Grouped | VNM)
    assert ours == pytest.approx(error(weight, h, expected, metric), rel=0.12 if groups else 0.03)
    assert ours < error(weight, h, admm_prune(weight, h, pattern, sparsity), metric)


@pytest.mark.parametrize(("rows", "n_in"), [(1, 1), (1, 50), (7, 31), (64, 192)])
def test_a_row_metric_that_couples_nothing_weights_the_rows(rows, n_in):
    weight, h = problem(rows, n_in)
    scales = torch.logspace(-1, 1, rows, dtype=torch.float64)
    metric = torch.diag(scales**2)
    scaled = admm_prune(weight * scales[:, None], h, parse("unstructured"), 0.75)
    keep = admm_prune(weight, h, parse("unstructured"), 0.75, row_metric=metric)
    assert error(weight, h, keep, metric) == pytest.approx(error(weight, h, scaled, metric), rel=0.1, abs=1e-12)


def test_matches_the_reference_on_an_encoder_layer(isa):
    weight, h = problem(96, 384, gelu=True)
    keep = admm_prune(weight, h, parse("unstructured"), 0.875, iterations=20, isa=isa)
    expected = admm_prune_ref(weight, h, parse("unstructured"), 0.875, iterations=20)
    assert error(weight, h, keep) == pytest.approx(error(weight, h, expected), rel=0.005)


def test_every_row_keeps_as_many_where_that_is_asked():
    weight, h = problem(64, 192)
    keep = admm_prune(weight, h, parse("unstructured"), 0.875, per_row=True, iterations=20)
    assert (keep.sum(1) == 24).all()
    assert (admm_prune(weight, h, parse("unstructured"), 0.875, iterations=20).sum(1) != 24).any()


def test_more_iterations_are_better():
    weight, h = problem(64, 192)
    errors = [error(weight, h, admm_prune(weight, h, parse("unstructured"), 0.875, iterations=n)) for n in (5, 20, 120)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("name", "gelu"), [("unstructured", False), ("unstructured", True), ("16x1", False)])
def test_supports_of_one_climb_are_the_references(isa, name, gelu):
    weight, h = problem(64, 192, gelu)
    pattern, levels = parse(name), (0.25, 0.5, 0.75, 0.875, 0.95)
    supports = admm_path(weight, h, pattern, levels, isa=isa)
    for keep, expected, level in zip(supports, admm_path_ref(weight, h, pattern, levels), levels, strict=True):
        assert keep.sum() == kept_in(pattern, 64, 192, level)
        assert torch.equal(pattern_mask(keep.float(), pattern, level), keep)
        assert error(weight, h, keep) == pytest.approx(error(weight, h, expected), rel=0.03)
        assert error(weight, h, keep) < 1.35 * error(weight, h, admm_prune(weight, h, pattern, level, isa=isa))
        assert error(weight, h, keep) < error(weight, h, magnitude(weight, h, pattern, level))


@pytest.mark.parametrize(("rows", "n_in"), [(1, 1), (1, 50), (7, 31), (33, 49), (20, 97)])
def test_one_climb_equals_the_reference_where_nothing_is_nearly_tied(isa, rows, n_in):
    weight, h = separated(rows, n_in, 0.5)
    supports = admm_path(weight, h, parse("unstructured"), (0.0, 0.5), isa=isa)
    assert torch.equal(supports, admm_path_ref(weight, h, parse("unstructured"), (0.0, 0.5)))
    assert supports[0].all()


@pytest.mark.parametrize("levels", [(), (0.5, 0.5), (0.5, 0.3), (-0.1, 0.3), (0.5, 1.0)])
def test_levels_must_rise(levels):
    with pytest.raises(InputError, match="levels must be rising sparsities"):
        admm_path(*problem(8, 24), parse("unstructured"), levels)


def test_a_pattern_that_implies_its_sparsity_has_no_climb():
    with pytest.raises(InputError, match="pattern must not imply its sparsity, got 2:4"):
        admm_path(*problem(8, 24), parse("2:4"), (0.3, 0.5))


def test_sparsity_0_keeps_all():
    weight, h = problem(8, 24)
    assert admm_prune(weight, h, parse("unstructured"), 0.0).all()


def test_one_iteration_keeps_the_largest_magnitudes():
    weight, h = problem(16, 48)
    keep = admm_prune(weight, h, parse("unstructured"), 0.5, iterations=1)
    assert torch.equal(keep, magnitude(weight, h, parse("unstructured"), 0.5))


def test_dead_columns_are_the_first_to_go():
    weight, h = problem(32, 96)
    dead = [5, 40, 41]
    h[dead] = h[:, dead] = 0.0
    h[dead, dead] = 1e-12
    weight[:, dead] *= 100.0
    keep = admm_prune(weight, h, parse("unstructured"), 0.5)
    assert not keep[:, dead].any() and keep.sum() == 32 * 96 // 2


@pytest.mark.parametrize("sparsity", [0.3, 0.875])
def test_any_number_of_threads_gives_the_same_support(isa, sparsity):
    weight, h = problem(100, 192)
    expected = admm_prune(weight, h, parse("unstructured"), sparsity, iterations=30, threads=1, isa=isa)
    for threads in (2, 3, 8):
        keep = admm_prune(weight, h, parse("unstructured"), sparsity, iterations=30, threads=threads, isa=isa)
        assert torch.equal(keep, expected)


def call(weight=None, h=None, pattern="unstructured", sparsity=0.5, **options):
    """A call that is valid except for the given arguments."""
    weight = torch.ones(4, 6, dtype=torch.float64) if weight is None else weight
    h = torch.eye(6, dtype=torch.float64) if h is None else h
    return admm_prune(weight, h, parse(pattern), sparsity, **options)


BAD_CALLS = {
    "weight must be 2-d float64 on the CPU, got torch.float32 [4, 6]": lambda: call(torch.ones(4, 6)),
    "h must be 2-d float64 on the CPU, got torch.float64 [6]": lambda: call(h=torch.ones(6, dtype=torch.float64)),
    "h must be [n_in = 6, n_in], got [5, 5]": lambda: call(h=torch.eye(5, dtype=torch.float64)),
    "weight must be finite, got inf or NaN": lambda: call(torch.full((4, 6), torch.nan, dtype=torch.float64)),
    "h must be finite, got inf or NaN": lambda: call(h=torch.full((6, 6), torch.inf, dtype=torch.float64)),
    "h must be positive definite, pivot 0 of 6 is not above 0": lambda: call(h=-torch.eye(6, dtype=torch.float64)),
    "h must be positive definite, pivot 1 of 6 is not above 0": lambda: call(h=torch.ones(6, 6, dtype=torch.float64)),
    "row_metric must be 2-d float64 on the CPU, got torch.float32": lambda: call(row_metric=torch.eye(4)),
    "row_metric must be [rows = 4, rows], got [6, 6]": lambda: call(row_metric=torch.eye(6, dtype=torch.float64)),
    "row_metric must be finite, got inf or NaN": lambda: call(row_metric=torch.full((4, 4), torch.nan).double()),
    "row_metric must be positive definite, pivot 0 of 4": lambda: call(row_metric=torch.zeros(4, 4).double()),
    "pattern 2:4 needs a multiple of 4 inputs, weight has 6": lambda: call(pattern="2:4"),
    "pattern 3x1 needs a multiple of 3 outputs, weight has 4": lambda: call(pattern="3x1"),
    "leaves weight [4, 6] no weight at all": lambda: call(pattern="4x1/6", sparsity=0.5),
    "iterations must be at least 1, got 0": lambda: call(iterations=0),
    "threads must be an integer of at least 1, got 0": lambda: call(threads=0),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as raised:
        BAD_CALLS[message]()
    assert message in str(raised.value)


def test_the_binding_refuses_a_mask_of_other_bytes_than_0_and_1():
    core = _dispatch.core()
    rows, n = core.ADMM_BLOCK_ROWS, core.ADMM_PANEL
    square, wide = np.zeros(n * n, np.float32), np.zeros((rows, n), np.float32)
    keep = np.full((rows, n), 255, np.uint8).view(bool)
    arrays = square, square.copy(), np.ones(n, np.float32), wide, *(wide.copy() for _ in range(4))
    with pytest.raises(ValueError, match="masks must hold 0 and 1"):
        core.admm_prune_step(*arrays, keep, 1.0, 1.0, "scalar", 1)
