"""masked_matmul's Triton kernels: interpreted on the CPU, compiled for sm_90 without a GPU, and run on a GPU where
there is one. Triton reads TRITON_INTERPRET when it is first imported, so the first two have processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require
from test_masked_matmul import Case, expected, require_close, tensors

from sparsebert.errors import UnsupportedError

# Tiles are 64 x 64, 32 deep: below, at and above that, ragged everywhere.
CASES = [
    Case(1, 1, 1),
    Case(3, 33, 65, bias=False),
    Case(64, 32, 64, 16),
    Case(65, 96, 128, 32, 4),
    Case(5, 40, 66, 2, 5),
    Case(7, 70, 70, 1, 7),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_here(job: str, *args: object, **environment: str) -> None:
    if importlib.util.find_spec("triton") is None:
        require("triton", "triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, __file__, job, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def grad_of(case: Case, dtype: str) -> torch.Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randn(case.tokens, case.n_out, generator=made).to(DTYPES[dtype])


def computed(case: Case, dtype: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What the kernels return for a case."""
    from sparsebert.kernels import masked_matmul as kernels

    given = {n: None if t is None else t.to(device) for n, t in tensors(case, DTYPES[dtype]).items()}
    x, weight, scores, threshold, _ = given.values()
    y = kernels.masked_matmul(*given.values())
    found = kernels.masked_matmul_backward(
        grad_of(case, dtype).to(device), x, weight, scores, threshold, [True, True, True]
    )
    return dict(zip(("y", "x", "weight", "scores"), (y, *found), strict=True))


def compare(found: dict[str, torch.Tensor], case: Case, dtype: str, slack: float = 1.0) -> None:
    require_close(found, expected(tensors(case, DTYPES[dtype]), grad_of(case, dtype)), DTYPES[dtype], slack)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    file = tmp_path_factory.mktemp("interpreted") / "results.safetensors"
    run_here("interpret", file, TRITON_INTERPRET="1")
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_interpreted_kernels_match_float64(interpreted, case: Case, dtype: str):
    found = {name: interpreted[f"{case}/{dtype}/{name}"] for name in ("y", "x", "weight", "scores")}
    # The interpreter cuts float32 down to bf16 where a GPU rounds: twice the error.
    compare(found, case, dtype, slack=2.0 if dtype == "bfloat16" else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_on_a_gpu_match_float64(case: Case, dtype: str):
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")
    compare({name: value.cpu() for name, value in computed(case, dtype, "cuda").items()}, case, dtype)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What a kernel takes of a GPU of compute capability 9.0, by kernel, rows a score and dtype."""
    folder = tmp_path_factory.mktemp("compiled")
    run_here("compile", folder / "usage.json", TRITON_CACHE_DIR=str(folder))
    return json.loads((folder / "usage.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 32])
@pytest.mark.parametrize("kernel", ["forward", "back", "gradients"])
def test_the_kernels_compile_for_sm_90_and_keep_all_in_registers(compiled, kernel: str, share: int, dtype: str):
    usage = compiled[f"{kernel}/{share}/{dtype}"]
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 255


@pytest.mark.parametrize("share", [3, 128])
def test_rows_that_do_not_share_by_powers_of_two_are_refused(share: int):
    if importlib.util.find_spec("triton") is None:
        require("triton", "triton is not installed")
    from sparsebert.kernels.masked_matmul import masked_matmul

    given = tensors(Case(2, 4, 2 * share, share), torch.float32)
    with pytest.raises(UnsupportedError, match="power of two of at most 64"):
        masked_matmul(*given.values())


def interpret(file: str) -> None:
    from safetensors.torch import save_file

    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    save_file(
        {
            f"{case}/{dtype}/{name}": value
            for case in CASES
            for dtype in DTYPES
            for name, value in computed(case, dtype).items()
        },
        file,
    )


def compile_all(file: str) -> None:
    import triton
    from sparsebert.kernels import masked_matmul as kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    usage = {}
    for what in ("forward", "back", "gradients"):
        kernel = kernels._gradients if what == "gradients" else kernels._multiply
        for share in (1, 32):
            for dtype, short in (("float32", "*fp32"), ("bfloat16", "*bf16")):
                weight = torch.empty(64, 64)
                constants = kernels._constants(
                    weight.to(DTYPES[dtype]), weight, weight[: 64 // share], torch.tensor(0.0)
                )
                assert not constants["WIDEN"]
                options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
                if what != "gradients":
                    constants["BACK"] = what == "back"
                if what == "back":
                    constants["bias_ptr"] = None
                types = dict.fromkeys(kernel.arg_names, "i32")
                types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("ptr")}
                types |= {name: short for name in ("left_ptr", "out_ptr", "grad_y_ptr", "x_ptr") if name in types}
                types |= dict.fromkeys(constants, "constexpr")
                aligned = {
                    (i,): [["tt.divisibility", 16]]
                    for i, name in enumerate(kernel.arg_names)
                    if types[name] != "constexpr"
                }
                source = ASTSource(kernel, types, constants, aligned)
                binary = Path(file).with_suffix(".cubin")
                binary.write_bytes(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["cubin"])
                tool = triton.knobs.nvidia.cuobjdump.path
                text = subprocess.run(
                    [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
                ).stdout
                fields = (field.split(":") for field in text.split(f"Function {kernel.__name__}:")[1].split())
                usage[f"{what}/{share}/{dtype}"] = {name: int(value) for name, value in fields if value.isdigit()}
    Path(file).write_text(json.dumps(usage))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](sys.argv[2])
