"""A model that trains with fused attention, dropout and embedding gradients, compared with the stock model."""

from __future__ import annotations

import copy

import pytest
import torch
from models import classifier

from sparsebert.training import fused

KINDS = ["bert", "roberta", "xlm-roberta", "electra", "distilbert"]
LABELS = torch.tensor([0, 1, 1])


def batch(mask: str = "padded") -> dict[str, torch.Tensor]:
    ids = torch.randint(100, 1000, (3, 11), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids)
    if mask == "padded":
        keep[1, 4:] = keep[2, 9:] = 0
        ids[keep == 0] = 0
    if mask == "scattered":
        keep[0, 2] = keep[1, 5:8] = 0
    return {"input_ids": ids, "attention_mask": keep}


def twins(kind: str = "bert"):
    stock = classifier(kind)
    mine = copy.deepcopy(stock)
    fused.fuse(mine)
    return stock, mine


def learn(model, inputs) -> torch.Tensor:
    loss = model(**inputs, labels=LABELS).loss
    loss.backward()
    return loss.detach()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(mine, stock) -> None:
    got, wanted = gradients(mine), gradients(stock)
    assert got.keys() == wanted.keys() and len(got) > 20
    for name, gradient in got.items():
        # The gradient of the keys' bias is 0 up to rounding.
        room = 1e-6 + 2e-5 * float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=room, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mask", ["all", "padded", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_stock_model(kind, mask):
    stock, mine = twins(kind)
    inputs = batch(mask)
    torch.testing.assert_close(learn(mine, inputs), learn(stock, inputs), rtol=1e-5, atol=1e-6)
    assert_alike(mine, stock)


def test_parameters_and_config_are_saved_as_before(tmp_path):
    stock, mine = twins()
    stock.save_pretrained(tmp_path / "stock")
    mine.save_pretrained(tmp_path / "mine")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_embedding_gradients_add_up_and_begin_anew():
    """The second batch has other tokens, the third adds to its gradient, the fourth to one that was set by hand."""
    stock, mine = twins()
    first, second = batch(), batch("all")
    second["input_ids"] = second["input_ids"] + 5000
    for model in (stock, mine):
        learn(model, first)
        model.zero_grad(set_to_none=True)
        learn(model, second)
        learn(model, first)
    assert_alike(mine, stock)
    for model in (stock, mine):
        words = model.get_input_embeddings().weight
        words.grad = torch.full_like(words, 0.5)
        learn(model, first)
    assert_alike(mine, stock)
    for model in (stock, mine):
        model.zero_grad(set_to_none=True)
        learn(model, second)
    assert_alike(mine, stock)


def test_frozen_embeddings_get_no_gradient():
    _, mine = twins()
    mine.base_model.embeddings.requires_grad_(False)
    learn(mine, batch())
    assert mine.get_input_embeddings().weight.grad is None


def test_dropout_follows_the_generator_and_is_off_in_evaluation():
    _, mine = twins()
    inputs = batch()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        still = mine(**inputs).logits
        mine.train()
        torch.manual_seed(1)
        one, two = mine(**inputs).logits, mine(**inputs).logits
        torch.manual_seed(1)
        assert torch.equal(mine(**inputs).logits, one)
        assert not torch.equal(one, two) and not torch.equal(one, still)
        mine.eval()
        assert torch.equal(mine(**inputs).logits, still)


def test_dropout_is_everywhere_where_the_stock_model_has_it():
    """Over 300 draws the logits spread as in the stock model, within 10 %."""
    stock, mine = twins()
    assert [n for n, m in mine.named_modules() if isinstance(m, torch.nn.Dropout)] == [
        n for n, m in stock.named_modules() if isinstance(m, torch.nn.Dropout)
    ]
    assert all(type(m) is fused.Dropout for m in mine.modules() if isinstance(m, torch.nn.Dropout))
    inputs = batch()
    spreads = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for model in (stock.train(), mine.train()):
            torch.manual_seed(0)
            spreads.append(torch.stack([model(**inputs).logits for _ in range(300)]).std(0).mean())
    assert 0.9 < float(spreads[1] / spreads[0]) < 1.1
