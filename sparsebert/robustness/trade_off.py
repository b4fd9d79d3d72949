"""The page of a trade-off card: the card, charts, the worst flips under attack, and what all of it was made with."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from sparsebert import jobs
from sparsebert.errors import OutputError
from sparsebert.robustness.attacks.words import differences
from sparsebert.robustness.card import Card, Column, card, heading, refusing_others, table_of, verdict
from sparsebert.robustness.report import BEGINNING, colour, html_table, layout, write_page

_CONFIG = {"displayModeBar": False, "responsive": True}


def require_page(path: Path) -> None:
    """Raises OutputError unless a report can be written at `path`, ModuleNotFoundError without plotly; before any work.
    Only another report is overwritten.
    """
    import plotly.graph_objects  # noqa: F401

    if path.suffix not in (".html", ".htm"):
        raise OutputError(f"{path} must end in .html", fix="choose another name for the report")
    jobs.require_place(jobs.place(path).parent)
    if path.is_dir() or (path.exists() and not path.read_bytes().startswith(BEGINNING.encode())):
        raise OutputError(f"{path} exists and is no report of this package", fix="choose another name, or remove it")


def write_trade_off(path: Path, documents: Sequence[dict], timings: Sequence[dict] = ()) -> Card:
    """Writes the page of these evaluations (card.card) to `path`, whole or not at all, and returns their card."""
    made = card(documents, timings)
    with refusing_others():
        body = _body(made)
    write_page(path, f"sparsebert: {made.task}", body)
    return made


def _body(made: Card) -> str:
    from plotly.io import to_html

    figures = [("Accuracy, whiskers are 95 % intervals", _bars(made))]
    if sum(not column.dense for column in made.columns) > 1:
        figures.append(("Accuracy against cost", _trade_off(made)))
    charts = "".join(
        f"<div class='wide'><h2>{html.escape(title)}</h2>"
        f"{to_html(figure, include_plotlyjs=False, full_html=False, config=_CONFIG)}</div>"
        for title, figure in figures
    )
    return (
        f"<h1>{html.escape(', '.join(c.name for c in made.columns if not c.dense))}</h1>"
        f"<p>{made.n:,} examples of {html.escape(made.task)}, {html.escape(made.split)}. In brackets 95 % intervals; "
        "behind a semicolon the difference from the dense model on the same examples, in points.</p>"
        f"{html_table(*table_of(made))}<p>{html.escape(verdict(made))}</p>"
        "<p>MB without zeros: non-zeros as they are stored, and one bit per weight that says where they are.</p>"
        f"<div class='charts'>{charts}</div>{_flips(made)}{_settings(made)}"
    )


def _shade(card: Card, column: Column) -> tuple[str, float]:
    """(colour, opacity): dense is grey; of the others the sparsest has the full accent colour."""
    if column.dense:
        return colour("dense"), 1.0
    others = [each for each in card.columns if not each.dense]
    return colour("sparsebert"), 0.4 + 0.6 * (others.index(column) + 1) / len(others)


def _whiskers(points: list) -> dict:
    """plotly's error bars for figures, some of which may have no interval."""
    intervals = [point.interval or (point.value, point.value) for point in points]
    return {
        "type": "data", "color": "#22292f",
        "array": [high - point.value for point, (_, high) in zip(points, intervals, strict=True)],
        "arrayminus": [point.value - low for point, (low, _) in zip(points, intervals, strict=True)],
    }  # fmt: skip


def _bars(card: Card):
    """A bar per model for each line of the card."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for column in card.columns:
        paint, opacity = _shade(card, column)
        points = list(column.figures.values())
        figure.add_bar(
            x=[html.escape(line) for line in column.figures], y=[point.value for point in points],
            error_y=_whiskers(points), name=html.escape(heading(card, column)), marker_color=paint, opacity=opacity,
        )  # fmt: skip
    layout(figure, "", height=380)
    figure.update_layout(showlegend=True, barmode="group", bargap=0.25, legend={"orientation": "h", "y": 1.2})
    return _of_shares(figure, card)


def _trade_off(card: Card):
    """Each line of the card over what a model costs: ms per call if all were timed, else MB without zeros."""
    import plotly.graph_objects as go

    what = next((what for what in card.timings if all(what in c.milliseconds for c in card.columns)), None)

    def cost(column: Column) -> float:
        return column.facts["bytes"] / 1e6 if what is None else column.milliseconds[what]

    symbols = ("circle", "square", "diamond", "cross", "triangle-up", "star", "x", "pentagon")
    figure = go.Figure()
    for n, line in enumerate(card.lines):
        having = sorted((column for column in card.columns if line in column.figures), key=cost)
        points = [column.figures[line] for column in having]
        figure.add_scatter(
            x=[cost(column) for column in having], y=[point.value for point in points], error_y=_whiskers(points),
            mode="lines+markers", name=html.escape(line), line={"color": colour("sparsebert"), "width": 1},
            text=[html.escape(heading(card, column)) for column in having],
            marker={
                "symbol": symbols[n % len(symbols)], "size": 10,
                "color": [_shade(card, column)[0] for column in having],
                "line": {"width": [3 if column is card.cheapest else 0 for column in having], "color": "#d98c3f"},
            },
        )  # fmt: skip
    layout(figure, "", height=420)
    title = "MB without zeros" if what is None else f"ms per call: {what}"
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": -0.2}, xaxis_title=html.escape(title), margin={"b": 90}
    )
    return _of_shares(figure, card)


def _of_shares(figure, card: Card):
    if card.metric != "spearman":
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def _flips(card: Card) -> str:
    """The worst flips of each model under each attack."""
    found = ""
    for document in card.documents:
        for name, attack in (document["attacks"] or {}).items():
            rows = attack.get("worst") or []
            if rows:
                model = document["about"]["model"]["directory"]
                found += f"<h2>{html.escape(f'Fooled by {name}: {model}')}</h2>{''.join(map(_flip, rows))}"
    return found


def _flip(row: dict) -> str:
    said = ""
    for old, new in differences(row["original"], row["perturbed"]):
        if old == new:
            said += f"{html.escape(old)} "
        else:
            said += "".join(
                f"<{tag}>{html.escape(part)}</{tag}> " for tag, part in (("del", old), ("ins", new)) if part
            )
    note = (
        f"{row['why']}; {row['words_changed']:.0%} of the words changed, {row['queries']:,} queries, probability of "
        f"another label than {row['label']} {row['score']:.0%}; sparsebert replay {row['unit']}"
    )
    return f"<p class='text'>{said}<br><small>{html.escape(note)}</small></p>"


def _settings(card: Card) -> str:
    """What was evaluated and how, to the last setting."""
    tables = ""
    for document in card.documents:
        about = document["about"]
        settings = {name: document[name] for name in ("engine", "dtype", "max_length", "cut")}
        settings |= {"seed": about["seed"], "examples, sha256": about["data"]}
        for whose in ("model", "dense"):
            settings |= {f"{whose}: {name}": value for name, value in (about[whose] or {}).items()}
        for name, attack in (document["attacks"] or {}).items():
            settings[f"{name}: variant"] = attack["variant"]
            settings |= {f"{name}: {what}": value for what, value in attack["settings"].items()}
            settings |= {
                f"{name}: {what}": attack[what] for what in ("errors", "capped", "temperature") if what in attack
            }
        settings |= {f"version of {name}": value for name, value in about["versions"].items()}
        rows = [[name, _shown(value)] for name, value in settings.items() if value is not None]
        title = html.escape(f"Settings: {about['model']['directory']}")
        tables += f"<details><summary>{title}</summary>{html_table(['', ''], rows)}</details>"
    return f"<h2>Settings</h2>{tables}"


def _shown(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
