"""The cells of bench/study_pruning: each is computed once, and the ledger keeps them if their file is torn. A bench
that builds an engine of its own still gives torch's logits.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bench import bench_sparse_encoder, bench_sparse_matmul, study_frontier, study_hans, study_pruning
from bench.shapes import LINEARS
from bench.study_pruning import Cells, shared, summary
from sparsebert.config import PruneConfig
from sparsebert.errors import InputError

FIGURES = {"kl_to_dense": 0.2, "accuracy": 0.9, "difference": 0.0, "agreement": 1.0, "sparsity": 0.5}


def identity(**change) -> dict:
    fields = {"task": "mr", "dense": "a", "weights": "w", "draw": 0, "tokens": 100, "config": {"method": "obs"}}
    return fields | change


def test_a_cell_is_computed_once_by_one_version_of_the_code(tmp_path, monkeypatch):
    computed = []

    def once(**change):
        return Cells(tmp_path / "c.jsonl").once(identity(**change), lambda: computed.append(1) or dict(FIGURES))

    assert once() == once() and len(computed) == 1
    once(draw=1)
    once(config={"method": "obs", "sparsity": 0.5})
    assert len(computed) == 3
    monkeypatch.setattr(study_pruning, "VERSION", "another")
    assert once()["code"] == "another" and len(computed) == 4
    assert len(Cells(tmp_path / "c.jsonl").of(draw=0, config={"method": "obs"})) == 1  # the later one counts


def test_settings_share_layers_where_only_what_follows_them_differs():
    def layers(draw=0, **fields):
        return study_pruning._of_layers(identity(draw=draw, config=fields), PruneConfig(seed=draw, **fields))

    whole = layers(method="knowledge", tier=2)
    assert whole == layers(method="knowledge", tier=1) == layers(method="knowledge", tier=2, without="perturb")
    others = [{"tier": 0}, {"tier": 2, "without": "outputs"}, {"tier": 2, "sparsity": 0.5}, {"tier": 2, "draw": 1}]
    assert whole not in [layers(method="knowledge", **fields) for fields in others]
    assert layers(method="adaptive") != layers(method="adaptive", as_published=True)


def test_groups_are_compared_with_unstructured_zeros_in_the_same_cell():
    def cell(weights, kl, **more):
        return identity(weights=weights) | FIGURES | {"kl_to_dense": kl} | more

    int8 = {"kl_to_dense": 0.41, "accuracy": 0.89, "agreement": 1.0, "difference": 0.0}
    rows = summary(
        {
            (study_pruning.UNSTRUCTURED, "a"): [cell("v", 0.1), cell("w", 0.2), cell("x", 9.0)],
            ("4x1", "a"): [cell("v", 0.4, int8=int8), cell("w", 0.2)],
        }
    )
    assert "over" not in rows[0] and "int8 kl" not in rows[0]
    assert rows[1]["over"] == pytest.approx(2.0)
    assert rows[1]["int8 kl"] == pytest.approx(0.01) and rows[1]["int8 change"] == pytest.approx(-1.0)


def test_a_torn_file_of_cells_is_refused_and_its_ledger_has_them_all(tmp_path):
    path = tmp_path / "c.jsonl"
    for draw in (0, 1):
        Cells(path).once(identity(draw=draw), lambda: dict(FIGURES))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"c\.jsonl must hold finished cells, one JSON object per line"):
        Cells(path)
    path.unlink()
    Cells(path).once(identity(draw=2), lambda: dict(FIGURES))
    assert [cell["draw"] for cell in Cells(path).of(task="mr")] == [0, 1, 2]


def test_ratios_are_taken_within_a_cell_and_weigh_dense_models_alike():
    def cell(weights, draw, kl):
        return {**identity(weights=weights, draw=draw), **FIGURES, "kl_to_dense": kl}

    base = [cell("v", 0, 0.1), cell("v", 1, 0.4), cell("w", 0, 0.2)]
    other = [cell("v", 0, 0.2), cell("v", 1, 0.2), cell("w", 0, 0.8), cell("w", 5, 9.0)]
    rows = summary({("s", "adaptive"): base, ("s", "obs"): other})
    assert [row["method"] for row in rows] == ["adaptive", "obs"]
    np.testing.assert_allclose([row["ratio"] for row in rows], [1.0, 2.0])  # 1 for v, 4 for w
    assert "low" not in rows[1]
    rows = summary({("s", "adaptive"): [*base, cell("x", 0, 0.1)], ("s", "obs"): [*other, cell("x", 0, 0.2)]})
    assert rows[1]["low"] < rows[1]["ratio"] < rows[1]["high"]


def test_the_base_has_no_interval_over_itself_with_int8_or_without():
    int8 = {"kl_to_dense": 0.41, "accuracy": 0.89, "agreement": 1.0, "difference": 0.0}
    for more in ({}, {"int8": int8}):
        cells = [identity(weights=weights) | FIGURES | more for weights in ("v", "w", "x")]
        base, other = summary({("s", study_pruning.BASE): cells, ("s", "obs"): cells})
        assert "low" not in base and "low" in other
        assert (base["method"], other["method"]) == (study_pruning.BASE, "obs")


def test_the_frontier_is_of_single_texts(monkeypatch, capsys):
    """Its engines and rivals would see the first text of a pair alone."""
    monkeypatch.setattr(sys, "argv", ["study_frontier", "DENSE", "MODEL", "--task", "mnli"])
    with pytest.raises(SystemExit):
        study_frontier.main()
    assert "--task must have single texts, mnli has pairs" in capsys.readouterr().err


def test_models_of_hans_are_told_apart_by_their_names():
    named = {
        "mnli-ce-0-0123456789ab": ("ce", "", 0),
        "mnli-reweight-mean-12-0123456789ab": ("reweight-mean", "", 12),
        "mnli-poe-3-0123456789ab-at-0.14": ("poe", " at 0.14", 3),
    }
    assert {name: study_hans.kind_of(name) for name in named} == named
    for wrong in ("mnli-ce", "mnli-ce-at-0.14", "mnli-ce-0-0123456789ab.teacher"):
        with pytest.raises(InputError, match=f"mnli-LOSS-SEED-SETTINGS, got {wrong}"):
            study_hans.kind_of(wrong)


def test_a_loss_is_compared_with_cross_entropy_after_as_many_steps():
    figures = dict.fromkeys(study_hans.FIGURES, 0.5)
    found = {
        ("ce", ""): {seed: figures for seed in (0, 1)},
        ("poe", ""): {seed: dict.fromkeys(study_hans.FIGURES, 0.7) for seed in (0, 1)},
        ("ce", " at 0.14"): {seed: dict.fromkeys(study_hans.FIGURES, 0.4) for seed in (0, 1)},
        ("poe", " at 0.14"): {seed: figures for seed in (0, 1)},
    }
    over = {row["loss"]: row.get("over_ce") for row in study_hans.rows_of(found)}
    assert over == {"ce": None, "ce at 0.14": None, "poe": pytest.approx(0.2), "poe at 0.14": pytest.approx(0.1)}


def test_drift_away_from_the_task_is_of_the_cells_that_measured_it():
    far = {"longer texts": {"kl": 0.4}, "general texts": {"kl": 0.1}}
    cells = [{**identity(draw=draw), **FIGURES} for draw in (0, 1)]
    assert "kl longer texts" not in summary({("s", "obs"): cells})[0]
    row = summary({("s", "obs"): [*cells, {**cells[0], "outside": far}]})[0]
    assert (row["kl longer texts"], row["kl general texts"], row["cells"]) == (0.4, 0.1, 3)


def test_rungs_are_of_the_same_cells_and_each_setting_has_one():
    cells = {name: [identity(weights=w, draw=d) for w, d in places] for name, places in {
        "whole": [("v", 0), ("v", 1), ("w", 0)], "some": [("w", 0), ("v", 0)], "few": [("v", 0), ("x", 0)],
    }.items()}  # fmt: skip
    assert all([(c["weights"], c["draw"]) for c in found] == [("v", 0)] for found in shared(cells).values())
    configs = [config for _, _, config in study_pruning.settings("ladder")]
    assert all(configs.count(config) == 1 for config in configs)


def test_the_bench_of_the_encoder_times_what_gives_the_logits_of_torch():
    rows = bench_sparse_encoder.measure(bench_sparse_encoder.QUICK_CASES[0], threads=1, rounds=1)
    assert rows and all(0 <= row["error"] < bench_sparse_encoder.TOLERANCE for row in rows)


def test_the_bench_of_linears_times_int8_against_unstructured_float32():
    case = bench_sparse_matmul.Case(LINEARS[0], "4x1", 0.9, 128)
    rows = bench_sparse_matmul.measure(case, threads=1, rounds=1)
    assert {row["dtype"] for row in rows} >= {"fp32", "int8"}
    for row in rows:
        assert (row["over_fp32"] is not None) == (row["dtype"] == "int8") and row["over_fp32_low"] is None
        assert row["dtype"] == "bf16" or 0 < row["error"] < bench_sparse_matmul.TOLERANCE
    for case in bench_sparse_matmul.CASES:
        assert ("int8" in {kind.dtype for kind in bench_sparse_matmul.kinds(case)}) == (
            case.sparsity == 0.9 and case.tokens == 128
        )
