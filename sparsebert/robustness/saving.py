"""Figures beside the model: sparsebert/eval.json, rows of attacks as parquet, and a model card with a model-index."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from sparsebert import checkpoint, jobs
from sparsebert.robustness.card import Card, card, divisor, table_of, verdict
from sparsebert.robustness.evaluation import Evaluation

FIGURES, CARD = "sparsebert/eval.json", "sparsebert/model-card.md"
OURS = "<!-- written by sparsebert eval --save, which replaces it -->"


def require_savable(model: str | Path) -> Path:
    """The directory of the model; OutputError if figures cannot be written there."""
    directory = checkpoint.resolve(model)
    jobs.require_writable(directory)
    jobs.require_place(directory / "sparsebert")
    return directory


def save(model: str | Path, result: Evaluation, timings: list[dict]) -> list[Path]:
    """Writes the figures of an evaluation into the model's directory: sparsebert/eval.json, per attack one
    sparsebert/attacks-NAME.parquet, and README.md, or sparsebert/model-card.md beside a README.md of the user's own.
    Those of an earlier evaluation are replaced. Returns the files, all of which are written before the first takes its
    place.
    """
    import pyarrow
    import pyarrow.parquet

    directory = require_savable(model)
    document = result.as_json()
    page = model_card(directory.name, document, card([document], timings))
    readme = directory / "README.md"
    own = readme.exists() and OURS not in readme.read_text(encoding="utf-8", errors="replace")
    rows = {directory / f"sparsebert/attacks-{name}.parquet": found for name, found in (result.attacked or {}).items()}
    texts = {
        directory / FIGURES: json.dumps(document, allow_nan=False) + "\n",
        directory / CARD if own else readme: page,
    }
    with ExitStack() as stack:
        for path, found in rows.items():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), stack.enter_context(jobs.writing(path)))
        for path, text in texts.items():
            stack.enter_context(jobs.writing(path)).write_text(text, encoding="utf-8")
    for old in sorted(directory.glob("sparsebert/attacks-*.parquet")):
        if old not in rows:
            old.unlink()
    return [*rows, *texts]


def model_card(name: str, document: dict, made: Card) -> str:
    """A model card in Markdown, with the metadata that the Hugging Face Hub reads: its model-index has the accuracy on
    the task, under each attack, on out-of-distribution tests and in other domains, as fractions.
    """
    import yaml

    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["sparsebert"],
        "model-index": [{"name": name, "results": _results(document)}],
    }
    columns, rows = table_of(made)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [columns, *rows]]
    table = ["| " + " | ".join(row) + " |" for row in lines]
    table.insert(1, "|---" * len(columns) + "|")
    variants = [f"{found['variant']}{_divided(found)}" for found in (document["attacks"] or {}).values()]
    facts = document["about"]["model"]
    said = [
        "---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", OURS, "", f"# {name}", "",
        f"{made.n:,} examples of {made.task}, {made.split}. In brackets 95 % intervals; behind a semicolon the "
        "difference from the dense model on the same examples, in points.", "", *table, "", verdict(made), "",
        *(f"* attack: {variant}" for variant in variants), f"* weights: sha256 {facts['weights_sha256']}",
        f"* seed {document['about']['seed']}; examples: sha256 {document['about']['data']}",
        "* " + ", ".join(f"{package} {version}" for package, version in document["about"]["versions"].items()),
        "", "All settings are in sparsebert/eval.json.", "",
    ]  # fmt: skip
    return "\n".join(said)


def _results(document: dict) -> list[dict]:
    """The results of a model-index, one per set of examples."""
    task, split = document["task"], document["split"]
    results = [_result(task, split, document["metric"], document["score"], document["score_ci"], document["n"])]
    if document["f1"] is not None:
        results[0]["metrics"].append({"type": "f1", "value": document["f1"], "name": "F1 of class 1"})
    for name, found in (document["attacks"] or {}).items():
        if found["aua"] is not None:
            under = f"accuracy under {name}"
            results.append(_result(task, split, "accuracy", found["aua"], found["aua_ci"], found["n"], under))
            args = {"attack": f"{found['variant']}{_divided(found)}"}
            results[-1]["dataset"] |= {"name": f"{task} under {name}", "args": args}
    for name, found in (document["ood"] or {}).items():
        results.append(_result(name, found["split"], "accuracy", found["accuracy"], found["accuracy_ci"], found["n"]))
    for name, found in (document["domains"] or {}).items():
        results.append(_result(name, found["split"], found["metric"], found["score"], found["score_ci"], found["n"]))
    return results


def _divided(attack: dict) -> str:
    by = divisor(attack)
    return "" if by == 1.0 else f"; logits divided by {by:.4f}, for the dense model's confidence"


def _result(set_: str, split: str, metric: str, value: float, interval, n: int, name: str | None = None) -> dict:
    known = {"micro_f1": "f1", "spearman": "spearmanr"}.get(metric, metric)  # as the Hub calls them
    return {
        "task": {"type": "text-classification", "name": "Text Classification"},
        "dataset": {"name": set_, "type": set_, "split": split},
        "metrics": [{
            "type": known, "value": value, "name": name or metric.replace("_", " "),
            "args": {"n": n, "interval_95": list(map(float, interval))},
        }],
    }  # fmt: skip
