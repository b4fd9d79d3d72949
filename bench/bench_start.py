"""How long the command line takes to answer, and a program to its first logits: whole processes, run alternately.

python -m bench.bench_start [--rounds 15] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench import harness
from sparsebert.cli.timing import random_model
from sparsebert.config import BenchConfig
from sparsebert.engine.measure import interleave

FIRST = "import sys, sparsebert; sparsebert.Engine.load(sys.argv[1]).logits(['a gripping film'])"
COMMANDS = {
    "python alone": ["-c", "pass"],
    "sparsebert --help": ["-m", "sparsebert", "--help"],
    "sparsebert prune --help": ["-m", "sparsebert", "prune", "--help"],
    "import sparsebert.engine": ["-c", "import sparsebert.engine"],
    "import to the first answer": ["-c", FIRST, "MODEL"],
    "sparsebert predict": ["-m", "sparsebert", "predict", "MODEL", "a gripping film"],
}
COLUMNS = {"command": "", "median_ms": ".0f", "min_ms": ".0f", "p99_ms": ".0f"}
NOTES = (
    "Wall time of a whole process; the commands take turns. The model is a MiniLM with 87.5 % zeros at random, "
    "its packed form in the cache. Goals: 300 ms for --help, 500 ms for the first answer."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    def run(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    with tempfile.TemporaryDirectory() as folder:
        model = str(random_model(BenchConfig(random="minilm"), Path(folder)))
        commands = {name: [model if part == "MODEL" else part for part in given] for name, given in COMMANDS.items()}
        timings = interleave({name: partial(run, arguments) for name, arguments in commands.items()}, args.rounds)
    rows = []
    for name in COMMANDS:
        figures = timings.summary(name)
        rows.append(
            {"command": name, **{f"{part}_ms": figures[f"{part}_s"] * 1e3 for part in ("median", "min", "p99")}}
        )
    harness.report("Time to start", rows, COLUMNS, NOTES, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
