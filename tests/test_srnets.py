from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from models import saved

from sparsebert import checkpoint
from sparsebert.errors import InputError, OutputError
from sparsebert.study import publish, read_grid, read_shard, run_grid, srnets
from sparsebert.study.grid import Cell, Comparison
from sparsebert.study.report import compared, flat, lines_of, markdown

SMALL = {
    "tasks": {
        "mr": {
            "train": {"n": 40, "batch_size": 8, "steps": 3, "precision": "fp32", "poe": {"bias": "weak", "steps": 4}},
            "prune": {"n": 40, "batch_size": 8, "steps": 3, "precision": "fp32", "lr": 1e-2},
        }
    },
    "cells": [
        {"task": "mr", "loss": ["ce", "poe"], "seed": [0, 1]},
        {"task": "mr", "paradigm": "finetuned", "method": ["mask", "imp"], "sparsity": 0.5, "seed": [0, 1]},
        {"task": "mr", "paradigm": "rewound", "method": "imp-rw", "sparsity": 0.5, "final_loss": "ce"},
        {"task": "mr", "paradigm": "pretrained", "method": "mask", "sparsity": 0.5},
        {"task": "mr", "paradigm": "finetuned", "method": "mask", "sparsity": 0.5, "start_at": 0.34},
    ],
    "comparisons": [
        {
            "name": "mask over imp",
            "figure": "accuracy",
            "a": {"task": "mr", "paradigm": "finetuned", "method": "mask", "sparsity": 0.5},
            "b": {"task": "mr", "paradigm": "finetuned", "method": "imp", "sparsity": 0.5},
        }
    ],
}

DENSE = [{"task": "mr", "seed": [0, 1, 2]}]


@pytest.fixture(scope="module")
def start(encoder):
    """A small encoder without a head, which the models of the grids are fine-tuned from."""
    return encoder


def written(folder, start, **changes):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"model": str(start), **SMALL, **changes}))
    return path


@pytest.fixture
def quick(monkeypatch):
    """Evaluates on only a few examples."""
    original = srnets.evaluate
    monkeypatch.setattr(srnets, "evaluate", lambda *args, **kwargs: original(*args, n=24, **kwargs))


@pytest.mark.parametrize("name", ["srnets-small", "srnets-paper"])
def test_a_packaged_grid_can_be_read(name):
    grid = read_grid(name)
    assert len(grid.cells) > 50 and {"mnli", "qqp"} <= {cell.task for cell in grid.cells}
    settings = [cell.setting for cell in grid.cells]
    for comparison in grid.comparisons:
        assert Cell(**comparison.a).setting in settings and Cell(**comparison.b).setting in settings, comparison.name


def test_lists_in_a_cell_are_expanded_and_losses_have_settings_of_their_own(tmp_path, start):
    grid = read_grid(str(written(tmp_path, start)))
    assert len(grid.cells) == 4 + 4 + 3
    assert grid.train_config(grid.cells[0], "ce").steps == 3 and grid.train_config(grid.cells[0], "poe").steps == 4
    assert grid.train_config(grid.cells[1], "poe").seed == 1


def test_a_grid_runs_and_reports_and_is_not_run_twice(tmp_path, start, quick):
    grid = read_grid(str(written(tmp_path, start)))
    outcome = run_grid(grid, tmp_path / "out")
    assert [cell for cell, _ in outcome.done] == grid.cells and not outcome.left_out
    assert not list((tmp_path / "out/models").glob("cell-*")), "pruned models are not kept"
    document = publish(grid, outcome, tmp_path / "out", tmp_path / "table.md")
    assert (tmp_path / "out/report.html").read_text().startswith("<!doctype html>")
    table = pyarrow.parquet.read_table(tmp_path / "out/cells.parquet").to_pylist()
    assert len(table) == 11 and {row["code"] for row in table} == {srnets.CODE}
    assert "mask over imp" in (tmp_path / "table.md").read_text()
    json.dumps(document)
    assert all(row["smoke"] for row in document["settings"]), "40 rows close nothing"

    begun = []
    again = run_grid(grid, tmp_path / "out", progress=lambda done, total, what="": begun.append(what))
    assert set(begun) == {"cells"} and again.done == outcome.done
    elsewhere = run_grid(grid, tmp_path / "other", shard=(0, 2), others=[tmp_path / "out/cells.jsonl"])
    assert elsewhere.done == outcome.done


def test_a_mask_that_names_no_gradual_sparsity_is_fixed_for_any_pattern(tmp_path, start):
    cells = {"task": "mr", "paradigm": "finetuned", "method": "mask", "sparsity": 0.5}
    cells = [{**cells, "pattern": ["unstructured", "16x1"]}, {**cells, "pattern": "16x1", "gradual": 0.2}]
    grid = read_grid(str(written(tmp_path, start, cells=cells)))
    assert [grid.prune_configs(cell)[1].gradual for cell in grid.cells] == [None, 0.5, 0.2]


def test_another_model_has_weights_of_its_own(tmp_path, start, quick):
    """`model:` is not part of a cell; once a grid with another model took over the weights of the model before."""
    cells = [{"task": "mr", "paradigm": "finetuned", "method": "imp", "sparsity": 0.5}]

    def weights(folder):
        return {checkpoint.weights_sha256(path) for path in (folder / "models").iterdir()}

    run_grid(read_grid(str(written(tmp_path, start, cells=cells))), tmp_path / "out")
    first = weights(tmp_path / "out")
    other = read_grid(str(written(tmp_path, saved(tmp_path / "other", seed=5), cells=cells)))
    (_, result), *_ = run_grid(other, tmp_path / "out").done
    (_, alone), *_ = run_grid(other, tmp_path / "alone").done
    assert len(first) == 1 and weights(tmp_path / "out") == first | weights(tmp_path / "alone")
    assert len(weights(tmp_path / "out")) == 2 and result["evaluation"] == alone["evaluation"]


def test_a_deleted_ledger_is_made_again_of_its_cells(tmp_path, start, quick):
    grid = read_grid(str(written(tmp_path, start, cells=DENSE)))
    done = run_grid(grid, tmp_path / "out").done
    (tmp_path / "out/units.sqlite").write_bytes(b"damaged" * 500)
    with pytest.raises(OutputError, match=r"units\.sqlite cannot be opened.*--overwrite"):
        run_grid(grid, tmp_path / "out")
    begun = []
    again = run_grid(grid, tmp_path / "out", overwrite=True, progress=lambda done, total, what="": begun.append(what))
    assert again.done == done and set(begun) == {"cells"}


class Killed(Exception):
    """Stands for a kill between cells."""


def test_a_killed_grid_goes_on_with_the_cell_it_was_at(tmp_path, start, quick):
    grid = read_grid(str(written(tmp_path, start, cells=DENSE)))

    def kill(done, total, what=""):
        if what == "cells" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        run_grid(grid, tmp_path / "out", progress=kill)
    counts = []
    run_grid(grid, tmp_path / "out", progress=lambda done, total, what="": counts.append((what, done)))
    assert counts[:2] == [("cells", 1), ("cells", 2)] and counts[-1] == ("cells", 3)


def test_shards_are_whole_groups_and_together_the_grid(tmp_path, start, quick):
    cells = [{"task": "mr"}, {"task": "mr", "paradigm": "finetuned", "method": "imp", "sparsity": 0.5}]
    grid = read_grid(str(written(tmp_path, start, cells=[{**cell, "seed": [0, 1]} for cell in cells])))
    first = run_grid(grid, tmp_path / "out", shard=(0, 2))
    assert {cell.seed for cell, _ in first.done} == {0} and {cell.seed for cell in first.left_out} == {1}
    publish(grid, first, tmp_path / "out", tmp_path / "table.md")
    for report in ("out/report.html", "table.md"):
        left_out = (tmp_path / report).read_text().partition("Left out")[2]
        assert "mr: ce 0%, seeds 1" in left_out and "seeds 0" not in left_out
    both = run_grid(grid, tmp_path / "out", shard=(1, 2))
    assert len(both.done) == 4 and not both.left_out


def test_no_cell_is_begun_that_would_end_too_late(tmp_path, start, quick):
    grid = read_grid(str(written(tmp_path, start, cells=SMALL["cells"][:1])))
    outcome = run_grid(grid, tmp_path / "out", hours=0.0)
    assert not outcome.done and outcome.left_out == grid.cells
    page = markdown(grid, outcome, "", tmp_path / "t.md")
    assert "Left out" in page and "--grid " + Path(grid.given).name + " -o DIR --markdown t.md`" in page


def test_comparisons_pair_seeds():
    grid = SimpleNamespace(least={"rows": 1, "steps": 1, "seeds": 2})

    def result(value):
        return {"evaluation": {"accuracy": value, "n": 9}, "training": {"steps": 5}, "rows": 7}

    def cell(loss, seed):
        return Cell(task="mr", loss=loss, seed=seed)

    values = {("poe", 0): 0.6, ("poe", 1): 0.7, ("poe", 2): 0.9, ("ce", 1): 0.6, ("ce", 2): 0.7, ("ce", 0): 0.4}
    outcome = srnets.Outcome([(cell(*key), result(value)) for key, value in values.items()])
    lines = lines_of(grid, outcome)
    comparison = Comparison(name="x", figure="accuracy", a={"task": "mr", "loss": "poe"}, b={"task": "mr"})
    row = compared(lines, comparison)
    assert row["difference"] == pytest.approx(np.mean([0.2, 0.1, 0.2])) and row["seeds"] == 3
    assert not row["smoke"]


def test_figures_of_all_sets_in_one_level():
    evaluation = {
        "accuracy": 0.5,
        "accuracy_ci": (0.4, 0.6),
        "task": "mnli",
        "ood": {"hans": {"entailment": 0.9, "n": 3}},
    }
    assert flat(evaluation) == {"accuracy": 0.5, "hans.entailment": 0.9}


def test_a_grid_may_leave_parts_empty_and_a_method_that_is_a_loss_too_has_settings(tmp_path, start):
    cells = [{"task": "mr", "paradigm": "finetuned", "method": name, "sparsity": 0.5} for name in ("rmc", "imp")]
    tasks = {"mr": {"train": None, "prune": {"rmc": {"difficulty_floor": 0.3}, "imp": {"steps": 7}}}}
    grid = read_grid(str(written(tmp_path, start, cells=cells, tasks=tasks, comparisons=None, least=None)))
    first, second = (grid.prune_configs(cell)[1] for cell in grid.cells)
    assert first.difficulty_floor == 0.3 and second.steps == 7 and grid.comparisons == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cells": [{"task": "sst2"}]}, "no settings for it"),
        ({"cells": [{"task": "mr", "speed": 1}]}, "speed"),
        ({"cells": [{"task": "mr", "sparsity": 0.5}]}, "no method and no sparsity"),
        ({"cells": [{"task": "mr", "paradigm": "finetuned", "sparsity": 0.5}]}, "needs a method"),
        ({"cells": [{"task": "mr"}, {"task": "mr"}]}, "twice"),
        ({"cells": ["mr"]}, "must map fields"),
        ({"cells": [{"task": "mr", "paradigm": "finetuned", "method": "imp-rw", "sparsity": 0.5}]}, "rewound cells"),
        ({"cells": [{"task": "mr", "paradigm": "finetuned", "method": "mask", "gradual": 0.9}]}, "must not fall"),
        ({"tasks": {"mr": {"train": {"speed": 1}}}, "cells": [{"task": "mr"}]}, "speed"),
        ({"tasks": {"nonsense": {}}}, "task must be one of"),
        ({"tasks": ["mr"]}, "tasks must map names to settings"),
        ({"tasks": {"mr": {"train": [1]}}, "cells": [{"task": "mr"}]}, r"train must map names to settings, got \[1\]"),
        ({"comparisons": {"a": 1}}, "comparisons must be a list"),
        ({"comparisons": [{"name": "c", "figure": "accuracy", "a": {"speed": 1}, "b": {}}]}, "comparison c"),
        ({"least": 3}, "least must map names to settings"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path, start, changes, match):
    with pytest.raises(InputError, match=match):
        read_grid(str(written(tmp_path, start, **changes)))


@pytest.mark.parametrize("text", ["2/2", "x", "1", "-1/2", "0/0"])
def test_a_wrong_shard_is_refused(text):
    with pytest.raises(InputError, match="0 <= I < N"):
        read_shard(text)
