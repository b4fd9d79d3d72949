"""sparse_matmul on every instruction set against its float64 reference, at the sizes where tiling could go wrong."""

import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import require
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench.shapes import LINEARS, random_input, random_weight
from sparsebert import environment
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import (
    ACTIVATIONS,
    Linear,
    Quantized,
    from_bf16,
    pack,
    pack_groups,
    pack_int8,
    pack_tiles,
    places_in_groups,
    sparse_matmul,
    sparse_matmul_ref,
    to_bf16,
    unpack,
)

# Around the widths of a vector (4, 8, 16) and of a panel (16, 32, 64), and several panels with a remainder.
TOKENS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 257)
# [n_out, n_in]: one, odd, prime, an exact tile, a block of 64 rows and one more row, several packing parts, a layer.
SHAPES = ((1, 1), (3, 5), (17, 31), (16, 16), (64, 128), (65, 129), (384, 384))
LAYERS = [(linear.n_out, linear.n_in, linear.gelu) for linear in LINEARS]
FORMS = (pack, pack_groups)

# Absolute, for x and W that give y of about 1. eps is float32's 2^-24 of relative rounding.
TOLERANCE = {
    # n <= 3072 terms of about n^-1/2 in one float32 sum: sqrt(n) roundings of at most eps * |partial sum|, below 5.
    "matmul": 2e-5,
    # The polynomials are good to 8e-8 if the result is below 1; above, rounding of the result adds eps * |y|.
    "gelu": 2.5e-7,
    "rough gelu": 2.1e-4,
}


def check(y: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE["matmul"]) -> None:
    assert y.dtype == np.float32 and y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def in_groups(weight: np.ndarray, rows: int) -> np.ndarray:
    """The weight, with the support of the first of every `rows` consecutive rows in all of them."""
    kept = weight[np.arange(len(weight)) // rows * rows] != 0
    filled = np.where(weight == 0, np.float32(weight.shape[1] ** -0.5), weight)
    return np.where(kept, filled, np.float32(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_matches_the_reference_at_every_remainder(isa, tokens, activation, form):
    for n_out, n_in in SHAPES:
        weight = form(in_groups(random_weight(n_out, n_in, 0.6), 12 if form is pack_groups else 1))
        x, bias = random_input(tokens, n_in), random_input(1, n_out)[0]
        for b in (bias, None):
            linear = Linear(weight, b, activation)
            check(sparse_matmul(x, linear, isa=isa), sparse_matmul_ref(x, linear))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n_out", "n_in", "gelu"), LAYERS)
def test_matches_the_reference_on_encoder_layers(isa, n_out, n_in, gelu, form):
    weight = form(in_groups(random_weight(n_out, n_in, 0.875), 16 if form is pack_groups else 1))
    linear = Linear(weight, random_input(1, n_out)[0], "gelu" if gelu else "none")
    x = random_input(70, n_in)
    check(sparse_matmul(x, linear, isa=isa), sparse_matmul_ref(x, linear))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_matches_the_reference_at_every_density(isa, sparsity, form):
    weight = form(random_weight(33, 70, sparsity))
    assert weight.nnz / (33 * 70) == pytest.approx(1 - sparsity, abs=1e-3)
    x = random_input(19, 70)
    check(sparse_matmul(x, Linear(weight), isa=isa), sparse_matmul_ref(x, Linear(weight)))


def test_rows_of_equal_support_share_a_group_wherever_they_lie():
    dense = np.zeros((37, 50), np.float32)
    dense[::2, :10] = random_input(19, 10)
    dense[1::2, 20:25] = random_input(18, 5)
    dense[4] = 0.0
    weight = pack_groups(dense)
    # 18 and 18 rows in groups of 8, and the empty one.
    assert len(weight.rows) == 3 + 3 + 1
    assert places_in_groups(dense) == weight.values.size
    assert weight.cols.size == 10 + 5
    np.testing.assert_array_equal(unpack(weight), dense)


# (sparsity, consecutive rows that share their support): dense, in groups, one tile alone, and separate rows, many of
# whose tiles are stored as bits.
TILINGS = ((0.0, 1), (0.6, 32), (0.8, 12), (0.6, 1), (0.95, 1))


@pytest.mark.parametrize(("sparsity", "rows"), TILINGS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_tiles_match_the_reference_at_every_remainder(tile_isa, tokens, sparsity, rows):
    for (n_out, n_in), activation in zip(SHAPES[:-1], (*ACTIVATIONS, "none", "gelu"), strict=True):
        weight = pack_tiles(in_groups(random_weight(n_out, n_in, sparsity), rows))
        x, bias = random_input(tokens, n_in), random_input(1, n_out)[0]
        for b in (bias, None):
            linear = Linear(weight, b, activation)
            y, expected = sparse_matmul(x, linear, isa=tile_isa), sparse_matmul_ref(x, linear)
            assert y.dtype == np.float32 and y.shape == expected.shape
            # Sums are float32; the result is rounded once, by at most half a unit in the last of bf16's 8 bits.
            exact = TOLERANCE["rough gelu"] if activation == "gelu" else TOLERANCE["matmul"]
            assert (np.abs(y - expected) <= exact + np.abs(expected) * 2.0**-8).all()


def test_tiles_are_exact_where_bf16_is(tile_isa):
    rng = np.random.default_rng(0)
    dense = (rng.integers(-2, 3, (70, 100)) * (rng.random((70, 100)) < 0.2)).astype(np.float32)
    x = rng.integers(-2, 3, (77, 100)).astype(np.float32)
    expected = x @ dense.T
    assert np.abs(expected).max() <= 256  # integers that bf16 holds exactly
    for threads in (1, 2, 7):
        linear = Linear(pack_tiles(dense))
        assert np.array_equal(sparse_matmul(x, linear, isa=tile_isa, threads=threads), expected)


def test_tiles_of_empty_rows_give_the_bias(tile_isa):
    dense = random_weight(90, 70, 0.0)
    dense[:20] = 0.0  # their list is empty, and begins at the same place as the others'
    linear = Linear(pack_tiles(dense), random_input(1, 90)[0])
    x = random_input(40, 70)
    y, expected = sparse_matmul(x, linear, isa=tile_isa, threads=1), sparse_matmul_ref(x, linear)
    assert np.array_equal(y[:, :20], np.tile(from_bf16(to_bf16(linear.bias[:20])), (40, 1)))
    assert (np.abs(y - expected) <= TOLERANCE["matmul"] + np.abs(expected) * 2.0**-8).all()


def test_tiles_give_a_token_the_same_bits_in_any_batch(tile_isa):
    linear = Linear(pack_tiles(random_weight(100, 300, 0.8)), random_input(1, 100)[0], "gelu")
    x = random_input(300, 300)
    whole = sparse_matmul(x, linear, isa=tile_isa)
    for tokens in (1, 7, 31, 33, 129):
        assert np.array_equal(sparse_matmul(x[300 - tokens :], linear, isa=tile_isa, threads=2), whole[300 - tokens :])


def test_tiles_keep_a_non_finite_input_with_its_token(tile_isa):
    linear = Linear(pack_tiles(random_weight(40, 50, 0.5)))
    x = random_input(70, 50)
    clean = sparse_matmul(x, linear, isa=tile_isa)
    x[33, 7] = np.nan
    y = sparse_matmul(x, linear, isa=tile_isa)
    others = np.arange(70) != 33
    assert np.array_equal(y[others], clean[others])
    assert np.isnan(y[33, unpack(linear.weight)[:, 7] != 0]).all()


def quantized(n_out: int, n_in: int, sparsity: float, rows: int = 1) -> Quantized:
    """A weight on a grid whose zeros are the same in every `rows` consecutive rows, for inputs of about 1."""
    rng = np.random.default_rng(n_out + n_in + rows)
    kept = rng.random((-(-n_out // rows), n_in)) >= sparsity
    values = rng.integers(-127, 128, (n_out, n_in)) * np.repeat(kept, rows, 0)[:n_out]
    scale = (rng.random(n_out) + 0.5) / (73 * 33 * n_in**0.5)
    step = 0.02 + 0.02 * rng.random(n_in)
    zero = rng.integers(60, 200, n_in)
    return Quantized(values.astype(np.int8), scale.astype(np.float32), step.astype(np.float32), zero.astype(np.uint8))


# (sparsity, consecutive rows that share their support): dense, groups of each size, unlike rows, and no weights at all.
QUANTIZED = ((0.0, 1), (0.8, 4), (0.8, 8), (0.8, 16), (0.8, 32), (0.9, 1), (1.0, 1))


@pytest.mark.parametrize(("sparsity", "rows"), QUANTIZED)
@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_matches_the_reference_at_every_remainder(int8_isa, tokens, sparsity, rows):
    for (n_out, n_in), activation in zip(SHAPES, (*ACTIVATIONS, "none", "gelu", "none"), strict=True):
        weight = pack_int8(quantized(n_out, n_in, sparsity, rows))
        x, bias = random_input(tokens, n_in), random_input(1, n_out)[0]
        for b in (bias, None):
            linear = Linear(weight, b, activation)
            y, expected = sparse_matmul(x, linear, isa=int8_isa), sparse_matmul_ref(x, linear)
            # The sum of products is exact; scale, bias and activation are float32.
            check(y, expected, 2e-6)


@pytest.mark.parametrize(("sparsity", "rows"), QUANTIZED)
def test_int8_unpacks_to_the_grid(sparsity, rows):
    for n_out, n_in in SHAPES:
        given = quantized(n_out, n_in, sparsity, rows)
        packed = pack_int8(given)
        assert np.array_equal(unpack(packed), given.weight)
        assert packed.nnz == np.count_nonzero(given.values)
        assert packed.stored >= packed.nnz


@pytest.mark.parametrize("rows", [4, 8, 16, 32])
def test_int8_groups_are_as_high_as_the_pattern(rows):
    packed = pack_int8(quantized(96, 256, 0.8, rows))
    assert (np.diff(packed.row_begin) == rows).all()


def test_int8_lists_may_begin_with_one_another(int8_isa):
    given = quantized(96, 256, 0.5, 32)
    values, cols = given.values.copy(), np.flatnonzero(given.values[:32].any(0))
    keep = np.zeros_like(values, bool)
    for first, kept in ((0, cols), (32, cols[:20]), (64, cols)):
        keep[first : first + 32, kept] = True
    values = np.where(keep, np.where(values == 0, 1, values), 0).astype(np.int8)
    packed = pack_int8(replace(given, values=values))
    assert len(packed.quads) == 3 and packed.col_begin[0] == packed.col_begin[2] != packed.col_begin[1]
    shared = replace(packed, col_begin=packed.col_begin[[0, 0, 0]])
    x = np.random.default_rng(0).standard_normal((70, 256), np.float32)
    assert np.array_equal(
        sparse_matmul(x, Linear(shared), isa=int8_isa, threads=1), sparse_matmul(x, Linear(packed), isa=int8_isa)
    )


def test_int8_gives_the_same_bits_on_every_isa_thread_and_batch():
    # Of multiples of 2^-6, so that scaling and adding the bias are exact in float32 too.
    given = quantized(100, 300, 0.8)
    given = replace(given, scale=np.full(100, 2.0**-6, np.float32), step=np.full(300, 2.0**-5, np.float32))
    linear = Linear(pack_int8(given), np.float32(np.arange(100)))
    x = random_input(300, 300)
    whole = sparse_matmul(x, linear, isa="scalar", threads=1)
    for isa in _dispatch.supported_isas():
        for threads in (1, 2, 7):
            assert np.array_equal(sparse_matmul(x, linear, isa=isa, threads=threads), whole)
        for tokens in (1, 7, 31, 33, 65, 129):
            assert np.array_equal(sparse_matmul(x[300 - tokens :], linear, isa=isa), whole[300 - tokens :])


def test_int8_sums_of_the_largest_products_are_exact(int8_isa):
    # The largest bytes and weights, whose pairs overflow 16 bits, in the most columns, whose sum nearly fills 32 bits.
    n_in = 65536
    for value, x_value, byte in ((127, 1e9, 255), (-127, 1e9, 255), (-128, -1e9, 0)):
        one = np.ones(n_in, np.float32)
        given = Quantized(np.full((5, n_in), value, np.int8), one[:5], one, np.full(n_in, 128, np.uint8))
        y = sparse_matmul(np.full((3, n_in), x_value, np.float32), Linear(pack_int8(given)), isa=int8_isa)
        assert np.array_equal(y, np.full((3, 5), np.float32(value * (byte - 128) * n_in)))


def test_int8_clips_inputs_beyond_the_range(int8_isa):
    given = Quantized(np.eye(2, dtype=np.int8), np.ones(2, np.float32), np.float32([0.5, 0.25]), np.uint8([0, 255]))
    x = np.float32([[np.inf, np.inf], [-np.inf, -np.inf], [1e30, 0.3], [0.74, -0.38], [0.75, -0.37], [np.nan, 0.0]])
    y = sparse_matmul(x, Linear(pack_int8(given)), isa=int8_isa)
    # In units of a byte, from the byte of zero on; the nearest byte, and a NaN is byte 0.
    assert y.tolist() == [[255, 0], [0, -255], [255, 0], [1, -2], [2, -1], [0, 0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", 0.0), ("scale", -1.0), ("scale", np.nan), ("scale", np.inf), ("step", 0.0), ("step", 1e-39)],
)
def test_int8_refuses_scales_that_are_not_positive_numbers(field, value):
    given = quantized(5, 7, 0.5)
    bad = getattr(given, field).copy()
    bad[3] = value
    with pytest.raises(InputError, match=f"{field} must be above 0 and finite, got .* at 3"):
        replace(given, **{field: bad})


def test_bf16_rounds_to_the_nearest_and_ties_to_even():
    bits = np.uint32([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xC0490FDB, 0x00000000, 0x80000000])
    expected = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xC049, 0x0000, 0x8000]
    assert to_bf16(bits.view(np.float32)).tolist() == expected
    every = np.arange(1 << 16).astype(np.uint16)
    finite = every[np.isfinite(from_bf16(every))]
    assert np.array_equal(to_bf16(from_bf16(finite)), finite)


def test_an_empty_weight_gives_the_bias(isa):
    weight = pack(np.zeros((20, 30), np.float32))
    bias = random_input(1, 20)[0]
    assert weight.nnz == 0
    np.testing.assert_array_equal(
        sparse_matmul(random_input(9, 30), Linear(weight, bias), isa=isa), np.tile(bias, (9, 1))
    )
    np.testing.assert_array_equal(
        sparse_matmul(random_input(9, 30), Linear(weight), isa=isa), np.zeros((9, 20), np.float32)
    )


def test_empty_rows_beside_one_full_row(isa):
    dense = np.zeros((40, 50), np.float32)
    dense[17] = random_input(1, 50)[0]
    weight = pack(dense)
    x = random_input(21, 50)
    check(sparse_matmul(x, Linear(weight), isa=isa), sparse_matmul_ref(x, Linear(weight)))


def test_the_last_of_65536_columns_is_reached(isa):
    dense = np.zeros((2, 65536), np.float32)
    dense[0, 0], dense[1, 65535] = 2.0, 3.0
    x = random_input(17, 65536)
    np.testing.assert_array_equal(sparse_matmul(x, Linear(pack(dense)), isa=isa), x[:, [0, 65535]] * np.float32([2, 3]))


def test_gelu_is_exact_from_tail_to_tail(isa):
    x = np.concatenate([np.linspace(-15, 15, 200001), [0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, 1e4, -1e4]])
    x = x.astype(np.float32)[:, None]
    weight = pack(np.ones((1, 1), np.float32))
    y, expected = (
        sparse_matmul(x, Linear(weight, None, "gelu"), isa=isa),
        sparse_matmul_ref(x, Linear(weight, None, "gelu")),
    )
    assert (np.abs(y - expected) <= TOLERANCE["gelu"] + np.abs(expected) * 2.0**-24).all()
    # No cancellation: small negative results keep their leading digits.
    tail = (x > -5) & (x < 0)
    np.testing.assert_allclose(y[tail], expected[tail], rtol=5e-3, atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_input_stays_with_its_token(isa, bad):
    dense = random_weight(40, 50, 0.5)
    weight = pack(dense)
    x = random_input(70, 50)
    clean = sparse_matmul(x, Linear(weight), isa=isa)
    x[33, 7] = bad
    y = sparse_matmul(x, Linear(weight), isa=isa)
    others = np.arange(70) != 33
    np.testing.assert_array_equal(y[others], clean[others])
    assert not np.isfinite(y[33, dense[:, 7] != 0]).any()


def test_gelu_keeps_nan(isa):
    x = np.float32([[np.nan], [np.inf], [-np.inf]])
    y = sparse_matmul(x, Linear(pack(np.ones((1, 1), np.float32)), None, "gelu"), isa=isa)
    assert np.isnan(y[0, 0]) and y[1, 0] == np.inf and abs(y[2, 0]) < 2e-30


@pytest.mark.parametrize("tokens", [5, 70, 870])
def test_any_number_of_threads_gives_the_same_bits(isa, tokens):
    weight = pack(random_weight(400, 300, 0.8))
    x, bias = random_input(tokens, 300), random_input(1, 400)[0]
    expected = sparse_matmul(x, Linear(weight, bias, "gelu"), isa=isa, threads=1).tobytes()
    for threads in (2, 3, 7, 32):
        assert sparse_matmul(x, Linear(weight, bias, "gelu"), isa=isa, threads=threads).tobytes() == expected


def test_a_token_gives_the_same_bits_in_any_batch(isa):
    weight = pack(random_weight(100, 300, 0.8))
    x = random_input(300, 300)
    whole = sparse_matmul(x, Linear(weight, None, "gelu"), isa=isa)
    for tokens in (1, 7, 8, 9, 17, 33, 64, 65, 129):
        start = 300 - tokens
        part = sparse_matmul(x[start:], Linear(weight, None, "gelu"), isa=isa)
        assert part.tobytes() == whole[start:].tobytes()


def test_avx2_and_avx512_give_the_same_bits():
    if "avx512" not in _dispatch.supported_isas():
        require("avx512", _dispatch.why_off()["avx512"])
    weight = pack(random_weight(100, 300, 0.8))
    x, bias = random_input(90, 300), random_input(1, 100)[0]
    wide = sparse_matmul(x, Linear(weight, bias, "gelu"), isa="avx512")
    assert wide.tobytes() == sparse_matmul(x, Linear(weight, bias, "gelu"), isa="avx2").tobytes()


@pytest.mark.parametrize("cap", [*environment.ISAS, "sse9", ""])
def test_the_cap_limits_what_is_dispatched(cap):
    script = "from sparsebert.ops import _dispatch; print(_dispatch.isa(), sorted(_dispatch.why_off()))"
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"SPARSEBERT_ISA": cap}, capture_output=True, text=True
    )
    if cap == "sse9":
        assert result.returncode != 0 and "SPARSEBERT_ISA must be one of" in result.stderr
        return
    allowed = environment.ISAS[: environment.ISAS.index(cap or environment.ISAS[-1]) + 1]
    best = [name for name in _dispatch.supported_isas() if name in allowed][-1]
    off = sorted(set(environment.ISAS) - {name for name in _dispatch.supported_isas() if name in allowed})
    assert result.stdout.split(maxsplit=1) == [best, f"{off}\n"]


def test_the_operation_imports_no_torch():
    script = "import sys, sparsebert.ops.sparse_matmul, sparsebert.engine.measure; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_two_python_threads_at_once():
    weight = pack(random_weight(384, 384, 0.8))
    inputs = [random_input(200, 384, seed) for seed in range(4)]
    expected = [sparse_matmul(x, Linear(weight)).tobytes() for x in inputs]
    wrong = []

    def call(index: int) -> None:
        for _ in range(30):
            if sparse_matmul(inputs[index], Linear(weight), threads=4).tobytes() != expected[index]:
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def _fork_body(queue, x, weight) -> None:
    queue.put(sparse_matmul(x, Linear(weight), threads=2).tobytes())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_starts_its_own_workers():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("fork")
    weight, x = pack(random_weight(384, 384, 0.8)), random_input(200, 384)
    expected = sparse_matmul(x, Linear(weight), threads=2).tobytes()  # the parent has workers from here on
    queue = context.Queue()
    child = context.Process(target=_fork_body, args=(queue, x, weight))
    child.start()
    assert queue.get(timeout=30) == expected
    child.join(timeout=30)
    assert child.exitcode == 0
    assert sparse_matmul(x, Linear(weight), threads=2).tobytes() == expected


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.one_of(st.just(0.0), st.floats(-1e6, 1e6, width=32)),
    )
)
def test_unpack_undoes_pack(dense):
    np.testing.assert_array_equal(unpack(pack_groups(dense)), dense)
    np.testing.assert_array_equal(unpack(pack_groups(dense, whole=True)), dense)
    np.testing.assert_array_equal(unpack(pack_tiles(dense)), from_bf16(to_bf16(dense)))
    weight = pack(dense)
    np.testing.assert_array_equal(unpack(weight), dense)
    assert weight.nnz == np.count_nonzero(dense)
    assert (weight.stored, weight.values.shape[1]) == (weight.values.size, weight.rows.shape[2])


def test_rows_with_like_numbers_of_entries_share_a_slice():
    rng = np.random.default_rng(0)
    dense = random_weight(150, 500, 0.0) * (rng.random((150, 500)) < rng.random((150, 1)))
    dense[40:60] = 0.0
    weight = pack(dense)
    assert weight.rows.shape == (3, 38, 4)  # 192, 192 and 116 columns
    assert weight.stored < 1.06 * weight.nnz
    np.testing.assert_array_equal(unpack(weight), dense)
    x = random_input(40, 500)
    for isa in _dispatch.supported_isas():
        check(sparse_matmul(x, Linear(weight), isa=isa), sparse_matmul_ref(x, Linear(weight)))


def test_packed_arrays_are_read_only_and_unshared():
    weight = pack(random_weight(3, 5, 0.0))
    values = weight.values.copy()
    again = replace(weight, values=values)
    values[0] = 9
    np.testing.assert_array_equal(again.values, weight.values)
    for array in (again.rows, again.counts, again.cols, again.values):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


W = pack(np.ones((4, 6), np.float32))
G = pack_groups(np.ones((4, 6), np.float32))
T = pack_tiles(random_weight(40, 70, 0.8))
X = np.ones((2, 6), np.float32)
BAD_CALLS = {
    "x must be 2-d float32, got float64": lambda: sparse_matmul(X.astype(np.float64), Linear(W)),
    "x must be 2-d float32, got float32 [6]": lambda: sparse_matmul(X[0], Linear(W)),
    "x must be 2-d float32, got list": lambda: sparse_matmul([[1.0]], Linear(W)),
    "x must be C-contiguous, got strides (4, 8)": lambda: sparse_matmul(np.asfortranarray(X), Linear(W)),
    "x must be [tokens, n_in = 6], got [2, 5]": lambda: sparse_matmul(np.ones((2, 5), np.float32), Linear(W)),
    "linear must be a Linear, got PackedRows": lambda: sparse_matmul(X, W),
    "weight must be packed, got float32 [4, 6]": lambda: Linear(np.ones((4, 6), np.float32)),
    "activation must be one of none, gelu, relu, tanh, got 'swish'": lambda: Linear(W, None, "swish"),
    "rows must list each of 4 rows once": lambda: replace(G, rows=np.where(G.rows == 3, np.int32(2), G.rows)),
    "cols must stay below n_in = 5": lambda: replace(G, n_in=5),
    "values must be finite, got 48 of 48": lambda: replace(G, values=np.full_like(G.values, np.nan)),
    "rows must list each of 40 rows once": lambda: replace(T, rows=np.where(T.rows == 3, np.int32(2), T.rows)),
    "cols must stay below n_in = 69": lambda: replace(T, n_in=69),
    "weight in bf16 must be finite, got 1 of 2": lambda: pack_tiles(np.float32([[1, 3.4e38]])),
    "bias must be [n_out = 4], got [5]": lambda: Linear(W, np.ones(5, np.float32)),
    "bias must be 1-d float32, got float64 [4]": lambda: Linear(G, np.ones(4)),
    "threads must be an integer of at least 1, got 0": lambda: sparse_matmul(X, Linear(W), threads=0),
    f"isa must be one of {', '.join(environment.ISAS)}, got 'neon'": lambda: sparse_matmul(X, Linear(W), isa="neon"),
    "weight must be float32 [n_out, n_in], got float64 [2, 2]": lambda: pack(np.ones((2, 2))),
    "weight must be [n_out >= 1, 1 <= n_in <= 65536], got [1, 65537]": lambda: pack(np.ones((1, 65537), np.float32)),
    "weight must be [n_out >= 1, 1 <= n_in <= 65536], got [0, 3]": lambda: pack(np.ones((0, 3), np.float32)),
    "weight must be finite, got 1 of 2": lambda: pack(np.float32([[1, np.nan]])),
    "rows must list each of 4 rows once per slab": lambda: replace(W, rows=np.where(W.rows == 3, np.int32(2), W.rows)),
    "rows must have 4 entries, got 8": lambda: replace(W, rows=np.tile(W.rows, (1, 2, 1))),
    "cols must have 20 entries, got 24": lambda: replace(W, counts=W.counts - np.uint8(1)),
    "cols must stay below n_in = 6": lambda: replace(W, cols=W.cols + np.uint8(1)),
    "values must be finite, got 24 of 24": lambda: replace(W, values=np.full_like(W.values, np.inf)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as error:
        BAD_CALLS[message]()
    assert message in str(error.value)


def test_an_isa_this_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "supported_isas", lambda: ("scalar",))
    with pytest.raises(UnsupportedError, match="avx512"):
        sparse_matmul(X, Linear(W), isa="avx512")
    assert _dispatch.isa() == "scalar"
    assert set(_dispatch.why_off()) == set(environment.ISAS) - {"scalar"}


def test_the_binding_refuses_what_would_leave_its_memory():
    core = _dispatch.core()
    arrays = {name: getattr(W, name) for name in ("rows", "counts", "cols", "values")}
    for name, message in (("rows", "rows of W"), ("counts", "add up"), ("cols", "within their slab")):
        with pytest.raises(ValueError, match=message):
            core.sliced_linear(
                *(arrays | {name: arrays[name] + arrays[name].dtype.type(9)}).values(), 6, 4, None, "none"
            )
    with pytest.raises(ValueError, match="all slices"):
        core.sliced_linear(*arrays.values(), 6, 5, None, "none")
    arrays = {name: getattr(G, name) for name in ("rows", "col_begin", "col_count", "cols", "value_begin", "values")}
    for name, message in (
        ("rows", "rows of W"), ("col_begin", "lie in cols"), ("col_count", "lie in cols"), ("value_begin", "in values"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            core.grouped_linear(*(arrays | {name: arrays[name] + 9}).values(), 6, 4, None, "none")
    arrays = {name: getattr(T, name) for name in (
        "rows", "tiles", "col_begin", "chunks", "cols", "value_begin", "mask_begin", "values", "masks",
    )}  # fmt: skip
    for name, message in (
        ("rows", "rows of W"), ("tiles", "1 or 2 tiles"), ("col_begin", "lie in cols"), ("chunks", "lie in cols"),
        ("value_begin", "in values"), ("mask_begin", "lie in masks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            core.tiled_linear(*(arrays | {name: arrays[name] + 40}).values(), 70, 40, None, "none")
    given = pack_int8(quantized(70, 40, 0.5, 4))
    arrays = {name: getattr(given, name) for name in (
        "row_begin", "rows", "col_begin", "quads", "cols", "value_begin", "values", "scale", "step", "zero",
    )}  # fmt: skip
    for name, message in (
        ("row_begin", "lie in a group"), ("rows", "rows of W"), ("col_begin", "lie in cols"), ("quads", "lie in cols"),
        ("cols", "below n_in"), ("value_begin", "lie in values"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            core.int8_linear(*(arrays | {name: arrays[name] + 40}).values(), 40, 70, None, "none")
    for name, message in (("scale", "a scale"), ("step", "a step"), ("zero", "a zero"), ("quads", "every group must")):
        with pytest.raises(ValueError, match=message):
            core.int8_linear(*(arrays | {name: arrays[name][1:]}).values(), 40, 70, None, "none")
    with pytest.raises(ValueError, match="end with INT8_OVERRUN more"):
        core.int8_linear(*(arrays | {"values": arrays["values"][:-1]}).values(), 40, 70, None, "none")
    heights = arrays["row_begin"].copy()
    heights[1:-1] += 1
    with pytest.raises(ValueError, match="4 to 32 rows"):
        core.int8_linear(*(arrays | {"row_begin": heights}).values(), 40, 70, None, "none")
    with pytest.raises(TypeError):
        core.sparse_matmul(X.astype(np.float64), Linear(W).core, "scalar", 1)


def test_a_read_only_view_of_what_may_change_is_copied():
    rows = W.rows.copy()
    view = rows[:]
    view.setflags(write=False)
    packed = replace(W, rows=view)
    assert not np.shares_memory(packed.rows, rows) and not packed.rows.flags.writeable
    assert np.shares_memory(replace(W).rows, W.rows)  # a read-only array is not copied


def test_the_binding_refuses_columns_that_are_not_there():
    core = _dispatch.core()
    for packed, names in (
        (G, ("rows", "col_begin", "col_count", "cols", "value_begin", "values")),
        (T, ("rows", "tiles", "col_begin", "chunks", "cols", "value_begin", "mask_begin", "values", "masks")),
    ):
        arrays = {name: getattr(packed, name) for name in names}
        make = core.grouped_linear if packed is G else core.tiled_linear
        with pytest.raises(ValueError, match="cols must stay below n_in"):
            arrays["cols"] = arrays["cols"] + np.uint16(9999)
            make(*arrays.values(), packed.n_in, packed.n_out, None, "none")


def test_the_binding_refuses_places_whose_end_is_no_number():
    core, most = _dispatch.core(), np.iinfo(np.int64).max
    names = ("rows", "col_begin", "col_count", "cols", "value_begin", "values")
    arrays = {name: getattr(G, name) for name in names}
    arrays["value_begin"] = np.full_like(arrays["value_begin"], most)
    with pytest.raises(ValueError, match="must lie in values"):
        core.grouped_linear(*arrays.values(), G.n_in, G.n_out, None, "none")
    names = ("rows", "tiles", "col_begin", "chunks", "cols", "value_begin", "mask_begin", "values", "masks")
    for place in ("col_begin", "value_begin", "mask_begin"):
        arrays = {name: getattr(T, name) for name in names}
        arrays[place] = np.full_like(arrays[place], most)
        with pytest.raises(ValueError, match="must lie in"):
            core.tiled_linear(*arrays.values(), T.n_in, T.n_out, None, "none")


def test_a_caller_that_flushes_denormals_gets_the_same_bits_on_any_number_of_threads(isa):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((256, 64)) * 1e-39).astype(np.float32)
    linear = Linear(pack(rng.standard_normal((64, 64)).astype(np.float32)))
    want = sparse_matmul(x, linear, threads=1, isa=isa)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        assert np.array_equal(sparse_matmul(x, linear, threads=1, isa=isa), want)
        assert np.array_equal(sparse_matmul(x, linear, threads=2, isa=isa), want)
        assert not (torch.tensor([1e-39]) * 0.5).any()  # the caller's own arithmetic is unchanged
    finally:
        torch.set_flush_denormal(False)
    assert want.any()
