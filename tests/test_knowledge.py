"""The parts of method knowledge: weights of tokens and outputs, allotment of the budget, row groups, distillation."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import classifier, tokenizer
from scipy.optimize import linear_sum_assignment

from sparsebert import data, encoders, patterns
from sparsebert.config import PruneConfig
from sparsebert.heads import SINGLE_LABEL
from sparsebert.ops.admm_prune import admm_prune
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.pruning import allocate, distillation, draw, prune
from sparsebert.pruning.cluster import assigned, row_groups, row_losses
from sparsebert.pruning.knowledge import STEPS
from sparsebert.pruning.scores import FLOOR, cls_weights, gradient_pass, output_metrics
from sparsebert.pruning.solve import match_logits

MR = data.load(data.get_task("mr"), "train")
HELD_OUT = data.load(data.get_task("mr"), "test", limit=400)


def kl(reference, logits) -> float:
    return SINGLE_LABEL.divergence(reference, logits, 1.0).mean().item()


@functools.cache  # no test changes the result
def calibration(tokens=1500):
    return draw(classifier(), tokenizer(), MR, tokens, 128, 0)


@functools.cache
def pruned(seed: int, tier: int, pattern: str, without: str):
    """A model pruned by `knowledge`; the calibration of tier 0 needs no gradients, so it may be large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "STEPS", 50)
        patch.setattr(distillation, "BATCH", 64)
        model = classifier(seed=seed)
        config = PruneConfig(tier=tier, without=without, sparsity=0.7, pattern=pattern)
        prune(model, calibration({0: 30_000, 1: 3000, 2: 4000}[tier]), config)
    return model


def divergence(seed: int, *options) -> float:
    """Mean KL(dense ‖ pruned) over held-out texts."""
    logits = [
        torch.from_numpy(encoders.predict(model, tokenizer(), HELD_OUT, max_length=64))
        for model in (classifier(seed=seed), pruned(seed, *options))
    ]
    return kl(*logits)


# Step -> how many times as far from dense a model without it is, at least: about the square root of the measured ratio.
GAIN = {
    "target": 1.05, "cluster": 1.01, "admm": 1.05, "refit": 1.01, "heads": 1.03, "outputs": 1.7, "allocation": 1.35,
    "distill": 1.03, "perturb": 1.03,
}  # fmt: skip


def test_every_step_has_a_test():
    assert GAIN.keys() | {"cls"} == STEPS.keys()


@pytest.mark.parametrize("step", GAIN)
def test_a_model_pruned_without_a_step_is_further_from_dense_on_held_out_texts(step):
    tier, pattern = STEPS[step], "8x1" if step == "cluster" else "unstructured"
    seeds = (0, 2) if tier < 2 else (0,)
    ratios = [divergence(seed, tier, pattern, step) / divergence(seed, tier, pattern, "") for seed in seeds]
    assert np.exp(np.log(ratios).mean()) > GAIN[step], ratios


def test_with_cls_the_last_layer_serves_the_first_token_and_not_the_others():
    """By itself it does not lower the divergence (bench/results/pruning_ladder.md), so its purpose is measured."""
    texts = tokenizer()(HELD_OUT.texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    real = texts["attention_mask"].bool()

    @torch.no_grad()
    def errors(seed: int, without: str) -> np.ndarray:
        dense, ours = (
            model.bert(**texts).last_hidden_state
            for model in (classifier(seed=seed), pruned(seed, 0, "unstructured", without))
        )
        error = (ours - dense).square().mean(-1)
        return np.array([float(error[:, 0].mean()), float(error[:, 1:][real[:, 1:]].mean())])

    first, others = np.mean([np.log(errors(seed, "heads,cls") / errors(seed, "heads")) for seed in (0, 2)], axis=0)
    assert first > np.log(1.02) and others < np.log(0.9)


def test_in_the_last_layer_only_the_first_token_counts_but_for_key_and_value():
    model, batches = classifier(), calibration(20_000).batches
    weights = cls_weights(model, batches)
    last = "bert.encoder.layer.1."
    assert set(weights) == {
        f"{last}attention.self.query", f"{last}attention.output.dense", f"{last}intermediate.dense",
        f"{last}output.dense",
    }  # fmt: skip
    for weight, batch in zip(weights[f"{last}output.dense"], batches, strict=True):
        assert weight.shape == batch["input_ids"].shape
        assert (weight[:, 0] == 1).all() and (weight[:, 1:] == 0).all()
    few = cls_weights(model, batches[:2])[f"{last}output.dense"]
    assert (few[0][:, 0] == 1).all() and (few[0][:, 1:] == 0.05).all()


def test_the_last_layer_may_forget_what_the_first_token_does_not_need():
    model, batches = classifier(), calibration().batches
    weights = cls_weights(model, batches)
    before = torch.cat([model(**batch).logits for batch in batches])
    with torch.no_grad():  # key and value see every token; nothing else of the last layer does
        layer = model.bert.encoder.layer[1]
        original = layer.output.dense.forward
        layer.output.dense.forward = lambda x: torch.cat([original(x[:, :1]), torch.randn_like(x[:, 1:, :32])], 1)
        after = torch.cat([model(**batch).logits for batch in batches])
    torch.testing.assert_close(before, after)
    assert "bert.encoder.layer.1.output.dense" in weights


def test_gradients_have_the_mean_of_the_logits_differences():
    model, batches = classifier(labels=3), calibration(300).batches
    name = "bert.encoder.layer.0.output.dense"
    batch = batches[0]
    with torch.enable_grad():  # exactly: a third of the sum of (gradients of a logit minus the mean logit)²
        seen = []
        handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out))
        logits = model(**batch).logits
        handle.remove()
        centred = logits - logits.mean(-1, keepdim=True)
        exact = 0.0
        for label in range(3):
            g = torch.autograd.grad(centred[:, label].sum(), seen[0], retain_graph=True)[0]
            exact = exact + g.square().sum(-1) / 3
    found = []

    def see(linear, _x, gradient):
        if linear == name:
            found.append(gradient.square().sum(-1))

    for seed in range(200):
        gradient_pass(model, [batch], see, seed)
    torch.testing.assert_close(torch.stack(found).mean(0), exact, rtol=0.15, atol=0.02 * float(exact.max()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_output_metrics_have_mean_one_and_a_floor():
    model, batches = classifier(), calibration().batches
    metrics = output_metrics(model, batches, seed=0)
    linears = encoders.encoder_linears(model)
    assert metrics.keys() == linears.keys()
    for name, metric in metrics.items():
        assert metric.shape == (linears[name].out_features,) * 2
        assert float(metric.diagonal().mean()) == pytest.approx(1, rel=1e-4)
        assert float(torch.linalg.eigvalsh(metric.double())[0]) > 0.9 * FLOOR


def test_output_metrics_predict_the_change_of_the_logits_that_an_error_makes():
    """The mean squared change by a small error E of a linear is tr(B E H Eᵀ), up to floors and the model's scale."""
    model, batches = classifier(), calibration(4000).batches
    metrics = output_metrics(model, batches, seed=0)
    reference = distillation.logits_of(model, batches)
    predicted, ignoring, real = [], [], []
    for name, module in encoders.encoder_linears(model).items():
        xs = []
        handle = module.register_forward_pre_hook(lambda _m, args, xs=xs: xs.append(args[0].flatten(0, 1)))
        distillation.logits_of(model, batches)
        handle.remove()
        x = torch.cat(xs)
        h = x.T @ x / len(x)
        kept = module.weight.detach().clone()
        within = []
        for seed in range(8):
            error = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
            if seed % 2:  # an error that the logits hardly see
                values, vectors = torch.linalg.eigh(metrics[name])
                error = vectors[:, : len(values) // 2] @ vectors[:, : len(values) // 2].T @ error
            with torch.no_grad():
                module.weight.add_(error)
                change = distillation.logits_of(model, batches) - reference
                module.weight.copy_(kept)
            change -= change.mean(-1, keepdim=True)
            within.append((float((metrics[name] @ error @ h * error).sum()), float((error @ h * error).sum())))
            real.append(float(change.square().mean()))
        predicted += [a for a, _ in within]
        ignoring += [b for _, b in within]

    def within_linears(found):
        found, truth = (np.log(np.array(values).reshape(-1, 8)) for values in (found, real))
        return np.corrcoef(
            (found - found.mean(1, keepdims=True)).ravel(), (truth - truth.mean(1, keepdims=True)).ravel()
        )

    assert within_linears(predicted)[0, 1] > 0.8
    assert within_linears(predicted)[0, 1] > within_linears(ignoring)[0, 1]


def test_a_matched_classifier_has_the_least_divergence():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=generator)
    wanted = 3 * x[:, :3] + torch.randn(400, 3, generator=generator)
    module = torch.nn.Linear(10, 3)
    with torch.no_grad():
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(400, 1)], 1), wanted).solution.T
        module.weight.copy_(solution[:, :-1])
        module.bias.copy_(solution[:, -1])
        was = kl(wanted, module(x))
        match_logits(module, x, wanted, SINGLE_LABEL)
        best = kl(wanted, module(x))
        assert best < 0.9 * was
        for seed in range(20):
            other = torch.nn.Linear(10, 3)
            step = 1e-2 * torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
            other.weight.copy_(module.weight + step[:, :-1])
            other.bias.copy_(module.bias + step[:, -1])
            assert kl(wanted, other(x)) > best - 1e-6


@pytest.mark.parametrize("pattern, clustered", [("unstructured", None), ("8x1", None), ("8x1", 0.5)])
def test_damage_predicts_the_divergence_that_one_linear_causes(pattern, clustered):
    dense, batches = classifier(), calibration(4000).batches
    changes = allocate.one_by_one(dense, batches, patterns.parse(pattern), 0.01, clustered, encoders.no_progress)
    damage = allocate.damage(dense, batches, changes, seed=0)
    reference = distillation.logits_of(dense, batches)
    level = allocate.LEVELS.index(0.4)
    predicted, real = [], []
    for name in encoders.encoder_linears(dense):
        model = copy.deepcopy(dense)
        module = model.get_submodule(name)
        xs = []
        handle = module.register_forward_pre_hook(lambda _m, args, xs=xs: xs.append(args[0].flatten(0, 1)))
        distillation.logits_of(model, batches)
        handle.remove()
        with torch.no_grad():
            change = changes[name][level].float()
            module.weight.add_(change)
            module.bias.sub_(change @ torch.cat(xs).mean(0))
        real.append(kl(reference, distillation.logits_of(model, batches)))
        predicted.append(damage[name][level])
    assert np.corrcoef(np.log(predicted), np.log(real))[0, 1] > 0.8
    assert 0.3 < np.median(np.array(predicted) / np.array(real)) < 3


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.98), st.integers(0, 10_000))
def test_an_allotment_meets_the_budget_exactly_and_spares_what_matters(sparsity, seed):
    rng = np.random.default_rng(seed)
    levels = np.array(allocate.LEVELS)
    scale = {f"l{i}": 10.0 ** rng.uniform(-3, 3) for i in range(6)}
    sizes = {name: int(rng.integers(500, 5000)) for name in scale}
    damage = {name: value * (levels / (1.0 - levels)) ** 1.5 for name, value in scale.items()}
    allotted = allocate.allocate(damage, sizes, sparsity)
    zeros = {name: allotted[name] * sizes[name] for name in sizes}
    assert all(count.denominator == 1 for count in zeros.values())
    assert sum(zeros.values()) == patterns.zeros_in(sum(sizes.values()), sparsity)
    assert all(0 <= s < 1 for s in allotted.values())


def test_an_allotment_gives_more_to_what_hurts_more():
    levels = np.array(allocate.LEVELS)
    damage = {"soft": levels / (1 - levels), "hard": 100 * levels / (1 - levels)}
    allotted = allocate.allocate(damage, {"soft": 1000, "hard": 1000}, 0.8)
    assert allotted["hard"] < 0.75 < 0.85 < allotted["soft"]


def moments(n: int, samples: int) -> torch.Tensor:
    """Second moments of correlated inputs, float64 [n, n]."""
    generator = torch.Generator().manual_seed(n)
    mix = torch.eye(n, dtype=torch.float64) + 0.1 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / samples


def test_rows_that_the_same_columns_serve_come_together():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand(6, 40, generator=generator) < 0.2
    rows = kinds.repeat_interleave(8, 0)[torch.randperm(48, generator=generator)]
    weight = (rows * (1 + torch.rand(48, 40, generator=generator)) + 0.01).double()
    order = row_groups(weight, moments(40, 400), patterns.Grouped(8), 0.8)
    assert sorted(order.tolist()) == list(range(48))
    assert all((group == group[0]).all() for group in rows[order].split(8))


@pytest.mark.parametrize("sparsity", [0.5, 0.875])
def test_clustered_rows_lose_less_than_consecutive_ones(sparsity):
    weight, h = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).double(), moments(48, 300)
    pattern = patterns.Grouped(16)

    def loss(order):
        v = masked_lstsq(weight[order] @ h, h, admm_prune(weight[order], h, pattern, sparsity))
        return float((((v - weight[order]) @ h) * (v - weight[order])).sum())

    assert loss(row_groups(weight, h, pattern, sparsity)) < 0.97 * loss(torch.arange(64))


def test_the_loss_of_a_row_on_a_support_is_that_of_its_least_squares():
    weight, h = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double(), moments(12, 60)
    supports = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    supports[2] = False
    losses = row_losses(weight, h, supports)
    for kept, loss in zip(supports, losses.T, strict=True):
        error = masked_lstsq(weight @ h, h, kept.expand(5, 12).contiguous()) - weight
        torch.testing.assert_close(loss, (error @ h * error).sum(1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 5), st.integers(0, 10_000))
def test_an_assignment_of_rows_is_the_best(groups, rows, skew, seed):
    rng = np.random.default_rng(seed)
    gain = (rng.random((groups * rows, groups)) + skew * rng.random(groups)).astype(np.float32)
    chosen = assigned(gain, rows)
    assert np.bincount(chosen, minlength=groups).tolist() == [rows] * groups
    seats = linear_sum_assignment(np.repeat(gain, rows, 1), maximize=True)
    best = np.repeat(gain, rows, 1)[seats].sum(dtype=float)
    np.testing.assert_allclose(gain[np.arange(len(gain)), chosen].sum(dtype=float), best, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 20, 10_000])
def test_distilling_in_parts_weighs_every_text_alike(monkeypatch, tokens):
    monkeypatch.setattr(distillation, "TOKENS_PER_BATCH", tokens)
    values = torch.arange(50.0).view(5, 10)
    parts = list(distillation._parts({"input_ids": values}))
    assert len(parts) == {1: 5, 20: 3, 10_000: 1}[tokens]
    assert torch.equal(torch.cat([part["input_ids"] for part, _ in parts]), values)
    assert sum(share * float(part["input_ids"].mean()) for part, share in parts) == pytest.approx(float(values.mean()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_without_the_zeros_has_the_gradients_of_the_dense_one(bias):
    module, x = torch.nn.Linear(40, 24, bias=bias), torch.randn(3, 5, 40, requires_grad=True)
    mask = torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    wanted = torch.randn(3, 5, 24)

    def gradients():
        loss = (module(x) * wanted).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]

    with distillation._by_sparse_products({module: mask}) as take_weights:
        with torch.no_grad():
            module.weight.copy_(torch.randn(24, 40) * mask)
        take_weights()
        ours = gradients()
    for got, expected in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("density", "kind", "sizes"),
    # With dense products, and with sparse ones; and embeddings that are projected to the hidden size.
    [(0.5, "bert", {}), (0.2, "bert", {}), (0.5, "electra", {"embedding_size": 16})],
)
def test_distillation_keeps_zeros_and_embeddings_and_never_gets_worse(monkeypatch, density, kind, sizes):
    monkeypatch.setattr(distillation, "STEPS", 50)
    monkeypatch.setattr(distillation, "BATCH", 32)
    for part in (distillation, encoders):  # both modules ask it
        monkeypatch.setattr(part, "bf16_is_fast", lambda device=None: False)
    teacher, texts = classifier(kind, **sizes), calibration(3000)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for module in encoders.encoder_linears(model).values():
            kept = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)) < density
            module.weight.mul_(kept)
    before = {name: m.weight.clone() for name, m in encoders.encoder_linears(model).items()}
    reference = distillation.logits_of(teacher, texts.held_out_batches)
    was = kl(reference, distillation.logits_of(model, texts.held_out_batches))
    distillation.distill(model, teacher, texts, perturb=True, seed=0)
    for name, module in encoders.encoder_linears(model).items():
        assert torch.equal(module.weight == 0, before[name] == 0)
        assert not torch.equal(module.weight, before[name])
    wanted = dict(teacher.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters() if ".embeddings" in name)
    assert kl(reference, distillation.logits_of(model, texts.held_out_batches)) < 0.7 * was
    assert all(p.requires_grad for p in model.parameters())


def test_words_are_swapped_for_their_neighbours_only():
    rng = np.random.default_rng(0)
    near = data.word_neighbors()
    assert "nice" in near["good"] and all(len(words) <= 8 for words in near.values())
    text = "a good movie , not terrible at all !"
    assert distillation.swap_words(text, rng, share=0.0) == text
    swapped = distillation.swap_words(text, rng, share=1.0).split(" ")
    for old, new in zip(text.split(" "), swapped, strict=True):
        assert new in near.get(old, [old])
    assert distillation.swap_words("Good", rng, share=1.0) in near["good"]


def test_half_the_texts_are_joined_to_another_and_pairs_stay_pairs():
    texts = ([f"qqa{i}" for i in range(400)], [f"qqb{i}" for i in range(400)])  # words without neighbours
    examples = data.Examples("mr", "train", *texts, labels=np.zeros(400, dtype=np.int64))
    changed = distillation._changed(examples, np.random.default_rng(0))
    joined = [text.split() for text in changed.texts if " " in text]
    assert len(changed) == 400 and 160 < len(joined) < 240 and {len(parts) for parts in joined} == {2}
    for first, second in zip(changed.texts, changed.texts_b, strict=True):
        assert first.replace("qqa", "") == second.replace("qqb", "")
