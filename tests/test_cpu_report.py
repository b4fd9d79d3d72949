"""bench/cpu_report: the rows of its table, and the page that they go to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import cpu_report, harness
from bench.bench_end_to_end import Size
from bench.tables import RESULTS
from sparsebert.cli import timing
from sparsebert.engine import rivals
from sparsebert.engine.formats import DTYPES
from sparsebert.errors import UnsupportedError
from sparsebert.ops import _dispatch

TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
LOGITS = np.float32([[0.5, -1.0]])


def not_installed(work):
    raise UnsupportedError("this rival needs the package openvino", fix="install it")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.SHAPES, "minilm", ("Bert", TINY))
        patch.setitem(rivals.RIVALS, "openvino", rivals.RIVALS["openvino"]._replace(prepare=not_installed))
        sizes = (Size(1, "8", 2), Size(3, "mix", 4))
        rows, complete = cpu_report.report("minilm", sizes, ["openvino", "torch"], 1, (2, 2), cpu_report.Clock(0))
    assert complete
    return rows


def test_every_size_has_a_row_of_each_of_our_models_and_each_rival(rows):
    ours = [("fp32", "dense"), ("fp32", "unstructured"), ("fp32", "32x1"), ("bf16", "32x1"), ("int8", "dense")]
    ours += [("int8", "4x1"), ("int8", "32x1")]
    if not DTYPES["bf16"].has_kernel(_dispatch.isa()):
        ours.remove(("bf16", "32x1"))
    for size in ((1, "8"), (3, "mix")):
        of_size = [row for row in rows if (row.get("batch"), row.get("seq")) == size]
        kinds = [(row["engine"], row["dtype"], row["pattern"]) for row in of_size]
        assert kinds == [*(("sparsebert", *kind) for kind in ours), ("torch", "fp32", "dense")]
        assert all(row["output"] == "matches" and row["ms"] > 0 and row["rounds"] == 2 for row in of_size)
        assert all(row["sparsity"] == (0 if row["pattern"] == "dense" else 0.9) for row in of_size)
        assert all(row["torch"] == f"{row['ratios']['torch'].value:.2f}x" for row in of_size)
        assert of_size[-1]["ratios"]["torch"].value == 1
    assert all(row["error"] < 1e-5 for row in rows if row["engine"] != "openvino" and row["dtype"] == "fp32")
    assert all(row["error"] > 0 for row in rows if row["dtype"] == "int8")


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (60, 5)])
def test_rounds_are_between_the_fewest_and_the_most_as_time_allows(seconds, rounds):
    candidates = [
        cpu_report.Candidate(name, "fp32", "dense", lambda i: LOGITS, [LOGITS]) for name in ("torch", "openvino")
    ]
    rows = cpu_report.measure(Size(1, "8", 1), range(1), candidates, 1, (3, 5), seconds)
    assert [(row["engine"], row["rounds"]) for row in rows] == [(name, rounds) for name in ("torch", "openvino")]


def test_a_rival_that_is_not_installed_is_named(rows):
    assert rows[-1] == {
        "engine": "openvino", "dtype": "fp32", "output": "not installed",
        "why": "this rival needs the package openvino; install it",
    }  # fmt: skip
    assert [row["engine"] for row in rows].count("openvino") == 1
    assert "not timed: openvino." in cpu_report.notes("minilm", 1, 0.5, rows)


def test_a_wrong_output_of_ours_is_refused_and_of_a_rival_is_told():
    def candidate(engine: str, off: float) -> cpu_report.Candidate:
        return cpu_report.Candidate(engine, "fp32", "dense", lambda i: LOGITS + off, [LOGITS])

    size = Size(1, "8", 1)
    for off in (0.1, float("nan")):
        with pytest.raises(harness.WrongOutput, match="sparsebert fp32, dense is off by"):
            cpu_report.checked(size, range(1), candidate("sparsebert", off))
        assert cpu_report.checked(size, range(1), candidate("torch", off))[1] is False
    assert cpu_report.checked(size, range(1), candidate("sparsebert", 0.0)) == (0.0, True)


def test_a_page_is_named_after_its_processor(monkeypatch):
    monkeypatch.delenv("SPARSEBERT_ISA", raising=False)
    page = cpu_report.page_of("Intel(R) Xeon(R) Processor @ 2.10GHz (family 6, model 143)")
    assert page == RESULTS / "cpu" / "intel-xeon-processor-2-10ghz-family-6-model-143.md"
    monkeypatch.setenv("SPARSEBERT_ISA", "avx2")
    assert cpu_report.page_of("AMD EPYC (family 25, model 17)").name == "amd-epyc-family-25-model-17-avx2.md"


def test_rivals_are_calibrated_on_as_many_sentences_as_random_words():
    def numbers(count: int, sentences: list[int]) -> list[int]:
        padded = [{"input_ids": torch.tensor([[i]])} for i in range(count)]
        return [int(batch["input_ids"][0, 0]) for batch in cpu_report.with_more_sentences(padded, sentences)]

    assert numbers(5, [4]) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert numbers(2, []) == [0, 1] and numbers(2, [0, 1]) == [0, 1] and numbers(2, [1]) == [0, 1]
