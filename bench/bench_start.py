"""How long the command line takes to answer, whole processes in turn.

python -m bench.bench_start [--rounds 15] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench import harness
from sparsebert.engine.measure import interleave

COMMANDS = {
    "python alone": ["-c", "pass"],
    "sparsebert --help": ["-m", "sparsebert", "--help"],
    "sparsebert prune --help": ["-m", "sparsebert", "prune", "--help"],
    "import sparsebert.engine": ["-c", "import sparsebert.engine"],
}
COLUMNS = {"command": "", "median_ms": ".0f", "min_ms": ".0f", "p99_ms": ".0f"}
NOTES = "Wall time of a whole process, the commands taking turns. The goal for --help is 500 ms."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    def run(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    timings = interleave({name: partial(run, arguments) for name, arguments in COMMANDS.items()}, args.rounds)
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
