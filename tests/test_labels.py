"""Labels and problem types in the whole package: labels are matched by name wherever a model meets them; heads of other
problem types than one label per text are trained, pruned and evaluated.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import classifier, saved, tokenizer

from sparsebert import Engine, checkpoint, config, data, encoders, heads
from sparsebert.data import Examples, Task
from sparsebert.encoders import predict, set_labels
from sparsebert.errors import DataError, InputError, SparsebertWarning
from sparsebert.pruning import SubnetConfig, distillation, draw, prune, prune_checkpoint
from sparsebert.robustness import compare, evaluate
from sparsebert.robustness.evaluation import divergences
from sparsebert.training import soup, train
from sparsebert.training.setup import fresh_classifier

TINY = {"steps": 2, "batch_size": 4, "n": 24, "precision": "fp32"}
MR = data.load(data.get_task("mr"), "train", limit=300, seed=0)
WORDS = [f"a film number {i} of many" for i in range(300)]


def reordered(model, names):
    """The same classifier with its labels in another order."""
    own = heads.label_names(model.config.to_dict())
    set_labels(model, names, heads.columns(own, names))
    return model


def same_texts(monkeypatch, tmp_path, task: str, split: str, labels: int, **columns):
    """Writes a small split of a packaged task into a new data folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = 90
    texts = [f"{text[:80]} {i}" for i, text in enumerate(MR.texts[:n])]
    table = {"text": texts, "text_b": texts[::-1], "label": [i % labels for i in range(n)], **columns}
    (tmp_path / task).mkdir(exist_ok=True)
    pq.write_table(pa.table(table), tmp_path / task / f"{split}.parquet")
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))


def test_an_evaluation_does_not_depend_on_the_order_of_the_labels(tmp_path):
    plain = evaluate(saved(tmp_path / "a"), "mr", n=200)
    other = evaluate(saved(tmp_path / "b", reordered(classifier(), ("POS", "Neg"))), "mr", n=200, vs=tmp_path / "a")
    assert other.accuracy == plain.accuracy and abs(plain.accuracy - 0.5) < 0.4
    assert other.kl_to_dense < 1e-9 and other.agreement == 1.0


def test_ids_of_a_file_are_those_of_the_first_model_for_both(tmp_path):
    names = ("sport", "news", "weather", "film")
    (own := tmp_path / "own.csv").write_text("text,label\n" + "".join(f"{t},{i % 4}\n" for i, t in enumerate(WORDS)))
    first = saved(tmp_path / "a", classifier(labels=names))
    other = saved(tmp_path / "b", reordered(classifier(labels=names), ("film", "weather", "sport", "news")))
    found = evaluate(first, str(own), vs=other)
    assert found.agreement == 1.0 and found.kl_to_dense < 1e-9 and found.difference == 0.0
    with pytest.raises(InputError, match="has the labels"):
        evaluate(first, str(own), vs=saved(tmp_path / "c", classifier(labels=("a", "b", "c", "d"))))
    with pytest.warns(SparsebertWarning, match="labels by number, .* by name: they are taken to be in the same order"):
        found = evaluate(saved(tmp_path / "d", classifier(labels=4)), str(own), vs=first)
    assert found.agreement == 1.0 and found.kl_to_dense < 1e-9


@pytest.mark.parametrize(
    "order", [("contradiction", "neutral", "entailment"), ("neutral", "entailment", "contradiction")]
)
def test_three_way_figures_do_not_depend_on_the_order_of_the_labels(monkeypatch, tmp_path, order):
    same_texts(monkeypatch, tmp_path, "mnli", "dev_matched", 3)
    same_texts(monkeypatch, tmp_path, "hans", "test", 2, heuristic=["subsequence"] * 90)
    plain = evaluate(saved(tmp_path / "a", labels=3, seed=3), "mnli", ood="hans")
    other = evaluate(saved(tmp_path / "b", reordered(classifier(labels=3, seed=3), order)), "mnli", ood="hans")
    assert other.accuracy == plain.accuracy
    assert other.ood["hans"]["entailment"] == plain.ood["hans"]["entailment"]
    assert other.ood["hans"]["auroc"] == pytest.approx(plain.ood["hans"]["auroc"])


def test_a_model_that_does_not_name_its_labels_is_refused_and_its_cure_works(tmp_path):
    anonymous = saved(tmp_path / "a", labels=("LABEL_0", "LABEL_1"))
    with pytest.raises(InputError, match="does not name its labels"):
        evaluate(anonymous, "mr", n=20)
    model, tok = checkpoint.load(anonymous)
    set_labels(model, ("negative", "positive"))
    named = checkpoint.save(model, tok, tmp_path / "b", recipe={}, figures={})
    assert named and evaluate(tmp_path / "b", "mr", n=20).n == 20


def test_training_goes_on_with_a_head_in_another_order(tmp_path):
    source = saved(tmp_path / "swapped", reordered(classifier(), ("positive", "negative")))
    spec = data.get_task("mr")
    model, tok = fresh_classifier(source, spec, 0, torch.device("cpu"))
    stock, _ = checkpoint.load(source)
    wanted = predict(stock, tok, MR.take(range(20)), max_length=64)[:, ::-1]
    np.testing.assert_allclose(predict(model.eval(), tok, MR.take(range(20)), max_length=64), wanted, atol=1e-5)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_a_head_of_other_labels_is_drawn_anew_by_train_which_says_so(tmp_path):
    source = saved(tmp_path / "emotions", labels=("joy", "anger"))
    with pytest.warns(UserWarning, match="labels joy, anger, wanted are negative, positive: a new head is drawn"):
        model, _ = fresh_classifier(source, data.get_task("mr"), 0, torch.device("cpu"))
    stock, _ = checkpoint.load(source)
    assert (model.classifier.weight - stock.classifier.weight).abs().min() > 0
    assert model.classifier.bias.abs().max() == 0
    torch.testing.assert_close(model.bert.pooler.dense.weight, stock.bert.pooler.dense.weight)


@pytest.mark.parametrize("method", ["mask", "imp", "soft-movement"])
def test_a_method_that_trains_refuses_a_head_of_other_labels(monkeypatch, tmp_path, method):
    same_texts(monkeypatch, tmp_path, "rte", "train", 2)
    source = saved(tmp_path / "nli", labels=3)
    with pytest.raises(InputError, match="has 3 labels"):
        prune_checkpoint(
            source, "rte", tmp_path / "out", config.PruneConfig(method=method, sparsity=0.5),
            SubnetConfig(**TINY),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_soups_are_averaged_in_the_order_of_the_tasks_labels(tmp_path):
    start = saved(tmp_path / "start")
    settings = {**TINY, "hold_out": 50}
    for seed in (0, 1):
        train(start, "mr", tmp_path / f"m{seed}", config.TrainConfig(**settings, seed=seed))
    plain = soup([tmp_path / "m0", tmp_path / "m1"], "mr", tmp_path / "soup", score="accuracy")
    model, tok = checkpoint.load(tmp_path / "m1")
    recipe = checkpoint.read_recipe(tmp_path / "m1")
    checkpoint.save(reordered(model, ("positive", "negative")), tok, tmp_path / "m2", recipe=recipe, figures={})
    other = soup([tmp_path / "m0", tmp_path / "m2"], "mr", tmp_path / "soup2", score="accuracy")
    assert list(other.scores.values()) == list(plain.scores.values()) and other.score == plain.score


def of_problem(problem: str, n: int = 120) -> tuple[Task, Examples]:
    texts = MR.texts[:n]
    words = np.array([[word in text for word in (" the ", " a ", "film")] for text in texts], dtype=np.float32)
    if problem == "multi_label":
        return Task("own", ("the", "a", "film"), "train", "test", problem=problem), Examples(
            "own", "test", texts, None, words
        )
    values = np.array([len(text) / 50 for text in texts], dtype=np.float32)
    return Task("own", (), "train", "test", problem=problem), Examples("own", "test", texts, None, values)


def headed(problem: str, seed: int = 0):
    model = classifier(labels=3 if problem == "multi_label" else 1, seed=seed)
    model.config.problem_type = heads.PROBLEMS[problem].config_name
    return model


@pytest.mark.parametrize("problem", ["multi_label", "one_logit"])
@pytest.mark.parametrize("settings", [{"tier": 1}, {"tier": 2}, {"method": "adaptive"}], ids=str)
def test_other_heads_are_pruned_towards_the_dense_models_outputs(problem, settings, monkeypatch):
    monkeypatch.setattr(distillation, "STEPS", 50)  # so that the held-out texts are checked once
    monkeypatch.setattr(distillation, "BATCH", 32)
    dense, model, tok = headed(problem), headed(problem), tokenizer()
    calibration = draw(model, tok, MR, 4000, 64, 0)
    prune(model, calibration, config.PruneConfig(sparsity=0.5, **settings))
    random = headed(problem)
    prune(random, None, config.PruneConfig(method="magnitude", sparsity=0.5))
    kind = heads.PROBLEMS[problem]
    texts = MR.take(np.arange(200, 300))
    want, got, other = (predict(m, tok, texts, max_length=64) for m in (dense, model, random))
    assert divergences(kind, want, got).mean() < 0.5 * divergences(kind, want, other).mean()


@pytest.mark.parametrize("problem", ["multi_label", "one_logit"])
def test_figures_of_other_heads(problem):
    task, examples = of_problem(problem)
    kind = heads.PROBLEMS[problem]
    rng = np.random.default_rng(0)
    truth = examples.labels.reshape(len(examples), -1)
    good = (4 * truth - 2 + rng.normal(0, 0.5, truth.shape)).astype(np.float32)
    noisy = (good + rng.normal(0, 3, truth.shape)).astype(np.float32)
    result = compare(task, examples, noisy, good)
    assert result.metric == kind.metric_name and result.score == kind.metric(noisy, examples.labels)
    assert result.score_ci[0] < result.score < result.score_ci[1]
    assert result.difference == pytest.approx(result.score - kind.metric(good, examples.labels))
    assert result.difference_ci[0] < result.difference < result.difference_ci[1] < 0
    assert (result.accuracy is None) == (problem == "one_logit") and result.mcnemar_p is None
    assert result.kl_to_dense > 0 and 0 < result.agreement < 1
    same = compare(task, examples, good, good)
    assert same.kl_to_dense == 0 and same.agreement == pytest.approx(1) and same.difference == 0


def test_class_numbers_of_a_file_are_values_for_one_logit_and_names_are_not(tmp_path):
    path = tmp_path / "mine.csv"
    for numbers in ((0, 1), (-1, 3), (10, 50)):
        path.write_text("text,label\n" + "".join(f"text {i},{numbers[i % 2]}\n" for i in range(20)))
        asked = encoders.task_for(str(path), saved(tmp_path / "reranker", headed("one_logit")))
        labels = np.concatenate([asked.own[split].labels for split in ("train", "test")])
        assert asked.problem == "one_logit" and labels.dtype == np.float32 and set(labels.tolist()) == set(numbers)
    path.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    assert encoders.task_for(str(path), saved(tmp_path / "classes")).problem == "single_label"
    assert encoders.task_for("mr", tmp_path / "reranker").problem == "single_label"


def test_a_file_that_shows_some_of_a_models_labels_is_evaluated(tmp_path):
    model = saved(tmp_path / "nli", labels=3)
    pairs = [(f"a man walks {i}", f"he moves {i}") for i in range(40)]
    logits = Engine.load(model).logits(pairs)
    for name, shown in (("names", ["neutral", "entailment"]), ("ids", [0, 1]), ("one", ["contradiction"])):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"text": a, "text_b": b, "label": shown[i % len(shown)]} for i, (a, b) in enumerate(pairs)]
        (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
        ids = [row["label"] if name == "ids" else data.NLI.index(row["label"]) for row in rows]
        assert evaluate(model, str(folder)).accuracy == (logits.argmax(1) == ids).mean()
        with pytest.raises(DataError, match="has no train file"):
            train(model, str(folder), tmp_path / "t")


@pytest.mark.parametrize("shown", [["0", "2"], ["x", "x"]])
def test_a_class_without_examples_is_not_trained_on(tmp_path, shown):
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"text {i},{shown[i % 2]}\n" for i in range(40)))
    with pytest.raises(DataError, match=r"two labels, and each of them, (none has 'LABEL_1'|all have 'x')"):
        train("minilm", str(tmp_path / "mine.csv"), tmp_path / "m")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("1", "0"), [1, 0]), (("LABEL_1", "LABEL_0"), [1, 0]), (("0", "1"), [0, 1]), (("neg", "pos"), [0, 1]),
     (("1", "2"), None), (("-1", "1"), None)],
)  # fmt: skip
def test_numbers_of_a_file_are_the_names_of_a_model_that_has_numbers_for_names(names, expected):
    if expected is None:
        with pytest.raises(InputError, match="it is not clear which is which"):
            heads.columns(names, ("LABEL_0", "LABEL_1"))
    else:
        assert heads.columns(names, ("LABEL_0", "LABEL_1")).tolist() == expected


def test_the_names_that_datasets_stores_beside_ids_are_read(tmp_path):
    """As `Dataset.to_parquet` writes a ClassLabel, here in another order than the model's."""
    info = {"info": {"features": {"label": {"names": ["pos", "neg"], "_type": "ClassLabel"}}}}
    model = saved(tmp_path / "m")
    texts = [f"a film {i}" for i in range(20)]
    for labels, several in (([i % 2 for i in range(20)], False), ([[i % 2] for i in range(20)], True)):
        table = pa.table({"text": texts, "label": labels})
        if several:
            info["info"]["features"]["label"] = {"feature": info["info"]["features"]["label"], "_type": "List"}
        (tmp_path / str(several)).mkdir()
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, tmp_path / str(several) / "test.parquet")
        found = data.get_task(str(tmp_path / str(several)))
        assert found.labels == ("neg", "pos") and found.problem == ("multi_label" if several else "single_label")
    right = (Engine.load(model).logits(texts).argmax(1) == [1 - i % 2 for i in range(20)]).mean()
    assert evaluate(model, str(tmp_path / "False")).accuracy == right


def test_a_model_of_another_problem_type_is_refused(tmp_path):
    directory = saved(tmp_path / "reranker", headed("one_logit"))
    with pytest.raises(InputError, match="is a one_logit model, the labels of 'mr' are single_label"):
        evaluate(directory, "mr", n=10)
    assert json.loads((directory / "config.json").read_text())["problem_type"] == "regression"


def own_file(tmp_path, problem: str):
    """A file of 120 texts, labelled with the words they have, or with how often one occurs."""
    rows = []
    for i in range(120):
        text = f"{'film ' * (i % 4)}{'the ' * (i % 3)}number {i}"
        label = [word for word in ("film", "the") if word in text] if problem == "multi_label" else 0.5 + i % 4
        rows.append(json.dumps({"text": text, "label": label}) + "\n")
    path = tmp_path / f"{problem}.jsonl"
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize("problem", ["multi_label", "one_logit"])
def test_other_heads_are_trained_evaluated_and_pruned_from_a_file(tmp_path, problem):
    path = own_file(tmp_path, problem)
    settings = config.TrainConfig(steps=80, batch_size=16, lr=4e-3, precision="fp32", hold_out=20, select="best")
    found = train(saved(tmp_path / "start", labels=3), str(path), tmp_path / "model", settings)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    kind = heads.PROBLEMS[problem]
    assert stored["problem_type"] == kind.config_name
    assert list(heads.label_names(stored)) == (["film", "the"] if problem == "multi_label" else ["LABEL_0"])
    result = evaluate(tmp_path / "model", str(path))
    assert result.metric == kind.metric_name and result.score > 0.7 and found.held_out > 0.7
    pruned = prune_checkpoint(
        tmp_path / "model", str(path), tmp_path / "pruned",
        config.PruneConfig(sparsity=0.3, calibration_tokens=2000, tier=0),
    )  # fmt: skip
    again = evaluate(tmp_path / "pruned", str(path), vs=tmp_path / "model")
    assert pruned.sparsity == pytest.approx(0.3, abs=0.01) and again.agreement > 0.5 and again.kl_to_dense > 0


def test_debiased_losses_are_for_one_label_per_text(tmp_path):
    settings = config.TrainConfig(loss="poe", bias="weak", **TINY)
    with pytest.raises(InputError, match="loss poe is for one label per text"):
        train(saved(tmp_path / "start"), str(own_file(tmp_path, "one_logit")), tmp_path / "model", settings)
