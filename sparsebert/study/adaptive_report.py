"""Reports the cells of the study `adaptive`: accuracy, accuracy under attack and queries beside the dense model, the
controls, and the distances of hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsebert import jobs
from sparsebert.errors import InputError
from sparsebert.robustness import statistics
from sparsebert.study.adaptive_grid import ATTACK, CONTROL, AdaptiveGrid, Cell
from sparsebert.study.pages import Section, command_of, head, lay_out, markdown_page, percent, write_html, write_parquet
from sparsebert.study.run import Outcome

NOTES = (
    "Acc, Aua and Asr: accuracy before and after TextFooler, and the share of the attacked examples that were fooled, "
    "in percent, on the same examples of the reported split for all models of a task. Means over dense models with "
    "half of their 95 % t interval, after those over draws of calibration texts. `- dense` is the difference from the "
    "dense model that a model was made from, in points, paired: over dense models if there are several, else over "
    "examples. The attack's neighbours and sentence encoder stand in for the paper's, and the encoder is MiniLM: no "
    "figure here compares with one of its tables. Dense models, settings and the order of the cells were fixed before; "
    "soups are judged on held-out training examples. A soup is made of other dense models, of one alone if no average "
    "is better, so it is in no mean with them: what is made of it has rows of its own."
)


@dataclass(frozen=True)
class Line:
    """One setting in one form, fp32 or int8. cells: its cells with their results, one per dense model and draw. soup:
    the soup that they are made from; None if they are made from other models.
    """

    cell: Cell
    form: str
    cells: list[tuple[Cell, dict]]
    soup: str | None = None

    @property
    def counts(self) -> str:
        """How many dense models it was made from, and cells, if those are more."""
        models, cells = len({cell.dense for cell, _ in self.cells}), len(self.cells)
        return str(models) if cells == models else f"{models}, {cells} cells"

    @property
    def label(self) -> str:
        return self.cell.label + (" in int8" if self.form == "int8" else "") + (f", {self.soup}" if self.soup else "")

    def figures(self, name: str) -> list:
        """A figure of TextFooler in each cell that has it."""
        return [value for _, value in self._found(_of_attack(name))]

    def by_model(self, figure: Callable[[dict], float | None], form: str | None = None) -> list[float]:
        """A figure of the evaluations, meaned over the draws of each dense model: draws of one are not independent."""
        found: dict[str, list[float]] = {}
        for dense, value in self._found(figure, form):
            found.setdefault(dense, []).append(value)
        return [float(np.mean(values)) for values in found.values()]

    def difference(self, figure: Callable[[dict], dict], form: str | None = None) -> str:
        """The difference from the dense model, for people. figure: of a form, what has it and its interval."""
        values = self.by_model(lambda each: figure(each).get("difference"), form)
        intervals = [value for _, value in self._found(lambda each: figure(each).get("difference_ci"), form)]
        return points(values, intervals[0] if len(intervals) == 1 else None)

    def _found(self, figure: Callable[[dict], Any], form: str | None = None) -> list[tuple[str, Any]]:
        """(dense model, figure) of each cell that has it."""
        found = [(cell.dense, figure(result["forms"].get(form or self.form) or {})) for cell, result in self.cells]
        return [(dense, value) for dense, value in found if value is not None]


def _of_attack(name: str, attack: str = ATTACK) -> Callable[[dict], Any]:
    return lambda form: _attacked(form, attack).get(name)


def _attacked(form: dict, attack: str = ATTACK) -> dict:
    return form.get("attacks", {}).get(attack, {})


def lines_of(grid: AdaptiveGrid, outcome: Outcome) -> list[Line]:
    """One line per setting, soup and form, in the grid's order. InputError for cells that do not compare."""
    found: dict[tuple[str, str | None, str], list[tuple[Cell, dict]]] = {}
    known: dict[tuple[str, str], str] = {}
    for cell, result in outcome.done:
        soup = None if grid.members(cell.task, cell.dense) is None else cell.dense
        for form in ("fp32", "int8"):
            if form in result["forms"]:
                _require_same(known, cell, result["forms"][form])
                found.setdefault((json.dumps(cell.setting), soup, form), []).append((cell, result))
    return [Line(cells[0][0], form, cells, soup) for (_, soup, form), cells in found.items()]


def _require_same(known: dict[tuple[str, str], str], cell: Cell, form: dict) -> None:
    """known: the variants of attacks, and the hashes of domains, of the cells before this one, to which its own are
    added.
    """
    facts = {f"attack {name}": each["variant"] for name, each in form["attacks"].items()}
    facts |= {f"domain {name}": each["data"] for name, each in (form.get("domains") or {}).items() if "data" in each}
    for name, value in facts.items():
        if known.setdefault((cell.task, name), value) != value:
            raise InputError(
                f"cells of {cell.task} must have the same {name}, got {known[cell.task, name]} and {value}",
                fix="run all of them with the same resources and data",
            )


def publish_adaptive(
    grid: AdaptiveGrid, outcome: Outcome, output: Path, markdown_path: Path | None = None, flags: Sequence[str] = ()
) -> dict:
    """Writes `output`/report.html and cells.parquet, and tables to `markdown_path`; returns their content as JSON.
    flags: of the command, for the head of the tables.
    """
    lines = lines_of(grid, outcome)
    sections, missing = sections_of(grid, outcome), left_out(outcome)
    if outcome.done:
        write_html(output / "report.html", grid.name, NOTES, sections, missing)
        write_parquet(output / "cells.parquet", [row for each in outcome.done for row in _parquet_rows(*each)])
    if markdown_path is not None:
        said = head(outcome, command_of("adaptive", grid.given, markdown_path, flags))
        jobs.write(markdown_path, markdown_page(grid.name, said, NOTES, sections, missing))
    return {
        "grid": grid.name, "cells": len(outcome.done), "report": str(output / "report.html"),
        "hours": sum(result["seconds"] for _, result in outcome.done) / 3600,
        "settings": [
            {
                **line.cell.setting, "form": line.form, "dense": [cell.dense for cell, _ in line.cells],
                **{name: line.figures(name) for name in ("acc", "aua", "asr", "queries", "difference")},
            }
            for line in lines
        ],
        "left_out": [cell.model_dump() for cell in outcome.left_out],
    }  # fmt: skip


def sections_of(grid: AdaptiveGrid, outcome: Outcome) -> list[Section]:
    """The tables: the models of each task, the dense ones, the controls, the distances of hidden states."""
    lines = lines_of(grid, outcome)
    sections = []
    for task in dict.fromkeys(line.cell.task for line in lines):
        own = [line for line in lines if line.cell.task == task]
        heads = ["method", "zeros", "dense models", "Acc", "Aua", "Asr", "queries", "Acc - dense", "Aua - dense"]

        def charts(own: list[Line] = own) -> list[tuple[str, object]]:
            return [("accuracy under attack", _curves(own, "aua")), ("accuracy", _curves(own, "acc"))]

        sections.append(Section(task, heads, [_row(line) for line in own], charts))
        dense = [(cell, result) for cell, result in outcome.done if cell.task == task and cell.method == "dense"]
        if dense:
            rows = [[cell.dense, *_alone(result)] for cell, result in dense]
            sections.append(Section(f"{task}: dense models", ["model", "Acc", "Aua", "Asr", "queries"], rows))
    sections += _kept([line for line in lines if line.cell.method != "dense"])
    if rows := [_controls(line) for line in lines if any(cell.controls for cell, _ in line.cells)]:
        heads = [
            "task", "method", "zeros", "right on texts that fooled the dense model", "dense right on texts that fooled "
            "this", "Aua, confidence matched", "- dense", "Acc after random synonyms", "- dense",
        ]  # fmt: skip
        sections.append(Section("Controls", heads, rows))
    if rows := [row for line in lines if line.form == "fp32" for row in _distances(line)]:
        layers = max(len(row) for row in rows) - 4
        rows = [row + [""] * (layers + 4 - len(row)) for row in rows]
        heads = ["task", "method", "zeros", "texts", *(f"layer {i + 1}" for i in range(layers))]
        sections.append(Section("First token: mean of 1 - cos to the dense model's hidden state", heads, rows))
    return sections


def _kept(lines: Sequence[Line]) -> list[Section]:
    """What each setting keeps of the dense model in domain, in other domains and under each attack."""
    kept = [line for line in lines if any(cell.domains for cell, _ in line.cells)]
    found = [result["forms"][line.form] for line in kept for _, result in line.cells]
    sets = dict.fromkeys(name for each in found for name in each.get("domains") or {})
    under = dict.fromkeys(name for each in found for name in each["attacks"])
    figures: dict[str, tuple[Callable[[list[float]], str], Callable[[dict], float | None]]] = {
        "KL": (_nats, lambda form: form.get("kl_to_dense")),
        "agreement": (percent, lambda form: form.get("agreement")),
        "Acc - dense": (_points, lambda form: form.get("difference")),
    }

    def of_set(name: str, figure: str) -> Callable[[dict], float | None]:
        return lambda form: figures[figure][1]((form.get("domains") or {}).get(name, {}))

    wanted = {**figures}
    wanted |= {
        f"{name}: {figure}": (form, of_set(name, figure)) for name in sets for figure, (form, _) in figures.items()
    }
    for name in under:
        wanted[f"{name}: Aua - dense"] = _points, _of_attack("difference", name)
    rows = []
    for line in kept:
        values = [(form, line.by_model(figure)) for form, figure in wanted.values()]
        zeros = f"{100 * line.cell.zeros:.4g}"
        told = [form(found) if found else "" for form, found in values]
        rows.append([line.cell.task, line.label, zeros, line.counts, *told])
    heads = ["task", "method", "zeros", "dense models", *wanted]
    return [Section("Kept: in domain, in other domains, under attack", heads, rows)] if rows else []


def _points(differences: list[float]) -> str:
    return points(differences, None)


def _nats(values: list[float]) -> str:
    return f"{np.mean(values):.4f}"


def left_out(outcome: Outcome) -> list[str]:
    """One line per setting that has cells left out, with their dense models."""
    missing: dict[str, list[str]] = {}
    for cell in outcome.left_out:
        missing.setdefault(f"{cell.task}: {cell.label} {cell.zeros:.4g}", []).append(cell.dense)
    return [f"{name}, of {', '.join(models)}" for name, models in missing.items()]


def points(differences: Sequence[float], interval: Sequence[float] | None) -> str:
    """Mean difference in points with its 95 % interval: over dense models if there are several, else `interval`."""
    if not differences:
        return ""
    values = np.array(differences, dtype=np.float64)
    if len(values) > 1:
        interval = statistics.mean_interval(values)
    mean = f"{100 * values.mean():+.2f}"
    return mean if interval is None else f"{mean} [{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]"


def _row(line: Line) -> list[str]:
    zeros = 100 * np.mean([result["sparsity"] for _, result in line.cells])
    queries = line.by_model(_of_attack("queries"))
    return [
        line.label, f"{zeros:.2f}", line.counts, *(_mean(line, name) for name in ("acc", "aua", "asr")),
        f"{np.mean(queries):.0f}" if queries else "", line.difference(lambda form: form), line.difference(_attacked),
    ]  # fmt: skip


def _mean(line: Line, name: str, attack: str = ATTACK, form: str | None = None) -> str:
    values = line.by_model(_of_attack(name, attack), form)
    return percent(values) if values else ""


def _alone(result: dict) -> list[str]:
    figures = result["forms"]["fp32"]["attacks"][ATTACK]
    told = [_with_interval(figures, name) for name in ("acc", "aua", "asr")]
    return [*told, "" if figures["queries"] is None else f"{figures['queries']:.0f}"]


def _with_interval(figures: dict, name: str) -> str:
    if figures.get(name) is None:
        return ""
    low, high = figures[f"{name}_ci"]
    return f"{100 * figures[name]:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _controls(line: Line) -> list[str]:
    transfers = []
    for name in ("from_dense", "to_dense"):
        shares = line.by_model(lambda form, name=name: (_attacked(form).get(name) or {}).get("accuracy"))
        transfers.append(percent(shares) if shares else "")

    def under(attack: str, form: str) -> list[str]:
        return [_mean(line, "aua", attack, form), line.difference(lambda each: _attacked(each, attack), form)]

    matched = under(ATTACK, "matched") if line.form == "fp32" else ["", ""]
    zeros = f"{100 * line.cell.zeros:.4g}"
    return [line.cell.task, line.label, zeros, *transfers, *matched, *under(CONTROL, line.form)]


def _distances(line: Line) -> list[list[str]]:
    found = [result["distances"] for _, result in line.cells if "distances" in result]
    if not found:
        return []
    start = [line.cell.task, line.label, f"{100 * line.cell.zeros:.4g}"]
    return [
        [*start, texts, *(f"{value:.4f}" for value in np.mean([each[texts] for each in found], axis=0))]
        for texts in ("original", "adversarial")
    ]


def _curves(lines: list[Line], name: str):
    """One curve over the share of zeros per method; dense models as a horizontal line."""
    import plotly.graph_objects as go

    figure = go.Figure()
    curves: dict[str, list[Line]] = {}
    for line in lines:
        if line.figures(name):
            curves.setdefault(line.label, []).append(line)
    for label, points_ in curves.items():
        points_ = sorted(points_, key=lambda line: line.cell.zeros)
        means = [float(np.mean(line.by_model(_of_attack(name)))) for line in points_]
        if points_[0].cell.method == "dense":
            figure.add_scatter(x=[0, 0.95], y=[means[0]] * 2, name=label, mode="lines", line={"dash": "dot"})
            continue
        figure.add_scatter(x=[line.cell.zeros for line in points_], y=means, name=label, mode="lines+markers")
    lay_out(figure, name)
    return figure


def _parquet_rows(cell: Cell, result: dict) -> list[dict]:
    """One row per form of a cell."""
    shared = {name: result[name] for name in ("seconds", "code", "machine")}
    shared |= {**cell.model_dump(), "label": cell.label, "zeros": result["sparsity"]}
    rows = []
    for form, figures in result["forms"].items():
        numbers = {
            f"{attack}.{name}": float(value)
            for attack, each in figures["attacks"].items()
            for name, value in each.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        whole = {name: figures.get(name) for name in ("accuracy", "ece", "kl_to_dense", "agreement", "difference")}
        rows.append({**shared, "form": form, "dtype": figures["dtype"], **whole, **numbers})
    return rows
