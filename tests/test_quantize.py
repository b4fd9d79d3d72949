"""Rounding to int8: the grids, the model directories that hold them, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from models import classifier, saved, tokenizer
from safetensors.numpy import load_file, save_file

from sparsebert import checkpoint, config, data
from sparsebert.checkpoint.scales import SCALES
from sparsebert.cli import main
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError, OutputError
from sparsebert.jobs import file_sha256
from sparsebert.ops.sparse_matmul import Quantized
from sparsebert.pruning import draw, prune, prune_checkpoint, quantize_checkpoint
from sparsebert.pruning.quantize import quantize, weight_grid

MR = data.load(data.get_task("mr"), "train")
TEXTS = ["a gripping film", "no", "It is a dull and lifeless thing of far too many words ."]
SETTINGS = {"calibration_tokens": 4000, "calibration": ("none",)}
QUERY = "bert.encoder.layer.0.attention.self.query"


def pruned(pattern="unstructured"):
    model = classifier(hidden_size=64)
    prune(model, [], config.PruneConfig(method="magnitude", sparsity=0.75, pattern=pattern))
    return model


@pytest.fixture(scope="module", params=["unstructured", "4x1"])
def rounded(request):
    """(the model before, after, its scales, and the scales that a second run gave)."""
    before, model, again = pruned(request.param), pruned(request.param), pruned(request.param)
    batches = draw(model, tokenizer(), MR, 4000, None, 0).batches
    return before, model, quantize(model, batches), quantize(again, batches)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a pruned model directory, the same in int8)."""
    folder = tmp_path_factory.mktemp("int8")
    source = saved(folder / "sparse", pruned("4x1"))
    quantize_checkpoint(source, "mr", folder / "int8", config.QuantizeConfig(**SETTINGS))
    return source, folder / "int8"


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "m")
    return tmp_path / "m"


def test_weights_lie_on_the_grid_and_zeros_stay(rounded):
    before, model, scales, _ = rounded
    linears = {n: m for n, m in model.named_modules() if f"{n}.scale" in scales}
    assert len(linears) == 2 * 6
    for name, module in linears.items():
        weight, was = module.weight.detach().numpy(), before.get_submodule(name).weight.detach().numpy()
        grid = Quantized.of_weight(weight, *(scales[f"{name}.{part}"] for part in ("scale", "step", "zero")))
        assert np.abs(grid.values).max() > 60 and not weight[was == 0].any()
        assert np.abs(weight - was).max() < 0.1 * np.abs(was).max()


def test_linears_with_one_input_share_its_grid(rounded):
    _, _, scales, _ = rounded
    for part in ("step", "zero"):
        of = [scales[f"bert.encoder.layer.1.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
        assert np.array_equal(of[0], of[1]) and np.array_equal(of[0], of[2])


def test_the_same_texts_give_the_same_bits(rounded):
    _, _, scales, again = rounded
    assert again.keys() == scales.keys() and all(np.array_equal(again[name], scales[name]) for name in again)


def test_columns_in_turn_leave_less_error_than_plain_rounding():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 100)) @ rng.standard_normal((100, 100))
    h = torch.from_numpy(x.T @ x / len(x))
    weight = torch.from_numpy(rng.standard_normal((40, 100)) * (rng.random((40, 100)) < 0.3))
    step, zero = torch.full((100,), 0.5), torch.full((100,), 128, dtype=torch.uint8)
    grid = weight_grid(weight, weight @ h, h, step, zero)
    plain = (weight.abs().amax(1) / 127)[:, None]
    errors = [d - weight for d in (torch.from_numpy(grid.weight).double(), (weight / plain).round() * plain)]
    ours, theirs = (float(((e @ h) * e).sum()) for e in errors)
    assert ours < 0.8 * theirs
    assert not grid.values[weight.numpy() == 0].any()


def test_inputs_that_never_move_are_rounded_like_the_widest():
    model = classifier(hidden_size=64)
    with torch.no_grad():  # two inputs of the first layer are always zero
        norm = model.bert.embeddings.LayerNorm
        norm.weight[:2], norm.bias[:2] = 0.0, 0.0
    scales = quantize(model, draw(model, tokenizer(), MR, 4000, None, 0).batches)
    step = scales[f"{QUERY}.step"]
    assert step[0] == step[1] == step.max() and (scales[f"{QUERY}.zero"][:2] == 128).all()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_inputs_that_are_all_zero_give_a_finite_model():
    model = classifier(hidden_size=64)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.zero_()
        model.bert.embeddings.LayerNorm.bias.zero_()
    quantize(model, draw(model, tokenizer(), MR, 4000, None, 0).batches)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_directory_is_a_stock_one_and_runs_in_int8(made):
    engine = Engine.load(made[1])
    assert engine.dtype == "int8" and {row["form"] for row in engine.explain()} <= {"int8", "rows"}
    assert any(row["form"] == "int8" and row["kernel"].endswith("int8") for row in engine.explain())
    exact = Engine.load(made[1], dtype="fp32").logits(TEXTS)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(made[1]).eval()
    with torch.inference_mode():
        want = [stock(**tokenizer()(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS]
    np.testing.assert_allclose(exact, want, atol=1e-4)
    before = Engine.load(made[0]).logits(TEXTS)
    size = np.abs(before).max()
    assert 0 < np.abs(engine.logits(TEXTS) - exact).max() < 0.03 * size
    assert np.abs(exact - before).max() < 0.05 * size
    shares = [row["clipped"] for row in engine.explain(texts=TEXTS) if row["form"] == "int8"]
    assert shares and all(0 <= share < 0.1 for share in shares)


def test_a_cached_load_gives_the_same_logits(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    want = Engine.load(made[1], cached=False).logits(TEXTS)
    for _ in range(2):
        assert np.array_equal(Engine.load(made[1]).logits(TEXTS), want)


def test_the_portable_path_runs_fp32_by_itself(made, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_ISA", "scalar")
    assert Engine.load(made[1]).dtype == "fp32"
    assert Engine.load(made[1], dtype="int8").dtype == "int8"


def test_a_repeated_call_finds_the_result_and_other_settings_are_refused(made):
    assert quantize_checkpoint(made[0], "mr", made[1], config.QuantizeConfig(**SETTINGS)).reused
    with pytest.raises(OutputError, match="calibration-tokens 4000, not 5000"):
        quantize_checkpoint(made[0], "mr", made[1], config.QuantizeConfig(**SETTINGS | {"calibration_tokens": 5000}))
    assert checkpoint.read_recipe(made[1])["command"] == "quantize"
    assert Engine.load(made[1]).dtype == "int8"


def test_prune_rounds_as_its_last_step(tmp_path):
    source = saved(tmp_path / "dense", classifier(hidden_size=64))
    settings = config.PruneConfig(method="wanda", pattern="4x1", sparsity=0.75, int8=True, **SETTINGS)
    result = prune_checkpoint(source, "mr", tmp_path / "out", settings)
    assert result.dtype == "int8" and result.sparsity == pytest.approx(0.75)
    assert Engine.load(tmp_path / "out").dtype == "int8"


@pytest.mark.parametrize("method", ["magnitude", "mask"])
def test_methods_that_do_not_calibrate_have_no_int8(tmp_path, method):
    with pytest.raises(InputError, match="--int8 belongs to methods"):
        prune_checkpoint(tmp_path, "mr", tmp_path / "out", config.PruneConfig(method=method, int8=True))


def test_int8_without_scales_says_how_to_make_them(made, capsys):
    with pytest.raises(InputError, match="has no int8 scales") as caught:
        Engine.load(made[0], dtype="int8")
    assert "sparsebert quantize" in caught.value.fix
    with pytest.raises(InputError, match="is in int8 already"):
        quantize_checkpoint(made[1], "mr", made[0].parent / "again")
    assert not (made[0].parent / "again").exists()
    assert main(["bench", str(made[0]), "--dtype", "int8", "--rivals", ""]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def change(directory, scales: dict[str, np.ndarray]) -> None:
    """Rewrites the scales, and their hash in the manifest with them."""
    save_file(scales, directory / SCALES)
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest["int8"]["sha256"] = file_sha256(directory / SCALES)
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))


FAULTS = {
    "has a scale of zero": ("scale", lambda a: np.where(np.arange(len(a)) == 3, 0, a), "scale must be above 0"),
    "has a negative scale": ("scale", lambda a: -a, "scale must be above 0"),
    "has a scale that is no number": ("scale", lambda a: a * np.nan, "scale must be above 0"),
    "has an infinite step": ("step", lambda a: a * np.inf, "must equal that of|step must be above 0"),
    "has other scales": ("scale", lambda a: a * 1.01, "off their int8 grid"),
    "has a zero of another dtype": ("zero", lambda a: a.astype(np.int16), "must be a 1-d scale, step or zero"),
    "has another step for the query": ("step", lambda a: a * 2, "must equal that of"),
    "lacks a scale": ("scale", None, "lacks"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_directory_is_refused_that(copied, name):
    part, fault, message = FAULTS[name]
    scales = load_file(copied / SCALES)
    key = f"{QUERY}.{part}"
    old = scales.pop(key)
    if fault is not None:
        new = fault(old)
        scales[key] = new if new.dtype != np.float64 else new.astype(np.float32)
    change(copied, scales)
    with pytest.raises(CheckpointError, match=message):
        Engine.load(copied, cached=False)


def test_damaged_scales_are_refused(copied):
    data = (copied / SCALES).read_bytes()
    for wrong in (data[:-5], data[:40], b"", bytes([*data[:-1], data[-1] ^ 1])):
        (copied / SCALES).write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"int8.safetensors"):
            Engine.load(copied, cached=False)
    (copied / SCALES).unlink()
    with pytest.raises(CheckpointError, match=r"lacks sparsebert/int8.safetensors"):
        Engine.load(copied)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ([], "int8"),
        ({"sha256": 3}, "int8"),
        ({"logits": []}, "int8 golden"),
        ({"logits": [[np.nan, 0.1]]}, "int8 golden"),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_refused(copied, entry, fault):
    manifest = json.loads((copied / checkpoint.MANIFEST).read_text())
    manifest["int8"] = manifest["int8"] | entry if isinstance(entry, dict) else entry
    (copied / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=fault):
        Engine.load(copied)


def test_golden_logits_of_int8_are_its_own(copied):
    manifest = json.loads((copied / checkpoint.MANIFEST).read_text())
    manifest["int8"]["logits"][0][0] += 1.0
    (copied / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="golden logits must agree"):
        Engine.load(copied, cached=False)
    assert Engine.load(copied, dtype="fp32", cached=False).dtype == "fp32"


def test_seal_does_not_guess_the_golden_logits_of_int8(copied):
    (copied / checkpoint.MANIFEST).unlink()
    with pytest.raises(InputError, match=r"holds sparsebert/int8.safetensors"):
        checkpoint.seal(copied)


def test_reseal_keeps_int8(copied):
    assert checkpoint.reseal(copied, labels=["bad", "good"])["changed"]
    assert Engine.load(copied, cached=False).labels == ["bad", "good"]
    assert Engine.load(copied, cached=False).dtype == "int8"
