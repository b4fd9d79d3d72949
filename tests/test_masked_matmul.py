"""masked_matmul and its gradients on every instruction set against float64, at the sizes where tiling may go wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import require

from sparsebert import environment
from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.masked_matmul import masked_matmul, masked_matmul_ref
from sparsebert.ops.topk_mask import topk_threshold


class Case(NamedTuple):
    tokens: int
    n_in: int
    n_out: int
    share: int = 1  # rows per score
    reach: int = 0  # inputs per threshold; 0: one threshold for all

    def __str__(self) -> str:
        return (
            f"{self.tokens}x{self.n_in}x{self.n_out}"
            + f"-share{self.share}" * (self.share > 1)
            + (f"-reach{self.reach}" * (self.reach > 0))
        )


# Tiles of results have 4 or 8 rows and 8, 24 or 48 columns. A sum covers 256 words of 1 or 2 values, a task 96 columns,
# or 96 rows and 192 columns of G. Values of a row are read 256 at a time.
CASES = [
    Case(1, 1, 1),
    Case(3, 5, 7),
    Case(7, 23, 47),
    Case(8, 24, 48),
    Case(9, 25, 49),
    Case(13, 101, 97),
    Case(33, 192, 96),
    Case(17, 255, 31),
    Case(5, 257, 193),
    Case(2, 513, 8),
    Case(3, 1025, 5),
    Case(4, 7, 1030),
    Case(1030, 6, 10),
    Case(5, 768, 3072),
    Case(9, 12, 14, share=2),
    Case(11, 50, 35, share=5),
    Case(10, 40, 96, share=16),
    Case(19, 49, 96, share=32),
    Case(6, 30, 200, share=200),
    Case(8, 20, 15, share=15),
    Case(9, 48, 50, reach=4),
    Case(9, 48, 50, reach=8),
    Case(9, 51, 20, reach=17),
    Case(9, 300, 20, reach=300),
    Case(7, 5, 9, reach=1),
    Case(12, 768, 64, share=16, reach=4),
    Case(3, 520, 32, share=32, reach=8),
]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("y", "dx", "d_weight", "d_scores", "d_bias")
# Relative to the largest value of the result.
TOLERANCE = {
    # Sums of at most 3,072 products, one by one, with relative roundings of 2^-24: in effect about sqrt(n) of them.
    torch.float32: dict.fromkeys(NAMES, 1e-5),
    # y and dx: weights are rounded by up to 2^-9 of their size, these errors add up as sqrt(n), and the result is
    # rounded by 2^-9 of its size. The others are float32 sums of exact products.
    torch.bfloat16: {**dict.fromkeys(NAMES, 1e-5), "y": 1e-2, "dx": 1e-2},
}


@pytest.fixture(params=environment.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """All instruction sets: the last two have their own bfloat16 kernels, or choose another's."""
    if request.param not in _dispatch.supported_isas():
        require(request.param, _dispatch.why_off()[request.param])
    return request.param


def operands(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([x, weight, scores, threshold, bias], dy); about half of the weights are kept."""
    rng = torch.Generator().manual_seed(case.tokens + 1000 * case.n_in)
    score_rows = case.n_out // case.share
    shapes = [
        (case.tokens, case.n_in),
        (case.n_out, case.n_in),
        (score_rows, case.n_in),
        (score_rows, case.n_in // case.reach) if case.reach else (),
        (case.n_out,),
        (case.tokens, case.n_out),
    ]
    x, weight, scores, threshold, bias, dy = (torch.randn(shape, generator=rng) for shape in shapes)
    if not case.reach:
        threshold = torch.tensor(0.1)
    return [x.to(dtype), weight, scores, threshold, bias], dy.to(dtype)


def results(function, inputs: list[torch.Tensor], dy: torch.Tensor, needed: str = "xwsb", **options) -> dict:
    """y, and the gradients of those of x, weight, scores and bias that are `needed`."""
    leaves = dict(zip("xwstb", inputs, strict=True))
    leaves = {
        name: leaf if leaf is None else leaf.detach().requires_grad_(name in needed) for name, leaf in leaves.items()
    }
    y = function(*leaves.values(), **options)
    y.backward(dy.to(y.dtype))
    grads = {f"d{'' if name == 'x' else '_'}{full}": leaves[name] for name, full in zip(
        "xwsb", ("x", "weight", "scores", "bias"), strict=True) if name in needed}  # fmt: skip
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in grads.items()}


def assert_close(got: dict, expected: dict, dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        wanted = expected[name]
        assert value.dtype == (dtype if name in ("y", "dx") else torch.float32)
        assert value.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(value.double(), wanted.double(), rtol=0, atol=TOLERANCE[dtype][name] * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_match_the_reference(isa, case, dtype):
    inputs, dy = operands(case, dtype)
    assert_close(results(masked_matmul, inputs, dy, isa=isa), results(masked_matmul_ref, inputs, dy), dtype)


# From 128 tokens on, if few weights are kept. A panel has 16, 32 or 64 tokens, a task 256 results, a slab 256 values.
SPARSE_CASES = [
    Case(128, 1, 1),
    Case(128, 768, 96),
    Case(129, 31, 257),
    Case(191, 257, 33),
    Case(130, 513, 7),
    Case(133, 20, 600, share=2),
    Case(150, 300, 64, share=32, reach=4),
    Case(128, 80, 30, reach=80),
]


def sparsely_kept(case: Case, dtype: torch.dtype, kept: float = 0.05) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs, dy = operands(case, dtype)
    scores = inputs[2]
    inputs[3] = torch.full_like(inputs[3], float(scores.flatten().quantile(1 - kept)))
    if scores.numel() == 1:
        inputs[3] += 1
    return inputs, dy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
def test_what_is_sparse_matches_the_reference(isa, case, dtype):
    inputs, dy = sparsely_kept(case, dtype)
    assert_close(results(masked_matmul, inputs, dy, isa=isa), results(masked_matmul_ref, inputs, dy), dtype)
    inputs[4] = None
    got = results(masked_matmul, inputs, dy, "xs", isa=isa, threads=3)
    assert_close(got, results(masked_matmul_ref, inputs, dy, "xs"), dtype)
    alone = results(masked_matmul, inputs, dy, "xs", isa=isa, threads=1)
    assert all(torch.equal(value, alone[name]) for name, value in got.items())


@pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
def test_in_float32_what_is_sparse_has_the_bits_of_the_dense_product(isa, case):
    inputs, dy = sparsely_kept(case, torch.float32)
    whole = results(masked_matmul, inputs, dy, "x", isa=isa)
    parts = [
        results(masked_matmul, [x, *inputs[1:]], part, "x", isa=isa)
        for x, part in zip(inputs[0].split(64), dy.split(64), strict=True)
    ]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_kept_of_many_tokens_leaves_the_bias(isa, dtype):
    inputs, dy = operands(Case(140, 50, 34), dtype)
    inputs[3] = torch.tensor(torch.inf)
    got = results(masked_matmul, inputs, dy, isa=isa)
    assert not got["dx"].any() and torch.equal(got["y"], inputs[4].to(dtype).expand(140, 34))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", ["x", "w", "s", "b", "xs", "ws", "xw", "sb"])
def test_any_of_the_gradients_may_be_left_out(isa, needed, dtype):
    inputs, dy = operands(Case(9, 50, 34, share=2), dtype)
    got = results(masked_matmul, inputs, dy, needed, isa=isa)
    assert_close(got, results(masked_matmul_ref, inputs, dy, needed), dtype)
    everything = results(masked_matmul, inputs, dy, isa=isa)
    assert all(torch.equal(value, everything[name]) for name, value in got.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bias(isa, dtype):
    inputs, dy = operands(Case(9, 50, 34), dtype)
    inputs[4] = None
    assert_close(
        results(masked_matmul, inputs, dy, "xws", isa=isa), results(masked_matmul_ref, inputs, dy, "xws"), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_kept_is_a_dense_layer_and_none_kept_the_bias(isa, dtype):
    inputs, dy = operands(Case(9, 50, 34), dtype)
    for threshold in (-torch.inf, torch.inf):
        inputs[3] = torch.tensor(threshold)
        got = results(masked_matmul, inputs, dy, isa=isa)
        assert_close(got, results(masked_matmul_ref, inputs, dy), dtype)
    assert not got["dx"].any() and not got["d_weight"].any() and got["d_scores"].any()
    assert torch.equal(got["y"], inputs[4].to(dtype).expand(9, 34))


def test_a_score_that_is_nan_is_not_kept_and_spoils_nothing(isa):
    inputs, dy = operands(Case(9, 50, 34, share=2), torch.float32)
    inputs[2][3, 7] = inputs[2][0, 49] = torch.nan
    lowest = [*inputs[:2], inputs[2].nan_to_num(-torch.inf), *inputs[3:]]
    got, expected = (results(masked_matmul, each, dy, isa=isa) for each in (inputs, lowest))
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert_close(got, results(masked_matmul_ref, inputs, dy), torch.float32)


def test_a_score_at_its_threshold_is_kept(isa):
    threshold = torch.tensor(0.3)
    scores = torch.stack([threshold, torch.nextafter(threshold, torch.tensor(0.0))]).expand(1, 2).contiguous()
    assert masked_matmul(torch.ones(1, 2), torch.tensor([[2.0, 5.0]]), scores, threshold, isa=isa).item() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_give_no_values_and_zero_gradients(isa, dtype):
    inputs, _ = operands(Case(9, 50, 34, share=2), dtype)
    inputs[0] = inputs[0][:0]
    got = results(masked_matmul, inputs, torch.empty(0, 34), isa=isa)
    assert got["y"].shape == (0, 34) and got["dx"].shape == (0, 50)
    assert not any(got[name].any() for name in ("d_weight", "d_scores", "d_bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_may_have_any_leading_shape_and_strides(isa, dtype):
    inputs, dy = operands(Case(24, 50, 34), dtype)
    flat = results(masked_matmul, inputs, dy, isa=isa)
    x = inputs[0].view(4, 2, 3, 50)
    shaped = results(masked_matmul, [x, *inputs[1:]], dy.view(4, 2, 3, 34), isa=isa)
    strided = torch.stack([x, x], -1)[..., 0]
    expanded = torch.stack([dy, dy], -1)[..., 0].view(4, 2, 3, 34)
    assert not strided.is_contiguous() and not expanded.is_contiguous()
    for got in (shaped, results(masked_matmul, [strided, *inputs[1:]], expanded, isa=isa)):
        assert got["y"].shape == (4, 2, 3, 34) and got["dx"].shape == x.shape
        assert all(torch.equal(value.reshape(flat[name].shape), flat[name]) for name, value in got.items())
    one = masked_matmul(inputs[0][0], *inputs[1:], isa=isa)
    assert torch.equal(one, masked_matmul(inputs[0][:1], *inputs[1:], isa=isa)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(70, 600, 400, share=2), Case(300, 1030, 100, reach=2)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(isa, case, dtype):
    inputs, dy = operands(case, dtype)
    expected = results(masked_matmul, inputs, dy, isa=isa, threads=1)
    for threads in (2, 3, 16):
        got = results(masked_matmul, inputs, dy, isa=isa, threads=threads)
        assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_avx2_and_avx512_give_the_same_bits_in_float32():
    if "avx512" not in _dispatch.supported_isas():
        require("avx512", _dispatch.why_off()["avx512"])
    inputs, dy = operands(Case(70, 600, 100, share=2), torch.float32)
    wide, narrow = (results(masked_matmul, inputs, dy, isa=isa) for isa in ("avx512", "avx2"))
    assert all(torch.equal(value, narrow[name]) for name, value in wide.items())


def test_bfloat16_is_multiplied_as_it_is_and_not_as_a_float_of_two(isa):
    # Two bf16 side by side look like a float32 that arithmetic could take for a denormal and flush.
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    x[0, 0] = 3
    torch.set_flush_denormal(True)
    try:
        y = masked_matmul(x, torch.ones(1, 2), torch.ones(1, 2), torch.tensor(0.0), isa=isa)
    finally:
        torch.set_flush_denormal(False)
    assert y.item() == 3


def test_infinities_and_nan_reach_the_result_only_where_they_are_kept(isa):
    weight = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 1.0, 1.0]])
    scores = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    for dtype in DTYPES:
        y = masked_matmul(torch.ones(1, 3, dtype=dtype), weight, scores, torch.tensor(0.5), isa=isa)
        assert y.tolist() == [[3.0, torch.inf]]


def test_the_highest_scores_are_kept_by_their_threshold():
    scores = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
    y = masked_matmul(torch.eye(30), torch.ones(40, 30), scores, topk_threshold(scores.flatten(), 300))
    assert y.sum() == 300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", ["xs", "xwsb", ""])
def test_torch_finds_the_operator_well_formed(dtype, grad):
    inputs, dy = operands(Case(5, 12, 8, share=2, reach=4), dtype)
    inputs = [value.requires_grad_(name in grad) for name, value in zip("xwstb", inputs, strict=True)]
    torch.library.opcheck(torch.ops.sparsebert.masked_matmul.default, (*inputs, "", 0))
    inputs = [value.detach() for value in inputs[:4]]
    for needed in ([True, False, True], [False, True, False], [True, True, True]):
        torch.library.opcheck(torch.ops.sparsebert.masked_matmul_backward.default, (dy, *inputs, needed, "", 0))


def test_a_compiled_model_holds_it_in_one_graph():
    inputs, dy = operands(Case(5, 12, 8, share=2), torch.float32)
    expected = results(masked_matmul, inputs, dy)
    # The eager backend: the question is whether the graph breaks, and no C++ compiler is needed.
    compiled = torch.compile(masked_matmul, fullgraph=True, backend="aot_eager")
    got = results(compiled, inputs, dy)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


X, W, S, T, B = torch.ones(4, 6), torch.ones(8, 6), torch.ones(4, 6), torch.tensor(0.0), torch.ones(8)
BAD_CALLS = {
    "weight must be contiguous float32 [rows >= 1, n_in >= 1], got torch.float64 [8, 6]": (X, W.double(), S, T),
    "weight must be contiguous float32 [rows >= 1, n_in >= 1], got torch.float32 [8, 6], strided": (
        X, torch.ones(6, 8).T, S, T),
    "weight must be contiguous float32 [rows >= 1, n_in >= 1], got torch.float32 [0, 6]": (X, W[:0], S, T),
    "scores must be contiguous float32 [rows >= 1, n_in >= 1], got torch.float32 [6]": (X, W, S[0], T),
    "scores must be [score_rows, 6], score_rows dividing n_out = 8, got [3, 6]": (X, W, S[:3], T),
    "scores must be [score_rows, 6], score_rows dividing n_out = 8, got [4, 5]": (X, W, torch.ones(4, 5), T),
    "x must be float32 or bfloat16 [..., n_in = 6], got torch.float16 [4, 6]": (X.half(), W, S, T),
    "x must be float32 or bfloat16 [..., n_in = 6], got torch.float32 [4, 5]": (torch.ones(4, 5), W, S, T),
    "x must be float32 or bfloat16 [..., n_in = 6], got torch.float32 []": (torch.tensor(1.0), W, S, T),
    "[] or [4, n_in / m], m dividing n_in = 6, got torch.float32 [4]": (X, W, S, torch.ones(4)),
    "[] or [4, n_in / m], m dividing n_in = 6, got torch.float32 [4, 4]": (X, W, S, torch.ones(4, 4)),
    "[] or [4, n_in / m], m dividing n_in = 6, got torch.float32 [8, 3]": (X, W, S, torch.ones(8, 3)),
    "[] or [4, n_in / m], m dividing n_in = 6, got torch.float64 []": (X, W, S, T.double()),
    "bias must be contiguous float32 [8], got torch.float32 [6]": (X, W, S, T, torch.ones(6)),
    "all tensors must be on x's device cpu, got ['cpu', 'meta']": (X, W, S.to("meta"), T),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as error:
        masked_matmul(*BAD_CALLS[message])
    assert message in str(error.value)


def test_a_bad_choice_of_what_to_run_on_is_named():
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got -1"):
        masked_matmul(X, W, S, T, threads=-1)
    with pytest.raises(InputError, match=r"isa must be one of .* got 'neon'"):
        masked_matmul(X, W, S, T, isa="neon")


def test_the_binding_refuses_what_would_leave_its_memory():
    core = _dispatch.core()
    x, w, s, t, b = (value.numpy() for value in (X, W, S, T, B))
    y, bits = np.ones((4, 8), np.float32), np.ones((4, 6), np.uint16)
    forward = {
        "x must": [(x[:, :5].copy(), w, s, t, b, y), (bits, w, s, t, b, y), (x, w, s, t, b, y[:3].copy())],
        "2-d": [(x[0].copy(), w, s, t, b, y), (x, w[0].copy(), s, t, b, y)],
        "scores must": [(x, w, s[:3].copy(), t, b, y), (x, w, s[:, :5].copy(), t, b, y)],
        "thresholds must": [(x, w, s, np.ones(4, np.float32), b, y), (x, w, s, np.ones((4, 4), np.float32), b, y)],
        "bias must": [(x, w, s, t, b[:6].copy(), y)],
    }
    for rule, calls in forward.items():
        for call in calls:
            with pytest.raises(ValueError, match=rule):
                core.masked_matmul(*call, "scalar", 1)
    backward = {
        "x must": [(x, y[:, :7].copy(), w, s, t, x, w, s)],
        "dx must": [(x, y, w, s, t, x[:3].copy(), w, s)],
        "d_weight": [(x, y, w, s, t, x, w[:4].copy(), s)],
        "d_scores": [(x, y, w, s, t, x, w, w)],
    }
    for rule, calls in backward.items():
        for call in calls:
            with pytest.raises(ValueError, match=rule):
                core.masked_matmul_backward(*call, "scalar", 1)
    with pytest.raises(ValueError, match="threads"):
        core.masked_matmul(x, w, s, t, b, y, "scalar", 0)
    with pytest.raises(TypeError):
        core.masked_matmul(x.astype(np.float64), w, s, t, b, y, "scalar", 1)


def test_no_tokens_make_gradients_of_zero(isa):
    for x in (torch.empty(0, 6), torch.empty(2, 0, 6, dtype=torch.bfloat16)):
        inputs = [value.clone().requires_grad_() for value in (x, W, S)]
        masked_matmul(*inputs, T, B, isa=isa).sum().backward()
        for value in inputs:
            assert value.grad.shape == value.shape and not value.grad.any()
