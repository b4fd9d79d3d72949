"""admm_prune against the same iterations in plain torch, float32, on the same threads, taking turns.

python -m bench.bench_admm_prune [--threads N] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench import harness
from bench.shapes import layer_problem, low_rank_metric
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.admm_prune import (
    PATH_ITERATIONS,
    _normalised,
    _path,
    _schedule,
    _settled,
    _size,
    admm_path,
    admm_prune,
)
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.ops.obs_prune import obs_sweep
from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.patterns import Grouped, NofM, Pattern, kept_in, parse
from sparsebert.pruning.allocate import LEVELS

# Near-ties fall differently in different float32 sums, and the iterations amplify them.
SAME = 0.005
COLUMNS = {
    "case": "", "isa": "", "ours_ms": ".0f", "reference_ms": ".0f", "ratio": ".2f", "low": ".2f", "high": ".2f",
    "eigh_ms": ".0f", "same_result": "", "objective": ".4f", "sweep": ".3f", "magnitude": ".3f", "apart_ms": ".0f",
    "apart": ".3f",
}  # fmt: skip
NOTES = (
    "`ours_ms` is the time of the whole call: eigenvectors (`eigh_ms`, float32, part of both sides' times) and up to "
    "120 iterations. The reference does the same in torch: float32 products and divisions, torch.topk. `ratio`: the "
    "reference's time over ours, with its 95 % interval. `objective`: the error tr((V - W*) H (V - W*)ᵀ) after least "
    "squares on our support, over the error on the reference's support; `same_result`: `objective` is within 0.5 % of "
    "1. `sweep` and `magnitude`: our error over the error on the support of obs_sweep, and on the support of the "
    "largest normalised magnitudes. Rows with a row metric B (of rank 5 plus a floor): the errors are tr(B (V - W*) H "
    "(V - W*)ᵀ), the reference is float64, and the other two supports ignore B. Rows of a climb time admm_path, which "
    "finds the supports at all levels in one call: `objective` is the geometric mean over levels; `apart_ms` is the "
    "time of one call of admm_prune per level, `apart` the largest ratio over levels of our error to the error of that "
    "call."
)


class Case(NamedTuple):
    rows: int
    n_in: int
    pattern: Pattern
    sparsity: float
    gelu: bool
    metric: bool = False

    def __str__(self) -> str:
        amount = "" if isinstance(self.pattern, NofM) else f" {self.sparsity:g}"
        more = ", GELU inputs" if self.gelu else ", row metric" if self.metric else ""
        return f"{self.rows} x {self.n_in} {self.pattern}{amount}{more}"


CASES = [
    Case(384, 384, parse(name), sparsity, False)
    for name, sparsity in (
        ("unstructured", 0.5), ("unstructured", 0.75), ("unstructured", 0.875), ("unstructured", 0.95),
        ("2:4", 0.5), ("32x1", 0.75),
    )
] + [
    Case(384, 1536, parse("unstructured"), 0.875, True),
    Case(384, 1536, parse("2:4"), 0.5, True),
    Case(384, 384, parse("unstructured"), 0.875, False, metric=True),
    Case(384, 384, parse("32x1"), 0.75, False, metric=True),
    Case(1536, 384, parse("unstructured"), 0.875, False, metric=True),
]  # fmt: skip
QUICK_CASES = [case for case in CASES if case.n_in == 384 and case.sparsity == 0.875]


# The climbs: (rows, n_in, pattern, GELU inputs). Their levels are those that the allotment of a budget tries.
CLIMBS = [
    (384, 384, parse("unstructured"), False), (384, 384, parse("32x1"), False),
    (384, 1536, parse("unstructured"), True),
]  # fmt: skip


def project(scores: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """pattern_mask by torch.topk."""
    rows, n_in = scores.shape
    if isinstance(pattern, NofM):
        banks = scores.view(-1, pattern.m)
        chosen = banks.topk(pattern.n, sorted=False).indices
        return torch.zeros_like(banks, dtype=torch.bool).scatter_(1, chosen, True).view(rows, n_in)
    size = pattern.rows if isinstance(pattern, Grouped) else 1
    sums = scores.view(-1, size, n_in).sum(1) if size > 1 else scores
    chosen = sums.flatten().topk(kept_in(pattern, rows, n_in, sparsity) // size, sorted=False).indices
    keep = torch.zeros(sums.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(sums.shape)
    return keep.repeat_interleave(size, 0) if size > 1 else keep


def plain(weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """admm_prune in torch operations, float32 in the eigenvectors."""
    b0, hn = _normalised(weight, h)
    eigenvalues, q = torch.linalg.eigh(hn.float())
    return iterate(b0.float(), eigenvalues, lambda b: b @ q, lambda b: b @ q.T, pattern, sparsity)


def plain_coupled(
    weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float, metric: torch.Tensor
) -> torch.Tensor:
    """admm_prune with a row_metric in torch operations, float64 in the eigenvectors of both."""
    b0, hn = _normalised(weight, h)
    b0, metric = _normalised(b0.T, metric)
    across, q = torch.linalg.eigh(hn)
    down, p = torch.linalg.eigh(metric)
    eigenvalues = down[:, None] * across
    return iterate(b0.T, eigenvalues, lambda b: p.T @ b @ q, lambda b: p @ b @ q.T, pattern, sparsity)


def plain_path(weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, levels: Sequence[float]) -> list[torch.Tensor]:
    """admm_path in torch operations, float32 in the eigenvectors."""
    b0, hn = _normalised(weight, h)
    eigenvalues, q = torch.linalg.eigh(hn.float())
    b = b0.float()
    u, goal, supports = torch.zeros_like(b), (b @ q) * eigenvalues, []
    for level, rho, growth, last in _path(levels, PATH_ITERATIONS, _size(eigenvalues)):
        x = b + u
        z = x * project(x.square(), pattern, levels[level])
        u = x - z
        b = ((goal + rho * ((z - u) @ q)) / (eigenvalues + rho)) @ q.T
        u /= growth
        if last:
            supports.append(project((b + u).square(), pattern, levels[level]))
    return supports


def iterate(b, eigenvalues, into, out_of, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """The iterations. `into` multiplies into the basis of eigenvectors, `out_of` back out of it."""
    last, u, goal = None, torch.zeros_like(b), into(b) * eigenvalues
    for level, rho, growth, climbed in _schedule(pattern, sparsity, 120, _size(eigenvalues)):
        x = b + u
        keep = project(x.square(), pattern, level)
        if climbed:
            if _settled(keep, last):
                break
            last = keep
        z = x * keep
        u = x - z
        b = out_of((goal + rho * into(z - u)) / (eigenvalues + rho))
        u /= growth
    return keep


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    """One row per instruction set. Raises harness.WrongOutput if a support has the wrong size for the pattern."""
    weight, h = map(torch.from_numpy, layer_problem(case.rows, case.n_in, case.gelu))
    problem = (weight, h, case.pattern, case.sparsity)
    metric = low_rank_metric(case.rows) if case.metric else None
    calls = {"torch": lambda: plain(*problem) if metric is None else plain_coupled(*problem, metric)}
    # Only the best instruction set if a layer has 1536 inputs, as it takes seconds, or a metric, as torch multiplies.
    isas = _dispatch.float32_isas() if case.n_in < 1024 and metric is None else (_dispatch.isa(),)
    for isa in isas:
        calls[isa] = lambda isa=isa: admm_prune(*problem, row_metric=metric, threads=threads, isa=isa)
    normalised = _normalised(weight, h)[1].float()
    calls["eigh"] = lambda: torch.linalg.eigh(normalised)

    def error(keep: torch.Tensor) -> float:
        lost = masked_lstsq(weight @ h, h, keep, row_metric=metric) - weight
        return float(((lost if metric is None else metric @ lost) * (lost @ h)).sum())

    keeps = {name: call() for name, call in calls.items() if name != "eigh"}
    for name, keep in keeps.items():
        if keep.sum() != kept_in(case.pattern, case.rows, case.n_in, case.sparsity):
            raise harness.WrongOutput(f"{case}: {name} keeps {int(keep.sum())} weights")
    errors = {name: error(keep) for name, keep in keeps.items()}
    sweep = error(obs_sweep(*problem) != 0)
    magnitude = error(pattern_mask((weight**2 * h.diagonal()).float(), case.pattern, case.sparsity))
    timings = interleave(calls, rounds, warmup=0, settle=5e-3 if threads > 1 else 0.0)
    rows = []
    for isa in isas:
        ratio = timings.ratio("torch", isa)
        objective = errors[isa] / errors["torch"]
        rows.append({
            "case": str(case), "threads": threads, "isa": isa, "ours_ms": timings.median(isa) * 1e3,
            "reference_ms": timings.median("torch") * 1e3, "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
            "eigh_ms": timings.median("eigh") * 1e3, "same_result": abs(objective - 1) <= SAME, "objective": objective,
            "sweep": errors[isa] / sweep, "magnitude": errors[isa] / magnitude,
        })  # fmt: skip
    return rows


def measure_climb(rows: int, n_in: int, pattern: Pattern, gelu: bool, threads: int, rounds: int) -> list[harness.Row]:
    """The row of one climb. Raises harness.WrongOutput if a support has the wrong size for its level."""
    weight, h = map(torch.from_numpy, layer_problem(rows, n_in, gelu))
    case = f"{rows} x {n_in} {pattern}, a climb of {len(LEVELS)} levels" + (", GELU inputs" if gelu else "")
    calls = {
        "torch": lambda: plain_path(weight, h, pattern, LEVELS),
        "ours": lambda: admm_path(weight, h, pattern, LEVELS, threads=threads),
        "apart": lambda: [admm_prune(weight, h, pattern, level, threads=threads) for level in LEVELS],
    }
    keeps = {name: call() for name, call in calls.items()}
    errors = {}
    for name, supports in keeps.items():
        for keep, level in zip(supports, LEVELS, strict=True):
            if keep.sum() != kept_in(pattern, rows, n_in, level):
                raise harness.WrongOutput(f"{case}: {name} keeps {int(keep.sum())} weights at {level}")
        lost = [masked_lstsq(weight @ h, h, keep) - weight for keep in supports]
        errors[name] = torch.stack([((v @ h) * v).sum() for v in lost])
    timings = interleave(calls, rounds, warmup=0, settle=5e-3 if threads > 1 else 0.0)
    ratio = timings.ratio("torch", "ours")
    objective = float((errors["ours"] / errors["torch"]).log().mean().exp())
    return [{
        "case": case, "threads": threads, "isa": _dispatch.isa(), "ours_ms": timings.median("ours") * 1e3,
        "reference_ms": timings.median("torch") * 1e3, "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
        "same_result": abs(objective - 1) <= SAME, "objective": objective,
        "apart_ms": timings.median("apart") * 1e3, "apart": float((errors["ours"] / errors["apart"]).max()),
    }]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser)
    args = parser.parse_args()
    tables = [partial(measure, case) for case in (QUICK_CASES if args.quick else CASES)]
    if not args.quick:
        tables += [partial(measure_climb, *climb) for climb in CLIMBS]
    with torch_threads(args.threads):
        rows, complete = harness.measured(partial(table, threads=args.threads, rounds=3) for table in tables)
    title = f"admm_prune against torch, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
