"""What a really pruned classifier costs and keeps: latency of `Engine.logits` against KL to dense and accuracy.

python -m bench.study_frontier DENSE MODEL… [--task sst2] [--threads N] [--plot FILE] [--json] [--markdown FILE]
python -m bench.study_frontier DENSE --prune FOLDER …

DENSE and MODELs are model directories, pruned by `sparsebert prune` from DENSE; `--prune` makes those of the committed
table, FOLDER/PATTERN-SPARSITY, where they are not finished. Texts go in and logits come out, so
tokenizing is inside all timings, of ours and of torch's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench import harness
from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig
from sparsebert.engine import Engine
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune_checkpoint
from sparsebert.robustness.evaluation import compare

COLUMNS = {
    "model": "", "zeros": ".4f", "accuracy": ".2f", "low": ".2f", "high": ".2f", "change": "+.2f", "kl": ".4f",
    "ms_1": ".3f", "faster_1": ".2f", "ms_32": ".3f", "faster_32": ".2f", "torch_1": ".2f", "torch_32": ".2f",
    "kernels": "",
}  # fmt: skip
NOTES = (
    "{task}, its {n} reported sentences, through `Engine.logits`. `accuracy` in percent with its 95 % interval, "
    "`change` in points from dense, `kl` the mean KL(dense ‖ pruned) in nats. `ms_1` and `ms_32` are milliseconds a "
    "sentence, one and 32 a call, medians of {rounds} rounds over {timed} sentences; `faster` is the median over "
    "rounds of our dense engine's time over this one's, `torch` of dense float32 torch's on the same texts; {threads} "
    "threads, {dtype}. "
    "`kernels`: what the {linears} linears run as. One dense model, one draw of calibration texts."
)
FRONTIER = [("unstructured", 0.75), ("unstructured", 0.875), ("unstructured", 0.95)]
FRONTIER += [(pattern, sparsity) for pattern in ("16x1", "32x1") for sparsity in (0.75, 0.875)]
TIMED = 64
CALLS = (1, 32)  # sentences
COLOURS = {"dense": "black", "unstructured": "tab:blue", "16x1": "tab:orange", "32x1": "tab:green", "2:4": "tab:red"}


def pruned(dense: Path, task: str, folder: Path) -> list[Path]:
    """The directories of FRONTIER in `folder`, pruned where they are not finished."""
    directories = []
    for pattern, sparsity in FRONTIER:
        directories.append(folder / f"{pattern}-{sparsity:g}")
        prune_checkpoint(dense, task, directories[-1], PruneConfig(pattern=pattern, sparsity=sparsity))
    return directories


def torch_call(directory: Path, texts: list[str], size: int) -> Callable[[], None]:
    """Stock dense torch on the texts, so many at a time."""
    import torch

    model, tokenizer = checkpoint.load(directory)

    def call() -> None:
        with torch.inference_mode():
            for i in range(0, len(texts), size):
                model(**tokenizer(texts[i : i + size], return_tensors="pt", padding=True, truncation=True))

    return call


def engine_call(engine: Engine, texts: list[str], size: int) -> None:
    for i in range(0, len(texts), size):
        engine.logits(texts[i : i + size], truncate=True)


def measure(directories: list[Path], args: argparse.Namespace) -> tuple[list[harness.Row], dict]:
    """One row a model, the dense one first."""
    spec = data.get_task(args.task)
    examples = data.load(spec, spec.test)
    engines = {d.name: Engine.load(d, threads=args.threads, batch_invariant=True) for d in directories}
    dense = directories[0].name
    logits = {name: engine.logits(examples.texts, truncate=True) for name, engine in engines.items()}
    timed = [examples.texts[i] for i in np.random.default_rng(0).permutation(len(examples))[:TIMED]]
    rows = []
    timings = {}
    with torch_threads(args.threads):
        for size in CALLS:
            calls = {name: partial(engine_call, engine, timed, size) for name, engine in engines.items()}
            calls["torch"] = torch_call(directories[0], timed, size)
            timings[size] = interleave(calls, args.rounds, settle=5e-3)
    for name, engine in engines.items():
        found = compare(spec, examples, logits[name], logits[dense])
        row = {
            "model": name, "zeros": 1 - engine.density, "accuracy": 100 * found.accuracy,
            "low": 100 * found.accuracy_ci[0], "high": 100 * found.accuracy_ci[1],
            "change": 100 * found.difference, "kl": found.kl_to_dense,
            "pattern": engine.config["sparsebert"].get("pattern") or "dense",
        }  # fmt: skip
        for size, of_size in timings.items():
            row[f"ms_{size}"] = 1e3 * of_size.median(name) / TIMED
            row[f"faster_{size}"] = of_size.ratio(dense, name).value
            row[f"torch_{size}"] = of_size.ratio("torch", name).value
        forms = Counter(layer["form"] for layer in engine.explain())
        row["kernels"] = ", ".join(f"{count} {form}" for form, count in forms.most_common())
        rows.append(row)
    facts = {
        "task": args.task, "n": len(examples), "rounds": args.rounds, "timed": TIMED, "threads": args.threads,
        "dtype": engines[dense].dtype, "linears": len(engines[dense].encoder.linears),
    }  # fmt: skip
    return rows, facts


def plot(rows: list[harness.Row], facts: dict, path: Path) -> None:
    """Latency against KL and against accuracy, a line a pattern."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        part = sorted((row for row in rows if row["pattern"] == pattern), key=lambda row: row["ms_1"])
        x, style = [row["ms_1"] for row in part], {"color": COLOURS.get(pattern), "marker": "o", "label": pattern}
        error = np.array([[row["accuracy"] - row["low"], row["high"] - row["accuracy"]] for row in part]).T
        axes[1].errorbar(x, [row["accuracy"] for row in part], yerr=error, elinewidth=0.6, **style)
        if pattern != "dense":
            axes[0].plot(x, [row["kl"] for row in part], **style)
            for row in part:
                axes[0].annotate(f"{row['zeros']:.1%}", (row["ms_1"], row["kl"]), fontsize=7, xytext=(3, 3),
                                 textcoords="offset points")  # fmt: skip
    axes[0].set(yscale="log", ylabel="KL(dense ‖ pruned), nats")
    axes[1].set(ylabel="accuracy, %, with its 95 % interval")
    dense = rows[0]
    axes[1].set_title(f"dense torch: {dense['ms_1'] * dense['torch_1']:.1f} ms", fontsize=8, loc="right")
    for axis in axes:
        axis.set_xlabel(f"ms a sentence, one a call, {facts['threads']} threads, {facts['dtype']}")
        axis.margins(x=0.12)  # room for what is written beside the last point
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--prune", type=Path, metavar="FOLDER", help="make the models there, in place of naming them")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--threads", type=int, default=_dispatch.threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", type=Path, help="also draw it to this file (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if bool(args.models) == (args.prune is not None):
        parser.error("name models, or --prune FOLDER to make them in")
    args.models = args.models or pruned(args.dense, args.task, args.prune)
    rows, facts = measure([args.dense, *args.models], args)
    title = f"Latency against quality of pruned MiniLM, {args.task}"
    harness.report(title, rows, COLUMNS, NOTES.format(**facts), args.markdown, json_only=args.json)
    if args.plot is not None:
        plot(rows, facts, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
