from __future__ import annotations

import subprocess
import sys

import pytest

from sparsebert import ledger
from sparsebert.errors import OutputError


def test_a_unit_is_computed_once_even_across_processes(tmp_path):
    calls = []
    for _ in range(2):
        book = ledger.Ledger(tmp_path / "l.sqlite")
        assert book.once("unit", {"a": 1}, lambda: calls.append(1) or {"x": [1.5, None]}) == {"x": [1.5, None]}
        book.close()
    assert calls == [1]


@pytest.mark.parametrize("change", [{"a": 2, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1}])
def test_any_change_of_input_is_another_key(change):
    assert ledger.unit_key("unit", {"a": 1, "b": "x"}) != ledger.unit_key("unit", change)


def test_kind_and_code_are_part_of_the_key():
    assert ledger.unit_key("one", {}) != ledger.unit_key("two", {})
    assert ledger.unit_key("one", {}) != ledger.unit_key("one", {}, ledger)


def test_a_failed_unit_leaves_no_row(tmp_path):
    book = ledger.Ledger(tmp_path / "l.sqlite")
    with pytest.raises(ZeroDivisionError):
        book.once("unit", {}, lambda: {"x": 1 / 0})
    assert book.get(ledger.unit_key("unit", {})) is None


def test_finished_units_survive_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from sparsebert.ledger import Ledger\n"
        "book = Ledger(Path(sys.argv[1]))\n"
        "book.once('unit', {'i': 0}, lambda: {'done': 0})\n"
        "book.once('unit', {'i': 1}, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "l.sqlite")])
    assert done.returncode == -9
    book = ledger.Ledger(tmp_path / "l.sqlite")
    assert book.get(ledger.unit_key("unit", {"i": 0})) == {"done": 0}
    assert book.get(ledger.unit_key("unit", {"i": 1})) is None


def test_a_file_that_is_no_database_is_an_output_error(tmp_path):
    (tmp_path / "l.sqlite").write_text("not a database, and long enough to have a header of its own " * 20)
    with pytest.raises(OutputError, match="cannot be opened"):
        ledger.Ledger(tmp_path / "l.sqlite")
