from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import local_data
from models import classifier, saved, tokenizer

from sparsebert import config, data
from sparsebert.errors import InputError, OutputError
from sparsebert.training import bias, train

MNLI, MR, FEVER = (data.get_task(name) for name in ("mnli", "mr", "fever"))
PAIRS = [
    ("The doctors saw the actor.", "The doctors saw the actor", 0),
    ("The actor, who the doctors saw, ran.", "The actor ran", 1),
    ("The doctors saw the actor.", "The judges left", 2),
    ("Rain fell.", "!!", 1),
]


def pairs(rows=PAIRS) -> data.Examples:
    texts, texts_b, labels = zip(*rows, strict=True)
    return data.Examples("mnli", "train", list(texts), list(texts_b), np.array(labels))


@pytest.fixture(scope="module")
def words():
    return bias.WordVectors(tokenizer(), classifier().get_input_embeddings().weight.detach().numpy())


def never(examples, number):
    raise AssertionError("no weak learner was asked for")


def predict(kind: str, spec, examples, seed=0) -> np.ndarray:
    return bias.predictions(kind, spec, examples, classifier(labels=len(spec.labels)), tokenizer(), never, seed)


def test_overlap_features_by_hand(words):
    found = bias.overlap(pairs(), words)
    assert found[0, :5] == pytest.approx([1, 1, 1, 1, 1], abs=1e-6)
    assert found[1, :3] == pytest.approx([1, 0, 1])  # every word, but not side by side
    assert found[2, :3] == pytest.approx([0, 0, 1 / 3])
    assert found[2, 4] < found[2, 3] < 1 and found[2, 6] < 1
    assert found[0, 5] == pytest.approx(0) and found[1, 5] == pytest.approx(np.log(4))
    assert (found[3, :5] == 0).all()  # a hypothesis without words


def test_overlap_is_blind_to_case_and_punctuation(words):
    a, b = (
        bias.overlap(pairs([("the ACTOR ran", text, 0)]), words)[0, :3] for text in ("The actor, ran!", "the actor ran")
    )
    assert (a == b).all() and (a == 1).all()


def test_words_have_vectors_of_length_one(words):
    assert np.linalg.norm(words(["unbelievable", "the"]), axis=1) == pytest.approx([1, 1])


@pytest.fixture
def many():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    signal = (labels == 0) + rng.normal(0, 0.4, 600)
    return labels, np.stack([signal, rng.normal(size=600)], 1)


def labelled(labels, texts=None):
    """MNLI examples with these labels, all different unless texts are given."""
    texts = texts or [f"text {i}" for i in range(len(labels))]
    return data.Examples("mnli", "train", texts, ["it"] * len(labels), np.asarray(labels))


def test_an_example_is_not_judged_by_a_model_that_saw_the_same_text():
    """Each text occurs ten times with the same label, and features only tell the texts apart."""
    rng = np.random.default_rng(0)
    labels, features = rng.integers(0, 2, 30).repeat(10), np.eye(30).repeat(10, axis=0)
    texts = [f"text {i}" for i in range(30) for _ in range(10)]
    by_row = bias.out_of_fold(features, labelled(labels), MNLI, 0)
    by_text = bias.out_of_fold(features, labelled(labels, texts), MNLI, 0)
    right = [((found[:, 0] > np.log(0.5)) == (labels == 0)).mean() for found in (by_row, by_text)]
    assert right[0] == 1 and right[1] < 0.7


def test_halves_of_the_weak_learner_share_no_text():
    texts, asked = ["a", "A ", "b", "B!", "c", "C?"] * 4, []
    examples = data.Examples("mr", "train", texts, None, np.arange(24) % 2)

    def weak(own, number):
        asked.append(set(data.sameness(own)))
        return classifier()

    bias.weak_learner(MR, examples, tokenizer(), weak, 0)
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 3


def test_the_rest_of_the_probability_is_shared_equally(many):
    labels, features = many
    log_probs = bias.out_of_fold(features, labelled(labels), MNLI, 0)
    assert np.exp(log_probs).sum(1) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(log_probs[:, 1], log_probs[:, 2])
    assert ((log_probs.argmax(1) == 0) == (labels == 0)).mean() > 0.8


def test_no_example_is_judged_by_a_model_that_saw_it(many):
    """Features say nothing about these labels, so they are only guessed; a model fitted to them would do better."""
    labels = np.random.default_rng(1).integers(0, 3, 120)
    features = np.random.default_rng(2).normal(size=(120, 100))
    log_probs = bias.out_of_fold(features, labelled(labels), MNLI, 0)
    right = (log_probs[:, 0] > np.log(0.5)) == (labels == 0)
    assert right.mean() < 0.7


def test_the_claim_alone_is_looked_at():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    claims = [f"{rng.choice(['he', 'she'])} did {'not' if label else 'win'}" for label in labels]
    seen, blind = (
        data.Examples("fever", "train", [f"{text} {i}" for i in range(60)], claims, labels)
        for text in ("she won", "nothing")
    )
    log_probs = predict("auto", FEVER, seen)
    np.testing.assert_array_equal(log_probs, predict("auto", FEVER, blind))
    assert (log_probs.argmax(1) == labels).all()


@pytest.mark.parametrize(("kind", "spec"), [("auto", MR), ("overlap", MR)])
def test_a_task_without_that_bias_model_is_refused(kind, spec):
    examples = data.load(spec, "train", limit=20, seed=0)
    with pytest.raises(InputError, match="bias model"):
        predict(kind, spec, examples)


def test_the_weak_learner_judges_the_other_half():
    examples = data.load(MR, "train", limit=40, seed=0)
    seen = []

    def weak(own, number):
        seen.append(set(own.texts))
        return classifier(seed=number)

    log_probs = bias.predictions("weak", MR, examples, classifier(), tokenizer(), weak, 0)
    assert log_probs.shape == (40, 2) and np.exp(log_probs).sum(1) == pytest.approx(1, abs=1e-5)
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 40


TINY = {"batch_size": 8, "epochs": 0.1, "precision": "fp32"}


def test_a_bias_model_trained_on_examples_it_would_judge_is_refused(start, tmp_path):
    train(start, "mr", tmp_path / "bias", config.TrainConfig(n=64, **TINY))
    settings = config.TrainConfig(loss="poe", bias=str(tmp_path / "bias"), n=500, seed=3, **TINY)
    with pytest.raises(InputError, match=r"was trained on \d+ of the 500 examples it would have to judge"):
        train(start, "mr", tmp_path / "m", settings)
    assert not (tmp_path / "m").exists()


def folder_task(folder, texts):
    """A user's folder with these texts, in other case and spacing."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": text.upper().replace(" ", "  "), "label": i % 2} for i, text in enumerate(texts)]
    others = [{"text": f"reported {word}", "label": i} for i, word in enumerate(("elsewhere", "alone"))]
    for split, some in (("train", rows), ("test", others)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def test_examples_are_the_same_whatever_their_task_is_called(start, tmp_path, monkeypatch):
    texts = data.load(MR, "train").texts
    folder_task(tmp_path / "mine", texts)
    monkeypatch.chdir(tmp_path)
    train(start, "mine", tmp_path / "bias", config.TrainConfig(n=64, **TINY))
    monkeypatch.chdir("/")  # the recipe's relative path leads nowhere from here
    with pytest.raises(InputError, match=r"was trained on 64 of the 8662 examples it would have to judge"):
        predict(str(tmp_path / "bias"), MR, data.load(MR, "train"))
    folder_task(tmp_path / "mine", texts[:5000])
    with pytest.raises(InputError, match=r"the training examples of .*bias, .*mine, have changed"):
        predict(str(tmp_path / "bias"), MR, data.load(MR, "train"))
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(InputError, match=r"the training examples of .*bias cannot be read any more"):
        predict(str(tmp_path / "bias"), MR, data.load(MR, "train"))


def test_what_a_bias_model_was_trained_from_has_seen_its_examples_too(start, tmp_path):
    train(start, "mr", tmp_path / "first", config.TrainConfig(n=64, **TINY))
    other = folder_task(tmp_path / "other", [f"text number {i}" for i in range(40)])
    train(tmp_path / "first", str(other), tmp_path / "bias", config.TrainConfig(**TINY))
    with pytest.raises(InputError, match=r"was trained on 64 of the 8662"):
        predict(str(tmp_path / "bias"), MR, data.load(MR, "train"))


@local_data
def test_a_bias_model_has_seen_what_was_mixed_in(tmp_path):
    mixed = config.TrainConfig(mix_ood=True, n=30, **TINY)
    recipe = {"task": "mnli", "hold_out": 0, **mixed.model_dump()}
    model = saved(tmp_path / "m", labels=3)
    seen, hans = data.sameness(bias.training_examples(model, recipe)), data.TASKS["hans"]
    assert set(data.sameness(data.training(hans))) <= set(seen) and len(seen) == 30 + 30_000 - 65


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_content_of_a_bias_model_is_part_of_the_key(start, tmp_path, kind):
    path, again = tmp_path / ("b.npy" if kind == "file" else "b"), {"hold_out": 8000, **TINY}
    rng = np.random.default_rng(0)

    def make(seed):
        if kind == "file":
            np.save(path, np.log(rng.dirichlet([1, 1], 8662)))
        else:
            train(start, "mr", path, config.TrainConfig(seed=seed, n=30, **again), overwrite=True)

    make(0)
    settings = config.TrainConfig(loss="poe", bias=str(path), n=20, **TINY)
    if kind == "directory":  # examples that the bias model did not see
        held = folder_task(tmp_path / "held", data.hold_out(data.load(MR, "train"), 8000)[1].texts)
    task = "mr" if kind == "file" else str(held)
    first = train(start, task, tmp_path / "m", settings)
    assert train(start, task, tmp_path / "m", settings).weights_sha256 == first.weights_sha256
    make(1)
    with pytest.raises(
        OutputError, match=r"m was made with other contents of --bias \(sha256 [0-9a-f]{8}…, not [0-9a-f]{8}…\); repeat"
    ):
        train(start, task, tmp_path / "m", settings)


def test_a_classifier_of_other_examples_is_taken(start, tmp_path):
    held = config.TrainConfig(hold_out=8000, **TINY)
    train(start, "mr", tmp_path / "bias", held)
    examples, held_out = data.hold_out(data.load(MR, "train"), 8000)
    log_probs = predict(str(tmp_path / "bias"), MR, held_out.take(np.arange(30)))
    assert np.exp(log_probs).sum(1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="trained on 30 of the 30"):
        predict(str(tmp_path / "bias"), MR, examples.take(np.arange(30)))


def test_a_bias_model_with_other_labels_is_refused(start, tmp_path):
    train(start, "mr", tmp_path / "bias", config.TrainConfig(**TINY))
    with pytest.raises(InputError, match="has 2 labels"):
        predict(str(tmp_path / "bias"), MNLI, pairs())


def test_a_model_of_unknown_training_is_refused(start):
    with pytest.raises(InputError, match="its recipe says"):
        predict(str(start), MR, data.load(MR, "train", limit=5, seed=0))


def test_log_probabilities_from_a_file(tmp_path):
    whole = data.load(MR, "train")
    stored = np.log(np.random.default_rng(0).dirichlet([1, 1], len(whole)))
    np.save(tmp_path / "bias.npy", stored)
    examples = whole.take([5, 3])
    np.testing.assert_allclose(predict(str(tmp_path / "bias.npy"), MR, examples), stored[[5, 3]], atol=1e-5)


@pytest.mark.parametrize("content", [np.zeros((3, 2)), np.full((8662, 2), np.nan), np.zeros((8662, 3))])
def test_a_file_of_another_shape_or_without_numbers_is_refused(tmp_path, content):
    np.save(tmp_path / "bias.npy", content)
    with pytest.raises(InputError, match=r"must hold log probabilities \[8662, 2\]"):
        predict(str(tmp_path / "bias.npy"), MR, data.load(MR, "train", limit=5, seed=0))


def test_a_pickled_file_is_refused(tmp_path):
    np.save(tmp_path / "bias.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"must be a \.npy array of numbers"):
        predict(str(tmp_path / "bias.npy"), MR, data.load(MR, "train", limit=5, seed=0))
