"""Reports the results of a grid: settings over seeds, paired comparisons and curves, as tables, one HTML page and
parquet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparsebert import jobs
from sparsebert.robustness import statistics
from sparsebert.study.grid import Cell, Comparison, Grid
from sparsebert.study.pages import Section, command_of, head, lay_out, markdown_page, percent, write_html, write_parquet
from sparsebert.study.run import Outcome


@dataclass(frozen=True)
class Line:
    """One setting. figures: name -> the values of its seeds. rows, steps: of the training that made the cell. smoke:
    True if rows, steps or seeds are below the grid's `least`, too few to conclude from.
    """

    task: str
    label: str
    cell: Cell
    seeds: list[int]
    rows: int
    steps: int
    figures: dict[str, np.ndarray]
    smoke: bool


def publish(
    grid: Grid, outcome: Outcome, output: Path, markdown_path: Path | None = None, flags: Sequence[str] = ()
) -> dict:
    """Writes `output`/report.html and cells.parquet, and tables to `markdown_path`; returns their content as JSON.
    flags: of the command, for the head of the tables.
    """
    notes = (
        "Means over seeds with half of their 95 % t interval, in percent. Rows are training examples, fewer than the "
        "paper's: no figure here compares with one of its tables. The encoder is all-MiniLM-L6-v2, whose training "
        "pairs included NLI and Quora data: no untouched pretrained start."
    )
    lines = lines_of(grid, outcome)
    document = {
        "grid": grid.name, "cells": len(outcome.done), "report": str(output / "report.html"),
        "hours": sum(result["seconds"] for _, result in outcome.done) / 3600,
        "settings": [
            {
                "task": line.task, "setting": line.label, **line.cell.setting, "seeds": line.seeds, "rows": line.rows,
                "steps": line.steps, "smoke": line.smoke,
                "figures": {name: values.tolist() for name, values in line.figures.items()},
            }
            for line in lines
        ],
        "comparisons": [row for c in grid.comparisons if (row := compared(lines, c))],
        "left_out": [cell.model_dump() for cell in outcome.left_out],
    }  # fmt: skip
    if outcome.done:
        write_html(output / "report.html", grid.name, notes, _sections(grid, outcome), _left_out(outcome))
        write_parquet(output / "cells.parquet", [_parquet_row(*each) for each in outcome.done])
    if markdown_path is not None:
        jobs.write(markdown_path, markdown(grid, outcome, notes, markdown_path, flags))
    return document


def lines_of(grid: Grid, outcome: Outcome) -> list[Line]:
    """One line per setting, in the grid's order."""
    found: dict[str, list[tuple[Cell, dict]]] = {}
    for cell, result in outcome.done:
        found.setdefault(json.dumps(cell.setting, sort_keys=True), []).append((cell, result))
    lines = []
    for cells in found.values():
        cell = cells[0][0]
        each = [flat(result["evaluation"]) for _, result in cells]
        names = [name for name in each[0] if all(name in figures for figures in each)]
        rows, steps = cells[0][1]["rows"], int(np.mean([result["training"]["steps"] for _, result in cells]))
        least = grid.least
        smoke = rows < least["rows"] or steps < least["steps"] or len(cells) < least["seeds"]
        figures = {name: np.array([figures[name] for figures in each]) for name in names}
        lines.append(Line(cell.task, cell.label, cell, [c.seed for c, _ in cells], rows, steps, figures, smoke))
    return lines


def flat(evaluation: dict) -> dict[str, float]:
    """The scalar figures of an evaluation: "accuracy", "hans.non_entailment", …"""
    sets = {"": evaluation, **{f"{name}.": figures for name, figures in evaluation.get("ood", {}).items()}}
    return {
        f"{before}{name}": float(value)
        for before, figures in sets.items()
        for name, value in figures.items()
        if isinstance(value, float)
    }


def headline(task: str, line: Line) -> list[str]:
    """The figures that a table shows for a task."""
    wanted = {
        "mnli": ["accuracy", "hans.accuracy", "hans.entailment", "hans.non_entailment"],
        "qqp": ["accuracy", "f1", "paws_qqp.f1_weighted", "paws_wiki.f1_weighted", "paws_qqp.predicted_positive"],
    }.get(task, ["accuracy", *(name for name in line.figures if name.endswith(".accuracy"))])
    return [name for name in wanted if name in line.figures]


def compared(lines: list[Line], comparison: Comparison) -> dict | None:
    """The paired difference of a comparison over the seeds that both settings have; None for fewer than two."""
    a, b = (_only(lines, fields) for fields in (comparison.a, comparison.b))
    if a is None or b is None:
        return None
    both = [seed for seed in a.seeds if seed in b.seeds]
    if len(both) < 2:
        return None
    values = [line.figures[comparison.figure][[line.seeds.index(seed) for seed in both]] for line in (a, b)]
    return {
        "comparison": comparison.name, "figure": comparison.figure, "seeds": len(both), "smoke": a.smoke or b.smoke,
        "a": float(values[0].mean()), "b": float(values[1].mean()), **asdict(statistics.paired_over_seeds(*values)),
    }  # fmt: skip


def _only(lines: list[Line], fields: dict) -> Line | None:
    """The line of the setting that has these fields and the defaults of all others; None if there is none."""
    wanted = Cell(**fields).setting
    return next((line for line in lines if line.cell.setting == wanted), None)


def markdown(grid: Grid, outcome: Outcome, notes: str, path: Path, flags: Sequence[str] = ()) -> str:
    """The tables of the HTML page as markdown, for a file at `path`."""
    said = head(outcome, command_of("srnets", grid.given, path, flags))
    return markdown_page(grid.name, said, notes, _sections(grid, outcome), _left_out(outcome))


def _sections(grid: Grid, outcome: Outcome) -> list[Section]:
    """A section for each task, and one for the comparisons."""
    lines = lines_of(grid, outcome)
    sections = []
    for task in dict.fromkeys(line.task for line in lines):
        own = [line for line in lines if line.task == task]

        def charts(own: list[Line] = own) -> list[tuple[str, object]]:
            return [(name, _curves(own, name)) for name in headline(own[0].task, own[0])]

        sections.append(Section(task, *_table(task, own), charts))
    if found := [row for comparison in grid.comparisons if (row := compared(lines, comparison))]:
        sections.append(Section("Paired over seeds", *_comparisons(found)))
    return sections


def _parquet_row(cell: Cell, result: dict) -> dict:
    return {
        **cell.model_dump(), **flat(result["evaluation"]), "seconds": result["seconds"], "code": result["code"],
        "machine": result["machine"], "training": json.dumps(result["training"]),
    }  # fmt: skip


def _table(task: str, lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    names = headline(task, lines[0])
    rows = []
    for line in lines:
        cells = [line.label, f"{line.cell.sparsity:.0%}", str(len(line.seeds)), str(line.rows), str(line.steps)]
        rows.append(cells + [percent(line.figures[name]) for name in names] + ["smoke" if line.smoke else ""])
    return ["setting", "zeros", "seeds", "rows", "steps", *names, ""], rows


def _comparisons(found: list[dict]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in found:
        low, high = row["difference_ci"]
        rows.append([
            row["comparison"], row["figure"], str(row["seeds"]), f"{100 * row['a']:.2f}", f"{100 * row['b']:.2f}",
            f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]", _p(row["t_p"]),
            _p(row["sign_flip_p"]), "smoke" if row["smoke"] else "",
        ])  # fmt: skip
    heads = ["comparison", "figure", "seeds", "a", "b", "a - b, points", "p (t)", "p (sign flips)", ""]
    return heads, rows


def _left_out(outcome: Outcome) -> list[str]:
    """One line per setting that has cells left out, with their seeds."""
    missing: dict[str, list[int]] = {}
    for cell in outcome.left_out:
        missing.setdefault(f"{cell.task}: {cell.label} {cell.sparsity:.0%}", []).append(cell.seed)
    return [f"{name}, seeds {', '.join(map(str, seeds))}" for name, seeds in missing.items()]


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _curves(lines: list[Line], name: str):
    """One curve over sparsity per setting; dense models as horizontal lines."""
    import plotly.graph_objects as go

    figure = go.Figure()
    curves: dict[str, list[Line]] = {}
    for line in lines:
        curves.setdefault(line.label, []).append(line)
    for label, points in curves.items():
        points = sorted(points, key=lambda line: line.cell.sparsity)
        means = [line.figures[name].mean() for line in points]
        if points[0].cell.paradigm == "dense":
            figure.add_scatter(x=[0, 0.95], y=[means[0]] * 2, name=f"dense {label}", mode="lines", line={"dash": "dot"})
            continue
        half = []
        for line in points:
            low, high = statistics.mean_interval(line.figures[name]) if len(line.seeds) > 1 else (0.0, 0.0)
            half.append((high - low) / 2)
        figure.add_scatter(
            x=[line.cell.sparsity for line in points], y=means, error_y={"type": "data", "array": half}, name=label,
            mode="lines+markers",
        )  # fmt: skip
    lay_out(figure, name)
    return figure
