from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from models import classifier, tokenizer

from sparsebert import checkpoint, config, data
from sparsebert.encoders import encoder_layers
from sparsebert.errors import InputError
from sparsebert.robustness import attacks
from sparsebert.training import adversarial, loop, recipe, soup, train, train_recipe
from sparsebert.training.losses import Targets
from sparsebert.training.soup import SCORES

SETTINGS = {"n": 48, "batch_size": 8, "epochs": 1, "lr": 1e-3, "hold_out": 60}


@pytest.fixture(scope="module")
def models(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        train(start, "mr", folder / f"{seed}", config.TrainConfig(seed=seed, **SETTINGS))
    return [folder / f"{seed}" for seed in range(3)]


def batch_of(n=6):
    tok = tokenizer()
    examples = data.load(data.get_task("mr"), "train", limit=n)
    return dict(tok(examples.texts, padding=True, return_tensors="pt")), torch.from_numpy(examples.labels)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_freelb_sums_the_gradients_along_the_ascent():
    batch, labels = batch_of()
    settings = config.TrainConfig(adversarial="freelb", ascent_steps=3, ascent_size=0.5)
    model = classifier()
    adversarial.freeze(model, settings)
    loss = adversarial.backward(model, batch, Targets(labels), settings, bf16=False)
    got = gradients(model)
    assert not any("embeddings" in name for name in got) and len(got) > 30

    model.zero_grad()
    words = model.get_input_embeddings()(batch["input_ids"])
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    delta, total = torch.zeros_like(words), 0.0
    for _ in range(3):
        moved = (words + delta).detach().requires_grad_()
        step = torch.nn.functional.cross_entropy(model(inputs_embeds=moved, **rest).logits, labels) / 3
        step.backward()
        total += step.item()
        gradient = moved.grad / moved.grad.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        delta = delta + 0.5 * gradient * batch["attention_mask"][..., None]
    assert loss == pytest.approx(total, rel=1e-5)
    for name, p in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["freelb", "last-layer"])
def test_a_perturbation_that_ascends_raises_the_loss(kind):
    batch, labels = batch_of()
    model = classifier()
    plain = adversarial.backward(model, batch, Targets(labels), config.TrainConfig(), bf16=False)
    settings = config.TrainConfig(adversarial=kind, ascent_steps=4, ascent_size=0.05)
    assert adversarial.backward(model, batch, Targets(labels), settings, bf16=False) > plain


def test_last_layer_trains_every_layer_and_leaves_no_trace():
    batch, labels = batch_of()
    model = classifier()
    adversarial.backward(model, batch, Targets(labels), config.TrainConfig(adversarial="last-layer"), bf16=False)
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(layer) and not layer._forward_pre_hooks for layer in encoder_layers(model))


def test_padding_is_not_perturbed():
    batch, labels = batch_of()
    model = classifier()
    seen = []
    handle = encoder_layers(model)[-1].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    adversarial.backward(model, batch, Targets(labels), config.TrainConfig(adversarial="last-layer"), bf16=False)
    handle.remove()
    padding = batch["attention_mask"] == 0
    moved = seen[-2]  # the last ascent through that layer; in the pass of the whole model inputs move after this hook
    assert padding.any() and not torch.equal(seen[0], moved)
    torch.testing.assert_close(seen[0][padding], moved[padding])


@pytest.mark.parametrize(
    "change", [{"optimizer": "sgd"}, {"optimizer": "adam"}, {"adversarial": "freelb"}, {"adversarial": "last-layer"}]
)
def test_a_killed_run_of_any_kind_resumes_to_the_same_weights(start, tmp_path, monkeypatch, change):
    monkeypatch.setattr(loop, "STEPS_PER_SNAPSHOT", 2)
    settings = config.TrainConfig(**{**SETTINGS, "ascent_steps": 2, **change})
    whole = train(start, "mr", tmp_path / "whole", settings)

    def kill(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(start, "mr", tmp_path / "cut", settings, progress=kill)
    resumed = train(start, "mr", tmp_path / "cut", settings)
    assert resumed.resumed_from == 4 and resumed.weights_sha256 == whole.weights_sha256


def test_held_out_examples_are_the_same_for_every_seed_and_never_trained_on():
    examples = data.load(data.get_task("mr"), "train")
    rest, held = data.hold_out(examples, 100)
    assert len(held) == 100 and len(rest) + len(held) == len(examples)
    assert sorted(rest.texts + held.texts) == sorted(examples.texts)
    assert data.hold_out(examples, 100)[1].texts == held.texts
    again = data.Examples("t", "train", ["A film!", "a film", *"bcdefgh"] * 5, None, np.zeros(45, np.int64))
    rest, held = data.hold_out(again, 5)
    assert len(held) == 5 and rest.texts and not set(data.sameness(rest)) & set(data.sameness(held))
    with pytest.raises(InputError, match="all of the 45 are the same as one of the 40"):
        data.hold_out(again, 40)
    with pytest.raises(InputError, match="hold_out must be below the 8662"):
        data.hold_out(examples, 8662)


@pytest.mark.parametrize("score", ["accuracy", "perturbed"])
def test_a_soup_scores_no_worse_than_its_best_member_and_resumes(models, tmp_path, score):
    told = []
    result = soup(models, "mr", tmp_path / "soup", score=score, progress=lambda *_: told.append(1))
    assert result.score >= max(result.scores.values()) and len(told) == 5
    assert result.members[0] == max(result.scores, key=result.scores.get)
    states = [checkpoint.load(member)[0].state_dict() for member in result.members]
    for name, tensor in checkpoint.load(tmp_path / "soup")[0].state_dict().items():
        mean = sum(state[name].double() for state in states) / len(states)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    assert soup(models, "mr", tmp_path / "soup", score=score, progress=lambda *_: told.append(1)) == result
    assert len(told) == 5


def test_a_soup_may_be_judged_by_accuracy_under_attack_on_held_out_examples(models, tmp_path, monkeypatch):
    seen, original = [], attacks.run

    def run(victim, plan, examples, *more):
        seen.append((plan.recipe.name, plan.config.max_seconds, victim.classifier.directory, examples))
        return original(victim, plan, examples, *more)

    monkeypatch.setattr(attacks, "run", run)
    monkeypatch.setattr(sys.modules[soup.__module__], "ATTACKED", 20)
    result = soup(models[:2], "mr", tmp_path / "soup", score="attacked")
    examples = data.training(data.get_task("mr"))
    held = data.hold_out(examples, SETTINGS["hold_out"])[1].sample(20, 0)
    assert len(seen) == 3 and all(some.texts == held.texts for *_, some in seen)
    assert {of[:2] for of in seen} == {("textfooler", None)}, "a busy machine chooses the same soup"
    assert 0 <= result.score <= 1 and result.score >= max(result.scores.values())


def test_an_interrupted_soup_scores_nothing_twice(models, tmp_path, monkeypatch):
    scored = []

    def score(*_):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(1)
        return float(len(scored))

    monkeypatch.setitem(SCORES, "accuracy", score)
    with pytest.raises(KeyboardInterrupt):
        soup(models, "mr", tmp_path / "soup", score="accuracy")
    assert not (tmp_path / "soup").exists()
    monkeypatch.setitem(SCORES, "accuracy", lambda *_: scored.append(1) or 9.0)
    result = soup(models, "mr", tmp_path / "soup", score="accuracy")
    assert list(result.scores.values()) == [1, 2, 3] and len(scored) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_a_harmful_candidate_is_left_out(models, tmp_path):
    model, _ = checkpoint.load(models[0])
    with torch.no_grad():
        model.get_submodule("classifier").weight.mul_(1000)  # confident where it is wrong
    recipe = checkpoint.read_recipe(models[0])
    checkpoint.save(model, tokenizer(), tmp_path / "bad", recipe=recipe, figures={})
    result = soup([tmp_path / "bad", models[0]], "mr", tmp_path / "soup", score="perturbed")
    assert result.members == [str(models[0])]
    assert checkpoint.weights_sha256(tmp_path / "soup") == checkpoint.weights_sha256(models[0])


def test_models_that_do_not_belong_together_are_refused(start, models, tmp_path):
    other = config.TrainConfig(**{**SETTINGS, "hold_out": 61})
    train(start, "mr", tmp_path / "other", other)
    plain = config.TrainConfig(**{**SETTINGS, "hold_out": 0})
    train(start, "mr", tmp_path / "plain", plain)
    for group, message in (
        ([models[0], tmp_path / "other"], "share their start and hold_out"),
        ([models[0], tmp_path / "plain"], "with examples held out"),
        ([models[0], start], "its recipe says command 'test'"),
    ):
        with pytest.raises(InputError, match=message):
            soup(group, "mr", tmp_path / "soup")
    with pytest.raises(InputError, match="score must be one of accuracy, perturbed"):
        soup(models, "mr", tmp_path / "soup", score="nope")
    assert not (tmp_path / "soup").exists()


def test_a_recipe_trains_each_of_its_models(start, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "common: {n: 16, batch_size: 8, epochs: 1, hold_out: 60}\nmodels:\n  a: {seed: 1}\n  b: {lr: 1.0e-4}\n"
    )
    results = train_recipe(start, "mr", tmp_path / "out", recipe)
    assert list(results) == ["a", "b"]
    assert checkpoint.read_recipe(tmp_path / "out" / "b")["lr"] == 1e-4
    assert soup([tmp_path / "out" / name for name in results], "mr", tmp_path / "soup").score <= 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [1]", "must map `models`"),
        ("models: {a: {lr: -1}}", "a: lr must be greater than 0"),
        ("models: {a: {nope: 1}}", "a: nope: Extra inputs"),
        ("models: {../a: {lr: 1}}", "must be a plain name"),
        ("{", "must be a YAML file"),
    ],
)
def test_a_recipe_that_is_wrong_says_where(start, tmp_path, text, message):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError, match=message):
        train_recipe(start, "mr", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_the_papers_recipe_has_its_ten_models():
    configs = recipe.read_recipe("emnlp2023-soup")
    assert len(configs) == 10
    assert sum(c.adversarial == "freelb" for c in configs.values()) == 5
    assert sum(c.optimizer == "sgd" for c in configs.values()) == 3
    assert len(recipe.read_recipe("quick-soup")) == 5
