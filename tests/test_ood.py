from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from models import saved

from sparsebert import data
from sparsebert.cli import main
from sparsebert.errors import DataError, InputError
from sparsebert.robustness import evaluate, ood
from sparsebert.robustness.evaluation import _Model

HANS = data.Examples(
    "hans", "test", ["a"] * 6, ["b"] * 6, np.array([0, 0, 1, 1, 1, 0]),
    ["lexical_overlap", "lexical_overlap", "lexical_overlap", "subsequence", "subsequence", "constituent"],
)  # fmt: skip


def three_way(*rows) -> np.ndarray:
    """Logits of probabilities."""
    return np.log(np.array(rows, dtype=np.float64))


def test_hans_by_class_heuristic_and_both_ways_to_two_classes():
    logits = three_way(
        [0.8, 0.1, 0.1],  # entailment
        [0.4, 0.3, 0.3],  # entailment by arg-max, not by the sum
        [0.4, 0.35, 0.25],  # the same, where the label is not-entailment
        [0.1, 0.2, 0.7],
        [0.6, 0.2, 0.2],  # wrong both ways
        [0.2, 0.7, 0.1],  # wrong both ways
    )
    found = ood.figures("hans", HANS, logits)
    assert found["n"] == 6 and found["accuracy"] == pytest.approx(3 / 6)
    assert found["entailment"] == pytest.approx(2 / 3) and found["non_entailment"] == pytest.approx(1 / 3)
    summed = found["summed"]
    assert summed["entailment"] == pytest.approx(1 / 3) and summed["non_entailment"] == pytest.approx(2 / 3)
    by = found["by_heuristic"]
    assert list(by) == ["lexical_overlap", "subsequence", "constituent"] and by["lexical_overlap"]["n"] == 3
    assert by["lexical_overlap"]["entailment"] == 1 and by["lexical_overlap"]["non_entailment"] == 0
    assert by["subsequence"]["non_entailment"] == 0.5 and "entailment" not in by["subsequence"]
    low, high = found["entailment_ci"]
    assert low < 2 / 3 < high


def test_a_two_way_model_on_hans_has_nothing_to_sum():
    found = ood.figures("hans", HANS, np.eye(2)[[0, 0, 1, 1, 1, 0]])
    assert found["accuracy"] == 1 and "summed" not in found


def test_a_model_that_never_says_paraphrase_shows():
    labels = np.array([0] * 72 + [1] * 28)
    examples = data.Examples("paws_qqp", "dev_and_test", ["a"] * 100, ["b"] * 100, labels)
    found = ood.figures("paws_qqp", examples, np.tile([1.0, 0.0], (100, 1)))
    assert found["accuracy"] == 0.72 and found["f1"] == 0 and found["predicted_positive"] == 0
    assert found["f1_weighted"] == pytest.approx(0.72 * (2 * 72 / 172)) and found["f1_ci"] == (0, 0)


def test_fact_verification_has_its_accuracy():
    examples = data.Examples("fever_symm_v1", "test", ["a"] * 4, ["b"] * 4, np.array([0, 1, 1, 0]))
    found = ood.figures("fever_symm_v1", examples, np.eye(2)[[0, 1, 0, 0]])
    assert found["accuracy"] == 0.75 and set(found) == {"n", "accuracy", "accuracy_ci"}


@pytest.mark.parametrize(
    ("task", "wanted", "expected"),
    [
        ("mnli", "all", ["hans"]),
        ("qqp", "paws_wiki, paws_qqp", ["paws_wiki", "paws_qqp"]),
        ("fever", "fever_symm_v2", ["fever_symm_v2"]),
    ],
)
def test_tests_are_named_or_all(task, wanted, expected):
    assert ood.tests_of(data.get_task(task), wanted) == expected


@pytest.mark.parametrize(
    ("task", "wanted"), [("mnli", "paws_qqp"), ("sst2", "hans"), ("sst2", "all"), ("mnli", "nonsense"), ("mnli", ",")]
)
def test_a_test_of_another_task_is_refused(task, wanted):
    with pytest.raises(InputError, match="ood must be"):
        ood.tests_of(data.get_task(task), wanted)


# On disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with few examples of MNLI and HANS."""
    rng = np.random.default_rng(0)
    words = "the doctor saw an actor who ran to judges near lawyers".split()

    def texts(n):
        return [" ".join(rng.choice(words, 6)) for _ in range(n)]

    for name, split, labels, extra in (
        ("mnli", "dev_matched", 3, {}),
        ("hans", "test", 2, {"heuristic": ["lexical_overlap", "subsequence"] * 20}),
    ):
        columns = {"text": texts(40), "text_b": texts(40), "label": [i % labels for i in range(40)], **extra}
        (tmp_path / "data" / name).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data" / name / f"{split}.parquet")
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path / "data"))
    return tmp_path


def test_the_command_adds_the_tests_figures(folder, capsys):
    saved(folder / "m", labels=3)
    saved(folder / "dense", labels=3, seed=1)
    arguments = ["eval", str(folder / "m"), "--task", "mnli", "--ood", "hans", "--vs", str(folder / "dense")]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    hans = document["ood"]["hans"]
    assert {
        "accuracy",
        "entailment",
        "non_entailment",
        "by_heuristic",
        "summed",
        "difference_ci",
        "mcnemar_p",
    } <= hans.keys()
    assert set(hans["by_heuristic"]) == {"lexical_overlap", "subsequence"} and hans["n"] == 40
    assert main([*arguments, "--n", "10"]) == 0
    shown = capsys.readouterr().out
    assert "summed: non_entailment" in shown and json.loads(shown.splitlines()[-1])["ood"]["hans"]["n"] == 10


def test_a_wrong_name_is_refused_before_anything_is_read(folder, capsys):
    assert main(["eval", str(folder / "none"), "--task", "mnli", "--ood", "paws_qqp"]) == 2
    assert capsys.readouterr().err.startswith("error: ood must be one of hans, or all")


def test_a_missing_column_of_groups_is_named(folder):
    path = folder / "data/hans/test.parquet"
    table = pyarrow.parquet.read_table(path).drop_columns(["heuristic"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"hans/test\.parquet must have columns .*heuristic"):
        evaluate(saved(folder / "m", labels=3), "mnli", ood="hans")


def test_groups_follow_their_examples(folder):
    examples = data.load(data.get_task("hans"), "test")
    some = examples.take([3, 0])
    assert some.groups == ["subsequence", "lexical_overlap"] and examples.sample(5, 0).groups is not None
    assert replace(examples, groups=None).sha256 == examples.sha256


def test_engine_and_torch_agree_and_cut_alike(folder, monkeypatch):
    spec = replace(data.get_task("mnli"), max_length=10)
    examples = data.load(spec, "dev_matched")
    by_engine = _Model(saved(folder / "m", labels=3), spec)
    assert by_engine._engine is not None
    monkeypatch.setattr("sparsebert.robustness.evaluation.TEXTS_A_CALL", 7)
    by_torch = _Model(folder / "m", spec)
    from sparsebert import checkpoint

    by_torch._engine, by_torch._torch = None, checkpoint.load(folder / "m")
    ours, theirs = (model.logits(examples, lambda done, total: None) for model in (by_engine, by_torch))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_examples_for_an_upper_bound_are_mixed_in(folder):
    columns = {"text": ["a b"] * 4, "text_b": ["a"] * 4, "label": [0, 1, 0, 1], "heuristic": ["subsequence"] * 4}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data/hans/train.parquet")
    spec = data.get_task("mnli")
    mixed = data.mix_ood(spec, data.load(spec, "dev_matched"))
    assert len(mixed) == 44 and mixed.labels[-4:].tolist() == [0, 2, 0, 2], "what is not entailed contradicts"
    with pytest.raises(InputError, match="no out-of-distribution training examples"):
        data.mix_ood(data.get_task("mr"), data.load(data.get_task("mr"), "test", limit=3))
