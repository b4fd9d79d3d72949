"""Attacked examples in a ledger: asked in SQL, shown, attacked again."""

from __future__ import annotations

import json
import shutil
import sqlite3
from itertools import pairwise

import pytest
from command_line import refused, run
from models import classifier, saved

from sparsebert.config import AttackConfig
from sparsebert.jobs import Ledger
from sparsebert.robustness import attack
from sparsebert.robustness.attacks import stored
from sparsebert.robustness.attacks.words import Text, Traced, differences

TEXTS = [
    ("a gripping , quietly devastating film of rare beauty", "positive"),
    ("the plot is a tedious mess and the jokes never land", "negative"),
    ("wonderful acting , a warm script and a splendid score", "positive"),
    ("it drags on and on without a single honest moment", "negative"),
    ("a small masterpiece that will make you laugh and cry", "positive"),
    ("lazy , loud and far too long for its thin idea", "negative"),
]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """(folder, rows): a model, `texts` to attack, and the ledger of an attack that changes characters."""
    folder = tmp_path_factory.mktemp("attacked")
    saved(folder / "model", classifier(seed=3))
    (folder / "texts").mkdir()
    lines = [f'"{text}",{label}' for text, label in TEXTS]
    (folder / "texts" / "test.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    config = AttackConfig(ledger=str(folder / "l.sqlite"), device="cpu")
    return folder, attack(folder / "model", str(folder / "texts"), "deepwordbug", config).rows


def test_every_field_of_a_stored_example_is_a_column(attacked):
    folder, rows = attacked
    columns, found = stored.query("from attacks order by text", folder / "l.sqlite")
    (unit, *_) = stored.stored(folder / "l.sqlite")
    missing = (unit["inputs"] | unit["result"]).keys() - set(columns)
    assert missing == {"order"} and "outputs" in columns, "order is a word of SQL"
    got = [dict(zip(columns, row, strict=True)) for row in found]
    want = sorted(rows, key=lambda row: row["original"])
    for name in ("outcome", "perturbed", "queries", "words_changed", "score", "capped", "error"):
        assert [row[name] for row in got] == [row[name] for row in want]
    assert [row["text"] for row in got] == [row["original"] for row in want]
    assert got[0]["outputs"] == [0, 1] and got[0]["resources"].keys() == {"stopwords"} and got[0]["other"] is None
    assert all(len(row["id"]) == stored.ID and row["attack"] == "deepwordbug" for row in got)


def test_a_query_counts_and_prints_json(attacked, capsys):
    folder, rows = attacked
    sql = "select outcome, count(*) as n from attacks group by outcome order by outcome"
    code, out, _ = run(capsys, "query", sql, "--ledger", folder / "l.sqlite", "--json")
    outcomes = [row["outcome"] for row in rows]
    assert code == 0
    assert json.loads(out) == {
        "columns": ["outcome", "n"],
        "rows": [[outcome, outcomes.count(outcome)] for outcome in sorted(set(outcomes))],
    }


def test_what_json_lacks_is_text(attacked):
    sql = "select 'nan'::float, 1.5, date '2026-01-02', 1/0, {'a': [1, null]}, 'x'::blob, null"
    ((*row,),) = stored.query(sql, attacked[0] / "l.sqlite")[1]
    assert row[:5] == ["nan", 1.5, "2026-01-02", "inf", {"a": [1, None]}] and isinstance(row[5], str) and row[6] is None


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("drop table attacks", "one SELECT, got DROP"),
        ("create table mine as select 1", "got CREATE"),
        ("insert into attacks values (1)", "got INSERT"),
        ("copy attacks to 'stolen.csv'", "got COPY"),
        ("attach 'other.db'", "got ATTACH"),
        ("set threads = 1", "got SET"),
        ("install httpfs", "got LOAD"),
        ("select 1; select 2", "got SELECT, SELECT"),
        ("", "got nothing"),
        ("how many were fooled?", "Parser Error"),
        ("select nope from attacks", '"nope" not found'),
        ("select * from units", "units does not exist"),
        ("select * from statement", "statement does not exist"),
        ("select * from read_csv('/etc/passwd')", "disabled by configuration"),
        ("select * from '/etc/passwd'", "does not exist"),
        ("select * from read_text('/etc/passwd')", "disabled by configuration"),
        ("select ?", "parameters"),
    ],
)
def test_a_query_that_is_no_question_to_the_ledger_is_refused(attacked, capsys, tmp_path, monkeypatch, sql, said):
    monkeypatch.chdir(tmp_path)
    before = (attacked[0] / "l.sqlite").read_bytes()
    line = refused(capsys, "query", sql, "--ledger", attacked[0] / "l.sqlite", "--json")
    assert said in line and "describe attacks" in line
    assert not list(tmp_path.iterdir()) and (attacked[0] / "l.sqlite").read_bytes() == before


def test_a_ledger_that_is_missing_foreign_or_damaged_is_refused_and_left_alone(attacked, capsys, tmp_path):
    assert "is not there" in refused(capsys, "query", "from attacks", "--ledger", tmp_path / "none.sqlite")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text").write_text("no database, but long enough to be looked at" * 50)
    assert "cannot be" in refused(capsys, "query", "from attacks", "--ledger", tmp_path / "text")
    foreign = sqlite3.connect(tmp_path / "foreign")
    foreign.execute("create table bookmarks (url text)")
    foreign.close()
    before = (tmp_path / "foreign").read_bytes()
    assert "no such table" in refused(capsys, "query", "from attacks", "--ledger", tmp_path / "foreign")
    assert (tmp_path / "foreign").read_bytes() == before
    damaged = shutil.copy(attacked[0] / "l.sqlite", tmp_path / "damaged")
    with sqlite3.connect(damaged) as base:
        base.execute("update units set result = replace(result, 'queries', 'querjes')")
    assert "is damaged" in refused(capsys, "replay", "abcd", "--ledger", damaged)


def test_a_ledger_without_attacks_has_no_rows(tmp_path):
    Ledger(tmp_path / "l.sqlite").close()
    assert stored.query("select count(*) from attacks", tmp_path / "l.sqlite")[1] == [[0]]


def test_an_example_is_shown_and_attacked_again_with_the_same_result(attacked, capsys):
    folder, rows = attacked
    sql = "select id, text from attacks where outcome in ('succeeded', 'failed') order by words_changed desc limit 1"
    ((name, text),) = stored.query(sql, folder / "l.sqlite")[1]
    row = next(row for row in rows if row["original"] == text)
    code, out, _ = run(capsys, "replay", name[:8], "--ledger", folder / "l.sqlite", "--json")
    document = json.loads(out)
    assert code == 0 and document["id"] == name and document["result"]["perturbed"] == row["perturbed"]
    assert "again" not in document

    code, out, _ = run(capsys, "replay", name, folder / "model", "--ledger", folder / "l.sqlite", "--json")
    document = json.loads(out)
    assert code == 0 and document["same"] and document["differs"] == [] and document["label"] == row["label"]
    steps = document["steps"]
    assert steps and all(step["after"] > step["before"] for step in steps), "a greedy search goes up"
    assert all(a["after"] == b["before"] for a, b in pairwise(steps))
    assert steps[-1]["after"] == row["score"]
    changed = [pair for pair in differences(text, row["perturbed"]) if pair[0] != pair[1]]
    assert sorted(changed) == sorted((step["from"], step["to"]) for step in steps)

    code, out, _ = run(capsys, "replay", name, folder / "model", "--ledger", folder / "l.sqlite")
    assert code == 0 and "the result is the same" in out and f"{changed[0][0]} -> {changed[0][1]}" in out


def test_a_result_that_is_not_the_stored_one_is_named(attacked):
    folder, _ = attacked
    unit = next(unit for unit in stored.stored(folder / "l.sqlite") if unit["result"]["outcome"] != "skipped")
    unit["result"] |= {"queries": unit["result"]["queries"] + 1}
    again = stored.replay(unit, folder / "model", device="cpu")
    assert not again["same"] and again["differs"] == ["queries"]


def test_ids_that_name_no_example_or_several_are_refused(attacked, capsys, monkeypatch):
    folder, _ = attacked
    keys = [unit["key"] for unit in stored.stored(folder / "l.sqlite")]
    absent = next(f"{n:04x}" for n in range(99) if not any(key.startswith(f"{n:04x}") for key in keys))
    said = refused(capsys, "replay", absent, "--ledger", folder / "l.sqlite")
    assert (
        f"one attacked example of ledger {folder / 'l.sqlite'}, {absent} names 0; name the ledger of the attack" in said
    )
    for name in ("abc", "not hex", ""):
        assert "hexadecimal digits" in refused(capsys, "replay", name, "--ledger", folder / "l.sqlite")
    twins = [{"key": "abcdef01"}, {"key": "abcdef02"}]
    monkeypatch.setattr(stored, "stored", lambda ledger: twins)
    assert "names 2" in refused(capsys, "replay", "abcdef0") and stored.find("ABCDEF02") is twins[1]


def test_another_model_or_resource_is_refused(attacked, capsys, tmp_path):
    folder, _ = attacked
    saved(tmp_path / "other", classifier(seed=4))
    unit = stored.stored(folder / "l.sqlite")[0]
    line = refused(capsys, "replay", unit["key"], tmp_path / "other", "--ledger", folder / "l.sqlite")
    assert "is not the model that was attacked" in line
    unit["inputs"]["resources"]["stopwords"] = "0" * 64
    with pytest.raises(Exception, match="stopwords must be what the stored attack read"):
        stored.replay(unit, folder / "model", device="cpu")


def test_differences_pair_words_and_name_what_was_split_or_removed():
    assert differences("a b c d", "a x y d") == [("a", "a"), ("b", "x"), ("c", "y"), ("d", "d")]
    assert differences("a b c", "a b1 b2 c") == [("a", "a"), ("b", "b1 b2"), ("c", "c")]
    assert differences("a b", "a") == [("a", "a"), ("b", "")]


def test_a_traced_text_changes_as_any_text_and_remembers():
    for index, word in ((1, "fine"), (1, "very fine"), (0, "")):
        plain, traced = Text("a good film").with_word(index, word), Traced("a good film").with_word(index, word)
        assert (traced.text, traced.changed, traced.latest) == (plain.text, plain.changed, plain.latest)
        assert traced.before.text == "a good film" and traced.change == (["a", "good"][index], word)
