from __future__ import annotations

import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import local_data

from sparsebert import data
from sparsebert.errors import DataError, InputError


def write(folder, columns, name="test.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder


def test_packaged_mr_is_whole():
    task = data.get_task("mr")
    train, test = data.load(task, "train"), data.load(task, "test")
    assert (len(train), len(test)) == (8662, 2000)
    assert train.labels.sum() == 4331 and test.labels.sum() == 1000
    assert not set(train.texts) & set(test.texts)


@local_data
@pytest.mark.parametrize("task", data.TASKS.values(), ids=lambda t: t.name)
def test_every_task_of_the_table_loads(task):
    for split in {task.train, task.test} - {None}:
        examples = data.load(task, split)
        assert (examples.texts_b is not None) == task.pair
        assert set(np.unique(examples.labels)) == set(range(len(task.labels)))


@local_data
def test_sst2_dev_has_the_published_label_counts():
    labels = data.load(data.get_task("sst2"), "dev").labels
    assert ((labels == 0).sum(), (labels == 1).sum()) == (428, 444)


def test_a_subset_is_seeded_and_in_file_order():
    task = data.get_task("mr")
    whole = data.load(task, "test")
    a, b, c = (data.load(task, "test", limit=50, seed=seed) for seed in (1, 1, 2))
    assert a.texts == b.texts != c.texts
    assert [whole.texts.index(text) for text in a.texts] == sorted(whole.texts.index(text) for text in a.texts)


def test_content_hash_sees_every_text_and_label():
    base = data.Examples("t", "test", ["ab", "c"], None, np.array([0, 1]))
    others = [
        data.Examples("t", "test", ["a", "bc"], None, np.array([0, 1])),
        data.Examples("t", "test", ["ab", "c"], None, np.array([1, 1])),
        data.Examples("t", "test", ["ab"], ["c"], np.array([0, 1])),
    ]
    assert len({base.sha256, *(other.sha256 for other in others)}) == 4


HANS = {"text": ["p", "q", "r"], "text_b": ["h", "i", "j"], "label": [0, 1, 0]}


def load_hans(folder, monkeypatch, columns):
    write(folder / "hans", columns)
    monkeypatch.setenv("SPARSEBERT_DATA", str(folder))
    return data.load(data.get_task("hans"), "test")


def test_groups_stay_with_their_examples_and_out_of_the_content_hash(tmp_path, monkeypatch):
    examples = load_hans(tmp_path, monkeypatch, {**HANS, "heuristic": ["a", "b", "c"]})
    assert examples.groups == ["a", "b", "c"] and examples.take([2, 0]).groups == ["c", "a"]
    sample = examples.sample(2, seed=0)
    assert sample.groups == [{"p": "a", "q": "b", "r": "c"}[text] for text in sample.texts]
    bare = data.Examples("hans", "test", HANS["text"], HANS["text_b"], np.array(HANS["label"]))
    assert bare.groups is None and bare.take([0]).groups is None and bare.sha256 == examples.sha256


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (HANS, r"hans/test\.parquet must have a column 'heuristic', has 'text', 'text_b', 'label'"),
        ({**HANS, "heuristic": ["a", None, "c"]}, "row 2: heuristic must be a non-empty string, got None"),
    ],
)
def test_groups_that_are_missing_are_named(tmp_path, monkeypatch, columns, message):
    with pytest.raises(DataError, match=message):
        load_hans(tmp_path, monkeypatch, columns)


def test_ood_tests_are_tasks_whose_labels_fit():
    for task in data.TASKS.values():
        for test in (data.TASKS[name] for name in task.ood):
            assert test.labels == task.labels or (test.three_way and len(task.labels) == 3)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(InputError, match="mr, sst2, imdb"):
        data.get_task("nope")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", ""], "label": [0, 1]}, "row 2: text must be a non-empty string"),
        ({"text": ["a", "  "], "label": [0, 1]}, "row 2"),
        ({"text": ["a", None], "label": [0, 1]}, "row 2"),
        ({"text": ["a", "b"], "label": [0, 2]}, "label must be 0 to 1, got 2"),
        ({"text": ["a"], "label": ["x"]}, "label must be 0 to 1"),
        ({"text": ["a"]}, "must have a column 'label', has 'text'"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "at least one row"),
    ],
)
def test_malformed_examples_are_named(tmp_path, monkeypatch, columns, message):
    write(tmp_path / "mr", columns)
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message):
        data.load(data.get_task("mr"), "test")


@pytest.mark.parametrize("name", ["test.csv", "test.tsv", "test.jsonl", "test.parquet"])
def test_text_that_is_not_utf8_is_named(tmp_path, name):
    if name.endswith(".parquet"):
        broken = pa.Array.from_buffers(
            pa.string(), 1, [None, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"\xff\xfea")]
        )
        write(tmp_path, {"text": broken, "label": [0]})
    else:
        body = {
            ".csv": b'text,label\n"\xff\xfea",0\n',
            ".tsv": b"text\tlabel\n\xff\xfea\t0\n",
            ".jsonl": b'{"text": "\xff\xfea", "label": 0}\n',
        }
        (tmp_path / name).write_bytes(body["." + name.split(".")[1]])
    with pytest.raises(DataError, match=r"UTF-8"):
        data.load(data.get_task(str(tmp_path)), "test")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_folder_is_a_task(tmp_path, suffix):
    rows = [("good, really", 1), ("bad", 0)]
    for split in ("train", "test"):
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".parquet":
            write(tmp_path, {"text": [t for t, _ in rows], "label": [n for _, n in rows]}, path.name)
        elif suffix == ".jsonl":
            path.write_text("".join(f'{{"text": "{t}", "label": {n}}}\n' for t, n in rows))
        else:
            comma = "\t" if suffix == ".tsv" else ","
            quoted = rows if suffix == ".tsv" else [(f'"{t}"', n) for t, n in rows]
            path.write_text(f"text{comma}label\n" + "".join(f"{t}{comma}{n}\n" for t, n in quoted))
    task = data.get_task(str(tmp_path))
    examples = data.load(task, "test")
    assert examples.texts == ["good, really", "bad"] and examples.labels.tolist() == [1, 0]
    assert task.labels == ("LABEL_0", "LABEL_1") and not task.pair


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text,label\n", "at least one row"),
        ("text,label\na,1000000000000\n", "line 2: label must be the id of a class, 0 to 999"),
        ("text,label\na,1\nb,good\nc,bad\n", "line 2: label must be a class name, as in most rows, got '1'"),
        ("text,label\na,1\nb,\n", "line 3: label must be a class or a number"),
        ("text,label\na,0\nb,-1\n", "line 3: label must be the id of a class, 0 to 999, or its name"),
    ],
)
def test_a_folder_with_labels_that_are_none_is_named(tmp_path, body, message):
    (tmp_path / "train.csv").write_text(body)
    with pytest.raises(DataError, match=message):
        data.get_task(str(tmp_path))


def test_a_folders_missing_split_is_named(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match=r"has no test file; add test\.csv"):
        data.load(data.get_task(str(tmp_path)), "test")


def test_a_data_folder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("SPARSEBERT_DATA", "/nowhere")
    with pytest.raises(DataError, match="SPARSEBERT_DATA must name a folder, got '/nowhere'"):
        data.load(data.get_task("mr"), "test")


def test_an_empty_folder_is_no_task(tmp_path):
    with pytest.raises(DataError, match="found neither"):
        data.get_task(str(tmp_path))


def test_without_local_files_the_error_names_the_variable(monkeypatch):
    monkeypatch.delenv("SPARSEBERT_DATA", raising=False)
    with pytest.raises(DataError, match="SPARSEBERT_DATA"):
        data.load(data.get_task("hans"), "test")


def test_datasets_is_asked_last_and_unlabelled_rows_are_dropped(monkeypatch):
    table = {"premise": ["p", "q"], "hypothesis": ["h", "i"], "label": [2, -1]}
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return table

    monkeypatch.delenv("SPARSEBERT_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples = data.load(data.get_task("snli"), "dev")
    assert asked == [("stanfordnlp/snli", None, "validation")]
    assert (examples.texts, examples.texts_b, examples.labels.tolist()) == (["p"], ["h"], [2])
