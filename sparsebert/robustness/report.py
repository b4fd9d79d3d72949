"""Builds one self-contained HTML page: tables and plotly charts. The script is inline, so nothing is fetched when it is
opened.
"""

from __future__ import annotations

import html
from pathlib import Path

from sparsebert import jobs
from sparsebert.engine.measure import ratio_text
from sparsebert.errors import UnsupportedError
from sparsebert.robustness.drift import LONG, OUTSIDE
from sparsebert.robustness.evaluation import Evaluation

_COLOURS = {
    "dense": "#5b6770",
    "torch": "#5b6770",
    "magnitude": "#d98c3f",
    "adaptive": "#7f6aa8",
    "knowledge": "#1f7a8c",
    "sparsebert": "#1f7a8c",
}
# How each page begins, by which `trade_off` tells them from the user's own.
BEGINNING = "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='generator' content='sparsebert'>"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22292f; max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem }
h2 { font-size: 1.1rem; margin: 1rem 0 .3rem }
p { margin: .3rem 0; color: #55606a }
table { border-collapse: collapse; margin: .8rem 0; width: 100% }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #dde2e6 }
th:first-child, td:first-child { text-align: left }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem }
.charts > div { min-width: 0 }
.wide { grid-column: 1 / -1 }
.scroll { overflow-x: auto }
.text { overflow-wrap: anywhere; color: inherit; margin: .8rem 0 }
del { color: #a33b2e }
ins { color: #1f6f3f; font-weight: 600 }
@media (max-width: 640px) {
  body { margin: 1rem auto }
  th, td { padding: .3rem .4rem; font-size: .85rem }
  table { display: block; overflow-x: auto }
  .charts { grid-template-columns: 1fr }
}
code { background: #f1f4f6; padding: 0 .3rem }
"""


def write_report(
    path: Path,
    evaluations: dict[str, Evaluation],
    density: dict[str, dict[str, float]],
    timings: list[dict],
    settings: dict,
) -> None:
    """Writes the demo's report to `path`, whole or not at all.

    evaluations: model name -> figures, "dense" first. density: method -> linear -> share of non-zeros. timings: one per
    batch size, with latency_ms (milliseconds per text) of torch and sparsebert, speedup and its interval.
    """
    try:
        import plotly.graph_objects as go
        from plotly.io import to_html
    except ImportError as error:
        raise UnsupportedError("the report needs plotly", fix="pip install 'sparsebert[eval]'") from error

    figures = [
        ("Accuracy", "Whiskers are 95 % Wilson intervals.", "", _accuracy(go, evaluations)),
        (
            "Distance from the dense model",
            "Mean KL(dense ‖ pruned) in nats on the same sentences: lower is closer to the dense model.",
            "",
            _kl(go, evaluations),
        ),
        (
            "Latency",
            "Same weights, sentences and threads; the two run alternately. Median over rounds.",
            "wide",
            _latency(go, timings),
        ),
        ("Density of every linear", "Share of weights kept, by layer and linear.", "wide", _density(go, density)),
    ]
    config = {"displayModeBar": False, "responsive": True}
    charts = "".join(
        f"<div class='{place}'><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>"
        f"{to_html(figure, include_plotlyjs=False, full_html=False, config=config)}</div>"
        for title, note, place, figure in figures
    )
    dense = evaluations["dense"]
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    body = (
        "<h1>MiniLM-L6, pruned and checked</h1>"
        f"<p>Task {html.escape(dense.task)}, {dense.n} {html.escape(dense.split)} sentences. The encoder is "
        "all-MiniLM-L6-v2, a sentence-embedding model, fine-tuned; embeddings, pooler and classifier stay dense.</p>"
        f"{_quality_table(evaluations)}{_shift_table(evaluations)}{_speed_table(timings)}"
        f"<div class='charts'>{charts}</div>"
        f"<h2>Settings</h2><p><code>{html.escape(shown)}</code></p>"
    )
    write_page(path, "sparsebert demo", body)


def write_page(path: Path, title: str, body: str) -> None:
    """Writes HTML with plotly's script inline to `path`, whole or not at all. body: HTML, escaped already."""
    from plotly.offline import get_plotlyjs

    page = (
        f"{BEGINNING}<title>{html.escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>{body}</body></html>"
    )
    jobs.write(path, page)


def html_table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of texts, which are escaped here."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def colour(name: str) -> str:
    return _COLOURS.get(name, "#8a939b")


def layout(figure, y_title: str, height: int = 320):
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 20, "b": 40},
        yaxis_title=y_title,
        showlegend=False,
        bargap=0.5,
    )
    return figure


def _bars(go, y_title: str, values: dict[str, float], intervals: dict[str, tuple[float, float]], spec: str):
    """One bar per model, with its interval as a whisker."""
    names = list(values)
    whiskers = {
        "type": "data",
        "array": [intervals[name][1] - values[name] for name in names],
        "arrayminus": [values[name] - intervals[name][0] for name in names],
        "color": "#22292f",
    }
    bar = go.Bar(
        x=names,
        y=list(values.values()),
        error_y=whiskers,
        marker_color=[colour(name) for name in names],
        text=[format(value, spec) for value in values.values()],
        textposition="inside",
        insidetextanchor="start",
    )
    return layout(go.Figure(bar), y_title)


def _accuracy(go, evaluations: dict[str, Evaluation]):
    values = {name: result.accuracy for name, result in evaluations.items()}
    figure = _bars(go, "accuracy", values, {name: result.accuracy_ci for name, result in evaluations.items()}, ".1%")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def _kl(go, evaluations: dict[str, Evaluation]):
    paired = {name: result for name, result in evaluations.items() if result.kl_to_dense is not None}
    values = {name: result.kl_to_dense for name, result in paired.items()}
    return _bars(go, "KL to dense, nats", values, {name: result.kl_ci for name, result in paired.items()}, ".4f")


def _density(go, density: dict[str, dict[str, float]]):
    """A heat map per method, of layers x linears, all in the same colours."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(density), subplot_titles=list(density), shared_yaxes=True, horizontal_spacing=0.03)
    for column, by_name in enumerate(density.values(), 1):
        cells = {_place(name): share for name, share in by_name.items()}
        layers, linears = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
        shares = [[cells.get((layer, linear)) for layer in layers] for linear in linears]
        heat = go.Heatmap(
            x=[f"layer {layer}" for layer in layers], y=linears, z=shares, coloraxis="coloraxis",
            texttemplate="%{z:.0%}", textfont={"size": 9}, xgap=1, ygap=1,
        )  # fmt: skip
        figure.add_trace(heat, 1, column)
    layout(figure, "", height=300)
    figure.update_layout(
        margin={"l": 150, "t": 40},
        coloraxis={"colorscale": [[0, "#f4f7f8"], [1, "#1f7a8c"]], "cmin": 0, "colorbar": {"tickformat": ".0%"}},
    )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 10})
    figure.update_xaxes(tickfont={"size": 9})
    return figure


def _latency(go, timings: list[dict]):
    figure = go.Figure()
    for name in timings[0]["latency_ms"]:
        values = [timing["latency_ms"][name] for timing in timings]
        figure.add_bar(
            x=[f"batch {timing['batch']}" for timing in timings], y=values, name=name, marker_color=colour(name),
            text=[f"{value:.2f}" for value in values], textposition="outside",
        )  # fmt: skip
    layout(figure, "ms per sentence")
    figure.update_layout(showlegend=True, barmode="group", legend={"orientation": "h", "y": 1.15})
    return figure


def _quality_table(evaluations: dict[str, Evaluation]) -> str:
    rows = ""
    for name, result in evaluations.items():
        low, high = result.accuracy_ci
        cells = [f"{result.accuracy:.1%} [{low:.1%}, {high:.1%}]"]
        if result.difference_ci is None:
            cells += [""] * (3 + len(OUTSIDE))
        else:
            low, high = result.difference_ci
            cells += [
                f"{100 * result.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                f"{result.kl_to_dense:.4f}",
                f"{result.agreement:.1%}",
                *(f"{result.outside[texts]['kl']:.4f}, {result.outside[texts]['agreement']:.1%}" for texts in OUTSIDE),
            ]
        rows += f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = ("model", "accuracy, 95 % interval", "points from dense, paired", "KL to dense", "same label", *OUTSIDE)
    note = (
        f"The columns on the right give KL and same label on other texts: {OUTSIDE[0]} are the sentences joined to "
        f"at least {LONG} words, {OUTSIDE[1]} are from a dictionary; none was calibrated on, but others of both kinds "
        "were."
    )
    table = "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + f"</tr>{rows}</table>"
    return f"{table}<p>{html.escape(note)}</p>"


def shifted_and_attacked(result: Evaluation) -> list[tuple[str, dict]]:
    """(what, figures) of each attack and each other domain: value, an accuracy, with ci, its 95 % interval; difference
    from dense, None without a dense model; n.
    """
    attacks = [
        (
            f"{name}: accuracy under attack",
            {"value": f["aua"], "ci": f["aua_ci"], "difference": f.get("difference"), "n": f["n"]},
        )
        for name, f in (result.attacks or {}).items()
    ]
    domains = [
        (
            f"{name}: accuracy",
            {"value": f["accuracy"], "ci": f["accuracy_ci"], "difference": f.get("difference"), "n": f["n"]},
        )
        for name, f in (result.domains or {}).items()
    ]
    return attacks + domains


def _shift_table(evaluations: dict[str, Evaluation]) -> str:
    """Accuracy under attack and in other domains, a row per model; nothing if neither was measured."""
    columns = [what for what, _ in shifted_and_attacked(next(iter(evaluations.values())))]
    if not columns:
        return ""
    rows = ""
    for name, result in evaluations.items():
        cells = ""
        for _, part in shifted_and_attacked(result):
            low, high = part["ci"]
            change = "" if part["difference"] is None else f", {100 * part['difference']:+.1f} from dense"
            cells += f"<td>{part['value']:.1%} [{low:.1%}, {high:.1%}]{change}</td>"
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    heads = "".join(f"<th>{html.escape(column)}</th>" for column in ("model", *columns))
    variants = [found["variant"] for found in (next(iter(evaluations.values())).attacks or {}).values()]
    note = html.escape(f"95 % intervals. Attacks: {'; '.join(variants)}.")
    return f"<table><tr>{heads}</tr>{rows}</table><p>{note}</p>"


def _speed_table(timings: list[dict]) -> str:
    rows = ""
    for timing in timings:
        cells = [
            f"{timing['latency_ms']['torch']:.2f}", f"{timing['latency_ms']['sparsebert']:.2f}",
            ratio_text(timing["speedup"], timing["speedup_ci"]), f"{timing['max_logit_error']:.1e}",
        ]  # fmt: skip
        rows += f"<tr><td>batch {timing['batch']}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = (
        "sentences per call",
        "dense torch fp32, ms per sentence",
        "sparsebert, ms per sentence",
        "speed-up, 95 % interval",
        "max logit error",
    )
    card = timings[0]["machine"]
    note = f"{card['cpu']}, {timings[0]['threads']} threads, {card['isa']}, torch {card['torch']}"
    return (
        "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + f"</tr>{rows}</table><p>{html.escape(note)}</p>"
    )


def _place(name: str) -> tuple[str, str]:
    """`bert.encoder.layer.3.attention.self.query` as ("3", "attention.self.query")."""
    layer, _, linear = name.partition(".layer.")[2].partition(".")
    return (layer, linear.removesuffix(".dense")) if linear else ("", name)
