"""The command line: its JSON documents, its errors (one line, exit code 2, nothing written), kill and resume."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from command_line import refused, run
from conftest import ROOT, require
from models import saved, stock
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

import sparsebert
from sparsebert import Engine, checkpoint, cli, data, environment
from sparsebert.checkpoint.encoding import TextEncoder
from sparsebert.cli import demo, main
from sparsebert.cli.commands import app
from sparsebert.cli.output import of_task, then
from sparsebert.config import TaskConfig
from sparsebert.heads import MULTI_LABEL, ONE_LOGIT, SINGLE_LABEL, answers, softmax

SMALL_DEMO = [
    "--train-n",
    "320",
    "--test-n",
    "120",
    "--calibration-tokens",
    "2000",
    "--attack-n",
    "20",
    "--epochs",
    "1",
    "--bench-n",
    "8",
    "--rounds",
    "2",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("cli") / "dense")


def document(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


STARTED: list[subprocess.Popen] = []


def start(*arguments, program: tuple[str, ...] = ("-m", "sparsebert"), **kwargs) -> subprocess.Popen:
    command = [sys.executable, *program, *map(str, arguments)]
    # A shell starts background jobs with SIGINT ignored, and that is inherited.
    kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pipe = subprocess.PIPE
    STARTED.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, **kwargs))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Kills processes that a failed test left, so that they do not slow down later tests."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def test_train_prune_eval_bench_end_with_their_documents(dense, tmp_path, capsys):
    code, out, _ = run(
        capsys, "train", dense, "--task", "mr", "--seed", 3, "--n", 64, "--epochs", 0.5, "-o", tmp_path / "t"
    )
    assert code == 0
    assert document(out)["task"] == "mr" and document(out)["seed"] == 3 and document(out)["steps"] == 1

    settings = [
        "--method",
        "adaptive",
        "--sparsity",
        0.5,
        "--pattern",
        "unstructured",
        "--seed",
        1,
        "--calibration-tokens",
        800,
    ]
    code, out, _ = run(capsys, "prune", tmp_path / "t", "--task", "mr", *settings, "-o", tmp_path / "p")
    pruned = document(out)
    assert code == 0 and {"method", "sparsity", "pattern", "seconds", "peak_rss_mb", "layers"} <= pruned.keys()
    assert pruned["sparsity"] == 0.5 and len(pruned["layers"]) == 12
    assert all(
        layer["density"] == 0.5 and layer["name"].startswith("bert.encoder.layer.") for layer in pruned["layers"]
    )
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "p")

    code, out, _ = run(capsys, "eval", tmp_path / "p", "--task", "mr", "--vs", tmp_path / "t", "--n", 40, "--json")
    result = document(out)
    assert code == 0 and out.count("\n") == 1
    assert {"accuracy", "accuracy_ci", "kl_to_dense", "agreement", "n"} <= result.keys() and result["n"] == 40
    assert result["accuracy_ci"][0] <= result["accuracy"] <= result["accuracy_ci"][1]

    code, out, _ = run(capsys, "eval", tmp_path / "p", "--task", "mr", "--n", 40, "--json")
    assert document(out)["kl_to_dense"] is None

    code, out, _ = run(capsys, "bench", tmp_path / "p", "--n", 6, "--rounds", 2, "--json")
    rows = document(out)["rows"]
    assert code == 0 and [row["engine"] for row in rows] == ["sparsebert", "torch"]
    fields = {"engine", "dtype", "batch", "seq", "threads", "p50_ms", "p99_ms", "seq_per_s", "ratio", "match"}
    assert all(fields <= row.keys() for row in rows) and "layers" not in document(out)
    code, out, _ = run(capsys, "bench", tmp_path / "p", "--n", 6, "--rounds", 2, "--seq", 20, "--explain")
    assert code == 0 and len(document(out)["layers"]) == 8 and "attention_out" in out


def test_bench_times_random_weights_and_takes_one_model(dense, capsys):
    settings = ["--random", "minilm", "--pattern", "16x1", "--sparsity", 0.9, "--n", 2, "--rounds", 1, "--seq", 8]
    code, out, _ = run(capsys, "bench", *settings, "--json")
    assert code == 0 and document(out)["density"] == pytest.approx(0.1, abs=1e-3)
    for given in ([dense, "--random", "minilm"], []):
        assert "bench needs either DIR or --random" in refused(capsys, "bench", *given)
    for given in (["--pattern", "32x1"], ["--sparsity", 0.5]):
        assert "belong to --random" in refused(capsys, "bench", dense, *given)
    assert "got 'tensorrt'" in refused(capsys, "bench", dense, "--rivals", "tensorrt")


def test_a_recipe_and_its_soup_end_with_their_documents(dense, tmp_path, capsys):
    recipe = tmp_path / "two.yaml"
    recipe.write_text("common: {epochs: 0.5, hold_out: 100, n: 64}\nmodels:\n  a: {seed: 0}\n  b: {seed: 1}\n")
    code, out, _ = run(capsys, "train", dense, "--task", "mr", "--recipe", recipe, "-o", tmp_path / "models")
    assert code == 0 and document(out)["models"].keys() == {"a", "b"}
    members = [tmp_path / "models" / name for name in ("a", "b")]
    code, out, _ = run(
        capsys, "soup", *members, "--task", "mr", "--score", "accuracy", "-o", tmp_path / "soup", "--json"
    )
    result = document(out)
    assert code == 0 and out.count("\n") == 1 and result["score_name"] == "accuracy"
    assert set(result["members"]) <= set(result["scores"]) and result["score"] >= max(result["scores"].values())
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "soup")


def test_a_recipe_takes_no_other_settings(dense, tmp_path, capsys):
    line = refused(
        capsys, "train", dense, "--task", "mr", "--recipe", "quick-soup", "--lr", 1e-3, "-o", tmp_path / "models"
    )
    assert "--recipe takes every setting from its file" in line and not (tmp_path / "models").exists()


@pytest.mark.parametrize(("tier", "pattern"), [(0, "unstructured"), (1, "unstructured"), (1, "32x1"), (2, "32x1")])
def test_a_dry_run_prints_the_plan_and_writes_nothing(dense, tmp_path, capsys, tier, pattern):
    settings = ["--task", "mr", "--tier", tier, "--pattern", pattern, "--calibration-tokens", 1000]
    settings += ["-o", tmp_path / "p"]
    code, out, _ = run(capsys, "prune", dense, *settings, "--dry-run")
    plan = document(out)
    assert code == 0 and not (tmp_path / "p").exists()
    assert plan["linears"] == 12 and plan["zeros"] == int(plan["weights"] * 0.875)
    assert ("outputs" in plan["steps"]) == ("gradients" in plan["seconds"]) == (tier >= 1)
    assert ("distill" in plan["steps"]) == ("distillation" in plan["memory_mb"]) == (tier == 2)
    assert (pattern == "32x1") == ("clustering" in plan["seconds"])
    for parts, whole in ((plan["memory_mb"], "peak"), (plan["seconds"], "total")):
        assert parts[whole] >= max(value for name, value in parts.items() if name != whole) > 0
    assert "memory, about: peak" in out and "time, about: total" in out and "time, about: solve" not in out
    assert plan["calibration"] == {"task": 600, "task, joined": 150, "others": 100, "others, joined": 150}
    out = run(capsys, "prune", dense, *settings, "--dry-run", "--verbose")[1]
    assert "tokens: others, joined" in out and "time, about: solve" in out
    _, out, _ = run(capsys, "prune", dense, *settings, "--calibration", "none", "--dry-run")
    assert document(out)["calibration"] == {"task": 1000}


@pytest.mark.parametrize("method", ["mask", "imp", "imp-rw", "soft-movement"])
def test_a_dry_run_of_a_method_that_trains(dense, tmp_path, capsys, method):
    settings = ["--task", "mr", "--method", method, "--n", 320, "--batch-size", 32, "--epochs", 2, "--hold-out", 50]
    best = [] if method == "imp-rw" else ["--select", "best"]
    code, out, _ = run(capsys, "prune", dense, *settings, *best, "-o", tmp_path / "p", "--dry-run")
    plan = document(out)
    assert code == 0 and not (tmp_path / "p").exists()
    assert plan["optimizer_steps"] == 20 and plan["zeros"] == int(plan["weights"] * 0.875)
    assert 20 * 32 * 10 < plan["tokens"] < 20 * 32 * 50  # a sentence of MR has about 27
    for parts, whole in ((plan["memory_mb"], "peak"), (plan["seconds"], "total")):
        assert parts[whole] == pytest.approx(sum(value for name, value in parts.items() if name != whole))
    assert ("held_out" in plan["seconds"]) == (method != "imp-rw") and "optimizer steps" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--calibration", "nosuch.txt"], "nosuch.txt must be a file, is absent"),
        (["--calibration", "none", "--calibration", "general"], "calibration must be none or texts, got both"),
        (["--task", "paws_qqp"], "has no training split"),
        (["-o", "DENSE"], "is or holds what it starts from"),
        (["-o", "/proc/x"], "/proc"),
        (["--calibration-tokens", "10"], "calibration must have at least as many tokens"),
        (["--method", "mask", "--task", "rte", "--sparsity", "0.5"], "labels"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_before_its_work(dense, tmp_path, capsys, flags, says):
    given = [dense if flag == "DENSE" else flag for flag in flags]
    given += ([] if "--task" in flags else ["--task", "mr"]) + ([] if "-o" in flags else ["-o", tmp_path / "p"])
    if "rte" in flags or "paws_qqp" in flags:
        if environment.data_dir() is None:
            require("data", "SPARSEBERT_DATA is not set")
    lines = [refused(capsys, "prune", dense, *given, *dry) for dry in (["--dry-run"], [])]
    assert lines[0] == lines[1] and says in lines[0] and not (tmp_path / "p").exists()


def test_a_dry_run_counts_the_texts_that_are_there(dense, tmp_path, capsys):
    (tmp_path / "own.txt.csv").write_text("text\n" + "".join(f"a film number {i}\n" for i in range(300)))
    out = run(capsys, "prune", dense, "--task", tmp_path / "own.txt.csv", "-o", tmp_path / "p", "--dry-run")[1]
    parts = document(out)["calibration"]
    assert 200 * 6 < parts["task"] < 300 * 9 and parts["others"] == 25_000


@pytest.mark.parametrize("broken", ["stdout", "working directory"])
def test_surroundings_that_no_command_can_work_in_are_named(tmp_path, broken):
    command = f"{shlex.quote(sys.executable)} -c 'from sparsebert.cli import main; import sys; sys.exit(main())' cache"
    gone = tmp_path / "gone"
    shell = f"{command} >&-" if broken == "stdout" else f"mkdir {gone} && cd {gone} && rmdir {gone} && {command}"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    says = {"stdout": "standard output is closed", "working directory": "the working directory is not there any more"}
    assert told.returncode == 2 and re.fullmatch(rf"error: {says[broken]}; [^\n]+\n", told.stderr), told.stderr


def test_a_dry_run_refuses_what_the_run_would(dense, tmp_path, capsys):
    line = refused(capsys, "prune", dense, "--task", "mr", "--pattern", "7x1", "-o", tmp_path / "p", "--dry-run")
    assert "multiple of 7" in line
    line = refused(capsys, "prune", dense, "--task", "mr", "--loss", "poe", "-o", tmp_path / "p", "--dry-run")
    assert "belongs to methods mask" in line
    within = ("--min-speedup", 2, "--max-robust-drop", 1)
    line = refused(capsys, "prune", dense, "--task", "mr", "-o", tmp_path / "p", *within, "--adversarial", "freelb")
    assert "--adversarial belongs to methods" in line
    line = refused(capsys, "prune", dense, "--task", "mr", "-o", tmp_path / "p", "--budget-n", 50)
    assert "belong to a budget, none was given" in line
    trained = ["--task", "mr", "--method", "mask", "--sparsity", 0.5, "-o", tmp_path / "p", "--dry-run"]
    assert "must not fall" in refused(capsys, "prune", dense, *trained, "--gradual", 0.9)
    assert "hold_out 0" in refused(capsys, "prune", dense, *trained, "--select", "best")
    assert "needs a bias model" in refused(capsys, "prune", dense, *trained, "--loss", "poe")


def test_doctor_says_what_runs_and_why_not(capsys, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_ISA", "scalar")
    code, out, _ = run(capsys, "doctor")
    facts = document(out)
    assert code == 0 and facts["isa"] == "scalar" and facts["isa_off"].keys() == set(environment.ISAS) - {"scalar"}
    assert {"cpu", "threads", "gpu", "cache", "versions", "data"} <= facts.keys() and facts["gpu"]


def test_doctor_tunes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    code, out, _ = run(capsys, "doctor", "--tune")
    assert code == 0 and (tmp_path / "costs.json").exists()
    assert len(json.loads(out.splitlines()[-1])["ns_per_entry"]["rows"]) == 3


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["prune"], ["eval"], ["bench"], ["doctor"]])
def test_help_imports_no_heavy_library(command):
    code = (
        "import sys; from sparsebert.cli import main; code = main([*sys.argv[1:], '--help'])\n"
        "print(code, sorted({'torch', 'transformers', 'pyarrow', 'scipy', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout and done.stdout.splitlines()[-1] == "0 []"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_task_and_method_list_the_known_ones(dense, tmp_path, capsys):
    assert "mr, sst2, imdb" in refused(capsys, "train", dense, "--task", "nope", "-o", tmp_path / "o")
    assert "mr, sst2, imdb" in refused(capsys, "eval", dense, "--task", "nope")
    line = refused(capsys, "prune", dense, "--task", "mr", "--method", "nope", "-o", tmp_path / "o")
    assert "knowledge, adaptive, obs, sparsegpt, wanda, magnitude" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "nan", "inf"])
def test_sparsity_outside_its_range(dense, tmp_path, capsys, sparsity):
    line = refused(capsys, "prune", dense, "--task", "mr", f"--sparsity={sparsity}", "-o", tmp_path / "o")
    assert "sparsity must be" in line and "--sparsity" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["nonsense"],
        ["train", "minilm", "--task", "mr"],
        ["bench", "x", "--batch", "two"],
        ["eval", "x", "--task", "mr", "--n", "0"],
    ],
)
def test_malformed_arguments(arguments, capsys):
    refused(capsys, *arguments)


def damage(directory: Path, how: str) -> None:
    weights = directory / checkpoint.WEIGHTS
    if how == "no weights":
        weights.unlink()
        return
    if how == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 0xFF
        weights.write_bytes(content)
        return
    tensors = dict(load_file(weights))
    name = "bert.encoder.layer.0.output.dense.weight"
    if how == "missing tensor":
        del tensors[name]
    elif how == "nan":
        tensors[name][0, 0] = np.nan
    else:
        tensors[name] = np.zeros((2, 2), np.float32)
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["no weights", "flipped byte", "missing tensor", "nan", "wrong shape"])
@pytest.mark.parametrize("command", ["train", "prune", "eval", "bench"])
def test_damaged_models(dense, tmp_path, capsys, how, command):
    broken = shutil.copytree(dense, tmp_path / "broken")
    damage(broken, how)
    extra = [] if command in ("eval", "bench") else ["-o", tmp_path / "out"]
    line = refused(capsys, command, broken, "--task", "mr", *extra)
    assert str(broken) in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("text", ["", "   ", b"\xff\xfe"])
def test_empty_and_non_utf8_text(dense, tmp_path, monkeypatch, capsys, text):
    folder = tmp_path / "mr"
    folder.mkdir()
    column = pa.array([text]) if isinstance(text, str) else pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, len(text)], np.int32)), pa.py_buffer(text)]
    )  # fmt: skip
    pq.write_table(pa.table({"text": column, "label": [0]}), folder / "test.parquet")
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path))
    line = refused(capsys, "eval", dense, "--task", "mr")
    assert "test.parquet" in line and ("non-empty" in line or "UTF-8" in line)


def test_unsupported_architecture(dense, tmp_path, capsys):
    other = shutil.copytree(dense, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "'gpt2'" in refused(capsys, "eval", other, "--task", "mr")


@pytest.mark.parametrize("command", ["train", "prune"])
def test_read_only_output(dense, tmp_path, capsys, command):
    tmp_path.chmod(0o555)
    line = refused(capsys, command, dense, "--task", "mr", "-o", tmp_path / "out")
    tmp_path.chmod(0o755)
    assert "read-only" in line and not list(tmp_path.iterdir())


def test_too_few_calibration_tokens(dense, tmp_path, capsys):
    line = refused(capsys, "prune", dense, "--task", "mr", "--calibration-tokens", 1, "-o", tmp_path / "out")
    assert "--calibration-tokens" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "prune"])
def test_a_full_disk(dense, tmp_path, command):
    def no_file_above_100_kb():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    small = ["--n", 32, "--epochs", 1] if command == "train" else ["--method", "magnitude"]
    line = [command, dense, "--task", "mr", *small, "-o", tmp_path / "out"]
    context = multiprocessing.get_context("fork")  # a file size limit cannot be lifted; a fork has torch loaded
    said = context.SimpleQueue()

    def refuse():
        no_file_above_100_kb()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in line])
        said.put((code, out.getvalue(), err.getvalue()))

    process = context.Process(target=refuse)
    process.start()
    process.join(120)
    assert process.exitcode == 0 and not said.empty()
    code, out, err = said.get()
    assert code == 2 and out == ""
    assert err.splitlines()[-1].startswith("error: ") and "cannot be written" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_unknown_instruction_set(capsys, dense, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_ISA", "avx1024")
    assert "scalar, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx" in refused(capsys, "bench", dense)


def test_a_warning_is_one_line(tmp_path, capsys):
    source = saved(tmp_path / "emotions", labels=("joy", "anger"))
    code, _, err = run(
        capsys,
        "train",
        source,
        "--task",
        "mr",
        "--steps",
        1,
        "--batch-size",
        2,
        "--n",
        8,
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert code == 0
    (line,) = [line for line in err.splitlines() if "new head" in line]
    assert line.startswith(f"warning: {source} has the labels joy, anger") and "setup.py" not in err


def test_models_of_another_task(dense, tmp_path, capsys):
    folder = tmp_path / "three"
    folder.mkdir()
    (folder / "test.csv").write_text("text,label\na,0\nb,1\nc,2\n")
    assert "has 2 labels (negative, positive), 3 are wanted" in refused(capsys, "eval", dense, "--task", folder)


def test_a_path_that_looks_like_markup_is_printed(dense, tmp_path, capsys):
    odd = shutil.copytree(dense, tmp_path / "m[" / "x]")
    code, out, _ = run(capsys, "eval", odd, "--task", "mr", "--n", 8)
    assert code == 0 and "m[/x]" in out


def test_output_over_the_source_and_refused_inputs_make_no_folder(dense, tmp_path, capsys):
    assert "starts from" in refused(capsys, "prune", dense, "--task", "mr", "-o", dense)
    refused(capsys, "train", dense, "--task", "nope", "-o", tmp_path / "a" / "b")
    refused(capsys, "prune", tmp_path / "absent", "--task", "mr", "-o", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "prune"])
@pytest.mark.parametrize(
    "kind", ["fifo", "device", "loop of links", "5,000 characters", "no room beside", "file", "cwd"]
)
def test_an_output_that_cannot_be_is_one_line_at_once(dense, tmp_path, capsys, monkeypatch, command, kind):
    output = tmp_path / "out"
    if kind == "fifo":
        os.mkfifo(output)
    elif kind == "device":
        output = Path("/dev/null")
    elif kind == "loop of links":
        output.symlink_to(output)
    elif kind == "5,000 characters":
        output = tmp_path / ("x" * 5000)
    elif kind == "no room beside":
        output = tmp_path / ("x" * 250)
    elif kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        monkeypatch.chdir(output)
    before = sorted(tmp_path.rglob("*"))
    for extra in ([], ["--overwrite"]):
        begun = time.monotonic()
        line = refused(capsys, command, dense, "--task", "mr", "-o", output, *extra)
        assert "-o" in line and len(line) < 400 and time.monotonic() - begun < 5
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_folder_is_not_replaced_by_a_model_of_it(dense, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("text,label\na,0\nb,1\n")
    for output in (folder, tmp_path):
        line = refused(capsys, "train", dense, "--task", folder, "-o", output, "--overwrite")
        assert "is or holds what it starts from" in line
    assert len(list(folder.iterdir())) == 2


def test_other_settings_at_the_same_output_are_refused_unless_overwrite(dense, tmp_path, capsys):
    settings = ["--method", "magnitude", "--json", "-o", tmp_path / "out"]
    prune = ["prune", dense, "--task", "mr", *settings]
    run(capsys, *prune, "--sparsity", 0.9)
    before = checkpoint.weights_sha256(tmp_path / "out")
    line = refused(capsys, *prune)
    assert "out was made with --sparsity 0.9, not 0.875; repeat those settings, choose another -o" in line
    assert checkpoint.weights_sha256(tmp_path / "out") == before
    code, out, _ = run(capsys, *prune, "--overwrite")
    assert code == 0 and document(out)["sparsity"] == 0.875
    train = ["train", dense, "--task", "mr", "--steps", 1, "--n", 8, "-o", tmp_path / "out"]
    assert "out was made with prune, not train" in refused(capsys, *train)


def test_a_reader_that_leaves_is_no_traceback(dense):
    process = start("doctor")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and "Traceback" not in err


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sparsebert", "doctor"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.6])
def test_ctrl_c_at_any_moment_is_130_and_one_line_at_most(dense, tmp_path, seconds):
    # An hour of work: a process that ends in any other way than by the signal has missed it.
    process = start("train", dense, "--task", "mr", "--epochs", 1000, "--batch-size", 4, "-o", tmp_path / "out")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        # A callback of the interpreter's own imports, before our handler is there, cannot raise.
        assert "Exception ignored in" in err and "KeyboardInterrupt" in err, err
        pytest.skip("the interpreter has forgotten the signal before it came to our code")
    if process.returncode != 130 and "sparsebert/" not in err:
        pytest.skip("the interpreter had not come to our code yet")
    assert process.returncode == 130 and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.fixture
def ctrl_c_is_heard():
    """SIGINT works as in a terminal, even if the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_in_an_import_waits_for_its_end(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nreached = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), cli.interrupts_at_safe_moments():
        import slow_to_import

        assert slow_to_import.reached
        time.sleep(5)
        raise AssertionError("the interrupt was lost")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_in_a_finalizer_is_not_forgotten():
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt), cli.interrupts_at_safe_moments():
        Finalized()
        time.sleep(5)
        raise AssertionError("the interrupt was lost")


# --- kill and resume -------------------------------------------------------------------------------------------------


def wait_for(process: subprocess.Popen, pattern: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    for line in process.stderr:
        if re.search(pattern, line):
            return
        assert time.monotonic() < deadline
    raise AssertionError(f"the process ended without {pattern!r}")


def test_ctrl_c_exits_130_with_nothing_half_written(dense, tmp_path):
    process = start("train", dense, "--task", "mr", "--epochs", 1000, "--batch-size", 4, "-o", tmp_path / "out")
    wait_for(process, r"fine-tune: \d+/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err
    kept = [path.name for path in tmp_path.iterdir()]
    if kept:
        assert kept == ["out.partial"], "only what to resume from"
        assert re.search(r"interrupted: kept: .*/out\.partial \(up to step \d+00 of \d+\), nothing is half-", err)
    else:
        assert "interrupted: nothing was finished yet, nothing is half-written" in err


@pytest.mark.parametrize("kept", [0, 2])
def test_ctrl_c_says_what_is_kept(dense, tmp_path, capsys, monkeypatch, kept):
    from sparsebert.jobs import job as job_module
    from sparsebert.pruning.run import Run

    monkeypatch.setattr(job_module, "_KEPT", {})
    saved_before, save = [], Run._save

    def interrupted(self, linears):
        if len(saved_before) == kept:
            raise KeyboardInterrupt
        saved_before.append(save(self, linears))

    monkeypatch.setattr(Run, "_save", interrupted)
    monkeypatch.setattr("sparsebert.checkpoint.save", lambda *args, **kwargs: interrupted(None, None))
    settings = ["--method", "wanda", "--calibration-tokens", 800, "-o", tmp_path / "out"]
    code, out, err = run(capsys, "prune", dense, "--task", "mr", *settings)
    says = f"kept: {tmp_path}/out.partial (up to bert.encoder.layer.1)" if kept else "nothing was finished yet"
    assert code == 130 and out == ""
    assert err == f"interrupted: {says}, nothing is half-written; run the same command again\n"
    assert [path.name for path in tmp_path.iterdir()] == (["out.partial"] if kept else [])


DEMO = """
import sys
from sparsebert.cli import demo, main

demo.MODEL = sys.argv.pop(1)
sys.exit(main(sys.argv[1:]))
"""


def test_the_whole_demo_at_reduced_size_survives_kill_9_and_reuses_its_work(dense, tmp_path, capsys, monkeypatch):
    assert demo.MODEL == "minilm"  # tests/test_training.py trains it, and pruning takes minutes
    monkeypatch.setattr(demo, "MODEL", str(dense))
    output = tmp_path / "demo"
    command = ["demo", *SMALL_DEMO, "--json", "-o", output]
    killed = start(dense, *command, program=("-c", DEMO))
    while killed.poll() is None and not (output / "magnitude").exists():
        time.sleep(0.05)
    killed.kill()  # while the adaptive method is at work
    killed.wait()
    trained = checkpoint.weights_sha256(output / "dense")
    assert not (output / "adaptive").exists()

    process = start(dense, *command, program=("-c", DEMO))
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert "1/5" not in err, "the finished fine-tuning was reused"
    assert checkpoint.weights_sha256(output / "dense") == trained
    assert result.keys() >= {"task", "dense_accuracy", "methods", "latency_ms", "max_logit_error", "report", "seconds"}
    assert result["methods"].keys() == {"magnitude", "adaptive", "knowledge"}
    assert all(method["sparsity"] == 0.875 for method in result["methods"].values())
    assert all(0 < method["kl_to_dense"] < 1 for method in result["methods"].values())  # too few steps for a comparison
    for method in result["methods"].values():
        assert method["outside"].keys() == {"longer texts", "general texts"}
        assert all(0 < texts["kl"] < 1 and texts["n"] > 1 for texts in method["outside"].values())
        assert method["attacks"]["textfooler"]["n"] == 20 and 0 <= method["attacks"]["textfooler"]["aua"] <= 1
    assert result["latency_ms"].keys() == {"torch", "sparsebert"} and result["max_logit_error"] < 1e-4

    page = Path(result["report"]).read_text()
    assert "accuracy under attack" in page
    assert "longer texts" in page and "plotly" in page and not re.search(r"<(script|link|img)[^>]*(src|href)=", page), (
        "opens without network"
    )

    code, out, err = run(capsys, *command)
    again = json.loads(out)
    assert code == 0 and "prune" not in err and "evaluate" not in err
    assert again["methods"] == result["methods"] and again["dense_accuracy"] == result["dense_accuracy"]


def test_the_demo_refuses_an_output_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    refused(capsys, "demo", "-o", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stock_directory_is_sealed_and_its_labels_are_named(dense, capsys, tmp_path):
    directory = stock(shutil.copytree(dense, tmp_path / "m"))
    code, out, _ = run(capsys, "seal", directory)
    assert code == 0 and document(out)["weights_sha256"] == checkpoint.weights_sha256(directory)
    assert "sealed already" in refused(capsys, "seal", directory)
    code, out, _ = run(capsys, "reseal", directory, "--labels", "bad, good", "--json")
    assert code == 0 and document(out) == {"directory": str(directory), "labels": ["bad", "good"], "changed": True}
    assert "names 3" in refused(capsys, "reseal", directory, "--labels", "a,b,c")
    assert json.loads((directory / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


def test_the_version_and_the_defaults_of_flags_are_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(capsys, "--version")[:2] == (0, f"sparsebert {sparsebert.__version__}\n")
    short, out = (run(capsys, "prune", flag)[1] for flag in ("--help", "--help-all"))
    for shown in (
        "[default: 0.875, or what the pattern implies]",
        "[default: general]",
        "[default: knowledge]",
        "knowledge: 0 is fastest",
    ):
        assert shown in short and shown in out
    assert "--damping" not in short and short.rstrip().endswith(" prune --help-all")
    first, expert, labelled = (out.index(panel) for panel in ("─ Options ", "─ Expert options ", "train with labels ─"))
    assert "--no-" not in out
    assert first < out.index("--sparsity") < expert < out.index("--damping") < labelled < out.index("--gradual")


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_help_is_short_and_help_all_has_every_flag(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parameters = typer.main.get_command(app).commands[name].params
    grouped = [parameter for parameter in parameters if parameter.rich_help_panel is not None]
    short = run(capsys, name, "--help")[1]
    assert short.count("\n") <= 80 and ("all options:" in short) == bool(grouped)
    assert not any(
        re.search(rf"{parameter.opts[0]}\b(?!-)", short.partition("all options:")[0]) for parameter in grouped
    )
    if grouped:
        code, whole, err = run(capsys, name, "--help-all")
        assert (code, err) == (0, "") and all(parameter.opts[0] in whole for parameter in parameters[1:])
    else:
        assert run(capsys, name, "--help-all") == (0, short, "")


def test_help_all_of_the_whole_command_is_its_help(capsys):
    assert run(capsys, "--help-all") == run(capsys, "--help") and run(capsys, "--help")[0] == 0


VALUED = {
    name: [parameter.opts[0] for parameter in command.params if not getattr(parameter, "is_flag", True)]
    for name, command in typer.main.get_command(app).commands.items()
}


@pytest.mark.parametrize("name", [name for name, options in VALUED.items() if options])
def test_an_option_without_its_value_points_to_the_help_of_its_command(name, capsys):
    said = refused(capsys, name, VALUED[name][0])
    assert f"Option '{VALUED[name][0]}' requires an argument; see " in said and said.endswith(f" {name} --help\n")


def test_the_next_command_tells_a_folder_from_a_task_or_model_of_its_name(capsys):
    then("eval", Path("minilm"), *of_task(TaskConfig(task="./mr")), "--vs", Path("mr"))
    assert capsys.readouterr().err == "next: eval ./minilm --task ./mr --vs ./mr\n"
    then("eval", Path("out"), *of_task(TaskConfig(task="mr")))
    assert capsys.readouterr().err == "next: eval out --task mr\n"


def test_a_folder_called_minilm_is_a_folder_and_the_name_is_the_packaged_encoder(tmp_path, monkeypatch):
    saved(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.resolve(Path("minilm")) == Path("minilm") and "gt_all" in str(checkpoint.resolve("minilm"))
    assert checkpoint.made_from(Path("./minilm"), "x")["model"] == str(tmp_path / "minilm")


@pytest.mark.parametrize(
    "given", [("--label-column", "a", "--label-column", "b"), ("--task", "mr", "--task", "sst2"), ("--n", "1", "--n=2")]
)
def test_an_option_of_one_value_is_given_once(given, capsys):
    said = refused(capsys, "eval", "model", *given)
    assert f"Invalid value for '{given[0]}': is given twice, and takes one value; see " in said


def test_help_names_its_flags_in_one_order(capsys):
    for name in ([], ["predict"], ["prune"]):
        assert re.search(r"-h +|--help,? *-h", run(capsys, *name, "-h")[1]) and run(capsys, *name, "-h")[0] == 0
        code = "import sys; from sparsebert.cli import main; main(sys.argv[1:])"
        outs = {
            subprocess.run([sys.executable, "-c", code, *name, "--help"], capture_output=True, check=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in "012"
        }  # fmt: skip
        assert len(outs) == 1


@pytest.mark.parametrize(
    "name", ["a b", "it's", "a\nb", "\x1b[31mred", "tab\there", "it's\n", "\u202eright", "a\\b\n", "é", "\udcff"]
)
def test_the_next_command_gives_a_shell_the_name_and_a_terminal_no_orders(name, capsys):
    then("eval", Path(name))
    printed = capsys.readouterr().err.removeprefix("next: ")
    assert printed[:-1].isprintable()
    got = subprocess.run(["bash", "-c", f"printf %s {printed.removeprefix('eval ')}"], capture_output=True, check=True)
    assert got.stdout == os.fsencode(name)


def test_every_flag_says_what_it_is_for():
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


def test_texts_are_classified_a_line_each(dense, capsys, monkeypatch):
    texts = ["a gripping film", "dull"]
    scores = softmax(Engine.load(dense).logits(texts))
    code, out, _ = run(capsys, "predict", dense, *texts)
    lines = [f"{data.SENTIMENT[row.argmax()]} {row.max():.3f}\t{text}" for row, text in zip(scores, texts, strict=True)]
    assert code == 0 and out.splitlines() == lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a gripping film\r\ndull\n")))
    assert run(capsys, "predict", dense, "-")[1] == out
    found = document(run(capsys, "predict", dense, *texts, "--json")[1])
    assert found["problem"] == "single_label" and [row["text"] for row in found["texts"]] == texts
    assert found["texts"][0]["scores"] == pytest.approx(dict(zip(data.SENTIMENT, scores[0], strict=True)))
    line = refused(capsys, "predict", dense, "fine", "")
    assert "texts[1] must be a non-empty string" in line


def test_blank_lines_of_standard_input_are_left_out_and_counted(dense, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\na gripping film\n  \ndull")))
    code, out, err = run(capsys, "predict", dense, "-")
    assert code == 0 and [line.split("\t")[1] for line in out.splitlines()] == ["a gripping film", "dull"]
    assert err == "2 blank lines were left out\n"


def test_the_texts_and_pairs_of_a_file_are_classified(dense, tmp_path, capsys):
    lines, table = tmp_path / "texts.txt", tmp_path / "pairs.csv"
    lines.write_text("a gripping film\n\ndull\n")
    assert (
        run(capsys, "predict", dense, "--file", lines)[1] == run(capsys, "predict", dense, "a gripping film", "dull")[1]
    )
    err = run(capsys, "predict", dense, "--file", lines)[2]
    assert err == "2 texts read, 1 blank left out\n"
    table.write_text("id,premise,hypothesis\n1,it rained,it was wet\n2,it rained,it was dry\n")
    scores = softmax(Engine.load(dense).logits([("it rained", "it was wet"), ("it rained", "it was dry")]))
    found = document(run(capsys, "predict", dense, "--file", table, "--json")[1])["texts"]
    assert [(row["text"], row["text_b"]) for row in found] == [("it rained", "it was wet"), ("it rained", "it was dry")]
    assert np.array([list(row["scores"].values()) for row in found]) == pytest.approx(scores)
    assert run(capsys, "predict", dense, "--file", table)[1].splitlines()[0].endswith("\tit rained\tit was wet")
    for arguments, got in (([], "neither"), (["a text", "--file", table], "both")):
        assert f"predict needs either texts or --file, got {got}" in refused(capsys, "predict", dense, *arguments)
    assert f"{table} looks like a file; --file classifies the texts in one" in run(capsys, "predict", dense, table)[2]
    assert "must end in .txt, .parquet" in refused(capsys, "predict", dense, "--file", tmp_path / "texts.doc")


def test_json_is_printed_if_it_is_asked_for_or_goes_to_a_program(capsys, monkeypatch):
    assert document(run(capsys, "doctor")[1])["cpu"] == document(run(capsys, "doctor", "--json")[1])["cpu"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = run(capsys, "doctor")[1]
    assert "sparsebert doctor" in out and '{"' not in out
    assert document(run(capsys, "doctor", "--json")[1])


@pytest.mark.parametrize(
    ("problem", "logits", "predicted"),
    [
        (MULTI_LABEL, [[3.0, -1.0], [-2.0, -0.1], [0.5, 2.0]], [["a"], [], ["a", "b"]]),
        (SINGLE_LABEL, [[3.0, -1.0], [-2.0, -0.1]], [["a"], ["b"]]),
    ],
)
def test_an_answer_names_what_is_predicted(problem, logits, predicted):
    found = answers(problem, ["a", "b"], np.array(logits, np.float32))
    assert [list(answer.predicted) for answer in found] == predicted
    assert all(0 <= score <= 1 for answer in found for score in answer.scores.values())


def test_an_answer_of_one_logit_is_that():
    assert answers(ONE_LOGIT, ["score"], np.array([[2.5]], np.float32))[0] == ({"score": 2.5}, {"score": 2.5})


def test_prune_ends_with_what_it_kept_and_the_next_command(dense, tmp_path, capsys):
    settings = ["--task", "mr", "--method", "magnitude", "--sparsity", 0.3, "-o", tmp_path / "p"]
    code, out, err = run(capsys, "prune", dense, *settings)
    found = document(out)["kept"]
    texts = data.load(data.get_task("mr"), "test", limit=500).texts
    want, got = (Engine.load(model).logits(texts) for model in (dense, tmp_path / "p"))
    assert code == 0 and found["n"] == 500
    assert found["agreement"] == pytest.approx((want.argmax(1) == got.argmax(1)).mean(), abs=0.003)
    assert found["agreement_ci"][0] < found["agreement"] <= found["agreement_ci"][1]
    kl = (softmax(want) * (np.log(softmax(want)) - np.log(softmax(got)))).sum(1).mean()
    assert found["kl"] == pytest.approx(kl, rel=0.01)
    assert f"next: sparsebert eval {tmp_path / 'p'} --task mr --vs {dense}" in err
    assert "same label as the dense model, 500 test texts" in out and "pruned in" in out
    assert "encoder.layer.0" not in out.rpartition("{")[0].partition("{")[0]
    out = run(capsys, "prune", dense, *settings, "--verbose")[1]
    assert document(out)["reused"] and "was pruned before, in" in out
    assert "bert.encoder.layer.0.attention.self.query" in out.partition("{")[0]


def test_what_cannot_be_compared_is_said(dense, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.csv").write_text("text\n" + "".join(f"a film number {i}\n" for i in range(30)))
    settings = ["--method", "magnitude", "--sparsity", 0.3, "-o", tmp_path / "p"]
    code, out, err = run(capsys, "prune", dense, "--task", tmp_path / "own", *settings)
    assert code == 0 and document(out)["kept"] is None
    assert "not compared with the dense model: task" in err and "has no test file" in err


def test_without_labels_the_next_command_is_one_that_needs_none(dense, tmp_path, capsys):
    own = tmp_path / "own.csv"
    own.write_text("text\n" + "".join(f"a film number {i}\n" for i in range(60)))
    settings = ["--task", own, "--method", "magnitude", "--sparsity", 0.3, "-o", tmp_path / "p"]
    code, out, err = run(capsys, "prune", dense, *settings)
    assert code == 0 and document(out)["kept"]["n"] > 0
    assert f"next: sparsebert bench {tmp_path / 'p'} --task {own}\n" in err


def test_eval_tells_the_dense_accuracy_the_difference_and_units(dense, tmp_path, capsys):
    other = saved(tmp_path / "other", seed=5)
    out = run(capsys, "eval", other, "--task", "mr", "--vs", dense, "--n", 50)[1]
    found = document(out)
    want = Engine.load(dense).logits(data.load(data.get_task("mr"), "test", limit=50).texts, truncate=True)
    labels = data.load(data.get_task("mr"), "test", limit=50).labels
    assert found["dense_score"] == pytest.approx((want.argmax(1) == labels).mean())
    assert found["difference"] == pytest.approx(found["accuracy"] - found["dense_score"])
    assert found["agreement_ci"][0] <= found["agreement"] <= found["agreement_ci"][1]
    table = out[: out.index('{"task"')]
    assert f"{found['dense_score']:.1%}" in table and f"{100 * found['difference']:+.1f}" in table
    assert f"[{found['kl_ci'][0]:.4f}, {found['kl_ci'][1]:.4f}]" in table
    for words in (f"accuracy of {dense.name}", "difference in points, paired", f"same label as {dense.name}"):
        assert words in table
    assert "metric" not in table and "max_length" not in table


def test_predict_says_how_many_texts_it_cuts(dense, capsys):
    code, _, err = run(capsys, "predict", dense, "a film", "good " * 2000)
    limit = Engine.load(dense).truncates_at
    assert code == 0 and f"1 of 2 texts were cut at {limit} tokens" in err
    assert "cut at" not in run(capsys, "predict", dense, "a film")[2]


def test_predict_tokenizes_a_text_once(dense, capsys, monkeypatch):
    read, rows = [], TextEncoder.rows

    def counted(self, texts, **settings):
        read.extend(texts)
        return rows(self, texts, **settings)

    Engine.load(dense)  # the golden texts are tokenized when the packed model is made
    monkeypatch.setattr(TextEncoder, "rows", counted)
    monkeypatch.setattr(TextEncoder, "exceeds", None)
    texts = ["a film", "good " * 2000]
    assert run(capsys, "predict", dense, *texts)[0] == 0 and [text for text in read if text in texts] == texts


def test_a_dry_run_says_what_is_done_and_whether_the_labels_fit(dense, tmp_path, capsys):
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(f"film {i},{'xy'[i % 2]}\n" for i in range(300)))
    settings = ["--task", tmp_path / "own.csv", "--method", "magnitude", "-o", tmp_path / "p"]
    _, out, err = run(capsys, "prune", dense, *settings, "--dry-run")
    assert document(out)["done"] == "" and "prune needs no labels, but eval would say: " in err and "negative" in err
    found = document(run(capsys, "prune", dense, *settings)[1])
    assert found["output"] == str(tmp_path / "p") and found["resumed"] == ""
    _, out, _ = run(capsys, "prune", dense, *settings, "--dry-run")
    assert document(out)["done"] == "finished" and "all of it" in out
    line = refused(capsys, "prune", dense, *settings, "--sparsity", 0.5, "--dry-run")
    assert line == refused(capsys, "prune", dense, *settings, "--sparsity", 0.5)


def test_arguments_in_each_other_s_place_are_told(dense, tmp_path, capsys):
    (own := tmp_path / "own.csv").write_text("text,label\na,0\nb,1\n")
    assert "is a model directory, not a task" in refused(capsys, "eval", dense, "--task", dense)
    assert "is a file; files of texts are for --task or --file" in refused(capsys, "eval", own, "--task", "mr")


def test_a_percentage_is_told_how_to_be_a_share(dense, tmp_path, capsys):
    settings = ["--task", "mr", "-o", tmp_path / "p", "--sparsity", 87.5]
    assert "for 87.5 % write --sparsity 0.875" in refused(capsys, "prune", dense, *settings)


def test_a_slip_in_the_name_of_a_directory_is_told(dense, capsys):
    slip = dense.with_name("dnese")
    assert f"did you mean {dense}?" in refused(capsys, "predict", slip, "a text")
    (file := dense.with_name("mine.csv")).write_text("text,label\na,b\n")
    line = refused(capsys, "eval", dense, "--task", file.with_name("mine.cvs"))
    assert "there is no file, folder or task" in line and f"did you mean {file}?" in line


def test_standard_input_is_read_as_a_file_is(dense, capsys, monkeypatch):
    def given(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))

    given(b"\xef\xbb\xbfa gripping film\r\n")
    want = run(capsys, "predict", dense, "a gripping film")[1]
    assert run(capsys, "predict", dense, "-")[1] == want
    for raw, says in (
        ("a film\n".encode("utf-16"), "must be UTF-8, is UTF-16"),
        (b"a\0b\n", "line 1: must be text, has a NUL"),
        (b"ok\n\xff\n", "line 2: must be UTF-8, has byte 0xff"),
        (b"a\rb\r", "end with carriage returns"),
        (b"\n \n", "must hold at least one line"),
    ):
        given(raw)
        assert "standard input" in (line := refused(capsys, "predict", dense, "-")) and says in line
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refused(capsys, "predict", dense, "-")


def test_a_terminal_that_lacks_a_character_gets_its_code(dense):
    code = start("predict", dense, "é", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = code.communicate(timeout=60)
    assert code.returncode == 0 and out.endswith("\\xe9\n"), err


def of_reviews(path: Path) -> list:
    """Writes a file with columns of other names, and returns the flags that name it and them."""
    rows = [f"a {('dull', 'gripping')[i % 2]} film number {i},words {i},{data.SENTIMENT[i % 2]}" for i in range(60)]
    path.write_text("review,other words,stars\n" + "\n".join(rows) + "\n")
    return ["--task", path, "--text-column", "review", "--label-column", "stars"]


def test_every_command_with_a_task_takes_the_names_of_its_columns():
    commands = typer.main.get_command(app).commands
    taking = {
        name: {flag for parameter in command.params for flag in parameter.opts} for name, command in commands.items()
    }
    with_task = {name for name, flags in taking.items() if "--task" in flags}
    assert with_task == {"train", "prune", "quantize", "soup", "eval", "attack", "bench"}
    assert all({"--text-column", "--label-column"} <= taking[name] for name in with_task)


def test_named_columns_go_through_every_command_and_into_the_next_one(dense, tmp_path, capsys):
    own = of_reviews(tmp_path / "own.csv")
    told = " ".join(map(str, own))
    small = ["--batch-size", 4, "--hold-out", 8, "--epochs", 1]
    code, _, err = run(capsys, "train", dense, *own, *small, "-o", tmp_path / "m")
    assert code == 0 and f"next: sparsebert prune {tmp_path / 'm'} {told} -o {tmp_path / 'm'}-sparse\n" in err
    recipe = checkpoint.read_recipe(tmp_path / "m")
    assert (recipe["task"], recipe["text_column"], recipe["label_column"]) == (str(own[1]), ["review"], "stars")
    magnitude = ["--method", "magnitude", "--sparsity", 0.3, "-o", tmp_path / "p"]
    code, _, err = run(capsys, "prune", tmp_path / "m", *own, *magnitude)
    assert code == 0 and f"next: sparsebert eval {tmp_path / 'p'} {told} --vs {tmp_path / 'm'}\n" in err
    code, out, err = run(capsys, "eval", tmp_path / "p", *own, "--vs", tmp_path / "m")
    assert code == 0 and document(out)["n"] > 0 and f"next: sparsebert bench {tmp_path / 'p'} {told}\n" in err
    few = ["--calibration", "none", "--calibration-tokens", 64]
    code, _, err = run(capsys, "quantize", tmp_path / "p", *own, *few, "-o", tmp_path / "q")
    assert code == 0 and f"next: sparsebert eval {tmp_path / 'q'} {told} --vs {tmp_path / 'm'}\n" in err
    code, out, _ = run(capsys, "bench", tmp_path / "p", *own, "--n", 4, "--rounds", 2, "--rivals", "none")
    assert code == 0
    code, out, _ = run(capsys, "soup", tmp_path / "m", *own, "--score", "accuracy", "-o", tmp_path / "s")
    assert code == 0 and checkpoint.read_recipe(tmp_path / "s")["label_column"] == "stars"
    without = ["--attack", "deepwordbug", "--sentence-encoder", "none", "--ledger", tmp_path / "ledger"]
    code, out, _ = run(capsys, "attack", tmp_path / "p", *own, *without)
    assert code == 0 and document(out)["n"] > 0


def test_work_on_another_column_is_other_work(dense, tmp_path, capsys):
    own = of_reviews(tmp_path / "own.csv")
    named = ["--task", own[1], "--text-column"]
    settings = ["--calibration", "none", "--calibration-tokens", 64, "-o", tmp_path / "q"]
    assert run(capsys, "quantize", dense, *named, "review", *settings)[0] == 0
    assert "--overwrite" in refused(capsys, "quantize", dense, *named, "other words", *settings)
    assert document(run(capsys, "quantize", dense, *named, "review", *settings)[1])["reused"]


def test_an_attack_on_another_column_is_not_taken_from_the_ledger(dense, tmp_path, capsys):
    own = of_reviews(tmp_path / "own.csv")
    attack = ["attack", dense, *own[:2], "--label-column", "stars", "--attack", "deepwordbug"]
    attack += ["--sentence-encoder", "none", "--ledger", tmp_path / "ledger"]
    for column, prefix in (("review", "a "), ("other words", "words ")):
        assert run(capsys, *attack, "--text-column", column, "-o", tmp_path / f"{prefix[0]}.parquet")[0] == 0
        rows = pq.read_table(tmp_path / f"{prefix[0]}.parquet").to_pylist()
        assert all(row["original"].startswith(prefix) for row in rows)


def test_columns_are_named_for_predict_too(dense, tmp_path, capsys):
    path = of_reviews(tmp_path / "own.csv")[1]
    code, out, _ = run(capsys, "predict", dense, "--file", path, "--text-column", "other words")
    assert code == 0 and [line.split("\t")[1] for line in out.splitlines()] == [f"words {i}" for i in range(60)]
    line = refused(capsys, "predict", dense, "--file", path)
    assert "has 'review', 'other words', 'stars'; name the column: --text-column review" in line
    assert "--text-column is of a --file, none is given" in refused(capsys, "predict", dense, "a", "--text-column", "x")


def test_the_next_command_is_one_that_the_labels_of_the_file_allow(dense, tmp_path, capsys, monkeypatch):
    own = tmp_path / "own.csv"
    own.write_text("text,label\n" + "".join(f"a film number {i},{('apple', 'pear')[i % 2]}\n" for i in range(60)))
    monkeypatch.chdir(tmp_path)
    settings = ["--task", own, "--method", "magnitude", "--sparsity", 0.3, "--output=-sparse"]
    code, _, err = run(capsys, "prune", dense, *settings)
    assert code == 0 and f"next: sparsebert bench ./-sparse --task {own}\n" in err
    line = refused(capsys, "eval", tmp_path / "-sparse", "--task", own)
    assert "--labels NAME,NAME " in line, "the order of the names is the reader's to know"
