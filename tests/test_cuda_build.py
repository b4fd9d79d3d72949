"""The CUDA kernels as nvcc compiles them, without a GPU: no warning, and the registers of the committed table."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, require

from bench import cuda_resources
from bench.tables import RESULTS

PAGE = RESULTS / "cuda_resources.md"
TARGETS = {"sm_80", "sm_90a"}


@pytest.fixture
def nvcc() -> str:
    found = cuda_resources.compiler()
    if found is None:
        require("nvcc", "nvcc is neither on the PATH nor in /usr/local/cuda")
    return found


def committed() -> list[dict]:
    """The rows of the committed table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    names, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [
        {
            name: int(cell) if cuda_resources.COLUMNS[name] == "d" else cell
            for name, cell in zip(names, row, strict=True)
        }
        for row in rows
    ]


@pytest.mark.parametrize("op", cuda_resources.ops())
def test_an_op_compiles_without_a_warning_into_what_the_table_says(nvcc, op):
    compiled = cuda_resources.compile_op(op, nvcc)
    assert compiled.remarks == []
    assert {row["target"] for row in compiled.rows} == TARGETS
    assert all(row["spilled_bytes"] == row["stack_bytes"] == 0 for row in compiled.rows)
    wanted = [row for row in committed() if row["op"] == op]
    if f"nvcc {cuda_resources.release(nvcc)}." not in PAGE.read_text():
        # Another compiler may need other registers. What a block shares is the code's own choice.
        for row in (*compiled.rows, *wanted):
            del row["registers"]
    assert compiled.rows == wanted, "python -m bench.cuda_resources --markdown bench/results/cuda_resources.md"


def test_the_table_has_all_kernels_and_none_that_spills():
    rows = committed()
    assert {row["op"] for row in rows} == set(cuda_resources.ops())
    for op in cuda_resources.ops():
        kernels = re.findall(r"(\w+_kernel)\(\w+Job", (ROOT / "csrc" / "cuda" / f"{op}.cu").read_text())
        assert {row["kernel"].partition("<")[0] for row in rows if row["op"] == op} == set(kernels) != set()
    assert all(row["spilled_bytes"] == row["stack_bytes"] == 0 for row in rows)


def test_what_nvcc_complains_of_is_a_remark(nvcc, tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    (folder / "bad.cu").write_text("__global__ void bad_kernel(int* to) { int unused = 3; *to = missing; }\n")
    monkeypatch.setattr(cuda_resources, "ROOT", tmp_path)
    remarks = cuda_resources.compile_op("bad", nvcc).remarks
    assert any("error" in remark for remark in remarks) and remarks[-1] == "nvcc ended with 2"


def test_a_kernel_that_spills_is_read_as_such():
    said = (
        "ptxas info    : Compiling entry function '_Z1kPi' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1kPi\n"
        "    88 bytes stack frame, 130 bytes spill stores, 220 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 88 bytes cumulative stack size, 1040 bytes smem\n"
        "ptxas info    : Compiling entry function '_Z1kPi' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 18 registers\n"
    )
    spilled, clean = cuda_resources.rows_of("op", said)
    assert (spilled["registers"], spilled["spilled_bytes"], spilled["stack_bytes"], spilled["shared_bytes"]) == (
        128, 350, 88, 1040,
    )  # fmt: skip
    assert (clean["target"], clean["registers"], clean["spilled_bytes"], clean["shared_bytes"]) == ("sm_90a", 18, 0, 0)


@pytest.mark.parametrize("variable", ["", "/no/such/compiler"])
def test_without_nvcc_only_the_core_is_built(monkeypatch, variable):
    monkeypatch.setenv("NVCC", variable)
    assert cuda_resources.compiler() is None
    core = cuda_resources.setup()["core"]
    assert core.sources and not any("cuda" in source for source in core.sources + core.depends)
