"""Rounding to int8 from end to end: what `quantize` promises, its directories, the engine on them, what is refused."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
import transformers
from command_line import refused, run
from models import classifier, saved, tokenizer
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from sparsebert import checkpoint, config, data
from sparsebert.checkpoint.scales import SCALES
from sparsebert.checkpoint.tensors import content_sha256
from sparsebert.encoders import encoder_linears
from sparsebert.engine import Engine, cache, formats
from sparsebert.engine.costs import Costs
from sparsebert.errors import CheckpointError, InputError, OutputError
from sparsebert.heads import softmax
from sparsebert.jobs import file_sha256
from sparsebert.ops.sparse_matmul import PackedInt8, Quantized, bytes_of, unpack
from sparsebert.pruning import draw, entry, prune, prune_checkpoint, quantize_checkpoint
from sparsebert.pruning.quantize import LEAST_STEP, MOST, SHARES, input_grid, quantize, weight_grid

PARTS = ("scale", "step", "zero")
TEXTS = ["a gripping film", "no", "It is a dull and lifeless thing of far too many words .", ("a premise", "its end")]
FEW = {"calibration_tokens": 2000, "calibration": ("none",)}
FLAGS = ("--task", "mr", "--calibration-tokens", 2000, "--calibration", "none")
LAYER = "roberta.encoder.layer.0."
QUERY, KEY, OUT = (f"{LAYER}attention.{name}" for name in ("self.query", "self.key", "output.dense"))


def pruned(kind="roberta", pattern="4x1", calm=True, **changes):
    """A pruned classifier. calm: smaller weights, so that rounding moves its logits by some per cent only."""
    model = classifier(kind, **changes)
    if calm:
        with torch.no_grad():
            for module in encoder_linears(model).values():
                module.weight *= 0.5
    prune(model, [], config.PruneConfig(method="magnitude", sparsity=0.75, pattern=pattern))
    return model


def batches(model, tokens=2000):
    kind = model.config.model_type
    return draw(model, tokenizer(kind), data.load(data.get_task("mr"), "train"), tokens, None, 0).batches


def grids(model, scales):
    """Name -> the grid of each linear."""
    return {
        name: Quantized.of_weight(module.weight.detach().numpy(), *(scales[f"{name}.{part}"] for part in PARTS))
        for name, module in encoder_linears(model).items()
    }


def in_int8(model, scales):
    """A copy of a stock model whose linears read their inputs as int8 linears do. Its modules note, as `seen`, the sum
    of their outputs for the unrounded inputs.
    """
    model = copy.deepcopy(model)
    found = grids(model, scales)

    def rounded(grid, module, arguments):
        x = arguments[0]
        module.seen = getattr(module, "seen", 0) + outputs(module, x)
        read = bytes_of(x.detach().numpy().reshape(-1, x.shape[-1]), grid.step, grid.zero).astype(np.float32)
        return torch.from_numpy((read - grid.zero) * grid.step).reshape(x.shape)

    for name, module in encoder_linears(model).items():
        module.register_forward_pre_hook(lambda m, a, grid=found[name]: rounded(grid, m, a))
    return model


def outputs(module, x):
    return torch.nn.functional.linear(x, module.weight, module.bias).double().flatten(0, -2).sum(0)


@torch.no_grad()
def logits_of(model, texts=TEXTS):
    tokens = tokenizer(model.config.model_type)
    pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
    return torch.cat([model(**tokens(*pair, return_tensors="pt")).logits for pair in pairs]).numpy()


def in_directory(folder: Path, model, scales) -> Path:
    tokens, made = tokenizer(model.config.model_type), {"recipe": {}, "figures": {}}
    checkpoint.save(model, tokens, folder, **made, scales=scales, int8_logits=entry.int8_logits)
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# --- quantize ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["unstructured", "4x1"])
def rounded(request):
    """(the model before, after, its scales, the calibration batches)."""
    before = pruned(pattern=request.param, calm=False, hidden_size=64)
    after, texts = copy.deepcopy(before), batches(before)
    return before, after, quantize(after, texts), texts


def test_the_scales_are_those_of_every_linear_of_the_encoder(rounded):
    _, after, scales, _ = rounded
    linears = encoder_linears(after)
    assert scales.keys() == {f"{name}.{part}" for name in linears for part in PARTS}
    for name, module in linears.items():
        n_out, n_in = module.weight.shape
        for part, size, dtype in (("scale", n_out, np.float32), ("step", n_in, np.float32), ("zero", n_in, np.uint8)):
            assert scales[f"{name}.{part}"].shape == (size,) and scales[f"{name}.{part}"].dtype == dtype


def test_weights_are_bit_for_bit_a_grid_of_scale_and_step(rounded):
    _, after, scales, _ = rounded
    for name, module in encoder_linears(after).items():
        weight = module.weight.detach().numpy()
        scale, step, zero = (scales[f"{name}.{part}"] for part in PARTS)
        integers = np.rint(weight.astype(np.float64) * step / scale[:, None])
        assert MOST / 2 < np.abs(integers).max() <= MOST
        grid = Quantized(integers.astype(np.int8), scale, step, zero)
        assert grid.weight.tobytes() == (weight + np.float32(0)).tobytes()


def test_zeros_stay_zeros_and_nearly_all_other_weights_stay(rounded):
    before, after, _, _ = rounded
    for name, module in encoder_linears(after).items():
        was = before.get_submodule(name).weight != 0
        kept = module.weight != 0
        assert not (kept & ~was).any() and kept.sum() > 0.95 * was.sum()


def test_linears_of_a_stage_share_step_and_zero_and_no_others_do(rounded):
    scales = rounded[2]
    steps = {name: array.tobytes() for name, array in scales.items() if name.endswith(".step")}
    zeros = {name: array.tobytes() for name, array in scales.items() if name.endswith(".zero")}
    for i in range(2):
        qkv = [f"roberta.encoder.layer.{i}.attention.self.{name}" for name in ("query", "key", "value")]
        assert len({steps[f"{name}.step"] for name in qkv}) == len({zeros[f"{name}.zero"] for name in qkv}) == 1
    assert len(steps) == 2 * 6 and len(set(steps.values())) == 2 * 4


def test_only_the_encoder_s_linears_change(rounded):
    before, after, _, _ = rounded
    linears = tuple(f"{name}." for name in encoder_linears(after))
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {name for name, _ in before.named_parameters() if name.startswith(linears)}


@torch.no_grad()
def test_biases_keep_the_mean_output_of_every_linear(rounded):
    before, after, scales, texts = rounded
    simulated, sums, handles = in_int8(after, scales), {}, []
    for name, module in encoder_linears(before).items():

        def add(module, arguments, name=name):
            sums[name] = sums.get(name, 0) + outputs(module, arguments[0])

        handles.append(module.register_forward_pre_hook(add))
    for batch in texts:
        before(**batch)
        simulated(**batch)
    for handle in handles:
        handle.remove()
    tokens = sum(batch["input_ids"].numel() for batch in texts)
    for name, module in encoder_linears(simulated).items():
        difference = (module.seen - sums[name]).abs() / tokens
        moved = (module.bias - before.get_submodule(name).bias).abs().max()
        assert difference.max() < 0.05 * moved, name  # measured: 0.02, from inputs between two bytes


def test_the_same_texts_give_the_same_bits(rounded):
    before, after, scales, texts = rounded
    again = copy.deepcopy(before)
    found = quantize(again, texts)
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in scales.items()}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), after.parameters(), strict=True))


def test_the_rounded_model_is_near_the_one_before(rounded):
    before, after, scales, _ = rounded
    texts = data.load(data.get_task("mr"), "test", limit=60).texts
    dense = logits_of(before, texts)
    size = np.abs(dense).max()
    want = softmax(dense)
    assert np.ptp(dense[:, 0] - dense[:, 1]) > 2  # the texts are not all alike
    for model in (after, in_int8(after, scales)):
        got = logits_of(model, texts)
        divergence = (want * (np.log(want) - np.log(softmax(got)))).sum(1)
        assert divergence.mean() < 3e-3 and np.abs(got - dense).max() < 0.2 * size


def test_progress_tells_every_linear():
    told, model = [], pruned()
    quantize(model, batches(model, 200), lambda done, total: told.append((done, total)))
    assert told == [(n, 12) for n in (3, 4, 5, 6, 9, 10, 11, 12)]


def test_an_input_that_is_always_zero_gets_a_usable_step():
    model = pruned()
    norm = model.roberta.encoder.layer[0].attention.output.LayerNorm
    with torch.no_grad():
        norm.weight[[2, 5]], norm.bias[[2, 5]] = 0.0, 0.0
    before, name = copy.deepcopy(model), f"{LAYER}intermediate.dense"
    scales = quantize(model, batches(model))
    step, zero = scales[f"{name}.step"], scales[f"{name}.zero"]
    assert step[2] == step[5] == step.max() and zero[2] == zero[5] == 128
    assert all(np.isfinite(array).all() for array in scales.values())
    np.testing.assert_allclose(logits_of(in_int8(model, scales)), logits_of(before), atol=0.1)


def test_inputs_that_are_all_zero_leave_what_the_model_computes(tmp_path):
    model = pruned()
    with torch.no_grad():
        model.roberta.embeddings.LayerNorm.weight.zero_()
        model.roberta.embeddings.LayerNorm.bias.zero_()
    want = logits_of(model)
    scales = quantize(model, batches(model))
    assert (scales[f"{QUERY}.step"] == 1).all() and (scales[f"{QUERY}.zero"] == 128).all()
    np.testing.assert_allclose(logits_of(in_int8(model, scales)), want, atol=0.05)
    folder = in_directory(tmp_path / "m", model, scales)
    np.testing.assert_allclose(Engine.load(folder).logits(TEXTS), want, atol=0.05)


# --- the grid of a weight ---------------------------------------------------------------------------------------------


def problem(seed, n_out=24, n_in=70, spread=True):
    """(weight, H) of correlated inputs. spread: some of them are far wider than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, n_in)) @ rng.standard_normal((n_in, n_in))
    x *= np.exp(rng.standard_normal(n_in)) if spread else 1.0
    weight = rng.standard_normal((n_out, n_in)) * (rng.random((n_out, n_in)) < 0.4)
    gram = x.T @ x / len(x)
    return torch.from_numpy(weight), torch.from_numpy(gram + 1e-4 * np.trace(gram) / n_in * np.eye(n_in))


def error_of(weight, other, h):
    difference = torch.as_tensor(other, dtype=torch.float64) - weight
    return ((difference @ h) * difference).sum(1)


@pytest.mark.parametrize("seed", range(5))
def test_weights_lose_less_than_by_plain_rounding_with_the_same_scales(seed):
    weight, h = problem(seed, spread=bool(seed % 2))
    step = h.diagonal().sqrt().float() / 30
    grid = weight_grid(weight, weight @ h, h, step, torch.full((70,), 128, dtype=torch.uint8))
    nearest = np.rint(weight.numpy() * grid.step / grid.scale[:, None]).clip(-MOST, MOST).astype(np.int8)
    plain = Quantized(nearest, grid.scale, grid.step, grid.zero)
    ours, theirs = error_of(weight, grid.weight, h), error_of(weight, plain.weight, h)
    assert ours.sum() < 0.9 * theirs.sum() and (ours < theirs).double().mean() > 0.8  # measured: 0.63 to 0.83
    assert not grid.values[weight.numpy() == 0].any() and np.abs(grid.values.astype(int)).max() <= MOST


def test_weights_follow_the_target_and_not_only_the_weight():
    weight, h = problem(0)
    wanted = weight * 0.9
    grid = weight_grid(weight, wanted @ h, h, h.diagonal().sqrt().float() / 30, torch.zeros(70, dtype=torch.uint8))
    assert error_of(wanted, grid.weight, h).sum() < 0.03 * error_of(weight, grid.weight, h).sum()


def test_a_row_without_weights_has_a_scale_and_no_weights():
    weight, h = problem(1)
    weight[3], weight[5] = 0.0, 0.0
    weight[5, 7] = 1e-20
    grid = weight_grid(weight, weight @ h, h, torch.full((70,), 0.1), torch.zeros(70, dtype=torch.uint8))
    assert not grid.values[3].any() and (grid.scale > 0).all() and np.isfinite(grid.weight).all()
    assert grid.weight[5, 7] == pytest.approx(1e-20)


# --- the grid of the inputs -------------------------------------------------------------------------------------------


def stage_of(x, weight):
    """What `input_grid` reads of a stage."""
    return SimpleNamespace(sample=torch.from_numpy(x.astype(np.float32)), linears={"a": SimpleNamespace(weight=weight)})


def estimate(x, weight, step, zero):
    """The estimated error of outputs: of rounded inputs, and of weights whose rounding is uniform noise."""
    x, weight, step, zero = (np.asarray(array, np.float64) for array in (x, weight, step, zero))
    read = (np.clip(np.rint(x / step + zero), 0, 255) - zero) * step
    scale = np.abs(weight * step).max(1) / MOST
    noise = (scale**2 / 12) @ ((weight != 0) @ (x.var(0) / step**2))
    return (read - x).var(0) @ (weight**2).sum(0) + noise


WIDTHS = {
    "alike": np.ones(20),
    "one far wider": np.r_[200.0, np.ones(19)],
    "of all widths": np.geomspace(0.01, 100, 20),
    "two kinds": np.repeat([0.05, 3.0], 10),
}


def test_the_grid_of_the_inputs_has_the_least_estimated_error():
    chosen = set()
    for i, widths in enumerate(WIDTHS.values()):
        for power in (0.0, -1.0, 0.5):  # how weights go with the widths of their inputs
            rng = np.random.default_rng(i)
            x = (rng.standard_normal((500, 20)) + rng.standard_normal(20)) * widths
            weight = (rng.standard_normal((8, 20)) * widths**power).astype(np.float32)
            step, zero = (a.numpy() for a in input_grid(stage_of(x, torch.from_numpy(weight))))
            low, high = (bound(0.0, edge) for bound, edge in ((np.minimum, x.min(0)), (np.maximum, x.max(0))))
            own = high - low
            tried = {share: own.max() ** (1 - share) * own**share / 255 for share in SHARES}
            found = [share for share in SHARES if np.allclose(step, tried[share], rtol=1e-4)]
            errors = {share: estimate(x, weight, at, zero) for share, at in tried.items()}
            assert len(found) == 1 and errors[found[0]] <= min(errors.values()) * (1 + 1e-4), (errors, found)
            chosen.add(found[0])
    assert len(chosen) >= 3  # so the choice matters


def test_the_grid_of_the_inputs_holds_all_of_the_sample_and_zero_exactly():
    x = np.random.default_rng(0).standard_normal((300, 30)) * np.geomspace(1e-3, 1e3, 30) + np.linspace(-9, 9, 30)
    step, zero = (a.numpy() for a in input_grid(stage_of(x, torch.ones(4, 30))))
    low, high = -zero.astype(np.float64) * step, (255 - zero.astype(np.float64)) * step
    assert (low - step <= x.min(0)).all() and (x.max(0) <= high + step).all()
    assert low.max() <= 0 <= high.min()
    assert step.dtype == np.float32 and zero.dtype == np.uint8


def test_a_column_that_never_moves_does_not_decide_about_the_others():
    x = np.random.default_rng(0).standard_normal((300, 6))
    weight = torch.ones(4, 7)
    want = input_grid(stage_of(x, weight[:, :6]))
    step, zero = input_grid(stage_of(np.c_[x, np.zeros(300)], weight))
    assert torch.equal(zero[:6], want[1]) and zero[6] == 128
    assert step[6] == pytest.approx(np.ptp(np.c_[x, np.zeros(300)], 0).max() / 255) and (step > LEAST_STEP).all()
    # A column with one value other than zero is one that moves away from zero.
    step, zero = input_grid(stage_of(np.c_[x, np.full(300, -3.0)], weight))
    assert zero[6] == 255 and step[6] >= 3 / 255 * (1 - 1e-6)


def test_no_tokens_are_refused():
    with pytest.raises(InputError, match="calibration texts have no tokens"):
        input_grid(stage_of(np.zeros((0, 5)), torch.ones(2, 5)))


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a pruned model directory, the same in int8, the figures of the rounding)."""
    folder = tmp_path_factory.mktemp("int8")
    source = saved(folder / "sparse", pruned())
    result = quantize_checkpoint(source, "mr", folder / "int8", config.QuantizeConfig(**FEW))
    return source, folder / "int8", result


@pytest.fixture
def directory(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "m")


@pytest.fixture(scope="module")
def texts():
    return data.load(data.get_task("mr"), "test", limit=40).texts


def test_the_engine_computes_what_stock_torch_does_with_rounded_inputs(made, texts):
    model, _ = checkpoint.load(made[1])
    want = logits_of(in_int8(model, load_file(made[1] / SCALES)), texts)
    got = Engine.load(made[1]).logits(texts)
    exact = Engine.load(made[1], dtype="fp32").logits(texts)
    # An input beside the border of two bytes may go to either, and attention is rounded too.
    assert np.abs(got - want).mean() < 0.7 * np.abs(got - exact).mean()  # measured: 0.2 to 0.45
    assert 0 < np.abs(got - exact).max() < formats.DTYPES["int8"].tolerance * np.abs(exact).max()
    np.testing.assert_allclose(exact, logits_of(model, texts), atol=5e-5)


def costing(monkeypatch, rows, int8):
    """Gives an entry these costs in rows and in int8, for short, middling and long batches, on every machine."""
    monkeypatch.setattr("sparsebert.engine.engine.costs", lambda isa: Costs(rows=rows, groups=rows, int8=int8))


def test_every_isa_gives_the_same_bits_and_the_portable_path_nearly(made, texts, int8_isa, monkeypatch):
    costing(monkeypatch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    want = Engine.load(made[1], dtype="int8", cached=False).logits(texts)
    monkeypatch.setenv("SPARSEBERT_ISA", int8_isa)
    engine = Engine.load(made[1], dtype="int8", cached=False)
    assert {row["kernel"] for row in engine.explain()} == {f"{int8_isa} int8"}
    if int8_isa == "scalar":  # whose float32 between the linears rounds differently
        assert np.abs(engine.logits(texts) - want).max() < 0.02 * np.abs(want).max()
    else:
        assert np.array_equal(engine.logits(texts), want)


def test_batches_run_in_the_form_that_costs_less_for_them(made, texts, monkeypatch):
    want = [Engine.load(made[1], dtype=dtype).logits(texts) for dtype in ("fp32", "int8")]
    costing(monkeypatch, (0.5, 1.0, 1.0), (1.0, 0.5, 0.5))
    engine = Engine.load(made[1], cached=False)
    assert {(row["form"], row["short"]) for row in engine.explain()} == {("int8", "rows")}
    np.testing.assert_allclose(engine.logits(["ok"]), Engine.load(made[1], dtype="fp32").logits(["ok"]), atol=1e-5)
    assert np.array_equal(engine.logits(texts), want[1]) and np.abs(want[1] - want[0]).max() > 1e-3


@pytest.mark.parametrize("rows", [(0.5, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_what_was_made_in_one_form_loads_in_another_even_if_rounding_moves_logits_far(rows, tmp_path, monkeypatch):
    model = pruned("bert", calm=False)
    scales = quantize(model, batches(model, 1000))
    costing(monkeypatch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    folder = in_directory(tmp_path / "m", model, scales)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    exact, rounded = (np.array(manifest[name]["logits"]) for name in ("golden", "int8"))
    assert np.abs(exact - rounded).max() > formats.DTYPES["int8"].tolerance * np.abs(rounded).max()
    costing(monkeypatch, rows, (1.0, 0.6, 0.6))
    assert Engine.load(folder, cached=False).dtype == "int8"


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "electra", "distilbert"])
def test_every_linear_of_each_architecture_runs_in_int8(kind, texts, tmp_path, monkeypatch):
    costing(monkeypatch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    model = pruned(kind)
    scales, texts = quantize(model, batches(model, 700)), texts[:15]
    folder = in_directory(tmp_path / "m", model, scales)
    engine = Engine.load(folder, cached=False)
    assert engine.dtype == "int8" and {row["form"] for row in engine.explain()} == {"int8"}
    got, want, exact = engine.logits(texts), logits_of(in_int8(model, scales), texts), logits_of(model, texts)
    assert np.abs(got - want).mean() < 0.7 * np.abs(got - exact).mean()  # measured: 0.2 to 0.45
    assert 0 < np.abs(got - exact).max() < 0.15 * np.abs(exact).max()


def test_auto_is_int8_for_a_directory_with_scales(made):
    assert Engine.load(made[1]).dtype == Engine.load(made[1], dtype="int8").dtype == "int8"
    assert Engine.load(made[0]).dtype == "fp32"
    assert Engine.load(made[1], dtype="fp32").dtype == "fp32"


def test_auto_is_fp32_without_avx2(made, monkeypatch):
    want = Engine.load(made[1]).logits(TEXTS)
    monkeypatch.setenv("SPARSEBERT_ISA", "scalar")
    assert Engine.load(made[1]).dtype == "fp32"
    asked = Engine.load(made[1], dtype="int8")
    assert asked.dtype == "int8"
    assert np.abs(asked.logits(TEXTS) - want).max() < 0.15 * np.abs(want).max()


def test_explain_says_int8_and_why(made, monkeypatch):
    costing(monkeypatch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    engine = Engine.load(made[1], cached=False)
    rows = engine.explain()
    assert len(rows) == 2 * 4 and {row["form"] for row in rows} == {"int8"}
    for row in rows:
        assert row["kernel"].endswith(" int8") and row["density"] == pytest.approx(0.25, abs=0.02)
        assert "rows in groups: " in row["why"] and "of their places kept" in row["why"]
    assert engine.density == pytest.approx(1 - made[2].sparsity)


def test_the_packed_weights_are_those_of_the_file(made, monkeypatch):
    costing(monkeypatch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    engine, weights = Engine.load(made[1]), checkpoint.read_weights(made[1])
    packed = engine.encoder.layers[1].down.weight
    assert isinstance(packed, PackedInt8)
    assert np.array_equal(unpack(packed), weights["roberta.encoder.layer.1.output.dense.weight"])


def test_a_text_has_the_same_bits_alone_and_in_any_batch(made, texts):
    engine = Engine.load(made[1], batch_invariant=True)
    together = engine.logits(texts)
    assert np.array_equal(together, np.concatenate([engine.logits([text]) for text in texts]))
    assert np.array_equal(together[::-1], engine.logits(texts[::-1]))


def test_a_cached_load_gives_the_same_logits_and_other_scales_another_entry(directory, texts, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    want = Engine.load(directory, cached=False).logits(texts)
    for _ in range(2):
        assert np.array_equal(Engine.load(directory).logits(texts), want)
        assert [row["dtype"] for row in cache.entries()] == ["int8"]
    scales = load_file(directory / SCALES)  # the same weights, on inputs in steps of twice the size
    for part in ("scale", "step"):
        scales[f"{OUT}.{part}"] = scales[f"{OUT}.{part}"] * 2
    rewrite(directory, scales)
    other = Engine.load(directory).logits(texts)
    assert len(cache.entries()) == 2
    assert np.array_equal(other, Engine.load(directory, cached=False).logits(texts))
    assert not np.array_equal(other, want)


def test_stock_transformers_loads_it_and_gives_the_golden_logits(made):
    manifest = json.loads((made[1] / checkpoint.MANIFEST).read_text())
    model, told = transformers.AutoModelForSequenceClassification.from_pretrained(made[1], output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = transformers.AutoTokenizer.from_pretrained(made[1])
    golden = manifest["golden"]
    with torch.inference_mode():
        for text, want in zip(golden["texts"], golden["logits"], strict=True):
            pair = text if isinstance(text, list) else [text]
            found = model.eval()(**tokens(*pair, return_tensors="pt", truncation=True, max_length=512)).logits[0]
            np.testing.assert_allclose(found, want, atol=1e-5)
    in_manifest = manifest["int8"]
    texts = [tuple(text) if isinstance(text, list) else text for text in golden["texts"]]
    assert in_manifest["sha256"] == file_sha256(made[1] / SCALES)
    np.testing.assert_allclose(Engine.load(made[1]).logits(texts, truncate=True), in_manifest["logits"], atol=1e-4)
    assert np.abs(np.subtract(in_manifest["logits"], golden["logits"])).max() > 1e-3


def test_a_file_that_the_manifest_does_not_know_is_left_alone(made, tmp_path):
    stray = shutil.copytree(made[0], tmp_path / "m")
    shutil.copy(made[1] / SCALES, stray / SCALES)
    assert Engine.load(stray).dtype == "fp32"
    with pytest.raises(InputError, match="has no int8 scales"):
        Engine.load(stray, dtype="int8")


def test_a_linear_without_scales_runs_in_fp32_and_explain_says_so(directory, monkeypatch):
    costing(monkeypatch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    scales = load_file(directory / SCALES)
    rewrite(directory, {name: array for name, array in scales.items() if not name.startswith(OUT)})
    forms = {(row["layer"], row["linear"]): row["form"] for row in Engine.load(directory, cached=False).explain()}
    assert {place for place, form in forms.items() if form != "int8"} == {(0, "attention_out")}


# --- bad input --------------------------------------------------------------------------------------------------------


def rewrite(directory: Path, scales: dict[str, np.ndarray] | None = None, **entry) -> None:
    """Rewrites the scales, and their hash in the manifest with them. entry: other parts of the manifest's entry."""
    if scales is not None:
        save_file({name: np.ascontiguousarray(array) for name, array in scales.items()}, directory / SCALES)
        entry["sha256"] = file_sha256(directory / SCALES)
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest["int8"] |= entry
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def says(capsys, directory, *wanted: str) -> None:
    """Loading is refused, by a CheckpointError that a command prints in one line; nothing is written."""
    before = contents(directory)
    with pytest.raises(CheckpointError):
        Engine.load(directory, cached=False)
    line = refused(capsys, "predict", directory, "a film")
    assert all(part in line for part in wanted), line
    assert contents(directory) == before


def at_three(value):
    return lambda array: np.where(np.arange(len(array)) == 3, np.float32(value), array)


# What is wrong with a part of one linear's grid -> (its name, what it is made of the right one, the message).
WRONG = {
    "zero scale": (f"{OUT}.scale", at_three(0), "scale must be above 0 and finite, got 0.0 at 3"),
    "negative scale": (f"{OUT}.scale", at_three(-0.5), "scale must be above 0 and finite, got -0.5 at 3"),
    "scale nan": (f"{OUT}.scale", at_three(np.nan), "scale must be above 0 and finite, got nan at 3"),
    "scale inf": (f"{OUT}.scale", at_three(np.inf), "scale must be above 0 and finite, got inf at 3"),
    "scale too small": (f"{OUT}.scale", at_three(1e-40), "scale must be above 0 and finite"),
    "step zero": (f"{OUT}.step", at_three(0), "step must be above 0 and finite, got 0.0 at 3"),
    "step negative": (f"{OUT}.step", at_three(-1), "step must be above 0 and finite, got -1.0 at 3"),
    "step nan": (f"{OUT}.step", at_three(np.nan), "step must be above 0 and finite, got nan at 3"),
    "step inf": (f"{OUT}.step", at_three(np.inf), "step must be above 0 and finite, got inf at 3"),
    "nan of a shared step": (f"{QUERY}.step", at_three(np.nan), f"{KEY}.step must equal that of {QUERY}"),
    "other scale": (f"{OUT}.scale", lambda a: a * np.float32(1.01), "weights are off their int8 grid"),
    "other step": (f"{OUT}.step", lambda a: a * np.float32(1.01), "weights are off their int8 grid"),
    "short scale": (f"{OUT}.scale", lambda a: a[:-1], f"scale of {OUT} must have 32 entries, has 31"),
    "no scale": (f"{OUT}.scale", lambda a: a[:0], "must have 32 entries, has 0"),
    "one step for all": (f"{OUT}.step", lambda a: a[:1], f"step of {OUT} must have 32 entries, has 1"),
    "long zero": (f"{OUT}.zero", lambda a: np.r_[a, a], f"zero of {OUT} must have 32 entries, has 64"),
    "short query": (f"{QUERY}.scale", lambda a: a[:-1], "must have 96 entries, has 95"),
    "matrix": (f"{OUT}.scale", lambda a: a[None], "must be a 1-d scale, step or zero, is float32 [1, 32]"),
    "double": (f"{OUT}.scale", lambda a: a.astype(np.float64), "must be a 1-d scale, step or zero, is float64 [32]"),
    "signed zero": (f"{OUT}.zero", lambda a: a.astype(np.int8), "must be a 1-d scale, step or zero, is int8 [32]"),
    "zero in float": (f"{OUT}.zero", lambda a: a.astype(np.float32), "must be a 1-d scale, step or zero, is float32"),
    "step of the key": (f"{KEY}.step", lambda a: a * 2, f"{KEY}.step must equal that of {QUERY}"),
    "zero of the key": (f"{KEY}.zero", lambda a: a ^ 1, f"{KEY}.zero must equal that of {QUERY}"),
    "lacks scale": (f"{KEY}.scale", None, f"lacks {KEY}.scale"),
    "lacks step": (f"{OUT}.step", None, f"lacks {OUT}.step"),
    "lacks zero": (f"{QUERY}.zero", None, f"lacks {QUERY}.zero"),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.filterwarnings("error")
def test_a_grid_is_refused_in_one_line_if_it_has(fault, directory, capsys):
    name, change, message = WRONG[fault]
    scales = load_file(directory / SCALES)
    right = scales.pop(name)
    if change is not None:
        scales[name] = change(right)
    rewrite(directory, scales)
    says(capsys, directory, SCALES, message)


def test_a_name_of_no_grid_is_refused(directory, capsys):
    rewrite(directory, load_file(directory / SCALES) | {f"{OUT}.weight": np.zeros(32, np.float32)})
    says(capsys, directory, f"{OUT}.weight must be a 1-d scale, step or zero")


def test_scales_in_a_dtype_that_numpy_lacks_are_refused(directory, capsys):
    scales = {name: torch.from_numpy(array) for name, array in load_file(directory / SCALES).items()}
    save_torch(scales | {f"{OUT}.scale": scales[f"{OUT}.scale"].bfloat16()}, directory / SCALES)
    rewrite(directory, sha256=file_sha256(directory / SCALES))
    says(capsys, directory, "must be a safetensors file of scales: 'BF16'")


def test_scales_that_are_missing_cut_or_other_bytes_are_refused(directory, capsys):
    data = (directory / SCALES).read_bytes()
    for wrong in (data[:-5], data[:9], b"", b"text", b"\xff" * 64):
        (directory / SCALES).write_bytes(wrong)
        says(capsys, directory, f"{SCALES} must be a safetensors file")
        rewrite(directory, sha256=file_sha256(directory / SCALES))  # even if the manifest expects these bytes
        says(capsys, directory, f"{SCALES} must be a safetensors file")
    (directory / SCALES).write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
    says(capsys, directory, f"{SCALES} differs from its manifest (sha256)")
    (directory / SCALES).unlink()
    says(capsys, directory, f"lacks {SCALES}")
    (directory / SCALES).mkdir()
    says(capsys, directory, f"{SCALES} must be a regular file")


def test_a_weight_off_its_grid_is_noticed_by_the_grid_alone(directory, capsys):
    name = f"{OUT}.weight"
    tensors = load_file(directory / checkpoint.WEIGHTS)
    place = tuple(np.argwhere(tensors[name])[0])
    tensors[name] = tensors[name].copy()
    tensors[name][place] = np.nextafter(tensors[name][place], np.float32(np.inf))
    save_file(tensors, directory / checkpoint.WEIGHTS, {"format": "pt"})
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    (directory / checkpoint.MANIFEST).rename(directory / "aside")
    configured = json.loads((directory / "config.json").read_text())
    del configured["sparsebert"]
    (directory / "config.json").write_text(json.dumps(configured))
    manifest["tensors"] = checkpoint.read(directory).tensors
    manifest["weights_sha256"] = content_sha256(manifest["tensors"])
    manifest["files"]["config.json"] = file_sha256(directory / "config.json")
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    (directory / "aside").unlink()
    assert Engine.load(directory, dtype="fp32", cached=False).logits(TEXTS).shape == (4, 2)
    row, col = place
    says(capsys, directory, f"1 of 1024 weights are off their int8 grid, the first in row {row}, column {col}")


def test_int8_logits_other_than_the_manifest_s_are_refused(directory, capsys):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    right = manifest["int8"]["logits"]
    for wrong in (
        [[right[0][0] + 1, *right[0][1:]], *right[1:]],
        [[*row, 0.5] for row in right],  # of another number of labels
        [[1e300, *right[0][1:]], *right[1:]],  # beyond float32
        [[1e39] * len(row) for row in right],
    ):
        rewrite(directory, logits=wrong)
        says(capsys, directory, "golden logits must agree within")
        assert Engine.load(directory, dtype="fp32", cached=False).dtype == "fp32"


# An entry of the manifest -> the part that the message names.
ENTRIES = {
    "none": (None, "weights_sha256: int8;"),
    "a list": ([], "weights_sha256: int8;"),
    "text": ("int8", "weights_sha256: int8;"),
    "without hash": ({"sha256": None}, "weights_sha256: int8;"),
    "hash of a number": ({"sha256": 3}, "weights_sha256: int8;"),
    "without logits": ({"logits": None}, "int8 golden logits"),
    "logits of no texts": ({"logits": []}, "int8 golden logits"),
    "logits of one text": ({"logits": [[0.5, 0.5]]}, "int8 golden logits"),
    "logits without labels": ({"logits": [[]] * 6}, "int8 golden logits"),
    "ragged logits": ({"logits": [[0.5, 0.5]] * 5 + [[0.5]]}, "int8 golden logits"),
    "logits as text": ({"logits": [["0.5", "0.5"]] * 6}, "int8 golden logits"),
    "logits nan": ({"logits": [[float("nan"), 0.5]] * 6}, "int8 golden logits"),
    "logits inf": ({"logits": [[float("inf"), 0.5]] * 6}, "int8 golden logits"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_manifest_is_refused_whose_entry_is(name, directory, capsys):
    entry, fault = ENTRIES[name]
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    assert len(manifest["int8"]["logits"]) == 6
    manifest["int8"] = manifest["int8"] | entry if isinstance(entry, dict) else entry
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    says(capsys, directory, checkpoint.MANIFEST, fault)
    with pytest.raises(CheckpointError):
        Engine.load(directory, dtype="fp32", cached=False)


@pytest.mark.parametrize("texts", [5, True, "text", {}, None])
def test_a_manifest_with_wrong_golden_texts_is_refused_in_int8_too(texts, directory, capsys):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest["golden"]["texts"] = texts
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    says(capsys, directory, "weights_sha256: golden texts")


def test_int8_of_a_checkpoint_without_scales_says_what_makes_them(made, capsys):
    with pytest.raises(InputError, match=r"has no int8 scales; make them: sparsebert quantize .* --task TASK -o DIR"):
        Engine.load(made[0], dtype="int8")
    line = refused(capsys, "bench", made[0], "--dtype", "int8", "--rivals", "")
    assert "has no int8 scales" in line and f"sparsebert quantize {made[0]} " in line


def test_a_model_in_int8_is_not_rounded_again(made, tmp_path, capsys):
    line = refused(capsys, "quantize", made[1], *FLAGS, "-o", tmp_path / "out")
    assert f"{made[1]} is in int8 already" in line and "the model that it was made from" in line
    assert not list(tmp_path.iterdir())


def test_the_output_may_not_be_the_source_or_hold_it(made, capsys):
    before = contents(made[0])
    for output in (made[0], made[0].parent):
        line = refused(capsys, "quantize", made[0], *FLAGS, "--overwrite", "-o", output)
        assert "is or holds what it starts from" in line
    assert contents(made[0]) == before


def test_a_lost_manifest_is_not_sealed_anew_and_the_advice_works(directory, capsys):
    (directory / checkpoint.MANIFEST).unlink()
    assert "has lost sparsebert/manifest.json" in refused(capsys, "predict", directory, "a film")
    before = contents(directory)
    line = refused(capsys, "seal", directory)
    assert f"holds {SCALES}, whose golden logits are lost" in line and "remove that file and seal again" in line
    assert contents(directory) == before
    (directory / SCALES).unlink()
    assert run(capsys, "seal", directory)[0] == 0
    assert Engine.load(directory).dtype == "fp32"


@pytest.mark.parametrize("method", ["magnitude", "mask"])
def test_a_method_that_does_not_calibrate_does_not_round(method, made, tmp_path, capsys):
    line = refused(capsys, "prune", made[0], "--task", "mr", "--method", method, "--int8", "-o", tmp_path / "out")
    assert "--int8 belongs to methods " in line and f"got {method}; leave it out" in line
    assert not list(tmp_path.iterdir())


def test_too_few_calibration_tokens_are_refused(made, tmp_path, capsys):
    rule = "must have at least as many tokens as roberta.encoder.layer.0.output.dense has inputs, 64, got"
    settings = ("--task", "mr", "--calibration-tokens", 63, "-o", tmp_path / "out")
    assert f"{rule} 63; raise --calibration-tokens" in refused(capsys, "quantize", made[0], *settings)
    (tmp_path / "few.csv").write_text("text\n" + "".join(f"film {i}\n" for i in range(8)))
    settings = ("--task", tmp_path / "few.csv", "--calibration", "none", "-o", tmp_path / "out")
    assert f"{rule} 42" in refused(capsys, "quantize", made[0], *settings)  # tokens of these texts
    line = refused(capsys, "prune", made[0], *settings, "--method", "wanda", "--int8")
    assert f"{rule} 42" in line
    assert [path.name for path in tmp_path.iterdir()] == ["few.csv"]


# --- quantize_checkpoint ----------------------------------------------------------------------------------------------


def test_the_figures_and_the_files_say_that_it_is_int8(made):
    source, directory, result = made
    assert result.dtype == "int8" and not result.reused and result.tokens >= 2000
    assert result.sparsity == pytest.approx(0.75, abs=0.01) and len(result.density) == 12
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    assert manifest["figures"]["dtype"] == "int8" and manifest["job"]["kind"] == "quantize"
    recipe = checkpoint.read_recipe(directory)
    assert recipe["command"] == "quantize" and recipe["task"] == "mr" and recipe["calibration_tokens"] == 2000
    assert recipe | checkpoint.made_from(source, checkpoint.source_sha256(source)) == recipe
    assert not list(directory.parent.glob("*.partial"))


def test_a_repeated_call_is_reused_and_other_settings_are_refused(made, directory):
    (source, _, first), output = made, directory
    before = contents(output)
    again = quantize_checkpoint(source, "mr", output, config.QuantizeConfig(**FEW))
    assert again.reused and again.seconds == first.seconds and again.density == first.density
    other = config.QuantizeConfig(**FEW, seed=1)
    with pytest.raises(OutputError, match="was made with --seed 0, not 1; repeat those settings, choose another -o"):
        quantize_checkpoint(source, "mr", output, other)
    with pytest.raises(OutputError, match="was made with quantize, not prune"):
        prune_checkpoint(source, "mr", output, config.PruneConfig(method="wanda", **FEW))
    assert contents(output) == before
    want = Engine.load(output).logits(TEXTS)
    assert not quantize_checkpoint(source, "mr", output, other, overwrite=True).reused
    assert not np.array_equal(Engine.load(output).logits(TEXTS), want)
    assert np.array_equal(Engine.load(output).logits(TEXTS), Engine.load(output, cached=False).logits(TEXTS))


def test_a_finished_directory_whose_scales_are_damaged_is_not_reused(made, directory):
    source, settings = made[0], config.QuantizeConfig(**FEW)
    assert quantize_checkpoint(source, "mr", directory, settings).reused
    right = (directory / SCALES).read_bytes()
    (directory / SCALES).write_bytes(right[:-1] + b"!")
    with pytest.raises(OutputError, match=r"int8.safetensors differs from its manifest.*--overwrite"):
        quantize_checkpoint(source, "mr", directory, settings)
    assert not quantize_checkpoint(source, "mr", directory, settings, overwrite=True).reused
    assert (directory / SCALES).read_bytes() == right  # the same work gives the same bytes


class Killed(BaseException):
    pass


def killed(function):
    """What takes the place of a function in a run that is killed there."""

    @functools.wraps(function)
    def kill(*_, **__):
        raise Killed

    return kill


@pytest.mark.parametrize("place", ["quantize", "save", "int8_logits"])
def test_what_ends_in_the_middle_leaves_what_was_there(place, made, tmp_path, monkeypatch):
    output = tmp_path / "out"
    for there in (False, True):
        if there:
            shutil.copytree(made[1], output)
        before = contents(output)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            of = entry.checkpoint if place == "save" else entry
            patch.setattr(of, place, killed(getattr(of, place)))
            settings = config.QuantizeConfig(**FEW, seed=int(there))
            quantize_checkpoint(made[0], "mr", output, settings, overwrite=there)
        assert contents(output) == before and [path.name for path in tmp_path.iterdir()] == ["out"][: int(there)]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """(a dense directory, pruned, then rounded)."""
    folder = tmp_path_factory.mktemp("steps")
    dense = saved(folder / "dense", classifier("roberta"))
    prune_checkpoint(dense, "mr", folder / "sparse", config.PruneConfig(**WANDA))
    quantize_checkpoint(folder / "sparse", "mr", folder / "int8", config.QuantizeConfig(**FEW))
    return dense, folder / "sparse", folder / "int8"


WANDA = {"method": "wanda", "pattern": "4x1", "sparsity": 0.75} | FEW


def test_prune_with_int8_is_prune_and_then_quantize(two_steps, tmp_path, monkeypatch):
    dense, sparse, rounded = two_steps
    settings = config.PruneConfig(**WANDA, int8=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(entry, "quantize", killed(quantize))  # after pruning
        prune_checkpoint(dense, "mr", tmp_path / "out", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    result = prune_checkpoint(dense, "mr", tmp_path / "out", settings)
    assert result.resumed.endswith("layer.1") and (result.dtype, result.method) == ("int8", "wanda")
    for name in (checkpoint.WEIGHTS, SCALES):
        assert (tmp_path / "out" / name).read_bytes() == (rounded / name).read_bytes()
    assert checkpoint.read_recipe(tmp_path / "out")["int8"] is True
    assert prune_checkpoint(dense, "mr", tmp_path / "out", settings).reused
    with pytest.raises(OutputError, match="--int8 True, not False"):
        prune_checkpoint(dense, "mr", tmp_path / "out", config.PruneConfig(**WANDA))
    assert checkpoint.weights_sha256(sparse) != checkpoint.weights_sha256(rounded)


def test_a_rounded_model_keeps_the_name_of_its_method_and_pattern(two_steps):
    _, sparse, rounded = two_steps
    told = [json.loads((folder / "config.json").read_text())["sparsebert"] for folder in (sparse, rounded)]
    assert [told[1][name] for name in ("method", "pattern")] == ["wanda", "4x1"]
    assert told[0]["sparsity"] == pytest.approx(told[1]["sparsity"], abs=0.01)
    made_from = [checkpoint.read_recipe(folder) for folder in (sparse, rounded)]
    assert [recipe["command"] for recipe in made_from] == ["prune", "quantize"]


@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_a_stock_directory_in_bfloat16_is_rounded(tmp_path):
    stock = models.stock(saved(tmp_path / "stock", pruned()))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(stock).bfloat16()
    model.save_pretrained(stock)
    assert json.loads((stock / "config.json").read_text())["dtype"] == "bfloat16"
    quantize_checkpoint(stock, "mr", tmp_path / "out", config.QuantizeConfig(**FEW))
    assert Engine.load(tmp_path / "out").dtype == "int8"
    was, got = checkpoint.read_weights(stock), checkpoint.read_weights(tmp_path / "out")
    changed = {name.rpartition(".")[0] for name in got if not np.array_equal(got[name], was[name])}
    assert changed == set(encoder_linears(model))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


# --- the command line on int8 directories -----------------------------------------------------------------------------


def test_quantize_ends_with_its_document_and_the_next_command(made, tmp_path, capsys):
    code, out, err = run(capsys, "quantize", made[0], *FLAGS, "-o", tmp_path / "out")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["dtype"] == "int8" and found["output"] == str(tmp_path / "out")
    assert found["kept"]["n"] == 500 and found["kept"]["agreement"] > 0.9 and 0 < found["kept"]["kl"] < 0.01
    assert f"next: sparsebert eval {tmp_path / 'out'} --task mr --vs {made[0]}" in err
    assert contents(tmp_path / "out").keys() == contents(made[1]).keys()
    assert (tmp_path / "out" / SCALES).read_bytes() == (made[1] / SCALES).read_bytes()


def test_eval_measures_what_is_served(made, capsys):
    code, out, _ = run(capsys, "eval", made[1], "--task", "mr", "--vs", made[0], "--n", 40)
    found = json.loads(out.splitlines()[-1])
    examples = data.load(data.get_task("mr"), "test", limit=40)
    got, want = (Engine.load(made[i], batch_invariant=True).logits(examples.texts, truncate=True) for i in (1, 0))
    divergence = (softmax(want) * (np.log(softmax(want)) - np.log(softmax(got)))).sum(1).mean()
    assert code == 0 and (found["engine"], found["dtype"]) == ("sparsebert", "int8")
    assert found["accuracy"] == pytest.approx((got.argmax(1) == examples.labels).mean())
    assert found["agreement"] == pytest.approx((got.argmax(1) == want.argmax(1)).mean())
    assert found["kl_to_dense"] == pytest.approx(divergence, rel=0.05)


def test_eval_says_fp32_if_no_linear_runs_in_int8(made, monkeypatch, capsys):
    costing(monkeypatch, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    found = json.loads(run(capsys, "eval", made[1], "--task", "mr", "--n", 20, "--json")[1])
    assert (found["engine"], found["dtype"]) == ("sparsebert", "fp32")


def test_damaged_scales_are_noticed_in_every_dtype_and_by_reseal(directory, capsys):
    for damage in (b"", (directory / SCALES).read_bytes()[:-1] + b"x"):
        (directory / SCALES).write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"int8\.safetensors"):
            Engine.load(directory, dtype="fp32")
        assert "int8.safetensors" in refused(capsys, "reseal", directory, "--labels", "bad,good")


def test_reseal_keeps_the_scales(directory, capsys):
    before = json.loads((directory / checkpoint.MANIFEST).read_text())["int8"]
    want = Engine.load(directory).logits(TEXTS)
    code, out, _ = run(capsys, "reseal", directory, "--labels", "bad,good", "--json")
    assert code == 0 and json.loads(out)["changed"]
    assert json.loads((directory / checkpoint.MANIFEST).read_text())["int8"] == before
    engine = Engine.load(directory)
    assert engine.dtype == "int8" and engine.labels == ["bad", "good"]
    assert np.array_equal(engine.logits(TEXTS), want)
