"""obs_prune and obs_sweep on every instruction set against their references, on every pattern."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench.shapes import random_moments
from sparsebert.engine.rivals import torch_threads
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.ops.obs_prune import _inverse, _trace, obs_prune, obs_prune_ref, obs_sweep, obs_sweep_ref
from sparsebert.patterns import VNM, Grouped, NofM, Unstructured, kept_in, parse

# The support is compared exactly. Values go through different factorisations of an H of condition number 1e3 to 1e4.
TOLERANCE = 1e-9

# Below, at and above a tile (4, 8), a panel (4, 12, 24) and, with more than 64 removals, several new bases.
SIZES = ((1, 1), (1, 2), (3, 5), (2, 7), (5, 23), (3, 24), (7, 25), (2, 97), (4, 193))
PATTERNS = ("unstructured", "2:4", "4:8", "32:64", "8x1", "8x1/8", "16:2:8")
SWEPT = [parse(name) for name in PATTERNS if "/" not in name]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The references are many small operations: two threads of torch are not faster, and slower on busy cores."""
    with torch_threads(1):
        yield


def problem(rows: int, n_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W* [rows, n_in] and H [n_in, n_in]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n_in, generator=generator, dtype=torch.float64), random_moments(n_in, seed)


def check(v: torch.Tensor, expected: torch.Tensor) -> None:
    assert v.dtype == torch.float64 and v.shape == expected.shape
    assert torch.equal(v != 0, expected != 0)
    torch.testing.assert_close(v, expected, rtol=TOLERANCE, atol=TOLERANCE)


def check_is_optimal(v: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> None:
    """The gradient of tr((V - W*) H (V - W*)ᵀ) vanishes on V's support."""
    gradient = ((v - w) @ h)[v != 0]
    assert gradient.abs().max() <= 1e-9 * (w @ h).abs().max()


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("rows", "n_in"), SIZES)
def test_prune_matches_the_reference_at_every_remainder(isa, rows, n_in, per_row):
    w, h = problem(rows, n_in)
    for sparsity in (0.0, 0.3, 0.9):
        v = obs_prune(w, h, Unstructured(), sparsity, per_row=per_row, isa=isa)
        check(v, obs_prune_ref(w, h, Unstructured(), sparsity, per_row=per_row))
        check_is_optimal(v, w, h)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("pattern", [*map(parse, PATTERNS)], ids=str)
def test_prune_matches_the_reference_on_every_pattern(isa, pattern, per_row):
    w, h = problem(16, 128)
    size = {"8x1": 8, "8x1/8": 8}.get(str(pattern), 1)
    v = obs_prune(w, h, pattern, 0.7, per_row=per_row, isa=isa)
    check(v, obs_prune_ref(w, h, pattern, 0.7, per_row=per_row))
    check_is_optimal(v, w, h)
    budget = 16 * kept_in(pattern, size, 128, 0.7) // size if per_row else kept_in(pattern, 16, 128, 0.7)
    assert int((v != 0).sum()) == budget


def test_prune_matches_the_reference_on_rows_of_an_encoder_layer(isa):
    w, h = problem(3, 384)
    check(obs_prune(w, h, Unstructured(), 0.875, isa=isa), obs_prune_ref(w, h, Unstructured(), 0.875))


@pytest.mark.parametrize("prune", [obs_prune, obs_sweep])
@pytest.mark.parametrize("pattern", [*map(parse, ("unstructured", "2:4", "8x1", "16:2:8"))], ids=str)
def test_the_number_of_threads_changes_no_bit(isa, prune, pattern):
    w, h = problem(208, 136)
    results = [prune(w, h, pattern, 0.6, threads=threads, isa=isa) for threads in (1, 2, 5)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("prune", [obs_prune, obs_sweep])
def test_only_the_upper_half_of_h_is_read(isa, prune):
    w, h = problem(4, 30)
    below = torch.triu(h) + torch.tril(torch.full_like(h, 1e9), -1)
    assert torch.equal(prune(w, below, Unstructured(), 0.5, isa=isa), prune(w, h, Unstructured(), 0.5, isa=isa))


@pytest.mark.parametrize("per_row", [True, False])
def test_prune_of_equal_columns_removes_the_lower_one(isa, per_row):
    # Uncorrelated inputs of equal power and weights of equal size: every score is equal at every step.
    w, h = torch.ones(2, 100, dtype=torch.float64), 2 * torch.eye(100, dtype=torch.float64)
    v = obs_prune(w, h, Unstructured(), 0.7, per_row=per_row, isa=isa)
    kept = (v != 0).tolist()
    assert kept[0] == ([False] * 70 + [True] * 30 if per_row else [False] * 100)
    assert kept[1] == ([False] * 70 + [True] * 30 if per_row else [False] * 40 + [True] * 60)
    grouped = obs_prune(w, h, parse("2x1"), 0.5, isa=isa)
    assert (grouped != 0).tolist() == [[False] * 50 + [True] * 50] * 2
    assert (obs_prune(w, h, NofM(1, 4), 0.0, isa=isa) != 0).tolist() == [[False, False, False, True] * 25] * 2


def test_prune_of_twin_columns_removes_the_lower_one_first(isa):
    w, h = problem(5, 40)
    inverse = torch.block_diag(_inverse(h), _inverse(h))
    order, _ = _trace(w.repeat(1, 2), inverse, 1, 80, Unstructured(), threads=2, isa=isa)
    step = order.argsort(1)  # at which each column is removed
    assert (step[:, :40] < step[:, 40:]).all()
    assert torch.equal(step[:, :40].argsort(1), step[:, 40:].argsort(1))


@pytest.mark.parametrize("prune", [obs_prune, obs_sweep])
def test_nothing_is_removed_at_sparsity_0(isa, prune):
    w, h = problem(3, 50)
    torch.testing.assert_close(prune(w, h, Unstructured(), 0.0, isa=isa), w, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_dead_column_goes_first(isa):
    w, h = problem(4, 60)
    h[13, :] = h[:, 13] = 0.0
    h[13, 13] = 1e-12
    v = obs_prune(w, h, Unstructured(), 0.02, isa=isa)
    assert (v == 0).nonzero().tolist() == [[row, 13] for row in range(4)]
    check(obs_sweep(w, h, Unstructured(), 0.5, isa=isa), obs_sweep_ref(w, h, Unstructured(), 0.5))
    assert (obs_sweep(w, h, Unstructured(), 0.5, isa=isa)[:, 13] == 0).all()


@pytest.mark.parametrize("prune", [obs_prune, obs_sweep])
def test_any_memory_layout_is_taken(prune):
    w, h = problem(6, 33)
    check(prune(w.T.contiguous().T, h, Unstructured(), 0.5), prune(w, h, Unstructured(), 0.5))


@pytest.mark.parametrize(("rows", "n_in"), SIZES)
def test_sweep_matches_the_reference_at_every_remainder(isa, rows, n_in):
    w, h = problem(rows, n_in)
    for sparsity in (0.3, 0.9):
        for block in (1, 5, 64, 128):
            v = obs_sweep(w, h, Unstructured(), sparsity, block=block, isa=isa)
            check(v, obs_sweep_ref(w, h, Unstructured(), sparsity, block=block))


@pytest.mark.parametrize("block", [20, 128])
@pytest.mark.parametrize("pattern", SWEPT, ids=str)
def test_sweep_matches_the_reference_on_every_pattern(isa, pattern, block):
    w, h = problem(208, 192)
    check(obs_sweep(w, h, pattern, 0.7, block=block, isa=isa), obs_sweep_ref(w, h, pattern, 0.7, block=block))


W, H = problem(4, 12)


def indefinite() -> torch.Tensor:
    h = H.clone()
    h[7, 7] = -1.0
    return h


def holding(value: float) -> torch.Tensor:
    w = W.clone()
    w[2, 3] = value
    return w


# Fault -> ((weight, h, pattern, sparsity), words of the message).
BAD = {
    "indefinite": ((W, indefinite(), Unstructured(), 0.5), "h must be positive definite, pivot 8 of 12"),
    "zero": ((W, torch.zeros_like(H), Unstructured(), 0.5), "h must be positive definite, pivot 12 of 12"),
    "nan": ((holding(torch.nan), H, Unstructured(), 0.5), "weight must be finite"),
    "infinite": ((W, H.index_fill(0, torch.tensor(3), torch.inf), Unstructured(), 0.5), "h must be finite"),
    "float32": (
        (W.float(), H, Unstructured(), 0.5),
        "weight must be 2-d float64 on the CPU, got torch.float32 [4, 12]",
    ),
    "1-d": ((W, H[0], Unstructured(), 0.5), "h must be 2-d float64 on the CPU, got torch.float64 [12]"),
    "shape": ((W[:, 1:], H, Unstructured(), 0.5), "h must be [n_in = 11, n_in], got [12, 12]"),
    "m": ((W, H, NofM(2, 5), 0.5), "pattern 2:5 needs a multiple of 5 inputs, weight has 12"),
    "rows": ((W, H, parse("3x1"), 0.5), "pattern 3x1 needs a multiple of 3 outputs, weight has 4"),
    "nothing left": ((W, H, parse("4x1/12"), 0.5), "leaves weight [4, 12] no weight at all"),
}


@pytest.mark.parametrize("prune", [obs_prune, obs_sweep])
@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_named(prune, wrong):
    arguments, message = BAD[wrong]
    with pytest.raises(InputError, match=re.escape(message)):
        prune(*arguments)


def test_the_sweep_refuses_kept_multiples_and_blocks_of_nothing():
    with pytest.raises(UnsupportedError, match="4x1/2"):
        obs_sweep(W, H, parse("4x1/2"), 0.5)
    with pytest.raises(InputError, match="block must be an integer of at least 1, got 0"):
        obs_sweep(W, H, Unstructured(), 0.5, block=0)


def test_an_inverse_that_is_not_positive_definite_ends_the_trace_with_a_message(isa):
    with pytest.raises(InputError, match="its inverse no longer is after"):
        _trace(W, -torch.eye(12, dtype=torch.float64), 1, 12, Unstructured(), threads=1, isa=isa)


def test_a_last_chunk_of_one_row_and_a_last_block_of_few_columns_are_swept(isa):
    w, h = problem(97, 31)
    check(obs_sweep(w, h, Unstructured(), 0.5, block=7, isa=isa), obs_sweep_ref(w, h, Unstructured(), 0.5, block=7))


def test_the_sweep_of_equal_scores_removes_the_lower_index(isa):
    w, h = torch.ones(50, 30, dtype=torch.float64), torch.eye(30, dtype=torch.float64)
    v = obs_sweep(w, h, Unstructured(), 0.5, block=10, isa=isa)
    for block in v.split(10, 1):
        assert (block != 0).flatten().tolist() == [False] * 250 + [True] * 250
    assert (obs_sweep(w, h, NofM(1, 3), 0.0, isa=isa) != 0).tolist() == [[True, False, False] * 10] * 50


def test_the_bindings_refuse_what_would_leave_their_memory():
    core = _dispatch.core()
    w, h, none = W.numpy(), H.numpy(), np.empty(0, np.int64)
    for arguments, message in (
        ((w, h[:, 1:].copy(), 1, 0, 0, 3), "inverse must be"),
        ((w, h, 3, 0, 0, 3), "group must divide"),
        ((w, h, 1, 0, 0, 13), "steps must be at most"),
        ((w, h, 1, 4, 2, 7), "steps must be at most"),
        ((w, h, 1, 5, 2, 4), "bank_width must divide"),
    ):
        with pytest.raises(ValueError, match=message):
            core.obs_prune(*arguments, "scalar", 1)
    for arguments, message in (
        ((w, h[1:], 1, 0, 0, False, none, 12), "factor must be"),
        ((w, h, 1, 0, 0, False, none, 12), "removals must be one per block"),
        ((w, h, 1, 0, 0, False, np.int64([49]), 12), "removals must be at most"),
        ((w, h, 1, 2, 4, False, none, 6), "m must divide"),
        ((w, h, 1, 1, 3, True, none, 3), "m must be at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            core.obs_sweep(*arguments, "scalar", 1)
    with pytest.raises(TypeError):
        core.obs_prune(W.float().numpy(), h, 1, 0, 0, 3, "scalar", 1)


def test_scores_that_would_overflow_are_refused():
    h = 1e20 * torch.eye(16, dtype=torch.float64)
    for pattern in (VNM(4, 2, 8), NofM(2, 4), Unstructured(), Grouped(4)):
        with pytest.raises(InputError, match=r"must stay below 1e\+150, got inf"):
            obs_sweep(torch.full((4, 16), 1e300, dtype=torch.float64), h, pattern, 0.5)


def test_nan_scores_stay_inside_the_binding(isa):
    weight = np.full((8, 1024), np.nan)
    _dispatch.core().obs_sweep(weight, np.eye(1024), 4, 2, 512, True, np.empty(0, np.int64), 512, isa, 1)


RESIDENT = """
import re, numpy
from sparsebert.ops import _dispatch

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

weight, inverse = numpy.ones((2, 2048)), numpy.eye(2048)
before = resident()
_dispatch.core().obs_prune(weight, inverse, 1, 0, 0, 4, "scalar", 2)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_memory_of_a_trace_is_given_back():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16  # MiB, of 46 that it uses while it runs
