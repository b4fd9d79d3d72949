"""The quality of the pruning methods: every cell is one dense model, one draw of calibration texts and one setting.

python -m bench.study_pruning main|patterns|ladder [--dense DIR …] [--task sst2] [--cells FILE] [--markdown FILE]

`main` compares the methods at 87.5 %, `patterns` at other sparsities and patterns. `ladder` adds the steps of
`knowledge` one by one, leaves each one out, and distills the baselines as well. A finished cell is a line of the cells
file, and a row of the ledger beside it, and is never computed again. The same command resumes; a cell resumes after its
last finished layer. The table covers every cell in the file, also of dense models that are no longer at hand; that of
`ladder` covers only the dense models and draws that all its rows have. Cells are paired: a ratio is taken within a
dense model and draw, and the mean of ratios is geometric. Several processes may share a cells file if they differ in
dense models or draws.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from bench import harness
from sparsebert import checkpoint, data, encoders, heads
from sparsebert.config import PruneConfig
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import InputError
from sparsebert.jobs import Job, Ledger, code_of
from sparsebert.pruning import draw, prune
from sparsebert.pruning.distillation import distill
from sparsebert.pruning.entry import int8_logits
from sparsebert.pruning.knowledge import STEPS, steps_of
from sparsebert.pruning.methods import LABEL_FREE
from sparsebert.pruning.quantize import quantize
from sparsebert.pruning.run import Run
from sparsebert.robustness.drift import OUTSIDE, drift, unlike
from sparsebert.robustness.evaluation import compare

BASE = "adaptive"
UNSTRUCTURED = "87.5 %"
KNOWLEDGE = {f"knowledge {tier}": {"method": "knowledge", "tier": tier} for tier in (0, 1, 2)}
MAIN = {name: {"method": name} for name in reversed(LABEL_FREE) if name != "knowledge"} | {
    "adaptive as published": {"method": "adaptive", "as_published": True},
    **KNOWLEDGE,
}
FEW = {name: MAIN[name] for name in ("sparsegpt", "adaptive", *KNOWLEDGE)}
SPACES = {
    "30 %": {"sparsity": 0.3},
    "50 %": {"sparsity": 0.5},
    "95 %": {"sparsity": 0.95},
    "2:4": {"pattern": "2:4"},
    "4x1": {"pattern": "4x1"},
    "8x1": {"pattern": "8x1"},
    "16x1": {"pattern": "16x1"},
    "32x1": {"pattern": "32x1"},
    "75 %": {"sparsity": 0.75},
    "32x1 50 %": {"pattern": "32x1", "sparsity": 0.5},
}
AFTER = {"distill", "perturb"}  # steps after the last layer


def _ladder() -> dict[str, dict]:
    """Name -> configuration: SparseGPT; then each step added; then tiers 1 and 2 with each step left out; the baselines
    also with the last two steps.
    """
    steps = ["refit", "target", "admm", "cls", "heads", "outputs", "allocation", "distill", "perturb"]
    rungs = {"sparsegpt": MAIN["sparsegpt"]}
    for i, step in enumerate(steps):
        tier = max(STEPS[s] for s in steps[: i + 1])
        missing = [s for s in steps[i + 1 :] if STEPS[s] <= tier]
        rungs[f"+ {step}"] = KNOWLEDGE[f"knowledge {tier}"] | ({"without": ",".join(missing)} if missing else {})
    rungs |= {BASE: MAIN[BASE]}
    rungs |= {f"{name} + distill": MAIN[name] | {"distilled": True} for name in ("sparsegpt", BASE)}
    for step in steps[:-2]:  # the rungs above show the effect of distillation
        for tier in (1, 2):
            without = KNOWLEDGE[f"knowledge {tier}"] | {"without": step}
            if without not in rungs.values():  # tier 1 without its last step is a rung above
                rungs[f"knowledge {tier} - {step}"] = without
    return rungs


def settings(which: str) -> Iterator[tuple[str, str, dict]]:
    """(space, name, configuration) of every row of a table."""
    if which == "main":
        yield from ((UNSTRUCTURED, name, config) for name, config in MAIN.items())
    elif which == "ladder":
        yield from ((UNSTRUCTURED, name, config) for name, config in _ladder().items())
    else:
        yield from ((UNSTRUCTURED, name, config) for name, config in FEW.items())
        for space, where in SPACES.items():
            yield from ((space, name, config | where) for name, config in FEW.items())
            if where.get("pattern", "").endswith("x1"):
                for tier, step in ((0, "cluster"), (1, "allocation")):
                    name = f"knowledge {tier}"
                    yield space, f"{name} - {step}", KNOWLEDGE[name] | where | {"without": step}


CODE = "sparsebert.pruning.methods"
VERSION = code_of(CODE)[:12]  # of the code that computes a cell
IDENTITY = ("task", "dense", "weights", "draw", "tokens", "config")  # if two cells agree in these, the later one counts


class Cells:
    """The finished cells in `path`, one JSON object per line, as its ledger exports them."""

    kind = "pruning cell"

    def __init__(self, path: Path):
        self.path, self.book = path, Ledger(path.with_suffix(".sqlite"))
        if path.exists():
            self._take_over()

    def of(self, **fields) -> list[dict]:
        """The cells with these fields."""
        found = {}
        for identity, figures in self.book.results(self.kind):
            found[json.dumps(identity, sort_keys=True)] = identity | figures
        return [c for c in found.values() if all(c[name] == value for name, value in fields.items())]

    def once(self, identity: dict, compute) -> dict:
        """The cell of that identity and this code. If there is none, computes it and stores it before returning it."""
        figures = self.book.once(self.kind, identity, lambda: {"code": VERSION, **compute()}, VERSION)
        self.book.export(self.path)
        return identity | figures

    def _take_over(self) -> None:
        try:
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise InputError(
                f"{self.path} must hold finished cells, one JSON object per line: {error}", fix="restore or delete it"
            ) from error
        if all("key" in line for line in lines):
            return self.book.take_over(self.path)
        for line in lines:  # from a version that wrote identity and figures side by side
            identity = {name: line.pop(name) for name in IDENTITY}
            self.book.once(self.kind, identity, lambda line=line: line, line["code"])


def cell(identity: dict, dense: Path, layers: Path) -> dict:
    """Prunes a dense model and compares it with the dense one on the reported split. identity["config"]: fields of
    PruneConfig, and `distilled`: whether to distill here, after another method, as `knowledge` does last. Finished
    layers are kept in `layers`, for the next setting that differs only in steps after the last layer. The pruned model
    is then rounded to int8 on the same texts, and compared once more.
    """
    spec = data.get_task(identity["task"])
    model, tokenizer = checkpoint.load(dense)
    examples = data.load(spec, spec.test)
    outside = unlike(examples)

    def logits_of(model) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        far = {name: encoders.predict(model, tokenizer, texts, max_length=None) for name, texts in outside.items()}
        return encoders.predict(model, tokenizer, examples, max_length=spec.max_length), far

    wanted, wanted_far = logits_of(model)
    fields = dict(identity["config"])
    distilled = fields.pop("distilled", False)
    config = PruneConfig(seed=identity["draw"], calibration_tokens=identity["tokens"], **fields)
    texts = draw(model, tokenizer, data.training(spec), config.calibration_tokens, spec.max_length, config.seed)
    teacher = copy.deepcopy(model) if distilled else None
    job = Job("layers", _of_layers(identity, config), CODE, layers, overwrite=True)
    with job:  # the layers that it keeps stay for the next setting
        result = prune(model, texts, config, run=Run(job=job))
    if teacher is not None:
        distill(model, teacher, texts, perturb=True, seed=config.seed)
    logits, far = logits_of(model)
    dense_accuracy = float((wanted.argmax(1) == examples.labels).mean())
    compared = ("accuracy", "kl_to_dense", "agreement", "difference")
    int8 = asdict(compare(spec, examples, int8_of(model, tokenizer, texts.batches, examples, spec), wanted))
    found = asdict(compare(spec, examples, logits, wanted))
    problem = heads.PROBLEMS[spec.problem]
    return {name: found[name] for name in ("split", "n", *compared)} | {
        "int8": {name: int8[name] for name in compared},
        "dense_accuracy": dense_accuracy,
        "sparsity": result.sparsity,
        "outside": {name: drift(problem, wanted_far[name], logits) for name, logits in far.items()},
    }


def int8_of(model, tokenizer, batches, examples: data.Examples, spec: data.Task) -> np.ndarray:
    """The logits of the examples, by the engine in int8. Rounds the model."""
    scales = quantize(model, batches)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "int8"
        checkpoint.save(
            model, tokenizer, directory, recipe={"command": "study"}, figures={}, scales=scales, int8_logits=int8_logits
        )
        classifier = Classifier.load(directory)
        assert classifier.dtype == "int8"
        return classifier.predict(examples, max_length=spec.max_length, progress=encoders.no_progress)


def _of_layers(identity: dict, config: PruneConfig) -> dict:
    """Inputs of the job of the layers; the same for settings whose pruned layers are the same."""
    fields = config.model_dump()
    if config.method == "knowledge":
        fields |= {"tier": None, "without": None, "steps": sorted(steps_of(config) - AFTER)}
    return identity | {"config": fields}


def shared(cells: dict[tuple[str, str], list[dict]]) -> dict[tuple[str, str], list[dict]]:
    """The cells of dense models and draws that all rows have, as rungs are compared with each other, not only with the
    base.
    """
    both = set.intersection(*({(c["weights"], c["draw"]) for c in found} for found in cells.values()))
    return {row: [c for c in found if (c["weights"], c["draw"]) in both] for row, found in cells.items()}


def summary(cells: dict[tuple[str, str], list[dict]]) -> list[harness.Row]:
    """One row per (space, name): means over its cells, and the ratio of KL to the base method's in the same cells."""
    rows = []
    for (space, name), found in cells.items():
        bases = {(c["weights"], c["draw"]): c for c in cells.get((space, BASE), [])}
        pairs = [(c, bases[c["weights"], c["draw"]]) for c in found if (c["weights"], c["draw"]) in bases]
        row: harness.Row = {
            "space": space,
            "method": name,
            "cells": len(found),
            "sparsity": float(np.mean([c["sparsity"] for c in found])),
            "accuracy": 100 * float(np.mean([c["accuracy"] for c in found])),
            "change": 100 * float(np.mean([c["difference"] for c in found])),
            "agreement": 100 * float(np.mean([c["agreement"] for c in found])),
            "kl": float(np.mean([c["kl_to_dense"] for c in found])),
        }
        unstructured = {(c["weights"], c["draw"]): c for c in cells.get((UNSTRUCTURED, name), [])}
        if ratios := [
            np.log(c["kl_to_dense"] / unstructured[key]["kl_to_dense"])
            for c in found
            if space.endswith("x1") and (key := (c["weights"], c["draw"])) in unstructured
        ]:
            row["over"] = float(np.exp(np.mean(ratios)))
        if rounded := [c for c in found if "int8" in c]:
            for column, figure, unit in (("int8 kl", "kl_to_dense", 1), ("int8 change", "accuracy", 100)):
                row[column] = unit * float(np.mean([c["int8"][figure] - c[figure] for c in rounded]))
        if far := [c["outside"] for c in found if "outside" in c]:
            row |= {f"kl {texts}": float(np.mean([each[texts]["kl"] for each in far])) for texts in OUTSIDE}
        if pairs:
            # Draws of one dense model are not independent, so the interval is over dense models.
            logs: dict[str, list[float]] = {}
            for c, b in pairs:
                logs.setdefault(c["weights"], []).append(np.log(c["kl_to_dense"] / b["kl_to_dense"]))
            means = np.array([np.mean(values) for values in logs.values()])
            row["ratio"] = float(np.exp(means.mean()))
            if len(means) > 2 and name != BASE:
                half = float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
                row["low"], row["high"] = float(np.exp(means.mean() - half)), float(np.exp(means.mean() + half))
        rows.append(row)
    return rows


COLUMNS = {
    "space": "", "method": "", "cells": "d", "sparsity": ".4f", "accuracy": ".2f", "change": "+.2f",
    "agreement": ".2f", "kl": ".4f", "ratio": ".3f", "low": ".3f", "high": ".3f", "over": ".2f", "int8 kl": "+.4f",
    "int8 change": "+.2f",
    **{f"kl {texts}": ".4f" for texts in OUTSIDE},
}  # fmt: skip
NOTES = (
    "`accuracy`, its `change` from the same dense model, and `agreement` with it in percent; `kl` is the mean KL(dense "
    "‖ pruned) in nats; all are means over cells (a dense model and a draw of calibration texts). `ratio` is the "
    f"geometric mean over draws, then over dense models, of `kl` over the `kl` of `{BASE}` in the same cell, `low` and "
    "`high` its 95 % interval (t, over dense models, if there are at least three). `over`, for groups that share their "
    "zeros, is the geometric mean of `kl` over that of unstructured zeros at 87.5 % in the same cell. `int8 kl` and "
    "`int8 change` are what rounding to int8 adds to `kl` and, in points, to `accuracy`. The columns on the right are "
    "`kl` on texts unlike the task's (sparsebert.robustness.drift): its test texts joined to at least 150 words, and "
    "sentences of a dictionary; empty if no cell measured it. The machine is the one that made the table."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["main", "patterns", "ladder"])
    parser.add_argument("--dense", type=Path, nargs="*", default=[], help="dense model directories, one per seed")
    parser.add_argument("--cells", type=Path, default=Path("bench/results/pruning_cells.jsonl"), help="file of cells")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1], help="draws of calibration texts (default 0 1)")
    parser.add_argument("--only", nargs="+", default=[], help="names of methods or rungs (default: all)")
    parser.add_argument("--spaces", nargs="+", default=[], help="sparsities and patterns of `patterns` (default: all)")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--tokens", type=int, default=150_000, help="calibration tokens")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    cells = Cells(args.cells)
    rows = list(settings(args.which))
    for dense in args.dense:
        weights = checkpoint.weights_sha256(dense)[:12]
        for seed in args.draws:
            layers = args.cells.with_name(f"{args.cells.stem}.{weights}-{seed}")
            for space, name, fields in rows:
                if (args.only and name not in args.only) or (args.spaces and space not in args.spaces):
                    continue
                identity = {
                    "task": args.task, "dense": dense.name, "weights": weights, "draw": seed, "tokens": args.tokens,
                    "config": fields,
                }  # fmt: skip
                found = cells.once(identity, partial(cell, identity, dense, layers))
                print(f"{dense.name} {seed} {space} {name}: kl {found['kl_to_dense']:.4f}", file=sys.stderr, flush=True)
            shutil.rmtree(layers.with_name(f"{layers.name}.partial"), ignore_errors=True)
    chosen = {
        (space, name): found
        for space, name, fields in rows
        if (found := cells.of(task=args.task, tokens=args.tokens, config=fields))
    }
    if args.which == "ladder" and chosen:
        chosen = shared(chosen)
    every = [c for found in chosen.values() for c in found]
    dense = sorted({(c["dense"], c["weights"], c["dense_accuracy"]) for c in every})
    code = Counter(c["code"] for c in every)
    notes = f"{NOTES} Dense models: " + ", ".join(f"{d} ({w}) {100 * a:.2f} %" for d, w, a in dense)
    notes += ". Code of the cells: " + ", ".join(f"{version} ({n})" for version, n in code.items()) + "."
    harness.report(f"Pruning {args.task}: {args.which}", summary(chosen), COLUMNS, notes, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
