"""Users' own files: they are read back as written, or refused in one line whose advice works."""

from __future__ import annotations

import csv
import decimal
import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert import data
from sparsebert.config import TaskConfig
from sparsebert.data import tables
from sparsebert.data.own import TEST_SHARE
from sparsebert.errors import DataError, InputError, SparsebertWarning
from sparsebert.pruning.calibration import others

TEXTS = ["a fine film", "dull", "I laughed", "never again", "so so", "great", "awful", "a second look"]


def as_csv(rows, header=("text", "label"), end="\r\n", **options) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator=end, **options).writerows([header, *rows])
    return out.getvalue()


def read(path: Path, body: str | bytes, split: str = "train", *, labelled: bool = True) -> data.Examples:
    """Writes `body` to `path`, and reads a split of its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass"))
    return data.load(data.get_task(str(path.parent), labelled=labelled), split)


# --- what is written comes back ---------------------------------------------------------------------------------------

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40
).filter(str.strip)  # fmt: skip
plain = st.one_of(texts, st.text("ab \",\t'\u2028\x85\x0b", min_size=1, max_size=12).filter(str.strip))
labels = st.sampled_from(["good", "bad", "no idea"])


def two_classes(rows: list[tuple]) -> list[tuple]:
    return [*rows, ("good one", "good"), ("bad one", "bad")]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.one_of(plain, st.text('a",\r\n', min_size=1).filter(str.strip)), labels), max_size=8),
       st.sampled_from(["\r\n", "\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans())  # fmt: skip
def test_csv_as_python_writes_it_comes_back_or_is_refused(tmp_path_factory, rows, end, quoting, mark):
    rows = two_classes(rows)
    body = ("\ufeff" if mark else "") + as_csv(rows, end=end, quoting=quoting)
    try:
        found = read(tmp_path_factory.mktemp("csv") / "train.csv", body)
    except DataError as error:
        # A bare carriage return, which Python leaves unquoted; or a text that contains a row.
        assert "carriage return" in str(error) or "looks like a row" in str(error)
        return
    names = sorted({label for _, label in rows})
    assert found.texts == [text for text, _ in rows]
    assert [names[i] for i in found.labels] == [label for _, label in rows]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(plain, labels), max_size=8), st.sampled_from(["\r\n", "\n"]))
def test_tsv_without_quoting_comes_back_or_is_refused(tmp_path_factory, rows, end):
    rows = two_classes(rows)
    body = end.join("\t".join(row) for row in [("text", "label"), *rows]) + end
    broken = any(set(text) & set("\t\n\r") for text, _ in rows)  # such a file cannot hold these
    try:
        found = read(tmp_path_factory.mktemp("tsv") / "train.tsv", body)
    except DataError as error:
        assert broken or "is quoted as in .csv" in str(error)
        return
    assert broken or found.texts == [text for text, _ in rows]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), labels), max_size=8), st.booleans(),
       st.sampled_from([".jsonl", ".parquet"]))  # fmt: skip
def test_json_lines_and_parquet_come_back(tmp_path_factory, rows, ascii, suffix):
    rows = two_classes([(text.replace("\0", "0"), label) for text, label in rows])
    path = tmp_path_factory.mktemp("rows") / f"train{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [n for _, n in rows]}), path)
    else:
        path.write_text("".join(json.dumps({"text": t, "label": n}, ensure_ascii=ascii) + "\n" for t, n in rows))
    found = data.load(data.get_task(str(path.parent)), "train")
    names = sorted({label for _, label in rows})
    assert found.texts == [text for text, _ in rows]
    assert [names[i] for i in found.labels] == [label for _, label in rows]


def test_a_double_quote_in_tsv_is_a_character(tmp_path):
    rows = [('"a start', 1), ("b", 0), ("c", 1), ('end"', 0), ("f", 1)]
    found = read(tmp_path / "train.tsv", "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    assert found.texts == [text for text, _ in rows] and found.labels.tolist() == [1, 0, 1, 0, 1]


def test_a_text_may_be_a_date_a_number_or_of_several_lines(tmp_path):
    rows = [("2024-05-01", 0), ("17", 1), ("two\nlines, or\r\nthree", 0), ("NA", 1), ("true", 1)]
    assert read(tmp_path / "c" / "train.csv", as_csv(rows)).texts == [text for text, _ in rows]
    body = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    assert read(tmp_path / "j" / "train.jsonl", body).texts == [text for text, _ in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_text_of_ten_megabytes_is_read(tmp_path, suffix):
    text = "word " * 2_000_000 + "."
    path = tmp_path / f"train{suffix}"
    bodies = {".csv": as_csv([(text, 0), ("a, b", 1)]), ".tsv": f"text\tlabel\n{text}\t0\nb\t1\n"}
    bodies[".jsonl"] = f'{json.dumps({"text": text, "label": 0})}\n{{"text": "b", "label": 1}}\n'
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [text, "b"], "label": [0, 1]}), path)
        found = data.load(data.get_task(str(tmp_path)), "train")
    else:
        found = read(path, bodies[suffix])
    assert found.texts[0] == text and len(found) == 2
    assert csv.field_size_limit() == 131072  # the whole process shares this limit


def test_parquet_takes_no_columns_from_its_path_and_reads_none_it_does_not_need(tmp_path):
    folder = tmp_path / "label=7"
    folder.mkdir()
    times = pa.array([2**62 + 1, 3], pa.timestamp("ns"))  # Python has no such timestamp
    table = pa.table({"text": ["a", "b"], "label": pa.array([0, 1]).dictionary_encode(), "when": times})
    pq.write_table(table, folder / "train.parquet")
    found = data.load(data.get_task(str(folder)), "train")
    assert found.texts == ["a", "b"] and found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "names", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("text", "text_b")]
)
def test_pairs_are_found_under_their_usual_names(tmp_path, names):
    found = read(tmp_path / "train.csv", as_csv([("p", "h", 0), ("q", "i", 1)], (*names, "label")))
    assert (found.texts, found.texts_b) == (["p", "q"], ["h", "i"])


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "problem", "names", "expected"),
    [
        (["pos", "neg", "pos"], "single_label", ("neg", "pos"), [1, 0, 1]),
        ([" pos", "neg", "pos "], "single_label", ("neg", "pos"), [1, 0, 1]),
        ([True, False, True], "single_label", ("false", "true"), [1, 0, 1]),
        (["True", "False", "True"], "single_label", ("false", "true"), [1, 0, 1]),
        (["true", "false", "mixed"], "single_label", ("false", "mixed", "true"), [2, 0, 1]),
        ([1.0, 0.0, 1.0], "single_label", ("LABEL_0", "LABEL_1"), [1, 0, 1]),
        (["1", "0", "1"], "single_label", ("LABEL_0", "LABEL_1"), [1, 0, 1]),
        (["LABEL_1", "LABEL_0", "LABEL_2"], "single_label", ("LABEL_0", "LABEL_1", "LABEL_2"), [1, 0, 2]),
        (["1_0", "none", "x"], "single_label", ("1_0", "none", "x"), [0, 1, 2]),
        (["C", "C++", "C#"], "single_label", ("C", "C#", "C++"), [0, 2, 1]),
        (["A-", "A", "A+"], "single_label", ("A", "A+", "A-"), [2, 0, 1]),
        (["दिन", "दान"], "single_label", ("दान", "दिन"), [1, 0]),
        ([["1", "0"], ["0", "1"]], "multi_label", ("LABEL_0", "LABEL_1"), [[1, 0], [0, 1]]),
        ([0.5, 2, -1.25], "one_logit", (), [0.5, 2, -1.25]),
        ([["a"], ["b", "a"], []], "multi_label", ("a", "b"), [[1, 0], [1, 1], [0, 0]]),
        (
            [["LABEL_11"], ["LABEL_2", "LABEL_0"]],
            "multi_label",
            tuple(f"LABEL_{i}" for i in range(12)),
            [[0] * 11 + [1], [1, 0, 1] + [0] * 9],
        ),
        ([["LABEL_2"], ["LABEL_1"]], "multi_label", ("LABEL_0", "LABEL_1", "LABEL_2"), [[0, 0, 1], [0, 1, 0]]),
        ([[0], [2, 1], []], "multi_label", ("LABEL_0", "LABEL_1", "LABEL_2"), [[1, 0, 0], [0, 1, 1], [0, 0, 0]]),
        ([[0, 1], [1, 1], [0, 0]], "multi_label", ("LABEL_0", "LABEL_1"), [[0, 1], [1, 1], [0, 0]]),
        ([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], "multi_label", ("LABEL_0", "LABEL_1"), [[0, 1], [1, 1], [0, 0]]),
        ([[False, True], [True, True]], "multi_label", ("LABEL_0", "LABEL_1"), [[0, 1], [1, 1]]),
    ],
)  # fmt: skip
def test_labels_are_understood(tmp_path, written, problem, names, expected):
    rows = list(zip(TEXTS, written, strict=False))
    kinds = ["jsonl", "parquet"] if isinstance(written[0], list) else ["jsonl", "parquet", "csv", "tsv"]
    if {type(label) for label in written} == {int, float}:
        kinds.remove("parquet")
    for kind in kinds:
        folder = tmp_path / kind
        folder.mkdir()
        path = folder / f"train.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": [t for t, _ in rows], "label": written}), path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        else:
            path.write_text(as_csv(rows, delimiter="," if kind == "csv" else "\t"))
        task = data.get_task(str(folder))
        found = data.load(task, "train")
        assert (task.problem, task.labels) == (problem, names), kind
        assert found.labels.tolist() == expected, kind
        assert found.labels.dtype == (np.int64 if problem == "single_label" else np.float32)


def test_eleven_numbered_classes_stay_in_the_order_of_their_numbers(tmp_path):
    for i, label in enumerate(("{}", "LABEL_{}")):
        body = as_csv([(f"text {n}", label.format(n)) for n in range(11)])
        assert read(tmp_path / str(i) / "train.csv", body).labels.tolist() == list(range(11))


def test_classes_are_those_of_both_files(tmp_path):
    (tmp_path / "test.csv").write_text(as_csv([("x", "neg")]))
    found = read(tmp_path / "train.csv", as_csv([("a", "pos"), ("b", "neg")]))
    assert found.labels.tolist() == [1, 0]
    assert data.load(data.get_task(str(tmp_path)), "test").labels.tolist() == [0]


# --- what is refused, and the advice ----------------------------------------------------------------------------------

GOOD = as_csv([("a", 0), ("b", 1)])
JSON = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'

# Fault -> (file, its content, the message, (file, content) after its advice has been followed).
REFUSED = {
    "empty": ("train.csv", "", "is empty; add it", ("train.csv", GOOD)),
    "blank": ("train.jsonl", "\n\n", "at least one row, holds none; add rows", ("train.jsonl", JSON)),
    "header only": ("train.csv", "text,label\n", "at least one row, holds none; add rows", ("train.csv", GOOD)),
    "no header": (
        "train.csv",
        "a,0\nb,1\n",
        r"column 'text', has 'a', '0'; name the column: --text-column COLUMN, or put a line",
        ("train.csv", GOOD),
    ),
    "another case": (
        "train.csv",
        "Text,label\na,0\nb,1\n",
        "has 'Text', 'label'; name the column: --text-column Text",
        ("train.csv", GOOD),
    ),
    "no label": (
        "train.csv",
        "text,lable\na,0\nb,1\n",
        "column 'label', has 'text', 'lable'; name the column: --label-column lable",
        ("train.csv", GOOD),
    ),
    "semicolons": ("train.csv", "text;label\na;0\n", "columns separated by commas", ("train.csv", GOOD)),
    "two readings": (
        "train.csv",
        as_csv([("a", "b", "c", "d", 0)], ("premise", "hypothesis", "sentence1", "sentence2", "label")),
        "as premise with hypothesis or as sentence1 with sentence2; name the columns, such as --text-column premise",
        ("train.csv", as_csv([("a", "b", 0), ("c", "d", 1)], ("text", "text_b", "label"))),
    ),
    "column twice": (
        "train.csv",
        "text,label,label\na,0,1\n",
        "every column once, has 'label' twice; rename one",
        ("train.csv", "text,label,other\na,0,1\nb,1,1\n"),
    ),
    "name twice": (
        "train.jsonl",
        '{"text": "a", "label": 0, "label": 1}\n',
        "line 1: must name .* 'label' twice; rename",
        ("train.jsonl", JSON),
    ),
    "ragged": (
        "train.csv",
        "text,label\na,0\nb, c,1\n",
        "line 3: must have 2 fields .*, has 3; quote texts that hold",
        ("train.csv", 'text,label\na,0\n"b, c",1\n'),
    ),
    "ragged tsv": (
        "train.tsv",
        "text\tlabel\na\tb\t0\n",
        "line 2: must have 2 fields .*; replace tabs and line ends",
        ("train.tsv", "text\tlabel\na b\t0\nc\t1\n"),
    ),
    "quoted tsv": (
        "train.tsv",
        'text\tlabel\n"say ""a"""\t0\nb\t1\n',
        "line 2: is quoted as in .csv, .*; save the file as .csv",
        ("train.csv", 'text,label\n"say ""a""",0\nb,1\n'),
    ),
    "quoted names": (
        "train.tsv",
        '"text"\t"label"\n"a"\t"0"\n',
        "column 'text', has .*; write .tsv without quotes",
        ("train.tsv", "text\tlabel\na\t0\nb\t1\n"),
    ),
    "open quote": (
        "train.csv",
        'text,label\nx,0\n"a,1\nb,0\n',
        "line 3: a quote is opened and never closed; put texts",
        ("train.csv", 'text,label\nx,0\n"""a",1\nb,0\n'),
    ),
    "after a quote": (
        "train.csv",
        'text,label\n"a" b,1\nc,0\n',
        "line 2: a quoted field is followed by ' b,1.*; put",
        ("train.csv", 'text,label\n"""a"" b",1\nc,0\n'),
    ),
    "swallowed": (
        "train.csv",
        'text,label\n"a start,1\nb,0\nc,1\nend",0\nf,1\n',
        "line 2: 'a start,1' looks like a row, but is inside a text that begins with a quote on line 2; double",
        ("train.csv", 'text,label\n"""a start",1\nb,0\nc,1\n"end""",0\nf,1\n'),
    ),
    "one swallowed": ("train.csv", 'text,label\n"a,1\nend",0\nf,1\n', "line 2: 'a,1' looks like a row", None),
    "swallowed after label": (
        "train.csv",
        'label,text\n1,"a start\n0,b\n1,end"\n0,f\n',
        "line 3: '0,b' looks like",
        None,
    ),
    "swallowed between": (
        "train.csv",
        as_csv([("f", 1, "g"), ("h", 0, "i")], ("text", "label", "text_b")) + '"a,1,b\nc,0,d",0,e\n',
        "line 4: 'a,1,b' looks like a row",
        None,
    ),
    "swallowed values": ("train.csv", 'text,label\nx,0.5\n"a,0.25\nend",0.75\n', "line 3: 'a,0.25' looks like", None),
    "carriage returns": (
        "train.csv",
        "text,label\ra,0\rb,1\r",
        "end with carriage returns; convert them",
        ("train.csv", GOOD),
    ),
    "utf-16": ("train.csv", GOOD.encode("utf-16"), "must be UTF-8, is UTF-16; save", ("train.csv", GOOD)),
    "latin-1": (
        "train.csv",
        "text,label\na,0\ncafé,1\n".encode("latin-1"),
        "line 3: must be UTF-8, has byte 0xe9; save",
        ("train.csv", "text,label\na,0\ncafé,1\n"),
    ),
    "latin-1 json": ("train.jsonl", JSON.encode() + b'{"text": "\xe9"}', "line 3: must be UTF-8, has byte 0xe9", None),
    "nul": ("train.csv", "text,label\na,0\nb\0c,1\n", "line 3: must be text, has a NUL", None),
    "nul in json": (
        "train.jsonl",
        JSON + '{"text": "a\\u0000", "label": 1}\n',
        "line 3: text has a NUL character; remove",
        ("train.jsonl", JSON + '{"text": "a", "label": 1}\n'),
    ),
    "surrogate": (
        "train.jsonl",
        JSON + '{"text": "\\ud800", "label": 1}\n',
        "line 3: text has half a surrogate pair; re",
        ("train.jsonl", JSON),
    ),
    "number": (
        "train.jsonl",
        JSON + '{"text": 5, "label": 1}\n',
        "line 3: text .* string, got 5; write it as a string",
        ("train.jsonl", JSON + '{"text": "5", "label": 1}\n'),
    ),
    "null": ("train.jsonl", JSON + '{"text": null, "label": 1}\n', "line 3: text .* got None; remove or fill", None),
    "missing in a row": ("train.jsonl", JSON + '{"label": 1}\n', "line 3: text .* got None; remove or fill", None),
    "no text": (
        "train.csv",
        'text,label\na,0\n" ",1\n',
        "line 3: text must be a non-empty string, got ' '; remove or",
        ("train.csv", GOOD),
    ),
    "json list": (
        "train.jsonl",
        '[{"text": "a"}]\n',
        "must have a JSON object on each line, is one array; write one object per line",
        ("train.jsonl", JSON),
    ),
    "pretty json": (
        "train.jsonl",
        '{\n "text": "a"\n}\n',
        "line 1: must be one JSON object: .*; write one object per line",
        ("train.jsonl", JSON),
    ),
    "deep": ("train.jsonl", '{"text": ' + "[" * 100_000 + "\n", "line 1: .* nested too deep", None),
    "deep closed": (
        "train.jsonl",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        "line 1: .* nested too deep",
        None,
    ),
    "long number": ("train.jsonl", '{"label": ' + "9" * 5000 + "}\n", "line 1: must be one JSON object: ", None),
    "no label value": (
        "train.csv",
        "text,label\na,0\nb,\n",
        "line 3: label must be a class or a number, got ''; correct",
        ("train.csv", GOOD),
    ),
    "null label": ("train.jsonl", JSON + '{"text": "c", "label": null}\n', "line 3: label must .*, got None", None),
    "nan": ("train.jsonl", JSON + '{"text": "c", "label": NaN}\n', "line 3: label must be a class or a number", None),
    "huge value": (
        "train.jsonl",
        JSON + '{"text": "c", "label": 1e300}\n{"text": "d", "label": 0.5}\n',
        r"line 3: label must be a class or a number, got 1e\+300",
        None,
    ),
    "huge integer": (
        "train.jsonl",
        JSON + '{"text": "d", "label": 0.5}\n{"text": "c", "label": 1%s}\n' % ("0" * 400),
        "line 4: label must be a class or a number, got 1000",
        None,
    ),
    "label object": (
        "train.jsonl",
        JSON + '{"text": "c", "label": {"a": 1}}\n',
        "line 3: label must .* {'a': 1}",
        None,
    ),
    "mixed": (
        "train.csv",
        "text,label\na,0\nb,good\nc,1\n",
        "line 3: label must be a number, as in most rows, got 'good'",
        ("train.csv", "text,label\na,0\nb,1\nc,1\n"),
    ),
    "mixed types": ("train.jsonl", JSON + '{"text": "c", "label": true}\n', "line 3: label must be a number", None),
    "lists and not": (
        "train.jsonl",
        JSON + '{"text": "c", "label": ["a"]}\n',
        "line 1: label must be a list, as in",
        None,
    ),
    "another pair beside a text": (
        "train.csv",
        as_csv([("a", "b", "c", 0)], ("text", "premise", "hypothesis", "label")),
        "may be read as text or as premise with hypothesis; name the columns, such as --text-column text",
        ("train.csv", as_csv([("b", "c", 0), ("d", "e", 1)], ("premise", "hypothesis", "label"))),
    ),
    "the second text alone": (
        "train.csv",
        as_csv([("b", 0)], ("text_b", "label")),
        "must have a column 'text', has 'text_b', 'label'; name the column: --text-column COLUMN",
        ("train.csv", GOOD),
    ),
    "a list in csv": ("train.csv", "text,label\na,\"['x', 'y']\"\nb,[]\n", "line 2: label must be one class", None),
    "decimal comma": ("train.csv", 'text,label\na,"0,5"\nb,1.5\n', "a number with a decimal point", None),
    "percent": ("train.csv", "text,label\na,50%\nb,x\n", "a number with a decimal point, or a class name", None),
    "a missing value": (
        "train.csv",
        "text,label\na,x\nb,NaN\n",
        "line 3: label must be a class or a number, not a",
        None,
    ),
    "one short row of flags": (
        "train.jsonl",
        "".join(json.dumps({"text": str(i), "label": [0, 0, 1] if i != 4 else [0, 1]}) + "\n" for i in range(9)),
        r"line 5: label must be a 0 or 1 for each of 3 labels, as in most rows, or each id or name once, got \[0, 1\]",
        None,
    ),
    "a name in two Unicode forms": ("train.csv", "text,label\na,caf\u00e9\nb,cafe\u0301\n", "are the same name", None),
    "two spellings": (
        "train.csv",
        "text,label\na,Good\nb,good\nc,bad\n",
        "'Good' and 'good' are the same name; write it alike",
        ("train.csv", "text,label\na,good\nb,good\nc,bad\n"),
    ),
    "spellings in lists": (
        "train.jsonl",
        '{"text": "a", "label": ["Fun"]}\n{"text": "b", "label": ["fun"]}\n',
        "'Fun' and 'fun' are the same name",
        None,
    ),
    "a text as label": (
        "train.csv",
        as_csv([(f"{i}", f"no class {i}") for i in range(50)]),
        "50 different values in 50",
        None,
    ),
    "empty lists": (
        "train.jsonl",
        '{"text": "a", "label": []}\n',
        "no row has a label, all lists are empty; add",
        None,
    ),
    "names and ids": (
        "train.jsonl",
        '{"text": "a", "label": ["x", 1]}\n',
        "line 1: label must be a list of names or",
        None,
    ),
    "id below 0": (
        "train.jsonl",
        '{"text": "a", "label": [-1, 2]}\n',
        "line 1: label must be classes from 0 to 999",
        None,
    ),
    "flags of another length": (
        "train.jsonl",
        '{"text": "a", "label": [0.0, 1.0]}\n{"text": "b", "label": [0.0]}\n',
        r"line 2: label must be a 0 or 1 for each of 2 labels, as in most rows, or each id or name once, got \[0.0\]",
        None,
    ),
    "no parquet": (
        "train.parquet",
        "text,label\n",
        "must be readable parquet: .*; repair or replace it",
        ("train.csv", GOOD),
    ),
    "other kind": ("other.csv", GOOD, r"found neither; name one file, which is split: --task .*other\.csv", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_and_its_advice_works(tmp_path, case):
    name, body, message, followed = REFUSED[case]
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path / name, body)
    assert time.monotonic() - start < 20
    assert str(tmp_path) in refused.value.problem, "it names its file or folder"
    assert len(str(refused.value)) < 500 + 2 * len(str(tmp_path)) and "\n" not in str(refused.value)
    if followed is not None:
        (tmp_path / name).unlink()
        assert len(read(tmp_path / followed[0], followed[1])) >= 2


def test_a_text_of_parquet_that_is_not_utf8_is_named_by_its_row(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")]
    )
    pq.write_table(pa.table({"text": broken, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"row 2: text must be UTF-8: .*; save it as UTF-8"):
        data.get_task(str(tmp_path))


def test_columns_of_times_and_bytes_are_no_texts(tmp_path):
    for values in (pa.array([0, 1], pa.timestamp("s")), pa.array([b"a", b"b"])):
        pq.write_table(pa.table({"text": values, "label": [0, 1]}), tmp_path / "train.parquet")
        with pytest.raises(DataError, match=r"row 1: text must be a non-empty string, got .*; write it as a string"):
            data.get_task(str(tmp_path))


def test_pairs_in_one_split_only_are_refused_by_both_files(tmp_path):
    (tmp_path / "test.csv").write_text(as_csv([("a", "b", 0)], ("text", "text_b", "label")))
    with pytest.raises(DataError, match=r"train\.csv has text, test\.csv has text and text_b; make them alike"):
        read(tmp_path / "train.csv", GOOD)


def test_a_class_that_training_lacks_is_refused(tmp_path):
    (tmp_path / "test.csv").write_text(as_csv([("x", "ugly")]))
    with pytest.raises(DataError, match="label 'ugly' is in the test split only"):
        read(tmp_path / "train.csv", as_csv([("a", "good"), ("b", "bad")]))


def test_labels_of_two_files_are_of_one_kind(tmp_path):
    (tmp_path / "test.csv").write_text(as_csv([("x", "good")]))
    with pytest.raises(DataError, match=r"test\.csv, line 2: label must be a number, as in most rows, got 'good'"):
        read(tmp_path / "train.csv", GOOD)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "train.csv").symlink_to("/dev/zero")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    kinds = {
        "fifo.csv": "is a FIFO",
        "loop.csv": "is a broken link",
        "gone.csv": "is absent",
        "folder.csv": "is a device",
    }
    for name, message in kinds.items():
        with pytest.raises(DataError, match=f"must be a file, {message}; name one that ends in .txt, .parquet, .csv"):
            data.get_task(str(tmp_path / name))
    (tmp_path / "table.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"must end in \.parquet, .*; convert"):
        data.get_task(str(tmp_path / "table.xlsx"))


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".csv", "a\0b.csv", "no such task"])
def test_names_that_are_none_are_refused_in_one_line(name):
    with pytest.raises(InputError, match=r"a folder, or a file that ends in .*, got") as refused:
        data.get_task(name)
    assert len(str(refused.value)) < 600


# --- splits -----------------------------------------------------------------------------------------------------------


def test_one_file_is_split_by_its_texts_alone(tmp_path):
    rows = [(f"text number {i}", i % 2) for i in range(400)]
    path = tmp_path / "mine.csv"
    path.write_text(as_csv(rows))
    task = data.get_task(str(path))
    train, test = data.load(task, task.train), data.load(task, task.test)
    assert sorted(train.texts + test.texts) == sorted(text for text, _ in rows)
    assert abs(len(test) / 400 - TEST_SHARE) < 0.06
    assert data.rows_read(task) == {
        "train": len(train), "test": len(test), "split": "hash of the texts", "columns": ["text", "label"]
    }  # fmt: skip
    # Added rows move no others, and a text that differs only in case and spaces stays in the same split.
    more = [(f"{text.upper()} ", label) for text, label in rows] + [(f"another {i}", 0) for i in range(100)]
    path.write_text(as_csv(more + rows[::-1]))
    task = data.get_task(str(path))
    again = {split: {data.normalised(text) for text in data.load(task, split).texts} for split in ("train", "test")}
    assert again["test"] >= {data.normalised(text) for text in test.texts}
    assert again["train"] >= {data.normalised(text) for text in train.texts}
    assert not again["test"] & again["train"]


def test_one_file_of_too_few_rows_is_refused_and_its_advice_works(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(as_csv([("a", 0), ("a", 1)]))
    with pytest.raises(DataError, match=r"too few different texts .*, 1; add rows, or make a folder"):
        data.get_task(str(path))
    path.write_text(as_csv([(f"{i}", i % 2) for i in range(60)]))
    assert len(data.load(data.get_task(str(path)), "train")) > 30


def test_a_validation_file_is_tested_on_where_there_is_no_test_file(tmp_path):
    read(tmp_path / "train.csv", GOOD)
    (tmp_path / "validation.csv").write_text(as_csv([("v", 1)]))
    assert data.load(data.get_task(str(tmp_path)), "test").texts == ["v"]
    (tmp_path / "test.tsv").write_text("text\tlabel\nt\t0\n")
    assert data.load(data.get_task(str(tmp_path)), "test").texts == ["t"]


@pytest.mark.parametrize("second", ["train.tsv", "test.csv"])
def test_two_files_of_one_split_are_refused(tmp_path, second):
    names = ["train.csv", second] if second.startswith("train") else ["validation.csv", "dev.tsv", "train.csv"]
    for name in names:
        (tmp_path / name).write_text(GOOD if name.endswith("csv") else "text\tlabel\na\t0\nb\t1\n")
    with pytest.raises(DataError, match=r"has several files of its .* split: .* and .*; keep one"):
        data.get_task(str(tmp_path))


def test_texts_alone_are_a_task_for_pruning_only(tmp_path):
    found = read(tmp_path / "train.csv", "text\na\nb\n", labelled=False)
    assert found.texts == ["a", "b"] and found.labels is None
    assert found.take([1]).texts == ["b"] and found.take([1]).labels is None
    with pytest.raises(DataError, match="must have a column 'label', has 'text'"):
        data.get_task(str(tmp_path))


def test_labels_that_are_not_needed_are_not_looked_at(tmp_path):
    found = read(tmp_path / "train.csv", "text,label\na,\nb,7\n", labelled=False)
    assert found.labels is None and found.sha256 == data.Examples("x", "train", ["a", "b"], None, None).sha256
    known = data.get_task("mr", labelled=False)
    assert data.load(known, "test", limit=3).labels is None


def test_a_text_of_several_lines_beside_other_columns_swallows_nothing(tmp_path):
    rows = [(1, "good, really\nyes, yes\n2, 3"), (2, "b")]
    found = read(tmp_path / "train.csv", as_csv(rows, ("id", "text")), labelled=False)
    assert found.texts == [text for _, text in rows]


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        ([["a"], ["b"]], [["a", "c"]], "label 'c' is in the test split only"),
        ([[1, 0, 0], [0, 1, 0]], [[0, 0, 1]], "label 'LABEL_2' is in the test split only"),
        (["x", "y"], ["x", "z"], "label 'z' is in the test split only"),
        ([["a"], ["b"]], [["b"], ["a", "b"]], None),
        ([["a"], ["b"], ["c"]], [["b"]], None),
        ([0.5, 1.5], [7.25], None),  # values are not classes
    ],
)
def test_a_class_of_any_kind_that_training_lacks_is_refused(tmp_path, train, test, says):
    for split, labels in (("train", train), ("test", test)):
        lines = [json.dumps({"text": f"{split} {i}", "label": label}) for i, label in enumerate(labels)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    if says is None:
        task = data.get_task(str(tmp_path))
        assert [len(data.load(task, split)) for split in ("train", "test")] == [len(train), len(test)]
    else:
        with pytest.raises(DataError, match=f"{tmp_path}: {says}, no model can learn it; add training rows of it"):
            data.get_task(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, "good"], "line 3: label must be a number, as in most rows, got 'good'"),
        ([0.5, 1.5, "good"], "line 3: label must be a number, as in most rows, got 'good'"),
        ([True, False, "good"], "line 3: label must be true or false, as in most rows, got 'good'"),
        ([True, False, True, 7], "line 4: label must be true or false, as in most rows, got 7"),
        (["good", "bad", 7], "line 3: label must be a class name, as in most rows, got 7"),
        ([["a"], ["b"], "c"], "line 3: label must be a list, as in other rows, got 'c'"),
        (["a", None], "line 2: label must be a class or a number, got None"),
        (["a", {"b": 1}], "line 2: label must be a class or a number"),
        ([0, 1, 1e16], "line 3: label must be a class or a number"),
        (
            [0, 1, -1],
            "line 3: label must be the id of a class, 0 to 999, or its name",
        ),
        (
            [0, 1, 1000],
            "line 3: label must be the id of a class, 0 to 999, or its name",
        ),
        ([[0, 3], [1000]], "line 2: label must be classes from 0 to 999"),
        ([[0, 3], [-1]], "line 2: label must be classes from 0 to 999"),
        ([["a"], [7]], "line 2: label must be a list of names or of ids, as in the rows before it"),
        ([["a"], [" "]], "line 2: label must be a list of names or of ids"),
        ([[], []], "no row has a label, all lists are empty"),
        ([["Good"], ["good"]], "labels 'Good' and 'good' are the same name"),
        (["Good", "good", "bad"], "labels 'Good' and 'good' are the same name"),
    ],
)
def test_labels_that_are_not_of_one_kind_are_named(tmp_path, labels, says):
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": label}) for i, label in enumerate(labels)))
    with pytest.raises(DataError) as refused:
        data.get_task(str(path))
    assert f"{path}, {says}" in str(refused.value) or f"{path}: {says}" in str(refused.value)


@pytest.mark.parametrize(
    "header", ["sentence,sentence2", "text,text2", "text,Text_b", "text,premise", "Sentence 1,text"]
)
def test_a_second_column_of_texts_is_never_dropped(tmp_path, header):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{header},label\n" + "".join(f"a {i},b {i},{i % 2}\n" for i in range(9)))
    says = r"has texts in (text|sentence), and perhaps in .*; name the columns: --text-column \1 --text-column .* alone"
    with pytest.raises(DataError, match=says):
        data.get_task(str(path))


@pytest.mark.parametrize("label", [[[0]], [{"name": "a"}], [None]])
def test_labels_in_lists_of_something_else_are_refused(tmp_path, label):
    rows = [json.dumps({"text": f"a film {i}", "label": label}) for i in range(40)]
    (path := tmp_path / "own.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"own\.jsonl, line \d+: label must be a list of names or of ids"):
        data.load(data.get_task(str(path)), "test")


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        ([1, 2, 5, 2], ("1", "2", "5"), [0, 1, 2, 1]),
        ([10, 9, 9, 10], ("9", "10"), [1, 0, 0, 1]),
        (["LABEL_1", "LABEL_2", "LABEL_1", "LABEL_2"], ("LABEL_0", "LABEL_1", "LABEL_2"), [1, 2, 1, 2]),
        ([0, 2, 2, 0], ("LABEL_0", "LABEL_1", "LABEL_2"), [0, 2, 2, 0]),
        ([[1], [2, 5], [2], [1]], ("1", "2", "5"), [[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0]]),
    ],
)
def test_numbers_without_a_0_name_the_classes(tmp_path, labels, names, found):
    rows = [json.dumps({"text": f"a film {i}", "label": label}) for i, label in enumerate(labels)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    task = data.get_task(str(tmp_path))
    assert task.labels == names and data.load(task, "test").labels.tolist() == found


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("a.csv", "sep=,\ntext,label\na,0\n", "line of column names, begins with 'sep=,'; remove the line"),
        ("a.csv", "# of a shop\ntext,label\na,0\n", "line of column names, begins with '# of a shop'; remove the line"),
        ("a.tsv", "# of a shop\ntext\tlabel\na\t0\n", "line of column names, begins with '# of a shop'; remove the"),
        (
            "a.csv",
            "text,label\na,good\nb,NA\n",
            "line 3: label must be a class or a number, not a missing value, got 'N",
        ),
        ("a.csv", "text,label\na,0\nb,N/A\n", "line 3: label must be a class or a number, not a missing value, got 'N"),
        ("a.csv", "text,label\na,1.5\nb,2.5\nc,inf\n", "line 4: label must be a number, as in most rows, got 'inf'"),
    ],
)
def test_a_line_before_the_header_and_missing_labels_are_named(tmp_path, name, body, says):
    (path := tmp_path / name).write_text(body)
    with pytest.raises(DataError) as refused:
        data.get_task(str(path))
    assert says in str(refused.value)


def test_a_column_named_by_a_hash_is_a_column(tmp_path):
    (path := tmp_path / "a.csv").write_text(
        "#,sentence,label\n" + "".join(f"{i},film {i},{i % 2}\n" for i in range(20))
    )
    assert data.get_task(str(path)).labels == ("LABEL_0", "LABEL_1")


def test_decimals_of_parquet_are_numbers(tmp_path):
    labels = [decimal.Decimal(i % 2) for i in range(40)]
    pq.write_table(pa.table({"text": [f"a film {i}" for i in range(40)], "label": labels}), tmp_path / "a.parquet")
    assert data.get_task(str(tmp_path / "a.parquet")).labels == ("LABEL_0", "LABEL_1")


# --- columns by name --------------------------------------------------------------------------------------------------

REVIEWS = [(f"no {i}", f"film number {i}", f"as dull as {i}", ("bad", "good")[i % 2]) for i in range(40)]


def reviews(path: Path, header=("id", "review", "reply", "stars")) -> str:
    """Writes REVIEWS in the format of the file's suffix."""
    columns = {name: list(values) for name, values in zip(header, zip(*REVIEWS, strict=True), strict=True)}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in REVIEWS))
    else:
        path.write_text(as_csv(REVIEWS, header, delimiter="\t" if path.suffix == ".tsv" else ","))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_columns_are_read_by_the_names_that_are_given(tmp_path, suffix):
    asked = TaskConfig(task=reviews(tmp_path / f"own{suffix}"), text_column="review", label_column="stars")
    task = data.get_task(asked)
    found = [(text, task.labels[label]) for split in ("train", "test")
             for text, label in zip(task.own[split].texts, task.own[split].labels, strict=True)]  # fmt: skip
    assert sorted(found) == sorted((text, label) for _, text, _, label in REVIEWS)
    pair = data.get_task(asked.model_copy(update={"text_column": ("reply", "review")}))
    found = {(a, b) for split in pair.own.values() for a, b in zip(split.texts, split.texts_b, strict=True)}
    assert pair.pair and found == {(reply, text) for _, text, reply, _ in REVIEWS}


def test_named_columns_stand_before_the_usual_ones(tmp_path):
    path = reviews(tmp_path / "own.csv", ("text", "premise", "hypothesis", "label"))
    task = data.get_task(TaskConfig(task=path, text_column="hypothesis"))
    assert not task.pair and "as dull as 0" in task.own["train"].texts + task.own["test"].texts
    path = reviews(tmp_path / "two.csv", ("label", "text", "reply", "stars"))
    assert data.get_task(TaskConfig(task=path, label_column="stars")).labels == ("bad", "good")


def test_named_columns_hold_for_all_splits(tmp_path):
    reviews(tmp_path / "train.csv")
    (tmp_path / "test.jsonl").write_text('{"text": "a", "stars": "good"}\n')
    with pytest.raises(DataError, match=r"'review' in train\.csv, not in test\.jsonl, which has 'text', 'stars'"):
        data.get_task(TaskConfig(task=str(tmp_path), text_column="review", label_column="stars"))


def test_the_classes_of_a_named_column_of_datasets_have_their_names(tmp_path):
    features = {"info": {"features": {"stars": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    made = pa.table({"review": [f"film {i}" for i in range(40)], "stars": [i % 2 for i in range(40)]})
    pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "own.parquet")
    asked = TaskConfig(task=str(tmp_path / "own.parquet"), text_column="review", label_column="stars")
    assert data.get_task(asked).labels == ("bad", "good")


COLUMNS = "has 'id', 'review', 'reply', 'stars'; "
HAS = COLUMNS + "name the column: "


@pytest.mark.parametrize(
    ("named", "error", "says"),
    [
        ({"text_column": "Review"}, DataError, f"must have a column 'Review', {HAS}--text-column review"),
        ({"text_column": "RE_VIEW"}, DataError, f"must have a column 'RE_VIEW', {HAS}--text-column review"),
        ({"text_column": ("review", "zzz")}, DataError, f"'zzz', {COLUMNS}name one of these: --text-column COLUMN$"),
        (
            {"text_column": "review, reply"},
            DataError,
            f"{COLUMNS}give the flag once for each column: --text-column review --text-column reply$",
        ),
        ({"text_column": "review", "label_column": "starz"}, DataError, f"'starz', {HAS}--label-column stars"),
        ({"label_column": "stars"}, DataError, f"must have a column 'text', {HAS}--text-column review"),
        ({"text_column": "review"}, DataError, f"must have a column 'label', {HAS}--label-column stars"),
        ({"text_column": ("review", "review")}, InputError, "column 'review' is named twice"),
        ({"text_column": "review", "label_column": "review"}, InputError, "column 'review' is named twice"),
        ({"text_column": ("id", "review", "reply")}, InputError, "a row has one text or two, got 3 columns"),
    ],
)
def test_columns_that_cannot_be_told_are_refused_with_those_that_are_there(tmp_path, named, error, says):
    path = reviews(tmp_path / "own.csv")
    with pytest.raises(error, match=says):
        data.get_task(TaskConfig(task=path, **named))


def test_a_column_whose_accents_are_composed_otherwise_is_proposed_as_it_is_spelled(tmp_path):
    decomposed = "e\u0301tat"
    (path := tmp_path / "own.csv").write_text(f"text,x,{decomposed}\na,1,0\nb,2,1\n")
    with pytest.raises(DataError, match=f"name the column: --label-column '{decomposed}'"):
        data.get_task(TaskConfig(task=str(path), label_column="\u00e9tat"))


def test_advice_on_several_columns_in_one_flag_is_only_given_where_it_helps(tmp_path):
    path = reviews(tmp_path / "own.csv")
    for named in ({"text_column": "review", "label_column": "id,stars"}, {"text_column": "id,review,stars"},
                  {"text_column": "review,review"}):  # fmt: skip
        with pytest.raises(DataError) as caught:
            data.get_task(TaskConfig(task=path, **named))
        assert "once for each" not in caught.value.fix


@pytest.mark.parametrize(
    ("name", "column"),
    [("text", "Review Text"), ("text", "comment_text"), ("label", "airline_sentiment"), ("label", "Star-Rating")],
)
def test_a_usual_name_within_a_name_is_proposed(tmp_path, name, column):
    other = "label" if name == "text" else "text"
    (path := tmp_path / "own.csv").write_text(f"{column},zzz,{other}\na,b,c\nd,e,f\n")
    with pytest.raises(DataError, match=f"name the column: --{name}-column '?{column}'?$"):
        data.get_task(str(path))


@pytest.mark.parametrize("head", ["sentence,label", "premise,label"])
def test_files_of_a_folder_have_their_texts_in_columns_of_one_name(tmp_path, head):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "test.csv").write_text("sentence,label\na,0\nb,1\n")
    with pytest.raises(
        DataError, match=r"must name the columns of its texts alike: train\.csv has text, test\.csv has sen"
    ):
        data.get_task(str(tmp_path))


def test_texts_of_several_lines_are_warned_of_where_no_label_would_give_swallowed_rows_away(tmp_path):
    (path := tmp_path / "own.csv").write_text('id,text\n1,good\n2,"great\n3,bad\n4,5"\n5,end\n')
    with pytest.warns(SparsebertWarning, match="a text spans several lines, the first begins on line 3; if it begins"):
        assert data.read_texts(path)[0] == [["good", "great\n3,bad\n4,5", "end"]]


def test_long_texts_take_time_in_proportion(tmp_path):
    """Labels that are all different, in a file in which every text has two lines."""
    (path := tmp_path / "own.csv").write_text("text,score\n" + "".join(f'"a {i}\nb",{i}.5\n' for i in range(30_000)))
    calls = []
    real = tables.NUMBER
    counted = SimpleNamespace(fullmatch=lambda text: calls.append(text) or real.fullmatch(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "NUMBER", counted)
        tables.read(path, label="score")
    assert len(calls) <= 2 * 30_000


def test_classes_named_for_a_column_that_was_changed_since_are_not_put_in(tmp_path):
    for names, values, wanted in (
        (["bad", "good"], ["x", "y"] * 20, ("x", "y")),
        ({"0": "bad"}, [0, 1] * 20, ("LABEL_0", "LABEL_1")),
        ("np", [0, 1] * 20, ("LABEL_0", "LABEL_1")),
    ):
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = pa.table({"text": [f"film {i}" for i in range(40)], "label": values})
        pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "own.parquet")
        assert data.get_task(str(tmp_path / "own.parquet")).labels == wanted


@pytest.mark.parametrize(
    ("train", "test", "named", "says"),
    [
        ("text,label", "text,stars", {}, "'label' in train.csv, not in test.csv, which has 'text', 'stars'"),
        ("text,stars", "text,label", {"label_column": "label"}, "'label' in test.csv, not in train.csv"),
        ("review,label", "text,label", {"text_column": "review"}, "'review' in train.csv, not in test.csv"),
    ],
)  # fmt: skip
def test_files_of_a_folder_that_name_a_column_differently_are_told_to_agree(tmp_path, train, test, named, says):
    for split, header in (("train", train), ("test", test)):
        (tmp_path / f"{split}.csv").write_text(f"{header}\na,0\nb,1\n")
    with pytest.raises(DataError, match=says) as caught:
        data.get_task(TaskConfig(task=str(tmp_path), **named))
    assert caught.value.fix == "name the columns alike in both files"


def test_a_bad_label_is_told_by_the_name_of_its_column(tmp_path):
    (path := tmp_path / "own.csv").write_text("text,stars\na,0\nb,\n")
    with pytest.raises(DataError, match=r"own.csv, line 3: stars must be a class or a number, got ''"):
        data.get_task(TaskConfig(task=str(path), label_column="stars"))


def test_rows_swallowed_by_a_quote_are_noticed_by_a_named_column_of_labels(tmp_path):
    (path := tmp_path / "own.csv").write_text('text,stars\n"so good,1\nfine,0\nbad",0\nwell,1\n')
    with pytest.raises(DataError, match="looks like a row, but is inside a text that begins with a quote on line 2"):
        data.get_task(TaskConfig(task=str(path), label_column="stars"))


def test_a_label_column_that_is_not_there_is_told_even_if_labels_are_not_needed(tmp_path):
    path = reviews(tmp_path / "own.csv")
    with pytest.raises(DataError, match="must have a column 'starz'"):
        data.get_task(TaskConfig(task=path, text_column="review", label_column="starz"), labelled=False)


def test_the_column_of_texts_is_not_that_of_labels(tmp_path):
    path = reviews(tmp_path / "own.csv", ("id", "text", "reply", "stars"))
    with pytest.raises(DataError, match="has its texts in the column 'text', not its labels"):
        data.get_task(TaskConfig(task=path, label_column="text"))


@pytest.mark.parametrize("named", [{"text_column": "sentence"}, {"label_column": "label"}])
def test_columns_of_a_known_task_are_not_named(named):
    with pytest.raises(InputError, match="the columns of the known task mr are known, some are named; leave --text"):
        data.get_task(TaskConfig(task="mr", **named))


def test_files_beside_the_task_may_have_its_columns_or_the_usual_ones(tmp_path):
    named = {"text_column": ("review",), "label_column": "stars"}
    for header in (("id", "review", "reply", "stars"), ("id", "text", "reply", "label")):
        path = reviews(tmp_path / "own.csv", header)
        task = data.get_task(TaskConfig(task=path, **named), beside=True)
        assert task.labels == ("bad", "good") and task.own["test"].texts == [text for _, text, _, _ in REVIEWS]
        assert data.read_texts(Path(path), ("review",))[0] == [[text for _, text, _, _ in REVIEWS]]
        assert others([path], ("review",)) == [text for _, text, _, _ in REVIEWS]
    with pytest.raises(DataError, match="must have a column 'review', has 'id', 'text'"):
        data.read_texts(Path(path), ("review",), must=True)


@pytest.mark.parametrize(
    ("named", "message"),
    [(("a", "b", "c"), "one text or two, got 3 columns: 'a', 'b', 'c'"), (("a", "a"), "'a' is named twice")],
)
def test_predict_refuses_columns_that_are_no_text_and_no_pair(tmp_path, named, message):
    (tmp_path / "x.csv").write_text("a,b,c\none,two,three\n")
    with pytest.raises(InputError, match=message):
        data.read_texts(tmp_path / "x.csv", named, must=True)


def test_a_file_of_lines_has_no_columns_to_name(tmp_path):
    (tmp_path / "x.txt").write_text("one\n")
    with pytest.raises(InputError, match="has lines and no columns, got 'a'"):
        data.read_texts(tmp_path / "x.txt", ("a",), must=True)
    assert data.read_texts(tmp_path / "x.txt", ("a",)) == ([["one"]], 0)
