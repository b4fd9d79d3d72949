"""Published baselines with labels: what defines each of them."""

from __future__ import annotations

import math

import pytest
import torch
from models import classifier, saved

from sparsebert import checkpoint, config, encoders
from sparsebert.errors import InputError
from sparsebert.pruning import SubnetConfig, prune_checkpoint
from sparsebert.training import adversarial, loop, train
from sparsebert.training.losses import Targets
from sparsebert.training.tickets import HardConcreteLinear, RobustTicket

QUICK = {"n": 64, "batch_size": 8, "steps": 12, "precision": "fp32", "lr": 1e-2, "ascent_steps": 2}


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned") / "m"
    train(start, "mr", output, config.TrainConfig(n=64, batch_size=8, epochs=1, precision="fp32"))
    return output


def batch_of(rows: int = 6):
    ids = torch.arange(5, 5 + rows * 9).view(rows, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(rows) % 2


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# All of them


@pytest.mark.parametrize("method", ["robust-ticket"])
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


@pytest.mark.parametrize("method", ["robust-ticket"])
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
    model, before = checkpoint.load(tmp_path / "m")[0], checkpoint.load(start)[0]
    moved = [
        (m.weight[m.weight != 0] != other.weight[m.weight != 0]).any().item()
        for m, other in zip(
            encoders.encoder_linears(model).values(), encoders.encoder_linears(before).values(), strict=True
        )
    ]
    assert all(moved)
