"""Registers, spills and shared memory of each CUDA kernel, as ptxas reports them. Needs nvcc and no GPU.

python -m bench.cuda_resources [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench import harness

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "op": "", "kernel": "", "target": "", "registers": "d", "spilled_bytes": "d", "stack_bytes": "d",
    "shared_bytes": "d",
}  # fmt: skip
NOTES = (
    "nvcc {nvcc}. Per thread: `registers`, `spilled_bytes` (stores and loads), `stack_bytes`. Per thread block: "
    "`shared_bytes`, without what a launch asks for. No kernel has run on a GPU yet: their speed is unmeasured. The "
    "head names a processor as in all tables; the figures do not depend on it."
)
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
)


class Compiled(NamedTuple):
    """What nvcc said of one file."""

    rows: list[harness.Row]
    remarks: list[str]  # errors, warnings and advice


def compiler() -> str | None:
    """nvcc, as setup.py finds it."""
    return setup()["nvcc"]()


def setup() -> dict:
    """The names of setup.py, without running a build."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="names")


def release(nvcc: str) -> str:
    """Its version, such as 13.0.88."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def compile_op(op: str, nvcc: str) -> Compiled:
    """Compiles csrc/cuda/OP.cu with the flags of setup.py for all targets, and keeps nothing."""
    source = ROOT / "csrc" / "cuda" / f"{op}.cu"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *setup()["CUDA_FLAGS"], "-Xptxas=-v", "-c", str(source), "-o", f"{folder}/{op}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    remarks = [line for line in said.splitlines() if re.search(r"\b(error|warning|advisory)\b", line, re.I)]
    if done.returncode:
        remarks.append(f"nvcc ended with {done.returncode}")
    return Compiled(rows_of(op, said), remarks)


def rows_of(op: str, said: str) -> list[harness.Row]:
    """One row per kernel and target of what ptxas said."""
    entries = [ENTRY.search(part) for part in re.split(r"(?=Compiling entry)", said.replace("\n", " "))]
    return sorted(
        (
            {
                "op": op, "kernel": readable(found["kernel"]), "target": found["target"],
                "registers": int(found["registers"]), "spilled_bytes": int(found["stores"]) + int(found["loads"]),
                "stack_bytes": int(found["stack"]), "shared_bytes": int(found["shared"] or 0),
            }
            for found in entries
            if found is not None
        ),
        key=lambda row: (row["kernel"], row["target"]),
    )  # fmt: skip


def readable(mangled: str) -> str:
    """masked_lstsq_kernel<true>: the kernel's name without its namespace and arguments."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.removeprefix("void ").replace("sparsebert::cuda::", "").replace("(anonymous namespace)::", "")
    return name.partition("(")[0].replace(" >", ">")


def ops() -> list[str]:
    return sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    nvcc = compiler()
    if nvcc is None:
        print("nvcc is neither on the PATH nor in /usr/local/cuda: nothing was compiled", file=sys.stderr)
        return 2
    compiled = [compile_op(op, nvcc) for op in ops()]
    for remark in (remark for one in compiled for remark in one.remarks):
        print(remark, file=sys.stderr)
    rows = [row for one in compiled for row in one.rows]
    notes = NOTES.format(nvcc=release(nvcc))
    harness.report("CUDA kernels as compiled", rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 1 if any(one.remarks for one in compiled) else 0


if __name__ == "__main__":
    sys.exit(main())
