"""How long a model takes to load, packed for the first time and from the cache, and how much memory it keeps.

python -m bench.bench_load [--models bert-base …] [--patterns unstructured …] [--sparsity S] [--rounds N] [--json]
                           [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import harness
from bench.shapes import random_directory

COLUMNS = {
    "model": "", "pattern": "", "sparsity": ".2f", "dtype": "", "first_s": ".2f", "cached_s": ".3f",
    "checkpoint_mib": ".0f", "packed_mib": ".0f", "resident_mib": ".0f", "share": ".2f",
}  # fmt: skip
NOTES = (
    "Random weights. `first_s` and `cached_s` are medians of the time of `Engine.load` in new processes, without "
    "imports. `first_s`: with an empty cache; the model is verified, packed and stored. `cached_s`: with the cache "
    "that the first load left. The files are in the system's page cache. Both loads check the golden texts. "
    "`resident_mib`: the growth of the process by the cached load, mapped pages included; `share` is that growth over "
    "the packed size. The goals for BERT-base are 3 s, 0.3 s and 1.2."
)
LOAD = """
import json, sys, time
import numpy
from sparsebert.engine import Engine

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))

before, start = resident(), time.perf_counter()
engine = Engine.load(sys.argv[1])
seconds = time.perf_counter() - start
grown = resident() - before
print(json.dumps({"seconds": seconds, "resident": grown, "dtype": engine.dtype, "density": engine.density}))
"""


def load(directory: Path, cache: Path) -> dict:
    """Loads the model in a new process. Returns the figures that this process prints."""
    environment = os.environ | {"SPARSEBERT_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(directory)], check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout)


def measure(args: argparse.Namespace) -> Iterator[harness.Row]:
    for model in args.models:
        for pattern in args.patterns:
            with tempfile.TemporaryDirectory() as folder:
                directory = random_directory(model, pattern, args.sparsity, Path(folder))
                first, cached = [], []
                for i in range(args.rounds):
                    cache = Path(folder) / f"cache-{i}"
                    first.append(load(directory, cache))
                    cached.append(load(directory, cache))
                packed = sum(path.stat().st_size for path in (cache / "packed").glob("*.safetensors"))
                resident = float(np.median([each["resident"] for each in cached]))
                yield {
                    "model": model, "pattern": pattern, "sparsity": 1 - cached[0]["density"],
                    "dtype": cached[0]["dtype"],
                    "first_s": float(np.median([each["seconds"] for each in first])),
                    "cached_s": float(np.median([each["seconds"] for each in cached])),
                    "checkpoint_mib": (directory / "model.safetensors").stat().st_size / 2**20,
                    "packed_mib": packed / 2**20, "resident_mib": resident / 2**20, "share": resident / packed,
                }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "bert-base"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "32x1"])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    harness.report("Loading", list(measure(args)), COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
