"""Attacks as runs: what a ledger keeps, processes that share the work, and the command line."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import spawned, until
from models import classifier, saved

from sparsebert import checkpoint, data
from sparsebert.cli import main
from sparsebert.config import AttackConfig
from sparsebert.data import Examples
from sparsebert.encoders import no_progress
from sparsebert.errors import DataError, InputError, OutputError, SparsebertError, SparsebertWarning, UnsupportedError
from sparsebert.jobs import Ledger, OtherVersion, ledger
from sparsebert.robustness import attack
from sparsebert.robustness.attacks import RECIPES, Plan, crew, figures, plans, ray_actors, require_few_errors
from sparsebert.robustness.attacks import run as run_attacks
from sparsebert.robustness.attacks.resources import Resources
from sparsebert.robustness.attacks.words import words_of

RUN = sys.modules[run_attacks.__module__]  # the package's name `run` is the function
pytestmark = pytest.mark.filterwarnings("ignore:.*NLTK's stop words are not here")

# --- claims in a ledger -----------------------------------------------------------------------------------------------

UNITS = [{"i": i} for i in range(6)]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "l.sqlite"


def test_a_unit_is_claimed_by_one_until_it_is_finished_or_released(path):
    one, two = Ledger(path), Ledger(path)
    assert one.claim("unit", UNITS[:4]) == [True] * 4
    assert one.claim("unit", UNITS[:1]) == [True], "its own claim"
    assert two.claim("unit", UNITS) == [False] * 4 + [True] * 2
    one.add("unit", [(UNITS[0], {"x": 0}, 0.5)])
    one.release()
    assert two.claim("unit", UNITS[:4]) == [False, True, True, True]
    assert two.found("unit", UNITS) == [{"x": 0}] + [None] * 5
    assert two.claim("other", UNITS[:1]) == [True] and two.claim("unit", UNITS[:1], "code") == [True]


def test_what_one_adds_the_other_finds_in_the_order_asked(path):
    one, two = Ledger(path), Ledger(path)
    units = [({"i": i}, {"x": [i, None]}, 0.1) for i in range(1200)]
    one.add("unit", units, "c")
    asked = [{"i": 1100}, {"i": -1}, {"i": 3}, {"i": 3}]
    assert two.found("unit", asked, "c") == [{"x": [1100, None]}, None, {"x": [3, None]}, {"x": [3, None]}]
    assert two.found("unit", asked) == [None] * 4 and two.found("unit", []) == []
    assert sum(row is not None for row in two.found("unit", [unit for unit, *_ in units], "c")) == 1200


def test_a_claim_that_is_not_renewed_is_anybodys_after_a_while(path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    for name in ("perf_counter", "strftime", "gmtime"):
        setattr(clock, name, getattr(time, name))
    clock.time = lambda: clock.now
    monkeypatch.setattr(ledger, "time", clock)
    one, two = Ledger(path), Ledger(path)
    one.claim("unit", UNITS)
    clock.now += ledger.LEASE * 0.9
    assert two.claim("unit", UNITS[:1]) == [False]
    one.renew()
    clock.now += ledger.LEASE * 0.9
    assert two.claim("unit", UNITS[:1]) == [False]
    clock.now += ledger.LEASE * 0.2
    assert two.claim("unit", UNITS[:1]) == [True] and one.claim("unit", UNITS[:2]) == [False, True]


def test_a_ledger_from_before_there_were_claims_is_read_and_claimed_from(path):
    old = Ledger(path)
    old.once("unit", {"i": 0}, lambda: {"x": 1})
    old._db.executescript("DROP TABLE claims; PRAGMA user_version = 0")
    old.close()
    book = Ledger(path)
    assert book.found("unit", UNITS[:2]) == [{"x": 1}, None] and book.claim("unit", UNITS[:2]) == [False, True]


def test_a_ledger_of_a_newer_version_is_refused_and_left(path):
    Ledger(path)._db.executescript("DROP TABLE claims; PRAGMA user_version = 9")
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(OtherVersion, match=r"l\.sqlite was written by a newer version of this package; update it"):
            Ledger(path, overwrite=overwrite)
    assert path.read_bytes() == before and not list(path.parent.glob("*damaged*"))


@pytest.mark.parametrize("how", ["text", "row"])
def test_a_damaged_ledger_is_moved_aside_whole(path, how):
    for n in (1, 2):
        if how == "row":
            book = Ledger(path)
            book.once("unit", {"i": 0}, lambda: {"x": 1})
            book._db.execute("UPDATE units SET result = '{\"x\": 2}'")
            book.close()
        else:
            path.write_bytes(b"no database, and long enough to have a header of its own " * 20)
        content = path.read_bytes()
        book = Ledger(path, overwrite=True)
        assert book.moved == path.with_name(f"l.sqlite.damaged-{n}") and book.moved.read_bytes() == content
        assert book.found("unit", UNITS[:1]) == [None]
        book.close()
        path.unlink()


def test_a_ledger_that_is_in_use_or_out_of_reach_is_not_taken_for_a_damaged_one(path, monkeypatch):
    book = Ledger(path)
    book.add("unit", [(UNITS[0], {"x": 0}, 0.0)])
    book._db.execute("PRAGMA journal_mode=DELETE")
    book._db.execute("BEGIN EXCLUSIVE")
    connect = __import__("sqlite3").connect
    monkeypatch.setattr("sqlite3.connect", lambda *args, **more: connect(*args, **{**more, "timeout": 0}))
    with pytest.raises(OutputError, match="cannot be opened: database is locked"):
        Ledger(path, overwrite=True)
    book._db.execute("ROLLBACK")
    assert Ledger(path, overwrite=True).found("unit", UNITS[:1]) == [{"x": 0}]
    with pytest.raises(OutputError, match="cannot be opened: unable to open database file; free space, or choose"):
        Ledger(path.parent, overwrite=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["l.sqlite"]


def test_on_a_full_disk_the_old_content_stays_and_the_reason_is_said(path):
    book = Ledger(path)
    book.add("unit", [(UNITS[0], {"x": 0}, 0.0)])
    pages = book._db.execute("PRAGMA page_count").fetchone()[0]
    book._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    many = [({"j": j}, {"text": "z" * 5000}, 0.0) for j in range(50)]
    with pytest.raises(OutputError, match="cannot be written: database or disk is full; free space"):
        book.add("unit", many)
    assert book.found("unit", [UNITS[0], many[0][0]]) == [{"x": 0}, None], "all of it or nothing"
    book._db.execute("PRAGMA max_page_count = 100000")
    book.add("unit", many)
    assert book.found("unit", [many[-1][0]]) == [many[-1][1]]


def test_two_processes_that_claim_compute_every_unit_once(path):
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from sparsebert.jobs import Ledger
        book = Ledger(Path(sys.argv[1]))
        print("ready", flush=True)
        sys.stdin.readline()
        units, done = [{"i": i} for i in range(60)], 0
        for start in range(0, 60, 4):
            block = units[start : start + 4]
            mine = [u for u, free in zip(block, book.claim("unit", block)) if free]
            time.sleep(0.01)
            book.add("unit", [(u, {"x": u["i"]}, 0.0) for u in mine])
            done += len(mine)
        print(done)
    """)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) for _ in range(2)
    ]  # fmt: skip
    for process in both:
        assert process.stdout.readline() == "ready\n"
    outs = [process.communicate("go\n")[0] for process in both]
    assert sum(map(int, outs)) == 60
    assert Ledger(path).found("unit", [{"i": i} for i in range(60)]) == [{"x": i} for i in range(60)]


# --- runs on a toy victim ---------------------------------------------------------------------------------------------

SPEC = data.TASKS["mr"]
TEXTS = ["a good long film", "some very bad acting", "good", "...", "", "fine, really fine story"]


class Toy:
    """A victim of two labels that says 1 for a text with a certain word; counts the examples it has to begin."""

    def __init__(self, facts: dict | None = None, fails: str = "no such text", task=SPEC):
        self.facts, self.fails, self.task, self.asked = facts or {"model": "toy"}, fails, task, []

    def logits(self, items):
        self.asked += items
        if any(self.fails in item for item in items):
            raise ValueError("this text is bad")
        scores = [0.9 if "bad" in words_of(str(item)) else 0.1 + 0.05 * (len(str(item)) % 7) for item in items]
        return np.log(np.array([[1 - s, s] for s in scores], np.float32))


def plan(name: str = "deepwordbug", first: bool = True, **settings) -> Plan:
    return Plan(RECIPES[name], Resources(encoder="none"), AttackConfig(**settings), first)


def examples(texts=TEXTS, texts_b=None, labels=None) -> Examples:
    return Examples("mr", "test", list(texts), texts_b, np.array(labels or [0] * len(texts)))


def untimed(rows: list[dict]) -> list[dict]:
    return [{**row, "seconds": None} for row in rows]


@pytest.fixture
def book(tmp_path) -> str:
    return str(tmp_path / "attacks.sqlite")


def test_every_example_has_a_row_in_its_order(book):
    rows = run_attacks(Toy(), plan(ledger=book), examples())
    assert [row["id"] for row in rows] == list(range(6)) and [row["original"] for row in rows] == TEXTS
    assert [row["outcome"] for row in rows] == ["failed", "skipped", "failed", "failed", "failed", "failed"]
    assert {row["label"] for row in rows} == {SPEC.labels[0]}
    assert rows[3] == {**rows[3], "perturbed": "...", "queries": 1, "words_changed": 0.0, "error": None}
    assert rows[4]["perturbed"] == "" and rows[0]["perturbed"] != TEXTS[0] and rows[0]["words_changed"] > 0
    assert all(row["capped"] is None for row in rows)


def test_what_the_ledger_has_is_not_asked_again(book):
    first = run_attacks(Toy(), plan(ledger=book), examples())
    toy, told = Toy(), []
    again = run_attacks(toy, plan(ledger=book), examples(), progress=lambda *said: told.append(said))
    assert again == first and toy.asked == [] and told[0] == (6, 6)
    some = run_attacks(toy, plan(ledger=book), examples(TEXTS[:3][::-1]))
    assert toy.asked == [] and [row["perturbed"] for row in some] == [row["perturbed"] for row in first[:3][::-1]]


def test_equal_examples_have_equal_rows(book):
    rows = run_attacks(Toy(), plan(ledger=book), examples([TEXTS[0]] * 3))
    assert [{**row, "id": 0, "seconds": 0} for row in rows] == [{**rows[0], "seconds": 0}] * 3


FACTS = {"model": "m", "engine": "sparsebert", "dtype": "fp32", "device": "cpu", "isa": "avx2", "core": "c",
         "max_length": 128, "order": [0, 1], "temperature": 1.0}  # fmt: skip


@pytest.mark.parametrize("field", FACTS)
def test_whatever_decides_the_victims_logits_is_a_miss(book, field):
    run_attacks(Toy(FACTS), plan(ledger=book), examples())
    toy = Toy({**FACTS, field: "other"})
    run_attacks(toy, plan(ledger=book), examples())
    assert toy.asked


def test_no_limit_on_time_is_0_on_the_command_line_and_none_in_a_key():
    assert AttackConfig(max_seconds=0).max_seconds is None and AttackConfig().max_seconds == 60.0


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"max_queries": 10_000}, {"max_seconds": 59.0}, {"name": "pwws"}], ids=str
)
def test_whatever_decides_the_attack_is_a_miss(book, changed):
    run_attacks(Toy(), plan(ledger=book), examples())
    toy = Toy()
    run_attacks(toy, plan(ledger=book, **changed), examples())
    assert toy.asked


@pytest.mark.parametrize(
    ("other", "misses"),
    [
        (examples(), False),
        (examples([text + "!" for text in TEXTS]), True),
        (examples(labels=[1] * 6), True),
        (examples(texts_b=["b"] * 6), True),
    ],
)
def test_other_texts_and_labels_are_a_miss(book, other, misses):
    run_attacks(Toy(), plan(ledger=book), examples())
    toy = Toy(task=replace(SPEC, pair=other.texts_b is not None))
    run_attacks(toy, plan(ledger=book), other)
    assert bool(toy.asked) == misses


def test_other_resources_and_fields_are_other_facts(tmp_path):
    facts = plan("textbugger").facts
    assert facts == plan("textbugger", n=3, workers=2).facts, "what decides nothing is not in it"
    (tmp_path / "n.json").write_text('{"good": ["fine"]}')
    own = replace(plan("textbugger"), resources=Resources(tmp_path / "n.json", encoder="none"))
    assert own.facts != facts != plan("textbugger", first=False).facts
    assert own.variant != plan("textbugger").variant and "n.json" in own.variant


def test_the_facts_of_a_real_victim_name_what_decides_its_logits(model):
    from sparsebert.engine.classifier import Classifier
    from sparsebert.robustness.attacks import Victim

    victim = Victim(Classifier.load(model, "cpu"), SPEC, np.arange(2))
    assert victim.facts.keys() == FACTS.keys()
    assert victim.facts["model"] == checkpoint.read(model).content_sha256 and victim.facts["device"] == "cpu"
    json.dumps(victim.facts)


def test_a_text_of_a_pair_is_attacked_and_the_other_stays(book):
    task = replace(SPEC, pair=True)
    pairs = examples(["first one here"], ["second one there"])
    for first in (True, False):
        toy = Toy(task=task)
        (row,) = run_attacks(toy, plan(first=first, ledger=book), pairs)
        kept, attacked = (1, 0) if first else (0, 1)
        assert row["original"] == ["first one here", "second one there"][attacked]
        assert {item[kept] for item in toy.asked} == {["first one here", "second one there"][kept]}
        assert len({item[attacked] for item in toy.asked}) > 3


def test_an_example_whose_attack_raises_is_an_error_and_the_others_go_on(book):
    rows = run_attacks(Toy(fails="acting"), plan(ledger=book), examples())
    assert [row["outcome"] for row in rows].count("error") == 1
    assert rows[1] == {**rows[1], "outcome": "error", "perturbed": None, "score": None, "error": "this text is bad"}
    found = figures("v", rows)
    assert (found["n"], found["errors"]) == (5, 1)
    toy = Toy()
    again = run_attacks(toy, plan(ledger=book), examples())
    assert {str(item) for item in toy.asked} & set(TEXTS) == {TEXTS[1]}, "what ended in an error is tried again"
    assert again[1]["outcome"] == "skipped" and [again[i] for i in (0, 2, 3, 4, 5)] == [*rows[:1], *rows[2:]]


def test_an_interrupted_run_keeps_what_was_finished(book, monkeypatch):
    def stopped(victim, plan, units):
        for n, done in enumerate(filter(None, real(victim, plan, units))):
            if n == 2:
                raise KeyboardInterrupt
            yield done

    real = crew.attacked
    monkeypatch.setattr(crew, "attacked", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_attacks(Toy(), plan(ledger=book), examples())
    monkeypatch.setattr(crew, "attacked", real)
    toy = Toy()
    begun = time.monotonic()
    run_attacks(toy, plan(ledger=book), examples())
    assert len([text for text in TEXTS if text in toy.asked]) == 4, "two were kept"
    assert time.monotonic() - begun < ledger.LEASE / 2, "its claims were released"


def test_examples_of_another_process_are_waited_for(book, monkeypatch):
    monkeypatch.setattr(ledger, "LEASE", 0.4)
    facts = Toy().facts | plan().facts
    keys = [facts | {"text": text, "other": None, "label": 0} for text in TEXTS]
    other = Ledger(Path(book))
    other.claim(RUN.KIND, keys[:2], RUN._code())
    other.add(RUN.KIND, [(keys[0], {"outcome": "failed", "seconds": 7}, 7.0)], RUN._code())
    toy = Toy()
    rows = run_attacks(toy, plan(ledger=book), examples())
    assert rows[0]["seconds"] == 7 and TEXTS[0] not in toy.asked, "taken from the other one"
    assert rows[1]["outcome"] == "skipped", "that one was killed: its claim ended"


@pytest.mark.parametrize("how", ["whole", "row"])
def test_a_damaged_ledger_is_kept_aside_and_the_run_goes_on(book, how):
    first = run_attacks(Toy(), plan(ledger=book), examples())
    if how == "whole":
        Path(book).write_bytes(b"damaged " * 500)
    else:
        with contextlib.closing(Ledger(Path(book))) as held:
            held._db.execute("UPDATE units SET result = replace(result, 'failed', 'succeeded')")
    content = Path(book).read_bytes()
    with pytest.warns(SparsebertWarning, match=r"attacks\.sqlite was damaged and is kept as .*damaged-1"):
        rows = run_attacks(Toy(), plan(ledger=book), examples())
    assert untimed(rows) == untimed(first) and Path(f"{book}.damaged-1").read_bytes() == content


def test_a_ledger_of_a_newer_version_stops_the_run(book):
    with contextlib.closing(Ledger(Path(book))) as held:
        held._db.execute("PRAGMA user_version = 9")
    with pytest.raises(OtherVersion, match="newer version"):
        run_attacks(Toy(), plan(ledger=book), examples())


def test_a_ledger_that_cannot_be_written_is_an_error_before_any_question(tmp_path):
    (tmp_path / "file").write_text("x")
    toy = Toy()
    with pytest.raises(OutputError, match=r"ledger .* cannot be opened"):
        run_attacks(toy, plan(ledger=str(tmp_path / "file" / "l.sqlite")), examples())
    assert toy.asked == []


def row(outcome: str, queries: int = 10, changed: float = 0.5, capped: str | None = None) -> dict:
    return {"outcome": outcome, "queries": queries, "words_changed": changed, "capped": capped, "seconds": 0.5}


def test_figures_are_shares_of_all_and_of_the_attacked():
    rows = [row("skipped", 1, 0), row("failed", 20), row("succeeded", 5, 0.2), row("succeeded", 5, 0.4), row("error")]
    found = figures("v", [*rows, row("failed", 30, capped="queries")])
    assert (found["n"], found["errors"], found["capped"], found["seconds"]) == (5, 1, 1, 3.0)
    assert (found["acc"], found["aua"], found["asr"]) == (4 / 5, 2 / 5, 2 / 4)
    assert (found["queries"], found["words_changed"]) == (60 / 4, pytest.approx(0.3))
    none = figures("v", [row("skipped"), row("error")])
    assert (none["acc"], none["aua"], none["asr"], none["queries"], none["words_changed"]) == (0, 0, None, None, None)
    empty = figures("v", [row("error")])
    assert (empty["n"], empty["acc"], empty["aua"]) == (0, None, None)


def test_figures_beside_a_dense_model_are_of_the_same_examples():
    rows = [row("failed"), row("error"), row("succeeded"), row("failed")]
    found = figures("v", rows, [row("failed"), row("failed"), row("failed"), row("error")])
    assert (found["n"], found["aua"], found["dense_aua"], found["difference"]) == (2, 0.5, 1.0, -0.5)
    assert found["errors"] == 2, "one is the dense model's"
    with pytest.raises(SparsebertError, match="2 of 4 examples ended in an error under v"):
        require_few_errors(found)


@pytest.mark.parametrize("n", [100, 200, 300, 500, 1000, 2000])
def test_a_difference_of_a_point_is_a_point(n):
    rows = [row("failed")] * (n // 3) + [row("succeeded")] * (n - n // 3)
    dense = [row("failed")] * (n // 3 + n // 100) + [row("succeeded")] * (n - n // 3 - n // 100)
    assert figures("v", rows, dense)["difference"] == -0.01


def stored_rows(path: Path, **columns) -> Resources:
    pq.write_table(pa.table(columns), path)
    return Resources(encoder="none", stored=path)


def test_transfer_asks_the_texts_that_fooled_another_model_and_no_others(tmp_path, book):
    fooled = {
        "original": [TEXTS[0]] * 2,
        "perturbed": ["this is bad", "never asked"],
        "outcome": ["succeeded", "failed"],
    }
    resources = stored_rows(tmp_path / "rows.parquet", **fooled)
    toy = Toy()
    transfer = replace(plan("transfer", ledger=book), resources=resources)
    (found,) = run_attacks(toy, transfer, examples(TEXTS[:1]))
    assert found["outcome"] == "succeeded" and found["perturbed"] == "this is bad" and "never asked" not in toy.asked
    (other,) = run_attacks(toy, transfer, examples(["another text"]))
    assert other["outcome"] == "failed" and other["queries"] == 1


def test_transfer_of_a_pair_asks_the_texts_beside_the_same_other_one(tmp_path, book):
    task = replace(SPEC, pair=True)
    rows = run_attacks(Toy(task=task), plan(first=True, ledger=book), examples(["one two"] * 2, ["first", "second"]))
    assert [row["other"] for row in rows] == ["first", "second"]
    fooled = {"original": ["one two"] * 2, "other": ["first", "second"], "perturbed": ["bad one", "bad two"]}
    resources = stored_rows(tmp_path / "rows.parquet", **fooled, outcome=["succeeded"] * 2)
    transfer = replace(plan("transfer", first=True, ledger=book), resources=resources)
    found = run_attacks(Toy(task=task), transfer, examples(["one two"] * 2, ["second", "third"]))
    assert [row["outcome"] for row in found] == ["succeeded", "failed"] and found[0]["perturbed"] == "bad two"


def test_stored_texts_of_pairs_are_refused_for_single_texts(tmp_path):
    rows = {"original": ["a"], "perturbed": ["b"], "outcome": ["succeeded"]}
    pq.write_table(pa.table(rows), tmp_path / "single.parquet")
    pq.write_table(pa.table(rows | {"other": ["c"]}), tmp_path / "pairs.parquet")
    transfer = [RECIPES["transfer"]]
    for name, task, said in (
        ("pairs", SPEC, "is of pairs"),
        ("single", replace(SPEC, pair=True), "is of single texts"),
    ):
        config = AttackConfig(stored=str(tmp_path / f"{name}.parquet"))
        with pytest.raises(DataError, match=said):
            plans(transfer, config, task)


# --- the command line and processes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("attack") / "model", labels=2, seed=2)


WORDS = "the doctor saw lawyer near actors who danced and some judge slept film story good bad quickly".split()


def write(path: Path, columns: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """A data folder with a small MR and MNLI, and a cache with no attacks."""
    rng, n = np.random.default_rng(0), 24
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(2 * n)]
    write(tmp_path / "mr" / "test.parquet", {"text": texts[:n], "label": [i % 2 for i in range(n)]})
    pairs = {"text": texts[:n], "text_b": texts[n:], "label": [i % 3 for i in range(n)]}
    write(tmp_path / "mnli" / "dev_matched.parquet", pairs)
    pairs = {"text": texts[:n], "text_b": texts[n:], "label": [i % 2 for i in range(n)]}
    write(tmp_path / "hans" / "test.parquet", pairs | {"heuristic": ["subsequence"] * n})
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["attack", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


BUG = ("--task", "mr", "--attack", "deepwordbug")


def test_the_document_is_the_last_line_and_the_file_has_a_row_an_example(sets, model, capsys):
    output = sets / "rows.parquet"
    code, out, err = command(capsys, model, *BUG, "--json", "-o", output)
    said = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and "TextFooler's longer list is used" in err
    assert said["n"] == 24 and said["output"] == str(output) and said["attack"] == "deepwordbug"
    assert {"variant", "acc", "aua", "asr", "queries", "words_changed", "errors", "capped", "seconds"} <= said.keys()
    table = pq.read_table(output)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == list(range(24))
    columns = {"original", "perturbed", "label", "outcome", "queries", "words_changed", "score", "capped", "error"}
    assert columns <= rows[0].keys()
    assert not any(pa.types.is_null(column.type) for column in table.schema), "of one type in every file"
    outcomes = [row["outcome"] for row in rows]
    assert set(outcomes) == {"skipped", "succeeded", "failed"}
    assert said["aua"] == outcomes.count("failed") / 24 and said["acc"] == (24 - outcomes.count("skipped")) / 24
    assert {row["label"] for row in rows} == set(SPEC.labels)
    found = [row for row in rows if row["outcome"] == "succeeded"]
    assert found and all(row["perturbed"] != row["original"] and row["words_changed"] > 0 for row in found)

    code, out, _ = command(capsys, model, *BUG, "-o", output)
    assert code == 0 and json.loads(out.splitlines()[-1]) == said, "the same attack takes the place of its file"
    assert "accuracy under attack" in out and " -> " in out and found[0]["label"] in out


def test_the_texts_that_fool_do_fool(sets, model):
    from sparsebert import Engine

    found = attack(model, "mr", "deepwordbug", AttackConfig(n=12))
    engine = Engine.load(model, batch_invariant=True)
    for row in found.rows:
        names = [data.SENTIMENT[i] for i in engine.logits([row["original"], row["perturbed"]]).argmax(1)]
        right = [name == row["label"] for name in names]
        assert right == {"skipped": [False] * 2, "failed": [True] * 2, "succeeded": [True, False]}[row["outcome"]]


def test_a_file_that_holds_something_else_stays(sets, model, capsys):
    output = sets / "rows.parquet"
    write(output, {"thesis": ["mine"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "attacked", lambda *_: pytest.fail("it is refused before the work"))
        code, out, err = command(capsys, model, *BUG, "--n", 4, "-o", output)
    assert code == 2 and "exists and holds something else" in err and out == ""
    assert pq.read_table(output).to_pylist() == [{"thesis": "mine"}]
    assert command(capsys, model, *BUG, "--n", 4, "-o", output, "--overwrite")[0] == 0
    assert pq.read_table(output).num_rows == 4
    assert command(capsys, model, *BUG, "--n", 4, "--seed", 1, "-o", output)[0] == 2, "another attack"
    assert command(capsys, model, *BUG, "--n", 4, "-o", output)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "mr", "--attack", "nope"), "attacks must be among textfooler, .*, got 'nope'"),
        (
            ("--task", "mr", "--attack", "bae"),
            "this attack needs a masked-language model, none was named; give --masked",
        ),
        (("--task", "mr", "--attack", "bert-attack", "--masked-lm", "absent"), "absent"),
        ((*BUG, "--n", "0"), "n"),
        ((*BUG, "--max-queries", "0"), "max.queries"),
        ((*BUG, "--workers", "0"), "workers"),
        ((*BUG, "--field", "text_b"), "task 'mr' has single texts, no text_b"),
        ((*BUG, "-o", "rows.csv"), "rows.csv must end in .parquet"),
        (("--task", "mr", "--attack", "random-synonym", "--neighbours", "absent.txt"), "absent.txt cannot be read"),
        (("--task", "mr", "--attack", "textfooler", "--sentence-encoder", "absent"), "absent"),
        (("--task", "nope", "--attack", "pwws"), "nope"),
        ((*BUG, "--sentence-encoder", "absent"), "--sentence-encoder is for attacks that read it, got deepwordbug"),
        (("--task", "mr", "--attack", "textfooler", "--masked-lm", "absent"), "--masked-lm is for attacks that read"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(sets, model, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(sets)
    monkeypatch.setattr(crew, "attacked", lambda *_, **k: pytest.fail("work was begun"))
    code, out, err = command(capsys, model, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not (sets / "cache" / "attacks.sqlite").exists()


@pytest.mark.parametrize(
    ("task", "labels", "problem", "message"),
    [
        ("mr", ("good", "bad"), None, "good"),
        ("mr", 3, None, "labels"),
        ("mr", 1, None, "one_logit|one logit|labels"),
        ("mr", 2, "multi_label_classification", "multi"),
        ("hans", 3, None, "has 3 labels, the task 'hans' has 2"),
    ],
)
def test_a_model_of_other_outputs_is_refused_before_any_work(sets, capsys, monkeypatch, task, labels, problem, message):
    made = classifier(labels=labels)
    if problem is not None:
        made.config.problem_type = problem
    directory = saved(sets / "other", made)
    monkeypatch.setattr(crew, "attacked", lambda *_, **k: pytest.fail("work was begun"))
    code, out, err = command(capsys, directory, "--task", task, "--attack", "deepwordbug")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err


def test_the_hypothesis_of_a_pair_is_attacked_unless_the_field_says_otherwise(sets, tmp_path, capsys):
    directory = saved(tmp_path / "nli", labels=3)
    columns = pq.read_table(sets / "mnli" / "dev_matched.parquet").to_pydict()
    for extra, column in (((), "text_b"), (("--field", "text_b"), "text_b"), (("--field", "text"), "text")):
        output = tmp_path / f"{column}-{len(extra)}.parquet"
        arguments = (directory, "--task", "mnli", "--attack", "deepwordbug", *extra, "-o", output)
        assert command(capsys, *arguments)[0] == 0
        assert pq.read_table(output)["original"].to_pylist() == columns[column]
    with contextlib.closing(Ledger(sets / "cache" / "attacks.sqlite")) as held:
        assert len(held.results(RUN.KIND)) == 48, "the default is text_b"


def test_more_than_one_error_in_a_hundred_is_exit_code_3(sets, model, capsys, monkeypatch):
    from sparsebert.robustness.attacks import Victim

    real = Victim.logits
    bad = pq.read_table(sets / "mr" / "test.parquet")["text"].to_pylist()[5]

    def logits(self, items):
        if bad in items:
            raise ValueError("this text is bad")
        return real(self, items)

    monkeypatch.setattr(Victim, "logits", logits)
    code, out, err = command(capsys, model, *BUG, "--json")
    assert code == 3 and json.loads(out)["errors"] == 1 and "1 of 24 examples ended in an error" in err


def test_a_limit_of_queries_is_told(sets, model, capsys):
    code, out, _ = command(capsys, model, *BUG, "--max-queries", 5)
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and said["capped"] > 0 and said["queries"] <= 5 and "searches ended by a limit" in out


# What a process does that attacks, is killed after some rows, or shares the work with another one.
PROCESS = """
import os, signal, sys, time
from pathlib import Path
from sparsebert.cli import main
from sparsebert.jobs import ledger
from sparsebert.robustness.attacks import crew
run = sys.modules["sparsebert.robustness.attacks.run"]

if __name__ == "__main__":
    model, ledger_file, after, lease, output = sys.argv[1:]
    run.BLOCK, ledger.LEASE = 4, float(lease)
    real, count = crew.attacked, 0

    def attacked(victim, plan, units):
        global count
        for i, unit in enumerate(units):
            for done in real(victim, plan, [unit]):
                yield done
                if done is None:
                    continue
                count += 1
                time.sleep(0.02)
                if count == int(after):
                    os.kill(os.getpid(), signal.SIGKILL)

    crew.attacked = attacked
    print("ready", flush=True)
    sys.stdin.readline()
    code = main(["attack", model, "--task", "mr", "--attack", "deepwordbug",
                 "--ledger", ledger_file, "-o", output, "--json"])
    print(code, count)
"""


def started(
    sets: Path, model: Path, book: str, after: int = 0, lease: float = 60.0, output: str = "rows"
) -> subprocess.Popen:
    (sets / "process.py").write_text(PROCESS)
    arguments = [sets / "process.py", model, book, after, lease, sets / f"{output}.parquet"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **pipes)


def rows_at(path: Path) -> list[dict]:
    return untimed(pq.read_table(path).to_pylist())


def test_a_run_that_was_killed_goes_on_and_computes_nothing_twice(sets, model, book, monkeypatch):
    whole = untimed(attack(model, "mr", "deepwordbug", AttackConfig(ledger=str(sets / "whole.sqlite"))).rows)
    process = started(sets, model, book, after=7, lease=0.3)
    process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL and not (sets / "rows.parquet").exists()
    with contextlib.closing(Ledger(Path(book))) as held:
        kept = len(held.results(RUN.KIND))
    assert 6 <= kept <= 7, "one unit is lost at most"
    real, computed = crew.attacked, []
    monkeypatch.setattr(crew, "attacked", lambda *a: (computed.append(done) or done for done in real(*a)))
    again = attack(model, "mr", "deepwordbug", AttackConfig(ledger=book))
    assert untimed(again.rows) == whole and len(list(filter(None, computed))) == 24 - kept


def test_two_processes_share_a_ledger_and_have_the_same_rows(sets, model, book):
    both = [started(sets, model, book, output=name) for name in ("a", "b")]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    outs = [process.communicate()[0].splitlines()[-1].split() for process in both]
    assert [code for code, _ in outs] == ["0", "0"] and sum(int(count) for _, count in outs) == 24
    assert rows_at(sets / "a.parquet") == rows_at(sets / "b.parquet")


def attacked_by(sets: Path, model: Path, workers: int, progress=no_progress) -> list[dict]:
    settings = AttackConfig(workers=workers, ledger=str(sets / f"{workers}.sqlite"))
    return untimed(attack(model, "mr", "deepwordbug", settings, progress=progress).rows)


def test_workers_find_what_one_process_finds(sets, model, monkeypatch):
    alone = attacked_by(sets, model, 1)
    monkeypatch.setattr(crew, "UNITS", 5)
    monkeypatch.setattr(crew, "attacked", lambda *a, **k: iter(list(a[2]) and pytest.fail("a unit is left")))
    assert attacked_by(sets, model, 2) == alone


def killed_at(monkeypatch, examples: int, every: bool):
    """A Progress that kills workers after so many examples: all of them, or one."""
    made, real = [], crew.Processes
    monkeypatch.setattr(crew, "UNITS", 5)
    monkeypatch.setattr(crew, "Processes", lambda *a: made.append(real(*a)) or made[-1])
    killed = []

    def kill(done: int, _total: int, _what: str = "") -> None:
        if done >= examples and not killed:
            for process in made[0]._processes[: None if every else 1]:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                killed.append(process.pid)

    return kill


def test_where_workers_are_killed_the_process_that_began_them_goes_on_alone(sets, model, monkeypatch):
    alone = attacked_by(sets, model, 1)
    kill = killed_at(monkeypatch, 1, every=True)
    with pytest.warns(SparsebertWarning, match="a worker was killed; the work goes on without it"):
        assert attacked_by(sets, model, 2, kill) == alone


def test_where_one_worker_is_killed_the_other_does_what_it_left(sets, model, monkeypatch):
    alone = attacked_by(sets, model, 1)
    kill = killed_at(monkeypatch, 1, every=False)
    monkeypatch.setattr(
        crew, "attacked", lambda _victim, _plan, units: iter(list(units) and pytest.fail("by this one"))
    )
    with pytest.warns(SparsebertWarning, match="a worker was killed; the work goes on without it"):
        assert attacked_by(sets, model, 2, kill) == alone


def test_workers_end_with_the_process_that_began_them(sets, model, book):
    """Killed, it ends none of them: they notice that nobody listens."""
    code = (
        "import sys; from sparsebert.cli import main\n"
        "if __name__ == '__main__': main(sys.argv[1:])\n"
    )  # fmt: skip
    (sets / "attacker.py").write_text(code)
    arguments = ["attack", model, "--task", "mr", "--attack", "deepwordbug", "--ledger", book, "--workers", 2, "--json"]
    process = subprocess.Popen([sys.executable, sets / "attacker.py", *map(str, arguments)])
    found: list[int] = []
    until(lambda: len(children(process.pid, found)) >= 2)
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in found))


def test_a_worker_goes_on_once_its_row_is_in_the_ledger(monkeypatch):
    ended = []

    def attacked(victim, plan, units):
        for unit in units:
            ended.append(unit)
            yield unit

    monkeypatch.setattr(crew, "attacked", attacked)
    monkeypatch.setattr(crew, "plans", lambda *given: ["plan"])
    monkeypatch.setattr(crew.Classifier, "load", lambda *given: None)
    monkeypatch.setattr(crew, "Victim", lambda *given: None)
    for name in ("signal.signal", "os.sched_setaffinity"):  # of the process, which this thread shares
        monkeypatch.setattr(name, lambda *given: None)
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, (0, 1), "m", "cpu", None, None, 1.0, "deepwordbug", None)
    worker = threading.Thread(target=crew._serve, args=arguments, daemon=True)
    worker.start()
    ours.send([1, 2])
    for told in (1, 2):
        assert ours.poll(10) and ours.recv() == told and not ours.poll(0.2) and ended[-1] == told
        ours.send(None)
    assert ours.poll(10) and ours.recv() is None
    ours.close()
    worker.join(10)
    assert not worker.is_alive() and ended == [1, 2]


def children(parent: int, found: list[int]) -> list[int]:
    """Adds to `found` the workers of a process that have begun."""
    found[:] = spawned(parent)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- on a Ray cluster of one node -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on this machine, with two CPUs whatever it has, and without NLTK's data, as in `sets`."""
    ray = ray_actors.ray
    empty = str(tmp_path_factory.mktemp("ray"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", empty)
        patch.setenv("SPARSEBERT_DATA", empty)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def by_ray(sets: Path, model: Path, workers: int, progress=no_progress) -> list[dict]:
    settings = AttackConfig(workers=workers, ray=True, ledger=str(sets / "ray.sqlite"))
    return untimed(attack(model, "mr", "deepwordbug", settings, progress=progress).rows)


def test_actors_find_what_one_process_finds_and_a_ledger_keeps_it(sets, model, cluster, monkeypatch):
    alone = attacked_by(sets, model, 1)
    monkeypatch.setattr(crew, "UNITS", 5)
    monkeypatch.setattr(
        crew, "attacked", lambda _victim, _plan, units: iter(list(units) and pytest.fail("by this one"))
    )
    assert by_ray(sets, model, 2) == alone
    assert cluster.is_initialized(), "a cluster that others began is left to them"
    monkeypatch.setattr(ray_actors, "Actors", lambda *_: pytest.fail("actors with nothing to do"))
    assert by_ray(sets, model, 1) == alone


def test_where_an_actor_is_lost_the_rest_is_done_without_it(sets, model, cluster, monkeypatch):
    alone, made, real = attacked_by(sets, model, 1), [], ray_actors.Actors
    monkeypatch.setattr(crew, "UNITS", 5)
    monkeypatch.setattr(ray_actors, "Actors", lambda *a: made.append(real(*a)) or made[-1])

    def lose(done: int, *_) -> None:
        if done == 1:
            cluster.kill(made[0]._actors[0])

    with pytest.warns(SparsebertWarning, match="a worker was killed; the work goes on without it"):
        assert by_ray(sets, model, 2, lose) == alone


def test_a_node_that_would_find_something_else_is_refused(sets, model, cluster, monkeypatch):
    monkeypatch.setattr(Plan, "facts", property(lambda plan: {"attack": "deepwordbug", "seed": 99}))
    with pytest.raises(UnsupportedError, match="has another seed: 0 in place of 99"):
        by_ray(sets, model, 1)


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [([2], 1, 2), ([2], 2, 1), ([2, 2, 2, 2], 2, 2), ([3, 1], 2, 1), ([8, 2], 3, 2), ([8, 2], 2, 4)],
)
def test_an_actor_has_no_more_cores_than_all_of_them_can_have(nodes, workers, cores):
    assert ray_actors.cores_each(nodes, workers) == cores


def test_more_actors_than_cores_are_refused_and_do_not_wait_for_ever(sets, model, cluster):
    with pytest.raises(InputError, match="the Ray cluster has 2 CPUs, asked for are 3 workers; ask for fewer"):
        by_ray(sets, model, 3)


def test_without_ray_the_extra_is_named(sets, model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, ray_actors.__name__)
    monkeypatch.delattr(sys.modules[crew.__package__], "ray_actors")
    code, _, err = command(capsys, model, *BUG, "--ray")
    assert code == 2 and err.splitlines()[-1] == "error: this command needs ray; pip install 'sparsebert[ray]'"
