"""Nothing is learnt from reported texts: those of a task's test split, and of its OOD tests, are left out."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import local_data
from models import saved

from sparsebert import checkpoint, config, data
from sparsebert.cli import main
from sparsebert.data import Examples, normalised, sameness
from sparsebert.errors import DataError, InputError
from sparsebert.pruning import prune_checkpoint
from sparsebert.pruning.calibration import draw
from sparsebert.training import soup, train

TINY = {"steps": 2, "batch_size": 4, "precision": "fp32"}
# (in training, reported, whether they are the same)
TEXTS = [
    ("A fine film.", "a FINE  film", True),
    ("it 's good , really", "It's good, really!", True),
    ("“quoted” – text", '"quoted" - text', True),
    ("caf\u00e9 society", "cafe\u0301 society", True),
    ("ﬁne \u00a0film\u200b", "fine film", True),
    ("\u0915\u0940", "\u0915\u093e", False),  # vowel signs are not punctuation
    ("I like C++", "I like C#", False),
    ("...", "?!", False),  # only punctuation
    ("not a film", "a film", False),
]


@pytest.mark.parametrize("a,b,same", TEXTS)
def test_texts_are_the_same_but_for_case_spacing_punctuation_and_unicode_forms(a, b, same):
    assert (normalised(a) == normalised(b)) == same
    assert sameness(Examples("t", "s", [a], None, None)) == [(normalised(a),)]


def test_a_pair_is_the_same_in_either_order_and_half_of_it_is_not():
    pairs = [("a b", "c"), ("c", "A, B"), ("a b", "d"), ("a bc", "")]
    keys = sameness(Examples("t", "s", [a for a, _ in pairs], [b for _, b in pairs], None))
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """fever, with ten training pairs, and its OOD tests. Each training split has texts that are reported elsewhere."""

    def write(task, split, pairs):
        (tmp_path / task).mkdir(exist_ok=True)
        columns = {"text": [a for a, _ in pairs], "text_b": [b for _, b in pairs], "label": [0, 1] * (len(pairs) // 2)}
        pq.write_table(pa.table(columns), tmp_path / task / f"{split}.parquet")

    write("fever", "train", [(f"evidence {i}", f"claim {i}") for i in range(10)])
    write("fever", "dev", [("Evidence 3.", "claim 3"), ("other", "claim 3")])
    write("fever_symm_v1", "test", [("evidence 7", "CLAIM 7"), ("shared one", "claim")])
    write("fever_symm_v2", "dev", [("Shared  one!", "claim"), ("shared two", "claim"), ("alone", "claim"), ("x", "y")])
    write("fever_symm_v2", "test", [("shared two", "claim"), ("y", "z")])
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    return tmp_path


def test_what_the_task_and_its_ood_tests_report_is_left_out_and_counted(sets):
    spec = data.get_task("fever")
    examples = data.training(spec)
    assert [int(text.split()[1]) for text in examples.texts] == [0, 1, 2, 4, 5, 6, 8, 9], "in file order"
    assert examples.left_out == 2 and len(data.load(spec, "train")) == 10
    mixed = data.mix_ood(spec, examples)
    assert (mixed.task, mixed.split, mixed.texts_b[8:]) == ("fever", "train", ["claim", "y"] * 10)
    assert mixed.labels.tolist() == [0, 1, 0, 0, 1, 0, 0, 1] + [0, 1] * 10 and mixed.labels.dtype == np.int64
    assert mixed.texts[8:] == ["alone", "x"] * 10 and mixed.left_out == 4, "both counted once, not ten times"
    assert data.unreported_texts(spec, ["Claim 3.", "new", "evidence 4", "SHARED two"]) == ["new", "evidence 4"]
    assert data.unreported_texts(spec, []) == []
    assert data.hold_out(examples, 3)[1].left_out == 2 and examples.sample(2, 0).left_out == 2


def test_a_test_that_is_not_at_hand_does_not_stop_a_run(sets):
    (sets / "fever_symm_v1" / "test.parquet").unlink()
    assert data.training(data.get_task("fever")).left_out == 1


def test_a_training_split_that_is_the_test_split_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\ngood,1\nbad,0\n")
    with pytest.raises(DataError, match="every training example is also in its test split"):
        data.training(data.get_task(str(tmp_path)))


def test_training_learns_from_nothing_reported_and_says_so(sets, tmp_path, capsys):
    start = tmp_path / "start"
    saved(start, labels=data.FACT)
    flags = ["--steps", "2", "--batch-size", "4", "--precision", "fp32", "--mix-ood"]
    assert main(["train", str(start), "--task", "fever", "-o", str(tmp_path / "m"), *flags]) == 0
    out, err = capsys.readouterr()
    assert "what is reported: 4" in err and '"left_out": 4' in out
    spec = data.get_task("fever")
    expected = data.mix_ood(spec, data.training(spec)).sha256
    assert checkpoint.read_recipe(tmp_path / "m")["data_sha256"] == expected
    reported = [data.load(data.TASKS[name], data.TASKS[name].test) for name in ("fever", *spec.ood)]
    tests = {key for examples in reported for key in sameness(examples)}
    assert not tests & set(sameness(data.mix_ood(spec, data.training(spec))))


def test_calibration_draws_nothing_reported(sets, tmp_path, monkeypatch):
    drawn = []

    def spy(model, tok, examples, *rest, others):
        drawn.append((examples, others))
        return draw(model, tok, examples, *rest, others=others)

    monkeypatch.setattr("sparsebert.pruning.entry.draw", spy)
    source = tmp_path / "dense"
    saved(source, labels=data.FACT)
    elsewhere = [*(f"evidence {i}" for i in range(200)), "Shared one?", "y"]  # 3 and 7 are in reported pairs
    (tmp_path / "elsewhere.txt").write_text("\n".join(elsewhere))
    settings = config.PruneConfig(
        method="wanda", sparsity=0.5, calibration_tokens=400, calibration=(str(tmp_path / "elsewhere.txt"),)
    )
    result = prune_checkpoint(source, "fever", tmp_path / "p", settings)
    examples, others = drawn[0]
    assert examples.left_out == 2 and not any("evidence 3" in text for text in examples.texts)
    assert others == [f"evidence {i}" for i in range(200) if i not in (3, 7)] and result.left_out == 6


def test_a_soup_refuses_models_that_may_have_seen_what_it_chooses_on(tmp_path):
    start = tmp_path / "start"
    saved(start)
    folder = tmp_path / "task"
    folder.mkdir()
    rows = [f"text number {i},{i % 2}" for i in range(20)]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "test.csv").write_text("text,label\nnone of them,0\nnor this,1\n")
    train(start, str(folder), tmp_path / "m", config.TrainConfig(**TINY, hold_out=5))
    soup([tmp_path / "m"], str(folder), tmp_path / "good", score="accuracy")
    (folder / "test.csv").write_text("text,label\nText number 3!,0\nnor this,1\n")  # now one row is left out
    with pytest.raises(InputError, match="was trained on other examples of task than there are now"):
        soup([tmp_path / "m"], str(folder), tmp_path / "bad", score="accuracy")


def test_of_packaged_mr_one_sentence_is_left_out():
    assert data.training(data.get_task("mr")).left_out == 1


# Counted on the real sets by another program; the 3 pairs that both parts of v2 have are in v1 as well.
LEFT_OUT = {"imdb": 123, "cola": 19, "sst2": 5, "mr": 1, "qqp": 1, "mrpc": 1, "hans": 65, "fever_symm_v2": 3}


@local_data
@pytest.mark.parametrize("task", [t for t in data.TASKS.values() if t.train], ids=lambda t: t.name)
def test_no_real_task_trains_on_what_it_reports(task):
    start = time.process_time()
    examples = data.training(task)
    examples = data.mix_ood(task, examples) if task.ood_train else examples
    assert time.process_time() - start < 30
    learnt = set(sameness(examples))
    for of in (task, *(data.TASKS[name] for name in task.ood)):
        assert learnt.isdisjoint(sameness(data.load(of, of.test)))
    mixed = {"fever": 354, "mnli": 65, "snli": 65}
    assert examples.left_out == mixed.get(task.name, LEFT_OUT.get(task.name, 0))
    assert len(np.unique(examples.labels)) == len(task.labels)
