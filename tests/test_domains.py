"""Other domains: which sets are one, what they share with the task, their figures, and unlabelled texts."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import classifier, saved

from sparsebert import data, heads
from sparsebert.cli import main
from sparsebert.cli.figures import rows_of
from sparsebert.data import SENTIMENT, TASKS
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import DataError, InputError
from sparsebert.robustness import compare, domains, evaluate, statistics
from sparsebert.robustness.drift import drift, unlabelled

MR = {split: data.load(TASKS["mr"], split) for split in ("train", "test")}
OWN = [(f"the {word} broke after {day} days", label) for day in range(2, 12)
       for word, label in (("lovely lamp", 1), ("awful lamp", 0))]  # fmt: skip


def write(folder: Path, task: str, rows: list[tuple], split: str = "") -> None:
    """A known task's file in a folder of data. rows: the texts and the label."""
    (folder / task).mkdir(exist_ok=True)
    names = ("text", "text_b", "label") if TASKS[task].pair else ("text", "label")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / task / f"{split or TASKS[task].test}.parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small sets beside the packaged mr. Five sentences of sst2 are in mr, three of train and two of test."""
    shared = [f"  {text.upper()} !" for text in MR["train"].texts[:3] + MR["test"].texts[:2]]
    write(tmp_path, "sst2", [(text, 1) for text in shared] + OWN)
    write(tmp_path, "imdb", [(f"{text} . " * 60, label) for text, label in OWN])
    write(tmp_path, "agnews", [("shares fell", 2), ("they won", 1)])
    write(tmp_path, "mrpc", [("he came", "he arrived", 1), ("he came", "he left", 0)])
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("domains") / "model")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Other weights, and the labels in the other order."""
    return saved(tmp_path_factory.mktemp("domains") / "dense", classifier(labels=SENTIMENT[::-1], seed=1))


def csv(path: Path, rows: list[tuple], header: str = "text,label") -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


# --- which sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "task", "found"),
    [
        (data.SENTIMENT, "mr", ["sst2", "imdb"]),
        (data.SENTIMENT, "sst2", ["mr", "imdb"]),
        (data.NLI, "mnli", ["snli"]),
        (data.NLI, "snli", ["mnli"]),
        (("duplicate", "not_duplicate"), "qqp", ["mrpc"]),
    ],
)
def test_domains_are_the_other_tasks_of_the_same_label_names(tmp_path, monkeypatch, labels, task, found):
    monkeypatch.setattr(data, "at_hand", lambda of, split: True)
    model = saved(tmp_path / "model", classifier(labels=labels))
    assert [of.name for of in domains.named(TASKS[task], "all", model)] == found


def test_all_is_what_is_on_this_machine(folder, model):
    assert [of.name for of in domains.named(TASKS["mr"], "all", model)] == ["sst2", "imdb"]
    (folder / "sst2" / "dev.parquet").unlink()
    assert [of.name for of in domains.named(TASKS["mr"], "all", model)] == ["imdb"]
    (folder / "imdb" / "test.parquet").unlink()
    with pytest.raises(
        InputError, match="no other set of the labels negative, positive is on this machine; set SPARSE"
    ):
        domains.named(TASKS["mr"], "all", model)


def test_each_domain_is_taken_once_in_the_order_of_the_list(folder, model):
    path = csv(folder / "own.csv", OWN)
    names = f"{path}, imdb,all,{folder / 'sst2' / '..' / 'own.csv'},imdb"
    assert [of.name for of in domains.named(TASKS["mr"], names, model)] == [path, "imdb", "sst2"]


def test_a_three_way_model_takes_two_classes_only_if_they_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "at_hand", lambda of, split: True)
    model = saved(tmp_path / "model", labels=3)
    assert [of.name for of in domains.named(TASKS["mnli"], "rte", model)] == ["rte"]
    assert "rte" not in [of.name for of in domains.named(TASKS["mnli"], "all", model)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nope", "domains must be all, or sets separated by commas, got 'nope'; choose from sst2, imdb, files and fol"),
        ("imdb,", "got ''; choose from"),
        ("mr", "domains must be other sets than the task, got 'mr'; leave it out"),
        ("imdb,hans", "domains must not be out-of-distribution tests, got 'hans'; use --ood hans, of a task such as"),
        ("mrpc", "domain 'mrpc' has pairs, the task 'mr' single texts; leave it out"),
        ("agnews", r"domain 'agnews': .* has 2 labels \(negative, positive\), 4 are wanted \(World, Sports, Business"),
        ("cola", "domain 'cola': .* has the labels negative, positive, wanted are unacceptable, acceptable; leave it"),
        ("{}/other.csv", "domain '.*/other.csv': .* labels negative, positive, wanted are bad, good; leave it out"),
        ("{}/ones.csv", "domain '.*/ones.csv': .* they may count from 1; leave it out, or write the labels by name"),
        ("{}/values.csv", "domain '.*/values.csv': .* is a single_label model, the labels of .* are one_logit"),
        ("{}/pairs.csv", "domain '.*/pairs.csv' has pairs, the task 'mr' single texts"),
    ],
)  # fmt: skip
def test_what_is_no_domain_is_one_line(folder, model, names, message):
    csv(folder / "other.csv", [("a", "good"), ("b", "bad")])
    csv(folder / "ones.csv", [("a", 1), ("b", 2)])
    csv(folder / "values.csv", [("a", 0.5), ("b", 1.5)])
    csv(folder / "pairs.csv", [("a", "b", 0), ("b", "c", 1)], "text,text_b,label")
    with pytest.raises(InputError, match=message):
        domains.named(TASKS["mr"], names.format(folder), model)


def test_a_missing_file_is_named_with_the_one_that_may_be_meant(folder, model):
    csv(folder / "other.csv", OWN)
    with pytest.raises(DataError, match=r"othr\.csv must be a file, is absent; did you mean .*/other.csv"):
        domains.named(TASKS["mr"], str(folder / "othr.csv"), model)


def test_a_task_of_ones_own_is_not_its_own_domain(folder, model):
    path = csv(folder / "own.csv", OWN)
    with pytest.raises(InputError, match="other sets than the task"):
        evaluate(model, path, domains=path)
    assert list(evaluate(model, path, domains="imdb").domains) == ["imdb"]


# --- what they share with the task ------------------------------------------------------------------------------------


def test_texts_that_the_task_has_too_are_left_out_and_counted(folder, model):
    known = domains.of_task(TASKS["mr"])
    assert [examples.split for examples in known] == ["train", "test"]
    examples = domains.unshared(TASKS["sst2"], known)
    assert examples.texts == [text for text, _ in OWN] and examples.left_out == 5
    found = evaluate(model, "mr", domains="sst2", n=8).domains["sst2"]
    assert (found["n"], found["left_out"], found["apart_from"]) == (8, 5, ["train", "test"])


def test_a_split_that_is_neither_trained_nor_reported_on_is_no_other_domain_either(folder):
    before = domains.unshared(TASKS["mr"], domains.of_task(TASKS["sst2"]))
    write(folder, "sst2", [(f"{text} !", -1) for text in MR["test"].texts[5:9]], "test")
    known = domains.of_task(TASKS["sst2"])
    assert [examples.split for examples in known] == ["dev", "test"]
    after = domains.unshared(TASKS["mr"], known)
    assert set(before.texts) - set(after.texts) == set(MR["test"].texts[5:9])


def test_what_datasets_would_give_is_asked_for_both_splits(folder, monkeypatch):
    monkeypatch.setattr(data, "load", lambda of, split: split)
    assert domains.of_task(TASKS["sst2"]) == ["dev"], "a local file stands for all that is at hand"
    (folder / "sst2" / "dev.parquet").unlink()
    assert domains.of_task(TASKS["sst2"]) == ["train", "dev"]
    assert domains.of_task(TASKS["paws_qqp"]) == ["dev_and_test"], "there is no training split"


def test_pairs_are_the_same_in_either_order(folder, tmp_path):
    write(folder, "qqp", [("He left .", "he came", 0), ("a", "b", 1)])
    assert [examples.split for examples in domains.of_task(TASKS["qqp"])] == ["dev_heldout"], "train is not at hand"
    write(folder, "qqp", [("c", "d", 0)], "train")
    examples = domains.unshared(TASKS["mrpc"], domains.of_task(TASKS["qqp"]))
    assert (examples.texts_b, examples.left_out) == (["he arrived"], 1)


def test_a_domain_without_a_text_of_its_own_is_refused(folder, model):
    write(folder, "imdb", [(text, 0) for text in MR["train"].texts[:4]])
    with pytest.raises(
        InputError, match="all 4 examples of domain 'imdb' are also in 'mr', train or test; leave it out"
    ):
        evaluate(model, "mr", domains="imdb")


# --- figures ----------------------------------------------------------------------------------------------------------


def logits_of(directory: Path, examples: data.Examples, max_length: int) -> np.ndarray:
    loaded = Classifier.load(directory)
    order = [loaded.names.index(name) for name in SENTIMENT]
    return loaded.predict(examples, max_length=max_length, progress=lambda *_: None)[:, order]


def test_a_domains_figures_are_those_of_a_task(folder, model, dense):
    result = evaluate(model, "mr", vs=dense, domains="all", n=15, seed=2)
    found = result.domains["imdb"]
    assert (found["n"], found["left_out"], found["max_length"], found["cut"]) == (15, 0, 256, 1.0)
    examples = data.load(TASKS["imdb"], "test", limit=15, seed=2)
    wanted = compare(TASKS["imdb"], examples, *(logits_of(each, examples, 256) for each in (model, dense)))
    assert found.items() >= wanted.figures("task").items()
    assert {"accuracy_ci", "dense_score", "difference_ci", "mcnemar_p", "kl_ci", "agreement_ci", "ece"} <= found.keys()
    alone = evaluate(model, "mr", domains="imdb", n=15, seed=2).domains["imdb"]
    assert "mcnemar_p_holm" not in alone and alone["accuracy"] == found["accuracy"]


def test_p_values_are_adjusted_for_the_task_and_its_domains(folder, model, dense):
    result = evaluate(model, "mr", vs=dense, domains="all", n=40)
    ps = [result.mcnemar_p, *(found["mcnemar_p"] for found in result.domains.values())]
    holm = [result.mcnemar_p_holm, *(found["mcnemar_p_holm"] for found in result.domains.values())]
    assert len(ps) == 3 and holm == statistics.holm(ps)
    assert evaluate(model, "mr", vs=dense, n=40).mcnemar_p_holm == result.mcnemar_p


def test_a_file_of_ones_own_is_used_whole_and_a_folder_by_its_test_split(folder, model):
    names = [csv(folder / "a" / "test.csv", [(text, SENTIMENT[label]) for text, label in OWN]),
             csv(folder / "b" / "test.csv", [("just one", "Positive")])]  # fmt: skip
    csv(folder / "c" / "train.csv", OWN[:9])
    csv(folder / "c" / "test.csv", OWN[9:])
    found = evaluate(model, "mr", domains=",".join([*names, str(folder / "c")]), n=17).domains
    assert {name: part["n"] for name, part in found.items()} == dict(
        zip([*names, str(folder / "c")], (17, 1, 11), strict=True)
    )
    assert all(part["max_length"] == 512 and part["split"] == "test" for part in found.values())
    examples = data.load(data.get_task(names[0], beside=True), "test", limit=17)
    right = (logits_of(model, examples, 512).argmax(1) == examples.labels).mean()
    assert found[names[0]]["accuracy"] == right


@pytest.mark.parametrize("problem", ["multi_label", "one_logit"])
def test_models_of_other_problem_types_take_files_of_their_own(folder, monkeypatch, problem):
    fewer = functools.partial(statistics.bootstrap, resamples=20)  # rank correlations take their time
    monkeypatch.setattr(statistics, "bootstrap", fewer)
    model = classifier(labels=("a", "b") if problem == "multi_label" else ("score",))
    model.config.problem_type = heads.PROBLEMS[problem].config_name
    directory = saved(folder / "model", model)
    labels = [["a"], ["b"], ["a", "b"], []] if problem == "multi_label" else [0.5, 2, 1, 3.5]
    rows = [{"text": f"{text} {i}", "label": labels[i % 4]} for i, (text, _) in enumerate(OWN)]
    for name, some in (("task.jsonl", rows), ("other.jsonl", [row | {"text": row["text"] + "!a"} for row in rows])):
        (folder / name).write_text("\n".join(map(json.dumps, some)))
    other = str(folder / "other.jsonl")
    texts = csv(folder / "texts.csv", OWN)
    result = evaluate(directory, str(folder / "task.jsonl"), vs=directory, domains=other, texts=[texts])
    found = result.domains[other]
    assert found["metric"] == heads.PROBLEMS[problem].metric_name and found["n"] == 20 and found["difference"] == 0
    assert "mcnemar_p" not in found and "ece" not in found and result.outside[texts]["agreement"] == pytest.approx(1)
    with pytest.raises(InputError, match=f"'imdb': .* is a {problem} model, the labels of 'imdb' are single_label"):
        evaluate(directory, str(folder / "task.jsonl"), domains="imdb")
    with pytest.raises(InputError, match="domains all found none"):
        evaluate(directory, str(folder / "task.jsonl"), domains="all")


# --- texts without labels ---------------------------------------------------------------------------------------------


def test_unlabelled_texts_compare_the_two_models(folder, model, dense):
    texts = [text for text, _ in OWN]
    (folder / "own.txt").write_text("\n\n".join(texts))
    names = [str(folder / "own.txt"), csv(folder / "own.csv", OWN)]
    again = str(folder / "." / ".." / folder.name / "own.txt")
    result = evaluate(model, "mr", vs=dense, texts=[*names, names[0], again], n=12)
    assert list(result.outside) == names and result.outside[names[0]] == result.outside[names[1]]
    examples = data.Examples("", "", texts, None, None).sample(12, 0)
    wanted = drift(heads.SINGLE_LABEL, logits_of(dense, examples, 512), logits_of(model, examples, 512))
    told = {"max_length": 512, "cut": 0.0, "data": examples.sha256}
    assert result.outside[names[0]] == {**wanted, **told} and wanted["kl"] > 0


def test_single_texts_are_paired_for_a_task_of_pairs(folder):
    path = csv(folder / "own.csv", [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 1)])
    (examples,) = unlabelled([path], pair=True)
    assert (examples.texts, examples.texts_b, examples.task) == (["a", "b"], ["c", "d"], path)
    (examples,) = unlabelled([csv(folder / "own.csv", [("a", "b")], "premise,hypothesis")], pair=True)
    assert (examples.texts, examples.texts_b) == (["a"], ["b"])


# --- the command ------------------------------------------------------------------------------------------------------


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_every_set_and_says_which_were_found(folder, model, dense, capsys):
    path = csv(folder / "own.csv", OWN)
    arguments = [model, "--task", "mr", "--vs", dense, "--domains", "all", "--texts", path, "--n", 18]
    code, out, err = command(capsys, *arguments)
    assert code == 0 and "domains: sst2, imdb; without what is in mr, train or test, too" in err
    assert "on 18 examples of sst2, dev, less 5 that mr has too" in out and "on 18 examples of imdb, test\n" in out
    assert f"beside {dense} on 18 texts of {path}, without labels" in out and "texts cut at 256 tokens" in out
    assert "adjusted for several sets (Holm)" in out and f"calibration error of {Path(dense).name}" in out
    told = json.loads(out.splitlines()[-1])
    assert told["domains"].keys() == {"sst2", "imdb"} and told["outside"].keys() == {path}
    code, out, _ = command(capsys, *arguments[:-6], "--json", "--n", 18)
    assert code == 0 and out.count("\n") == 1 and json.loads(out)["domains"] is json.loads(out)["outside"] is None


def test_the_command_says_by_which_columns_own_files_were_read(folder, model, capsys):
    task = csv(folder / "task.csv", [(f"text {i}", f"more {i}", i % 2) for i in range(40)], "review,text,stars")
    columns = ["--text-column", "review", "--label-column", "stars"]
    other = csv(folder / "other.csv", OWN, "sentence,label")
    code, out, err = command(capsys, model, "--task", task, *columns, "--domains", other, "--json")
    assert code == 0 and ", split by a hash of the texts, of columns 'review', 'stars'\n" in err
    assert f"domains: {other} (columns 'sentence', 'label'); without what is in" in err
    told = json.loads(out)
    assert told["rows"]["columns"] == ["review", "stars"]
    assert told["domains"][other]["rows"] == {"test": len(OWN), "split": "files", "columns": ["sentence", "label"]}


def test_no_p_value_is_shown_as_0():
    rows = rows_of({"accuracy": 0.5, "accuracy_ci": None, "mcnemar_p": 4e-5, "mcnemar_p_holm": 0.00012})
    assert [row[1] for row in rows] == ["50.0%", "below 0.0001", "0.0001"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--domains", "nope"], "got 'nope'"),
        (["--domains", "snli"], "domain 'snli' has pairs"),
        (["--domains", "imdb"], "imdb/test.parquet is absent"),
        (
            ["--texts", "own.txt"],
            "texts are compared with the dense model's answers, and none is given; add --vs DENSE",
        ),
        (["--texts", "none.txt", "--vs", "DIR"], "none.txt must be a file, is absent"),
        (["--texts", "empty.txt", "--vs", "DIR"], "empty.txt must hold at least one line of text, holds none"),
        (["--texts", "empty.csv", "--vs", "DIR"], "empty.csv must begin with a line of column names, is empty"),
        (["--texts", "pairs.csv", "--vs", "DIR"], "pairs.csv has pairs, the task has single texts"),
    ],
)
def test_bad_input_is_one_line(folder, model, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    (folder / "imdb" / "test.parquet").unlink()
    for name in ("empty.txt", "empty.csv"):
        (folder / name).write_text("")
    (folder / "own.txt").write_text("a text\n")
    csv(folder / "pairs.csv", [("a", "b")], "text,text_b")
    monkeypatch.setattr(Classifier, "load", lambda *_: pytest.fail("a model was loaded"))
    code, out, err = command(capsys, model, "--task", "mr", *(str(model) if flag == "DIR" else flag for flag in flags))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_one_text_makes_no_pair(folder):
    with pytest.raises(InputError, match="must have at least two texts, as the task has pairs, has one"):
        unlabelled([csv(folder / "one.csv", [("a", 0)])], pair=True)
    with pytest.raises(DataError, match="must hold at least one row"):
        unlabelled([csv(folder / "none.csv", [])], pair=False)
