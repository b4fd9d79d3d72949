"""The rules a reader relies on: imports point down, one op has one name everywhere, nothing executes data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from sparsebert import environment

# A higher rank imports lower ones, never the reverse; equal ranks may not import each other. Leaves import only leaves.
RANKS = {
    "cli": 10, "study": 9, "serving": 8, "pruning": 8, "training": 7, "robustness": 6, "engine": 5, "encoders": 4,
    "checkpoint": 3, "data": 2, "jobs": 2, "machine": 2, "ops": 1, "kernels": 0, "_C": 0, "_cuda": -1,
}  # fmt: skip
LEAVES = {"architectures", "config", "environment", "errors", "heads", "patterns"}
SOURCES = sorted((ROOT / "sparsebert").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def area(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "kernels" else parts[1].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = (
                [node.module] if node.module != "sparsebert" else [f"sparsebert.{alias.name}" for alias in node.names]
            )
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("sparsebert.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    here = area(path)
    if here in {"__init__", "__main__"}:
        return  # the public interface: resolves its names on first use
    for other in imported(path) - {here}:
        if other in LEAVES:
            continue
        assert here not in LEAVES, f"{path}: a leaf imports {other}"
        assert RANKS[other] < RANKS[here], f"{path}: {here} may not import {other}"


def ops() -> set[str]:
    return {p.stem for p in (ROOT / "sparsebert/ops").glob("*.py")} - {"__init__", "_dispatch"}


def test_every_op_has_a_test_and_a_bench_of_its_name():
    assert ops()
    for op in ops():
        assert (ROOT / f"tests/test_{op}.py").exists()
        assert (ROOT / f"bench/bench_{op}.py").exists()
        text = (ROOT / f"sparsebert/ops/{op}.py").read_text()
        assert f"def {op}(" in text and f"def {op}_ref(" in text


def test_every_backend_file_carries_an_ops_name():
    shared = {"isa", "threads", "scratch"}
    for path in (ROOT / "csrc/cpu").glob("*.cpp"):
        op = re.sub(rf"_({'|'.join((*environment.ISAS, 'int8'))})$", "", path.stem)
        assert op in ops() | shared, f"{path} belongs to no op"
    for path in [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "kernels").glob("[!_]*.py")]:
        assert path.stem in ops(), f"{path} belongs to no op"


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sparsebert").rglob("__init__.py")}
    assert listed == found | {"sparsebert.kernels"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_executes_data(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "torch.save", "yaml.load", "print"} or (
                called == "print" and area(path) == "cli"
            ), f"{path}:{node.lineno}: {called}"


@pytest.mark.parametrize(
    "module", ["sparsebert", "sparsebert.engine", "sparsebert.checkpoint", "sparsebert.cli.commands"]
)
def test_light_modules_import_neither_torch_nor_transformers(module: str):
    code = f"import {module}, sys; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_needs_numpy_safetensors_and_tokenizers_only():
    code = (
        "import sys; import sparsebert.engine\n"
        "print(sorted({'pydantic', 'yaml', 'pyarrow', 'scipy', 'rich', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_variables_are_read_in_one_file():
    for path in SOURCES:
        if path.name != "environment.py":
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), path


def tree_of(page: str) -> dict[Path, bool]:
    """Each path in the tree of docs/architecture.md -> whether it begins an entry of the package."""
    found: dict[Path, bool] = {}
    folder = ROOT
    for line in re.search(r"## Where things are\n\n```text\n(.*?)```", page, re.S)[1].splitlines():
        indent, first = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            folder = ROOT / first
            found[folder] = False
        elif indent == 2:
            folder = ROOT / "sparsebert" / (first if first.endswith("/") else "")
            found |= {folder: True} if first.endswith("/") else {folder / first: True}
        names = re.findall(r"(?<![\w<>/.-])[\w/]+(?:\.(?:py|h|cpp|yaml|md)\b|/(?![\w<]))", line)
        for name in names[1:] if names[:1] == [first] and first.endswith("/") else names:
            found.setdefault(folder / name, indent == 2)
    return found


def test_the_tree_names_what_exists():
    found = tree_of((ROOT / "docs/architecture.md").read_text())
    assert len(found) > 40
    for path in found:
        assert path.exists(), f"the tree names {path.relative_to(ROOT)}"


def test_the_tree_names_every_part_of_the_package():
    package = ROOT / "sparsebert"
    named = {path for path, entry in tree_of((ROOT / "docs/architecture.md").read_text()).items() if entry}
    parts = {path for path in package.iterdir() if (path / "__init__.py").exists()} | set(package.glob("[!_]*.py"))
    assert parts <= named, f"the tree lacks {sorted(str(p.relative_to(package)) for p in parts - named)}"


@pytest.mark.parametrize("line", ["ghost/", "  ghost/   a part", "  ops/  ghost.py: gone", "tests/\n     ghost.py"])
def test_a_name_of_nothing_is_found_at_any_depth_of_the_tree(line):
    paths = tree_of(f"## Where things are\n\n```text\n{line}\n```")
    assert [path.name for path in paths if not path.exists()] in (["ghost"], ["ghost.py"])
