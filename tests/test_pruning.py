from __future__ import annotations

import numpy as np
import pytest
import torch
from models import classifier, saved, tokenizer

from sparsebert import checkpoint, data, encoders, patterns
from sparsebert.config import PruneConfig
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.pruning import METHODS, calibration_batches, prune, prune_checkpoint
from sparsebert.pruning.calibrate import stages
from sparsebert.pruning.solve import cholesky, column_sweep, damped, lowest


def calibration(tok, n=48, batch_size=16):
    examples = data.load(data.get_task("mr"), "train", limit=n)
    return calibration_batches(classifier(), tok, examples, 128, batch_size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.875, 0.99])
def test_every_linear_gets_floor_of_s_n_zeros(method, sparsity):
    model = classifier()
    result = prune(model, calibration(tokenizer()), PruneConfig(method=method, sparsity=sparsity))
    linears = encoders.encoder_linears(model)
    assert len(linears) == 12 and result.density.keys() == linears.keys()
    for name, module in linears.items():
        n = module.weight.numel()
        assert int((module.weight == 0).sum()) == patterns.zeros_in(n, sparsity), name


def test_only_the_encoders_linears_change():
    model, untouched = classifier(), classifier()
    prune(model, calibration(tokenizer()), PruneConfig())
    inside = {f"{name}.{part}" for name in encoders.encoder_linears(model) for part in ("weight", "bias")}
    for (name, a), b in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in inside), name


def test_zeros_are_counted_in_decimal():
    assert patterns.zeros_in(100, 0.29) == 29  # 0.29 * 100 is 28.999… in binary
    assert patterns.zeros_in(10, 0.9) == 9
    assert patterns.zeros_in(7, 0.5) == 3


def test_lowest_takes_exactly_k_and_breaks_ties_by_index():
    scores = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert lowest(scores, 3).flatten().tolist() == [True, True, False, True, False, False]
    assert lowest(scores, 0).sum() == 0 and lowest(scores, 6).all()


def test_magnitude_keeps_the_largest_of_each_linear():
    model, before = classifier(), classifier()
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.75))
    for name, module in encoders.encoder_linears(model).items():
        old = before.get_submodule(name).weight
        kept = module.weight != 0
        assert torch.equal(module.weight[kept], old[kept])
        assert old[kept].abs().min() >= old[~kept].abs().max()


def problem(n_in=48, n_out=20, tokens=400, seed=0):
    """W* and H of inputs whose spectrum falls like a power law, as an encoder's does."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, n_in + 1, dtype=torch.float64).pow(-1.0)
    mix = spectrum[:, None] * torch.linalg.qr(torch.randn(n_in, n_in, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(tokens, n_in, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
    return weight, damped(x.T @ x / tokens, 0.01)[0]


def sweep_reference(weight, h, gone):
    """Column by column with the inverse of the remaining Hessian recomputed each time: the optimal compensation of each
    removal in all later columns. O(n_in^4).
    """
    w = weight.clone()
    n_in = w.shape[1]
    for j in range(n_in):
        inverse = torch.linalg.inv(h[j:, j:])
        error = torch.where(gone[:, j], w[:, j] / inverse[0, 0], 0.0)
        w[:, j:] -= torch.outer(error, inverse[0])
    return torch.where(gone, 0.0, w)


def objective(v, weight, h):
    return float(((v - weight) @ h * (v - weight)).sum())


@pytest.mark.parametrize("block", [1, 7, 16, 48, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.875])
def test_column_sweep_compensates_like_the_reference(block, sparsity):
    weight, h = problem()
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    pruned = column_sweep(weight, factor, sparsity, block)
    gone = pruned == 0
    assert int(gone.sum()) == patterns.zeros_in(weight.numel(), sparsity)
    torch.testing.assert_close(pruned.double(), sweep_reference(weight, h, gone), rtol=1e-4, atol=1e-4)


def test_column_sweep_beats_magnitude_on_its_objective():
    weight, h = problem()
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    swept = column_sweep(weight, factor, 0.75).double()
    magnitude = weight.masked_fill(lowest(weight.abs(), patterns.zeros_in(weight.numel(), 0.75)), 0.0)
    assert objective(swept, weight, h) < 0.7 * objective(magnitude, weight, h)


def test_a_singular_hessian_names_pivot_and_damping():
    with pytest.raises(InputError, match=r"pivot 3 of 4 is not, with damping 0\.001.*--damping"):
        cholesky(torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)), 0.001)


STAGES = {
    "bert": ["query key value", "dense", "dense", "dense"],
    "roberta": ["query key value", "dense", "dense", "dense"],
    "electra": ["query key value", "dense", "dense", "dense"],
    "distilbert": ["q_lin k_lin v_lin", "out_lin", "lin1", "lin2"],
}


@pytest.mark.parametrize("kind", STAGES)
def test_stages_follow_execution_and_share_inputs(kind):
    model = classifier(kind)
    batches = [{k: v for k, v in b.items() if k != "token_type_ids"} for b in calibration(tokenizer())]
    found = [" ".join(name.rpartition(".")[2] for name in group) for group, _ in stages(model, batches)]
    assert found == 2 * STAGES[kind]


def direct_moments(dense, sparse, batches, name):
    """The definition: run both whole models, keep real tokens, centre, average."""
    seen = {}
    handles = [
        dense.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: seen.setdefault("y", []).append(out.double())
        ),
        sparse.get_submodule(name).register_forward_hook(
            lambda _m, a, _o: seen.setdefault("x", []).append(a[0].double())
        ),
    ]
    with torch.inference_mode():
        for batch in batches:
            dense(**batch)
            sparse(**batch)
    for handle in handles:
        handle.remove()
    keep = [batch["attention_mask"].bool() for batch in batches]
    x = torch.cat([t[m] for t, m in zip(seen["x"], keep, strict=True)])
    y = torch.cat([t[m] for t, m in zip(seen["y"], keep, strict=True)])
    x0, y0 = x - x.mean(0), y - y.mean(0)
    return len(x), x.mean(0), y.mean(0), x0.T @ x0 / len(x), y0.T @ x0 / len(x)


def test_moments_come_from_sparse_predecessors_and_dense_targets():
    dense, model, batches = classifier(), classifier(), calibration(tokenizer())
    seen = 0
    for group, moments in stages(model, batches):
        for name in group:
            n, mean_x, mean_y, gram, cross = direct_moments(dense, model, batches, name)
            assert moments.n == n
            for got, want in (
                (moments.mean_x, mean_x),
                (moments.mean_y[name], mean_y),
                (moments.gram, gram),
                (moments.cross[name], cross),
            ):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
            seen += 1
        with torch.no_grad():  # a caller that prunes: later stages must see it
            for module in group.values():
                module.weight[:, ::2] = 0
    assert seen == 12


def test_padding_does_not_enter_the_moments():
    tok = tokenizer()
    alone, padded = calibration(tok, batch_size=1), calibration(tok, batch_size=48)
    assert sum(int(b["input_ids"].numel()) for b in padded) > 1.3 * sum(int(b["input_ids"].numel()) for b in alone)
    for (_, a), (_, b) in zip(stages(classifier(), alone), stages(classifier(), padded), strict=True):
        assert a.n == b.n
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-5 * float(a.gram.abs().max()))


def test_adaptive_keeps_more_of_the_function_than_magnitude():
    dense, tok = classifier(), tokenizer()
    batches, held_out = calibration(tok, 256), data.load(data.get_task("mr"), "test", limit=100)
    want = encoders.predict(dense, tok, held_out, max_length=128)
    error = {}
    for method in ("magnitude", "adaptive"):
        model = classifier()
        prune(model, batches, PruneConfig(method=method, sparsity=0.6))
        error[method] = np.square(encoders.predict(model, tok, held_out, max_length=128) - want).mean()
    assert error["adaptive"] < 0.5 * error["magnitude"]


def test_adaptive_without_sparsity_keeps_the_function():
    dense, model, tok = classifier(), classifier(), tokenizer()
    prune(model, calibration(tok, 256), PruneConfig(sparsity=0.0))
    held_out = data.load(data.get_task("mr"), "test", limit=50)
    want = encoders.predict(dense, tok, held_out, max_length=128)
    np.testing.assert_allclose(encoders.predict(model, tok, held_out, max_length=128), want, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"method": "nope"}, InputError, "adaptive, magnitude"),
        ({"pattern": "nope"}, InputError, "pattern must be"),
        ({"pattern": "4:2"}, InputError, "pattern must be"),
        ({"pattern": "2:4"}, UnsupportedError, "unstructured only"),
        ({"pattern": "32x1"}, UnsupportedError, "unstructured only"),
    ],
)
def test_what_no_method_can_do_is_refused_before_anything_is_read(config, error, message, tmp_path):
    with pytest.raises(error, match=message):
        prune_checkpoint("/nowhere", "mr", tmp_path / "out", PruneConfig(**config))


def test_prune_checkpoint_is_reused_until_something_changes(tmp_path):
    source = saved(tmp_path / "dense")
    config = PruneConfig(calibration=32, sparsity=0.5)
    first = prune_checkpoint(source, "mr", tmp_path / "out", config)
    assert "density" not in first.as_json() and len(first.as_json()["layers"]) == 12
    calls = []
    again = prune_checkpoint(source, "mr", tmp_path / "out", config, progress=lambda *_: calls.append(1))
    assert not calls and again == first
    sha256 = checkpoint.weights_sha256(tmp_path / "out")
    prune_checkpoint(source, "mr", tmp_path / "out", config.model_copy(update={"seed": 1}))
    assert checkpoint.weights_sha256(tmp_path / "out") != sha256
    settings = checkpoint.read_config(tmp_path / "out")["sparsebert"]
    assert (settings["method"], settings["pattern"], settings["sparsity"]) == ("adaptive", "unstructured", 0.5)


def test_magnitude_asks_for_no_data(tmp_path):
    source = saved(tmp_path / "dense")
    result = prune_checkpoint(source, "fever_symm_v1", tmp_path / "out", PruneConfig(method="magnitude", sparsity=0.5))
    assert result.sparsity == 0.5
    with pytest.raises(InputError, match="no training split"):
        prune_checkpoint(source, "fever_symm_v1", tmp_path / "other", PruneConfig())
