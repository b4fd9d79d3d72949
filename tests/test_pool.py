"""The pool of worker threads under ThreadSanitizer: no data race, and every task runs once."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, require

SOURCES = [ROOT / "tests" / "pool.cpp", ROOT / "csrc" / "cpu" / "threads.cpp", ROOT / "csrc" / "cpu" / "scratch.cpp"]


def built(tmp_path: Path, *flags: str) -> Path:
    """The program of tests/pool.cpp, compiled with these flags."""
    if shutil.which("g++") is None:
        require("g++", "g++ is not installed")
    program = tmp_path / "pool"
    command = ["g++", "-std=c++17", "-O1", "-g", "-pthread", *flags, *map(str, SOURCES), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "cannot find" in done.stderr:
        require("sanitizers", "g++ has no ThreadSanitizer library")
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("flags", [(), ("-fsanitize=thread",)], ids=["plain", "thread sanitizer"])
def test_every_task_runs_once_without_a_race(tmp_path, flags):
    done = subprocess.run([str(built(tmp_path, *flags))], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:  # a kernel with more random addresses than it knows
        require("sanitizers", "ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert int(done.stdout.split()[0]) > 3 * 200 * 19


def test_the_sanitizer_would_notice_a_race(tmp_path):
    racing = tmp_path / "racing.cpp"
    racing.write_text(
        "#include <thread>\nint x;\nint main() { std::thread t([] { ++x; }); ++x; t.join(); return 0; }\n"
    )
    command = ["g++", "-std=c++17", "-g", "-pthread", "-fsanitize=thread", str(racing), "-o", str(tmp_path / "racing")]
    if shutil.which("g++") is None or subprocess.run(command, capture_output=True).returncode:
        require("sanitizers", "g++ has no ThreadSanitizer library")
    done = subprocess.run([str(tmp_path / "racing")], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        require("sanitizers", "ThreadSanitizer does not run on this kernel")
    assert done.returncode != 0 and "data race" in done.stderr
