"""bench/bench_attacks: how two runs of an attack are compared, and why they differ. TextAttack itself is not needed."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from bench import bench_attacks, textattack_runner
from bench.attack_differences import SCORE, SIMILARITY, UNEXPLAINED, cause, counts, differing, traced
from sparsebert import data
from sparsebert.config import AttackConfig
from sparsebert.errors import UnsupportedError
from sparsebert.robustness.attacks.plan import attacked, plans
from sparsebert.robustness.attacks.recipes import named
from sparsebert.robustness.attacks.transformations import Draws
from sparsebert.robustness.attacks.words import words_of

TEXTS = [
    "a gorgeous , witty and seductive movie", "the plot is a dull and lifeless mess", "an utterly compelling story",
    "one long string of cliches", "it never fails to engage us", "a charming and often affecting journey",
]  # fmt: skip
UNITS = [(i, text, None, i % 2) for i, text in enumerate(TEXTS)]


class Victim:
    """Probabilities from a hash of each word: attacks find some texts, and fail on others."""

    order = np.array([0, 1])

    def logits(self, texts):
        def value(text: str) -> float:
            drawn = [hashlib.sha256(word.encode()).digest()[0] / 255 - 0.5 for word in words_of(text)]
            return sum(drawn) + 3.0 * (2 * (text[:5] in {known[:5] for known in TEXTS[1::2]}) - 1)

        values = np.array([value(text) for text in texts], dtype=np.float32)
        return np.stack([-values, values], axis=1)


@functools.cache
def all_plans() -> dict:
    made = plans(named(bench_attacks.PARITY), AttackConfig(), data.get_task("sst2"))
    return {plan.recipe.name: plan for plan in made}


def plan_of(name: str):
    return all_plans()[name]


def rows_of(name: str) -> list[dict]:
    ended = filter(None, attacked(Victim(), plan_of(name), UNITS))
    return [row for _, row, _ in sorted(ended, key=lambda found: found[0])]


def how(name: str) -> list[dict]:
    return [row for _, row in sorted(traced(Victim(), plan_of(name), UNITS), key=lambda found: found[0])]


def test_the_runner_draws_what_the_attacks_draw():
    for n in (1, 7, 52):
        for what in (("swap", "word"), ("insert: letter", "naïve")):
            assert textattack_runner.below(n, 3, "a text", *what) == Draws(3, "a text").below(n, *what)


@pytest.mark.parametrize("name", ["deepwordbug", "pwws", "textbugger"])
def test_a_traced_attack_ends_as_the_attack_does_and_has_asked_for_what_it_notes(name):
    for row, plain in zip(how(name), rows_of(name), strict=True):
        assert differing(row, plain) == []
        trace = row["trace"]
        asked = 1 + len(trace["importance"]) + sum(len(scores) for _, _, scores in trace["steps"])
        assert asked == row["queries"]
        assert bool(trace["similarity"]) == (name == "textbugger")


def test_counts_are_of_all_examples():
    rows = rows_of("deepwordbug")
    other = deepcopy(rows)
    other[0]["perturbed"], other[1]["queries"], other[2]["outcome"] = "another", 0, "skipped"
    assert counts(rows, other) == {
        "n": 6, "attacked": 5, "same_outcome": 5, "same_text": 5, "same_queries": 5,
    }  # fmt: skip
    assert [differing(*pair) for pair in zip(rows, other, strict=True)][:4] == [["text"], ["queries"], ["outcome"], []]


def trace_of(steps, perturbed, importance=((0, 0.5), (1, 0.25)), similarity=None, threshold=0.8) -> dict:
    trace = {"importance": importance, "steps": steps, "similarity": similarity or {}, "threshold": threshold}
    return {"outcome": "failed", "perturbed": perturbed, "queries": 1, "trace": trace}


FIRST = ["a b", 0, [["x b", 0.6], ["y b", 0.6 + SCORE / 2], ["z b", 0.9]]]


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        # another word comes first
        ((["a b", 0, []],), (["a b", 1, []],), UNEXPLAINED),
        # another candidate is chosen
        ((FIRST, ["x b", 1, []]), (FIRST, ["y b", 1, []]), "the scores of both choices are equal within 1e-05"),
        ((FIRST, ["x b", 1, []]), (FIRST, ["z b", 1, []]), UNEXPLAINED),
        # one is content with a candidate that the other is not
        ((FIRST,), (FIRST, ["y b", 1, []]), "the scores of both choices are equal within 1e-05"),
        ((FIRST,), (FIRST, ["x b", 1, []]), UNEXPLAINED),
    ],
)
def test_the_cause_is_looked_for_where_two_attacks_part(ours, theirs, found):
    rows = [trace_of(list(steps), end) for steps, end in ((ours, "x b"), (theirs, "z b"))]
    assert cause("deepwordbug", *rows) == found


def test_words_are_tried_in_another_order_if_they_are_equally_important():
    near = ((0, 0.5), (1, 0.5 + SCORE / 2))
    rows = [trace_of([["a b", i, []]], "a b", near) for i in (0, 1)]
    assert cause("deepwordbug", *rows) == "words 0 and 1 are equally important within 1e-05"
    # PWWS multiplies the importance by the gain of the best synonym
    looking = [["a b", 0, [["x b", 0.9]]], ["a b", 1, [["a y", 0.5]]]]
    rows = [trace_of([*looking[::turn], ["a b", i, []]], "a b", near) for turn, i in ((1, 0), (-1, 1))]
    assert cause("pwws", *rows) == UNEXPLAINED
    assert cause("deepwordbug", trace_of([], "a b"), trace_of([], "a b", ((0, 0.5),))) == UNEXPLAINED


@pytest.mark.parametrize(("more", "explained"), [(2, True), (1, False)])
def test_equal_candidates_are_counted_again_by_textattack(more, explained):
    twice = ["a b", 0, [*FIRST[2], *FIRST[2][1:]]]
    rows = [trace_of([step], "z b") for step in (FIRST, twice)]
    rows[1]["queries"] += more
    assert cause("textfooler", *rows) == (
        "TextAttack asks about 2 candidates once more, since others are equal to them" if explained else UNEXPLAINED
    )


@pytest.mark.parametrize(("away", "explained"), [(SIMILARITY / 2, True), (2 * SIMILARITY, False)])
def test_a_candidate_at_the_threshold_may_be_left_out(away, explained):
    similarity = {"x b": 0.9, "y b": 0.8 + away}
    rows = [trace_of([["a b", 0, found]], "x b", similarity=similarity) for found in (FIRST[2][:2], FIRST[2][:1])]
    assert (cause("textfooler", *rows) != UNEXPLAINED) == explained


@pytest.mark.parametrize(("apart", "explained"), [(SIMILARITY / 2, True), (2 * SIMILARITY, False)])
def test_of_equally_similar_texts_either_may_be_the_last(apart, explained):
    similarity = {"x b": 0.9, "z b": 0.9 + apart}
    rows = [trace_of([FIRST], end, similarity=similarity) for end in ("x b", "z b")]
    assert (cause("textfooler", *rows) != UNEXPLAINED) == explained


def asked(change=lambda rows: rows):
    """A stand-in for TextAttack, which answers with our own rows after `change`."""

    def ask(what: dict) -> list[dict]:
        texts = [text for text, _ in what["examples"]]
        found = how(what["attack"]) if what["trace"] else rows_of(what["attack"])
        rows = [found[TEXTS.index(text)] | {"seconds": 0.5 if what["padded"] else 8.0} for text in texts]
        for row in rows:
            row.get("trace", {})["threshold"] = None
        return change(json.loads(json.dumps(rows)))

    return ask


def test_both_engines_are_compared_and_timed_on_the_same_blocks():
    parity, speed = bench_attacks.measure(Victim(), plan_of("deepwordbug"), UNITS, asked(), stock=6)
    assert parity["variant"].startswith("deepwordbug (") and parity["differences"] == []
    assert [parity[key] for key in ("n", "attacked", "same_outcome", "same_text", "same_queries")] == [6] * 5
    assert (speed["textattack_padded_s"], speed["textattack_stock_s"]) == (0.5, 8.0) and speed["ours_s"] > 0
    # stock over padded is 16 on each example, and padded over ours what it is
    np.testing.assert_allclose(speed["stock_ratio"], 16 * np.array(speed["padded_ratio"]))
    row = bench_attacks.row_of("deepwordbug", parity, speed)
    assert row.keys() == bench_attacks.COLUMNS.keys() and row["unexplained"] == 0
    assert "stock_ratio" not in bench_attacks.measure(Victim(), plan_of("deepwordbug"), UNITS, asked(), stock=0)[1]


def test_a_difference_is_reported_and_too_many_leave_no_times():
    def change(rows: list[dict]) -> list[dict]:
        for row in rows:
            row["perturbed"] += " !" * row["perturbed"].startswith("an ")
        return rows

    parity, _ = bench_attacks.measure(Victim(), plan_of("deepwordbug"), UNITS, asked(change), stock=0)
    (found,) = parity["differences"]
    assert (found["example"], found["differs"], found["cause"]) == (2, ["text"], UNEXPLAINED)
    assert found["textattack"]["perturbed"] == found["ours"]["perturbed"] + " !"
    assert parity["same_text"] == 5 and not bench_attacks.agrees(parity)
    assert bench_attacks.agrees(parity | {"n": 200, "same_outcome": 196, "same_text": 190})
    assert not bench_attacks.agrees(parity | {"n": 200, "same_outcome": 195, "same_text": 200})
    row = bench_attacks.row_of("deepwordbug", parity, {})
    assert row["unexplained"] == 1 and "ours_s" not in row


def test_the_runner_is_told_the_neighbours_and_synonyms_of_every_word(tmp_path):
    plan, victim = plan_of("textfooler"), Victim()
    victim.classifier = SimpleNamespace(directory=tmp_path, config=transformers.BertConfig())
    victim.task = data.get_task("sst2")
    told = bench_attacks.setup_for(victim, [plan], ["A Movie", "zzz"], seed=3)
    assert json.loads(json.dumps(told)) == told and told["max_length"] == 128 and told["seed"] == 3
    assert told["neighbours"]["textfooler"] == {"movie": plan.resources.neighbours.of("movie", 0.5)}
    assert told["synonyms"]["Movie"] == plan.resources.synonyms.of("Movie") and "zzz" not in told["synonyms"]


def test_a_runner_that_ends_says_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nraise SystemExit('no flair')\n")
    python.chmod(0o755)
    with (
        bench_attacks.started(Path(python), {"threads": 1}) as ask,
        pytest.raises(UnsupportedError, match="TextAttack ended: no flair"),
    ):
        ask({"threads": 1})
