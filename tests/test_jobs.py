"""Long work: keys, atomic writes, when a run resumes or is refused, ledgers, and the state after damage and kills."""

from __future__ import annotations

import calendar
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from sparsebert import environment, jobs
from sparsebert.errors import InputError, OutputError
from sparsebert.jobs import Job, Ledger, files
from sparsebert.jobs import job as job_module

CODE = "sparsebert.patterns"  # some module of the package


def made(output: Path, overwrite: bool = False, **settings) -> Job:
    return Job("test", {"model": "ab" * 32, "settings": settings}, CODE, output, overwrite=overwrite)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"inputs": {"settings": {"a": 2}, "model": "x"}},
        {"inputs": {"settings": {"a": 1}, "model": "y"}},
        {"inputs": {"settings": {"a": 1}}},
        {"code": "sparsebert.data"},
    ],
)
def test_whatever_decides_the_result_is_another_key(tmp_path, change):
    fields = {"kind": "test", "inputs": {"settings": {"a": 1}, "model": "x"}, "code": CODE, "output": tmp_path}
    assert Job(**fields).key == Job(**fields).key != Job(**{**fields, **change}).key


@pytest.mark.parametrize(("part", "value"), [("core_sha256", "another build"), ("_isa", "another"), ("_isa", "scalar")])
def test_the_machines_part_is_in_the_key(tmp_path, monkeypatch, part, value):
    before = made(tmp_path).key
    monkeypatch.setattr(job_module, part, lambda: value)
    assert made(tmp_path).key != before


def test_the_version_and_the_place_are_not_in_the_key(tmp_path, monkeypatch):
    before = made(tmp_path / "a").key
    monkeypatch.setattr("sparsebert.__version__", "9.9.9")
    assert made(tmp_path / "b").key == before


MODULES = {
    "__init__": '__version__ = "1"',
    "a": "from sparsebert import c\nfrom sparsebert.b import f\nimport numpy\n\n\ndef g(x):\n    return f(x) + c.ONE\n",
    "b": 'def f(x):\n    if x < 0:\n        raise ValueError("must not be negative")\n    return x + 1\n',
    "c": "ONE = 1\n",
    "d": "UNUSED = 1\n",
    "e": "def later():\n    from sparsebert import d\n    return d.UNUSED\n",
    "sub/__init__": "from sparsebert.sub.inner import g\n",
    "sub/inner": "def g():\n    return 1\n",
    "sub/other": "TWO = 2\n",
    "f": "from sparsebert.sub import g\n",
    "config": "DEFAULT = 1\n",
    "h": "from sparsebert import config\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of this one. Yields code(module, **changed): its code_of after sources changed."""
    folder = tmp_path / "sparsebert"
    monkeypatch.setattr(job_module, "_PACKAGE", folder)
    caches = (job_module.code_of, job_module._parsed, job_module._file)

    def code(module: str, **changed) -> str:
        for name, text in {**MODULES, **{name.replace("__", "/"): text for name, text in changed.items()}}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.py").write_text(text)
        for cache in caches:
            cache.cache_clear()
        return job_module.code_of(f"sparsebert.{module}")

    yield code
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        ("a", {"a": MODULES["a"].replace("+ c.ONE", "- c.ONE")}),
        ("a", {"b": MODULES["b"].replace("x + 1", "x + 2")}),
        ("a", {"b": MODULES["b"].replace("x < 0", "x <= 0")}),
        ("a", {"c": "ONE = 2\n"}),
        ("e", {"d": "UNUSED = 2\n"}),  # imported inside a function
        ("f", {"sub__inner": "def g():\n    return 2\n"}),  # imported by the __init__ of a package
    ],
)
def test_code_is_followed_through_imports(package, module, changed):
    assert package(module, **changed) != package(module)


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        (
            "a",
            {"a": '"""What a is."""\n# and why\n' + MODULES["a"].replace("    return", '    """Sum."""\n    return')},
        ),
        ("a", {"b": MODULES["b"].replace("must not be negative", "x must be 0 or more")}),  # the words of an error
        ("a", {"d": "UNUSED = 3\n"}),
        ("f", {"sub__other": "TWO = 3\n"}),
        ("h", {"config": "DEFAULT = 2\n"}),  # its values are part of the inputs
        ("a", {"a": MODULES["a"].replace("def g(x):\n", "def g(\n    x,\n):\n")}),
    ],
)
def test_prose_layout_and_other_modules_change_no_code(package, module, changed):
    assert package(module, **changed) == package(module)


def test_the_code_of_training_and_pruning_is_found():
    def closure(name: str) -> set[str]:
        found, coming = set(), [name]
        while coming:
            if (name := coming.pop()) not in found and name.split(".")[1] not in job_module._NO_RESULT:
                found.add(name)
                coming += job_module._parsed(name)[1]
        return found

    training, pruning = closure("sparsebert.training.finetune"), closure("sparsebert.pruning.methods")
    assert {f"sparsebert.training.{name}" for name in ("loop", "losses", "fused", "bias", "adversarial")} <= training
    assert {"sparsebert.ops.dropout", "sparsebert.encoders", "sparsebert.data"} <= training & (pruning | training)
    assert {f"sparsebert.pruning.{name}" for name in ("stages", "solve", "allocate", "distillation")} <= pruning
    assert {"sparsebert.ops.obs_prune", "sparsebert.kernels.obs_prune"} <= pruning
    assert not any(name.startswith("sparsebert.training") for name in pruning)
    assert not any(name.startswith(("sparsebert.cli", "sparsebert.study")) for name in training | pruning)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_takes_its_place_whole_and_flushed(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    did = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, original=original: (did.append(name), original(*args)))
    jobs.write(path, "old")
    assert did == ["fsync", "replace", "fsync"] and path.read_text() == "old"
    with pytest.raises(ZeroDivisionError), jobs.writing(path) as fresh:
        fresh.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_is_a_file_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"x\.json cannot be written: "):
        jobs.write(tmp_path / "file" / "x.json", "{}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_prepared_temporary_name_is_not_followed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")
    victim, prepared = tmp_path / "victim", tmp_path / ".a.txt.tmp-known"
    victim.write_text("precious")
    if kind == "link":
        prepared.symlink_to(victim)
    else:
        prepared.hardlink_to(victim)
    with pytest.raises(OutputError, match=r"a\.txt cannot be written: File exists"):
        jobs.write(tmp_path / "a.txt", "mine")
    assert victim.read_text() == "precious" and not (tmp_path / "a.txt").exists()


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    jobs.write(tmp_path / "a", "old")
    with (
        pytest.raises(OutputError, match=r"a cannot be written: No space left on device; free space"),
        jobs.writing(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(params=["flock", "chmod", "fsync"])
def lacking(request, monkeypatch):
    """A file system without locks (Lustre, some FUSE), without modes (CIFS), or whose folders cannot be flushed."""

    def fails(*args, **kwargs):
        number = {"flock": errno.ENOSYS, "chmod": errno.EPERM, "fsync": errno.EINVAL}[request.param]
        raise OSError(number, os.strerror(number))

    place = {"flock": fcntl, "chmod": Path, "fsync": os}[request.param]
    monkeypatch.setattr(place, request.param, fails)


@pytest.mark.usefixtures("lacking")
def test_work_goes_on_without_locks_modes_or_flushing(tmp_path):
    with made(tmp_path / "out") as job:
        job.keep("part", {"x": torch.ones(3)})
        with jobs.replacing(tmp_path / "out") as staging:
            (staging / "a").write_text("a")
        with jobs.replacing(tmp_path / "out") as staging:
            (staging / "b").write_text("b")
        job.finish()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "b"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 5000, "too long"),
        ("a\0b", "null"),
        ("loop", "[Ss]ymlink loop|Too many levels"),
        ("loop/out", "loop|levels"),
    ],
)
def test_what_is_no_path_is_one_short_line(tmp_path, path, reason):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match=reason) as caught:
        jobs.place(tmp_path / path)
    assert len(str(caught.value)) < 400


def test_names_without_room_for_those_beside_them_are_refused_at_once(tmp_path):
    jobs.require_place(tmp_path, "x" * 200)
    with pytest.raises(OutputError, match="too long"):
        jobs.require_place(tmp_path, "x" * 250)
    with pytest.raises(OutputError, match="too long"):
        jobs.require_place(tmp_path / ("y" * 300), "x")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_clearly_lacks_the_space_is_refused(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    jobs.require_space(tmp_path / "a" / "b", free // 2)
    with pytest.raises(OutputError, match=r"MiB free, the output takes about [\d,]+"):
        jobs.require_space(tmp_path / "a" / "b", 2 * free + 2**30)
    job = Job("test", {}, CODE, tmp_path / "a" / "out", space=2 * free + 2**30)
    with pytest.raises(OutputError, match="MiB free"), job:
        raise AssertionError("was begun")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3 << 20))
    jobs.require_space(tmp_path / "a" / "b", 3 << 20)
    with pytest.raises(OutputError, match=f"{tmp_path} has 3 MiB free, the output takes about 2,048"):
        jobs.require_space(tmp_path / "a" / "b", 2 << 30)


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_what_a_job_keeps_is_there_for_the_next_run_of_it(tmp_path):
    computed = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), made(tmp_path / "out", seed=1) as job:
            assert job.value("a", lambda: computed.append(1) or {"x": (1.5, None)}) == {"x": [1.5, None]}
            if job.kept("state") is None:
                job.keep("state", {"w": torch.arange(4.0)}, {"step": 1})
            tensors, facts = job.kept("state")
            job.keep("state", {"w": tensors["w"] + 1}, {"step": facts["step"] + 1}, last=f"step {facts['step'] + 1}")
            raise KeyboardInterrupt
    assert computed == [1]
    with made(tmp_path / "out", seed=1) as job:
        tensors, facts = job.kept("state")
        assert facts == {"step": 3} and tensors["w"].tolist() == [2, 3, 4, 5]
        assert len(list(job.partial.glob("*.safetensors"))) == 1, "one file a name"
        job.finish()
    assert not list(tmp_path.iterdir())


def test_what_a_kill_cut_short_is_removed(tmp_path):
    partial = unfinished(tmp_path / "out")
    (partial / ".layer.2.safetensors.tmp-0123").write_bytes(b"half")
    (partial / "layer.1.next.safetensors").write_bytes(b"whole, and not noted yet")
    with made(tmp_path / "out") as job:
        assert job.kept("layer.1")[1] == {"n": 2}
    assert {path.name for path in partial.iterdir()} == {
        "job.json", "lock", "layer.0.safetensors", "layer.1.safetensors",
    }  # fmt: skip


def test_a_job_that_kept_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), made(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / "out.partial").is_dir()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def unfinished(output: Path, **settings) -> Path:
    with made(output, **settings) as job:
        job.keep("layer.0", {"w": torch.arange(64.0)}, {"n": 1})
        job.keep("layer.1", {"w": torch.arange(64.0) + 1}, {"n": 2})
        job.value("chosen", lambda: {"x": 0.5})
    return job.partial


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"sparsity": 0.875, "batch_size": 8}, "--sparsity 0.9, not 0.875;"),
        ({"sparsity": 0.9, "batch_size": 16}, "--batch-size 8, not 16;"),
        ({"sparsity": 0.9}, "--batch-size 8, not the default;"),
        ({"sparsity": 0.1, "batch_size": 9}, "--batch-size 8, not 9; --sparsity 0.9, not 0.1;"),
    ],
)
def test_other_work_at_the_same_place_is_refused_naming_the_difference(tmp_path, settings, difference):
    partial = unfinished(tmp_path / "out", sparsity=0.9, batch_size=8)
    with pytest.raises(OutputError) as caught, made(tmp_path / "out", **settings):
        raise AssertionError("was begun")
    assert f"{partial} holds an unfinished run with {difference}" in str(caught.value)
    assert "--overwrite" in caught.value.fix
    with made(tmp_path / "out", sparsity=0.9, batch_size=8) as job:
        assert job.kept("layer.1")[1] == {"n": 2}, "what was refused has changed nothing"
    with made(tmp_path / "out", overwrite=True, sparsity=0.9, batch_size=8) as job:
        assert job.kept("layer.1")[1] == {"n": 2}, "the same is gone on with all the same"
    with made(tmp_path / "out", overwrite=True, **settings) as job:
        assert job.kept("layer.0") is None and not list(partial.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("part", "name"), [("code_of", "code"), ("core_sha256", "compiled core"), ("_isa", "instruction set")]
)
def test_changed_code_and_machines_are_said(tmp_path, monkeypatch, part, name):
    unfinished(tmp_path / "out")
    monkeypatch.setattr(job_module, part, lambda *module: "another")
    with pytest.raises(OutputError, match=rf"unfinished run with {name} \w+…?, not another; choose another -o, or "):
        with made(tmp_path / "out"):
            raise AssertionError("was begun")


def test_other_contents_are_said_in_words(tmp_path):
    with Job("test", {"data": "ab" * 32}, CODE, tmp_path / "out") as job:
        job.value("chosen", lambda: 1)
    with (
        pytest.raises(OutputError, match=r"with other texts or labels in --task \(sha256 abababab…, not cdcdcdcd…\);"),
        Job("test", {"data": "cd" * 32}, CODE, tmp_path / "out"),
    ):
        raise AssertionError("was begun")


def test_what_an_unfinished_run_has_stored_is_known_before_and_after(tmp_path):
    assert made(tmp_path / "out").unfinished() == ""
    unfinished(tmp_path / "out")
    last = made(tmp_path / "out").unfinished()
    assert last
    with made(tmp_path / "out") as job:
        assert job.resumed == last
    with pytest.raises(OutputError, match="unfinished run"):
        made(tmp_path / "out", sparsity=0.123).unfinished()


def test_a_model_and_many_differences_are_cut_short(tmp_path):
    unfinished(tmp_path / "out", a=1, b=1, c=1, d=1, e=1)
    other = Job("other", {"model": "cd" * 32, "settings": {}}, CODE, tmp_path / "out")
    with (
        pytest.raises(OutputError, match=r"test, not other; --a 1, not the default; .* and 3 more; repeat"),
        other,
    ):
        raise AssertionError("was begun")


def test_two_processes_do_not_work_on_one_output(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sparsebert.jobs import Job\n"
        "with Job('test', {}, 'sparsebert.patterns', Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(OutputError, match="another process is at work on"), Job("test", {}, CODE, tmp_path / "out"):
            raise AssertionError("was begun")
        with pytest.raises(OutputError, match="another process"), made(tmp_path / "out", overwrite=True):
            raise AssertionError("was begun")
    finally:
        process.kill()
        process.wait()
    with Job("test", {}, CODE, tmp_path / "out") as job:
        assert job.kept("x") is None  # a lock ends with its holder
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["file", "fifo", "link", "foreign"])
def test_a_place_that_is_not_ours_is_refused_and_left(tmp_path, what):
    partial = tmp_path / "out.partial"
    if what == "file":
        partial.write_text("mine")
    elif what == "fifo":
        os.mkfifo(partial)
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    else:
        partial.mkdir()
        (partial / "thesis.tex").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial"), made(tmp_path / "out", overwrite=overwrite):
            raise AssertionError("was begun")
    assert sorted(tmp_path.rglob("*")) == before


def damaged(content: bytes, rng: random.Random) -> bytes:
    how = rng.choice(["flip", "flip", "byte", "cut", "empty", "zeros", "text"])
    changed = bytearray(content)
    if how == "flip":
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif how == "byte":
        for _ in range(rng.choice([1, 5, 40])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif how == "zeros":
        at = rng.randrange(len(changed))
        changed[at : at + 512] = bytes(len(changed[at : at + 512]))
    return {"cut": content[: rng.randrange(len(content))], "empty": b"", "text": b"hello" * 99}.get(how, bytes(changed))


def test_no_damage_to_what_is_unfinished_is_believed(tmp_path):
    partial, rng, found = unfinished(tmp_path / "out"), random.Random(0), Counter()
    good = {path.name: path.read_bytes() for path in partial.iterdir() if path.name != "lock"}
    assert len(good) == 3
    for name, content in good.items():
        for _ in range(60):
            (partial / name).write_bytes(bad := damaged(content, rng))
            try:
                with made(tmp_path / "out") as job:
                    tensors, facts = job.kept("layer.1")
                    assert tensors["w"].tolist() == (np.arange(64.0) + 1).tolist() and facts == {"n": 2}
                    assert job.value("chosen", dict) == {"x": 0.5}
                found["right"] += bad == content
                assert json_equal(bad, content), f"{name}: changed and believed"
            except OutputError as error:
                assert str(partial / name) in str(error) and "--overwrite" in error.fix and "delete" in error.fix
                found["refused"] += 1
            (partial / name).write_bytes(content)
    assert found["refused"] > 150
    (partial / "layer.0.safetensors").unlink()
    with pytest.raises(OutputError, match="damaged or missing"), made(tmp_path / "out"):
        raise AssertionError("was begun")
    with made(tmp_path / "out", overwrite=True) as job:
        assert job.kept("layer.1") is None


def json_equal(a: bytes, b: bytes) -> bool:
    """Whether both have the same content. Changed white space in a JSON text makes no difference."""
    try:
        return a == b or json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_a_job_killed_at_any_moment_has_lost_one_unit_at_most(tmp_path):
    code = textwrap.dedent("""
        import sys, torch; from pathlib import Path; from sparsebert.jobs import Job
        with Job("test", {}, "sparsebert.patterns", Path(sys.argv[1])) as job:
            kept = job.kept("state")
            step = 0 if kept is None else kept[1]["step"]
            assert kept is None or kept[0]["w"].eq(step).all()
            print("at", step, flush=True)
            while True:
                step += 1
                job.keep("state", {"w": torch.full((20_000,), float(step))}, {"step": step}, last=f"step {step}")
                print(step, flush=True)
    """)
    rng, last = random.Random(1), 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        begun = process.stdout.readline()
        assert begun.startswith("at "), process.stderr.read()
        assert last <= int(begun.split()[1]) <= last + 1
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        out, _ = process.communicate()
        last = int((begun.split()[1:] + out.split())[-1])
    assert last > 0 and {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    with Job("test", {}, CODE, tmp_path / "out") as job:
        assert job.kept("state")[1]["step"] in (last, last + 1)
        job.finish()
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_told_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "_KEPT", {})
    with made(tmp_path / "empty"):
        pass
    assert jobs.told() == "nothing was finished yet"
    with made(tmp_path / "out") as job:
        job.keep("state", {"w": torch.ones(1)}, last="step 300 of 900")
    assert jobs.told() == f"kept: {tmp_path}/out.partial (up to step 300 of 900)"
    with made(tmp_path / "out") as job:
        (tmp_path / "out").mkdir()
        job.finish()
    assert jobs.told() == f"kept: {tmp_path}/out (finished)"


# --- ledgers ---------------------------------------------------------------------------------------------------------


def test_a_unit_is_computed_once_even_across_processes(tmp_path):
    calls = []
    for _ in range(2):
        book = Ledger(tmp_path / "l.sqlite")
        assert book.once("unit", {"a": 1}, lambda: calls.append(1) or {"x": [1.5, None]}) == {"x": [1.5, None]}
        book.close()
    assert calls == [1]


@pytest.mark.parametrize(
    "unit", [("two", {"a": 1}, "v"), ("one", {"a": 2}, "v"), ("one", {"b": 1}, "v"), ("one", {"a": 1}, "w")]
)
def test_another_kind_input_or_code_is_another_unit(tmp_path, unit):
    book = Ledger(tmp_path / "l.sqlite")
    book.once("one", {"a": 1}, lambda: {"x": 1}, "v")
    assert book.get("one", {"a": 1}, "v") == {"x": 1} and book.get(*unit) is None


def test_a_failed_unit_leaves_no_row(tmp_path):
    book = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(ZeroDivisionError):
        book.once("unit", {}, lambda: {"x": 1 / 0})
    assert book.get("unit", {}) is None and book.results("unit") == []


def test_finished_units_survive_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from sparsebert.jobs import Ledger\n"
        "book = Ledger(Path(sys.argv[1]))\n"
        "book.once('unit', {'i': 0}, lambda: {'done': 0})\n"
        "book.once('unit', {'i': 1}, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "l.sqlite")])
    assert done.returncode == -signal.SIGKILL
    assert Ledger(tmp_path / "l.sqlite").results("unit") == [({"i": 0}, {"done": 0})]


def test_a_damaged_ledger_is_refused_never_believed(tmp_path):
    path, rng, found = tmp_path / "l.sqlite", random.Random(3), Counter()
    book = Ledger(path)
    for i in range(40):
        book.once("unit", {"i": i}, lambda i=i: {"x": i, "y": "z" * i})
    book._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    book.close()
    good = path.read_bytes()
    for _ in range(150):
        for part in tmp_path.glob("l.sqlite*"):
            part.unlink()
        path.write_bytes(damaged(good, rng))
        try:
            book = Ledger(path)
            for i in range(40):
                assert book.once("unit", {"i": i}, lambda i=i: {"x": i, "y": "z" * i}) == {"x": i, "y": "z" * i}
            book.close()
            found["right"] += 1
        except OutputError as error:
            assert str(path) in str(error) and "--overwrite" in error.fix
            found["refused"] += 1
            begun_anew = Ledger(path, overwrite=True)
            assert begun_anew.once("unit", {"i": 1}, lambda: {"x": 1, "y": "z"}) == {"x": 1, "y": "z"}
            begun_anew.close()
    assert found["refused"] > 30


def test_exported_units_are_taken_over_and_damaged_ones_refused(tmp_path):
    book = Ledger(tmp_path / "a.sqlite")
    book.once("unit", {"i": 0}, lambda: {"x": 0.25}, "v")
    book.export(tmp_path / "cells.jsonl")
    other = Ledger(tmp_path / "b.sqlite")
    other.take_over(tmp_path / "cells.jsonl")
    assert other.get("unit", {"i": 0}, "v") == {"x": 0.25}
    text = (tmp_path / "cells.jsonl").read_text()
    key = json.loads(text)["key"]
    for wrong, says in (
        (text.replace("0.25", "0.75"), f"unit {key} does not match its checksum"), (text[:-9], "Unterminated string"),
        ("[1]\n", "list indices"), ("{}\n", "'result'"), ('"x"\n', "string indices"),
    ):  # fmt: skip
        (tmp_path / "wrong.jsonl").write_text(wrong)
        with pytest.raises(InputError, match=rf"wrong\.jsonl must hold units exported from a ledger: {says}"):
            other.take_over(tmp_path / "wrong.jsonl")
    with pytest.raises(InputError, match=r"absent\.jsonl must hold units .*No such file"):
        other.take_over(tmp_path / "absent.jsonl")


def test_cells_of_earlier_versions_are_readable(tmp_path):
    """Their keys follow another rule and they have no checksum. The committed cells are such cells."""
    book = Ledger(tmp_path / "l.sqlite")
    committed = ROOT / "bench/results/srnets_cells.jsonl"
    book.take_over(committed)
    lines = [json.loads(line) for line in committed.read_text().splitlines()]
    assert len(book.results("srnets cell")) == len(lines) > 100
    for line in lines[:3]:
        assert book.get("srnets cell", json.loads(line["inputs"])) == json.loads(line["result"])


def test_a_file_that_is_no_database_is_an_output_error(tmp_path):
    (tmp_path / "l.sqlite").write_text("not a database, and long enough to have a header of its own " * 20)
    with pytest.raises(OutputError, match="cannot be opened"):
        Ledger(tmp_path / "l.sqlite")


def test_keys_stay_those_that_results_are_kept_under(tmp_path):
    """With another rule for keys, the results of earlier versions would be computed again."""
    book = Ledger(tmp_path / "l.sqlite")
    book.once("unit", {"b": 1, "a": "é"}, lambda: {"x": 1}, "v")
    book.export(tmp_path / "cells.jsonl")
    row = json.loads((tmp_path / "cells.jsonl").read_text())
    said = b'{"code": "v", "inputs": {"a": "\\u00e9", "b": 1}, "kind": "unit"}'
    assert row["key"] == hashlib.sha256(said).hexdigest()
    job = made(tmp_path / "out", seed=1)
    parts = {name: job.record[name] for name in ("code", "core", "inputs", "isa", "kind")}
    assert job.key == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert (parts["kind"], parts["inputs"]) == ("test", {"model": "ab" * 32, "settings": {"seed": 1}})
    assert parts["isa"] in environment.ISAS and len(parts["code"]) == len(parts["core"]) == 64


def test_a_folder_that_is_there_is_exchanged_in_one_step(tmp_path, monkeypatch):
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2 in this C library")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr(os, "rename", lambda *paths: pytest.fail("the place was empty for a moment"))
    with jobs.replacing(tmp_path / "out") as staging:
        (staging / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("what", ["read", "written"])
def test_a_ledger_that_fails_later_is_one_line(tmp_path, what):
    book = Ledger(tmp_path / "l.sqlite")
    book.once("unit", {}, lambda: {"x": 1})
    if what == "read":
        book.close()
        with pytest.raises(OutputError, match=f"ledger {tmp_path}/l.sqlite cannot be read: Cannot operate on a closed"):
            book.results("unit")
    else:
        with pytest.raises(OutputError, match=f"ledger {tmp_path}/l.sqlite cannot be written: Cannot operate on"):
            book.once("unit", {"i": 1}, lambda: book.close() or {"x": 1})


def test_results_come_in_the_order_they_were_finished_and_of_one_kind(tmp_path):
    book = Ledger(tmp_path / "new" / "folder" / "l.sqlite")
    for i in (3, 1, 2):
        book.once("unit", {"i": i}, lambda i=i: {"x": i})
    book.once("other", {"i": 0}, lambda: {"x": 0})
    assert book.results("unit") == [({"i": i}, {"x": i}) for i in (3, 1, 2)]
    assert book.results("none of these") == []


def test_an_exported_unit_says_what_when_and_how_long(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # must not show: times are noted in UTC
    time.tzset()
    book = Ledger(tmp_path / "l.sqlite")
    begun = time.time()
    book.once("unit", {"b": 1, "a": [2]}, lambda: time.sleep(0.05) or {"x": 1}, "v")
    book.export(tmp_path / "cells.jsonl")
    (line,) = (tmp_path / "cells.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["kind"], json.loads(row["inputs"]), row["code"]) == ("unit", {"a": [2], "b": 1}, "v")
    assert json.loads(row["result"]) == {"x": 1} and 0.05 <= row["seconds"] < 30
    monkeypatch.undo()
    time.tzset()
    finished = calendar.timegm(time.strptime(row["finished"], "%Y-%m-%dT%H:%M:%SZ"))
    assert begun - 2 < finished < time.time() + 2


def test_units_that_are_there_already_are_not_taken_over(tmp_path):
    one, two = Ledger(tmp_path / "a.sqlite"), Ledger(tmp_path / "b.sqlite")
    for i in (0, 1):
        one.once("unit", {"i": i}, lambda: {"of": "one"})
    two.once("unit", {"i": 1}, lambda: {"of": "two"})
    one.export(tmp_path / "cells.jsonl")
    two.take_over(tmp_path / "cells.jsonl")
    assert two.get("unit", {"i": 0}) == {"of": "one"} and two.get("unit", {"i": 1}) == {"of": "two"}


def test_a_sound_ledger_is_kept_under_overwrite(tmp_path):
    book = Ledger(tmp_path / "l.sqlite")
    book.once("unit", {}, lambda: {"x": 1})
    book.close()
    assert Ledger(tmp_path / "l.sqlite", overwrite=True).get("unit", {}) == {"x": 1}
    assert Ledger(tmp_path / "absent.sqlite", overwrite=True).results("unit") == []


def test_a_ledger_tells_how_much_of_this_run_it_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "_KEPT", {})
    book = Ledger(tmp_path / "l.sqlite")
    for i in (0, 1, 1):
        book.once("unit", {"i": i}, lambda: {"x": 1})
    assert jobs.told() == f"kept: {tmp_path}/l.sqlite (2 results of this run)"
