"""Out-of-distribution tests: their figures on logits made by hand, the engine that runs them, and the command line."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import refused, run
from models import classifier, saved

from sparsebert import checkpoint, data, encoders
from sparsebert.data import Examples
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import CheckpointError, InputError
from sparsebert.ops import _dispatch
from sparsebert.robustness import compare, compare_ood, evaluate, ood, statistics

HEURISTICS = ["lexical_overlap", "lexical_overlap", "lexical_overlap", "subsequence", "constituent", "subsequence"]
LABELS = [0, 1, 0, 1, 1, 0]
# Rows 1 and 2 are entailment by the largest logit, and not by the sum of the other two: 1.9 + ln 2 > 2.
THREE_WAY = np.array([[3, 1, 1], [2, 1.9, 1.9], [2, 1.9, 1.9], [1, 3, 1], [1, 1, 3], [0, 2, 0]], np.float32)


def examples(task: str, labels, groups=None) -> Examples:
    texts = ["x"] * len(labels)
    return Examples(task, "test", texts, texts, np.array(labels), groups=groups)


def of_hans(logits: np.ndarray, dense: np.ndarray | None = None) -> dict:
    return compare_ood(data.TASKS["hans"], examples("hans", LABELS, HEURISTICS), logits, dense)


def test_the_largest_logit_of_a_three_way_model_decides():
    figures = of_hans(THREE_WAY)
    assert (figures["n"], figures["accuracy"]) == (6, 4 / 6)
    assert (figures["entailment"], figures["non_entailment"]) == (2 / 3, 2 / 3)
    assert figures["entailment_ci"] == figures["non_entailment_ci"] == statistics.wilson(2, 3)


def test_summed_probabilities_decide_otherwise():
    assert of_hans(THREE_WAY)["summed"] == {"accuracy": 4 / 6, "entailment": 1 / 3, "non_entailment": 1.0}


def test_the_area_under_the_curve_ignores_what_a_model_prefers_to_answer():
    """Rows 0, 2 and 5 are entailed, with log odds of 1.3, -0.6 and -2.1; the others have -0.6, -2.1 and -2.1."""
    assert of_hans(THREE_WAY)["auroc"] == (3 + 2.5 + 1) / 9
    assert of_hans(THREE_WAY + np.array([5, 0, 0], np.float32))["auroc"] == (3 + 2.5 + 1) / 9
    two_way = np.stack([THREE_WAY[:, 0], np.zeros(6, np.float32)], 1)
    assert of_hans(two_way)["auroc"] == (3 + 2 + 0.5) / 9
    one_class = examples("hans", [1, 1], ["subsequence"] * 2)
    assert compare_ood(data.TASKS["hans"], one_class, THREE_WAY[:2])["auroc"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_are_refused_naming_the_text(value, which):
    broken = [THREE_WAY.copy(), THREE_WAY.copy()]
    broken[which][5, 0] = value
    with pytest.raises(CheckpointError, match=r"hans: logits must be finite, those of texts\[5\]"):
        of_hans(*broken)


def test_large_logits_do_not_overflow_the_sum():
    summed = of_hans(THREE_WAY * np.float32(1e30))["summed"]
    assert summed == {"accuracy": 4 / 6, "entailment": 2 / 3, "non_entailment": 2 / 3}


def test_figures_are_given_by_heuristic():
    found = of_hans(THREE_WAY)["by_heuristic"]
    assert list(found) == ["constituent", "lexical_overlap", "subsequence"]
    shares = {name: (group["n"], group["entailment"], group["non_entailment"]) for name, group in found.items()}
    assert shares == {"constituent": (1, None, 1.0), "lexical_overlap": (3, 1.0, 0.0), "subsequence": (2, 0.0, 1.0)}
    assert found["constituent"]["entailment_ci"] is None
    assert found["lexical_overlap"]["entailment_ci"] == statistics.wilson(2, 2)


def test_a_two_way_model_has_nothing_to_sum():
    figures = of_hans(THREE_WAY[:, :2])
    assert "summed" not in figures and figures["accuracy"] == 3 / 6


def test_ood_figures_are_paired_with_the_dense_models():
    dense = THREE_WAY.copy()
    dense[5] = [2, 0, 0]  # right where the other is wrong
    figures = of_hans(THREE_WAY, dense)
    correct = np.array([True, False, True, True, True, False]), np.array([True, False, True, True, True, True])
    assert figures["difference"] == pytest.approx(-1 / 6)
    assert figures["difference_ci"] == statistics.paired_difference(*correct)
    assert figures["mcnemar_p"] == statistics.mcnemar(*correct) == 1.0
    assert "difference" not in of_hans(THREE_WAY)


def test_a_classifier_that_never_says_paraphrase_is_seen_on_paws():
    logits = np.tile(np.array([[1, 0]], np.float32), (677, 1))
    figures = compare_ood(data.TASKS["paws_qqp"], examples("paws_qqp", [0] * 486 + [1] * 191), logits)
    assert figures["accuracy"] == pytest.approx(0.7179, abs=5e-5)
    assert (figures["f1"], figures["f1_ci"], figures["predicted_positive"]) == (0, (0, 0), 0)
    assert figures["f1_weighted"] == pytest.approx(486 / 677 * (2 * 486 / (2 * 486 + 191)))
    assert figures["f1_weighted_ci"][0] < figures["f1_weighted"] < figures["f1_weighted_ci"][1]


def test_both_senses_of_f1_are_reported_in_distribution_too():
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0], [0, 1]], np.float32)
    result = compare(data.TASKS["qqp"], examples("qqp", [1, 0, 1, 0, 1]), logits)
    assert result.f1 == pytest.approx(2 / 3) and result.f1_weighted == pytest.approx(3 / 5 * 2 / 3 + 2 / 5 * 1 / 2)
    assert result.predicted_positive == 3 / 5 and result.f1_ci[0] <= result.f1 <= result.f1_ci[1]


def test_fact_checks_have_accuracy_and_calibration_alone():
    logits = np.array([[0, 1], [0, 1], [1, 0]], np.float32)
    figures = compare_ood(data.TASKS["fever_symm_v1"], examples("fever_symm_v1", [1, 0, 0]), logits)
    assert figures.pop("ece") == pytest.approx(abs(2 / 3 - np.e / (1 + np.e))) and len(figures.pop("ece_ci")) == 2
    assert figures == {"split": "test", "n": 3, "accuracy": 2 / 3, "accuracy_ci": statistics.wilson(2, 3)}


@pytest.mark.parametrize(
    ("task", "logits"),
    [("fever_symm_v1", np.zeros((1, 3))), ("paws_qqp", np.zeros((1, 3))), ("hans", np.zeros((1, 4)))],
)
def test_logits_of_other_labels_are_refused(task, logits):
    with pytest.raises(InputError, match=f"task '{task}' has 2 labels, the model has {logits.shape[1]}"):
        compare_ood(data.TASKS[task], examples(task, [0], ["constituent"]), logits)


@pytest.mark.parametrize(
    ("task", "names", "found"),
    [
        ("mnli", "hans", ["hans"]),
        ("snli", "all", ["hans"]),
        ("qqp", "all", ["paws_qqp", "paws_wiki"]),
        ("qqp", "paws_wiki, paws_qqp,paws_wiki", ["paws_wiki", "paws_qqp"]),
        ("fever", "all", ["fever_symm_v1", "fever_symm_v2"]),
    ],
)
def test_ood_tests_are_named_with_commas_or_all(task, names, found):
    assert [test.name for test in ood.named(data.TASKS[task], names)] == found


@pytest.mark.parametrize(
    ("task", "names", "message"),
    [
        ("mnli", "nope", "ood must be hans or all for task 'mnli', got 'nope'"),
        ("mnli", "hans,paws_qqp", "got 'paws_qqp'"),
        ("qqp", "paws_qqp,", "ood must be paws_qqp, paws_wiki or all for task 'qqp', got ''"),
        ("sst2", "hans", "ood must be left out for task 'sst2'"),
        ("sst2", "all", "choose one of the tasks mnli, snli, qqp, fever"),
    ],
)
def test_names_that_are_no_ood_tests_of_the_task_are_refused(task, names, message):
    with pytest.raises(InputError, match=message):
        ood.named(data.TASKS[task], names)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """A data folder with a small MNLI and HANS."""
    n, rng = 90, np.random.default_rng(0)
    words = np.array("the doctor saw a lawyer near actors who danced and some judge slept".split())

    def texts(shortest: int, longest: int) -> list[str]:
        return [" ".join(rng.choice(words, rng.integers(shortest, longest))) for _ in range(n)]

    pairs = {"text": texts(3, 200), "text_b": texts(3, 12)}
    write(tmp_path / "mnli" / "dev_matched.parquet", {**pairs, "label": [i % 3 for i in range(n)]})
    pairs = {"text": texts(5, 12), "text_b": texts(3, 9)}
    heuristics = [HEURISTICS[i % 6] for i in range(n)]
    write(tmp_path / "hans" / "test.parquet", {**pairs, "label": [i % 2 for i in range(n)], "heuristic": heuristics})
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    return tmp_path


def write(path, columns) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("ood") / "model", labels=3)


def expected_engine() -> str:
    return "torch" if torch.cuda.is_available() or _dispatch.isa() == "scalar" else "sparsebert"


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_an_evaluation_sees_the_logits_of_predict(sets, tmp_path, kind):
    directory = saved(tmp_path / kind, kind=kind, labels=3)
    loaded = Classifier.load(directory)
    assert loaded.engine == expected_engine()
    stock, tokenizer = checkpoint.load(directory)
    examples = data.load(data.TASKS["mnli"], "dev_matched")
    # At 50 tokens some of the premises are cut.
    wanted = encoders.predict(stock, tokenizer, examples, max_length=50)
    got = loaded.predict(examples, max_length=50, progress=encoders.no_progress)
    assert np.ptp(wanted) > 0.1 and got == pytest.approx(wanted, abs=1e-4)


def test_what_the_engine_does_not_run_torch_does(sets, tmp_path):
    directory = saved(tmp_path / "tanh", labels=3, hidden_act="gelu_new")
    result = evaluate(directory, "mnli", ood="hans")
    assert result.engine == "torch" and result.ood["hans"]["n"] == 90
    stock, tokenizer = checkpoint.load(directory)
    examples = data.load(data.TASKS["hans"], "test")
    logits = encoders.predict(stock, tokenizer, examples, max_length=128)
    told = {"max_length": 128, "data": examples.sha256}
    assert result.ood["hans"] == compare_ood(data.TASKS["hans"], examples, logits) | told


def test_a_vocabulary_without_tokenizer_json_is_enough(sets, model, tmp_path):
    stock, _ = checkpoint.load(model)
    del stock.config.sparsebert  # the copy is another directory, without a seal
    stock.save_pretrained(tmp_path / "old")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    result = evaluate(tmp_path / "old", "mnli", ood="all", n=20)
    assert result.engine == "sparsebert"
    again = evaluate(model, "mnli", ood="all", n=20)
    assert (result.accuracy, result.ood) == (again.accuracy, again.ood)


def test_progress_names_every_set_of_every_model(sets, model):
    told: dict[str, tuple[int, int]] = {}
    evaluate(
        model, "mnli", vs=model, ood="all", n=40, progress=lambda done, total, what: told.update({what: (done, total)})
    )
    assert told == dict.fromkeys(["mnli", "hans", "mnli (dense)", "hans (dense)"], (40, 40))
    told.clear()
    evaluate(model, "mnli", n=40, progress=lambda done, total, what: told.update({what: (done, total)}))
    assert told == {"": (40, 40)}


def test_the_document_has_the_figures_of_every_test(sets, model, capsys):
    arguments = [model, "--task", "mnli", "--ood", "hans", "--n", 60]
    dense = saved(sets / "dense", classifier(labels=3, seed=1))
    code, out, _ = run(capsys, "eval", *arguments, "--vs", dense, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and result["n"] == 60 and result["engine"] == expected_engine()
    hans = result["ood"]["hans"]
    shares = {"entailment", "entailment_ci", "non_entailment", "non_entailment_ci"}
    paired = {"difference", "difference_ci", "mcnemar_p", "mcnemar_p_holm", "ece", "dense_ece"}
    assert {"n", "accuracy", "accuracy_ci", "by_heuristic", "summed", *shares, *paired} <= hans.keys()
    both = statistics.holm([result["mcnemar_p"], hans["mcnemar_p"]])
    assert [result["mcnemar_p_holm"], hans["mcnemar_p_holm"]] == both
    assert hans["dense_score"] + hans["difference"] == pytest.approx(hans["accuracy"])
    same = json.loads(run(capsys, "eval", *arguments, "--vs", model, "--json")[1])["ood"]["hans"]
    assert same["dense_score"] == same["accuracy"] and same["difference"] == 0 and same["agreement"] == 1
    assert hans["n"] == 60 == sum(group["n"] for group in hans["by_heuristic"].values())
    assert all({"n", *shares} == group.keys() for group in hans["by_heuristic"].values())
    code, out, _ = run(capsys, "eval", *arguments[:3])
    assert code == 0 and json.loads(out.splitlines()[-1])["ood"] is None

    code, out, _ = run(capsys, "eval", *arguments)
    assert code == 0 and json.loads(out.splitlines()[-1])["ood"].keys() == {"hans"}
    assert "60 examples of hans, test" in out and "lexical_overlap: non-entailment found" in out
    assert "summed probabilities: accuracy" in out


def test_a_wrong_name_or_a_missing_set_is_one_line_before_any_model_is_read(sets, capsys):
    absent = sets / "no model"
    assert "got 'nope'" in refused(capsys, "eval", absent, "--task", "mnli", "--ood", "nope")
    assert "no OOD tests" in refused(capsys, "eval", absent, "--task", "mr", "--ood", "hans")
    (sets / "hans" / "test.parquet").unlink()
    line = refused(capsys, "eval", absent, "--task", "mnli", "--ood", "hans")
    assert f"{sets / 'hans' / 'test'}.parquet is absent" in line and "SPARSEBERT_DATA" in line


def test_examples_for_an_upper_bound_are_mixed_in(sets, tmp_path):
    columns = {"text": ["a b"] * 4, "text_b": ["a"] * 4, "label": [0, 1, 0, 1], "heuristic": ["subsequence"] * 4}
    write(tmp_path / "hans" / "train.parquet", columns)
    spec = data.get_task("mnli")
    mixed = data.mix_ood(spec, data.load(spec, "dev_matched"))
    assert len(mixed) == 94 and mixed.labels[-4:].tolist() == [0, 2, 0, 2], "what is not entailed contradicts"
    with pytest.raises(InputError, match="no out-of-distribution training examples"):
        data.mix_ood(data.get_task("mr"), data.load(data.get_task("mr"), "test", limit=3))
