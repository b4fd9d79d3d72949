"""sparse_matmul's Triton kernels: interpreted on the CPU, compiled for sm_90 without a GPU, and run on a GPU if there
is one. Triton reads TRITON_INTERPRET when it is first imported, so the first two run in separate processes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import require
from triton_runs import compiled_by, interpreted_by, prepare_interpreter, usage_on_sm_90


class Case(NamedTuple):
    """places: the kept columns of each group; of groups of all columns, None."""

    tokens: int
    n_in: int
    n_out: int
    height: int
    places: tuple[int, ...] | None
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    real: int | None = None  # tokens that are computed

    def __str__(self) -> str:
        kept = "all" if self.places is None else "-".join(map(str, self.places))
        ends = "-bias" * self.bias + "-residual" * self.residual + (f"-of{self.real}" if self.real is not None else "")
        return f"{self.tokens}x{self.n_in}x{self.n_out}-h{self.height}-{kept}-{self.activation}{ends}"


# Programs cover 64 tokens and one group, and sum over 16 or 32 places at a time.
CASES = [
    Case(1, 1, 1, 16, (1,)),
    Case(5, 70, 40, 16, (0, 17, 70)),
    Case(67, 33, 61, 32, (31, 5), "gelu", residual=True),
    Case(64, 96, 64, 64, (33,), "relu"),
    Case(63, 40, 130, 64, (40, 1, 16), "tanh", bias=False, residual=True),
    Case(65, 35, 96, 32, (32, 15, 17), real=13),
    Case(3, 50, 33, 16, (9, 48, 2), "gelu", real=3),
    Case(9, 31, 70, 64, None, "gelu"),
    Case(66, 65, 20, 32, None, "none", residual=True, real=65),
    Case(4, 20, 3, 16, None, bias=False, real=0),
]
ACTIVATIONS = ("none", "gelu", "relu", "tanh")
DTYPES = ("float32", "bfloat16")
# float32: sums of at most 70 products. bfloat16: results are rounded by 2^-9 of their size, by the interpreter by 2^-8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Height of a group, whether its columns are gathered, and the activation.
COMPILED = ((16, True, "gelu"), (32, True, "gelu"), (64, True, "gelu"), (64, True, "tanh"), (64, False, "gelu"))


def operands(case: Case, dtype: torch.dtype) -> dict:
    """W as a dense tensor and as the arrays of its groups, and the other arguments. The rows of W are dealt to groups
    in any order, the columns of a group are in any order.
    """
    rng = np.random.default_rng(case.tokens * 1000 + case.n_in)
    groups = -(-case.n_out // case.height)
    rows = np.full(groups * case.height, -1, np.int32)
    # A group that is not the last may have missing rows too, if its rows are fewer than its height.
    at = np.sort(rng.choice(rows.size, case.n_out, replace=False)) if case.places else np.arange(case.n_out)
    rows[at] = rng.permutation(case.n_out) if case.places else np.arange(case.n_out)
    rows = rows.reshape(groups, case.height)
    counts = case.places or (case.n_in,) * groups
    weight = np.zeros((case.n_out, case.n_in), np.float32)
    cols, values = [], []
    for group, count in zip(rows, counts, strict=True):
        kept = rng.choice(case.n_in, count, replace=False) if case.places else np.arange(case.n_in)
        block = rng.standard_normal((case.height, count)).astype(np.float32) / math.sqrt(case.n_in)
        block[group < 0] = 0
        weight[np.ix_(group[group >= 0], kept)] = block[group >= 0]
        cols.append(kept)
        values.append(block.T)

    def tensor(array: np.ndarray, kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(kind)

    return {
        "x": tensor(rng.standard_normal((case.n_in, case.tokens)), dtype),
        "weight": tensor(weight, dtype),
        "rows": tensor(rows, torch.int32),
        "begin": tensor(np.concatenate(([0], np.cumsum(counts))), torch.int32),
        "cols": tensor(np.concatenate(cols), torch.int32) if case.places else None,
        "values": tensor(np.concatenate(values), dtype),
        "bias": tensor(rng.standard_normal(case.n_out), torch.float32) if case.bias else None,
        "residual": tensor(rng.standard_normal((case.n_out, case.tokens)), dtype) if case.residual else None,
        "tokens": None if case.real is None else torch.tensor([case.real], dtype=torch.int32),
    }


def run_kernels(case: Case, dtype: str, device: str) -> dict[str, torch.Tensor]:
    from sparsebert.kernels.sparse_matmul import Groups, pack_bitmask, sparse_matmul

    given = {
        name: value if value is None else value.to(device)
        for name, value in operands(case, getattr(torch, dtype)).items()
    }
    groups = Groups(*(given[name] for name in ("rows", "begin", "cols", "values")), case.n_out)
    options = {name: given[name] for name in ("residual", "tokens")}
    forms = {"groups": groups, "dense": given["weight"], "bitmask": pack_bitmask(given["weight"])}
    return {
        name: sparse_matmul(given["x"], weight, given["bias"], case.activation, **options)
        for name, weight in forms.items()
    }


def reference(case: Case, dtype: str) -> torch.Tensor:
    given = operands(case, getattr(torch, dtype))
    y = given["weight"].double() @ given["x"].double()
    if case.bias:
        y += given["bias"].double()[:, None]
    functions = {"none": lambda v: v, "gelu": torch.nn.functional.gelu, "relu": torch.relu, "tanh": torch.tanh}
    y = functions[case.activation](y)
    return y + given["residual"].double() if case.residual else y


def assert_right(case: Case, dtype: str, got: torch.Tensor) -> None:
    want = reference(case, dtype)
    assert got.shape == want.shape and str(got.dtype) == f"torch.{dtype}"
    real = case.tokens if case.real is None else case.real
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got[:, :real].double(), want[:, :real], rtol=0, atol=TOLERANCE[dtype] * scale)


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
    for form in ("groups", "dense", "bitmask"):
        assert_right(case, dtype, interpreted[f"{case}/{dtype}/{form}"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_on_a_gpu_give_the_references_results(case: Case, dtype: str):
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")
    for got in run_kernels(case, dtype, "cuda").values():
        assert_right(case, dtype, got.cpu())


def test_a_token_gives_the_same_bits_in_any_place(interpreted):
    assert interpreted["bits"].tolist() == [[True] * 5] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_stay_with_their_token(interpreted, activation: str):
    for form in ("groups", "bitmask"):
        got, clean = interpreted[f"special/{form}/{activation}"], interpreted[f"special/{form}/{activation}/clean"]
        assert torch.equal(got[:, [0, 3]], clean[:, [0, 3]])
        assert got[:, 1].isnan().all()
        assert not got[:, 2].isfinite().all() or activation == "tanh"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "gathered", "activation"), COMPILED)
def test_the_kernel_compiles_for_sm_90_and_copies_while_it_multiplies(compiled, height, gathered, activation, dtype):
    usage = compiled[f"{height}/{gathered}/{activation}/{dtype}"]
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 255 and usage["COPIES"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["finish", "finish/bare", "expand", "product/bare"])
def test_the_kernels_of_dense_products_and_of_bitmasks_compile_for_sm_90(compiled, kernel, dtype):
    usage = compiled[f"{kernel}/{dtype}"]
    assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 255
    assert usage["COPIES"] > 0 or kernel.startswith("finish")


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (40, 130), (5, 300)])
@pytest.mark.usefixtures("triton_here")
def test_a_bitmask_has_a_bit_and_a_value_for_each_non_zero(shape):
    from sparsebert.kernels.sparse_matmul import TILE_COLS, TILE_ROWS, pack_bitmask

    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, np.float32) * (rng.random(shape) < 0.4)
    packed = pack_bitmask(torch.from_numpy(weight))
    bits = (packed.masks[..., None] >> torch.arange(TILE_COLS)) & 1
    flat = torch.zeros(bits.numel())
    flat[bits.flatten() != 0] = packed.values
    back = flat.view(bits.shape).transpose(1, 2).reshape(bits.shape[0] * TILE_ROWS, -1)
    assert torch.equal(back[: shape[0], : shape[1]], torch.from_numpy(weight))
    counts = bits.sum((2, 3))
    assert torch.equal(packed.begin.flatten().long(), counts.flatten().cumsum(0) - counts.flatten())
    assert packed.values.numel() == counts.sum() == np.count_nonzero(weight)


class Packed(torch.Tensor):
    """Stands for a 2:4 weight of cuSPARSELt, which multiplies like the dense one, in memory of its own, of which the
    result is a part, as in torch 2.11.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert not (kwargs and "out" in kwargs), "cuSPARSELt takes no out"
        got = super().__torch_function__(function, types, args, kwargs or {})
        return torch.cat((got, got), 1)[:, : got.shape[1]] if function is torch.mm else got


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_product_of_2_4_is_finished_like_a_dense_one(interpreted, case: Case):
    assert_right(case, "float32", interpreted[f"{case}/two_four"])


@pytest.fixture
def triton_here():
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.usefixtures("triton_here")
def test_2_4_without_cusparselt_is_refused(monkeypatch):
    from sparsebert.errors import UnsupportedError
    from sparsebert.kernels.sparse_matmul import pack_two_four

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"needs cuSPARSELt, torch .* is built without it"):
        pack_two_four(torch.zeros(16, 16, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    with pytest.raises(UnsupportedError, match=r"does not run a matrix \[16, 16\] of torch.bfloat16 here: .*CUDA"):
        pack_two_four(torch.zeros(16, 16, dtype=torch.bfloat16))  # on the CPU


def special(activation: str, broken: bool) -> dict[str, torch.Tensor]:
    """W x of four tokens, the second of which holds NaN and the third inf if `broken`."""
    from sparsebert.kernels.sparse_matmul import Groups, pack_bitmask, sparse_matmul

    given = operands(Case(4, 20, 16, 16, None, activation), torch.float32)
    if broken:
        given["x"][3, 1], given["x"][5, 2] = math.nan, math.inf
    groups = Groups(given["rows"], given["begin"], None, given["values"], 16)
    return {
        name: sparse_matmul(given["x"], weight, given["bias"], activation)
        for name, weight in (("groups", groups), ("bitmask", pack_bitmask(given["weight"])))
    }


def same_bits() -> torch.Tensor:
    """Whether a token's result has the same bits alone and in five batches, by groups and by a bitmask."""
    from sparsebert.kernels.sparse_matmul import Groups, pack_bitmask, sparse_matmul

    given = operands(Case(70, 90, 32, 32, (41,)), torch.float32)
    groups = Groups(given["rows"], given["begin"], given["cols"], given["values"], 32)
    found = []
    for weight in (groups, pack_bitmask(given["weight"])):
        alone = sparse_matmul(given["x"][:, 5:6].contiguous(), weight)
        found.append(
            [
                torch.equal(sparse_matmul(given["x"][:, start:stop].contiguous(), weight)[:, 5 - start], alone[:, 0])
                for start, stop in ((0, 70), (5, 70), (4, 7), (0, 6), (3, 68))
            ]
        )
    return torch.tensor(found)


def interpret(file: str) -> None:
    from safetensors.torch import save_file

    from sparsebert.kernels import sparse_matmul as kernels

    prepare_interpreter()
    found = {"bits": same_bits()}
    for case in CASES:
        for dtype in DTYPES:
            for name, value in run_kernels(case, dtype, "cpu").items():
                found[f"{case}/{dtype}/{name}"] = value.contiguous()
    for activation in ACTIVATIONS:
        found |= {f"special/{form}/{activation}": got for form, got in special(activation, True).items()}
        found |= {f"special/{form}/{activation}/clean": got for form, got in special(activation, False).items()}
    kernels.SparseSemiStructuredTensor = Packed
    for case in CASES:
        given = operands(case, torch.float32)
        weight, options = given["weight"].as_subclass(Packed), {name: given[name] for name in ("residual", "tokens")}
        got = kernels.sparse_matmul(given["x"], weight, given["bias"], case.activation, **options)
        found[f"{case}/two_four"] = got.as_subclass(torch.Tensor)
    save_file(found, file)


def compile_all(file: str) -> None:
    from sparsebert.kernels import sparse_matmul as kernels

    binary = Path(file).with_suffix(".cubin")
    usage = {}
    for dtype in DTYPES:
        own, torch_dtype = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype], getattr(torch, dtype)
        types = {
            **dict.fromkeys(("x_ptr", "values_ptr", "residual_ptr", "out_ptr", "product_ptr"), own),
            **dict.fromkeys(("rows_ptr", "begin_ptr", "cols_ptr", "tokens_ptr"), "*i32"), "masks_ptr": "*i64",
            "bias_ptr": "*fp32", "sums_ptr": "*fp32",
            **dict.fromkeys(("n_out", "n_in", "cols", "parts", "width"), "i32"),
        }  # fmt: skip
        of = {arg: types[arg] for arg in kernels._product.arg_names if arg in types}
        for height, gathered, activation in COMPILED:
            constants = {
                "ACTIVATION": activation, "HEIGHT": height, "TOKENS": kernels.TOKENS, "STEP": kernels.STEPS[torch_dtype]
            } | ({} if gathered else {"cols_ptr": None})  # fmt: skip
            usage[f"{height}/{gathered}/{activation}/{dtype}"] = usage_on_sm_90(
                kernels._product, of, constants, kernels.OPTIONS[torch_dtype], binary
            )
        tile = {"ROWS": kernels.TILE_ROWS, "COLS": kernels.TILE_COLS}
        finish, bare = {"ROWS": kernels.ROWS}, {"bias_ptr": None, "residual_ptr": None, "tokens_ptr": None}
        product = {"HEIGHT": 32, "STEP": kernels.STEPS[torch_dtype]}
        for name, constants, options in (
            ("finish", finish, {}),
            ("finish/bare", finish | bare, {}),
            ("product/bare", product | bare, kernels.OPTIONS[torch_dtype]),
            ("expand", tile, kernels.OPTIONS[torch_dtype]),
        ):
            kernel = getattr(kernels, f"_{name.partition('/')[0]}")
            of = {arg: types[arg] for arg in kernel.arg_names if arg in types}
            constants = constants | {"TOKENS": kernels.TOKENS} | ({} if name == "expand" else {"ACTIVATION": "gelu"})
            usage[f"{name}/{dtype}"] = usage_on_sm_90(kernel, of, constants, options, binary)
    Path(file).write_text(json.dumps(usage))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](sys.argv[2])
