"""How much pruning, training and `Engine.logits` slow down beside one and two busy processes.

python -m bench.bench_neighbour [--layers 1] [--calibration-tokens 4000] [--steps 40] [--rounds 3] [--busy 1 2]
                                [--spinning] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench import harness
from sparsebert.ops import _dispatch

COLUMNS = {
    "work": "", "busy": "d", "seconds": ".2f", "times_quiet": ".2f", "fair": ".2f", "over_fair": ".2f", "spread": ".0%",
}  # fmt: skip
NOTES = (
    "A model of MiniLM's shape with random weights. `prune`: `sparsebert prune` with its default method; `train`: "
    "`sparsebert train`, some steps; `logits`: `Engine.logits` on batches of 32 sentences. Start and imports are not "
    "counted. Each runs on all cores, alone and beside `busy` processes that never wait, one after the other. "
    "`times_quiet` is the median over rounds of its time over its time alone in the same round; `fair` is "
    "`times_quiet` if the machine were shared equally by thread; `over_fair` is `times_quiet` over `fair`. The goal is "
    "at most 3."
)
LOGITS = """
import json, sys, time
from sparsebert import data
from sparsebert.engine import Engine

engine, texts = Engine.load(sys.argv[1]), data.load(data.get_task("mr"), "test", limit=256).texts
start = time.perf_counter()
for _ in range(int(sys.argv[2])):
    for at in range(0, len(texts), 32):
        engine.logits(texts[at : at + 32], truncate=True)
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
# Prints a line once it has started. Ends when its standard input is closed, so that no process is left behind.
BUSY = """
import os, sys, threading

threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print(flush=True)
while True:
    pass
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Runs `count` other processes that never wait."""
    started = [
        subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        for process in started:
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.stdin.close()
            process.wait()


def model_of(layers: int, folder: Path) -> Path:
    """A model directory of MiniLM's shape with random weights."""
    import transformers

    from sparsebert import checkpoint
    from sparsebert.cli.timing import MINILM

    transformers.logging.disable_progress_bar()
    config = transformers.BertConfig(**MINILM | {"num_hidden_layers": layers}, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.resolve("minilm"), local_files_only=True)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def works(args: argparse.Namespace, model: Path) -> dict[str, list[str]]:
    """Name -> the command without its output."""
    task = ["--task", "mr", "--json"]
    tokens = ["--calibration-tokens", str(args.calibration_tokens)]
    return {
        "prune": ["-m", "sparsebert", "prune", str(model), *task, *tokens],
        "train": ["-m", "sparsebert", "train", str(model), *task, "--steps", str(args.steps)],
        "logits": ["-c", LOGITS, str(model), str(args.repeats)],
    }


def seconds(command: list[str], folder: Path, spinning: bool) -> float:
    """The seconds that one run reports."""
    # As a user runs it: without what this process or its caller has set for torch.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"GOMP_SPINCOUNT": "300000"} if spinning else {}  # libgomp's own default
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = ["-o", f"{place}/out"] if command[0] == "-m" else []
        done = subprocess.run([sys.executable, *command, *output], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def measure(args: argparse.Namespace) -> list[harness.Row]:
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = works(args, model_of(args.layers, folder / "model"))
        for _ in range(args.rounds):
            for busy in (0, *args.busy):
                for work, command in commands.items():
                    with neighbours(busy):
                        found.setdefault((work, busy), []).append(seconds(command, folder, args.spinning))
    cores, rows = _dispatch.cores(), []
    for (work, busy), times in sorted(found.items(), key=lambda item: (list(commands).index(item[0][0]), item[0][1])):
        over = float(np.median(np.array(times) / found[work, 0]))
        fair = (cores + busy) / cores
        spread = float(np.subtract(*np.quantile(times, (0.75, 0.25))) / np.median(times))
        rows.append(
            {"work": work, "busy": busy, "seconds": float(np.median(times)), "times_quiet": over, "fair": fair,
             "over_fair": over / fair, "spread": spread}
        )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--calibration-tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=40, help="steps of training")
    parser.add_argument("--repeats", type=int, default=10, help="times that 256 sentences are classified")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="*", default=[1, 2], help="numbers of busy processes")
    parser.add_argument("--spinning", action="store_true", help="let torch's threads spin, as they do by default")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    harness.report("Beside a neighbour", measure(args), COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
