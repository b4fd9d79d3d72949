"""The study `adaptive`: its grid, its cells, and what it reports."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from models import classifier, saved

from sparsebert import checkpoint, data
from sparsebert.cli import main
from sparsebert.errors import InputError
from sparsebert.robustness import attacks
from sparsebert.robustness.distances import distances
from sparsebert.study import adaptive, planned, publish_adaptive, read_adaptive, read_only, run_adaptive
from sparsebert.study.adaptive_grid import Cell
from sparsebert.study.adaptive_report import left_out, points, sections_of
from sparsebert.study.pages import percent
from sparsebert.study.run import Outcome
from sparsebert.training import soup

QUICK = {"n": 40, "batch_size": 8, "precision": "fp32", "hold_out": 40}
SMALL = {
    "tasks": {
        "mr": {
            "n": 12,
            "attack_seconds": 2,
            "train": {**QUICK, "steps": 3},
            "dense": {
                "a": {"seed": 0},
                "b": {"seed": 1, "adversarial": "freelb", "ascent_steps": 1},
                "both": {"members": ["a", "b"]},
            },
            "prune": {**QUICK, "steps": 10, "lr": 1e-2, "calibration_tokens": 300, "wanda": {"calibration": ["none"]}},
        }
    },
    "cells": [
        {"task": "mr", "dense": ["both", "a"]},
        {"task": "mr", "dense": "both", "method": "magnitude", "sparsity": 0.5, "controls": True, "distances": True},
        {"task": "mr", "dense": "a", "method": "magnitude", "sparsity": 0.5},
        {"task": "mr", "dense": "a", "method": "wanda", "pattern": "16:32", "int8": True},
        {"task": "mr", "dense": "a", "method": ["imp", "imp-rw"], "sparsity": 0.5, "adversarial": "freelb"},
    ],
}


@pytest.fixture(autouse=True)
def few_are_attacked_for_a_soup(monkeypatch):
    monkeypatch.setattr(sys.modules[soup.__module__], "ATTACKED", 10)


def written(folder, start, **changes):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"model": str(start), **SMALL, **changes}))
    return path


def test_the_packaged_grid_has_the_papers_tables():
    grid = read_adaptive("adaptive")
    of_task = {task: [cell for cell in grid.cells if cell.task == task] for task in ("sst2", "agnews", "imdb")}
    for task, cells in of_task.items():
        models = {cell.dense for cell in cells if cell.method == "dense"}
        assert len(models) >= (5 if task == "sst2" else 2), task
        configs = [grid.train_config(task, name) for name in models if grid.members(task, name) is None]
        assert any(config.adversarial == "freelb" for config in configs), task
        assert any(grid.members(task, name) for name in models), task
        methods = {(cell.method, cell.adversarial) for cell in cells}
        for method in ("magnitude", "imp", "imp-rw", "soft-movement", "wanda", "sparsegpt", "adaptive", "knowledge",
                       "robust-ticket", "bag-of-tricks", "rmc", "super-ticket", "early-robust"):  # fmt: skip
            assert (method, "none") in methods, (task, method)
        assert ("imp", "freelb") in methods
        zeros = {round(cell.zeros, 3) for cell in cells}
        assert {0.0, 0.3, 0.5, 0.875, 0.95} <= zeros and {"32:64", "4x1"} <= {cell.pattern for cell in cells}
    assert any(cell.controls for cell in grid.cells) and any(cell.distances for cell in grid.cells)


def test_a_study_runs_reports_and_is_not_run_twice(tmp_path, encoder, monkeypatch):
    grid = read_adaptive(str(written(tmp_path, encoder)))  # imp-rw goes back to it
    outcome = run_adaptive(grid, tmp_path / "out")
    assert [cell for cell, _ in outcome.done] == grid.cells and not outcome.left_out
    assert not list((tmp_path / "out/models").glob("cell-*")), "pruned models are not kept"
    results = {cell.label + cell.dense: result for cell, result in outcome.done}
    controlled = results["magnitudeboth"]
    assert set(controlled["forms"]) == {"fp32", "matched"} and len(controlled["distances"]["original"]) == 2
    figures = controlled["forms"]["fp32"]["attacks"]
    assert set(figures) == {"textfooler", "random-synonym"} and figures["textfooler"]["n"] == 12
    assert {"difference", "difference_ci", "from_dense", "to_dense", "queries"} <= set(figures["textfooler"])
    assert set(results["wanda, 16:32a"]["forms"]) == {"fp32", "int8"}
    assert results["imp-rw + FreeLBa"]["sparsity"] == pytest.approx(0.5, abs=1e-3)

    with contextlib.closing(sqlite3.connect(tmp_path / "out/attacks.sqlite")) as book:
        (limits,) = book.execute("select distinct json_extract(inputs, '$.max_seconds') from units").fetchall()
    assert limits == (None,), "a slow model must not pass for a robust one"

    document = publish_adaptive(grid, outcome, tmp_path / "out", tmp_path / "table.md")
    json.dumps(document)
    monkeypatch.chdir(tmp_path)
    given = replace(grid, given="grids/g.yaml")
    publish_adaptive(given, outcome, tmp_path / "out", Path("t.md"), ["--budget 0.5", "--only dense=a"])
    said = "`sparsebert study adaptive --grid grids/g.yaml --budget 0.5 --only dense=a -o DIR --markdown t.md`"
    assert said in Path("t.md").read_text()
    shown = (tmp_path / "table.md").read_text()
    for title in ("## mr\n", "## mr: dense models", "## Controls", "## First token"):
        assert title in shown
    assert (
        "| magnitude, both | 50.00 | 1 |" in shown
        and "| magnitude | 50.00 | 1 |" in shown
        and "| wanda, 16:32 in int8 | 5" in shown
    )
    assert (tmp_path / "out/report.html").read_text().startswith("<!doctype html>")
    rows = pyarrow.parquet.read_table(tmp_path / "out/cells.parquet").to_pylist()
    assert [row["form"] for row in rows].count("int8") == 1 and len(rows) == 7 + 2

    begun = []
    again = run_adaptive(grid, tmp_path / "out", progress=lambda done, total, what="": begun.append(what))
    assert set(begun) == {"cells"} and again.done == outcome.done


def test_the_packaged_grid_of_what_is_kept_has_three_models_two_draws_and_unseen_domains():
    grid = read_adaptive("keeping")
    pruned = [cell for cell in grid.cells if cell.method != "dense"]
    for setting in {cell.label + str(cell.zeros): cell.setting for cell in pruned}.values():
        same = [cell for cell in pruned if cell.setting == setting]
        assert {(cell.dense, cell.draw) for cell in same} == {(f"plain-{i}", draw) for i in range(3) for draw in (0, 1)}
    assert all(cell.domains and set(cell.attacks_of) == {"textfooler", "deepwordbug", "pwws"} for cell in grid.cells)
    assert {cell.zeros for cell in pruned if cell.method == "knowledge"} == {0.875, 0.95}


def test_the_packaged_grid_of_tier_2_shares_the_dense_cells_of_keeping_and_differs_in_the_tier():
    keeping, grid = read_adaptive("keeping"), read_adaptive("keeping-tier2")
    assert grid.tasks["sst2"].model_copy(update={"prune": {}}) == keeping.tasks["sst2"]
    dense = [cell for cell in grid.cells if cell.method == "dense"]
    pruned = [cell for cell in grid.cells if cell.method != "dense"]
    assert dense == [cell for cell in keeping.cells if cell.method == "dense"]
    wanted = [cell for cell in keeping.cells if cell.label == "knowledge" and cell.zeros == 0.875]
    assert {(cell.dense, cell.draw) for cell in pruned} == {(cell.dense, cell.draw) for cell in wanted}
    assert all(grid.prune_configs(cell)[0].tier == 2 for cell in pruned)


def test_what_is_kept_in_other_domains_and_under_attacks_is_told_over_models_and_draws(tmp_path, start, monkeypatch):
    texts = [f"the {word} lamp number {i}" for i in range(10) for word in ("lovely", "awful")]
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    made = pyarrow.table({"text": texts, "label": [1, 0] * 10})
    pyarrow.parquet.write_table(made, tmp_path / "data" / "sst2" / "dev.parquet")
    monkeypatch.setenv("SPARSEBERT_DATA", str(tmp_path / "data"))
    asked = {"task": "mr", "domains": True, "attacks": "deepwordbug"}
    cells = [
        {**asked, "dense": ["a", "b"], "method": "wanda", "sparsity": 0.5, "draw": [0, 1], "calibration": "general"}
    ]
    grid = read_adaptive(str(written(tmp_path, start, cells=cells)))
    assert grid.prune_configs(grid.cells[1])[0].calibration == ("general",)
    outcome = run_adaptive(grid, tmp_path / "out")
    drawn = [result["forms"]["fp32"] for _, result in outcome.done]
    assert len(drawn) == 4 and set(drawn[0]["attacks"]) == {"textfooler", "deepwordbug"}
    assert len({form["domains"]["sst2"]["kl_to_dense"] for form in drawn}) == 4, "draws differ"
    (section,) = [each for each in sections_of(grid, outcome) if each.title.startswith("Kept")]
    told = dict(zip(section.heads, section.rows[0], strict=True))
    assert told["method"] == "wanda, calibration general" and told["dense models"] == "2, 4 cells"
    first = dict(zip(sections_of(grid, outcome)[0].heads, sections_of(grid, outcome)[0].rows[0], strict=True))
    by_model = [(drawn[i]["difference"] + drawn[i + 1]["difference"]) / 2 for i in (0, 2)]  # over the draws of each
    assert first["dense models"] == "2, 4 cells" and first["Acc - dense"] == points(by_model, None)
    mean = sum(form["domains"]["sst2"]["kl_to_dense"] for form in drawn) / 4
    assert told["sst2: KL"] == f"{mean:.4f}" and told["deepwordbug: Aua - dense"].count("[") == 1


class Killed(Exception):
    """Stands for a kill in the middle of a cell."""


def test_a_killed_cell_goes_on_with_the_examples_it_had_not_attacked(tmp_path, start, monkeypatch):
    cells = SMALL["cells"][2:3]
    grid = read_adaptive(str(written(tmp_path, start, cells=cells)))
    whole = run_adaptive(grid, tmp_path / "whole").done

    def kill(done, total, what=""):
        if what.startswith("attack textfooler") and done == total:
            raise Killed

    with pytest.raises(Killed):
        run_adaptive(grid, tmp_path / "out", progress=kill)
    calls, original = [], attacks.run.__globals__["_claimed"]

    def claimed(book, units, code):
        calls.extend(units)
        return original(book, units, code)

    monkeypatch.setitem(attacks.run.__globals__, "_claimed", claimed)
    resumed = run_adaptive(grid, tmp_path / "out").done
    assert len(calls) == 12, "the dense model's examples: the other model's are in the ledger"

    def told(done):
        found = json.loads(json.dumps([result["forms"] for _, result in done]))
        for forms in found:
            for form in forms.values():
                for each in form["attacks"].values():
                    del each["seconds"]
        return found

    assert told(resumed) == told(whole)


def test_a_budget_takes_the_first_cells_and_lists_the_others(tmp_path, start):
    grid = read_adaptive(str(written(tmp_path, start)))
    rows = planned(grid, hours=1e-9)
    assert [row["label"] for row in rows] == [cell.label for cell in grid.cells]
    assert not any(row["runs"] for row in rows) and all(row["seconds"] >= 2 for row in rows)
    first = rows[0]["seconds"], rows[1]["seconds"]
    assert first[0] >= 2 + 3 * 2 and first[1] == 2, "the soup's cell makes both members and scores three averages"
    outcome = run_adaptive(grid, tmp_path / "out", hours=0.0)
    assert not outcome.done and outcome.left_out == grid.cells
    assert left_out(outcome)[:2] == ["mr: dense 0, of both, a", "mr: magnitude 0.5, of both, a"]
    assert sections_of(grid, outcome) == []


def test_only_the_cells_that_are_asked_for_are_run(tmp_path, start):
    grid = read_adaptive(str(written(tmp_path, start)))
    only = read_only(["method=dense,magnitude", "dense=a"], grid.cells)
    outcome = run_adaptive(grid, tmp_path / "out", only=only)
    assert [(cell.method, cell.dense) for cell, _ in outcome.done] == [("dense", "a"), ("magnitude", "a")]
    for text in ("controls=true", "sparsity=0.5"):
        assert read_only([text], grid.cells)(grid.cells[2]), text
    assert [cell for cell in grid.cells if read_only(["sparsity=null"], grid.cells)(cell)] == [
        cell for cell in grid.cells if cell.sparsity is None
    ]
    twice = [Cell(task="mr", dense="a", attacks=more) for more in ("", "pwws,pso")]
    assert list(map(read_only(["attacks=pwws,pso"], twice), twice)) == [False, True]


@pytest.mark.parametrize(
    ("filters", "match"),
    [
        (["speed=1"], "only must be FIELD=VALUE,… of task, dense"),
        (["method"], "only must be FIELD=VALUE,… of task, dense"),
        (["sparsity=0.5,0.9"], "no cell has sparsity=0.9.*0.5, null"),
        (["method=dense", "sparsity=0.5"], "no cell has all of method=dense, sparsity=0.5"),
    ],
)
def test_filters_that_no_cell_passes_are_refused(tmp_path, start, filters, match):
    with pytest.raises(InputError) as caught:
        read_only(filters, read_adaptive(str(written(tmp_path, start))).cells)
    assert re.search(match, str(caught.value))


def test_a_dry_run_prints_the_plan_and_makes_nothing(tmp_path, start, capsys):
    path = written(tmp_path, start)
    command = ["study", "adaptive", "--grid", str(path), "-o", str(tmp_path / "out"), "--dry-run", "--budget", "1"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["cells"]) == 7 and document["seconds"] > 14 and not (tmp_path / "out").exists()
    assert main([*command, "--only", "method=imp"]) == 0
    assert "1 of 1 cells, about" in capsys.readouterr().out


def test_soups_and_models_are_judged_on_no_reported_example(tmp_path, start, monkeypatch):
    seen, original = [], attacks.run

    def run(victim, plan, examples, *more):
        seen.append(examples)
        return original(victim, plan, examples, *more)

    monkeypatch.setattr(attacks, "run", run)
    grid = read_adaptive(str(written(tmp_path, start)))
    adaptive.dense_model(grid, "mr", "both", tmp_path / "models", lambda *_: None, False)
    held = data.hold_out(data.training(data.get_task("mr")), 40)[1]
    assert len(seen) == 3 and all(set(each.texts) <= set(held.texts) for each in seen)


def test_a_change_of_any_setting_of_a_cell_is_other_work(tmp_path, start):
    def inputs(**changes):
        tasks = {"mr": {**SMALL["tasks"]["mr"], **changes}}
        return [each for _, each in adaptive.inputs_of(read_adaptive(str(written(tmp_path, start, tasks=tasks))))]

    before = inputs()
    assert inputs(attack_seconds=9) == before
    assert all(a != b for a, b in zip(inputs(n=13), before, strict=True))
    other = inputs(prune={**SMALL["tasks"]["mr"]["prune"], "wanda": {"calibration": ["general"]}})
    assert [a != b for a, b in zip(other, before, strict=True)] == [False] * 4 + [True, False, False]
    other = inputs(dense={**SMALL["tasks"]["mr"]["dense"], "b": {"seed": 7}})
    assert [a != b for a, b in zip(other, before, strict=True)] == [True, False, True] + [False] * 4


def test_hidden_states_are_compared_layer_by_layer(tmp_path, start):
    texts = ["a fine film", "dull and long", "so so"]
    assert distances(start, start, texts) == pytest.approx([0, 0], abs=1e-6)
    model = classifier()
    model.bert.encoder.layer[1].output.LayerNorm.weight.data *= -1
    other = saved(tmp_path / "other", model)
    first, second = distances(other, start, texts)
    assert first == pytest.approx(0, abs=1e-6) and second > 0.5
    one, _ = distances(saved(tmp_path / "third", seed=3), start, texts[:1])
    many = [distances(tmp_path / "third", start, [text])[0] for text in texts]
    assert distances(tmp_path / "third", start, texts)[0] == pytest.approx(sum(many) / 3, abs=1e-5) and one == many[0]
    assert checkpoint.load(start)


def result(aua: float, variant: str = "v", transferred: float = 0.5) -> dict:
    """Of a cell that was run."""
    attack = {"variant": variant, "acc": 0.9, "aua": aua, "asr": 0.5, "queries": 9.0, "difference": -0.1,
              "from_dense": {"accuracy": transferred}, "to_dense": None}  # fmt: skip
    form = {"attacks": {"textfooler": attack}, "difference": 0.0}
    return {"forms": {"fp32": form}, "sparsity": 0.5, "seconds": 1.0, "machine": "m", "code": "c"}


def test_draws_are_no_further_models_in_the_controls(tmp_path, start):
    grid = read_adaptive(str(written(tmp_path, start)))
    cells = [Cell(task="mr", dense=name, method="wanda", sparsity=0.5, draw=draw, controls=True)
             for name in "ab" for draw in (0, 1)]  # fmt: skip
    done = [(cell, result(0.4, transferred=share)) for cell, share in zip(cells, (0.1, 0.3, 0.5, 0.7), strict=True)]
    (section,) = [each for each in sections_of(grid, Outcome(done, [])) if each.title == "Controls"]
    told = dict(zip(section.heads, section.rows[0], strict=True))
    assert told["right on texts that fooled the dense model"] == percent([0.2, 0.6])


def test_cells_that_were_attacked_with_other_resources_are_refused(tmp_path, start):
    grid = read_adaptive(str(written(tmp_path, start)))
    done = [(Cell(task="mr", dense=name), result(0.4, variant=name)) for name in "ab"]
    with pytest.raises(InputError, match="cells of mr must have the same attack textfooler, got a and b"):
        publish_adaptive(grid, Outcome(done, []), tmp_path / "out")


def test_a_cell_is_rounded_on_the_calibration_texts_that_it_was_pruned_with(tmp_path, start, monkeypatch):
    asked, original = [], adaptive.quantize_checkpoint

    def spied(path, task, output, config, **more):
        asked.append(config)
        return original(path, task, output, config, **more)

    monkeypatch.setattr(adaptive, "quantize_checkpoint", spied)
    (tmp_path / "own.txt").write_text("\n".join(f"a {i} line of my own texts" for i in range(40)))
    cell = {"task": "mr", "dense": "a", "method": "magnitude", "sparsity": 0.5, "int8": True}
    wanda = cell | {"method": "wanda", "draw": 3, "calibration": str(tmp_path / "own.txt")}
    grid = read_adaptive(str(written(tmp_path, start, cells=[wanda])))
    run_adaptive(grid, tmp_path / "out")
    assert [(each.seed, each.calibration) for each in asked] == [(3, (str(tmp_path / "own.txt"),))]
    before = adaptive.inputs_of(grid)
    (tmp_path / "own.txt").write_text("\n".join(f"other {i} line of my own texts" for i in range(40)))
    assert adaptive.inputs_of(grid) != before, "other texts in a file of the same name are other work"


def test_differences_have_intervals_over_models_or_over_examples():
    assert points([], None) == ""
    assert points([0.01], (-0.02, 0.04)) == "+1.00 [-2.00, +4.00]"
    assert points([0.01, 0.03], None) == "+2.00 [-10.71, +14.71]"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cells": [{"task": "mr", "dense": "c"}]}, "dense 'c' of task mr, which is not in tasks"),
        ({"cells": [{"task": "mr", "dense": "a", "method": "speed"}]}, "must be dense or one of"),
        ({"cells": [{"task": "mr", "dense": "a", "sparsity": 0.5}]}, "a dense cell is not pruned, got sparsity"),
        ({"cells": [{"task": "mr", "dense": "a", "draw": 1}]}, "a dense cell is not pruned, got draw"),
        ({"cells": [{"task": "mr", "dense": "a", "method": "mask", "draw": 1}]}, "mask has no calibration texts"),
        ({"cells": [{"task": "mr", "dense": "a", "attacks": "hotflip"}]}, "attacks must be among"),
        ({"cells": [{"task": "mr", "dense": "a", "method": "wanda", "adversarial": "freelb"}]}, "does not train"),
        ({"cells": [{"task": "mr", "dense": "a", "method": "robust-ticket", "pattern": "2:4"}]}, "a ticket is"),
        ({"cells": [{"task": "mr", "dense": "a"}] * 2}, "twice"),
        ({"tasks": {"mr": {"dense": {}}}}, "attack_seconds"),
        ({"tasks": {"mr": {"attack_seconds": 1, "dense": {}, "prune": {"imp": {"epoch": 1}}}}}, "no flag of prune"),
        ({"tasks": {"rte": {"attack_seconds": 1, "dense": {}}}}, "has pairs"),
        ({"tasks": {"mr": {"attack_seconds": 1, "dense": {"a": {}}}}}, "needs hold_out"),
        ({"tasks": {"mr": {"attack_seconds": 1, "dense": {"a": {"members": ["z"]}}}}}, "member z"),
        (
            {"tasks": {"mr": {"attack_seconds": 1, "dense": {"a": {"members": 3}}}}},
            "a: members must be a list of names",
        ),
        ({"tasks": {"mr": {"attack_seconds": 1, "dense": {}, "prune": {"imp": None}}}}, "imp must map flags to values"),
        ({"tasks": {"mr": {"attack_seconds": 1, "dense": {}, "prune": {"int8": True}}}}, "int8 belongs to cells"),
        ({"tasks": ["mr"]}, "tasks must map names to settings"),
        ({"cells": None}, "has no cells"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path, start, changes, match):
    with pytest.raises(InputError, match=match):
        read_adaptive(str(written(tmp_path, start, **changes)))
