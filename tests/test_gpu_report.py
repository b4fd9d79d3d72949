"""bench/gpu_report: its rehearsal from end to end, and what it says of kernels that fail in each way."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from triton_runs import run_here

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu_report, harness
from bench.gpu_sections import CHECKS, CRASHED, FAILED, MISSING, OK, OVERRAN, SLOWER, WRONG, Section, judged
from bench.tables import RESULTS, head
from sparsebert.engine.cuda_forms import FORMS

# What the issue of the GPU's kernels asks for.
GOALS = {
    "BERT-base": {"ms ≤ 0.15, ratio ≥ 2", "ms ≤ 0.8"},
    "linear 4096": {"ratio ≥ 1.3", "ratio ≥ 3"},
    "masked training": {"ratio ≥ 1.3"},
    "obs_sweep": {"ratio ≥ 15"},
    "pruning": {"seconds ≤ 30", "seconds ≤ 90"},
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.gpu_report", *arguments]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("rehearsal")
    before = sorted(RESULTS.rglob("*"))
    done = run("--interpret", "--seed", "7", "--output", str(folder / "page.md"))
    assert sorted(RESULTS.rglob("*")) == before
    document = json.loads((folder / "gpu_report.json").read_text())
    return SimpleNamespace(done=done, page=(folder / "page.md").read_text(), document=document, rows=document["rows"])


def test_a_rehearsal_runs_all_sections_without_a_fault(rehearsal):
    assert [row for row in rehearsal.rows if row["status"] not in (OK, MISSING)] == []
    assert rehearsal.done.returncode == 0, rehearsal.done.stderr
    ran = dict.fromkeys(row["section"] for row in rehearsal.rows)
    assert list(ran) == ["GPU", *(section.name for section in gpu_report.sections())]


def test_a_rehearsal_checks_every_kernel(rehearsal):
    checked = {row["case"] for row in rehearsal.rows if row["section"].startswith("checks") and row["status"] == OK}
    for op in (
        "gram", "topk_mask", "pattern_mask", "masked_lstsq", "obs_prune", "obs_sweep", "admm_prune",
        "masked_matmul, op", "masked_matmul, kernel", "attention", "add_norm and embed", "engine",
        *(f"sparse_matmul {name}" for name, form in FORMS.items() if form.missing(torch.device("cpu")) is None),
    ):  # fmt: skip
        assert any(case.startswith(f"{op} ") for case in checked), op
    assert all(row["error"] <= row["tolerance"] for row in rehearsal.rows if "error" in row)


def test_what_is_missing_says_why(rehearsal):
    missing = [row for row in rehearsal.rows if row["status"] == MISSING]
    assert missing and all(row["why"] for row in missing)
    assert {row["case"] for row in missing if row["section"] == "costs of forms"} == {"doctor --tune"}
    assert [row["status"] for row in rehearsal.rows if row["section"] == "memcheck"] == [MISSING]


def test_the_goals_are_those_of_the_issue_and_a_rehearsal_neither_meets_nor_misses_one(rehearsal):
    told = {row["section"]: set() for row in rehearsal.rows}
    for row in rehearsal.rows:
        if "goal" in row:
            told[row["section"]].add(row["goal"])
            assert row["met"] == "unmeasured" and row["ms"] > 0
    for section, goals in GOALS.items():
        missing = {row["case"] for row in rehearsal.rows if row["section"] == section and row["status"] == MISSING}
        assert told[section] == goals or missing, section
    assert "met" not in {row.get("met") for row in rehearsal.rows}


def test_a_rehearsal_says_that_it_measures_nothing(rehearsal):
    assert gpu_report.REHEARSED in rehearsal.done.stderr.splitlines()[-1]
    assert gpu_report.REHEARSED in rehearsal.page and gpu_report.REHEARSED in rehearsal.done.stdout
    assert rehearsal.document["rehearsal"] is True and rehearsal.document["seed"] == 7
    assert "seed 7" in rehearsal.done.stderr and "seed 7." in rehearsal.page
    assert head(rehearsal.page)["command"].startswith("python -m bench.gpu_report --interpret --seed 7")


def test_a_rehearsal_writes_no_result():
    done = run("--interpret", "--output", str(RESULTS / "gpu" / "none.md"))
    assert done.returncode == 2 and "--output must be outside bench/results" in done.stderr


def test_a_reference_that_is_not_there_is_refused_at_once(tmp_path):
    done = run("--reference", str(tmp_path))
    assert done.returncode == 2 and "--reference must be a folder with OBC/trueobs.py" in done.stderr


def test_without_a_gpu_one_line_says_so():
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_report: device cuda needs") and line.endswith(
        "--interpret rehearses the report without a GPU"
    )


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_without_torch_or_triton_one_line_says_so(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from bench import gpu_report; sys.exit(gpu_report.main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"gpu_report: {missing} is not installed; pip install 'sparsebert[triton]'\n"


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> SimpleNamespace:
    file = tmp_path_factory.mktemp("faults") / "rows.json"
    run_here(__file__, "faults", file, TRITON_INTERPRET="1")
    found = json.loads(file.read_text())
    of = {row["section"]: [] for row in found["rows"]}
    for row in found["rows"]:
        of[row["section"]].append(row)
    return SimpleNamespace(**found, of=of)


def test_a_kernel_that_raises_is_a_row_and_the_others_run(faults):
    rows = faults.of["raises"]
    assert [row["status"] for row in rows] == [OK, FAILED, OK, FAILED]
    assert all(row["why"] == "RuntimeError: CUDA error: an illegal memory access" for row in rows[1::2])
    assert "kernel" in rows[1]["case"] and "op" in rows[2]["case"]


def test_a_kernel_that_is_wrong_is_a_row(faults):
    (row,) = faults.of["wrong"]
    assert row["status"] == WRONG and "is off by" in row["why"]


def test_a_kernel_that_ends_the_process_is_a_row_and_the_next_case_runs(faults):
    rows = faults.of["crashes"]
    assert [row["status"] for row in rows] == [CRASHED, OK]
    assert rows[0]["why"].startswith("SIGABRT: ") and "the last words" in rows[0]["why"]


def test_a_section_that_takes_too_long_is_ended(faults):
    rows = faults.of["overruns"]
    assert [row["status"] for row in rows] == [OVERRAN] and rows[0]["why"].startswith("overruns had 4 s; ")
    assert rows[0]["case"].startswith("attention")
    assert faults.sleeping == [], "what the section has started ends with it"


def test_a_kernel_that_is_slower_is_a_row(faults):
    (row,) = faults.of["slower"]
    assert row["status"] == SLOWER and row["ratio"] < 1 and row["met"] == "missed"
    assert row["why"].endswith("times as fast as eager")


def test_a_section_that_fails_itself_is_a_row(faults):
    (row,) = faults.of["broken"]
    assert (row["status"], row["case"]) == (FAILED, "") and row["why"].startswith("ZeroDivisionError: ")


def test_sections_after_the_faults_still_run(faults):
    assert [row["status"] for row in faults.of["healthy"]] == [OK]
    assert faults.codes == {name: 1 for name in [*faults.of, "here"]} | {"healthy": 0}


def test_the_last_sections_are_left_out_if_no_time_is_left(capsys):
    clock = harness.Clock(0)
    rows = gpu_report.every_row([Section("a", None, 10)], None, clock)
    assert rows == [{"section": "a", "case": "", "status": OVERRAN, "why": "no time was left of 0 minutes"}]


# --- the tools --------------------------------------------------------------------------------------------------------

CLEAN = """========= COMPUTE-SANITIZER
{"machine": {}}
========= ERROR SUMMARY: 0 errors
"""
READS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _product+0x2f0 in kernel.py:120
=========     by thread (5,0,0) in block (1,0,0)
=========     Address 0x7f2e is out of bounds
========= Invalid __global__ read of size 4 bytes
=========     at _product+0x2f0 in kernel.py:120
=========     by thread (6,0,0) in block (1,0,0)
========= Misaligned Shared or Local Address
=========     at masked_lstsq_kernel(double*)+0x10
========= ERROR SUMMARY: 3 errors
"""


def test_memchecks_errors_are_named_and_counted():
    assert gpu_report.memcheck_row(CLEAN, 0) == {}
    with pytest.raises(harness.WrongOutput) as error:
        gpu_report.memcheck_row(READS, 1)
    assert str(error.value) == (
        "3 errors: Invalid __global__ read of size 4 bytes at _product (2x), "
        "Misaligned Shared or Local Address at masked_lstsq_kernel(double*) (1x)"
    )
    with pytest.raises(harness.WrongOutput, match="1 errors: see its output"):
        gpu_report.memcheck_row("========= something new\n========= ERROR SUMMARY: 1 error\n", 0)


def test_memcheck_without_a_summary_or_of_checks_that_fail_is_no_success():
    why = gpu_report.memcheck_row("", 0)["why"]
    assert why == "compute-sanitizer gave no summary, it said: nothing"
    row = gpu_report.memcheck_row("========= Error: cannot attach\n", 255)
    assert row["status"] == FAILED and row["why"].endswith("it said: ========= Error: cannot attach")
    row = gpu_report.memcheck_row(f"Error: gram (1, 1, 1): off\n{CLEAN}", 1)
    assert row == {"status": FAILED, "why": "Error: gram (1, 1, 1): off"}
    row = gpu_report.memcheck_row(f"Traceback\n  x\ntorch.AcceleratorError: CUDA error: launch\nmore\n{CLEAN}", 1)
    assert row == {"status": FAILED, "why": "torch.AcceleratorError: CUDA error: launch"}
    assert gpu_report.memcheck_row(CLEAN, 9) == {"status": FAILED, "why": "the checks ended with 9"}


def test_memcheck_on_a_machine_that_it_does_not_support_is_not_available():
    said = "========= Error: Device not supported\nError: gram (1, 1, 1): CUDA error\n"
    row = judged(SimpleNamespace(judged=True), lambda: gpu_report.memcheck_row(said, 1))
    assert row["status"] == MISSING and "does not support this device" in row["why"]


def test_memcheck_runs_the_small_checks(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/said\necho "{CLEAN}"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_report, "sanitizer", lambda: str(tool))
    gpu = SimpleNamespace(rehearsal=False, seed=3)
    (case,) = gpu_report.memcheck(gpu)
    assert case.run() == {}
    said = (tmp_path / "said").read_text()
    assert said.startswith("1 --tool memcheck") and said.endswith("-m bench.gpu_report --checks --seed 3\n")
    monkeypatch.setattr(gpu_report, "sanitizer", lambda: None)
    row = judged(gpu, case.run)
    assert row["status"] == MISSING and row["why"].startswith("compute-sanitizer is not installed")


def test_engines_capture_no_graphs_under_memcheck(monkeypatch):
    from bench.gpu_place import Case
    from sparsebert.engine import cuda

    found = []
    engine = Section(f"{CHECKS}engine", lambda place: [Case("graphs", lambda: found.append(cuda.Graphs()) or {})], 60)
    monkeypatch.setattr(gpu_report, "sections", lambda: [engine])
    monkeypatch.setattr(gpu_report, "fill_with_nan", lambda: None)
    assert gpu_report.check_here(SimpleNamespace(judged=False)) == 0
    assert found == [None]


SETUPS = {
    "print('running build_ext')": {"status": OK},
    "raise SystemExit('error: no compiler')": {"status": FAILED, "why": "error: no compiler"},
    """print('a.cu(3): error: expected a ";"')\nprint('building extension "sparsebert._cuda" failed: nvcc')""": {
        "status": FAILED, "why": 'a.cu(3): error: expected a ";"'
    },
    "import time; time.sleep(60)": {"status": OVERRAN, "why": "setup.py had 2 s"},
}  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS)
def test_a_build_that_fails_is_a_row(tmp_path, setup):
    (tmp_path / "setup.py").write_text(setup)
    assert gpu_report.built(tmp_path, 2) == SETUPS[setup]


def test_without_the_compiled_core_the_report_ends_before_its_sections(monkeypatch, capsys, tmp_path):
    from bench.gpu_place import Place

    def sections_of_the_gpu(*given):
        return [{"section": "GPU", "case": "which", "status": OK}]

    monkeypatch.setattr(gpu_report, "carried_out", sections_of_the_gpu)
    monkeypatch.setattr(gpu_report, "built", lambda: {"status": FAILED, "why": "error: no compiler"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu_report.report(Place(torch.device("cuda"), 0, tmp_path), [], harness.Clock(1)) is None
    assert capsys.readouterr().err.endswith("_C cannot be built: error: no compiler\n")


def test_any_fault_is_an_exit_code_and_a_missed_goal_is_none():
    assert gpu_report.exit_code([{"status": OK, "met": "missed"}, {"status": MISSING}]) == 0
    for fault in (WRONG, SLOWER, FAILED, CRASHED, OVERRAN):
        assert gpu_report.exit_code([{"status": OK}, {"status": fault}]) == 1


def test_a_page_is_named_after_its_gpu():
    assert harness.file_name("NVIDIA H200 (MIG 1g.18gb)") == "nvidia-h200-mig-1g-18gb"


def test_make_runs_it():
    assert "bench.gpu_report" in (ROOT / "Makefile").read_text()


# --- the clock --------------------------------------------------------------------------------------------------------


class Event:
    """A CUDA event of a GPU that has no work in flight."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: Event) -> float:
        return 1e3 * (stop.at - self.at)


def test_candidates_take_turns_on_buffers_that_do_not_fit_into_the_cache(monkeypatch, tmp_path):
    from bench.gpu_place import Place, copies, figures, timed

    place = Place(torch.device("cuda"), 0, tmp_path)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50_000_000))
    assert [copies(place, size) for size in (10_000_000, 200_000_000, 1)] == [15, 2, 64]
    called = []
    fast = [lambda i=i: called.append(("fast", i)) for i in range(3)]
    slow = [lambda: time.sleep(0.002)]
    timings = timed(place, {"fast": fast, "slow": slow}, rounds=7)
    assert {i for _, i in called} == {0, 1, 2}
    assert timings.median("slow") >= 0.002 > timings.median("fast")
    row = figures(place, timings, ours="fast", versus="slow")
    assert row["ratio"] > 1 and row["rivals"].startswith("slow 2")


def test_a_fork_begins_without_a_context_of_the_gpu():
    code = (
        "import torch\n"
        "def refuse(*given): raise SystemExit('the GPU was asked')\n"
        "torch.cuda._lazy_init = torch.cuda.get_device_properties = torch.cuda.current_device = refuse\n"
        "import bench.gpu_report as report\n"
        "report.sections()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LEAVES = ("__init__", "environment", "errors")  # what bench and kernels import at once


def test_benches_find_the_kernels_in_a_checkout_that_is_not_installed(tmp_path):
    for file in ("bench/__init__.py", "kernels/__init__.py", *(f"sparsebert/{n}.py" for n in LEAVES)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import bench, sparsebert.kernels; print(sparsebert.kernels.__file__)"
    )
    env = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(tmp_path / "kernels" / "__init__.py"), done.stderr


# --- what runs with the interpreter -----------------------------------------------------------------------------------


def raises(place):
    from bench import gpu_checks
    from sparsebert.kernels import masked_matmul

    def fault(*given):
        raise RuntimeError("CUDA error: an illegal memory access")

    masked_matmul.masked_matmul = fault
    return islice(gpu_checks.masked(place), 4)


def wrong(place):
    from bench import gpu_checks
    from sparsebert.kernels import sparse_encoder

    right = sparse_encoder.attention
    sparse_encoder.attention = lambda *given, **options: right(*given, **options).mul_(1.01)
    return islice(gpu_checks.between(place), 1)


def crashes(place):
    from bench import gpu_checks
    from sparsebert.kernels import masked_matmul

    def fault(*given):
        os.write(2, b"the last words\n")
        os.abort()

    masked_matmul.masked_matmul = fault
    return islice(gpu_checks.masked(place), 1, 3)


def overruns(place):
    from bench import gpu_checks
    from sparsebert.kernels import sparse_encoder

    sparse_encoder.attention = lambda *given, **options: subprocess.run(["sleep", "600.25"])
    return islice(gpu_checks.between(place), 3)


def slower(place):
    from bench import gpu_timings

    right = gpu_timings.masked_matmul
    gpu_timings.masked_matmul = lambda *given: (time.sleep(0.2), right(*given))[1]
    return islice(gpu_timings.training(place), 1)


def broken(place):
    yield from range(1 // 0)


def healthy(place):
    from bench import gpu_checks

    return islice(gpu_checks.highest(place), 1)


def run_faults(file: str) -> None:
    import tempfile

    from bench.gpu_place import Place
    from bench.interpreter import prepare_interpreter

    prepare_interpreter()
    gpu_report.sections()  # imported before the forks
    with tempfile.TemporaryDirectory() as folder:
        place = Place(torch.device("cpu"), 1, Path(folder), small=True)
        rows, codes = [], {}
        for cases in (raises, wrong, crashes, overruns, slower, broken, healthy):
            section = Section(cases.__name__, cases, 4 if cases is overruns else 60)
            found = gpu_report.every_row([section], place, harness.Clock(5))
            codes[section.name] = gpu_report.exit_code(found)
            rows += found
        gpu_report.sections = lambda: [Section(f"{CHECKS}{cases.__name__}", cases, 60) for cases in (healthy, wrong)]
        codes["here"] = gpu_report.check_here(place)
    sleeping = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            sleeping += [command for command in [path.read_text()] if "600.25" in command]
    Path(file).write_text(json.dumps({"rows": rows, "codes": codes, "sleeping": sleeping}))


if __name__ == "__main__":
    {"faults": run_faults}[sys.argv[1]](sys.argv[2])
