"""Figures as rows of tables, in words and units."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsebert.config import BenchConfig

if TYPE_CHECKING:
    from pathlib import Path

    from sparsebert.pruning.plan import Plan


def _share(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _probability(value: float) -> str:
    return _number(value) if value >= 5e-5 else "below 0.0001"  # never shown as 0


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _mebibytes(value: float) -> str:
    return f"{value:,.0f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


Words = dict[str, tuple[str, Callable[[float], str]]]
_OF_SCORE: dict[str, Words] = {  # by metric: the main figure, the same of the dense model, and their difference
    "accuracy": {
        "score": ("accuracy", _share),
        "dense_score": ("accuracy of the dense model", _share),
        "difference": ("difference in points, paired", _points),
        "agreement": ("same label as the dense model", _share),
    },
    "micro_f1": {
        "score": ("micro F1", _share),
        "dense_score": ("micro F1 of the dense model", _share),
        "difference": ("difference in points, paired", _points),
        "agreement": ("all labels as the dense model", _share),
        "accuracy": ("all labels right", _share),
    },
    "spearman": {
        "score": ("rank correlation with the labels", _number),
        "dense_score": ("the same of the dense model", _number),
        "difference": ("difference, paired", _signed),
        "agreement": ("rank correlation with the dense model", _number),
    },
}
_WORDS: Words = {
    "mcnemar_p": ("McNemar's p", _probability),
    "mcnemar_p_holm": ("McNemar's p, adjusted for several sets (Holm)", _probability),
    "kl_to_dense": ("KL to the dense model in nats, 0 if equal", _number),
    "ece": ("calibration error (ECE)", _number),
    "dense_ece": ("calibration error of the dense model", _number),
    "f1_macro": ("F1, mean over classes", _share),
    "f1": ("F1 of class 1", _share),
    "f1_weighted": ("F1, weighted by class", _share),
    "predicted_positive": ("predicted to be class 1", _share),
    "entailment": ("entailment found", _share),
    "non_entailment": ("non-entailment found", _share),
    "auroc": ("AUROC of entailment", _number),
}


def tables_of_evaluation(
    figures: dict, task: str, model: Path, dense: Path | None
) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) for each set of an evaluation: the task, OOD tests, domains, unlabelled texts. figures:
    the fields of `Evaluation`.
    """
    columns = ["figure", "value", "95 % interval"]
    runs = "in int8 " if figures["dtype"] == "int8" else ""
    sets = {task: figures, **(figures["ood"] or {}), **(figures["domains"] or {})}
    tables = []
    for name, found in sets.items():
        less = f", less {found['left_out']:,} that {task} has too" if found.get("left_out") else ""
        title = f"{model} {runs}on {found['n']:,} examples of {name}, {found['split']}{less}"
        tables.append((title, columns, rows_of(found, dense) + ([] if name == task else _cut(found))))
    for name, found in (figures["attacks"] or {}).items():
        title = f"{model} {runs}under attack by {name}, {found['n']:,} examples of {task}"
        tables.append((title, columns, rows_of_attack(found, dense)))
    for name, found in (figures["outside"] or {}).items():
        title = f"{model} {runs}beside {dense} on {found['n']:,} texts of {name}, without labels"
        near = {**found, "metric": figures["metric"], "kl_to_dense": found["kl"]}
        tables.append((title, columns, rows_of(near, dense) + _cut(found)))
    return tables


def _cut(figures: dict) -> list[list[str]]:
    share = figures.get("cut")
    return [[f"texts cut at {figures['max_length']} tokens", _share(share), ""]] if share else []


def rows_of(figures: dict, dense: Path | None = None) -> list[list[str]]:
    """[figure, value, 95 % interval] of the figures of `Evaluation`, `compare_ood` or `drift` that are not None. dense:
    the model that they compare with, which a user may have pruned already.
    """
    metric = figures.get("metric", "accuracy")  # OOD tests have no other
    if metric == "accuracy" and "accuracy" in figures:
        figures = {**figures, "score": figures["accuracy"], "score_ci": figures["accuracy_ci"], "accuracy": None}
    if figures.get("mcnemar_p_holm") == figures.get("mcnemar_p"):
        figures = {**figures, "mcnemar_p_holm": None}  # there is one set
    rows = _rows(figures, _OF_SCORE[metric] | _WORDS)
    groups = {"summed probabilities": figures.get("summed") or {}}
    for name, found in figures.items():
        if name.startswith("by_"):
            groups |= found
    for group, found in groups.items():
        rows += [[f"{group}: {row[0]}", *row[1:]] for row in _rows(found, {"accuracy": ("accuracy", _share)} | _WORDS)]
    return _beside(rows, dense)


def _beside(rows: list[list[str]], dense: Path | None) -> list[list[str]]:
    """The rows with the name of the model that they compare with."""
    name = "the dense model" if dense is None else dense.name or str(dense)
    return [[row[0].replace("the dense model", name), *row[1:]] for row in rows]


def _rows(figures: dict, words: Words) -> list[list[str]]:
    return [
        [said, form(value), _interval(figures.get("kl_ci" if name == "kl_to_dense" else f"{name}_ci"), form)]
        for name, (said, form) in words.items()
        if (value := figures.get(name)) is not None
    ]


def _interval(limits, form: Callable[[float], str]) -> str:
    return "" if limits is None else f"[{form(limits[0])}, {form(limits[1])}]"


def rows_of_kept(kept: dict | None, other: str) -> list[list[str]]:
    """How near a model is to `other`, the one it was made from; no rows if that was not measured."""
    if kept is None:
        return []
    interval = kept["agreement_ci"]
    told = "" if interval is None else f" [{interval[0]:.1%}, {interval[1]:.1%}]"
    what = f"rank correlation with {other}" if interval is None else f"same label as {other}"
    value = f"{kept['agreement']:.4f}" if interval is None else f"{kept['agreement']:.1%}{told}"
    return [
        [f"{what}, {kept['n']:,} test texts", value],
        [f"KL to {other} in nats, 0 if equal", f"{kept['kl']:.4f}"],
    ]


_OF_ATTACK: Words = {
    "acc": ("accuracy before the attack", _share),
    "aua": ("accuracy under attack", _share),
    "dense_aua": ("accuracy of the dense model under attack", _share),
    "difference": ("difference in points, paired", _points),
    "asr": ("share of the attacked texts that fooled it", _share),
    "queries": ("queries per attacked text", lambda value: f"{value:.0f}"),
    "words_changed": ("share of the words changed, of those that fooled it", _share),
}


def rows_of_attack(figures: dict, dense: Path | None = None) -> list[list[str]]:
    """[what, how much, interval] of the figures of an attack. dense: as in `rows_of`."""
    rows = [["attack", figures["variant"], ""], ["texts", f"{figures['n']:,}", ""]]
    rows += _rows(figures, _OF_ATTACK | {name: _WORDS[name] for name in ("mcnemar_p", "mcnemar_p_holm")})
    others = {
        "from_dense": "this model, on what fooled the dense one",
        "to_dense": "the dense one, on what fooled this",
    }
    for name, said in others.items():
        if (found := figures.get(name)) is not None:
            told = f"accuracy of {said}, {found['n']:,} texts"
            rows.append([told, _share(found["accuracy"]), _interval(found["accuracy_ci"], _share)])
    if figures.get("temperature", 1.0) != 1.0:
        rows.append(["logits divided by", _number(figures["temperature"]), ""])
    for name, said in (("errors", "texts that ended in an error, left out"), ("capped", "searches ended by a limit")):
        if figures[name]:
            rows.append([said, f"{figures[name]:,}", ""])
    rows.append(["seconds of work, earlier runs too", f"{figures['seconds']:.0f}", ""])
    return _beside(rows, dense)


def tables_of_replay(document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of a stored attacked example, and of its second attack if it has one (stored.replay)."""
    inputs, result = document["inputs"], document["result"]
    names = ("outcome", "queries", "words_changed", "score", "capped", "error")
    rows = [[name, str(result[name])] for name in names if result[name] is not None]
    rows += [["finished", document["finished"]]]
    for name, value in inputs.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[f"{name} {part}".strip(), str(told)] for part, told in parts if told not in (None, "")]
    tables = [(f"attacked example {document['id']}", ["", ""], rows)]
    if "again" in document:
        steps = [
            [str(i), f"{step['from']} -> {step['to']}", *(
                "not asked" if step[name] is None else _number(step[name]) for name in ("before", "after")
            )] for i, step in enumerate(document["steps"], 1)
        ]  # fmt: skip
        said = "the same" if document["same"] else f"another, by {', '.join(document['differs'])}"
        if document["elsewhere"]:
            said += "; " + ", ".join(
                f"{name} was {then}, is {now}" for name, (then, now) in document["elsewhere"].items()
            )
        columns = ["step", "change", "score before", "score after"]
        tables.append((f"attacked again: the result is {said}", columns, steps))
    return tables


def rows_of_plan(plan: Plan, verbose: bool) -> list[list[str]]:
    """[what, how much] of a plan; verbose: its parts, too."""
    rows = [["zeros", f"{plan.zeros:,} of {plan.weights:,} weights ({plan.zeros / plan.weights:.2%})"]]
    if plan.optimizer_steps:
        rows += [["optimizer steps", f"{plan.optimizer_steps:,}"]]
    rows += [["tokens, about", f"{plan.tokens:,}"]]
    if verbose:
        rows += [["linears", str(plan.linears)], ["steps", ", ".join(plan.steps) or "one"]]
        rows += [[f"tokens: {part}", f"{count:,}"] for part, count in plan.calibration.items()]
    for what, form, figures in (("memory", _mebibytes, plan.memory_mb), ("time", _time, plan.seconds)):
        names = figures if verbose else list(figures)[:1]  # the first is the whole
        rows += [[f"{what}, about: {name.replace('_', ' ')}", form(figures[name])] for name in names]
    if plan.done:
        rows += [["done before", "all of it" if plan.done == "finished" else f"up to {plan.done}"]]
    return rows


def rows_of_machine(facts: dict) -> list[list[str]]:
    """[what, how it is here] of the facts of `machine.describe`, with the costs under "ns_per_entry" and the forms of
    the engine on a GPU under "gpu_forms".
    """
    words = {
        "cpu": "processor",
        "memory_gib": "memory, GiB",
        "isa": "instruction set",
        "isa_off": "instruction sets that are off",
        "bf16_training": "training in bf16",
        "gpu": "GPU",
        "cuda_kernels": "CUDA kernels",
        "gpu_forms": "forms of the engine on the GPU",
        "data": "folder of data",
        "cache": "folder of packed models",
        "ns_per_entry": "ns per stored weight: short, middling, long batches",
    }

    def told(value) -> str:
        if isinstance(value, dict):
            return "\n".join(f"{name} {told(part)}" for name, part in value.items())
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return [[words.get(name, name), told(value)] for name, value in facts.items()]


def tables_of_timing(result: dict, config: BenchConfig, explain: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of the engines, and with `explain` of the linears. result: of `rivals.time_rivals`."""
    from sparsebert.engine.measure import ratio_text

    rows = [
        [
            f"{row['engine']} {row['dtype']}",
            f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['seq_per_s']:.0f}",
            ratio_text(row["ratio"], row["ratio_ci"]) if row is not result["rows"][0] else "1",
            "other weights" if row["error"] is None else f"{row['error']:.1e} {'ok' if row['match'] else 'differs'}",
        ]
        for row in result["rows"]
    ]
    texts = "1 text" if config.batch == 1 else f"{config.batch} texts"
    lengths = f"as long as those of {config.task}" if config.seq == "mix" else f"of {config.seq} tokens"
    machine = f"{result['rows'][0]['threads']} threads, {result['machine']['isa']} on {result['machine']['cpu']}"
    columns = ["engine", "median, ms", "p99, ms", "texts/s", "time / ours [95 %]", "logits, from torch's"]
    tables = [(f"{texts} per call, {lengths}; {machine}", columns, rows)]
    if explain:
        rows = [
            [
                str(row["layer"]),
                row["linear"],
                "x".join(map(str, row["shape"])),
                f"{row['density']:.1%}",
                row["form"] + (f", short: {row['short']}" if row["short"] else ""),
                row["kernel"],
                f"{row['gflops']:.0f}",
                f"{row['share_of_peak']:.0%}",
                row["why"],
            ]
            for row in result["layers"]
        ]
        columns = ["layer", "linear", "shape", "kept", "form", "kernel", "Gflop/s", "of peak", "why"]
        tables.append(("linears", columns, rows))
    return tables


def table_of_study(rows: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows) of the plan of a study."""
    spent, shown = 0.0, []
    for row in rows:
        spent += row["seconds"] * row["runs"]
        label = row["label"] + (f", draw {row['draw']}" if row["draw"] else "") + (", int8 too" if row["int8"] else "")
        told = [row["task"], row["dense"], label, f"{100 * row['zeros']:.4g} %", f"{row['seconds'] / 60:.0f}"]
        shown.append([*told, f"{spent / 3600:.1f}" if row["runs"] else "left out"])
    begun = sum(row["runs"] for row in rows)
    title = f"{begun} of {len(rows)} cells, about {spent / 3600:.1f} hours on this machine"
    return title, ["task", "dense model", "method", "zeros", "minutes", "hours by then"], shown


def table_of_load(title: str, rows: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows) of a load test."""
    latencies = {"p50": "p50_ms", "p90": "p90_ms", "p99": "p99_ms", "p99.9": "p999_ms", "most": "max_ms"}
    shown = [
        [
            f"{row['rate']:g}", f"{row['answered']:,}", f"{row['refused']:,}", f"{row['failed']:,}",
            f"{row['texts_per_s']:,.1f}",
            *("" if row[key] is None else f"{row[key]:.1f}" for key in latencies.values()),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["requests/s", "answered", "refused", "failed", "texts/s", *(f"{name} ms" for name in latencies)]
    return title, columns, shown
