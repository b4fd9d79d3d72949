"""masked_matmul's Triton kernels: interpreted on the CPU, compiled for sm_90 without a GPU, and run on a GPU if there
is one. Triton reads TRITON_INTERPRET when it is first imported, so the first two run in separate processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import require
from test_masked_matmul import Case, operands, results
from triton_runs import compiled_by, interpreted_by, prepare_interpreter, usage_on_sm_90

from sparsebert.ops.masked_matmul import masked_matmul_ref

# Programs cover 64 x 64 results, and sum over 32 values at a time; the rows of a score divide the 64, or do not.
CASES = [
    Case(1, 1, 1),
    Case(5, 70, 65),
    Case(67, 33, 64),
    Case(9, 64, 31),
    Case(9, 40, 66, share=2),
    Case(35, 66, 160, share=32),
    Case(5, 20, 9, share=3),
    Case(5, 20, 200, share=100),
    Case(9, 48, 34, reach=4),
    Case(9, 72, 64, share=16, reach=8),
]
DTYPES = ("float32", "bfloat16")
# (share, reach)
COMPILED = ((1, 0), (1, 4), (32, 0), (3, 8))
# float32: sums of at most 200 products. bfloat16: weights and results are rounded by 2^-9 of their size; the
# interpreter truncates, by 2^-8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def run_kernel(case: Case, dtype: str, device: str) -> dict[str, torch.Tensor]:
    from sparsebert.kernels.masked_matmul import masked_matmul, masked_matmul_backward

    inputs, dy = operands(case, getattr(torch, dtype))
    inputs, dy = [value.to(device) for value in inputs], dy.to(device)
    found = {"y": masked_matmul(*inputs), "without_bias": masked_matmul(*inputs[:4])}
    return found | dict(
        zip(("dx", "d_weight", "d_scores"), masked_matmul_backward(dy, *inputs[:4]), strict=True),
        alone=masked_matmul_backward(dy, *inputs[:4], (False, False, True))[0],
    )


def assert_right(case: Case, dtype: str, got: dict[str, torch.Tensor]) -> None:
    inputs, dy = operands(case, getattr(torch, dtype))
    expected = results(masked_matmul_ref, inputs, dy)
    expected |= {"without_bias": expected["y"] - inputs[4].double(), "alone": expected["d_scores"]}
    for name, value in got.items():
        like_x = name in ("y", "dx", "without_bias")
        assert str(value.dtype) == (f"torch.{dtype}" if like_x else "torch.float32")
        scale = max(1.0, float(expected[name].abs().max()))
        tolerance = TOLERANCE[dtype if like_x else "float32"] * scale
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Results of the interpreted kernels for every case."""
    return interpreted_by(__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Resources that the kernels use on a GPU of compute capability 9.0."""
    return compiled_by(__file__, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_interpreted_kernels_give_the_references_results(interpreted, case: Case, dtype: str):
    prefix = f"{case}/{dtype}/"
    got = {name.removeprefix(prefix): value for name, value in interpreted.items() if name.startswith(prefix)}
    assert len(got) == 6
    assert_right(case, dtype, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_on_a_gpu_give_the_references_results(case: Case, dtype: str):
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")
    assert_right(case, dtype, {name: value.cpu() for name, value in run_kernel(case, dtype, "cuda").items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["forward", "across", "one input", "gradients"])
@pytest.mark.parametrize(("share", "reach"), COMPILED)
def test_the_kernels_compile_for_sm_90_and_spill_nothing(compiled, kernel: str, share: int, reach: int, dtype: str):
    usage = compiled[f"{kernel}/{share}/{reach}/{dtype}"]
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 255


def interpret(file: str) -> None:
    from safetensors.torch import save_file

    prepare_interpreter()
    found = {}
    for case in CASES:
        for dtype in DTYPES:
            for name, value in run_kernel(case, dtype, "cpu").items():
                found[f"{case}/{dtype}/{name}"] = value.contiguous()
    save_file(found, file)


def compile_all(file: str) -> None:
    from sparsebert.kernels import masked_matmul

    usage = {}
    for share, reach in COMPILED:
        common = {"SHARE": share, "REACH": reach, "BLOCK": masked_matmul.BLOCK}
        kernels = {
            "forward": (masked_matmul._product, common | {"ACROSS": False}),
            "across": (masked_matmul._product, common | {"ACROSS": True, "bias_ptr": None}),
            "one input": (masked_matmul._product, common | {"ACROSS": False, "n_in": 1}),  # a launch makes 1 a constant
            "gradients": (masked_matmul._gradients, common | masked_matmul._rows_plan(share)),
        }
        for name, (kernel, constants) in kernels.items():
            for dtype in DTYPES:
                own = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
                steps = {"STEP": masked_matmul.STEPS[getattr(torch, dtype)]}
                types = {
                    arg: own if arg in ("x_ptr", "dy_ptr", "out_ptr") else "*fp32" if arg.endswith("ptr") else "i32"
                    for arg in kernel.arg_names
                }
                usage[f"{name}/{share}/{reach}/{dtype}"] = usage_on_sm_90(
                    kernel,
                    types,
                    constants | steps,
                    masked_matmul.OPTIONS[getattr(torch, dtype)],
                    Path(file).with_suffix(".cubin"),
                )
    Path(file).write_text(json.dumps(usage))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](sys.argv[2])
