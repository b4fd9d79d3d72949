"""gram on every instruction set against its float64 reference, at the sizes where tiling could go wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import require
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert import environment
from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.gram import Moments, gram, gram_ref

# [n_in, n_y]: one, odd, a panel of each instruction set (8, 24, 48) and one off it, a block (96) and one over, a layer.
SHAPES = ((1, 1), (3, 2), (7, 9), (8, 8), (23, 25), (24, 1), (47, 49), (48, 48), (49, 97), (97, 31), (384, 96))
# One, a few, and around the 256 tokens of a float32 sum; some are no multiple of the 4 tokens summed side by side.
TOKENS = (1, 2, 5, 255, 256, 257, 515)

# Relative to the largest moment. eps is float32's 2^-24 of relative rounding.
TOLERANCE = {
    # 256 products of variance 1 in one float32 sum: at most 256 roundings of eps times a partial sum, in effect about
    # sqrt(256) of them, and 3 eps more from the difference, the root of the weight and the product.
    "moments": 4e-6,
    # The same for values near 1e4, already rounded to float32: the shift removes the constant completely.
    "shifted": 4e-6,
}


def random_tokens(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Correlated columns with different means and variances of about 1."""
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 1, generator=rng)
    return torch.randn(tokens, n, generator=rng) + 0.5 * shared + torch.linspace(-2, 2, n)


def random_weights(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, generator=torch.Generator().manual_seed(5)) + 0.1


def check(moments: Moments, expected: tuple[torch.Tensor, torch.Tensor | None], tolerance: str = "moments") -> None:
    for got, wanted in zip(
        (moments.gram, moments.cross if moments.sum_yx is not None else None), expected, strict=True
    ):
        if wanted is not None:
            assert got.dtype == torch.float64 and got.shape == wanted.shape
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[tolerance] * scale)


def state(moments: Moments) -> dict[str, object]:
    """Everything that a later call may change, as comparable bytes."""
    return {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in vars(moments).items()}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_matches_the_reference_at_every_remainder(isa, tokens, weighted):
    weights = random_weights(tokens) if weighted else None
    for n_in, n_y in SHAPES:
        x, y = random_tokens(tokens, n_in), random_tokens(tokens, n_y, seed=1)
        expected = gram_ref(x, y, weights)
        moments = gram(x, y, weights, isa=isa)
        check(moments, expected)
        check(gram(x, None, weights, isa=isa), (expected[0], None))
        w = torch.ones(tokens, dtype=torch.float64) if weights is None else weights.double()
        for mean, values in ((moments.mean_x, x), (moments.mean_y, y)):
            torch.testing.assert_close(mean, w @ values.double() / w.sum(), rtol=0, atol=1e-6)
        assert moments.tokens == tokens and moments.weight == pytest.approx(float(w.sum()))


@pytest.mark.parametrize(("n_in", "n_y"), [(384, 1152), (1536, 384)])
def test_matches_the_reference_on_encoder_layers(isa, n_in, n_y):
    x, y, weights = random_tokens(700, n_in), random_tokens(700, n_y, seed=1), random_weights(700)
    check(gram(x, y, weights, isa=isa), gram_ref(x, y, weights))


def test_more_tokens_than_are_packed_at_once_match_the_reference(isa):
    # 2^20 floats are packed at a time: 2048 tokens of these 384 + 96 columns.
    x, y = random_tokens(4100, 384), random_tokens(4100, 49, seed=1)
    moments = gram(x, y, isa=isa)
    check(moments, gram_ref(x, y))
    before = state(moments)
    y[4099, 0] = float("nan")
    with pytest.raises(InputError, match="y must be finite, got nan at token 4099, column 0"):
        gram(x, y, into=moments, isa=isa)
    assert state(moments) == before


def test_a_weight_of_zero_drops_its_token_exactly(isa):
    x, y, weights = random_tokens(300, 50), random_tokens(300, 20, seed=1), random_weights(300)
    weights[1::3] = 0.0
    start = gram(x[:1], y[:1], isa=isa)
    dropped = gram(x, y, weights, into=copy.deepcopy(start), isa=isa)
    x[1::3], y[1::3] = 1e9, -1e9
    replaced = gram(x, y, weights, into=copy.deepcopy(start), isa=isa)
    assert state(dropped) == state(replaced)
    assert dropped.tokens == 1 + 200
    kept = weights > 0
    check(gram(x, y, weights, isa=isa), gram_ref(x[kept], y[kept], weights[kept]))


def test_weights_that_are_all_zero_leave_the_moments_as_they_are(isa):
    x = random_tokens(40, 10)
    empty = gram(x, None, torch.zeros(40), isa=isa)
    assert empty.tokens == 0 and empty.weight == 0 and not empty.sum_xx.any() and not empty.sum_x.any()
    check(gram(x, into=empty, isa=isa), gram_ref(x))


def test_integer_weights_count_like_repeated_tokens(isa):
    x, y = random_tokens(70, 30), random_tokens(70, 11, seed=1)
    counts = torch.arange(70) % 4
    check(
        gram(x, y, counts.float(), isa=isa),
        gram_ref(x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0)),
    )


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_constant_in_every_value_costs_no_digits(isa, offset):
    x, y, weights = random_tokens(600, 70) + offset, random_tokens(600, 30, seed=1) - offset, random_weights(600)
    check(gram(x, y, weights, isa=isa), gram_ref(x, y, weights), "shifted")


def test_moments_started_far_from_the_mean_still_give_the_centred_result(isa):
    x, y = random_tokens(600, 70), random_tokens(600, 30, seed=1)
    moments = gram(x[:1], y[:1], isa=isa)  # shifted by the first token, about 2 standard deviations off
    gram(x[1:], y[1:], into=moments, isa=isa)
    check(moments, gram_ref(x, y))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=5).map(sorted), st.booleans())
def test_any_split_into_batches_gives_the_same_moments(cuts, weighted):
    x, y = random_tokens(700, 26), random_tokens(700, 9, seed=1)
    weights = random_weights(700) if weighted else None
    expected = gram_ref(x, y, weights)
    moments = None
    for start, end in zip([0, *cuts], [*cuts, 700], strict=True):
        if end == 0:
            continue  # the first batch must have a token
        w = None if weights is None else weights[start:end]
        before = moments
        moments = gram(x[start:end], y[start:end], w, into=moments)
        assert before is None or moments is before
    assert moments.tokens == 700
    check(moments, expected)


def test_one_token_has_no_variance_and_is_its_own_mean(isa):
    x, y = random_tokens(1, 50), random_tokens(1, 20, seed=1)
    for weights in (None, torch.tensor([0.3])):
        moments = gram(x, y, weights, isa=isa)
        assert not moments.gram.any() and not moments.cross.any()
        assert torch.equal(moments.mean_x, x[0].double()) and torch.equal(moments.mean_y, y[0].double())


@pytest.mark.parametrize("constant", [0.0, 0.1, -12345.678, 3e10])
def test_a_column_that_never_changes_has_exactly_no_moments(isa, constant):
    x, y, weights = random_tokens(777, 60), random_tokens(777, 30, seed=1), random_weights(777)
    x[:, [0, 17, 59]] = constant
    y[:, 4] = constant
    for w in (None, weights):
        moments = gram(x[:500], y[:500], None if w is None else w[:500], isa=isa)
        gram(x[500:], y[500:], None if w is None else w[500:], into=moments, isa=isa)
        second, cross = moments.gram, moments.cross
        assert not second[[0, 17, 59]].any() and not second[:, [0, 17, 59]].any()
        assert not cross[:, [0, 17, 59]].any() and not cross[4].any()
        assert second.diagonal()[1] > 0.5


def test_the_gram_is_symmetric(isa):
    second = gram(random_tokens(300, 100), isa=isa).gram
    assert torch.equal(second, second.T)


def test_any_number_of_threads_gives_the_same_bits(isa):
    x, y, weights = random_tokens(1500, 300), random_tokens(1500, 200, seed=1), random_weights(1500)

    def run(threads: int) -> dict[str, object]:
        moments = gram(x[:900], y[:900], weights[:900], isa=isa, threads=threads)
        return state(gram(x[900:], y[900:], weights[900:], into=moments, isa=isa, threads=threads))

    expected = run(1)
    for threads in (2, 3, 7, 32):
        assert run(threads) == expected


def test_avx2_and_avx512_give_the_same_bits():
    if "avx512" not in _dispatch.supported_isas():
        require("avx512", _dispatch.why_off()["avx512"])
    x, y, weights = random_tokens(4000, 150), random_tokens(4000, 70, seed=1), random_weights(4000)
    wide, narrow = (gram(x, y, weights, isa=isa) for isa in ("avx512", "avx2"))
    for name in ("gram", "cross", "mean_x", "mean_y"):
        assert torch.equal(getattr(wide, name), getattr(narrow, name))


def test_later_batches_leave_the_shift_alone():
    moments = gram(random_tokens(30, 8))
    shift = moments.shift_x.clone()
    gram(random_tokens(30, 8, seed=3) + 100, into=moments)
    assert torch.equal(moments.shift_x, shift)


def test_an_empty_batch_changes_nothing():
    moments = gram(random_tokens(30, 8), random_tokens(30, 5, seed=1))
    before = state(moments)
    assert gram(torch.empty(0, 8), torch.empty(0, 5), torch.empty(0), into=moments) is moments
    assert state(moments) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("token", "column"), [(0, 0), (299, 49), (257, 48), (3, 17)])
def test_a_value_that_is_not_finite_is_named_and_changes_nothing(isa, bad, token, column):
    x, y, weights = random_tokens(300, 50), random_tokens(300, 50, seed=1), random_weights(300)
    moments = gram(x, y, weights, isa=isa)
    before = state(moments)
    where = f"got {bad:g} at token {token}, column {column}"
    for broken in ("x", "y"):
        values = {"x": x.clone(), "y": y.clone()}
        values[broken][token, column] = bad
        values[broken][299, 49] = bad  # the first one is named
        for into in (moments, None):
            for w in (weights, None, torch.zeros(300)):
                with pytest.raises(InputError, match=f"{broken} must be finite, {where}"):
                    gram(values["x"], values["y"], w, into=into, isa=isa)
    assert state(moments) == before


def test_sums_beyond_float32_are_refused():
    with pytest.raises(InputError, match="within float32's range"):
        gram(torch.tensor([[3e38], [3e38], [-3e38], [-3e38]]), None, torch.tensor([4.0, 4, 4, 4]))


def test_inputs_that_carry_a_gradient_are_read_as_values():
    x = random_tokens(30, 8)
    assert torch.equal(gram(x.clone().requires_grad_()).gram, gram(x).gram)


X, Y, W = torch.ones(4, 6), torch.ones(4, 3), torch.ones(4)
BAD_CALLS = {
    "x must be contiguous float32 [tokens, n_in >= 1] on the CPU, got torch.float64 [4, 6]": lambda: gram(X.double()),
    "x must be contiguous float32 [tokens, n_in >= 1] on the CPU, got torch.float32 [6]": lambda: gram(X[0]),
    "on the CPU, got torch.float32 [6, 4] on cpu, strided": lambda: gram(X.T),
    "[tokens, n_in >= 1] on the CPU, got torch.float32 [4, 0]": lambda: gram(torch.ones(4, 0)),
    "x must be contiguous float32 [tokens, n_in >= 1] on the CPU, got list": lambda: gram([[1.0]]),
    "the CPU, got torch.float32 [4, 6] on meta": lambda: gram(X.to("meta")),
    "y must be contiguous float32 [tokens, n_y >= 1] on the CPU, got torch.float64": lambda: gram(X, Y.double()),
    "y must have x's 4 tokens, got [3, 3]": lambda: gram(X, Y[:3]),
    "weights must be contiguous float32 [4] on the CPU, got torch.float32 [3]": lambda: gram(X, None, W[:3]),
    "weights must be contiguous float32 [4] on the CPU, got torch.float64 [4]": lambda: gram(X, None, W.double()),
    "weights must be finite and at least 0, got -2 at token 1": lambda: gram(X, None, torch.tensor([1.0, -2, -3, 0])),
    "weights must be finite and at least 0, got nan at token 3": lambda: gram(
        X, None, torch.tensor([1.0, 1, 1, float("nan")])
    ),
    "weights must be finite and at least 0, got inf at token 0": lambda: gram(X, None, W / 0),
    "the first batch must have a token, got x [0, 6]": lambda: gram(X[:0]),
    "x must be [tokens, 6] as before, got [4, 3]": lambda: gram(Y, into=gram(X)),
    "every batch must have the same n_y, got 3 after None": lambda: gram(X, Y, into=gram(X)),
    "every batch must have the same n_y, got None after 3": lambda: gram(X, into=gram(X, Y)),
    "every batch must have the same n_y, got 2 after 3": lambda: gram(X, torch.ones(4, 2), into=gram(X, Y)),
    "threads must be an integer of at least 1, got 0": lambda: gram(X, threads=0),
    f"isa must be one of {', '.join(environment.ISAS)}, got 'neon'": lambda: gram(X, isa="neon"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as error:
        BAD_CALLS[message]()
    assert message in str(error.value)


def test_the_binding_refuses_what_would_leave_its_memory():
    core = _dispatch.core()
    x, y, shift_x, shift_y, w = X.numpy(), Y.numpy(), np.zeros(6, np.float32), np.zeros(3, np.float32), W.numpy()
    none = (None, None, None)
    sx, sxx, sy, syx = np.zeros(6), np.zeros((6, 6)), np.zeros(3), np.zeros((3, 6))
    bad = {
        "shift_x": (x, shift_y, *none, sx, sxx, None, None),
        "sum_x": (x, shift_x, *none, sy, sxx, None, None),
        "sum_xx": (x, shift_x, *none, sx, syx, None, None),
        "weights": (x, shift_x, None, None, w[:3].copy(), sx, sxx, None, None),
        "y needs": (x, shift_x, y, None, None, sx, sxx, sy, syx),
        "y must": (x, shift_x, y[:3].copy(), shift_y, None, sx, sxx, sy, syx),
        "shift_y": (x, shift_x, y, shift_x, None, sx, sxx, sy, syx),
        "sum_y must": (x, shift_x, y, shift_y, None, sx, sxx, sx, syx),
        "sum_yx must": (x, shift_x, y, shift_y, None, sx, sxx, sy, sxx),
        "x must": (x[:0].copy(), shift_x, *none, sx, sxx, None, None),
    }
    for rule, args in bad.items():
        with pytest.raises(ValueError, match=rule):
            core.gram(*args, "scalar", 1)
    with pytest.raises(ValueError, match="threads"):
        core.gram(x, shift_x, *none, sx, sxx, None, None, "scalar", 0)
    with pytest.raises(TypeError):
        core.gram(x, shift_x, *none, sx, sxx.astype(np.float32), None, None, "scalar", 1)
    sxx.setflags(write=False)
    with pytest.raises(ValueError):
        core.gram(x, shift_x, *none, sx, sxx, None, None, "scalar", 1)
    for args in ((x, None, shift_y), (x, w[:3].copy(), shift_x), (x[:0].copy(), None, shift_x)):
        with pytest.raises(ValueError):
            core.token_sums(*args, "scalar", 1)
