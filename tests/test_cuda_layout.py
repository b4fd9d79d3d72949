"""The CUDA kernels without a GPU: tests/cuda_layout.cpp runs the code of csrc/cuda/*.h on a CPU, thread by thread."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, require

from sparsebert.ops.sparse_matmul import ACTIVATIONS, from_bf16, to_bf16

ORDERS = {"forward": 0, "backward": 1, "odd threads first": 2}
# Of bf16: half a unit in the last place of y, and what float32 sums add to it.
RELATIVE, ABSOLUTE = 2**-8, 1e-5


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        require("g++", "g++ is not installed")
    library = tmp_path_factory.mktemp("cuda") / "layout.so"
    source = ROOT / "tests" / "cuda_layout.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    done = subprocess.run(["g++", *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_sparse_matmul.restype = ctypes.c_char_p
    loaded.loads_are_aligned.restype = ctypes.c_bool
    for name in ("emulate_masked_lstsq", "places", "doubles_of"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def at(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def long(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def vnm_weight(n_out: int, n_in: int, v: int, m: int, seed: int = 0) -> np.ndarray:
    """A weight in V:2:M, float32 on the values of bf16. Some rows keep fewer than 2 columns, some groups below 4."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((n_out, n_in), np.float32)
    for first in range(0, n_out, v):
        for block in range(0, n_in, m):
            kept = block + rng.permutation(m)[: rng.choice([0, 1, 3, 4, 4, 4])]
            for row in range(first, first + v):
                own = rng.permutation(kept)[: rng.choice([0, 1, 2, 2, 2])]
                weight[row, own] = rng.standard_normal(len(own))
    return from_bf16(to_bf16(weight))


def aligned(rows: int, stride: int) -> np.ndarray:
    """bf16 NaN [rows, stride] that begins on 16 bytes, as GPU memory does."""
    memory = np.full(rows * stride + 8, 0x7FC0, np.uint16)
    skip = -memory.ctypes.data % 16 // 2
    return memory[skip : skip + rows * stride].reshape(rows, stride)


def multiplied(emulator, weight, v, m, x, bias, residual, activation, order="forward", late=True):
    """y, float32 [n_out, tokens], of the emulated kernel. x, residual: float32 [n, tokens]."""
    (n_out, n_in), tokens = weight.shape, x.shape[1]
    stride = -(-tokens // 8) * 8 + 8
    x_bits, y, added = aligned(n_in, stride), aligned(n_out, stride), None
    x_bits[:, :tokens] = to_bf16(x)
    if residual is not None:
        added = aligned(n_out, stride)
        added[:, :tokens] = to_bf16(residual)
    message = ctypes.create_string_buffer(200)
    bits = to_bf16(weight)
    broken = emulator.emulate_sparse_matmul(
        at(bits), *long(n_out, n_in, v, m), at(x_bits), *long(tokens, stride), at(bias), at(added),
        ACTIVATIONS.index(activation), at(y), ORDERS[order], late, message,
    )  # fmt: skip
    assert broken is None, broken.decode()
    if message.value:
        raise ValueError(message.value.decode())
    assert (y[:, tokens:] == 0x7FC0).all(), "nothing is written behind the tokens"
    return from_bf16(y[:, :tokens])


def expected(weight, x, bias, residual, activation):
    y = weight.astype(np.float64) @ from_bf16(to_bf16(x)).astype(np.float64)
    y += 0.0 if bias is None else bias[:, None].astype(np.float64)
    gelu = np.vectorize(lambda value: 0.5 * value * math.erfc(-value / math.sqrt(2)), otypes=[np.float64])
    y = {"none": np.asarray, "gelu": gelu, "relu": lambda v: np.maximum(v, 0), "tanh": np.tanh}[activation](y)
    return y if residual is None else y + from_bf16(to_bf16(residual))


# n_out, n_in, v, m, tokens: one group and several; v below, at and above a strip; rows, columns and tokens that fill
# nothing up; one block of columns; more chunks than buffers; a BERT shape.
SHAPES = [
    (1, 5, 1, 5, 1),
    (32, 8, 32, 8, 8),
    (33, 35, 33, 7, 7),
    (30, 70, 15, 10, 9),
    (64, 64, 64, 8, 128),
    (128, 160, 64, 16, 129),
    (80, 96, 80, 6, 31),
    (128, 256, 128, 16, 127),
    (256, 12, 128, 6, 33),
    (192, 768, 64, 16, 40),
]


@pytest.mark.parametrize(("n_out", "n_in", "v", "m", "tokens"), SHAPES)
def test_a_product_of_odd_shapes_matches_numpy(emulator, n_out, n_in, v, m, tokens):
    rng = np.random.default_rng(1)
    weight = vnm_weight(n_out, n_in, v, m)
    x = rng.standard_normal((n_in, tokens), np.float32)
    bias, residual = rng.standard_normal(n_out, np.float32), rng.standard_normal((n_out, tokens), np.float32)
    for activation, b, r in (("none", None, None), ("gelu", bias, None), ("none", bias, residual)):
        got = multiplied(emulator, weight, v, m, x, b, r, activation)
        np.testing.assert_allclose(got, expected(weight, x, b, r, activation), RELATIVE, ABSOLUTE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_matches_numpy(emulator, activation):
    rng = np.random.default_rng(2)
    weight, x = vnm_weight(32, 40, 32, 8), rng.standard_normal((40, 5), np.float32) * 3
    bias, residual = rng.standard_normal(32, np.float32), rng.standard_normal((32, 5), np.float32)
    got = multiplied(emulator, weight, 32, 8, x, bias, residual, activation)
    np.testing.assert_allclose(got, expected(weight, x, bias, residual, activation), RELATIVE, ABSOLUTE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("late", [True, False], ids=["copies arrive late", "copies arrive at once"])
def test_a_product_depends_neither_on_the_order_of_threads_nor_on_when_copies_arrive(emulator, order, late):
    weight = vnm_weight(128, 320, 64, 8)
    x = np.random.default_rng(3).standard_normal((320, 70), np.float32)
    first = multiplied(emulator, weight, 64, 8, x, None, None, "none")
    assert multiplied(emulator, weight, 64, 8, x, None, None, "none", order, late).tobytes() == first.tobytes()


def test_each_weight_is_multiplied_by_its_own_input(emulator):
    # One kept weight at a time, at every row and column of a tile: a wrong bit of the metadata moves it.
    x = np.zeros((64, 64), np.float32)
    np.fill_diagonal(x, 1.0)
    rng = np.random.default_rng(4)
    weight = np.zeros((64, 64), np.float32)
    for row in range(64):
        for block in range(0, 64, 8):
            # Only the columns 1, 2, 5 and 6 of each 8 are kept, two of them by each row.
            own = block + rng.choice([1, 2, 5, 6], 2, replace=False)
            weight[row, own] = rng.integers(1, 100, 2)
    np.testing.assert_array_equal(multiplied(emulator, weight, 64, 8, x, None, None, "none"), weight)


def test_inf_and_nan_stay_with_their_token(emulator):
    weight = vnm_weight(64, 64, 32, 8)
    x = np.ones((64, 20), np.float32)
    clean = multiplied(emulator, weight, 32, 8, x, None, None, "none")
    x[:, 3], x[:, 17] = np.nan, np.inf
    got = multiplied(emulator, weight, 32, 8, x, None, None, "none")
    others = np.setdiff1d(np.arange(20), [3, 17])
    np.testing.assert_array_equal(got[:, others], clean[:, others])
    assert np.isnan(got[weight.any(1)][:, 3]).all()


def test_a_weight_that_breaks_the_pattern_is_named(emulator):
    x = np.ones((16, 1), np.float32)
    weight = np.zeros((8, 16), np.float32)
    weight[5, 8:11] = 1.0
    with pytest.raises(ValueError, match="row 5 must keep 2 columns of 8, in columns 8 to 15 it keeps 3"):
        multiplied(emulator, weight, 4, 8, x, None, None, "none")
    weight = np.eye(8, 16, dtype=np.float32)
    with pytest.raises(ValueError, match="rows 0 to 7 must share 4 columns of 8, in columns 0 to 7 they keep 8"):
        multiplied(emulator, weight, 8, 8, x, None, None, "none")


@pytest.mark.parametrize(("k", "g"), [(1, 1), (15, 2), (16, 1), (17, 3), (31, 7), (32, 4), (77, 1), (100, 64)])
def test_each_element_of_a_system_has_one_place(emulator, k, g):
    doubles = emulator.doubles_of(*long(k, g))
    owner = np.zeros(doubles + 64, np.int32)
    assert emulator.places(*long(k, g), at(owner)) == doubles
    assert owner.max() == 1 and not owner[doubles:].any()
    assert emulator.loads_are_aligned(*long(k, g))
    padded = -(-k // 16) * 16
    assert owner.sum() == sum(16 * (padded - first + g) for first in range(0, padded, 16)) + padded
    assert doubles * 8 <= (padded + g + 5) * (padded + 16) * 8, "little more than the triangle"


def solved(emulator, target, h, supports, members, *, complement=False, in_shared=True, order="forward"):
    """(v, failed) of the emulated kernel. supports: bool [groups, n_in]; members: the rows of each group."""
    n_in = target.shape[1]
    mask = np.zeros(target.shape, np.uint8)
    for support, rows in zip(supports, members, strict=True):
        mask[rows] = support
    rows = np.concatenate(members).astype(np.int32)
    row_ptr = np.cumsum([0, *map(len, members)]).astype(np.int64)
    wanted = ~supports if complement else supports
    v, failed = np.full(target.shape, np.nan), np.full(len(members), -7, np.int64)
    largest = long(len(members), int(wanted.sum(1).max()), max(map(len, members)))
    doubles = emulator.emulate_masked_lstsq(
        at(target), at(h), *long(n_in), at(mask), at(row_ptr), at(rows), *largest, complement, in_shared, at(v),
        at(failed), ORDERS[order],
    )  # fmt: skip
    assert doubles >= 0, "nothing is written outside the system"
    return v, failed


def system(rows: int, n_in: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """target [rows, n_in], and H, positive definite and NaN below the diagonal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_in + 10, n_in))
    h = x.T @ x / n_in + 0.1 * np.eye(n_in)
    return rng.standard_normal((rows, n_in)), np.triu(h) + np.tril(np.full((n_in, n_in), np.nan), -1)


def groups_of(rows: int, size: int, n_in: int, kept: float, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    members = np.split(rng.permutation(rows), range(size, rows, size))
    return rng.random((len(members), n_in)) < kept, members


LSTSQ = [(1, 1, 1, 1.0), (3, 1, 15, 0.9), (5, 2, 16, 1.0), (6, 3, 17, 1.0), (8, 4, 40, 0.5), (9, 5, 130, 0.3),
         (20, 20, 33, 0.9), (5, 2, 300, 0.7), (3, 1, 300, 0.0), (35, 33, 20, 0.8)]  # fmt: skip


@pytest.mark.parametrize("in_shared", [True, False], ids=["shared memory", "working memory"])
@pytest.mark.parametrize(("rows", "size", "n_in", "kept"), LSTSQ)
def test_least_squares_match_numpy(emulator, rows, size, n_in, kept, in_shared):
    target, h = system(rows, n_in)
    supports, members = groups_of(rows, size, n_in, kept)
    v, failed = solved(emulator, target, h, supports, members, in_shared=in_shared)
    full = np.triu(h) + np.triu(h, 1).T
    assert (failed == -1).all()
    for support, own in zip(supports, members, strict=True):
        want = np.linalg.solve(full[support][:, support], target[own][:, support].T).T
        np.testing.assert_allclose(v[own][:, support], want, rtol=0, atol=1e-11)
        assert np.isnan(v[own][:, ~support]).all(), "outside the support nothing is written"


@pytest.mark.parametrize(("rows", "size", "n_in", "kept"), LSTSQ)
def test_the_complement_gives_the_same_solution(emulator, rows, size, n_in, kept):
    target, h = system(rows, n_in)
    full = np.triu(h) + np.triu(h, 1).T
    inverse = np.linalg.inv(full)
    inverse = np.triu(inverse) + np.triu(inverse, 1).T
    supports, members = groups_of(rows, size, n_in, kept)
    v, failed = solved(emulator, target @ inverse, inverse, supports, members, complement=True)
    assert (failed == -1).all()
    for support, own in zip(supports, members, strict=True):
        want = np.linalg.solve(full[support][:, support], target[own][:, support].T).T
        np.testing.assert_allclose(v[own][:, support], want, rtol=0, atol=1e-9)
        assert (v[own][:, ~support] == 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("complement", [False, True])
def test_least_squares_do_not_depend_on_the_order_of_threads(emulator, order, complement):
    target, h = system(11, 150)
    h = np.triu(h) + np.triu(h, 1).T
    problem = target, h, *groups_of(11, 3, 150, 0.5)
    want = solved(emulator, *problem, complement=complement)[0]
    assert solved(emulator, *problem, complement=complement, order=order)[0].tobytes() == want.tobytes()


@pytest.mark.parametrize("pivot", [0, 7, 15, 16, 20, 40])
def test_the_first_pivot_that_fails_is_reported_for_its_group_alone(emulator, pivot):
    target, h = system(4, 60)
    h[pivot, pivot] = -1.0
    h[45, 45] = np.nan
    supports = np.ones((2, 60), bool)
    supports[1, [pivot, 45]] = False
    v, failed = solved(emulator, target, h, supports, [np.array([2, 0]), np.array([1, 3])])
    assert failed.tolist() == [pivot, -1]
    assert np.isfinite(v[1][supports[1]]).all()
