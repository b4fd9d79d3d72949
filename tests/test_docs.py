"""The documentation: it builds, its links lead to files, its commands parse, the quick start runs."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import ROOT, require
from models import classifier, saved, stock

from sparsebert import patterns, pruning, study
from sparsebert.cli import main
from sparsebert.cli.commands import app
from sparsebert.config import BenchConfig, DemoConfig, EvalConfig, PruneConfig, TrainConfig, validated
from sparsebert.data import TASKS
from sparsebert.data.tables import SUFFIXES
from sparsebert.engine.rivals import named
from sparsebert.errors import SparsebertError
from sparsebert.pruning.knowledge import STEPS
from sparsebert.pruning.trained import SubnetConfig
from sparsebert.robustness import ood
from sparsebert.training.recipe import read_recipe

DOCS = sorted((ROOT / "docs").glob("*.md"))
GENERATED = ROOT / "docs/cli.md"
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(p for p in DOCS if p != GENERATED)]
GROUP = typer.main.get_command(app)
PLACEHOLDER = re.compile(r"[A-Z][A-Z_/]*")
CONFIGS = {
    "demo": {"config": DemoConfig},
    "train": {"config": TrainConfig},
    "prune": {"config": PruneConfig, "subnet": SubnetConfig},
    "eval": {"config": EvalConfig},
    "bench": {"config": BenchConfig},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    if any(importlib.util.find_spec(module) is None for module in ("mkdocs", "material", "mkdocstrings")):
        require("docs", "mkdocs is not installed: pip install 'sparsebert[docs]'")
    # Not --quiet: with it warnings do not count.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        html = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:[^\"'\s>]+)", html)
        fetched += re.findall(r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect)[^>]+href=[\"']?(https?:[^\"'\s>]+)", html)
        assert not fetched, f"{page.name} fetches {fetched[0]}"


def test_the_reference_of_the_commands_is_up_to_date(tmp_path):
    made = tmp_path / "cli.md"
    command = "-m typer sparsebert.cli.commands utils docs --name sparsebert --output".split()
    subprocess.run([sys.executable, *command, str(made)], cwd=ROOT, capture_output=True, check=True)
    assert made.read_text() == GENERATED.read_text(), f"run: python {' '.join(command)} docs/cli.md"


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_every_relative_link_leads_to_a_file(path: Path):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)", path.read_text()):
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{name_of(path)} links to {link}"
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
            assert anchor in map(slug, titles), f"{name_of(path)} links to {link}, which has no such heading"


def slug(title: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


@pytest.mark.parametrize("path", [ROOT / "README.md", *(p for p in DOCS if p != GENERATED)], ids=name_of)
def test_lines_outside_tables_have_at_most_120_characters(path: Path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert len(line) <= 120 or line.startswith("|"), f"{name_of(path)}, line {number}: {len(line)}"


TABLES = [
    pytest.param(name_of(path), *found.groups(), id=f"{path.stem}-{Path(found[1]).stem}")
    for path in DOCS
    for found in re.finditer(r"<!-- table: (\S+) -->\n\n((?:\|.*\n)+)", path.read_text())
]


@pytest.mark.parametrize(("page", "source", "rows"), TABLES)
def test_a_table_is_the_committed_one(page: str, source: str, rows: str):
    committed = [line for line in (ROOT / source).read_text().splitlines() if line.startswith("|")]
    assert rows.splitlines() == committed, f"{page}: copy the table of {source} anew"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_every_committed_table_is_in_the_list_of_questions():
    for table in (ROOT / "bench/results").glob("*.md"):
        assert f"(../bench/results/{table.name})" in page("benchmarks.md"), f"benchmarks.md lacks {table.name}"


def test_every_method_and_step_is_described():
    for method in pruning.METHODS:
        titles = re.findall(r"^### (.+)$", page("methods.md") + page("subnetworks.md"), re.M)
        assert any(method in title.split(" and ") for title in titles), f"methods.md lacks a heading {method}"
    for step, tier in STEPS.items():
        assert f"| `{step}` | {tier} |" in page("methods.md"), f"methods.md lacks the step {step} of tier {tier}"


def test_every_task_and_environment_variable_is_named():
    for task in TASKS:
        assert f"`{task}`" in page("data.md"), f"data.md lacks {task}"
    for variable in set(re.findall(r"SPARSEBERT_[A-Z_]*[A-Z]", (ROOT / "sparsebert/environment.py").read_text())):
        assert f"| `{variable}` |" in page("engine.md"), f"engine.md lacks {variable}"


# --- commands ---------------------------------------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands_of(path: Path) -> list[str]:
    """The `sparsebert …` commands on a page: lines of code blocks, and code within sentences."""
    text = path.read_text()
    code = re.compile(r"^```.*?^```", re.S | re.M)
    lines = [line.strip() for block in code.findall(text) for line in block.splitlines()]
    spans = re.findall(r"(?<!`)`(sparsebert [^`]+)`(?!`)", code.sub("", text))
    return [line for line in lines if line.startswith("sparsebert ")] + [" ".join(span.split()) for span in spans]


COMMANDS = [
    pytest.param(command, id=f"{path.stem}: {command[:70]}") for path in WRITTEN for command in commands_of(path)
]


def check(line: str) -> None:
    """Raises for a command line that `sparsebert` would refuse before it reads a file."""
    _, *arguments = shlex.split(line, comments=True)
    if arguments[0].startswith("-"):
        assert arguments in (["--help"], ["--version"]), line
        return
    name, rest = arguments[0], arguments[1:]
    assert name in GROUP.commands, f"no command {name!r}"
    if not rest or rest == ["--help"]:
        return  # only the name of a command, in a sentence
    given = GROUP.commands[name].make_context(name, rest).params
    configs = {
        argument: validated(kind, {field: given[field] for field in kind.model_fields})
        for argument, kind in CONFIGS.get(name, {}).items()
    }
    config = configs.get("config")
    task = given.get("task")
    if task is not None:
        known = task in TASKS or Path(task).suffix in SUFFIXES or PLACEHOLDER.fullmatch(task)
        assert known, f"no task {task!r}"
    if name == "prune":
        pruning.check(config, configs["subnet"])
    if name == "bench":
        patterns.parse(config.pattern)
        named(config.rivals)
        assert (given["directory"] is None) != (config.random is None), "bench takes DIR or --random"
    if name == "eval" and config.ood is not None:
        ood.named(TASKS[task], config.ood)
    if name == "train" and given["recipe"] is not None and not PLACEHOLDER.fullmatch(given["recipe"]):
        read_recipe(given["recipe"])
    if name == "study":
        read = study.read_grid if given["which"] == "srnets" else study.read_adaptive
        read(given["grid"] or given["which"])


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_command_parses(line: str):
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "sparsebert shrink DIR",
        "sparsebert prune DIR --task sst2",
        "sparsebert prune DIR --task sst2 -o OUT --sparsty 0.5",
        "sparsebert prune DIR --task sst2 -o OUT --sparsity 1.5",
        "sparsebert prune DIR --task sst2 -o OUT --pattern 3x",
        "sparsebert prune DIR --task sst2 -o OUT --method obs --tier 2",
        "sparsebert prune DIR --task sst3 -o OUT",
        "sparsebert eval DIR --task sst2 --ood hans",
        "sparsebert bench DIR --rivals tensorrt",
        "sparsebert bench DIR --dtype int4",
    ],
)
def test_a_command_that_is_wrong_is_found(line: str):
    with pytest.raises((AssertionError, SparsebertError, typer.exceptions.TyperException)):
        check(line)


def test_pages_show_every_command():
    shown = {shlex.split(param.values[0], comments=True)[1] for param in COMMANDS}
    assert GROUP.commands.keys() <= shown


FLAGS = [(name, param) for name, command in GROUP.commands.items() for param in command.params]


@pytest.mark.parametrize(("name", "param"), FLAGS, ids=[f"{name}-{param.name}" for name, param in FLAGS])
def test_every_flag_and_argument_has_a_help_text(name: str, param):
    assert (param.help or "").strip(), f"sparsebert {name} {param.opts[0]} has no help"


# --- the quick start --------------------------------------------------------------------------------------------------

# Options that make a command quick; the page leaves them out.
SMALL = {"prune": "--tier 0 --calibration-tokens 200 --calibration none --max-length 32", "bench": "--n 4 --rounds 2"}


def test_the_quick_start_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    text = page("quick-start.md")
    monkeypatch.chdir(tmp_path)
    stock(saved(tmp_path / "MODEL", classifier(labels=["LABEL_0", "LABEL_1"])))
    header, *rows = next(block for block in blocks(text, "text") if block.startswith("text,")).splitlines()
    shown = list(csv.reader(rows))
    with open("my.csv", "w", newline="") as file:
        file.write(f"{header}\n")
        csv.writer(file).writerows([f"{words} {number}", label] for number in range(24) for words, label in shown)
    shutil.copy("my.csv", "new.csv")
    ran, announced = [], ""
    for line in "".join(blocks(text, "bash")).splitlines():
        if line.startswith(("pip install", "hf download")):
            continue  # they need a network
        name = line.split()[1]
        # The reader puts texts of their own after `predict MODEL`.
        told, typed = (shlex.split(part)[: 3 if name == "predict" else None] for part in (announced, line))
        assert told in ([], typed), "the command before names another one as the next"
        code = main(shlex.split(f"{line} {SMALL.get(name, '')}")[1:])
        printed = capsys.readouterr()
        assert code == 0, f"{line}: {printed.err}"
        found = re.search(r"^next: (.+)$", printed.err, re.M)
        announced = found[1] if found else ""
        ran.append(name)
    assert ran == ["seal", "reseal", "prune", "eval", "bench", "predict", "predict", "quantize", "eval"]
    for code in blocks(text, "python"):
        exec(code, {})
    assert len(re.findall(r"'(?:negative|positive)'", capsys.readouterr().out)) == 2
