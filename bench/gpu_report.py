"""Everything that runs on a GPU, checked and then timed: each op, each form of a linear, the engine, pruning.

python -m bench.gpu_report [--output FILE] [--minutes M] [--seed N] [--reference DIR]
python -m bench.gpu_report --interpret       rehearses it on the processor; its figures are no measurements
make gpu-report      the table goes to bench/results/gpu/, named after the GPU, and gpu_report.json beside the Makefile

It exits with 0 if all is well; with 1 if a check failed, something crashed or took too long, or one of our kernels is
slower than dense; with 2 if there is no GPU to run on, or no compiled core. A goal that is missed is told, and is no
fault.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from bench import harness
from bench.gpu_sections import (
    CHECKS,
    EXCEPTION,
    FAILED,
    FAULTS,
    MISSING,
    OK,
    OVERRAN,
    Section,
    carried_out,
    fill_with_nan,
    judged,
)
from bench.harness import Clock, Row
from bench.tables import RESULTS
from sparsebert import jobs, machine
from sparsebert.errors import UnsupportedError, cut

if TYPE_CHECKING:  # main says that torch is missing
    from bench.gpu_place import Case, Place

ROOT = Path(__file__).resolve().parent.parent
BUILD_S = 150
ACCESS = re.compile(r"^=+ (Invalid .+|Misaligned .+)\n=+ +(at .+?)(?:\+0x\w+)?(?: in .+)?$", re.M)
COLUMNS = {
    "section": "", "case": "", "status": "", "ms": ".4g", "spread": ".0%", "rivals": "", "copy_share": ".0%",
    "matmul_share": ".0%", "error": ".1e", "tolerance": ".0e", "goal": "", "met": "", "why": "",
}  # fmt: skip
IN_SHORT = {"section": "", "case": "", "status": "", "ms": ".4g", "ratio": ".2f", "goal": "", "met": ""}
NOTES = (
    "GPU: {gpu}. Versions: {versions}. Random data of seed {seed}. Rows with a goal come first. `ms`: the median over "
    "rounds of the time of a call, between two CUDA events, `spread` its inter-quartile range over it. All candidates "
    "of a row take turns, on buffers that take turns too, so that no input is in L2 when it is read; of the engine and "
    "of dense BERT the token ids alone, as weights that fit stay there in use. `rivals`: their median, and the median "
    "over rounds of their time over ours with the 95 % interval by order statistics; `dense` is cuBLAS, or BERT by "
    "torch's operators. `copy_share`: the bytes that must be read and written, as a share of what a copy moves here in "
    "that time; `matmul_share`: operations on non-zeros, as a share of what a product in bf16 does. `error`: the "
    "largest difference from the reference, as a share of the largest value of the result, or for logits itself; for "
    "admm_prune and tier 1 how much the error is above the reference's. The engine and dense BERT run from token ids "
    "on the host to logits on the host, both in a CUDA graph."
)
REHEARSED = "A REHEARSAL on the processor, at small shapes: none of these figures is a measurement."


def sections() -> list[Section]:
    """In the order of their weight: the last ones are those that a slow machine leaves out."""
    from bench import gpu_checks as checks
    from bench import gpu_linears as linears
    from bench import gpu_pruning
    from bench import gpu_timings as timings

    return [
        Section("checks: gram", checks.moments, 20),
        Section("checks: topk_mask", checks.highest, 20),
        Section("checks: masked_lstsq", checks.least_squares, 30),
        Section("checks: obs_prune", checks.surgeon, 60),
        Section("checks: admm_prune", checks.multipliers, 30),
        Section("checks: masked_matmul", checks.masked, 40),
        Section("checks: sparse_matmul", checks.products, 90),
        Section("checks: attention and norms", checks.between, 40),
        Section("checks: engine", checks.encoders, 60),
        Section("costs of forms", timings.tuned, 60),
        Section("BERT-base", timings.bert_base, 150),
        Section("linear 4096", linears.large_linear, 60),
        Section("masked training", timings.training, 40),
        Section("obs_sweep", timings.sweeps, 40),
        Section("pruning", gpu_pruning.pruning, 220),
        Section("attention", timings.attentions, 30),
        Section("solvers", timings.solvers, 40),
        Section("memcheck", memcheck, 120),
        Section("linears of BERT", linears.bert_linears, 90),
    ]


def built(folder: Path = ROOT, seconds: float = BUILD_S) -> Row:
    """Builds the extensions in place if they are missing or older than their sources."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": OVERRAN, "why": f"setup.py had {seconds:.0f} s"}
    said = done.stdout + done.stderr
    # An optional extension that does not compile is a warning of setuptools.
    if done.returncode or re.search(r"building extension .* failed", said):
        errors = [line for line in said.splitlines() if re.search(r"\berror\b", line, re.I)] or said.splitlines()[-1:]
        return {"status": FAILED, "why": cut(errors[0].strip() if errors else f"setup.py ended with {done.returncode}")}
    return {"status": OK}


def sanitizer() -> str | None:
    """compute-sanitizer, if it is installed."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def memcheck(place: Place) -> Iterator[Case]:
    """The checks of small shapes under compute-sanitizer, which finds what is read and written out of bounds."""
    from bench.gpu_place import Case

    yield Case("small checks", partial(_memcheck, place))


def _memcheck(place: Place) -> Row:
    if place.rehearsal:
        raise UnsupportedError("memcheck needs a GPU", fix="run it on one")
    tool = sanitizer()
    if tool is None:
        raise UnsupportedError("compute-sanitizer is not installed", fix="it is a part of the CUDA toolkit")
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-m", "bench.gpu_report"]
    # Torch would otherwise take memory in large pieces, in which a tensor's end is no bound.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, "--checks", "--seed", str(place.seed)], cwd=ROOT, capture_output=True, text=True, env=env
    )
    return memcheck_row(done.stdout + done.stderr, done.returncode)


def memcheck_row(said: str, code: int) -> Row:
    """The row of what compute-sanitizer said and of its exit code, which is that of the checks. Raises
    harness.WrongOutput for errors that it found, UnsupportedError if it does not run on this machine.
    """
    if "Device not supported" in said:  # by sandboxes that pass on a GPU
        raise UnsupportedError("compute-sanitizer says that it does not support this device", fix="run it elsewhere")
    summary = re.search(r"^=+ ERROR SUMMARY: (\d+) errors?", said, re.M)
    if summary is None:
        lines = [line for line in said.splitlines() if line.strip()] or ["nothing"]
        return {"status": FAILED, "why": cut(f"compute-sanitizer gave no summary, it said: {lines[-1]}")}
    if int(summary[1]):
        kinds = Counter(f"{kind.strip()} {at.strip()}" for kind, at in ACCESS.findall(said))
        told = ", ".join(f"{kind} ({count}x)" for kind, count in kinds.items()) or "see its output"
        raise harness.WrongOutput(f"{summary[1]} errors: {told}")
    if code:
        faults = [line for line in said.splitlines() if EXCEPTION.match(line)]
        return {"status": FAILED, "why": cut(faults[-1] if faults else f"the checks ended with {code}")}
    return {}


def check_here(place: Place) -> int:
    """Runs all checks in this process, for compute-sanitizer."""
    from sparsebert.engine import cuda

    fill_with_nan()
    faults = 0
    # A CUDA graph takes memory from torch's cache, which _memcheck turns off: the engine then launches its kernels.
    with mock.patch.object(cuda, "Graphs", lambda: None):
        for section in sections():
            for case in section.cases(place) if section.name.startswith(CHECKS) else ():
                row = judged(place, case.run)
                if row["status"] in FAULTS:
                    print(f"Error: {case.name}: {row['why']}", flush=True)
                    faults += 1
    return 1 if faults else 0


def every_row(chosen: Sequence[Section], place: Place, clock: Clock) -> list[Row]:
    """The rows of all sections. One for which no time is left has a row that says so."""
    rows: list[Row] = []
    for section in chosen:
        clock.say(section.name)
        if clock.left <= 0:
            why = f"no time was left of {clock.minutes:g} minutes"
            rows.append({"section": section.name, "case": "", "status": OVERRAN, "why": why})
            continue
        for row in carried_out(section, place, min(section.seconds, clock.left)):
            rows.append(row)
            if row["status"] != OK:
                clock.say(f"{row['case']}: {row['status']}, {row.get('why', '')}")
    return rows


def exit_code(rows: Sequence[Row]) -> int:
    return 1 if any(row["status"] in FAULTS for row in rows) else 0


def told(place: Place, rows: list[Row], output: Path | None) -> None:
    """Prints the rows, and writes the table and gpu_report.json, unless they are a rehearsal's without an output."""
    gpu, why = rows[0].get("gpu", "a GPU"), rows[0].get("why", "")
    versions = ", ".join(f"{name} {machine.version_of(name)}" for name in ("torch", "triton", "transformers"))
    notes = NOTES.format(gpu=f"{gpu}, {why}", versions=versions, seed=place.seed)
    title, page = f"The kernels and the engine on {gpu}", output
    if place.rehearsal:
        title, notes = REHEARSED, f"**{REHEARSED}** {notes}"
    elif page is None:
        page = RESULTS / "gpu" / f"{harness.file_name(gpu)}.md"
    harness.report(title, rows, IN_SHORT, notes, None)
    if page is not None:
        jobs.write(page, harness.markdown(title, sorted(rows, key=lambda row: "goal" not in row), COLUMNS, notes))
        about = {"machine": machine.card(), "command": harness.command(), "gpu": gpu, "seed": place.seed}
        document = about | {"rehearsal": place.rehearsal, "rows": rows}
        beside = (Path() if output is None else page.parent) / "gpu_report.json"
        jobs.write(beside, json.dumps(document, indent=1) + "\n")
        print(f"written: {os.path.relpath(page)}, {os.path.relpath(beside)}", file=sys.stderr)
    counts = Counter(kind for row in rows for kind in (row["status"], row.get("met")) if kind is not None)
    print(f"{len(rows)} rows: {', '.join(f'{count} {kind}' for kind, count in counts.items())}", file=sys.stderr)
    if place.rehearsal:
        print(REHEARSED, file=sys.stderr)


def report(place: Place, chosen: Sequence[Section], clock: Clock) -> list[Row] | None:
    """All rows; None without a GPU or without the compiled core, which is said on stderr."""
    from bench import gpu_timings
    from bench.gpu_place import Rates

    rows = list(carried_out(Section("GPU", gpu_timings.device, 60), place, 60))
    if rows[0]["status"] == MISSING:
        problem = rows[0]["why"].partition("; ")[0]  # it ends in what to do with an engine
        print(f"gpu_report: {problem}; --interpret rehearses the report without a GPU", file=sys.stderr)
        return None
    clock.say(f"seed {place.seed}" + (f". {REHEARSED}" if place.rehearsal else ""))
    rows += carried_out(Section("GPU", gpu_timings.rates, 60), place, 60)
    rates = {row["case"]: row["rate"] for row in rows if "rate" in row}
    if {"copy", "matmul bf16"} <= rates.keys():
        place = replace(place, rates=Rates(rates["copy"], rates["matmul bf16"]))
    if not place.rehearsal:
        clock.say("building the extensions")
        build = {"section": "build", "case": "setup.py build_ext --inplace"} | built()
        rows.append(build)
        importlib.invalidate_caches()
        if importlib.util.find_spec("sparsebert._C") is None:  # the report itself needs it, at its end
            print(f"gpu_report: the compiled core sparsebert._C cannot be built: {build.get('why')}", file=sys.stderr)
            return None
    return rows + every_row(chosen, place, clock)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="rehearse it without a GPU, at small shapes")
    parser.add_argument("--output", type=Path, help="write the table to this file, and gpu_report.json beside it")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of the random data (default: another in each run)")
    parser.add_argument("--reference", type=Path, help="folder with checkouts of IST-DASLab's OBC and sparsegpt")
    parser.add_argument("--checks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.interpret and args.output is not None and args.output.resolve().is_relative_to(RESULTS):
        parser.error("a rehearsal is no result: --output must be outside bench/results")
    if args.reference is not None:
        for file in ("OBC/trueobs.py", "sparsegpt/sparsegpt.py"):
            if not (args.reference / file).is_file():
                parser.error(f"--reference must be a folder with {file}, got {args.reference}")
    os.environ.pop("TRITON_INTERPRET", None)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in each section's
    # Asking the driver whether there is a GPU would leave a context that no fork can use; this asks the library NVML.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        import torch
        import triton  # noqa: F401

        from bench.gpu_place import Place
    except ModuleNotFoundError as error:
        print(f"gpu_report: {error.name} is not installed; pip install 'sparsebert[triton]'", file=sys.stderr)
        return 2
    if args.interpret:
        from bench.interpreter import prepare_interpreter

        prepare_interpreter()
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSEBERT_CACHE"] = f"{folder}/cache"  # costs and packed models are made anew
        place = Place(
            torch.device("cpu" if args.interpret else "cuda"), seed, Path(folder), small=args.interpret,
            judged=not args.interpret, reference=args.reference,
        )  # fmt: skip
        if args.checks:
            return check_here(replace(place, small=True))
        clock = Clock(args.minutes)
        rows = report(place, sections(), clock)
        if rows is None:
            return 2
        told(place, rows, args.output)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
