"""The table of mutants counts every drawn mutant, and mutants that change only words are never drawn."""

from __future__ import annotations

import ast
import json
import tomllib

import mutants
import pytest
from conftest import ROOT

ORIGINAL = 'def f(x):\n    if x < 1:\n        raise ValueError(f"x is {x}", "too small")\n    return "a"\n'


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        (ORIGINAL.replace("too small", "XXtoo smallXX"), True),
        (ORIGINAL.replace('"too small"', "None"), True),
        (ORIGINAL.replace("{x}", "{y}"), False),
        (ORIGINAL.replace("x < 1", "x <= 1"), False),
        (ORIGINAL.replace('"a"', '"XXaXX"'), False),
        (ORIGINAL.replace("ValueError", "TypeError"), False),
    ],
)
def test_a_wording_is_what_changes_the_words_of_a_message_alone(changed, wording):
    parse = [ast.parse(text).body[0] for text in (changed.replace("def f", "def g"), ORIGINAL)]
    assert mutants.is_wording(*parse) == wording


def test_a_sample_is_counted_by_file_with_its_interval(tmp_path):
    codes = {"m.a__mutmut_1": 1, "m.a__mutmut_2": 0, "m.a__mutmut_3": 33, "m.a__mutmut_4": 36, "m.a__mutmut_5": None}
    (tmp_path / "m.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    sample = {"seed": 1, "mutants": {"m.py": 5, "n.py": 2}, "drawn": list(codes)[:4]}
    (tmp_path / "n.py.meta").write_text(json.dumps({"exit_code_by_key": {"n.a__mutmut_1": 0}}))
    (tmp_path / mutants.SAMPLE).write_text(json.dumps(sample))
    _, (first, second, every), survivors = mutants.rows(tmp_path)
    assert survivors == ["m.a__mutmut_2", "m.a__mutmut_3"], "what no test reaches is not noticed"
    assert (first["mutants"], first["drawn"], first["noticed"], first["timeout"]) == (5, 4, 0.5, 1)
    # Wilson's interval of 2 in 4 by hand: (2 + 1.96² / 2 ± 1.96 √(2 · 2 / 4 + 1.96² / 4)) / (4 + 1.96²).
    assert (first["low"], first["high"]) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert second == {"file": "n.py", "mutants": 2, "drawn": 0, "survived": 0, "no test": 0, "timeout": 0}
    assert every == first | {"file": "all", "mutants": 7}
    sample["drawn"].append("m.a__mutmut_5")
    (tmp_path / mutants.SAMPLE).write_text(json.dumps(sample))
    with pytest.raises(SystemExit, match="1 mutants of the sample were not run"):
        mutants.rows(tmp_path)


def test_the_files_that_are_mutated_and_the_tests_that_are_run_are_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    for pattern in (*settings["only_mutate"], *settings["pytest_add_cli_args_test_selection"]):
        assert list(ROOT.glob(pattern)), pattern
