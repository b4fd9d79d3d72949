"""The search for a pattern and a sparsity under a budget of speed and of accuracy under attack."""

from __future__ import annotations

import json

import models
import pytest

from sparsebert import checkpoint
from sparsebert.config import BudgetConfig, PruneConfig
from sparsebert.errors import InputError, OutputError
from sparsebert.pruning import budget
from sparsebert.pruning.budget import Candidate, StandIns, search

WITHIN = BudgetConfig(min_speedup=2.0, max_robust_drop=5.0, budget_attack="deepwordbug", budget_n=20)
CONFIG = PruneConfig(method="magnitude")
FORMS = (("unstructured", False), ("4x1", False), ("32x1", False))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "dense"
    checkpoint.save(models.classifier(), models.tokenizer(), directory, recipe={}, figures={})
    return directory


@pytest.fixture
def timed(monkeypatch):
    """Speed-ups that follow a rule instead of a clock; the list of what was asked for."""
    asked = []

    def time(self, pattern, sparsity, int8):
        asked.append((pattern, sparsity))
        gain = {"unstructured": 1.0, "4x1": 1.5, "32x1": 2.0}[pattern]
        return Candidate(pattern, sparsity, int8, gain / (1 - sparsity) / 2, (None, None))

    monkeypatch.setattr(StandIns, "time", time)
    monkeypatch.setattr(budget, "FORMS", FORMS)
    return asked


@pytest.fixture
def drops(monkeypatch):
    """Points lost under attack by pattern, instead of an attack; the list of what was attacked."""
    lost, attacked = {"unstructured": 1.0, "4x1": 1.0, "32x1": 1.0}, []

    def drop(pruned, *rest):
        pattern = checkpoint.read_config(pruned)["sparsebert"]["pattern"]
        attacked.append(pattern)
        assert rest[-2].config.max_seconds is None, "a slow model must not pass for a robust one"
        return lost[pattern], (lost[pattern] - 4, lost[pattern] + 4)

    monkeypatch.setattr(budget, "_drop", drop)
    return lost, attacked


def test_the_fewest_zeros_that_are_fast_enough_and_keep_within_the_budget_are_chosen(dense, tmp_path, timed, drops):
    choice = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    # 32x1 needs 2 / (1 - s) / 2 >= 2, the others more zeros.
    assert (choice.chosen.pattern, choice.chosen.sparsity, choice.met) == ("32x1", 0.5, True)
    assert [(c.pattern, c.sparsity) for c in choice.candidates] == [("32x1", 0.5), ("4x1", 0.7), ("unstructured", 0.75)]
    assert drops[1] == ["32x1"] and choice.candidates[1].drop is None
    assert checkpoint.read_config(tmp_path / "out")["sparsebert"]["pattern"] == "32x1"
    assert not (tmp_path / "out.search").exists() and choice.chosen.drop_ci == (-3.0, 5.0)


def test_it_times_and_attacks_texts_as_long_as_the_model_is_pruned_for(dense, tmp_path, timed, monkeypatch):
    seen = []
    real = StandIns.__init__
    monkeypatch.setattr(
        StandIns, "__init__", lambda self, d, spec, *more: seen.append(spec) or real(self, d, spec, *more)
    )
    monkeypatch.setattr(budget, "_drop", lambda _p, _d, spec, *more: seen.append(spec) or (0.0, (0.0, 0.0)))
    search(dense, "mr", tmp_path / "out", CONFIG.model_copy(update={"max_length": 20}), WITHIN)
    assert [spec.max_length for spec in seen] == [20, 20]


def test_a_candidate_that_loses_too_much_is_passed_over(dense, tmp_path, timed, drops):
    drops[0]["32x1"] = 9.0
    choice = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    assert (choice.chosen.pattern, choice.met, drops[1]) == ("4x1", True, ["32x1", "4x1"])


def test_if_none_keeps_within_the_budget_the_one_that_loses_least_is_saved_and_said(dense, tmp_path, timed, drops):
    drops[0].update({"32x1": 9.0, "4x1": 6.0, "unstructured": 7.0})
    choice = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    assert (choice.chosen.pattern, choice.met) == ("4x1", False) and "none of the forms" in choice.why
    assert json.loads(json.dumps(choice.as_json()))["chosen"]["drop"] == 6.0


def test_the_same_search_is_not_done_again_and_another_one_is_refused(dense, tmp_path, timed, drops):
    first = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    asked = len(timed)
    again = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    assert again.chosen == first.chosen and again.candidates == first.candidates and again.result.reused
    assert len(timed) == asked and drops[1] == ["32x1"]
    other = WITHIN.model_copy(update={"min_speedup": 3.0})
    with pytest.raises(OutputError, match="other work"):
        search(dense, "mr", tmp_path / "out", CONFIG, other)
    assert search(dense, "mr", tmp_path / "out", CONFIG, other, overwrite=True).chosen.sparsity == 0.7


def test_a_stopped_search_goes_on_with_what_it_has_timed_and_pruned(dense, tmp_path, timed, drops, monkeypatch):
    drops[0]["32x1"] = 9.0
    real, calls = budget._drop, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(budget, "_drop", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    assert not (tmp_path / "out").exists()
    asked = len(timed)
    choice = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    assert choice.chosen.pattern == "4x1" and len(timed) == asked and choice.result.reused


def test_what_a_stopped_search_has_left_is_replaced_by_another_one_that_may(dense, tmp_path, timed, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "_drop", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    monkeypatch.setattr(budget, "_drop", lambda *given: (0.0, (-1.0, 1.0)))
    other = PruneConfig(method="wanda", calibration_tokens=300)
    with pytest.raises(OutputError, match="--overwrite"):
        search(dense, "mr", tmp_path / "out", other, WITHIN)
    assert search(dense, "mr", tmp_path / "out", other, WITHIN, overwrite=True).met


def test_speed_is_found_by_bisection(dense, tmp_path, timed, drops):
    search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)
    assert len([pattern for pattern, _ in timed if pattern == "4x1"]) <= 5


@pytest.mark.parametrize(
    ("config", "within", "says"),
    [
        (CONFIG, {"min_speedup": 50.0}, "out of reach on this machine, the fastest is 32x1 at 0.95"),
        (CONFIG, {"max_robust_drop": None}, "needs both"),
        (CONFIG, {"budget_attack": "hotflip"}, "attacks must be among"),
        (CONFIG.model_copy(update={"without": "climb"}), {}, "without"),
        (CONFIG, {"budget_attack": "deepwordbug,pwws"}, "attacks must be among"),
        (CONFIG.model_copy(update={"sparsity": 0.5}), {}, "chooses pattern, sparsity and int8"),
        (CONFIG.model_copy(update={"pattern": "4x1"}), {}, "chooses pattern, sparsity and int8"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(dense, tmp_path, timed, drops, config, within, says):
    with pytest.raises(InputError, match=says):
        search(dense, "mr", tmp_path / "out", config, WITHIN.model_copy(update=within))
    assert not (tmp_path / "out").exists() and not drops[1]


def test_forms_that_a_method_cannot_have_are_not_tried(dense, tmp_path, timed, drops, monkeypatch):
    monkeypatch.setattr(budget, "FORMS", (("4x1", True), ("32x1", False)))
    choice = search(dense, "mr", tmp_path / "out", CONFIG, WITHIN)  # magnitude does not round to int8
    assert choice.chosen.pattern == "32x1" and {pattern for pattern, _ in timed} == {"32x1"}


def test_nothing_that_is_attacked_is_calibrated_on(dense, tmp_path, timed, monkeypatch):
    attacked, calibrated, original = [], [], budget.prune_checkpoint.__globals__["draw"]

    def drop(pruned, dense, spec, held, *rest):
        attacked.extend(held.texts)
        return 0.0, (-1.0, 1.0)

    def drawn(model, tokenizer, examples, *rest, **more):
        calibrated.extend(examples.texts)
        return original(model, tokenizer, examples, *rest, **more)

    monkeypatch.setattr(budget, "_drop", drop)
    monkeypatch.setitem(budget.prune_checkpoint.__globals__, "draw", drawn)
    search(dense, "mr", tmp_path / "out", PruneConfig(method="wanda", calibration_tokens=300), WITHIN)
    assert len(attacked) == 20 and len(calibrated) > 1000 and not set(attacked) & set(calibrated)


def test_other_calibration_texts_are_another_search(dense, tmp_path, timed, drops):
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"a {i} line of texts" for i in range(60)))
    config = PruneConfig(method="wanda", calibration_tokens=300, calibration=(str(own),))
    search(dense, "mr", tmp_path / "out", config, WITHIN)
    assert search(dense, "mr", tmp_path / "out", config, WITHIN).result.reused
    own.write_text("\n".join(f"another {i} line of texts" for i in range(60)))
    with pytest.raises(OutputError, match="other work"):
        search(dense, "mr", tmp_path / "out", config, WITHIN)


def test_stand_ins_are_timed_and_the_loss_is_that_of_attacks_on_both(dense, tmp_path, monkeypatch):
    """With the clock and the attack as they are."""
    monkeypatch.setattr(budget, "FORMS", (("unstructured", False), ("64x1", False)))
    monkeypatch.setattr(budget, "ROUNDS", 2)
    monkeypatch.setattr(budget, "TIMED", 4)
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    within = WITHIN.model_copy(update={"min_speedup": 0.01, "max_robust_drop": 0.0, "budget_n": 6})
    choice = search(dense, "mr", tmp_path / "out", CONFIG, within)
    assert choice.chosen.sparsity == 0.5 and choice.chosen.speedup > 0.01
    low, high = choice.chosen.drop_ci
    assert low <= choice.chosen.drop <= high and choice.met == (choice.chosen.drop <= 0)
