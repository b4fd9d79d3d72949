"""Pages of a study: its sections as markdown, one HTML page and parquet."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsebert import jobs
from sparsebert.errors import UnsupportedError
from sparsebert.machine import setting
from sparsebert.robustness import statistics
from sparsebert.robustness.report import html_table, write_page
from sparsebert.study.run import Outcome

LEFT_OUT = "Left out"


class Section(NamedTuple):
    """A table with its title. charts: makes plotly figures with their titles, for the HTML page."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    charts: Callable[[], list[tuple[str, object]]] = list


def head(outcome: Outcome, command: str) -> str:
    """The machines, the command and the environments with which the cells were computed."""
    results = [result for _, result in outcome.done]
    machines = dict.fromkeys(result["machine"] for result in results)
    variables = [setting(r["environment"]) if "environment" in r else "not recorded" for r in results]
    return "  \n".join([
        f"Machine: {'; '.join(machines) or 'none'}.",
        f"Command: `{command}`",
        f"Environment: {'; '.join(dict.fromkeys(variables)) or 'none'}.",
    ])  # fmt: skip


def command_of(which: str, grid: str, page: Path, flags: Sequence[str] = ()) -> str:
    """The command that writes the tables of a grid, as it was given, to `page`. flags: its other ones."""
    said = "".join(f" {flag}" for flag in flags)
    return f"sparsebert study {which} --grid {path_told(grid)}{said} -o DIR --markdown {path_told(page)}"


def path_told(path: str | Path) -> str:
    """A path as a page names it: of an absolute one, which is another on each machine, the name alone."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def markdown_page(title: str, head: str, notes: str, sections: Sequence[Section], left_out: Sequence[str]) -> str:
    """The sections as markdown, and what was left out."""
    parts = [f"# {title}", head, notes]
    for section in sections:
        rows = [section.heads, ["---"] * len(section.heads), *section.rows]
        parts.append("\n".join([f"## {section.title}", "", *("| " + " | ".join(row) + " |" for row in rows)]))
    if left_out:
        parts.append("\n".join([f"## {LEFT_OUT}", "", *(f"* {line}" for line in left_out)]))
    return "\n\n".join(parts) + "\n"


def write_html(path: Path, title: str, notes: str, sections: Sequence[Section], left_out: Sequence[str]) -> None:
    """Writes the sections with their charts as one HTML page, whole or not at all."""
    try:
        from plotly.io import to_html
    except ImportError as error:
        raise UnsupportedError("the report needs plotly", fix="pip install plotly") from error
    body = f"<h1>{html.escape(title)}</h1><p>{html.escape(notes)}</p>"
    config = {"displayModeBar": False, "responsive": True}
    for section in sections:
        charts = "".join(
            f"<div><h2>{html.escape(name)}</h2>"
            f"{to_html(figure, include_plotlyjs=False, full_html=False, config=config)}</div>"
            for name, figure in section.charts()
        )
        shown = f"<div class='charts'>{charts}</div>" if charts else ""
        body += f"<h2>{html.escape(section.title)}</h2>{shown}{html_table(section.heads, section.rows)}"
    if left_out:
        body += f"<h2>{LEFT_OUT}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in left_out)}</ul>"
    write_page(path, title, body)


def write_parquet(path: Path, rows: Sequence[dict]) -> None:
    """Writes one row per cell; a field that some rows lack is null there."""
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    with jobs.writing(path) as fresh:
        pyarrow.parquet.write_table(table, fresh)


def percent(values: Sequence[float]) -> str:
    """The mean of fractions, in percent, with half of its 95 % t interval if there are several."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return f"{100 * values[0]:.2f}"
    low, high = statistics.mean_interval(values)
    return f"{100 * values.mean():.2f} ±{50 * (high - low):.2f}"


def lay_out(figure, name: str) -> None:
    """The axes of a chart of the figure `name`, a fraction, over the share of zeros."""
    figure.update_layout(
        template="plotly_white", height=380, margin={"l": 60, "r": 20, "t": 20, "b": 40}, legend={"orientation": "h"},
        xaxis_title="share of zeros", xaxis_tickformat=".0%", yaxis_title=name, yaxis_tickformat=".0%",
    )  # fmt: skip
