"""Every committed table says how it was made, and `make tables` lists it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from bench import harness, tables
from sparsebert import environment, machine
from sparsebert.study import read_grid
from sparsebert.training.recipe import read_recipe

PAGES = sorted(tables.RESULTS.glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_table_begins_with_machine_command_and_environment(path):
    text = path.read_text(encoding="utf-8")
    facts = tables.head(text)
    assert facts is not None and text.startswith("# ") and text.split("\n")[2].startswith("Machine: ")
    words = shlex.split(facts["command"])
    if words[0] == "python":
        assert words[1] == "-m" and importlib.util.find_spec(words[2]), "a bench that is there"
    if words[0] != "make":
        assert words[words.index("--markdown") + 1] == f"bench/results/{path.name}"
    assert not re.search(r"/(home|root|work|tmp)/", text), "no path of a machine"
    if {"DIR", "MODEL", "PATH"} & set(words) and words[0] == "python" and "-o" not in words:
        assert path.stem in tables.MADE_OF, "what it is made of"


def test_what_is_made_of_something_is_a_table():
    assert tables.MADE_OF.keys() <= {path.stem for path in PAGES}


def test_tables_that_differ_in_their_instruction_set_say_so():
    heads = {path.stem: tables.head(path.read_text(encoding="utf-8")) for path in PAGES}
    for name, cap in (("end_to_end_avx2", "avx2"), ("end_to_end_avx512", "avx512"), ("sparse_matmul_avx2", "avx2")):
        assert f"SPARSEBERT_ISA={cap}`" in heads[name]["environment"]
    told = [(h["machine"], re.sub("--markdown .*", "", h["command"]), h["environment"]) for h in heads.values()]
    assert len(set(told)) == len(told), "no two tables by the same command in the same setting"


def test_make_tables_lists_all():
    said = subprocess.run([sys.executable, "-m", "bench.tables"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in said.stdout.splitlines() if not line.startswith(" ")] == [path.stem for path in PAGES]
    assert said.stdout.count("  command: ") == said.stdout.count("  environment: ") == len(PAGES)
    assert "-m bench.tables" in (ROOT / "Makefile").read_text()


def test_a_page_names_the_variables_that_matter(monkeypatch):
    for name in environment.that_matter():
        monkeypatch.delenv(name)
    page = harness.markdown("t", [{"a": 1}], {"a": "d"}, "notes")
    assert tables.head(page)["environment"] == "none set"
    for name, value in {
        "SPARSEBERT_ISA": "avx2", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_NUM_THREADS": "2", "LD_PRELOAD": "/some/where/libjemalloc.so",
        "SPARSEBERT_CACHE": "/a/cache", "SPARSEBERT_API_KEY": "a secret", "HOME": "/nowhere", "OMP_PROC_BIND": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    page = harness.markdown("t", [{"a": 1}], {"a": "d"}, "notes")
    assert tables.head(page)["environment"] == (
        "`ATEN_CPU_CAPABILITY=avx2 GOMP_SPINCOUNT=0 LD_PRELOAD=libjemalloc.so MKL_NUM_THREADS=2 OMP_NUM_THREADS=1 "
        "ONEDNN_MAX_CPU_ISA=AVX2 SPARSEBERT_ISA=avx2`"
    )
    assert machine.card()["environment"]["SPARSEBERT_ISA"] == "avx2"


def test_the_three_dense_models_are_those_of_quick_soup():
    three, soup = read_recipe(ROOT / "bench/recipes/three-dense.yaml"), read_recipe("quick-soup")
    assert three == {name: soup[name] for name in ("plain-0", "plain-1", "plain-2")}
    assert yaml.safe_load((ROOT / "bench/recipes/three-dense.yaml").read_text())


def test_the_frontier_makes_the_directories_of_its_table():
    from bench.study_frontier import FRONTIER, names_of

    made = {name for entry in FRONTIER for name in names_of(*entry)}
    page = (tables.RESULTS / "frontier.md").read_text()
    named = {line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")}
    pruned = {name for name in named if name[:1].isdigit() or name.startswith("unstructured")}
    arguments = shlex.split(tables.head(page)["command"])
    assert pruned == {Path(each).name for each in arguments[4:-4]} - {"dense-int8"} and pruned == made


def test_the_page_of_a_study_names_its_command():
    assert read_grid("srnets-small").name in tables.head((tables.RESULTS / "srnets.md").read_text())["command"]
