"""Published baselines with labels: what defines each of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import classifier

from sparsebert import checkpoint, config, data, encoders
from sparsebert.engine import Engine
from sparsebert.errors import InputError
from sparsebert.pruning import SubnetConfig, prune_checkpoint
from sparsebert.pruning.plan import plan
from sparsebert.training import adversarial, loop
from sparsebert.training.imp import LossesWhilePruned
from sparsebert.training.losses import Targets, difficulty, smoothed
from sparsebert.training.setup import TrainingSetup
from sparsebert.training.structures import EarlyTicket, SensitiveTicket, layers_of, masks_of, removed
from sparsebert.training.tickets import HardConcreteLinear, RobustTicket

QUICK = {"n": 64, "batch_size": 8, "steps": 12, "precision": "fp32", "lr": 1e-2, "ascent_steps": 2}


METHODS = ["robust-ticket", "super-ticket", "early-robust", "bag-of-tricks"]


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(scope="module")
def start(encoder):
    """A small encoder without a head, which `tuned` is fine-tuned from."""
    return encoder


def batch_of(rows: int = 6):
    ids = torch.arange(5, 5 + rows * 9).view(rows, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(rows) % 2


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# All of them


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_ticket_resumes_to_the_same_weights(tuned, tmp_path, monkeypatch, method):
    """Killed in the search, and again in the training of the ticket."""
    monkeypatch.setattr(loop, "STEPS_PER_SNAPSHOT", 2)
    settings = config.PruneConfig(method=method, sparsity=0.25)
    subnet = SubnetConfig(**QUICK, hold_out=50, select="best", search=0.5)
    prune_checkpoint(tuned, "mr", tmp_path / "whole", settings, subnet)
    for last in (3, 9):

        def kill(done, total, what="", last=last):
            if done == last and not what:
                raise Killed

        with pytest.raises(Killed):
            prune_checkpoint(tuned, "mr", tmp_path / "cut", settings, subnet, progress=kill)
    resumed = prune_checkpoint(tuned, "mr", tmp_path / "cut", settings, subnet)
    assert resumed.training["resumed_from"] == 8
    assert checkpoint.weights_sha256(tmp_path / "cut") == checkpoint.weights_sha256(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_tickets_have_no_pattern(tuned, tmp_path, method):
    settings = config.PruneConfig(method=method, pattern="2:4")
    with pytest.raises(InputError, match="a ticket is unstructured or whole heads and units, got 2:4"):
        prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))


# RobusT


def robust(model=None, **changes) -> RobustTicket:
    model = model or classifier()
    return RobustTicket(model, 0.3, **{"rewound": lambda: weights_of(classifier(seed=1)), **changes})


def test_the_gates_of_a_robust_ticket_learn_the_loss_under_attack():
    model, (batch, labels) = classifier(), batch_of()
    ticket = robust(model)
    model.eval()  # no noise
    ticket.before(0, 10)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(trained) == ticket.learnt and all(name.endswith(".scores") for name in trained)
    settings = ticket.learning(config.TrainConfig(ascent_steps=2, ascent_size=0.5)).model_copy(
        update={"ascent_start": 0.0}
    )
    adversarial.backward(model, batch, Targets(labels), settings, bf16=False)
    got = [gated.scores.grad.clone() for gated in ticket.gated.values()]

    model.zero_grad()
    words = model.get_input_embeddings()(batch["input_ids"])
    delta = torch.zeros_like(words)
    for _ in range(2):
        moved = (words + delta).detach().requires_grad_()
        logits = model(inputs_embeds=moved, attention_mask=batch["attention_mask"]).logits
        (torch.nn.functional.cross_entropy(logits, labels) / 2).backward()
        delta = delta + 0.5 * moved.grad / moved.grad.flatten(1).norm(dim=1)[:, None, None]
    for gradient, gated in zip(got, ticket.gated.values(), strict=True):
        torch.testing.assert_close(gradient, gated.scores.grad, rtol=1e-3, atol=1e-7)

    model.zero_grad()
    adversarial.backward(model, batch, Targets(labels), config.TrainConfig(), bf16=False)
    plain = [gated.scores.grad for gated in ticket.gated.values()]
    assert all(
        (gradient - other).abs().max() > 1e-3 * other.abs().max() for gradient, other in zip(got, plain, strict=True)
    )


def test_a_gate_is_hard_concrete_and_its_penalty_the_chance_that_it_is_not_0():
    torch.manual_seed(0)
    gated = HardConcreteLinear(torch.nn.Linear(200, 300, bias=False))
    with torch.no_grad():
        gated.weight.fill_(1.0)
        gated.scores.fill_(-0.7)
    eye = torch.eye(200)
    noisy = gated(eye).detach()
    open_share = torch.sigmoid(torch.tensor(-0.7 - 2 / 3 * math.log(0.1 / 1.1)))
    assert (noisy > 0).float().mean().item() == pytest.approx(open_share.item(), abs=0.01)
    assert noisy.max() == 1 and noisy.min() == 0
    quiet = gated.eval()(eye).detach()
    torch.testing.assert_close(quiet, torch.full_like(quiet, torch.sigmoid(torch.tensor(-0.7)).item() * 1.2 - 0.1))

    ticket = robust(penalty=2.0)
    scores = [gated.scores for gated in ticket.gated.values()]
    chance = sum((own - 2 / 3 * math.log(0.1 / 1.1)).sigmoid().mean() for own in scores) / len(scores)
    wanted = torch.autograd.grad(2.0 * chance, scores)
    for own in scores:
        own.grad = torch.zeros_like(own)
    ticket.regularise()
    for own, gradient in zip(scores, wanted, strict=True):
        torch.testing.assert_close(own.grad, gradient)


def test_a_robust_ticket_is_drawn_by_the_lowest_scores_and_put_into_the_pretrained_weights():
    model, pretrained = classifier(), weights_of(classifier(seed=1))
    ticket = robust(model)
    with torch.no_grad():
        for gated in ticket.gated.values():
            gated.scores.normal_()
    scores = {name: ticket.gated[name].scores.detach().clone() for name in ticket.inside}
    assert not ticket.before(4, 10) and ticket.choose_from == 1 and ticket.before(5, 10) and ticket.choose_from == 0
    lowest = torch.cat([own.flatten() for own in scores.values()]).sort().values
    k = int(0.3 * len(lowest))
    for name, linear in encoders.encoder_linears(model).items():
        assert type(linear) is torch.nn.Linear and linear.weight.requires_grad
        assert torch.equal(linear.weight == 0, scores[name] < lowest[k]), name
        torch.testing.assert_close(linear.weight, pretrained[f"{name}.weight"] * (scores[name] >= lowest[k]))
    assert torch.equal(model.classifier.weight, pretrained["classifier.weight"])
    assert sum(int((m.weight == 0).sum()) for m in encoders.encoder_linears(model).values()) == k
    assert ticket.share_of_lr(5, 10) == 1 and ticket.learning(config.TrainConfig()).adversarial == "none"


def test_a_robust_ticket_has_the_sparsity_and_is_trained_after_the_draw(start, tuned, tmp_path):
    settings = config.PruneConfig(method="robust-ticket", sparsity=0.3)
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))
    assert result.sparsity == pytest.approx(0.3, abs=1e-4)
    model, before = checkpoint.load(tmp_path / "m")[0], checkpoint.load(start, num_labels=2)[0]
    moved = [
        (m.weight[m.weight != 0] != other.weight[m.weight != 0]).any().item()
        for m, other in zip(
            encoders.encoder_linears(model).values(), encoders.encoder_linears(before).values(), strict=True
        )
    ]
    assert all(moved)


# Heads and units


def gone_in(model) -> tuple[list[int], list[int]]:
    """(heads, units) of each layer that reach nothing."""
    heads, units, n = [], [], model.config.num_attention_heads
    for layer in layers_of(model):
        out, down = (model.get_submodule(name).weight for name in (layer.out, layer.down))
        heads.append(int((out.view(len(out), n, -1) == 0).all(2).all(0).sum()))
        units.append(int((down == 0).all(0).sum()))
    return heads, units


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_a_head_or_unit_without_its_rows_and_columns_is_gone(kind):
    model, (batch, _) = classifier(kind, num_attention_heads=4), batch_of()
    heads, units = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 64, dtype=torch.bool)
    heads[0, 1] = heads[1, 3] = units[1, 7] = units[0, 60] = False
    for name, keep in masks_of(model, heads, units).items():
        model.get_submodule(name).weight.data *= keep
    assert gone_in(model) == ([1, 1], [1, 1])
    logits = model(**batch).logits
    with torch.no_grad():  # whatever is in the rest of their rows and columns, nothing reaches the logits
        for i, layer in enumerate(layers_of(model)):
            size = model.get_submodule(layer.out).in_features // 4
            for name in layer.inputs:
                model.get_submodule(name).weight[(~heads[i]).repeat_interleave(size)] = 5.0
            model.get_submodule(layer.up).weight[~units[i]] = 5.0
    torch.testing.assert_close(model(**batch).logits, logits)


def test_the_removed_heads_and_units_make_the_sparsity():
    model = classifier(num_attention_heads=4)
    weights = sum(m.weight.numel() for m in encoders.encoder_linears(model).values())
    for sparsity in (0.1, 0.3, 0.5, 0.87):
        gone = removed(model, sparsity)
        assert gone.heads == min(int(8 * sparsity), 6)
        assert 0 <= int(sparsity * weights) - gone.zeros < 2 * 32, "less than one unit"
    assert removed(model, 0.3, heads=0.125).heads == 1
    with pytest.raises(InputError, match=r"6 heads are more than sparsity 0\.1"):
        removed(model, 0.1, heads=0.9)
    assert removed(model, 0.5, whole=True)[:2] == (4, 1)


def test_a_sparsity_that_heads_and_units_cannot_make_is_refused():
    model = classifier(num_attention_heads=4)  # units make half of the encoder's weights here
    with pytest.raises(InputError, match=r"0 heads and all feed-forward units make sparsity 0\.5, got 0\.9"):
        removed(model, 0.9, heads=0.0)
    with pytest.raises(InputError, match=r"6 heads and all feed-forward units make sparsity 0\.875, got 0\.9"):
        removed(model, 0.9)  # a head of each layer stays
    assert removed(model, 0.5, heads=0.0)[:2] == (0, 2 * 64), "every unit goes"


# SuperTicket


def sensitive(model, **changes) -> SensitiveTicket:
    changes = {"whole": True, "rewound": None, **changes}
    return SensitiveTicket(model, removed(model, 0.5, whole=changes["whole"]), **changes)


@pytest.mark.parametrize("whole", [True, False])
def test_sensitivity_is_the_mean_over_examples_of_the_gradient_of_a_gate(whole):
    model, (batch, labels) = classifier(num_attention_heads=4), batch_of()
    ticket = sensitive(model, whole=whole)
    assert not ticket.before(0, 10) and not model.training
    settings = ticket.learning(config.TrainConfig(loss="confreg", adversarial="freelb"))
    adversarial.backward(model, batch, Targets(labels), settings, bf16=False)
    sums = {name: ticket.sums[model.get_submodule(name)] for each in layers_of(model) for name in (each.out, each.down)}

    other = sensitive(classifier(num_attention_heads=4), whole=whole).model
    modules = {name: other.get_submodule(name) for name in sums}
    wanted = dict.fromkeys(sums, 0.0)
    for row in range(len(labels)):
        logits = other(**{name: part[row : row + 1] for name, part in batch.items()}).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[row : row + 1])
        for name, gradient in zip(sums, torch.autograd.grad(loss, [m.gate for m in modules.values()]), strict=True):
            wanted[name] = wanted[name] + gradient.abs()
    for name, got in sums.items():
        torch.testing.assert_close(got, wanted[name], rtol=1e-3, atol=1e-6)


def test_a_super_ticket_removes_the_least_sensitive_heads_and_feed_forward_layers():
    model, pretrained = classifier(num_attention_heads=4), weights_of(classifier(num_attention_heads=4, seed=1))
    ticket = sensitive(model, rewound=lambda: pretrained)
    # Divided by the norms of the layers, head 0 of the first layer is behind head 0 of the second.
    heads = torch.tensor([[5.0, 30.0, 40.0, 2.0], [1.0, 0.1, 0.2, 3.0]])
    for module, scores in zip(ticket.outs, heads, strict=True):
        ticket.sums[module] = scores
    for module, score in zip(ticket.downs, (2.0, 1.0), strict=True):
        ticket.sums[module] = torch.tensor([score])
    assert ticket.before(1, 10) and model.training
    kept = [(m.weight.view(32, 4, -1) != 0).any(2).any(0).tolist() for m in ticket.outs]
    assert kept == [[False, True, True, False], [True, False, False, True]]
    assert [bool((m.weight == 0).all()) for m in ticket.downs] == [False, True]
    assert not any(name.endswith(".gate") for name, _ in model.named_parameters())
    weight = model.get_submodule(layers_of(model)[0].up).weight
    assert torch.equal(weight, pretrained[f"{layers_of(model)[0].up}.weight"])


def test_one_head_of_each_layer_stays():
    model = classifier(num_attention_heads=4)
    ticket = SensitiveTicket(model, removed(model, 0.8, whole=True), whole=True, rewound=None)
    for module, scale in zip(ticket.outs, (0.0, 1.0), strict=True):
        ticket.sums[module] = scale * torch.tensor([1.0, 2.0, 3.0, 4.0])
    ticket.before(1, 10)
    assert gone_in(model)[0] == [3, 3]


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_structured_ticket_is_saved_planned_and_run(tuned, tmp_path, method):
    settings = config.PruneConfig(method=method, sparsity=0.5)
    planned = plan(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK))
    model, tokenizer = checkpoint.load(tmp_path / "m")
    weights = sum(m.weight.numel() for m in encoders.encoder_linears(model).values())
    made = result.sparsity - planned.zeros / weights
    assert 0 < made < 0.02 if result.dtype == "int8" else made == pytest.approx(0, abs=1e-9), "rounding adds zeros"
    assert sum(gone_in(model)[0]) == 2, "one head per layer stays"
    texts = ["a fine film", "a long and tedious one"]
    wanted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.detach().numpy()
    engine = Engine.load(tmp_path / "m", dtype="fp32")
    np.testing.assert_allclose(engine.logits(texts), wanted, atol=1e-4)


# EarlyRobust


def early(model, **changes) -> EarlyTicket:
    return EarlyTicket(model, removed(model, 0.5), rewound=None, **changes)


def drift(ticket: EarlyTicket, steps: int, total: int, rng: torch.Generator) -> int:
    """The step at which the ticket is drawn, if all gates are new in each of the first `steps` steps and then rest."""
    for step in range(total + 1):
        if ticket.before(step, total):
            return step
        if step < steps:
            with torch.no_grad():
                for module in (*ticket.outs, *ticket.downs):
                    module.gate.copy_(torch.rand(module.gate.shape, generator=rng))
    raise AssertionError("no ticket was drawn")


def test_the_search_stops_when_a_mask_is_near_to_the_five_after_it():
    rng = torch.Generator().manual_seed(0)
    # 200 steps of search, a mask every 10: those from step 60 on are equal, and five more follow.
    assert drift(early(classifier(), search=0.2), 60, 1000, rng) == 110
    assert drift(early(classifier(), search=0.2, distance=1.01), 1000, 1000, rng) == 60
    assert drift(early(classifier(), search=0.2), 1000, 1000, rng) == 200


def test_heads_and_units_settle_apart():
    ticket = early(classifier())
    same = torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 64, dtype=torch.bool)
    other = same[0], torch.cat([same[1][:, :55], ~same[1][:, 55:]], 1)
    ticket.masks = [same] * 6
    assert ticket.has_settled()
    ticket.masks = [same] * 5 + [other]
    assert not ticket.has_settled(), "14 % of the units differ"
    ticket.masks = [same] * 5
    assert not ticket.has_settled()


def test_an_early_ticket_trains_weights_and_gates_under_attack_with_an_l1_penalty():
    model, (batch, labels) = classifier(), batch_of()
    ticket = early(model)
    ticket.before(0, 100)
    settings = ticket.learning(config.TrainConfig())
    assert (settings.adversarial, settings.ascent_size, settings.ascent_norm) == ("freelb", 0.01, "text")
    assert ticket.learning(config.TrainConfig(ascent_size=0.05)).ascent_size == 0.05
    adversarial.backward(model, batch, Targets(labels), settings, bf16=False)
    before = [module.gate.grad.clone() for module in (*ticket.outs, *ticket.downs)]
    with torch.no_grad():
        ticket.downs[0].gate[3] = -1
    ticket.regularise()
    added = [module.gate.grad - old for module, old in zip((*ticket.outs, *ticket.downs), before, strict=True)]
    torch.testing.assert_close(added[0], torch.full_like(added[0], 1e-5), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        added[2], torch.full_like(added[2], 2e-4).where(torch.arange(64) != 3, -2e-4), atol=1e-7, rtol=0
    )
    assert all(p.grad is not None for layer in encoders.encoder_layers(model) for p in layer.parameters())


def test_the_smallest_gates_go_over_all_layers_together():
    model = classifier(num_attention_heads=4)
    ticket = EarlyTicket(model, removed(model, 0.25), rewound=None)
    with torch.no_grad():
        for module, low in zip(ticket.downs, (0, 1), strict=True):
            module.gate.copy_(torch.arange(64) / 64 + low)
        ticket.outs[1].gate.copy_(torch.tensor([1.0, 0.9, 1.0, 0.8]))
    ticket.before(1000, 1000)
    assert gone_in(model) == ([0, 2], [32, 0])


# RMC


def test_the_easier_an_example_the_flatter_the_teacher():
    losses = torch.tensor([[0.0, 1.0, 0.5], [0.0, 3.0, 0.5], [0.0, 2.0, 1.1]])
    d = difficulty(losses, 0.2)
    variance = losses.var(0, correction=0)
    torch.testing.assert_close(d, 0.2 + 0.8 * variance / variance[1])
    teacher = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3]]).log()
    got = smoothed(teacher, d).exp()
    torch.testing.assert_close(got[1], teacher[1].exp())  # the hardest one
    by_hand = teacher[0].exp() ** 0.2
    torch.testing.assert_close(got[0], by_hand / by_hand.sum())
    assert 0.5 < got[0, 0] < 0.9
    assert difficulty(torch.ones(5, 3), 0.2).tolist() == [1, 1, 1]


def test_rmc_is_magnitude_pruning_taught_by_the_model_that_is_pruned(tuned, tmp_path, monkeypatch):
    seen = {}
    original = TrainingSetup._targets

    def targets(self, teacher, job, progress):
        found = original(self, teacher, job, progress)
        seen.update(teacher=teacher, loss=self.config.loss, targets=found[0], hard=self._difficulty(job, progress))
        return found

    monkeypatch.setattr(TrainingSetup, "_targets", targets)
    settings = config.PruneConfig(method="rmc", sparsity=0.4)
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK, difficulty_floor=0.3))
    assert result.sparsity == pytest.approx(0.4, abs=1e-3)
    assert seen["teacher"] == tuned and seen["loss"] == "rmc"
    hard = seen["hard"]
    assert len(hard) == 64 and hard.min().item() == pytest.approx(0.3) and hard.max() == 1
    spec = data.get_task("mr")
    examples = data.training(spec).sample(64, 0)
    model, tokenizer = checkpoint.load(tuned)
    log = torch.from_numpy(encoders.predict(model, tokenizer, examples, max_length=spec.max_length)).log_softmax(1)
    torch.testing.assert_close(seen["targets"].teacher, smoothed(log, hard), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="rmc learns by loss rmc, got poe"):
        prune_checkpoint(tuned, "mr", tmp_path / "n", settings, SubnetConfig(**QUICK, loss="poe"))
    with pytest.raises(InputError, match="needs at least 9 steps, got 8"):
        prune_checkpoint(tuned, "mr", tmp_path / "n", settings, SubnetConfig(**{**QUICK, "steps": 8}))


def test_rmc_notes_losses_at_five_sparsities(tuned, tmp_path, monkeypatch):
    found, original = [], LossesWhilePruned.before

    def before(self, step, total):
        noted = len(self.losses)
        zeros = np.mean([float((m.weight == 0).float().mean()) for m, _ in self.linears.values()])
        drawn = original(self, step, total)
        found.extend([zeros] * (len(self.losses) - noted))
        return drawn

    monkeypatch.setattr(LossesWhilePruned, "before", before)
    subnet = SubnetConfig(**{**QUICK, "steps": 18})
    prune_checkpoint(tuned, "mr", tmp_path / "m", config.PruneConfig(method="rmc", sparsity=0.4), subnet)
    assert found == pytest.approx([0.85 * level / 9 for level in (2, 4, 6, 8, 9)], abs=2e-3)


def test_a_killed_rmc_resumes_to_the_same_weights(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STEPS_PER_SNAPSHOT", 2)
    settings, subnet = config.PruneConfig(method="rmc", sparsity=0.4), SubnetConfig(**QUICK)
    prune_checkpoint(tuned, "mr", tmp_path / "whole", settings, subnet)
    for which, last in (("find easy examples", 7), ("", 5)):

        def kill(done, total, what="", which=which, last=last):
            if done == last and what == which:
                raise Killed

        with pytest.raises(Killed):
            prune_checkpoint(tuned, "mr", tmp_path / "cut", settings, subnet, progress=kill)
    begun = []
    prune_checkpoint(
        tuned, "mr", tmp_path / "cut", settings, subnet, progress=lambda done, total, what="": begun.append(what)
    )
    assert "find easy examples" not in begun
    assert checkpoint.weights_sha256(tmp_path / "cut") == checkpoint.weights_sha256(tmp_path / "whole")


# Bag of tricks


def test_a_bag_of_tricks_prunes_the_fine_tuned_model_learns_from_it_and_is_rounded(tuned, tmp_path, monkeypatch):
    losses, original = [], adversarial.backward

    def backward(model, batch, targets, settings, criterion, **more):
        losses.append(
            (settings.loss, targets.teacher is not None, {n: p.detach().clone() for n, p in model.named_parameters()})
        )
        return original(model, batch, targets, settings, criterion, **more)

    monkeypatch.setattr(adversarial, "backward", backward)
    settings = config.PruneConfig(method="bag-of-tricks", sparsity=0.5, calibration_tokens=500)
    result = prune_checkpoint(tuned, "mr", tmp_path / "m", settings, SubnetConfig(**QUICK, search=0.25))
    assert [name for name, _, _ in losses] == ["ce"] * 3 + ["distill"] * 9 and all(taught for _, taught, _ in losses)
    dense = weights_of(checkpoint.load(tuned)[0])
    for name, weight in losses[3][2].items():  # at the first step of training: the fine-tuned weights with zeros
        kept = weight != 0
        torch.testing.assert_close(weight[kept], dense[name][kept])
    assert result.dtype == "int8" and checkpoint.read(tmp_path / "m").scales is not None
    assert gone_in(checkpoint.load(tmp_path / "m")[0])[0] == [1, 1]
