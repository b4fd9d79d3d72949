from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsebert.training.losses import LOSSES, Targets

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 1.0]])
P_M = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(1, keepdims=True)
P_B = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
P_T = np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
LABELS = np.array([0, 1])


def loss(name: str, logits=LOGITS) -> torch.Tensor:
    log = {"bias": torch.tensor(P_B).log().float(), "teacher": torch.tensor(P_T).log().float()}
    return LOSSES[name].criterion(logits, Targets(torch.from_numpy(LABELS), **log))


def of_label(p: np.ndarray) -> np.ndarray:
    return p[np.arange(2), LABELS]


def expected(name: str) -> float:
    beta = of_label(P_B)
    if name == "ce":
        return -np.log(of_label(P_M)).mean()
    if name == "poe":
        product = P_M * P_B
        return -np.log(of_label(product / product.sum(1, keepdims=True))).mean()
    if name == "confreg":
        scaled = P_T ** (1 - beta)[:, None]
        scaled /= scaled.sum(1, keepdims=True)
        return -(scaled * np.log(P_M)).sum(1).mean()
    if name in ("distill", "rmc"):  # the teacher of rmc was smoothed before
        apart = (P_T * np.log(P_T / P_M)).sum(1).mean()
        return 0.1 * -np.log(of_label(P_M)).mean() + 0.9 * apart
    weighted = -(1 - beta) * np.log(of_label(P_M))
    return weighted.sum() / (1 - beta).sum() if name == "reweight" else weighted.mean()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_papers_formula(name: str):
    assert loss(name).item() == pytest.approx(expected(name), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_depends_on_the_bias_model_exactly_where_it_says_so(name: str):
    other = Targets(
        torch.from_numpy(LABELS), torch.tensor(P_B[:, ::-1].copy()).log().float(), torch.tensor(P_T).log().float()
    )
    assert (LOSSES[name].criterion(LOGITS, other) != loss(name)).item() == LOSSES[name].bias


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if kind.bias])
def test_what_the_bias_model_knows_is_learnt_less(name: str):
    """The gradient of an example that the bias model is sure of, relative to another's, is smaller than with "ce"."""

    def pull(which: str) -> float:
        logits = torch.zeros(2, 3, requires_grad=True)
        loss(which, logits).backward()
        return abs(logits.grad[0, 0].item()) / abs(logits.grad[1, 1].item())

    assert pull(name) < pull("ce")


def test_a_bias_model_that_is_sure_of_everything_leaves_no_loss_and_no_nan():
    sure = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).log().clamp_min(-20)
    for name in ("poe", "reweight", "reweight-mean", "confreg"):
        logits = LOGITS.clone().requires_grad_()
        value = LOSSES[name].criterion(logits, Targets(torch.from_numpy(LABELS), sure, sure))
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all()


def test_rows_of_targets():
    targets = Targets(torch.arange(4), bias=torch.arange(8.0).view(4, 2))
    some = targets[torch.tensor([2, 0])]
    assert some.labels.tolist() == [2, 0] and some.bias.tolist() == [[4, 5], [0, 1]] and some.teacher is None
