from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import classifier, saved, stock

from sparsebert import checkpoint, config, encoders, patterns
from sparsebert.errors import InputError, OutputError
from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.pruning import SubnetConfig, prune_checkpoint
from sparsebert.training import loop, train
from sparsebert.training.callbacks import SubnetCallback
from sparsebert.training.imp import FixedZeros, MagnitudePruning
from sparsebert.training.masks import MaskedLinear, MaskTraining, SoftMovement

PATTERNS = ["unstructured", "2:4", "16x1", "16x1/4"]
QUICK = {"n": 48, "batch_size": 4, "steps": 12, "precision": "fp32", "lr": 1e-2}


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(scope="module")
def start(encoder):
    """A small encoder without a head, which `tuned` is fine-tuned from."""
    return encoder


def sparsity_of(pattern: str) -> float:
    return patterns.sparsity_of(patterns.parse(pattern), None if ":" in pattern else 0.6)


def zeros(directory) -> dict[str, np.ndarray]:
    model, _ = checkpoint.load(directory)
    return {name: (m.weight == 0).numpy() for name, m in encoders.encoder_linears(model).items()}


# Masks


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("init", ["hard", "soft"])
def test_a_mask_begins_with_the_largest_weights_of_the_pattern(pattern, init):
    model = classifier()
    before = {name: m.weight.detach().clone() for name, m in encoders.encoder_linears(model).items()}
    kind, sparsity = patterns.parse(pattern), sparsity_of(pattern)
    training = MaskTraining(model, kind, sparsity, init=init)
    keeps = training.keeps()
    for name, weight in before.items():
        assert torch.equal(keeps[name], pattern_mask(weight.abs(), kind, sparsity)), name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_masked_linear_multiplies_what_its_scores_keep(pattern):
    model = classifier()
    training = MaskTraining(model, patterns.parse(pattern), sparsity_of(pattern))
    if "/" not in pattern:  # a threshold does not keep multiples, the written mask does
        for name, keep in training.keeps().items():
            masked = training.masked[name]
            x = torch.randn(5, masked.in_features)
            wanted = torch.nn.functional.linear(x, masked.weight * keep, masked.bias)
            torch.testing.assert_close(masked(x), wanted, atol=1e-5, rtol=1e-5)
    written = training.keeps()
    folded = training.fold()
    assert not any(isinstance(m, MaskedLinear) for m in folded.modules())
    for name, m in encoders.encoder_linears(folded).items():
        assert torch.equal(m.weight != 0, written[name]), name


def test_only_scores_are_trained_and_their_gradient_is_straight_through():
    model = classifier()
    training = MaskTraining(model, patterns.parse("16x1"), 0.5, head=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(".scores") for name in trained)
    masked = next(iter(training.masked.values()))
    x, dy = torch.randn(7, masked.in_features), torch.randn(7, masked.out_features)
    masked(x).backward(dy)
    wanted = ((dy.T @ x) * masked.weight).view(-1, 16, masked.in_features).sum(1)
    torch.testing.assert_close(masked.scores.grad, wanted, atol=1e-4, rtol=1e-4)


def test_pooler_and_classifier_are_masked_unless_the_head_is_dense():
    assert len(MaskTraining(classifier(), patterns.Unstructured(), 0.5).masked) == 12 + 2
    assert len(MaskTraining(classifier(), patterns.Unstructured(), 0.5, head=False).masked) == 12


def test_the_threshold_is_set_anew_at_the_sparsity_of_the_moment():
    training = MaskTraining(
        classifier(), patterns.Unstructured(), 0.9, init="soft", gradual=0.5, update_every=0.1, settle=0.6, head=False
    )

    def share_kept() -> float:
        kept = [(m.scores >= m.threshold).float().mean().item() for m in training.masked.values()]
        return float(np.mean(kept))

    reached = []
    for step in range(101):
        training.before(step, 100)
        reached.append(1 - share_kept())
    assert reached[0] == reached[9] == pytest.approx(0.5, abs=1e-3)
    assert reached[30] == pytest.approx(0.9 - 0.4 * (1 - 0.3 / 0.6) ** 3, abs=1e-3)
    assert reached[60] == reached[100] == pytest.approx(0.9, abs=1e-3)
    assert (np.diff(reached) >= 0).all()


def test_between_thresholds_the_number_of_zeros_floats():
    training = MaskTraining(classifier(), patterns.Unstructured(), 0.5, head=False)
    masked = next(iter(training.masked.values()))
    with torch.no_grad():
        masked.scores += 1
    training.before(1, 100)
    assert (masked.scores >= masked.threshold).all()
    training.before(2, 100)
    training.settle()
    assert (masked.scores >= masked.threshold).float().mean() == pytest.approx(0.5, abs=1e-3)


def test_scores_below_zero_are_ranked_like_others():
    training = MaskTraining(classifier(), patterns.parse("16x1"), 0.5, head=False)
    name, masked = next(iter(training.masked.items()))
    with torch.no_grad():
        masked.scores.copy_(-torch.rand_like(masked.scores))
    keep = training.keeps()[name]
    lowest, highest = (
        masked.scores.repeat_interleave(16, 0)[keep].min(),
        masked.scores.repeat_interleave(16, 0)[~keep].max(),
    )
    assert lowest > highest and keep.float().mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "gradual", "match"),
    [
        ("unstructured", 0.5, 0.7, "must not fall"),
        ("2:4", 0.5, 0.2, "has one sparsity"),
        ("64:2:16", 0.875, None, "masks are trained for"),
        ("24x1", 0.5, None, "multiple of 24 outputs"),
    ],
)
def test_masks_that_cannot_be_are_refused(pattern, sparsity, gradual, match):
    with pytest.raises(InputError, match=match):
        MaskTraining(classifier(), patterns.parse(pattern), sparsity, gradual=gradual)


# Soft movement


def shares_kept(movement: SoftMovement) -> dict[str, float]:
    return {name: keep.float().mean().item() for name, keep in movement.keeps().items()}


def test_soft_movement_begins_dense_and_moves_weights_and_scores():
    model = classifier()
    x = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        dense = model.eval()(**x).logits
    movement = SoftMovement(model, patterns.Unstructured(), 0.9)
    torch.testing.assert_close(model(**x).logits, dense, atol=1e-5, rtol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"{name}.scores" for name in movement.masked} < trained
    assert {f"{name}.weight" for name in movement.masked} < trained
    assert not any(".embeddings." in name for name in trained)
    model(**x).logits.square().sum().backward()
    masked = next(iter(movement.masked.values()))
    # Straight-through: a gradient that moves a weight away from zero raises its score.
    torch.testing.assert_close(masked.scores.grad, masked.weight.grad * masked.weight)


def test_linears_share_one_threshold_and_none_loses_all():
    movement = SoftMovement(classifier(), patterns.Unstructured(), 0.8)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, masked in enumerate(movement.masked.values()):
            masked.scores.copy_(torch.randn(masked.scores.shape, generator=rng) + (i % 3) - 40 * (i == 4))
    kept = shares_kept(movement)
    encoder = list(movement.shared)
    sizes = [movement.masked[name].scores.numel() for name in encoder]
    assert kept[encoder[4]] == pytest.approx(0.005, abs=2e-3)
    assert kept[encoder[0]] < 0.1 < 0.3 < kept[encoder[2]]
    others = sum(kept[name] * n for i, (name, n) in enumerate(zip(encoder, sizes, strict=True)) if i != 4)
    assert others / sum(sizes) == pytest.approx(0.2, abs=1e-3)
    lowest = min(movement.masked[name].scores[movement.keeps()[name]].min() for name in encoder[:3])
    highest = max(movement.masked[name].scores[~movement.keeps()[name]].max() for name in encoder[:3])
    assert lowest > highest
    movement.current = 0.8
    movement.settle()
    for name, keep in movement.keeps().items():
        assert torch.equal(movement.masked[name].scores >= movement.masked[name].threshold, keep)


def test_the_penalty_is_the_mean_sigmoid_of_the_scores_and_rises_with_the_sparsity():
    movement = SoftMovement(classifier(), patterns.parse("16x1"), 0.8, penalty=30.0)
    scores = [masked.scores for masked in movement.masked.values()]
    with torch.no_grad():
        for own in scores:
            own.normal_()
    mean = sum(own.sigmoid().mean() for own in scores) / len(scores)
    wanted = torch.autograd.grad(30.0 * mean, scores)
    for current, risen in ((0.0, 0.0), (0.6, 0.75), (0.8, 1.0)):
        movement.current = current
        for own in scores:
            own.grad = torch.ones_like(own)
        movement.regularise()
        for own, whole in zip(scores, wanted, strict=True):
            torch.testing.assert_close(own.grad - 1, risen * whole, atol=1e-6, rtol=1e-5)


def test_scores_have_their_own_learning_rate_and_no_decay(tuned, tmp_path):
    groups = []

    class Spy(loop.TrainingLoop):
        def finish(self):
            names = {id(p): name for name, p in self.parameters.items()}
            for group in self.optimizer.param_groups:
                kinds = {names[id(p)].rpartition(".")[2] for p in group["params"]}
                groups.append((group["peak"], group["weight_decay"], kinds))
            super().finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsebert.training.setup.TrainingLoop", Spy)
        settings = config.PruneConfig(method="soft-movement", sparsity=0.5)
        subnet = SubnetConfig(**QUICK, scores_lr=0.3, weight_decay=0.02)
        prune_checkpoint(tuned, "mr", tmp_path / "m", settings, subnet)
    assert sorted(groups) == [(0.01, 0.0, {"bias", "weight"}), (0.01, 0.02, {"weight"}), (0.3, 0.0, {"scores"})]


# Magnitude pruning


def test_portions_of_a_tenth_nest_and_are_held():
    model = classifier()
    pruning = MagnitudePruning(model, patterns.Unstructured(), 0.7)
    linear = next(iter(encoders.encoder_linears(model).values()))
    gone_at = {}
    for step in range(70):
        pruning.before(step, 70)
        with torch.no_grad():
            linear.weight += 0.01 * torch.randn_like(linear.weight)
        pruning.after()
        gone_at[step] = linear.weight.detach() == 0
    for level in range(1, 8):
        gone = gone_at[10 * level - 1]
        assert gone.float().mean() == pytest.approx(level / 10, abs=1e-3)
        assert gone[gone_at[max(0, 10 * level - 11)]].all()


def test_rewinding_returns_every_weight_and_ends_with_a_pruning():
    model, first = classifier(), classifier(seed=3)
    to = {name: p.detach().clone() for name, p in first.named_parameters()}
    pruning = MagnitudePruning(model, patterns.Unstructured(), 0.5, rewind_to=to)
    starts = [step for step in range(41) if pruning.before(step, 40)]
    assert starts == [0, 10, 20, 30, 40]
    for name, p in model.named_parameters():
        kept = p != 0
        assert torch.equal(p[kept], to[name][kept]), name
    linear = next(iter(encoders.encoder_linears(model).values()))
    assert (linear.weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)


def test_each_stretch_between_rewindings_has_its_own_schedule():
    pruning = MagnitudePruning(classifier(), patterns.Unstructured(), 0.3, rewind_to={}, warmup=0.1)
    shares = [pruning.share_of_lr(step, 40) for step in range(40)]
    assert shares[:20] == shares[20:] and max(shares) == 1.0 and shares[19] < 0.1
    assert MagnitudePruning(classifier(), patterns.Unstructured(), 0.3).share_of_lr(5, 40) is None


def test_zeros_that_are_there_are_held():
    model = classifier()
    linear = next(iter(encoders.encoder_linears(model).values()))
    with torch.no_grad():
        linear.weight[0] = 0
    hook = FixedZeros(model)
    with torch.no_grad():
        linear.weight += 1
    hook.after()
    assert (linear.weight[0] == 0).all() and (linear.weight[1:] != 0).all()


# As methods of `prune`


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["mask", "imp", "soft-movement"])
def test_a_trained_subnetwork_has_the_wanted_zeros(tuned, tmp_path, method, pattern):
    settings = config.PruneConfig(method=method, pattern=pattern, sparsity=sparsity_of(pattern))
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))
    assert result.sparsity == pytest.approx(sparsity_of(pattern), abs=0.03 if "x1" in pattern else 2e-3)
    kind = patterns.parse(pattern)
    for gone in zeros(tmp_path / "m").values():
        if isinstance(kind, patterns.Grouped):
            assert (gone.reshape(-1, 16, gone.shape[1]).all(1) == gone.reshape(-1, 16, gone.shape[1]).any(1)).all()
        if isinstance(kind, patterns.NofM):
            assert (gone.reshape(-1, 4).sum(1) == 2).all()
    recipe = checkpoint.read_recipe(tmp_path / "m")
    assert recipe["method"] == method and recipe["steps"] == 12
    assert recipe["gradual"] == (0.0 if method == "mask" and "x1" in pattern else None)
    again = prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))
    assert again == replace(result, reused=True)


@pytest.mark.parametrize(
    ("pattern", "gradual", "begins"),
    [
        ("unstructured", None, (None, "hard")),
        ("unstructured", 0.2, (0.2, "soft")),
        ("16x1", None, (0.0, "soft")),
        ("16x1", 0.5, (0.5, "hard")),
    ],
)
def test_masks_of_groups_rise_from_0_unless_told_and_fixed_ones_begin_hard(tuned, tmp_path, pattern, gradual, begins):
    found = []

    class Spy(MaskTraining):
        def __init__(self, *args, init, gradual, **kwargs):
            found.append((gradual, init))
            super().__init__(*args, init=init, gradual=gradual, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsebert.training.masks.MaskTraining", Spy)
        settings = config.PruneConfig(method="mask", pattern=pattern, sparsity=0.5)
        subnet = SubnetConfig(**{**QUICK, "steps": 2}, gradual=gradual)
        prune_checkpoint(tuned, "mr", tmp_path / "m", settings, subnet)
    assert found == [begins]


def test_training_a_mask_moves_it_and_no_weight(tuned, tmp_path):
    settings = config.PruneConfig(method="mask", sparsity=0.5)
    prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))
    prune_checkpoint(tuned, "mr", tmp_path / "magnitude", config.PruneConfig(method="magnitude", sparsity=0.5))
    model, _ = checkpoint.load(tmp_path / "m")
    dense, _ = checkpoint.load(tuned)
    for name, p in model.named_parameters():
        kept = p != 0
        assert torch.equal(p[kept], dict(dense.named_parameters())[name][kept]), name
    other = zeros(tmp_path / "magnitude")
    assert any((gone != other[name]).any() for name, gone in zeros(tmp_path / "m").items())


@pytest.mark.parametrize("method", ["mask", "imp", "imp-rw", "soft-movement"])
def test_a_killed_subnetwork_resumes_to_the_same_weights(tuned, tmp_path, monkeypatch, method):
    monkeypatch.setattr(loop, "STEPS_PER_SNAPSHOT", 4)
    settings = config.PruneConfig(method=method, sparsity=0.5)
    best = {} if method == "imp-rw" else {"hold_out": 50, "select": "best"}
    subnet = SubnetConfig(**QUICK, **best)
    prune_checkpoint(tuned, "mr", tmp_path / "whole", settings, subnet)

    def kill(done, total, what=""):
        if done == 10:
            raise Killed

    with pytest.raises(Killed):
        prune_checkpoint(tuned, "mr", tmp_path / "cut", settings, subnet, progress=kill)
    other = subnet.model_copy(update={"lr": 2e-2})
    with pytest.raises(OutputError, match=r"unfinished run with --lr 0\.01, not 0\.02"):
        prune_checkpoint(tuned, "mr", tmp_path / "cut", settings, other)
    with pytest.raises(OutputError, match=r"unfinished run with --sparsity 0\.5, not 0\.6"):
        prune_checkpoint(tuned, "mr", tmp_path / "cut", settings.model_copy(update={"sparsity": 0.6}), subnet)
    resumed = prune_checkpoint(tuned, "mr", tmp_path / "cut", settings, subnet)
    assert resumed.training["resumed_from"] == 8
    assert checkpoint.weights_sha256(tmp_path / "cut") == checkpoint.weights_sha256(tmp_path / "whole")
    assert not list(tmp_path.glob("*partial*"))


def test_a_gradual_mask_that_is_kept_has_the_final_sparsity(tuned, tmp_path):
    subnet = SubnetConfig(**QUICK, gradual=0.3, hold_out=50, select="best", update_every=0.1)
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", config.PruneConfig(method="mask", sparsity=0.8), subnet)
    assert result.sparsity == pytest.approx(0.8, abs=1e-3) and result.training["chosen"] >= 0.7 * 12


def test_no_weights_of_imp_with_too_few_zeros_may_be_the_best():
    pruning = MagnitudePruning(classifier(), patterns.Unstructured(), 0.5)
    may = []
    for step in range(12):
        pruning.before(step, 12)
        may.append(pruning.choose_from == 0)
    assert may == [step >= 10 for step in range(12)]


def test_a_mask_of_the_fine_tuned_model_goes_onto_the_pretrained_weights(start, tuned, tmp_path):
    subnet = SubnetConfig(**QUICK, rewind="pretrained")
    prune_checkpoint(tuned, "mr", tmp_path / "m", config.PruneConfig(method="mask", sparsity=0.5), subnet)
    model, _ = checkpoint.load(tmp_path / "m")
    before, _ = checkpoint.load(start, num_labels=2)
    linears = encoders.encoder_linears(before)
    for name, linear in encoders.encoder_linears(model).items():
        kept = linear.weight != 0
        assert kept.float().mean() == pytest.approx(0.5, abs=1e-2)
        assert torch.equal(linear.weight[kept], linears[name].weight[kept])
    assert (model.classifier.weight != 0).all()
    train(tmp_path / "m", "mr", tmp_path / "isolated", config.TrainConfig(n=64, batch_size=8, epochs=1))
    for name, gone in zeros(tmp_path / "isolated").items():
        assert (gone == zeros(tmp_path / "m")[name]).all()
    trained, _ = checkpoint.load(tmp_path / "isolated")
    assert trained.config.sparsebert["sparsity"] == pytest.approx(0.5, abs=1e-2)
    assert any((p != q).any() for p, q in zip(trained.parameters(), model.parameters(), strict=True))


def test_imp_rw_gives_pretrained_weights_with_zeros(start, tuned, tmp_path):
    subnet = SubnetConfig(**QUICK, start="pretrained")
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", config.PruneConfig(method="imp-rw", sparsity=0.4), subnet)
    assert result.sparsity == pytest.approx(0.4, abs=1e-3)
    model, _ = checkpoint.load(tmp_path / "m")
    before, _ = checkpoint.load(start, num_labels=2)
    for name, linear in encoders.encoder_linears(model).items():
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], encoders.encoder_linears(before)[name].weight[kept])


def test_a_search_may_start_from_any_point_of_a_fine_tuning(start, tmp_path):
    train(start, "mr", tmp_path / "m", config.TrainConfig(n=64, batch_size=8, epochs=1, keep="0.5"))
    assert checkpoint.read_manifest(tmp_path / "m-at-0.5")["figures"] == {"steps": 4}
    subnet = SubnetConfig(**QUICK, start=str(tmp_path / "m-at-0.5"))
    prune_checkpoint(tmp_path / "m", "mr", tmp_path / "s", config.PruneConfig(method="mask", sparsity=0.5), subnet)
    model, _ = checkpoint.load(tmp_path / "s")
    half, _ = checkpoint.load(tmp_path / "m-at-0.5")
    assert torch.equal(
        model.base_model.embeddings.word_embeddings.weight, half.base_model.embeddings.word_embeddings.weight
    )


def test_a_short_run_crosses_the_threshold_by_a_larger_learning_rate(tuned, tmp_path):
    found = []

    class Spy(loop.TrainingLoop):
        def __init__(self, model, config, *args, **kwargs):
            found.append(config.lr)
            super().__init__(model, config, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsebert.training.setup.TrainingLoop", Spy)
        fields = {name: value for name, value in QUICK.items() if name != "lr"}
        for method in ("mask", "imp"):
            prune_checkpoint(
                tuned,
                "mr",
                tmp_path / method,
                config.PruneConfig(method=method, sparsity=0.5),
                SubnetConfig(**fields),
            )
    assert found == [pytest.approx(5e-5 * (61_360 / 12) ** 0.5), 5e-5]
    assert checkpoint.read_recipe(tmp_path / "mask")["lr"] == found[0]


@pytest.mark.parametrize(
    ("fields", "subnet", "match"),
    [
        ({"method": "mask"}, {"gradual": 0.9, "steps": 3}, "must not fall"),
        ({"method": "imp"}, {"gradual": 0.2}, "belongs to methods mask, soft-movement"),
        ({"method": "imp"}, {"init": "soft"}, "belongs to method mask, got imp"),
        ({"method": "imp"}, {"rewind": "pretrained"}, "methods mask, imp-rw"),
        ({"method": "mask"}, {"penalty": 1.0}, "belongs to methods soft-movement, robust-ticket, got mask"),
        ({"method": "imp"}, {"scores_lr": 0.1}, "--scores-lr belongs to methods soft-movement"),
        ({"method": "imp-rw"}, {"select": "best", "hold_out": 9}, "nothing to select"),
        ({"method": "mask"}, {"select": "best"}, "hold_out 0"),
        ({"method": "mask"}, {"loss": "poe"}, "needs a bias model"),
        ({"method": "mask", "tier": 1}, {}, "--tier belongs to method knowledge, got mask"),
        ({"method": "magnitude"}, {"loss": "poe"}, "belongs to methods mask, imp, imp-rw, soft-movement"),
        ({"method": "mask"}, {"start": "pretrained"}, "is not known"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, fields, subnet, match):
    dense = saved(tmp_path / "dense")
    with pytest.raises(InputError, match=match):
        prune_checkpoint(
            dense, "mr", tmp_path / "m", config.PruneConfig(sparsity=0.5, **fields), SubnetConfig(**subnet)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("method", "subnet"),
    [
        ("imp-rw", {"rewind": "pretrained"}),
        ("mask", {"rewind": "pretrained"}),
        ("imp", {"start": "pretrained"}),
        ("robust-ticket", {}),  # trained from the pretrained weights by default
        ("mask", {"loss": "poe", "bias": "weak"}),
        ("mask", {"loss": "confreg", "bias": "weak"}),
        ("imp", {"loss": "distill"}),
        ("rmc", {}),
    ],
)
def test_a_classifier_from_elsewhere_does_not_count_as_the_encoder_that_it_was_fine_tuned_from(
    tmp_path, method, subnet
):
    """Its own weights know the labels. Nor does it where a model of this package was made from it."""
    elsewhere = stock(saved(tmp_path / "elsewhere"))
    prune_checkpoint(elsewhere, "mr", tmp_path / "made", config.PruneConfig(method="magnitude", sparsity=0.5))
    for source in (elsewhere, tmp_path / "made"):
        with pytest.raises(InputError, match=f"the encoder that {source} was fine-tuned from is not known"):
            prune_checkpoint(
                source, "mr", tmp_path / "m", config.PruneConfig(method=method, sparsity=0.5),
                SubnetConfig(**QUICK, **subnet),
            )  # fmt: skip
    assert not list(tmp_path.glob("m.*")) and not (tmp_path / "m").exists()


def test_a_classifier_from_elsewhere_may_be_named_or_taught_by_one_that_is_named(tuned, tmp_path):
    elsewhere = stock(saved(tmp_path / "elsewhere"))
    for method, subnet in (("imp-rw", {"rewind": str(elsewhere)}), ("imp", {"loss": "distill", "teacher": str(tuned)})):
        subnet = SubnetConfig(**{**QUICK, "steps": 4}, **subnet)
        settings = config.PruneConfig(method=method, sparsity=0.5)
        assert prune_checkpoint(elsewhere, "mr", tmp_path / method, settings, subnet).sparsity > 0.49


@pytest.mark.parametrize("method", ["mask", "imp-rw", "robust-ticket"])
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"hidden_size": 64, "intermediate_size": 64}, r"is \[\d+, 32\] there and \[\d+, 64\] in"),
        ({"num_hidden_layers": 3}, r"layer\.2\.attention\.self\.query\.weight is absent there and \[32, 32\] in"),
        ({"num_hidden_layers": 1}, r"layer\.1\.attention\.self\.query\.weight is \[32, 32\] there and absent in"),
        ({"kind": "distilbert"}, "there and absent in"),
    ],
)
def test_weights_of_another_architecture_are_no_weights_to_rewind_to(tuned, tmp_path, method, other, says):
    wrong = saved(tmp_path / "wrong", **other)
    with pytest.raises(InputError, match=f"weights to rewind to must have the shapes of {tuned}: .*{says}"):
        prune_checkpoint(
            tuned, "mr", tmp_path / "m", config.PruneConfig(method=method, sparsity=0.5),
            SubnetConfig(**QUICK, rewind=str(wrong)),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_a_run_does_not_rewind_to_embeddings_of_another_vocabulary_but_a_mask_goes_onto_them(tuned, tmp_path):
    """A mask is of linears alone, and the model that it is put into keeps its tokenizer."""
    other = saved(tmp_path / "other", vocab_size=12_500)
    for method in ("imp-rw", "mask"):
        settings = config.PruneConfig(method=method, sparsity=0.5)
        subnet = SubnetConfig(**{**QUICK, "steps": 4}, rewind=str(other))
        if method == "imp-rw":
            with pytest.raises(InputError, match=r"word_embeddings.weight is \[12000, 32\] there and \[12500, 32\]"):
                prune_checkpoint(tuned, "mr", tmp_path / method, settings, subnet)
        else:
            prune_checkpoint(tuned, "mr", tmp_path / method, settings, subnet)
            assert checkpoint.load(tmp_path / method)[0].config.vocab_size == 12_500


@pytest.mark.parametrize("loss", ["distill", "rmc"])
@pytest.mark.parametrize(("method", "given"), [("mask", None), ("mask", 3e-3), ("imp", None)])
def test_a_teacher_is_fine_tuned_at_the_learning_rate_of_fine_tuning(tuned, tmp_path, monkeypatch, method, given, loss):
    """Mask scores have a larger default, which is none of whole models; a rate that is given is that of all."""
    rates, original = [], loop.TrainingLoop.__init__

    def noted(self, model, settings, *args, part="run", **kwargs):
        original(self, model, settings, *args, part=part, **kwargs)
        rates.append((part, settings.loss, settings.lr))

    monkeypatch.setattr(loop.TrainingLoop, "__init__", noted)
    fields = {name: value for name, value in QUICK.items() if name != "lr"}
    subnet = SubnetConfig(**fields, lr=given, loss=loss)
    prune_checkpoint(tuned, "mr", tmp_path / "m", config.PruneConfig(method=method, sparsity=0.5), subnet)
    beside = given or 5e-5
    assert checkpoint.read_recipe(tmp_path / "m.teacher")["lr"] == beside
    assert {rate for _, kind, rate in rates if kind == "ce"} == {beside}
    (own,) = (rate for _, kind, rate in rates if kind == loss)
    assert own == (given or pytest.approx(5e-5 * (61_360 / 12) ** 0.5 if method == "mask" else 5e-5))


def test_a_diverging_search_stops_and_keeps_its_last_good_state(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STEPS_PER_SNAPSHOT", 4)
    calls = []

    def spoil(self, batch, targets):
        calls.append(1)
        return original(self, batch, targets) if len(calls) < 7 else float("nan")

    original = loop.TrainingLoop._backward
    monkeypatch.setattr(loop.TrainingLoop, "_backward", spoil)
    settings, subnet = config.PruneConfig(method="imp", sparsity=0.5), SubnetConfig(**QUICK)
    with pytest.raises(InputError, match=r"diverged at step 7: loss nan; the state of step 4 is kept in .*partial"):
        prune_checkpoint(tuned, "mr", tmp_path / "m", settings, subnet)
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(loop.TrainingLoop, "_backward", original)
    assert prune_checkpoint(tuned, "mr", tmp_path / "m", settings, subnet).training["resumed_from"] == 4


# In transformers.Trainer


def trainer_of(model, hook, folder, steps=12):
    """A stock Trainer on random token ids, evaluating twice."""
    transformers = pytest.importorskip("transformers")
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 2)}
        for i, ids in enumerate(torch.randint(5, 1000, (32, 6), generator=torch.Generator().manual_seed(0)))
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        eval_strategy="steps", eval_steps=5, disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[SubnetCallback(hook)]
    )


def test_a_mask_is_trained_by_the_stock_trainer(tmp_path):
    model = classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hook = MaskTraining(model, patterns.parse("16x1"), 0.5, gradual=0.2, init="soft", update_every=0.25)
    magnitude = hook.keeps()
    asked = []
    settle = hook.settle
    hook.settle = lambda: (asked.append(hook.current), settle())
    trainer_of(model, hook, tmp_path).train()
    assert len(asked) >= 2 + 3 and asked[-1] == 0.5
    moved = [name for name, keep in hook.keeps().items() if (keep != magnitude[name]).any()]
    assert moved
    folded = hook.fold()
    for name, p in folded.named_parameters():
        kept = p != 0
        assert torch.equal(p[kept], before[name][kept]), name
    kept = torch.cat([m.weight.flatten() != 0 for m in encoders.encoder_linears(folded).values()])
    assert kept.float().mean() == pytest.approx(0.5, abs=1e-2)


def test_soft_movement_in_the_stock_trainer_ends_sparse(tmp_path):
    model = classifier()
    hook = SoftMovement(model, patterns.Unstructured(), 0.6, update_every=0.1)
    asked = []
    regularise = hook.regularise
    hook.regularise = lambda: (asked.append(hook.current), regularise())
    trainer_of(model, hook, tmp_path).train()
    assert len(asked) == 12 and asked[0] == 0 and asked[-1] == 0.6
    kept = torch.cat([m.weight.flatten() != 0 for m in encoders.encoder_linears(hook.fold()).values()])
    assert kept.float().mean() == pytest.approx(0.4, abs=1e-2)


def test_magnitude_pruning_in_the_stock_trainer_ends_sparse(tmp_path):
    model = classifier()
    trainer_of(model, MagnitudePruning(model, patterns.Unstructured(), 0.4), tmp_path).train()
    kept = torch.cat([m.weight.flatten() != 0 for m in encoders.encoder_linears(model).values()])
    assert kept.float().mean() == pytest.approx(0.6, abs=1e-2)
