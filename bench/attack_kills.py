"""What an attack that is killed loses: the same attack, killed with SIGKILL at random moments, beside one that is not.

python -m bench.attack_kills MODEL [--task sst2] [--attack textfooler] [--n 200] [--kills 20] [--workers 1,4] [--json]

The process that is killed is the command itself; its workers have to notice. It is killed after random numbers of
examples, drawn by --seed, and begun again with the same command until all are done.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench import harness
from sparsebert.cli import main as command
from sparsebert.jobs import ledger
from sparsebert.robustness.attacks import crew, plan
from sparsebert.robustness.attacks.stored import stored

LOG = "SPARSEBERT_BENCH_ENDED"  # environment variable: the file to which processes write the examples that have ended
COLUMNS = {
    "workers": "d", "examples": "d", "kills": "d", "lost": "d", "most_at_once": "d", "rows": "", "seconds": ".0f",
    "unkilled_s": ".0f",
}  # fmt: skip
NOTES = (
    "`lost`: examples that had ended before a kill and were in no row after it, over all kills, and `most_at_once`, at "
    "one kill. `rows`: whether the table of examples is that of the run that was not killed, the seconds aside. "
    "`seconds`: of all processes, each of which first loads the models; `unkilled_s`: of the one that was not killed."
)
LEASE = 2.0  # seconds after which the claims of a killed process end, in place of a minute


def attacked(*arguments):
    """`plan.attacked`, with a line in the log for each example that ends."""
    log = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for ended in plan.attacked(*arguments):
        if ended is not None:
            os.write(log, f"{ended[0]}\n".encode())
        yield ended
    os.close(log)


if LOG in os.environ:  # a process that attacks, or a worker of it
    crew.attacked, ledger.LEASE = attacked, LEASE


def ended(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def attack(folder: Path, arguments: list[str], after: int | None) -> float:
    """Runs the command in a process, which is killed once so many examples have ended. Returns its seconds."""
    log = folder / "ended"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.attack_kills", "--attack-with", *arguments],
        env=os.environ | {LOG: str(log)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        if after is not None and len(set(ended(log))) >= after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    said = process.communicate()[1]  # ends with the last worker, too
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the attack failed: {said.splitlines()[-1] if said else process.returncode}")
    return time.perf_counter() - start


def rows_of(path: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in pq.read_table(path).to_pylist()
    ]


def killed(arguments: list[str], workers: int, kills: int, seed: int) -> harness.Row:
    """The row of one number of workers."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as torn:
        flags = {
            folder: [
                *arguments,
                "--workers",
                str(workers),
                "--ledger",
                f"{folder}/l.sqlite",
                "-o",
                f"{folder}/r.parquet",
            ]
            for folder in (whole, torn)
        }
        unkilled = attack(Path(whole), flags[whole], None)
        wanted = rows_of(Path(whole) / "r.parquet")
        at = np.random.default_rng(seed).choice(np.arange(1, len(wanted)), min(kills, len(wanted) - 1), replace=False)
        before, lost, seconds, log = 0, [], 0.0, Path(torn) / "ended"
        for after in sorted(map(int, at)):
            seconds += attack(Path(torn), flags[torn], after)
            lines = ended(log)
            kept = {unit["inputs"]["text"] for unit in stored(Path(torn) / "l.sqlite")}
            lost.append(sum(wanted[int(line)]["original"] not in kept for line in set(lines[before:])))
            before = len(lines)
            print(f"{workers} workers: killed after {after} examples", file=sys.stderr, flush=True)
        seconds += attack(Path(torn), flags[torn], None)
        return {
            "workers": workers, "examples": len(wanted), "kills": len(lost), "lost": sum(lost),
            "most_at_once": max(lost), "rows": "equal" if rows_of(Path(torn) / "r.parquet") == wanted else "DIFFER",
            "seconds": seconds, "unkilled_s": unkilled,
        }  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--attack-with"]:
        return command(["attack", *sys.argv[2:]])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of a classifier")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--attack", default="textfooler")
    parser.add_argument("--n", type=int, default=200, help="examples (default 200)")
    parser.add_argument("--kills", type=int, default=20, help="kills per number of workers (default 20)")
    parser.add_argument("--workers", default="1,4", help="numbers of worker processes, with commas (default 1,4)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    arguments = [
        str(args.model), "--task", args.task, "--attack", args.attack, "--n", str(args.n), "--overwrite", "--json"
    ]  # fmt: skip
    rows = [killed(arguments, workers, args.kills, args.seed) for workers in map(int, args.workers.split(","))]
    harness.report(f"{args.attack} killed on {args.task}", rows, COLUMNS, NOTES, args.markdown)
    return 0 if all(row["rows"] == "equal" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
