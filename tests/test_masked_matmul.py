"""masked_matmul against float64, every instruction set: y, and the gradients for x, W, scores and bias."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import require

from sparsebert import environment
from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops import masked_matmul as module
from sparsebert.ops.masked_matmul import kept, masked_matmul, masked_matmul_ref

# Largest error over the largest value. float32: sums of up to 3072 products in another order. bfloat16: y and dL/dx are
# rounded to 8 bits at the end and W before, 2^-9 each; dL/dW and dL/dm̂ stay float32 sums of exact products.
TOLERANCE = {torch.float32: (3e-6, 3e-6), torch.bfloat16: (6e-3, 3e-6)}


class Case(NamedTuple):
    tokens: int
    n_in: int
    n_out: int
    share: int = 1
    reach: int = 0  # inputs a threshold; 0: one for all
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.tokens}x{self.n_in}x{self.n_out}-share{self.share}-reach{self.reach}" + "-nobias" * (
            not self.bias
        )


# Tiles are 8 x 48 (AVX-512), 4 x 24 (AVX2), 4 x 8: one less, one more and exactly that; primes; parts of 2,048 tokens.
CASES = [
    Case(1, 1, 1),
    Case(8, 16, 48),
    Case(7, 15, 47),
    Case(9, 17, 49, bias=False),
    Case(15, 47, 24, 2),
    Case(16, 49, 23),
    Case(31, 96, 64, 16, 4),
    Case(33, 97, 96, 32),
    Case(5, 64, 48, 1, 8),
    Case(6, 40, 36, 3, 5),
    Case(2100, 20, 32, 16),
    Case(40, 768, 3072, 32, bias=False),
    Case(0, 16, 48, 2),
]


@pytest.fixture(params=environment.ISAS)
def any_isa(request) -> str:
    if request.param not in _dispatch.supported_isas():
        require(request.param, _dispatch.why_off()[request.param])
    return request.param


def tensors(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    rows = case.n_out // case.share

    def normal(*shape):
        return torch.randn(*shape, generator=made)

    return {
        "x": normal(case.tokens, case.n_in).to(dtype),
        "weight": normal(case.n_out, case.n_in),
        "scores": normal(rows, case.n_in),
        "threshold": normal(rows, case.n_in // case.reach) if case.reach else torch.tensor(0.3),
        "bias": normal(case.n_out) if case.bias else None,
    }


def run(given: dict[str, torch.Tensor], grad_y: torch.Tensor, op=masked_matmul, **how) -> dict[str, torch.Tensor]:
    leaves = {name: None if t is None else t.clone().requires_grad_(name != "threshold") for name, t in given.items()}
    y = op(*leaves.values(), **how)
    y.backward(grad_y)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and name != "threshold"}
    return {"y": y.detach(), **gradients}


def expected(given: dict[str, torch.Tensor], grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    found = masked_matmul_ref(*given.values(), grad_y=grad_y)
    return dict(zip(("y", "x", "weight", "scores", "bias"), found, strict=True))


def require_close(found: dict, wanted: dict, dtype: torch.dtype, slack: float = 1.0) -> None:
    for name, value in found.items():
        assert value.shape == wanted[name].shape, name
        assert value.dtype == (dtype if name in ("y", "x") else torch.float32), name
        if value.numel():
            scale = wanted[name].abs().max().clamp_min(1e-30)
            error = ((value.double() - wanted[name]).abs().max() / scale).item()
            assert error <= slack * TOLERANCE[dtype][name not in ("y", "x")], (name, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_match_float64(case: Case, dtype: torch.dtype, any_isa: str):
    given = tensors(case, dtype)
    grad_y = torch.randn(case.tokens, case.n_out, generator=torch.Generator().manual_seed(1)).to(dtype)
    require_close(run(given, grad_y, isa=any_isa), expected(given, grad_y), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threshold", [float("-inf"), float("inf")])
def test_masks_that_keep_all_or_nothing(dtype, threshold, any_isa):
    given = tensors(Case(9, 33, 50), dtype) | {"threshold": torch.tensor(threshold)}
    grad_y = torch.ones(9, 50, dtype=dtype)
    found = run(given, grad_y, isa=any_isa)
    require_close(found, expected(given, grad_y), dtype)
    if threshold > 0:
        assert not found["x"].any() and not found["weight"].any() and found["scores"].any()


@pytest.mark.parametrize("n_in", [32, 33])
def test_a_nan_score_is_not_kept_and_an_equal_one_is(n_in, any_isa):
    given = tensors(Case(4, n_in, 48), torch.float32)
    given["scores"][3] = float("nan")
    given["scores"][4] = given["threshold"]
    found = run(given, torch.ones(4, 48), isa=any_isa)
    require_close(found, expected(given, torch.ones(4, 48)), torch.float32)
    assert torch.equal(found["y"][:, 3], given["bias"][3].expand(4))
    assert kept(given["weight"], given["scores"], given["threshold"])[4].all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_result_does_not_depend_on_threads(dtype):
    given = tensors(Case(130, 200, 320, 16), dtype)
    grad_y = torch.randn(130, 320, generator=torch.Generator().manual_seed(2)).to(dtype)
    one, four = (run(given, grad_y, threads=threads) for threads in (1, 4))
    for name in one:
        assert torch.equal(one[name], four[name]), name


@pytest.mark.parametrize("wanted", [("x",), ("scores",), ("weight",), ("x", "scores"), ("bias",), ()])
def test_only_gradients_that_are_asked_for_are_made(wanted):
    given = tensors(Case(9, 33, 48), torch.float32)
    grad_y = torch.randn(9, 48)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in given.items()}
    y = masked_matmul(*leaves.values())
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(grad_y)
    reference = expected(given, grad_y)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), name
        if name in wanted:
            torch.testing.assert_close(leaf.grad.double(), reference[name], atol=1e-4, rtol=1e-4)


def test_inputs_of_any_shape_and_layout():
    given = tensors(Case(24, 33, 48), torch.float32)
    whole = run(given, torch.ones(24, 48))["y"]
    x = given["x"].view(2, 3, 4, 33)
    others = [t for name, t in given.items() if name != "x"]
    assert torch.equal(masked_matmul(x, *others), whole.view(2, 3, 4, 48))
    strided = given["x"].T.contiguous().T
    assert torch.equal(masked_matmul(strided, *others), whole)
    assert torch.equal(masked_matmul(given["x"][0], *others), whole[0])
    leaf = given["x"].clone().requires_grad_()
    masked_matmul(leaf, *others).sum().backward()  # its gradient is expanded, not contiguous
    torch.testing.assert_close(leaf.grad, run(given, torch.ones(24, 48))["x"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [Case(9, 32, 48, 16), Case(9, 32, 48, 1, 4)], ids=str)
def test_plain_torch_for_other_devices_has_the_same_gradients(case, dtype):
    x, weight, scores, threshold, _ = (given := tensors(case, dtype)).values()
    grad_y = torch.randn(9, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = module._backward_torch(grad_y, x, weight, scores, threshold, (True, True, True))
    wanted = expected(given, grad_y)
    slack = 0.05 if dtype == torch.bfloat16 else 1e-4  # torch rounds G to bf16
    for name, value in zip(("x", "weight", "scores"), found, strict=True):
        torch.testing.assert_close(
            value.double(), wanted[name], atol=slack * wanted[name].abs().max().item(), rtol=0.02
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_opcheck(dtype):
    given = tensors(Case(5, 17, 32, 16), dtype)
    leaves = [None if t is None else t.requires_grad_(name != "threshold") for name, t in given.items()]
    torch.library.opcheck(torch.ops.sparsebert.masked_matmul.default, (*leaves, None, 1))


def test_torch_compile_sees_it_whole():
    given = tensors(Case(5, 17, 32, 16), torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, weight, scores, threshold, bias):
        return torch.relu(masked_matmul(x, weight, scores, threshold, bias))

    leaf = given["scores"].clone().requires_grad_()
    y = layer(given["x"], given["weight"], leaf, given["threshold"], given["bias"])
    y.sum().backward()
    again = given["scores"].clone().requires_grad_()
    wanted = torch.relu(masked_matmul(given["x"], given["weight"], again, given["threshold"], given["bias"]))
    wanted.sum().backward()
    assert torch.equal(y, wanted) and torch.equal(leaf.grad, again.grad)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(3, 16)}, r"x must be \[\.\.\., n_in\]"),
        ({"x": torch.zeros(3, 17, dtype=torch.float64)}, "x must be float32 or bfloat16"),
        ({"weight": torch.zeros(48, 17, dtype=torch.bfloat16)}, "weight must be float32"),
        ({"scores": torch.zeros(48, 16)}, "scores must be"),
        ({"scores": torch.zeros(5, 17)}, "scores must be"),
        ({"threshold": torch.zeros(3)}, "threshold must be"),
        ({"threshold": torch.zeros(48, 2)}, "threshold must be"),
        ({"bias": torch.zeros(47)}, "bias must be"),
    ],
)
def test_wrong_inputs_are_refused(change, match):
    with pytest.raises(InputError, match=match):
        masked_matmul(*(tensors(Case(3, 17, 48), torch.float32) | change).values())
