"""Draws docs/flow.svg, from text to logits, and docs/pass.svg, the pruning pass.

python docs/draw.py            (needs matplotlib: pip install '.[bench]')
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK, PALE, ACCENT, DENSE = "#22292f", "#eef2f4", "#1f7a8c", "#5b6770"
TEXTS = ("#9fc6d0", "#f0c48f", "#c9b6dd")  # one colour per text
HERE = Path(__file__).parent


def canvas(width: float, height: float) -> Axes:
    """Axes of width x height units without a frame; a unit is as long in both directions."""
    axes = pyplot.figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, **style) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style = {"facecolor": PALE, "edgecolor": INK, "linewidth": 0.8} | style
    corners = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=corners, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 0,
                                             "shrinkB": 0})  # fmt: skip


def say(axes: Axes, x: float, y: float, text: str, **style) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 8, "color": INK} | style)


def flow() -> None:
    """What `Engine.logits` does with three texts."""
    axes = canvas(10, 4.3)
    lengths = (4, 2, 3)
    for i, (text, colour) in enumerate(zip(("a gripping film", "dull", "well acted"), TEXTS, strict=True)):
        box(axes, 0.15, 3.35 - 0.42 * i, 1.35, 0.32, text, facecolor=colour)
    say(axes, 0.82, 3.95, "texts", weight="bold")
    arrow(axes, (1.55, 3.09), (2.0, 3.09))
    box(axes, 2.0, 2.75, 1.3, 0.7, "tokenizer\n(Rust)")
    arrow(axes, (3.3, 3.09), (3.75, 3.09))

    say(axes, 5.1, 3.95, "token ids, one text after the other: no padding", weight="bold")
    x = 3.8
    for length, colour in zip(lengths, TEXTS, strict=True):
        for _ in range(length):
            axes.add_patch(pyplot.Rectangle((x, 2.95), 0.28, 0.28, facecolor=colour, edgecolor=INK, linewidth=0.6))
            x += 0.28
    say(axes, 5.06, 2.68, "9 tokens: few, so each linear takes its form for short batches", fontsize=7, color=DENSE)
    arrow(axes, (x + 0.05, 3.09), (7.05, 3.09))
    box(axes, 7.05, 2.75, 1.3, 0.7, "embeddings\n+ norm")

    axes.add_patch(FancyBboxPatch((0.5, 1.02), 9.0, 1.22, boxstyle="round,pad=0,rounding_size=0.06", facecolor="white",
                                  edgecolor=ACCENT, linewidth=1.2))  # fmt: skip
    say(axes, 0.62, 2.12, "each layer, in one call of the C++ core", ha="left", color=ACCENT, fontsize=7.5)
    steps = (
        "query, key,\nvalue",
        "attention",
        "attention\noutput",
        "+ norm",
        "intermediate,\nGELU",
        "output",
        "+ norm",
    )
    sparse = (0, 2, 4, 5)
    width, gap = 1.05, 0.2
    for i, step in enumerate(steps):
        left = 0.7 + i * (width + gap)
        box(axes, left, 1.2, width, 0.7, step, **({"facecolor": "#d3e7eb", "edgecolor": ACCENT} if i in sparse else {}))
        if i:
            arrow(axes, (left - gap, 1.55), (left, 1.55))
    arrow(axes, (7.7, 2.75), (7.7, 2.24))
    note = "blue: linears, each as rows, groups, dense or tiles, by a table of costs. "
    note += "Only attention looks at where a text ends."
    say(axes, 5.0, 0.82, note, fontsize=7, color=DENSE)

    arrow(axes, (9.25, 1.02), (9.25, 0.55))
    box(axes, 7.6, 0.1, 1.9, 0.45, "first token of each text:\npooler, classifier")
    arrow(axes, (7.6, 0.32), (6.9, 0.32))
    box(axes, 4.9, 0.1, 2.0, 0.45, "logits [texts, labels]")
    arrow(axes, (4.9, 0.32), (4.2, 0.32))
    box(axes, 2.3, 0.1, 1.9, 0.45, "label and probability")
    pyplot.savefig(HERE / "flow.svg", metadata={"Date": None})


def staged_pass() -> None:
    """The dense and the half-pruned model side by side, at the third stage of a layer."""
    axes = canvas(10, 4.9)
    stages = ("query, key,\nvalue", "attention\noutput", "intermediate", "output")
    here, width, step = 2, 1.15, 1.75
    lefts = [2.3 + i * step for i in range(len(stages))]
    for y, name, colour in ((3.45, "dense model", DENSE), (0.45, "half-pruned model", ACCENT)):
        say(axes, 0.2, y + 0.85, name, weight="bold", color=colour, ha="left")
        for i in range(3):
            box(axes, 0.2 + 0.1 * i, y + 0.1 - 0.08 * i, 1.2, 0.5, "")
        say(axes, 1.0, y + 0.19, "calibration\ntexts", fontsize=7.5)
        arrow(axes, (1.65, y + 0.3), (lefts[0], y + 0.3))
        for i, (left, stage) in enumerate(zip(lefts, stages, strict=True)):
            pruned = y < 1 and i < here
            style = {"facecolor": "#d3e7eb", "edgecolor": ACCENT} if pruned else {}
            box(axes, left, y, width, 0.6, stage, **style)
            arrow(axes, (left + width, y + 0.3), (left + step, y + 0.3))
        say(axes, lefts[-1] + step + 0.1, y + 0.3, "…", fontsize=12, ha="left")
    middle = lefts[here] + width / 2
    box(axes, middle - 1.75, 1.95, 3.5, 0.7, "moments of x̂ and y over all tokens; the method\nsolves for the mask and "
        "the values of the weights", facecolor="#fbf1e3")  # fmt: skip
    arrow(axes, (lefts[here] + width + 0.12, 3.75), (middle + 0.7, 2.65), DENSE)
    say(axes, middle + 0.95, 3.05, "y: what the dense\nmodel gives here", ha="left", fontsize=7.5)
    arrow(axes, (lefts[here] - 0.12, 0.75), (middle - 0.7, 1.95), ACCENT)
    say(axes, middle - 0.95, 1.5, "x̂: what the stage gets\nin the half-pruned model", ha="right", fontsize=7.5)
    arrow(axes, (middle + 0.1, 1.95), (middle + 0.1, 1.05))
    say(axes, middle + 0.25, 1.5, "new weights", ha="left", fontsize=7.5)
    say(axes, lefts[0] + (width + step) / 2, 0.22, "blue: pruned already", fontsize=7, color=DENSE)
    note = "A stage is the linears that share one input. "
    note += "All batches wait here until the stage is solved, then go on in both models."
    say(axes, 0.2, 4.65, note, ha="left")
    pyplot.savefig(HERE / "pass.svg", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams |= {"svg.hashsalt": "sparsebert", "svg.fonttype": "path"}
    flow()
    staged_pass()
