"""Latency of `Engine.logits` against KL to dense and accuracy, for classifiers that were really pruned.

python -m bench.study_frontier DENSE MODEL… [--task sst2] [--threads N] [--plot FILE] [--json] [--markdown FILE]
python -m bench.study_frontier DENSE --prune FOLDER …
python -m bench.study_frontier --redraw TABLE --plot FILE

DENSE and MODELs are model directories; `sparsebert prune` made the MODELs from DENSE. `--prune` makes the models of the
committed table, FOLDER/PATTERN-SPARSITY and -int8, if they are not finished. `--redraw` draws a table that is there
already. Timings run from texts to logits, so they include tokenizing, for our engine and for its rivals, which run
DENSE.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench import harness
from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig
from sparsebert.engine import Engine
from sparsebert.engine.measure import Timings, interleave, ratio_text
from sparsebert.engine.rivals import RIVALS, Call, Work, named, torch_threads
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune_checkpoint, quantize_checkpoint
from sparsebert.robustness.evaluation import compare

COLUMNS = {
    "model": "", "zeros": ".4f", "accuracy": ".2f", "low": ".2f", "high": ".2f", "change": "+.2f", "kl": ".4f",
    "ms_1": ".3f", "faster_1": ".2f", "ms_32": ".3f", "faster_32": ".2f", "torch_1": ".2f", "torch_32": ".2f",
    "int8_1": ".2f", "int8_32": ".2f", "kernels": "",
}  # fmt: skip
NOTES = (
    "{task}, its {n} reported sentences, through `Engine.logits`. `accuracy` in percent with its 95 % interval, "
    "`change` in points from dense, `kl` the mean KL(dense ‖ pruned) in nats. `ms_1` and `ms_32` are milliseconds per "
    "sentence in calls with one and with 32 sentences, medians of {rounds} rounds over {timed} sentences; `faster` is "
    "the median over rounds of our dense engine's time over this one's, `torch` the same for dense float32 torch on "
    "the same texts, `int8` for dense {int8} where it was measured; {threads} threads. Models whose names end in "
    "int8 run in int8, the others in fp32. Rivals run the dense model; in int8 they are calibrated on {calibration} "
    "training texts. `kernels`: the forms of the {linears} linears. One dense model, one draw of calibration texts. "
    "{fastest}"
)
# (pattern, sparsity, tier, whether it is also rounded to int8)
FRONTIER = [("unstructured", 0.875, 1, False), ("32x1", 0.75, 2, True)]
FRONTIER += [(pattern, 0.875, tier, True) for pattern in ("4x1", "8x1", "32x1") for tier in (1, 2)]
TIMED = 64
CALLS = (1, 32)  # sentences
CALIBRATION = 300  # training texts for rivals in int8, the default of NNCF
INT8 = "openvino-int8"
POINTS = 1.0  # that a model may lose and still count as accurate as the dense one
RIVAL = "rival"
MARKERS = {0.75: "o", 0.875: "^", 0.95: "*"}  # of sparsities
COLOURS = {
    "dense": "black", "unstructured": "tab:blue", "4x1": "tab:orange", "8x1": "tab:red", "16x1": "tab:olive",
    "32x1": "tab:green",
}  # fmt: skip


def names_of(pattern: str, sparsity: float, tier: int, int8: bool) -> list[str]:
    """The directories that an entry of FRONTIER makes."""
    name = f"{pattern}-{sparsity:g}" + (f"-tier{tier}" if tier > 1 else "")
    return [name, f"{name}-int8"] if int8 else [name]


def pruned(dense: Path, task: str, folder: Path) -> list[Path]:
    """The directories of FRONTIER in `folder`, and the dense model in int8. Makes those that are not finished."""
    directories = []
    for pattern, sparsity, tier, int8 in FRONTIER:
        made = [folder / name for name in names_of(pattern, sparsity, tier, int8)]
        prune_checkpoint(dense, task, made[0], PruneConfig(pattern=pattern, sparsity=sparsity, tier=tier))
        if int8:
            quantize_checkpoint(made[0], task, made[1])
        directories += made
        print(", ".join(path.name for path in made), file=sys.stderr, flush=True)
    quantize_checkpoint(dense, task, folder / "dense-int8")
    return [*directories, folder / "dense-int8"]


def rival_call(logits: Call, first: int, texts: list[str], size: int, tokenizer) -> Callable[[], None]:
    """A rival on the texts, `size` at a time, which are its batches from `first` on."""

    def call() -> None:
        for i in range(0, len(texts), size):
            tokenizer(texts[i : i + size], padding=True, truncation=True)
            logits(first + i // size)

    return call


def engine_call(engine: Engine, texts: list[str], size: int) -> None:
    for i in range(0, len(texts), size):
        engine.logits(texts[i : i + size], truncate=True)


def measure(directories: list[Path], args: argparse.Namespace) -> tuple[list[harness.Row], dict]:
    """(one row per model, the dense one first; the facts that NOTES names)."""
    spec = data.get_task(args.task)
    examples = data.load(spec, spec.test)
    engines = {d.name: Engine.load(d, threads=args.threads, batch_invariant=True) for d in directories}
    dense = directories[0].name
    model, tokenizer = checkpoint.load(directories[0])
    logits = {name: engine.logits(examples.texts, truncate=True) for name, engine in engines.items()}
    timed = [examples.texts[i] for i in np.random.default_rng(0).permutation(len(examples))[:TIMED]]

    def padded(texts: list[str], size: int) -> list[dict]:
        return [
            dict(tokenizer(texts[i : i + size], return_tensors="pt", padding=True, truncation=True))
            for i in range(0, len(texts), size)
        ]

    timings = {}
    with torch_threads(args.threads), tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        batches = {size: padded(timed, size) for size in CALLS} | {0: padded(list(examples.texts), CALLS[-1])}
        first = dict(zip(batches, np.cumsum([0, *map(len, batches.values())]), strict=False))
        work = Work(
            model, [batch for part in batches.values() for batch in part], args.threads, Path(folder), None, stack,
            calibrate_on=padded(list(data.load(spec, spec.train).sample(CALIBRATION, 0).texts), 1),
        )  # fmt: skip
        rivals = {name: RIVALS[name].prepare(work) for name in named(args.rivals)}
        for size in CALLS:
            calls = {name: partial(engine_call, engine, timed, size) for name, engine in engines.items()}
            calls |= {name: rival_call(call, first[size], timed, size, tokenizer) for name, call in rivals.items()}
            timings[size] = interleave(calls, args.rounds, settle=5e-3)
        whole = range(first[0], len(work.padded))
        logits |= {name: np.concatenate([call(i) for i in whole]) for name, call in rivals.items()}
    rows = []
    for name, of_name in logits.items():
        found = compare(spec, examples, of_name, logits[dense])
        row = {
            "model": name, "zeros": 0.0, "accuracy": 100 * found.accuracy, "low": 100 * found.accuracy_ci[0],
            "high": 100 * found.accuracy_ci[1], "change": 100 * found.difference, "kl": found.kl_to_dense,
            "pattern": RIVAL,
        }  # fmt: skip
        if name in engines:
            forms = Counter(layer["form"] for layer in engines[name].explain())
            row |= {
                "zeros": 1 - engines[name].density, "pattern": pattern_of(name, dense),
                "kernels": ", ".join(f"{count} {form}" for form, count in forms.most_common()),
            }  # fmt: skip
        for size, of_size in timings.items():
            row[f"ms_{size}"] = 1e3 * of_size.median(name) / TIMED
            for column, other in (("faster", dense), ("torch", "torch"), ("int8", INT8)):
                if other in calls:
                    row[f"{column}_{size}"] = of_size.ratio(other, name).value
        rows.append(row)
    facts = {
        "task": args.task, "n": len(examples), "rounds": args.rounds, "timed": TIMED, "threads": args.threads,
        "linears": len(engines[dense].encoder.linears), "int8": INT8, "calibration": CALIBRATION,
        "fastest": fastest(rows, timings),
    }  # fmt: skip
    return rows, facts


def pattern_of(name: str, dense: str) -> str:
    """Which line of the plot a directory belongs to: its pattern, tier if it is 2, and int8."""
    if name == dense:
        return "dense"
    part = name.removesuffix("-int8")
    plain = part.removesuffix("-tier2")
    pattern = plain.rpartition("-")[0] or "dense"
    return pattern + " tier 2" * (plain != part) + " int8" * (part != name)


def fastest(rows: list[harness.Row], timings: dict[int, Timings]) -> str:
    """A sentence on our fastest model that is as accurate as the dense one, against the dense model in int8."""
    near = [row for row in rows if row["pattern"] != RIVAL and row["change"] >= -POINTS]
    rival = next((row for row in rows if row["model"] == INT8), None)
    if rival is None:
        return ""
    told = []
    for size, of_size in timings.items():
        best = min(near, key=lambda row: row[f"ms_{size}"])["model"]
        ratio = of_size.ratio(INT8, best)
        told.append(f"{ratio_text(ratio.value, (ratio.low, ratio.high))} its speed with {size} a call ({best})")
    return (
        f"{INT8} changes accuracy by {rival['change']:+.2f} points. Of our models within {POINTS:g} point of dense, "
        f"the fastest runs at {' and '.join(told)}."
    )


def read_table(path: Path) -> list[harness.Row]:
    """The rows of a table that this module wrote, with what `plot` draws of them."""
    lines = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = []
    for cells in lines[1:]:
        row = dict(zip(lines[0], cells, strict=False))
        name = row["model"]
        pattern = RIVAL if name in RIVALS else pattern_of(name, rows[0]["model"] if rows else name)
        numbers = {key: float(row[key]) for key in COLUMNS if key in row and _is_number(row[key])}
        rows.append({"model": name, "pattern": pattern, **numbers})
    return rows


def _is_number(text: str) -> bool:
    return text.strip().lstrip("+-").replace(".", "", 1).isdigit()


def plot(rows: list[harness.Row], path: Path) -> None:
    """Latency against KL and against accuracy: a line per pattern, the dense model in our engine and in its rivals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    figure, (of_kl, of_accuracy) = pyplot.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for pattern in dict.fromkeys(row["pattern"] for row in rows if row["pattern"] != RIVAL):
        part = sorted((row for row in rows if row["pattern"] == pattern), key=lambda row: row["ms_1"])
        colour, filled = COLOURS.get(pattern.split()[0]), pattern.endswith("int8")
        style = {"color": colour, "markerfacecolor": colour if filled else "white"}
        error = np.array([[row["accuracy"] - row["low"], row["high"] - row["accuracy"]] for row in part]).T
        lines = {"color": colour, "linestyle": "--" if "tier 2" in pattern else "-", "linewidth": 1.0}
        x = [row["ms_1"] for row in part]
        of_accuracy.errorbar(x, [row["accuracy"] for row in part], yerr=error, elinewidth=0.4, **lines)
        if not pattern.startswith("dense"):
            of_kl.plot(x, [row["kl"] for row in part], **lines)
        for row in part:
            marker = min(MARKERS.items(), key=lambda each, row=row: abs(each[0] - row["zeros"]))[1]
            marker = "D" if pattern.startswith("dense") else marker
            of_accuracy.plot(row["ms_1"], row["accuracy"], marker=marker, **style)
            if not pattern.startswith("dense"):
                of_kl.plot(row["ms_1"], row["kl"], marker=marker, **style)
    of_kl.margins(y=0.1)
    of_kl.set(yscale="log", ylabel="KL(dense ‖ pruned), nats")
    of_accuracy.set(ylabel="accuracy in percent, with its 95 % interval")
    dense = [("dense, our engine", rows[0]["ms_1"])]
    dense += [(f"dense, {row['model']}", row["ms_1"]) for row in rows if row["pattern"] == RIVAL]
    dense += [("dense int8, our engine", row["ms_1"]) for row in rows if row["pattern"] == "dense int8"]
    dense.sort(key=lambda each: each[1])
    least, largest = min(row["ms_1"] for row in rows), dense[-1][1]
    low = True
    for i, (name, ms) in enumerate(dense):
        low = not low if i and ms < 1.15 * dense[i - 1][1] else True  # beside a near one, not over it
        of_kl.annotate(
            name, (ms, 0.02 if low else 0.98), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
            color="0.35", ha="right", va="bottom" if low else "top", xytext=(-2, 0), textcoords="offset points",
        )  # fmt: skip
    for axis in (of_kl, of_accuracy):
        for _, ms in dense:
            axis.axvline(ms, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="ms per sentence, one per call", xlim=(0.8 * least, 1.2 * largest))
        ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32) if tick < 1.3 * largest]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    known = {row["pattern"].split()[0] for row in rows if row["pattern"] != RIVAL}
    lines = [Line2D([], [], color=c, label=name) for name, c in COLOURS.items() if name in known]
    lines += [Line2D([], [], color="0.3", linestyle="--", label="tier 2")]
    zeros = [Line2D([], [], color="0.3", linestyle="", marker=m, label=f"{s:.1%} zeros") for s, m in MARKERS.items()]
    zeros += [
        Line2D(
            [],
            [],
            color="0.3",
            linestyle="",
            marker="s",
            markerfacecolor="0.3" if name == "int8" else "white",
            label=name,
        )
        for name in ("fp32", "int8")
    ]
    figure.legend(handles=[*lines, *zeros], fontsize=8, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path, nargs="?")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--prune", type=Path, metavar="FOLDER", help="make the models there, instead of naming them")
    parser.add_argument("--redraw", type=Path, metavar="TABLE", help="draw this table again, and measure nothing")
    parser.add_argument(
        "--rivals",
        default=f"torch,onnxruntime,onnxruntime-int8,openvino,{INT8}",
        help="torch, and others of `sparsebert bench`",
    )
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--threads", type=int, default=_dispatch.threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", type=Path, help="also draw the table to this file (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.redraw is not None:
        if args.plot is None:
            parser.error("--redraw needs --plot FILE")
        plot(read_table(args.redraw), args.plot)
        return 0
    if args.dense is None or bool(args.models) == (args.prune is not None):
        parser.error("name models, or --prune FOLDER to make them in")
    if "torch" not in named(args.rivals):
        parser.error("--rivals needs torch, which the others are compared with")
    if data.get_task(args.task).pair:
        parser.error(f"--task must have single texts, {args.task} has pairs")
    args.models = args.models or pruned(args.dense, args.task, args.prune)
    rows, facts = measure([args.dense, *args.models], args)
    title = f"Latency against quality of pruned MiniLM, {args.task}"
    harness.report(title, rows, COLUMNS, NOTES.format(**facts), args.markdown, json_only=args.json)
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
