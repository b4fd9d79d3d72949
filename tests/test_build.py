"""The wheel as a user gets it, and the instructions that each symbol of the compiled core may hold."""

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import require
from models import classifier, saved, stock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench import cuda_resources
from sparsebert import Engine, data, environment
from sparsebert.ops import _dispatch

BARE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
ROOT = Path(__file__).resolve().parent.parent
# What the wheel is built from. A plain list, so that the test also runs from an unpacked source archive.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "sparsebert")

PROBE = """
import numpy as np, sparsebert, sparsebert.kernels
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import Linear, pack, sparse_matmul, sparse_matmul_ref
weight = Linear(pack(np.eye(70, 90, dtype=np.float32)))
x = np.random.default_rng(0).standard_normal((33, 90), np.float32)
for isa in _dispatch.supported_isas():
    assert np.abs(sparse_matmul(x, weight, isa=isa) - sparse_matmul_ref(x, weight)).max() < 1e-6
print(sparsebert.__file__)
"""


# `make` has compiled the same files, by the same setup.py. So a compiler that is named in its place links what `make`
# made; where that is not at hand, it compiles without optimisation, in a fifth of the time.
QUICK_COMPILER = """#!{python}
import os, shutil, sys
built, arguments = {built!r}, sys.argv[1:]
target = arguments[arguments.index("-o") + 1]
if built is None:
    os.execvp({compiler!r}, [{compiler!r}, *("-O0" if a == "-O3" else a for a in arguments)])
elif target.endswith(".so"):
    shutil.copy(built, target)
    if "-s" in arguments:
        os.execvp("strip", ["strip", target])
else:
    open(target, "w").close()
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def quick_compiler(path: Path, compiler: str, module: str) -> str:
    """A script at `path` that stands for the compiler of an extension module of this package."""
    built = next((str(file) for file in (ROOT / "sparsebert").glob(f"{module}.*.so")), None)
    path.write_text(QUICK_COMPILER.format(python=sys.executable, built=built, compiler=compiler))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `make wheel` does, with pip's own isolation, from a copy of the sources."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=unwanted)
        elif path.exists():
            shutil.copy(path, source / name)
    compilers = dict.fromkeys(("CC", "CXX"), quick_compiler(work / "quick", "g++", "_C"))
    if (nvcc := cuda_resources.compiler()) is not None:
        compilers["NVCC"] = quick_compiler(work / "quick_nvcc", nvcc, "_cuda")
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", work / "dist", source, cwd=work, **compilers)
    (built,) = (work / "dist").glob("sparsebert-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_works_outside_the_repository(installed):
    # -P and the path put first keep both the working directory and the development install out of the way.
    script = f"import sys; sys.path.insert(0, {str(installed)!r})\n{PROBE}"
    where = run(sys.executable, "-P", "-c", script, cwd=installed.parent)
    assert Path(where.strip()).is_relative_to(installed)


def test_the_wheel_holds_kernels_and_demo_data_and_no_sources(installed):
    assert (installed / "sparsebert" / "kernels" / "__init__.py").is_file()
    data = {path.name for path in (installed / "sparsebert" / "assets" / "mr").glob("*.parquet")}
    assert data == {path.name for path in (ROOT / "sparsebert" / "assets" / "mr").glob("*.parquet")}
    assert data
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top - {"bin"} == {"sparsebert"}


def test_the_wheel_holds_the_cuda_kernels_if_nvcc_is_here_and_a_gpu_is_not_needed_to_import_them(installed):
    if cuda_resources.compiler() is None:
        assert not list((installed / "sparsebert").glob("_cuda*"))
        require("nvcc", "nvcc is neither on the PATH nor in /usr/local/cuda")
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import numpy as np\n"
        "from sparsebert.kernels import cuda_core\n"
        "cols, values, metadata, rows, chunks = cuda_core().pack_vnm(np.zeros((48, 80), np.uint16), 16, 10)\n"
        "print(len(cols), len(values), len(metadata), rows, chunks)"
    )
    # Three groups of 16 rows, each one strip of 32 rows by one chunk of 32 columns.
    assert run(sys.executable, "-P", "-c", script, cwd=installed.parent).split() == ["96", "768", "96", "32", "1"]


@pytest.fixture(scope="module")
def without_torch(wheel, tmp_path_factory) -> Path:
    """A new environment like the result of `pip install sparsebert`: the wheel, and links to its requirements without
    extras.
    """
    folder = tmp_path_factory.mktemp("base")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    run(*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = packages_of(folder)
    (info,) = packages.glob("sparsebert-*.dist-info")
    wanted = importlib.metadata.PathDistribution(info).requires
    done: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or canonicalize_name(requirement.name) in done:
            continue
        done.add(canonicalize_name(requirement.name))
        distribution = importlib.metadata.distribution(requirement.name)
        wanted += distribution.requires or []
        for top in {path.parts[0] for path in distribution.files if path.parts[0] != ".."} - {"__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder


def packages_of(environment: Path) -> Path:
    (packages,) = (environment / "lib").glob("python*/site-packages")
    return packages


def alone(folder: Path, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    """Runs the command that is installed in that environment."""
    command = [folder / "bin" / "sparsebert", *arguments]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=BARE, cwd=folder)
    assert result.returncode == code, result.stderr[-4000:]
    return result


def test_a_model_is_run_without_torch(without_torch, tmp_path):
    assert not {"torch", "transformers"} & {path.name for path in packages_of(without_torch).iterdir()}
    model = saved(tmp_path / "m", classifier())
    said = alone(without_torch, "predict", model, "a gripping film", "a dull one").stdout.splitlines()
    want = Engine.load(model).logits(["a gripping film", "a dull one"]).argmax(1)
    assert [line.split()[0] for line in said] == [data.SENTIMENT[i] for i in want]
    assert "sparsebert 0." in alone(without_torch, "--version").stdout
    assert "[default: 0.875" in alone(without_torch, "prune", "--help").stdout
    for command in ("doctor", "cache"):
        json.loads(alone(without_torch, command).stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [("prune", "DIR", "--task", "mr", "-o", "p"), ("train", "minilm", "--task", "mr", "-o", "m"), ("demo",),
     ("eval", "DIR", "--task", "mr"), ("bench", "DIR"), ("soup", "DIR", "--task", "mr", "-o", "s"), ("seal", "DIR"),
     ("study", "srnets", "--grid", "srnets-small", "-o", "g")],
)  # fmt: skip
def test_a_command_that_needs_more_names_the_extra(without_torch, tmp_path, arguments):
    model = stock(saved(tmp_path / "m", classifier()))
    given = [str(model) if part == "DIR" else part for part in arguments]
    said = alone(without_torch, *given, code=2).stderr
    assert re.fullmatch(r"error: this command needs \w+; pip install 'sparsebert\[prune\]'\n", said), said


def test_what_runs_a_model_takes_no_more_than_150_mb(without_torch):
    """With the CUDA kernels where nvcc is."""
    files = (path for top in packages_of(without_torch).iterdir() for path in files_of(top))
    assert sum(path.stat().st_size for path in files) < 150e6


def files_of(top: Path) -> list[Path]:
    return [path for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]


@functools.cache
def instructions_by_symbol() -> dict[str, set[str]]:
    """Demangled symbol of the compiled core -> the disassembled instructions in it, operands included."""
    objdump = shutil.which("objdump")
    if objdump is None:
        require("objdump", "objdump is not installed (binutils)")
    text = run(objdump, "-d", "-C", "--no-show-raw-insn", _dispatch.core().__file__, cwd=ROOT)
    found = defaultdict(set)
    symbol = ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            symbol = heading[1]
        elif "\t" in line:
            found[symbol].add(line.split("\t", 1)[1])
    return found


x86_only = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason=f"{platform.machine()} has the scalar kernels only"
)

# Feature -> (pattern of its instructions, names of symbols that may hold them). A VEX or EVEX mnemonic starts with v.
PLACES = {
    "amx": (r"^(tile|td|ldtilecfg|sttilecfg)|%tmm\d", ("amx",)),
    "avx512_bf16": (r"^v(dp|cvtn?e?2?ps2?)\w*(bf16|pbh)|^vpexpandw", ("avx512_bf16", "amx")),
    "avx512_vnni": (r"^vpdp.*(%zmm|%k[0-7])|^vpdp.*%[xy]mm(1[6-9]|2\d|3[01])\b", ("avx512_vnni", "amx")),
    "avx_vnni": (r"^(\{vex\} )?vpdp[bw]", ("avx_vnni", "avx512_vnni", "amx")),
    "avx512": (r"%zmm\d|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b", ("avx512", "amx")),
    "avx2": (r"%ymm\d|^v(?!err|erw|m[a-z]+$)", ("avx2", "avx_vnni", "avx512", "amx")),
}


@x86_only
@pytest.mark.parametrize("feature", PLACES)
def test_instructions_stay_in_the_symbols_named_after_them(feature):
    pattern, allowed = PLACES[feature]
    strays = {
        symbol: sorted(line for line in lines if re.search(pattern, line))[:3]
        for symbol, lines in instructions_by_symbol().items()
        if not any(name in symbol for name in allowed) and any(re.search(pattern, line) for line in lines)
    }
    assert strays == {}


@x86_only
@pytest.mark.parametrize("feature", [isa for isa in environment.ISAS if isa != "scalar"])
def test_the_search_for_strays_can_find_something(feature):
    pattern, _ = PLACES[feature]
    holders = [s for s, lines in instructions_by_symbol().items() if any(re.search(pattern, line) for line in lines)]
    assert any(feature in symbol for symbol in holders)
