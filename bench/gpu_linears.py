"""Linears in bench.gpu_report: the fastest form of a weight in each pattern, against cuBLAS on one without zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from bench.gpu_checks import ACTIVATIONS, PRODUCTS
from bench.gpu_forms import FormLinear, patterned, that_hold
from bench.gpu_place import BF16, DENSE, SPARSITY, Case, Goal, Place, compiled, copies, figures, near, timed
from bench.harness import Row
from sparsebert import patterns
from sparsebert.errors import UnsupportedError

# Pattern -> how many times as fast as cuBLAS it is to be, on a matrix of 4096². 20 does not divide 4096, so 128:2:20
# has a few columns less; its rival is the whole square.
LARGE = {"2:4": 1.3, "128:2:20": 3.0, "128:2:16": None, "64x1": 3.0, "32x1": None}
# n_out, n_in, activation: the linears of BERT-base's feed-forward part.
BERT_LINEARS = ((3072, 768, "gelu"), (768, 3072, "none"))
BERT_PATTERNS = ("unstructured", "2:4", "64x1")


def large_linear(place: Place) -> Iterator[Case]:
    n = 128 if place.small else 4096
    for name, bound in LARGE.items():
        goals = () if bound is None else (Goal("ratio", "≥", bound),)
        yield Case(f"{name}, {n}², {n} tokens", partial(_linear, place, name, (n, n), n, "none", True, goals))
    yield Case(f"torch's 2:4, {n}², {n} tokens", partial(_cusparselt, place, (n, n), n))


def bert_linears(place: Place) -> Iterator[Case]:
    for n_out, n_in, activation in ((128, 96, "gelu"),) if place.small else BERT_LINEARS:
        for tokens in (5,) if place.small else (32, 4096):
            title = f"{n_in} to {n_out}, {activation}, {tokens} tokens"
            for name in BERT_PATTERNS:
                run = partial(_linear, place, name, (n_out, n_in), tokens, activation, False, ())
                yield Case(f"{name}, {title}", run)
            yield Case(f"torch.compile, {title}", partial(_compiled, place, (n_out, n_in), tokens, activation))


def _linear(
    place: Place, name: str, shape: tuple[int, int], tokens: int, activation: str, sparse: bool, goals: tuple[Goal, ...]
) -> Row:
    """The fastest of the forms that hold a weight of this pattern, against cuBLAS through torch on a weight without
    zeros. sparse: only forms that gain from zeros.
    """
    pattern, rng = patterns.parse(name), np.random.default_rng(place.seed_of((name, shape, tokens)))
    n_out, n_in = shape[0], shape[1] // getattr(pattern, "m", 1) * getattr(pattern, "m", 1)
    weight, bias = patterned(pattern, n_out, n_in, SPARSITY, rng), torch.randn(n_out)
    forms = that_hold(place, weight, tokens, sparse=sparse)
    if not forms:
        raise UnsupportedError(f"no form gains from {name} here", fix="see why in the rows of sparse_matmul's checks")
    number = copies(place, BF16 * (n_out * n_in // 10 + (n_in + n_out) * tokens))
    random = partial(torch.randn, device=place.device, dtype=torch.bfloat16)
    x, out = [random(n_in, tokens) for _ in range(number)], [random(n_out, tokens) for _ in range(number)]
    calls, sizes, row = {}, {}, {}
    for form in forms:
        first = FormLinear(place, form, weight, bias, activation)
        linears = [first, *(first.copy() for _ in range(number - 1))]
        calls[form] = [partial(linear, *both) for linear, both in zip(linears, zip(x, out, strict=True), strict=True)]
        sizes[form] = linears[0].size
        row = max(row, _checked(linears[0], weight, x[0], bias), key=lambda row: row.get("error", 0.0))
    calls[DENSE] = _dense(place, shape, tokens, activation, number)
    timings = timed(place, calls, graph=True)
    best = min(forms, key=timings.median)
    moved = sizes[best] + BF16 * (n_in + n_out) * tokens
    operations = 2.0 * np.count_nonzero(weight) * tokens
    row |= figures(place, timings, ours=best, size=moved, operations=operations, versus=DENSE, goals=goals)
    return row | {"form": best, "why": f"by {best}"}


def _checked(linear: FormLinear, weight: np.ndarray, x: torch.Tensor, bias: torch.Tensor) -> Row:
    """The row of a check of a linear in bf16, of its first 64 tokens."""
    want = torch.from_numpy(weight).bfloat16().double() @ x[:, :64].cpu().double() + bias.double()[:, None]
    want = ACTIVATIONS[linear.activation](want)
    return near({"y": linear(x)[:, :64]}, {"y": want}, linear.tolerance)


def _cublas(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def _dense(
    place: Place, shape: tuple[int, int], tokens: int, activation: str, number: int, function: Callable = _cublas
) -> list[Callable[[], object]]:
    """The same linear without zeros, on activations as torch stores them, [tokens, n_in]."""
    random = partial(torch.randn, device=place.device, dtype=torch.bfloat16)
    bias = random(shape[0])
    return [partial(function, random(tokens, shape[1]), random(*shape), bias, activation) for _ in range(number)]


def _compiled(place: Place, shape: tuple[int, int], tokens: int, activation: str) -> Row:
    number = copies(place, BF16 * (shape[0] * shape[1] + sum(shape) * tokens))
    functions = {"compile": compiled(place, _cublas), DENSE: _cublas}
    calls = {name: _dense(place, shape, tokens, activation, number, one) for name, one in functions.items()}
    return figures(place, timed(place, calls, graph=True), ours="compile")


def _cusparselt(place: Place, shape: tuple[int, int], tokens: int) -> Row:
    """2:4 as torch.sparse has it."""
    if place.rehearsal or not torch.backends.cusparselt.is_available():
        raise UnsupportedError("cuSPARSELt is not here", fix="take a GPU, and a torch that is built with it")
    number = copies(place, BF16 * (shape[0] * shape[1] + sum(shape) * tokens))
    mask = torch.tensor([True, True, False, False], device=place.device).repeat(shape[0], shape[1] // 4)
    calls = _dense(place, shape, tokens, "none", number)
    halves = [
        partial(F.linear, call.args[0], torch.sparse.to_sparse_semi_structured(call.args[1] * mask), call.args[2])
        for call in calls
    ]
    want = F.linear(calls[0].args[0], calls[0].args[1] * mask, calls[0].args[2])
    row = near({"y": halves[0]()}, {"y": want}, PRODUCTS[torch.bfloat16])
    return row | figures(place, timed(place, {"cuSPARSELt": halves, DENSE: calls}), ours="cuSPARSELt")
