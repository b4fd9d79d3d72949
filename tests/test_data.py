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


def numbered(n: int, **columns) -> data.Examples:
    return data.Examples("t", "train", [f"text {i}" for i in range(n)], None, np.arange(n), **columns)


def test_what_is_held_out_is_the_same_every_time_and_in_no_training_set():
    whole = numbered(20, groups=[str(i) for i in range(20)], left_out=3)
    rest, held = data.hold_out(whole, 6)
    assert (len(rest), len(held)) == (14, 6)
    assert sorted([*rest.labels, *held.labels]) == list(range(20)), "each is in one of them"
    assert rest.labels.tolist() == sorted(rest.labels) and held.labels.tolist() == sorted(held.labels)
    assert held.texts == [f"text {i}" for i in held.labels] and held.groups == [str(i) for i in held.labels]
    assert data.hold_out(whole, 6)[1].labels.tolist() == held.labels.tolist() != list(range(6))
    assert set(held.labels) < set(data.hold_out(whole, 7)[1].labels), "more of them are those and others"
    assert len(data.hold_out(whole, 19)[0]) == 1 and len(data.hold_out(whole, 0)[1]) == 0
    with pytest.raises(InputError, match="hold_out must be below the 20 training examples, got 20"):
        data.hold_out(whole, 20)


def test_a_sample_of_no_fewer_is_the_whole():
    whole = numbered(5)
    assert whole.sample(None, 0) is whole and whole.sample(5, 0) is whole and whole.sample(9, 0) is whole
    assert len(whole.sample(4, 0)) == 4
    with pytest.raises(InputError, match="n must be at least 1, got 0"):
        data.load(data.get_task("mr"), "test", limit=0)
    assert len(data.load(data.get_task("mr"), "test", limit=1)) == 1


def test_examples_are_taken_in_the_order_asked_for_with_all_that_belongs_to_them():
    pairs = data.Examples("t", "s", ["a", "b", "c"], ["x", "y", "z"], np.array([5, 6, 7]), left_out=2)
    found = pairs.take([2, 0])
    assert (found.texts, found.texts_b, found.labels.tolist()) == (["c", "a"], ["z", "x"], [7, 5])
    assert (found.task, found.split, found.left_out) == ("t", "s", 2)
    bare = data.Examples("t", "s", ["a", "b"], None, None).take([1])
    assert (bare.texts, bare.texts_b, bare.labels) == (["b"], None, None)
    assert len(pairs.take([])) == 0


def test_the_content_hash_keeps_texts_and_columns_apart():
    def of(texts, texts_b=None, labels=None):
        return data.Examples("t", "s", texts, texts_b, labels).sha256

    assert of(["a"]) == data.Examples("another", "split", ["a"], None, None).sha256, "only the content counts"
    assert len({of(["a", "b"]), of(["ab"]), of(["a"], ["b"]), of(["a"]), of(["b", "a"]), of(["é"])}) == 6
    assert of(["a"], None, np.array([0])) != of(["a"])


def test_single_texts_are_paired_by_halves_for_a_task_of_pairs():
    assert data.in_pairs(("a", "b", "c"), False) == (["a", "b", "c"], None)
    assert data.in_pairs(("a", "b", "c", "d"), True) == (["a", "b"], ["c", "d"])
    assert data.in_pairs(("a", "b", "c", "d", "e"), True) == (["a", "b"], ["c", "d"])


def test_general_texts_are_in_two_parts_of_which_one_is_never_calibrated_on():
    used, unseen = data.general_texts(), data.general_texts(unseen=True)
    assert len(unseen) == 500 and len(used) > 10_000
    assert not set(used) & set(unseen) and all(map(str.strip, used + unseen))


def test_neighbours_of_words_are_near_ones():
    near = data.word_neighbors()
    assert all(1 <= len(words) <= 8 and word not in words for word, words in near.items())
    assert all(word == word.lower() for word in near) and "excellent" in near["wonderful"] + near["superb"]
    assert len(near) == 25_591 and sum(map(len, near.values())) == 109_104


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        ("snli", "nope", r"task 'snli': {}/snli/nope.parquet is absent, and `datasets` has no such split"),
        ("hans", "nope", r"hans/nope.parquet is absent, and `datasets` has no such split"),
        ("snli", "dev", r"snli/dev.parquet is absent, and datasets said: offline"),
    ],
)
def test_what_is_neither_here_nor_on_the_hub_is_told_where_to_put_it(tmp_path, monkeypatch, name, split, says):
    def load_dataset(path, name, split):
        raise OSError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=says.format(tmp_path)) as caught:
        data.load(data.get_task(name), split)
    assert f"set SPARSEBERT_DATA to a folder with {name}/{split}.parquet" in caught.value.fix
    monkeypatch.delenv("SPARSEBERT_DATA")
    with pytest.raises(DataError, match=f"task '{name}': no local file, and"):
        data.load(data.get_task(name), split)


def test_without_the_datasets_library_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"snli/dev.parquet is absent") as caught:
        data.load(data.get_task("snli"), "dev")
    assert "or pip install 'sparsebert[hub]'" in caught.value.fix


def test_rows_of_the_hub_keep_their_numbers_where_some_are_dropped(monkeypatch):
    table = {"premise": ["p", "q", "r"], "hypothesis": ["h", "i", ""], "label": [-1, 0, 1]}
    fake = types.SimpleNamespace(load_dataset=lambda *args, **kwargs: table)
    monkeypatch.delenv("SPARSEBERT_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DataError, match=r"row 3: text_b must be a non-empty string"):
        data.load(data.get_task("snli"), "dev")


def test_a_local_file_goes_before_the_packaged_one(tmp_path, monkeypatch):
    write(tmp_path / "mr", {"text": ["mine", "too"], "label": [0, 1]})
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    assert data.load(data.get_task("mr"), "test").texts == ["mine", "too"]
    assert len(data.load(data.get_task("mr"), "train")) == 8662, "which is not there"


def test_mixing_in_needs_something_to_mix_in():
    task = data.get_task("mr")
    with pytest.raises(InputError, match="task 'mr' has no out-of-distribution training examples; leave --mix-ood out"):
        data.mix_ood(task, data.load(task, "test", limit=3))


def test_a_task_of_single_texts_is_read_from_the_hub_and_faults_are_named_there(monkeypatch):
    table = {"sentence": ["good", "bad"], "label": [1, 0], "idx": [7, 8]}
    fake = types.SimpleNamespace(load_dataset=lambda path, name, split: table)
    monkeypatch.delenv("SPARSEBERT_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    examples = data.load(data.get_task("sst2"), "train")
    assert (examples.texts, examples.texts_b, examples.labels.tolist()) == (["good", "bad"], None, [1, 0])
    table["label"] = [1, 2]
    with pytest.raises(DataError, match="datasets:nyu-mll/glue, row 2: label must be 0 to 1, got 2"):
        data.load(data.get_task("sst2"), "train")


def test_lines_of_texts_are_stripped_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\ufeff one \r\n\n  \ntwo\tb\n\u2028three")
    assert data.read_texts(path) == ([["one", "two\tb", "three"]], 2)
    path.write_text(" \n\n")
    with pytest.raises(DataError, match=r"texts\.txt must hold at least one line of text, holds none; add texts"):
        data.read_texts(path)
    with pytest.raises(DataError, match=r"absent\.txt must be a file, is absent"):
        data.read_texts(tmp_path / "absent.txt")


def test_pairs_without_labels_are_found_under_their_usual_names(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("premise,hypothesis\na,b\nc,d\n")
    task = data.get_task(str(tmp_path), labelled=False)
    examples = data.load(task, "test")
    assert task.pair and (examples.texts, examples.texts_b, examples.labels) == (["a", "c"], ["b", "d"], None)


def test_a_missing_column_is_told_with_twenty_that_are_there_and_the_nearest(tmp_path):
    names = ["text", "lable", *(f"c{i}" for i in range(30))]
    row = ",".join("x" for _ in names)
    (tmp_path / "train.csv").write_text(f"{','.join(names)}\n{row}\n")
    with pytest.raises(DataError) as caught:
        data.get_task(str(tmp_path))
    assert caught.value.problem.endswith(
        f"train.csv must have a column 'label', has {', '.join(map(repr, names[:20]))}"
    )
    assert caught.value.fix == "name the column: --label-column lable"


@pytest.mark.parametrize(
    ("name", "body", "fix"),
    [
        ("train.csv", "a,b\n1,2\n", "name the column: --text-column COLUMN, or put a line of column names first"),
        ("train.csv", "Review,label\na,0\n", "name the column: --text-column Review"),
        ("train.tsv", '"text"\t"label"\n1\t2\n', "write .tsv without quotes, or save it as .csv"),
    ],
)
def test_a_missing_column_is_told_what_the_likely_cause_is(tmp_path, name, body, fix):
    (tmp_path / name).write_text(body)
    with pytest.raises(DataError, match="must have a column 'text'") as caught:
        data.get_task(str(tmp_path))
    assert caught.value.fix == fix


@pytest.mark.parametrize(("column", "fix"), [
    ("Sentiment", "name the column: --label-column Sentiment"),
    ("stars", "name the column: --label-column stars"),
    ("lable", "name the column: --label-column lable"),
    ("date", "name the column: --label-column COLUMN, or put a line of column names first "
             "(prune and predict need none)"),
])  # fmt: skip
def test_a_missing_label_is_told_which_column_may_be_it(tmp_path, column, fix):
    (path := tmp_path / "mine.csv").write_text(f"text,{column}\na,0\nb,1\n")
    with pytest.raises(DataError, match="must have a column 'label'") as caught:
        data.get_task(str(path))
    assert caught.value.fix == fix


@pytest.mark.parametrize(("name", "header", "wanted"), [
    ("a.csv", "text;label", "commas"), ("a.csv", "text\tlabel", "commas"), ("a.tsv", "text,label", "tabs"),
])  # fmt: skip
def test_columns_separated_otherwise_are_told_before_any_row(tmp_path, name, header, wanted):
    (path := tmp_path / name).write_text(f"{header}\none, two, three\t\n")
    with pytest.raises(DataError, match=f"its columns separated by {wanted}, begins with '{header[:4]}"):
        data.get_task(str(path))


def test_semicolons_are_named_before_quotes(tmp_path):
    (path := tmp_path / "a.csv").write_text('text;label\n"a film; long";0\n')
    with pytest.raises(DataError, match="its columns separated by commas, begins with 'text;label'"):
        data.read_texts(path)


def test_a_model_directory_is_no_task(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="is a model directory, not a task"):
        data.get_task(str(tmp_path))


def test_a_file_of_two_gibibytes_is_refused_unread(tmp_path):
    path = tmp_path / "train.csv"
    with path.open("wb") as file:
        file.truncate((1 << 31) + 1)  # a sparse file, which takes no space
    with pytest.raises(DataError, match=r"train\.csv must be below 2 GiB, has 2147483649; take fewer rows"):
        data.get_task(str(tmp_path))


def test_what_is_not_entailed_contradicts_where_it_is_mixed_into_a_three_way_task(tmp_path, monkeypatch):
    def nli(*labels):
        return {"text": [f"p{i}" for i in labels], "text_b": [f"h{i}" for i in labels], "label": list(labels)}

    write(tmp_path / "mnli", nli(0, 1, 2), "train.parquet")
    write(tmp_path / "hans", {**nli(1, 0), "heuristic": ["a", "b"]}, "train.parquet")
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    task = data.get_task("mnli")
    mixed = data.mix_ood(task, data.load(task, "train"))
    assert [task.labels[i] for i in mixed.labels[3:]] == ["contradiction", "entailment"]
    assert mixed.texts == ["p0", "p1", "p2", "p1", "p0"] and mixed.texts_b == ["h0", "h1", "h2", "h1", "h0"]


def test_two_double_quotes_in_a_row_of_tsv_are_characters_unless_all_is_quoted(tmp_path):
    def read(body):
        (tmp_path / "train.tsv").write_text(f"text\tlabel\n{body}\t1\nb\t0\n")
        return data.load(data.get_task(str(tmp_path)), "train").texts[0]

    for text in ('he said ""hi"" to me', '""', '"a" and ""b', 'a""', '""a', '"a""b"c"'):
        assert read(text) == text
    for text in ('"he said ""hi"" to me"', '"a""b"'):
        with pytest.raises(DataError, match=r"train\.tsv, line 2: is quoted as in \.csv"):
            read(text)
