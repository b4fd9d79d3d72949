"""obs_sweep's Triton kernel: interpreted on the CPU, compiled for sm_90 without a GPU, and run on a GPU if there is
one. Triton reads TRITON_INTERPRET when it is first imported, so the first two run in separate processes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import require
from triton_runs import compiled_by, interpreted_by, usage_on_sm_90

from sparsebert import patterns
from sparsebert.errors import UnsupportedError
from sparsebert.ops.obs_prune import _inverse_factor, obs_sweep_ref


class Case(NamedTuple):
    pattern: str
    sparsity: float
    rows: int
    n_in: int
    block: int
    ties: bool = False

    def __str__(self) -> str:
        return f"{self.pattern}-{self.sparsity}-{self.rows}x{self.n_in}-block{self.block}" + "-ties" * self.ties


# Programs take 8 rows, or the V of V:N:M. 67 and 140 inputs leave a ragged last block, 11, 13 and 9 rows a ragged last
# program.
CASES = [
    Case("unstructured", 0.7, 11, 67, 32),
    Case("unstructured", 0.875, 13, 140, 128),
    Case("unstructured", 0.5, 8, 60, 20),
    Case("unstructured", 0.0, 5, 20, 128),
    Case("unstructured", 0.0, 1, 1, 128),
    Case("unstructured", 0.5, 9, 40, 16, ties=True),
    Case("2:4", 0.5, 11, 140, 128),
    Case("2:4", 0.5, 7, 32, 16, ties=True),
    Case("4:8", 0.5, 8, 72, 20),
    Case("3:6", 0.5, 9, 66, 32),
    Case("32:64", 0.5, 9, 192, 128),
    Case("8x1", 0.6, 24, 50, 16),
    Case("8x1", 0.5, 16, 32, 32, ties=True),
    Case("16:2:8", 0.75, 32, 72, 32),
    Case("6:2:8", 0.75, 18, 40, 32),
]
DTYPES = ("float64", "float32")
# A thread may hold half as many float64 values as float32 values, so both are compiled.
COMPILED = ("unstructured", "2:4", "32:64", "16:2:8", "64:2:16", "128:2:8")
# Weights are about 1. Sums have at most 192 products, in another order; errors grow with H's condition, here about 10.
TOLERANCE = {"torch.float64": 1e-12, "torch.float32": 2e-5}


def problem(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """W* [rows, n_in] and H. With ties, scores are small integers, many of them equal, and H the identity."""
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.n_in)
    if case.ties:
        weight = torch.randint(1, 4, (case.rows, case.n_in), generator=generator, dtype=torch.float64)
        return weight, torch.eye(case.n_in, dtype=torch.float64)
    x = torch.randn(3 * case.n_in, case.n_in, generator=generator, dtype=torch.float64)
    h = x.T @ x / len(x) + 0.1 * torch.eye(case.n_in, dtype=torch.float64)
    return torch.randn(case.rows, case.n_in, generator=generator, dtype=torch.float64), h


def on_mask(weight: torch.Tensor, u: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """The sweep in float64, given the mask of removed weights."""
    w = weight.clone()
    for j in range(w.shape[1]):
        w[:, j:] -= torch.outer(torch.where(gone[:, j], w[:, j] / u[j, j], 0.0), u[j, j:])
    return w.masked_fill(gone, 0.0)


def assert_swept(case: Case, got: torch.Tensor) -> None:
    """`got` is the reference's result in float64 or with ties; else it has as many zeros and is right for its mask."""
    weight, h = problem(case)
    expected = obs_sweep_ref(weight, h, patterns.parse(case.pattern), case.sparsity, block=case.block)
    gone = got == 0
    if got.dtype == torch.float32 and not case.ties:
        assert gone.sum() == (expected == 0).sum()
        expected = on_mask(weight, _inverse_factor(h), gone)
    else:
        assert torch.equal(gone, expected == 0)
    assert (got - expected).abs().max() <= TOLERANCE[str(got.dtype)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Results of the interpreted kernel for every case."""
    return interpreted_by(__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Resources that the kernel uses on a GPU of compute capability 9.0, by pattern and dtype."""
    return compiled_by(__file__, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_interpreted_kernel_sweeps_as_the_reference(interpreted, case: Case, dtype: str):
    got = interpreted[f"{case}/{dtype}"]
    assert str(got.dtype) == f"torch.{dtype}"
    assert_swept(case, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu_sweeps_as_the_reference(case: Case, dtype: str):
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")
    from sparsebert.kernels.obs_prune import obs_sweep

    weight, h = problem(case)
    weight, u = (part.to("cuda", getattr(torch, dtype)) for part in (weight, _inverse_factor(h)))
    assert_swept(case, obs_sweep(weight, u, patterns.parse(case.pattern), case.sparsity, case.block).cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", COMPILED)
def test_the_kernel_compiles_for_sm_90_and_keeps_all_in_registers(compiled, pattern: str, dtype: str):
    usage = compiled[f"{pattern}/{dtype}"]
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 255
    assert usage["SHARED"] <= 48 * 1024


def test_float32_is_refused_while_matmuls_may_round_to_tf32():
    if importlib.util.find_spec("triton") is None:
        require("triton", "triton is not installed")
    from sparsebert.kernels.obs_prune import obs_sweep

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(UnsupportedError, match="'tf32'"):
            obs_sweep(torch.ones(1, 4), torch.eye(4), patterns.parse("2:4"), 0.5)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def interpret(file: str) -> None:
    from safetensors.torch import save_file

    from sparsebert.kernels.obs_prune import obs_sweep

    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    swept = {}
    for case in CASES:
        weight, h = problem(case)
        u = _inverse_factor(h)
        u += torch.full_like(u, float("nan")).tril(-1)  # only i <= j is read
        for dtype in DTYPES:
            arguments = (part.to(getattr(torch, dtype)) for part in (weight, u))
            swept[f"{case}/{dtype}"] = obs_sweep(*arguments, patterns.parse(case.pattern), case.sparsity, case.block)
    save_file(swept, file)


def compile_all(file: str) -> None:
    from sparsebert.kernels import obs_prune

    kernel, usage = obs_prune._sweep_block, {}
    for pattern in COMPILED:
        _, constants = obs_prune._plan(patterns.parse(pattern), 128)
        options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        if constants["REACH"]:
            constants["gone_ptr"] = None
        for dtype in DTYPES:
            pointers = {name: "*fp" + dtype.removeprefix("float") for name in kernel.arg_names if name.endswith("ptr")}
            types = dict.fromkeys(kernel.arg_names, "i32") | pointers | {"gone_ptr": "*i1"}
            binary = Path(file).with_suffix(".cubin")
            usage[f"{pattern}/{dtype}"] = usage_on_sm_90(kernel, types, constants, options, binary)
    Path(file).write_text(json.dumps(usage))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](sys.argv[2])
