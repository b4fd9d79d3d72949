"""How long `sparsebert attack` takes with TextFooler, as a user sees it: the whole process, with a fresh ledger.

python -m bench.attack_times TASK=DIR … [--workers N …] [--json] [--markdown FILE]
TASK: sst2, agnews or imdb; DIR: a model that was fine-tuned on it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench import harness


class Size(NamedTuple):
    """Examples, and the seconds that they may take a dense MiniLM on two cores."""

    n: int
    goal_s: int


SIZES = {"sst2": Size(872, 60), "agnews": Size(500, 240), "imdb": Size(100, 600)}
COLUMNS = {
    "task": "", "model": "", "workers": "d", "n": "d", "seconds": ".0f", "goal_s": "d", "ms_a_query": ".2f",
    "queries": ".1f", "acc": ".3f", "aua": ".3f", "capped": "d",
}  # fmt: skip
NOTES = (
    "`sparsebert attack` with TextFooler and the packaged resources, on a random subset of n examples (of sst2 all), "
    "once. `seconds`: the whole process, from its start. `goal_s`: for a dense model on two cores. `queries`: texts "
    "asked per attacked example; `ms_a_query`: seconds over all of them, the sentence encoder's texts not counted. "
    "`capped`: examples that took more than a minute, which end as not fooled."
)


def attack(task: str, model: str, workers: int) -> harness.Row:
    n, goal = SIZES[task]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [
                sys.executable, "-m", "sparsebert", "attack", model, "--task", task, "--attack", "textfooler", "--n",
                str(n), "--workers", str(workers), "--ledger", str(Path(folder) / "ledger.sqlite"), "--json",
            ],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    asked = found["queries"] * round(found["acc"] * found["n"])
    return {
        "task": task, "model": model, "workers": workers, "n": found["n"], "seconds": seconds, "goal_s": goal,
        "ms_a_query": 1e3 * seconds / asked, "queries": found["queries"], "acc": found["acc"], "aua": found["aua"],
        "capped": found["capped"], "variant": found["variant"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="TASK=DIR", help="tasks sst2, agnews, imdb, and their models")
    parser.add_argument("--workers", nargs="+", type=int, default=[1], help="numbers of processes (default 1)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    pairs = [model.partition("=")[::2] for model in args.models]
    if wrong := [task for task, _ in pairs if task not in SIZES]:
        parser.error(f"models must be TASK=DIR with a task of {', '.join(SIZES)}, got task {wrong[0]!r}")
    rows = []
    for task, model in pairs:
        for workers in args.workers:
            rows.append(attack(task, model, workers))
            print(f"{task}, {model}, {workers} workers: {rows[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    harness.report("How long an attack takes", rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
