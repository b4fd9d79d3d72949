"""obs_sweep's Triton kernel against the sweep as a loop of torch calls, on one GPU.

python -m bench.bench_obs_prune_cuda [--json] [--markdown FILE] [--reference DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from bench import harness
from bench.bench_obs_prune import Case, Published
from sparsebert import patterns
from sparsebert.engine.measure import interleave
from sparsebert.ops.obs_prune import _inverse_factor
from sparsebert.patterns import NofM, Pattern, zeros_in

COLUMNS = {
    "case": "", "device": "", "ours_ms": ".3f", "reference_ms": ".3f", "ratio": ".1f", "ours_graph_ms": ".3f",
    "reference_graph_ms": ".3f", "graph_ratio": ".1f", "published_ms": ".1f", "gflops": ".0f", "same_result": "",
}  # fmt: skip
NOTES = (
    "Both sides are given the factor U. `ours_ms` and `reference_ms`: called from Python, until the device is idle; "
    "`…_graph_ms`: the same calls captured once and replayed as a CUDA graph, so without the host's launches. "
    "`published_ms`: IST-DASLab/sparsegpt's fasterprune, also given its factor, called from Python; `--reference DIR` "
    "is the folder of its checkout. `gflops` counts rows x n_in² flops over `ours_graph_ms`. `same_result`: the number "
    "of zeros is the requested one, and the weights equal the result of the float64 sweep with that mask. Triton "
    "{triton}."
)
CUDA_PATTERNS = (("unstructured", 0.875), ("2:4", 0.5), ("32:64", 0.5))
CUDA_SHAPES = ((768, 768), (3072, 768), (768, 3072))  # rows, n_in


def eager_sweep(weight: torch.Tensor, u: torch.Tensor, pattern: Pattern, sparsity: float, block: int) -> torch.Tensor:
    """The sweep in torch calls, unstructured or N:M: about six launches per column, one matmul per block."""
    w, diagonal = weight.clone(), u.diagonal()
    rows, n_in = w.shape
    if isinstance(pattern, NofM):
        block = -(-block // pattern.m) * pattern.m
    for start in range(0, n_in, block):
        stop = min(start + block, n_in)
        part, corner = w[:, start:stop].clone(), u[start:stop, start:stop]
        errors, gone = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
        if not isinstance(pattern, NofM):
            count = zeros_in(rows * stop, sparsity) - zeros_in(rows * start, sparsity)
            lowest = ((part / diagonal[start:stop]) ** 2).flatten().topk(count, largest=False, sorted=False).indices
            gone.view(-1).index_fill_(0, lowest, True)
        for j in range(stop - start):
            if isinstance(pattern, NofM) and j % pattern.m == 0:
                scores = (part[:, j : j + pattern.m] / diagonal[start + j : start + j + pattern.m]) ** 2
                lowest = scores.topk(pattern.m - pattern.n, largest=False, sorted=False).indices
                gone[:, j : j + pattern.m].scatter_(1, lowest, True)
            error = torch.where(gone[:, j], part[:, j] / corner[j, j], 0.0)
            part[:, j:].addr_(error, corner[j, j:], alpha=-1)
            errors[:, j] = error
        w[:, start:stop] = part.masked_fill_(gone, 0.0)
        w[:, stop:].addmm_(errors, u[start:stop, stop:], alpha=-1)
    return w


def sweeps_its_own_mask(weight: torch.Tensor, u: torch.Tensor, got: torch.Tensor, zeros: int) -> bool:
    """Whether `got` has `zeros` zeros and equals, within 1e-3, the result of the float64 sweep with that mask."""
    w, u, gone = weight.double().clone(), u.double(), got == 0
    for j in range(w.shape[1]):
        w[:, j:] -= torch.outer(torch.where(gone[:, j], w[:, j] / u[j, j], 0.0), u[j, j:])
    return int(gone.sum()) == zeros and bool((got - w.masked_fill_(gone, 0.0)).abs().max() <= 1e-3)


def synchronized(call: Callable[[], object]) -> Callable[[], None]:
    def timed() -> None:
        call()
        torch.cuda.synchronize()

    return timed


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `call` launches, as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # the first call compiles and allocates, which is not captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Replays `call` as a CUDA graph, and waits."""
    return synchronized(graph_of(call).replay)


def cuda_rows(rival: Published | None, rounds: int = 15, block: int = 128) -> list[harness.Row]:
    """One row per case and dtype. The factor U is given, as both sides would compute it in the same way."""
    from sparsebert.kernels.obs_prune import obs_sweep

    rows_out: list[harness.Row] = []
    for rows, n_in in CUDA_SHAPES:
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(4 * n_in, n_in, generator=generator, device="cuda", dtype=torch.float64)
        h = x.T @ x / len(x) + 0.01 * torch.eye(n_in, device="cuda", dtype=torch.float64)
        u64 = _inverse_factor(h)
        weight64 = torch.randn(rows, n_in, generator=generator, device="cuda", dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            weight, u = weight64.to(dtype), u64.to(dtype)
            for name, sparsity in CUDA_PATTERNS:
                pattern = patterns.parse(name)
                zeros = rows * n_in - patterns.kept_in(pattern, rows, n_in, sparsity)
                arguments = (weight, u, pattern, sparsity, block)
                same = sweeps_its_own_mask(weight, u, obs_sweep(*arguments), zeros)
                sweeps = {"ours": partial(obs_sweep, *arguments), "reference": partial(eager_sweep, *arguments)}
                called = interleave({side: synchronized(sweep) for side, sweep in sweeps.items()}, rounds, warmup=3)
                graphs = interleave({side: captured(sweep) for side, sweep in sweeps.items()}, rounds, warmup=3)
                published = None
                if rival and dtype == torch.float32:
                    case = Case("obs_sweep", rows, n_in, pattern, sparsity)
                    loop = synchronized(partial(rival.sweep, weight, h.float(), u, case))
                    published = interleave({"loop": loop}, rounds=3, warmup=1).median("loop") * 1e3
                rows_out.append({
                    "case": f"sweep {name} {rows}x{n_in} {str(dtype).removeprefix('torch.')}",
                    "device": torch.cuda.get_device_name(),
                    "ours_ms": called.median("ours") * 1e3, "reference_ms": called.median("reference") * 1e3,
                    "ratio": called.ratio("reference", "ours").value,
                    "ours_graph_ms": graphs.median("ours") * 1e3,
                    "reference_graph_ms": graphs.median("reference") * 1e3,
                    "graph_ratio": graphs.ratio("reference", "ours").value, "published_ms": published,
                    "gflops": rows * n_in**2 / graphs.median("ours") * 1e-9, "same_result": same,
                })  # fmt: skip
    return rows_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--reference", type=Path, help="folder with checkouts of IST-DASLab's OBC and sparsegpt")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here: nothing was timed", file=sys.stderr)
        return 2
    rows = cuda_rows(Published(args.reference) if args.reference else None)
    harness.report(
        "obs_sweep on a GPU", rows, COLUMNS, NOTES.format(triton=version("triton")), args.markdown, json_only=args.json
    )
    return 0 if all(row["same_result"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
