"""Attacks on victims whose answers are known: searches, lock-step, and the models that attacks ask."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from models import SIZES, classifier, saved, tokenizer

from sparsebert import checkpoint
from sparsebert.config import ATTACKS
from sparsebert.engine.sentences import MODULES, POOLING, SentenceEncoder
from sparsebert.errors import CheckpointError, InputError
from sparsebert.robustness.attacks import RECIPES, lockstep, named
from sparsebert.robustness.attacks.attack import CHUNK, ENCODER, MASKED_LM, VICTIM, Attack, Blank, Recipe
from sparsebert.robustness.attacks.constraints import changed_at_most
from sparsebert.robustness.attacks.masked_lm import MaskedLM
from sparsebert.robustness.attacks.resources import Resources
from sparsebert.robustness.attacks.search import _met, greedy, swarm, worst_of
from sparsebert.robustness.attacks.words import Text, words_of

# --- victims and attacks ----------------------------------------------------------------------------------------------


class Victim:
    """A model of two labels: `score` gives a text's probability of label 1. Notes what it was asked."""

    def __init__(self, score: Callable[[str], float]):
        self.score, self.calls = score, []

    def __call__(self, items: list) -> np.ndarray:
        self.calls.append(list(items))
        p = np.array([self.score(item) for item in items], np.float64)
        return np.log(np.stack([1 - p, p], 1)).astype(np.float32)

    @property
    def asked(self) -> list:
        return [item for call in self.calls for item in call]


def by_words(start: float = 0.1, **weights: float) -> Victim:
    """Adds up the weights of the words of a text."""
    return Victim(lambda text: min(0.999, max(0.001, start + sum(weights.get(word, 0) for word in words_of(text)))))


def recipe(swaps: dict[str, list[str]], search=None, constraints=(), transform=None) -> Recipe:
    def by_table(attack, text, index):
        return swaps.get(text.words[index], [])
        yield

    return Recipe("toy", "", transform or by_table, tuple(constraints), search or greedy("delete"), "textfooler", ())


def begun(recipe: Recipe, text: str, *, label: int = 0, number: int = 0, most: int | None = None, stop=(), **more):
    other, first = more.get("other"), more.get("first", True)
    return Attack(recipe, None, number, Text(text), other, first, label, 0, frozenset(stop), most)


def ends_of(*arguments, **settings):
    """What `lockstep.run` yields of attacks, without what it yields of rounds."""
    return filter(None, lockstep.run(*arguments, **settings))


def ended(attack: Attack, victim, **models):
    (end,) = ends_of([attack], {VICTIM: victim, **models})
    return end


def text_of(end) -> str:
    return end.last.text.text


# --- greedy -----------------------------------------------------------------------------------------------------------


def test_a_victim_that_is_wrong_already_is_asked_once_and_skipped():
    end = ended(begun(recipe({"a": ["b"]}), "a"), by_words(0.6))
    assert (end.outcome, text_of(end), end.attack.queries, end.attack.capped) == ("skipped", "a", 1, None)


def test_words_are_replaced_in_the_order_of_what_their_removal_does():
    # Without "two" the victim leans most to the other label, then without "three".
    victim = by_words(0.4, one=-0.01, two=-0.2, three=-0.1, B=0.01, C=0.01, A=0.3)
    swaps = {"one": ["A"], "two": ["B"], "three": ["C"]}
    end = ended(begun(recipe(swaps), "one two three"), victim)
    assert (end.outcome, text_of(end)) == ("failed", "A B C") or end.outcome == "succeeded"
    assert victim.calls == [["one two three"], ["two three", "one three", "one two "], ["one B three"], ["one B C"]] + (
        [["A B C"]] if len(victim.calls) == 5 else []
    )


def test_words_may_be_ranked_by_an_unknown_word_in_their_place():
    victim = by_words(0.2, one=-0.01, two=-0.1, B=0.01)
    ended(begun(recipe({"two": ["B"]}, greedy("unknown")), "one two"), victim)
    assert victim.calls == [["one two"], ["[UNK] two", "one [UNK]"], ["one B"]]


def test_saliency_weighs_what_removal_does_by_the_best_replacement():
    # Both words matter alike. The best replacement of the second one gains more.
    victim = by_words(0.1, A=0.1, B=0.2, C=0.1)
    end = ended(begun(recipe({"one": ["A", "C"], "two": ["B"]}, greedy("saliency")), "one two"), victim)
    assert victim.asked == ["one two", "[UNK] two", "one [UNK]", "A two", "C two", "one B", "A B", "C B"]
    # "one B" is asked again before the second word: it is counted as TextAttack counts, but the victim is not asked.
    assert end.attack.queries == 1 + 2 + 3 + 1 + 2 and text_of(end) == "A B"


def test_the_score_must_rise_or_the_word_stays():
    victim = by_words(0.2, A=-0.1, B=0.1)
    end = ended(begun(recipe({"one": ["A", "one2"], "two": ["B"]}), "one two"), victim)
    assert (end.outcome, text_of(end), end.last.text.changed) == ("failed", "one B", {1})
    assert float(end.last.score) == pytest.approx(0.3)


def test_of_several_texts_that_fool_the_most_similar_is_taken():
    victim = by_words(0.2, A=0.6, B=0.5, C=0.4, D=0.1)
    similarities = {"A": 0.5, "B": 0.7, "C": 0.6, "D": 0.9}

    def measured(attack, candidates, text):
        for candidate in candidates:
            candidate.similarity = similarities[candidate.text.text]
        return candidates
        yield

    swaps = {"one": list(similarities)}
    assert text_of(ended(begun(recipe(swaps, constraints=[measured]), "one"), victim)) == "B"
    assert text_of(ended(begun(recipe(swaps), "one"), victim)) == "A", "without similarities the highest score"


def test_of_equal_scores_the_first_in_the_alphabet_is_taken():
    victim = by_words(0.2, C=0.1, A=0.1, B=0.1)
    assert text_of(ended(begun(recipe({"one": ["C", "A", "B"]}), "one"), victim)) == "A"


def test_stop_words_changed_words_and_equal_texts_are_left_alone():
    swaps = {"one": ["one", "two", "!", ""], "the": ["a"], "two": ["three"]}
    victim = by_words(0.2, two=0.1, a=0.5)
    end = ended(begun(recipe(swaps), "the one", stop=["the"]), victim)
    assert victim.calls == [["the one"], ["the "], ["the two"]] and text_of(end) == "the two"


def test_a_word_that_becomes_two_moves_the_words_after_it():
    victim = by_words(0.1, b=0.1, x=0.1, C=0.1)
    swaps = {"one": ["a b"], "two": ["x"], "three": ["C"]}
    end = ended(begun(recipe(swaps), "one two three"), victim)
    assert end.last.text.words == words_of(text_of(end))
    assert {end.last.text.words[i] for i in end.last.text.changed} == set(end.last.text.words) - {"two", "three", "one"}


def test_a_pair_keeps_its_other_text_in_its_place():
    for first, item in ((True, ("A", "stays")), (False, ("stays", "A"))):
        victim = Victim(lambda pair: 0.9 if "A" in pair else 0.1)
        end = ended(begun(recipe({"one": ["A"]}), "one", other="stays", first=first), victim)
        assert victim.asked[-1] == item and (end.outcome, text_of(end)) == ("succeeded", "A")


@pytest.mark.parametrize("text", ["", "...", "the"])
@pytest.mark.parametrize("search", [greedy("delete"), greedy("saliency"), worst_of(5, 0.5), swarm(3, 2)])
def test_a_text_without_words_to_change_is_failed(search, text):
    end = ended(begun(recipe({"one": ["A"]}, search), text, stop=["the"]), by_words(0.1))
    assert (end.outcome, text_of(end), end.error) == ("failed", text, None)


# --- limits of queries ------------------------------------------------------------------------------------------------

SEARCHES = {
    "delete": greedy("delete"), "unknown": greedy("unknown"), "saliency": greedy("saliency"), "worst": worst_of(7, 0.5),
    "swarm": swarm(4, 3),
}  # fmt: skip
SWAPS = {"one": ["A", "B"], "two": ["C"], "three": ["D", "E", "F"]}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("fools", [False, True])
def test_a_limit_of_queries_is_never_exceeded_and_said_whenever_it_ended_the_search(name, fools):
    weights = {"A": 0.1, "B": 0.12, "C": 0.05, "D": 0.01, "E": 0.15 if fools else 0.03, "F": -0.1, "two": -0.01}
    whole = ended(begun(recipe(SWAPS, SEARCHES[name]), "one two three"), victim := by_words(0.3, **weights))
    total, best = whole.attack.queries, 0.0
    assert total == len(victim.asked) or name in ("saliency", "swarm", "worst")
    for most in range(1, total + 3):
        victim = by_words(0.3, **weights)
        end = ended(begun(recipe(SWAPS, SEARCHES[name]), "one two three", most=most), victim)
        assert len(victim.asked) <= end.attack.queries <= most
        assert end.attack.capped == ("queries" if most < total and not end.last.fooled else None) or end.last.fooled
        if most >= total:
            assert (end.outcome, text_of(end), end.attack.queries, end.attack.capped) == (
                whole.outcome, text_of(whole), total, None,
            )  # fmt: skip
        else:
            assert end.attack.queries == most
        if name != "swarm":
            assert float(end.last.score) >= best, "what was found so far is kept"
            best = float(end.last.score)
        assert end.last.score == pytest.approx(victim.score(text_of(end)), abs=1e-6)
        assert text_of(end) == "one two three" or text_of(end) in victim.asked


def test_a_swarm_cut_short_by_the_limit_keeps_the_best_text_it_asked():
    weights = {"A": 0.15, "C": 0.15, "one": 0.05, "two": 0.05}
    swaps = {"one": ["A"], "two": ["C"]}
    total = ended(begun(recipe(swaps, swarm(4, 6)), "one two"), by_words(0.2, **weights)).attack.queries
    for most in range(2, total + 1):
        victim = by_words(0.2, **weights)
        end = ended(begun(recipe(swaps, swarm(4, 6)), "one two", most=most), victim)
        found = max(victim.score(text) for text in victim.asked)
        assert float(end.last.score) == pytest.approx(found, abs=1e-6) or not end.attack.capped


def test_texts_asked_before_count_and_are_not_asked_again():
    victim = by_words(0.1, A=0.1)
    end = ended(begun(recipe({"one": ["A"]}, greedy("delete")), "x x one"), victim)
    assert len(victim.asked) == len(set(victim.asked)) == 4, "both x leave the same text"
    assert end.attack.queries == 5


# --- worst of random texts --------------------------------------------------------------------------------------------


def test_the_control_asks_the_same_texts_of_every_victim_and_takes_the_worst():
    victims = [by_words(0.1, A=0.2, C=0.1), by_words(0.3, A=-0.2, E=0.1), by_words(0.45, D=0.2)]
    ends = [ended(begun(recipe(SWAPS, worst_of(40, 0.5)), "one two three"), victim) for victim in victims]
    assert victims[0].asked == victims[1].asked == victims[2].asked and ends[0].attack.queries == 41
    for end, victim in zip(ends, victims, strict=True):
        assert end.last.score == pytest.approx(max(map(victim.score, victim.asked)), abs=1e-6)
    assert [end.outcome for end in ends] == ["failed", "failed", "succeeded"]
    tried = set(victims[0].asked)
    assert tried > {"A two three", "one C three"} | {"one two three"} and len(tried) > 12
    allowed = [[word, *SWAPS[word]] for word in ("one", "two", "three")]
    assert tried <= {" ".join(words) for words in itertools.product(*allowed)}


def test_another_seed_or_text_asks_other_texts():
    asked = []
    for seed in (0, 0, 1):
        victim = by_words(0.1)
        attack = begun(recipe(SWAPS, worst_of(10, 0.5)), "one two three")
        attack.seed = seed
        attack.__post_init__()
        ended(attack, victim)
        asked.append(victim.asked)
    assert asked[0] == asked[1] != asked[2]


def test_a_share_of_the_words_is_replaced():
    text = " ".join(["one"] * 50)
    victim = by_words(0.1)
    ended(begun(recipe({"one": ["A"]}, worst_of(40, 0.3)), text), victim)
    assert 0.25 < np.mean([words_of(asked).count("A") / 50 for asked in victim.asked[1:]]) < 0.35


# --- swarm ------------------------------------------------------------------------------------------------------------


REST = " and four more words"


def test_a_swarm_finds_two_words_that_greedy_search_does_not():
    """The best word in place of "one" depends on what stands in place of "two", which greedy search replaces later."""
    scores = {"two": 0.33, "x two": 0.4, "A two": 0.31, "one B": 0.35, "x B": 0.3, "A B": 0.9}
    swaps, victim = {"one": ["A", "x"], "two": ["B"]}, Victim(lambda text: scores.get(text.removesuffix(REST), 0.3))
    end = ended(begun(recipe(swaps), f"one two{REST}"), victim)
    assert (end.outcome, text_of(end)) == ("failed", f"x two{REST}")
    end = ended(begun(recipe(swaps, swarm(20, 20)), f"one two{REST}"), victim)
    assert (end.outcome, text_of(end), end.last.text.changed) == ("succeeded", f"A B{REST}", {0, 1})
    again = ended(begun(recipe(swaps, swarm(20, 20)), f"one two{REST}"), victim)
    assert again.attack.queries == end.attack.queries, "its draws are its own"


def test_a_swarm_finds_two_words_each_of_which_alone_lowers_the_score():
    """Its first step draws any word, as TextAttack's does: no word alone raises the score."""
    swaps = {"good": ["fine"], "film": ["movie"], "plot": ["story"]}
    scores = [0.3, 0.2, 0.9, 0.9]  # by how many words were replaced
    victim = Victim(lambda text: scores[sum(word not in swaps for word in words_of(text))])
    end = ended(begun(recipe(swaps, swarm(60, 20)), "good film plot"), victim)
    assert (end.outcome, len(end.last.text.changed)) == ("succeeded", 2)


def test_a_particle_that_nothing_improves_draws_among_all_words_and_stays_at_one_without_candidates():
    victim, moved = by_words(0.3, A=-0.1), []
    for seed in range(300):
        attack = begun(recipe({"one": ["A"]}, swarm(1, 0)), "one x the y", stop=["the"])
        attack.seed = seed
        attack.__post_init__()
        moved.append(text_of(ended(attack, victim)) == "A x the y")
    assert 0.17 < np.mean(moved) < 0.33, "one word of four"


def test_a_particle_becomes_the_best_text_with_some_of_its_own_words():
    text, best = Text("one two X four", frozenset({2})), Text("A B three D", frozenset({0, 1, 3}))
    met = _met(text, best, np.array([True, False, True, False]))
    assert (met.text, met.changed) == ("one B X D", {1, 2, 3})


def test_a_swarm_changes_only_words_that_may_be_changed_and_each_once():
    swaps = {"one": ["A"], "A": ["AA"], "two": ["B"], "the": ["THE"]}
    victim = by_words(0.1, A=0.1, B=0.1, AA=0.5, THE=0.7)
    end = ended(begun(recipe(swaps, swarm(10, 5)), "the one two", stop=["the"]), victim)
    assert set(victim.asked) <= {"the one two", "the A two", "the one B", "the A B"}
    assert (end.outcome, text_of(end)) == ("failed", "the A B")


def test_a_swarm_keeps_to_its_constraints_where_words_of_two_texts_meet():
    victim = by_words(0.1, A=0.1, B=0.1, C=0.1)
    swaps = {"one": ["A"], "two": ["B"], "three": ["C"]}
    attack = begun(recipe(swaps, swarm(10, 10), [changed_at_most(0.5)]), "one two three")  # of 3 words 2
    ended(attack, victim)
    assert "A B C" not in victim.asked and "A B three" in victim.asked


# --- lock-step --------------------------------------------------------------------------------------------------------

TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(("one", "two", "x"), ("two", "three", "one"), ("three", "y"))]


def seen(ends) -> dict:
    return {
        end.attack.example: (end.outcome, None if end.last is None else text_of(end), end.attack.queries, end.error)
        for end in ends
    }


@pytest.mark.parametrize("name", SEARCHES)
def test_outcomes_depend_neither_on_the_width_nor_on_the_order(name):
    weights = {"A": 0.1, "B": 0.12, "C": 0.15, "D": 0.2, "E": 0.21, "F": -0.1}
    found = []
    for width, order in ((1, 1), (3, 1), (128, 1), (3, -1)):
        attacks = [begun(recipe(SWAPS, SEARCHES[name]), text, number=i) for i, text in enumerate(TEXTS)][::order]
        found.append(seen(ends_of(attacks, {VICTIM: by_words(0.2, **weights)}, width=width)))
    assert len(found[0]) == len(TEXTS) and found == found[:1] * 4
    assert {outcome for outcome, *_ in found[0].values()} == {"succeeded", "failed"}


def test_attacks_that_wait_share_a_call_and_equal_items_are_asked_once():
    victim = by_words(0.1, wrong=0.6, A=0.1)
    texts = ["one x", "one x", "x one", "wrong", "wrong"]  # the first three go together
    attacks = [begun(recipe({"one": ["A"]}), text, number=i) for i, text in enumerate(texts)]
    assert len(seen(ends_of(attacks, {VICTIM: victim}))) == 5
    assert victim.calls[:2] == [["one x", "x one"], ["wrong"]]
    assert len(victim.calls) == 4 and max(Counter(victim.asked).values()) == 1


def test_what_has_ended_is_told_before_the_next_calls_have_ended():
    heard, seen_, ask = threading.Event(), [], by_words(0.1, wrong=0.6, A=0.1)

    def victim(items):
        if "x" in items:  # "one x" without its first word, after the answer that ends "wrong"
            seen_.append(heard.wait(20))
        return ask(items)

    attacks = [begun(recipe({"one": ["A"]}), text) for text in ("one x", "wrong")]
    for end in lockstep.run([*attacks, begun(recipe({}), "slow")], {VICTIM: victim}):
        if end is not None and end.outcome == "skipped":
            heard.set()
    assert seen_ == [True]


def test_one_half_goes_on_while_the_models_answer_the_other():
    further, waited, ask = threading.Event(), [], by_words(0.1, wrong=0.6, A=0.1)

    def attacks():
        yield from (begun(recipe({}), text) for text in ("wrong", "slow"))
        further.set()  # "wrong" has ended
        yield begun(recipe({}), "one")

    def victim(items):
        if items == ["slow"]:
            waited.append(further.wait(20))
        return ask(items)

    assert len(list(ends_of(attacks(), {VICTIM: victim}, width=2))) == 3 and waited == [True]


def test_attacks_that_end_at_once_leave_their_places_to_others():
    def broken():
        raise KeyError("at once")
        yield

    attacks = [begun(recipe({}), f"one {i}", number=i) for i in range(9)]
    for attack in attacks[:6]:
        attack.run = broken
    found = seen(ends_of(attacks, {VICTIM: by_words(0.1)}, width=4))
    assert sorted(found) == list(range(9)) and [found[i][0] for i in range(9)] == ["error"] * 6 + ["failed"] * 3


def test_an_error_in_the_thread_of_the_models_is_raised_and_the_thread_ends():
    def victim(items):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ends_of([begun(recipe({}), "one")], {VICTIM: victim}))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("attacked models")]


def test_no_more_attacks_are_begun_than_the_width():
    victim, begun_ = by_words(0.1, A=0.1), []
    attacks = (begun_.append(i) or begun(recipe({"one": ["A"]}), f"one {i}", number=i) for i in range(10))
    ends = ends_of(attacks, {VICTIM: victim}, width=3)
    next(ends)
    assert len(begun_) <= 4 and max(len(call) for call in victim.calls) <= 6
    assert len(list(ends)) == 9


@pytest.mark.parametrize("where", ["transform", "constraint", "victim", "rows"])
def test_an_error_of_one_attack_ends_that_attack_alone(where):
    def transform(attack, text, index):
        if where == "transform" and "bad" in text.text:
            raise KeyError("no such word")
        return ["A"] if text.words[index] == "one" else []
        yield

    def constraint(attack, candidates, text):
        if where == "constraint" and "bad" in text.text:
            raise CheckpointError("encoder: broken", fix="mend it")
        return candidates
        yield

    model = by_words(0.2, A=0.5)

    def victim(items):
        if where == "victim" and any("bad" in item for item in items):
            raise ValueError("cannot read\nthis text")
        rows = model(items)
        return rows[:-1] if where == "rows" and any("bad" in item for item in items) else rows

    attacks = [
        begun(recipe({}, constraints=[constraint], transform=transform), text, number=i)
        for i, text in enumerate(["one a", "bad one", "one c"])
    ]
    found = seen(ends_of(attacks, {VICTIM: victim}))
    assert found[0][:2] == ("succeeded", "A a") and found[2][:2] == ("succeeded", "A c")
    assert found[1][:2] == ("error", None)
    says = {"transform": "'no such word'", "constraint": "encoder: broken; mend it", "victim": "cannot read"}
    assert found[1][3] == says.get(where, found[1][3]) and found[1][3]


def test_logits_that_are_not_finite_are_an_error_not_an_outcome():
    victim = lambda items: np.full((len(items), 2), np.nan, np.float32)  # noqa: E731
    end = ended(begun(recipe({"one": ["A"]}), "one"), victim)
    assert end.outcome == "error" and "finite" in end.error


def test_what_is_no_fault_of_an_example_stops_the_run():
    def victim(items):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ended(begun(recipe({}), "one"), victim)


def test_an_attack_out_of_time_has_failed_and_says_so_and_counts_what_was_answered(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(lockstep.time, "perf_counter", lambda: float(next(clock)))  # a second a call
    (end,) = ends_of([begun(recipe(SWAPS), "one two three")], {VICTIM: by_words(0.1, A=0.1)}, seconds=1.5)
    assert (end.outcome, text_of(end), end.attack.capped) == ("failed", "one two three", "seconds")
    assert end.attack.seconds == 2 and end.attack.queries == 4


def test_a_text_that_the_victim_gets_wrong_is_skipped_however_long_its_first_answer_took(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(lockstep.time, "perf_counter", lambda: float(next(clock)))
    attacks = [begun(recipe(SWAPS), text, number=i) for i, text in enumerate(["one", "wrong"])]
    found = seen(ends_of(attacks, {VICTIM: by_words(0.1, wrong=0.6)}, seconds=0.1))
    assert found[0][:2] == ("failed", "one") and found[1][:2] == ("skipped", "wrong")


def test_time_is_charged_by_the_share_of_the_items(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(lockstep.time, "perf_counter", lambda: float(next(clock)))
    attacks = [begun(recipe({}), text, number=i) for i, text in enumerate(["a b c", "a", "wrong"])]
    ends = {end.attack.example: end.attack for end in ends_of(attacks, {VICTIM: by_words(0.1, wrong=0.6)})}
    assert ends[0].seconds == 0.5 + 3 / 4 and ends[1].seconds == 0.5 + 1 / 4


def test_a_long_text_is_never_held_once_per_word():
    words, sizes = 3000, []

    def victim(items):
        sizes.append(len(items))
        return np.tile(np.float32([1, 0]), (len(items), 1))

    end = ended(begun(recipe({}), " ".join(["one"] * words)), victim)
    assert end.outcome == "failed" and end.attack.queries == words + 1
    assert max(sizes) <= CHUNK


def test_chunks_change_no_outcome(monkeypatch):
    victim = by_words(0.2, A=0.1, D=0.3)
    whole = ended(begun(recipe(SWAPS, greedy("saliency")), "one two three one"), victim)
    monkeypatch.setattr(sys.modules[Attack.__module__], "CHUNK", 2)
    cut = ended(begun(recipe(SWAPS, greedy("saliency")), "one two three one"), victim)
    assert seen([whole]) == seen([cut])


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_every_attack_of_the_settings_has_a_recipe():
    assert tuple(RECIPES) == ATTACKS
    assert [r.name for r in named("pwws, textfooler,pwws")] == ["pwws", "textfooler"]
    with pytest.raises(InputError, match=r"attacks must be among textfooler, .*, got 'nope'"):
        named("pwws,nope")


def test_every_attack_ends_on_toy_models():
    """TextFooler's resources and all searches together, on words that the packaged tables know."""

    class Stub:
        real = Resources(encoder="none")
        neighbours, synonyms, tagger, encoder = real.neighbours, real.synonyms, None, True

    def proposals(blanks):
        return [["movie", "great", "bad"] for _ in blanks]

    def embed(texts):
        rows = np.stack([np.array([10.0, len(text) % 7], np.float32) for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    text = "The old actor gives a good performance and the film is never dull or stupid at all"
    score = lambda text: 0.2 + 0.02 * ((sum(map(ord, text)) + 4) % 20)  # noqa: E731
    for name in (name for name in ATTACKS if name != "transfer"):  # it has no words of its own
        attack = Attack(RECIPES[name], Stub, 0, Text(text), None, True, 0, 0, frozenset({"the", "a"}), 3000)
        end = ended(attack, Victim(score), **{ENCODER: embed, MASKED_LM: proposals})
        assert end.outcome in ("succeeded", "failed"), (name, end.error)
        assert (text_of(end) != text) and len(end.last.text.changed) >= 1, name
        assert attack.queries > 10


# --- masked language models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert", "roberta"])
def masked_directory(request, tmp_path_factory):
    """A random masked-language model. Its tokenizer names no max length."""
    directory = tmp_path_factory.mktemp("masked") / request.param
    kind, sizes = request.param, {**SIZES, "max_position_embeddings": 64}
    sizes["vocab_size"] = len(tokenizer(kind)) if kind == "roberta" else sizes["vocab_size"]
    torch.manual_seed(0)
    made = {"bert": ("BertConfig", "BertForMaskedLM"), "roberta": ("RobertaConfig", "RobertaForMaskedLM")}[kind]
    model = getattr(transformers, made[1])(getattr(transformers, made[0])(**sizes))
    model.save_pretrained(directory)
    tokenizer(kind).save_pretrained(directory)
    said = json.loads((directory / "tokenizer_config.json").read_text())
    said.pop("model_max_length", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    return directory


@pytest.fixture(scope="module")
def masked(masked_directory):
    return MaskedLM.load(masked_directory)


def place(text: str, word: str, masked: bool = True, most: int = 40) -> Blank:
    return Blank(text, text.index(word), text.index(word) + len(word), masked, most)


@pytest.mark.parametrize("hidden", [True, False])
def test_each_proposal_is_one_word_without_marks_of_pieces(masked, hidden):
    (found,) = masked.propose([place("a good film", "a", hidden)])
    assert len(found) <= 40 and all(len(words_of(word)) == 1 for word in found)
    assert len(found) > (30 if hidden else 1), "numbers are left out"
    assert not any(mark in word for word in found for mark in ("Ġ", "▁", "##"))
    if not hidden:
        ids = masked._tokenizer("a good film", return_tensors="pt")
        likely = masked._model(**ids).logits[0, 1].topk(40).indices.tolist()
        assert set(found) <= {masked._tokenizer.decode([i]).strip() for i in likely}


class Ranked:
    """A masked-language model that ranks tokens as it is told: a list per piece of the text, the likeliest first."""

    config = transformers.BertConfig(max_position_embeddings=64)

    def __init__(self, *ranked: list[str]):
        self.ranked = ranked

    def __call__(self, input_ids, **_):
        logits = torch.full((*input_ids.shape, len(tokenizer())), -1000.0)
        for at, tokens in enumerate(self.ranked, 1):
            logits[:, at, tokenizer().convert_tokens_to_ids(tokens)] = -torch.arange(len(tokens), dtype=torch.float32)
        return transformers.modeling_outputs.MaskedLMOutput(logits=logits)


def ranked(*lists: list[str]) -> MaskedLM:
    return MaskedLM(Ranked(*lists), tokenizer(), "ranked", "")


@pytest.fixture(scope="module")
def words():
    return sorted(word for word in tokenizer().get_vocab() if word.isalpha() and word.isascii() and len(word) > 2)[:100]


def test_of_a_mask_the_ranking_is_read_until_there_are_as_many_words_as_wanted(words):
    noise = ["[UNK]", ".", ",", "!", "-", "'", "?", ";", "[SEP]", "`"]
    (found,) = ranked([*noise, "##ing", *words]).propose([place("a good film", "a", most=50)])
    assert found == ["ing", *words[:49]]
    # As in TextAttack a number is one of the 50, and is then left out.
    (found,) = ranked(["1995", *noise, "2nd", *words]).propose([place("a good film", "a", most=50)])
    assert found == ["2nd", *words[:48]]


def test_of_a_word_of_one_piece_the_words_among_the_first_tokens_are_proposed(words):
    tokens = [".", "##ing", "1995", *words]
    (found,) = ranked(tokens).propose([place("a good film", "a", False, most=8)])
    assert found == ["1995", *words[:5]]


def test_of_a_word_of_several_pieces_the_first_combinations_are_proposed(words):
    word, ends = "unbelievabel", [f"##{letter}" for letter in "abcdefgh"]
    blank = place(f"{word} film", word, False, most=3)
    assert len(tokenizer().tokenize(word)) == 5
    (found,) = ranked(words, ends, ends, ends, ["##x", ".", *ends]).propose([blank])
    assert found == [f"{words[0]}aaa{end}" for end in ("x", ".", "a")], "the last piece changes first"
    (found,) = ranked([".", *words], ["-", *ends], ends, ends, ends).propose([blank])
    assert found == [".-aaa", ".-aab", ".-aac"], "one word, whatever stands before it"
    (found,) = ranked(words, [".", *ends], ends, ends, ends).propose([blank._replace(most=8)])
    assert found == [], "two words each; combinations beyond the first 512 are not looked at"


def test_a_masked_word_is_not_seen_and_an_unmasked_one_is(masked):
    texts = ["the cat slept", "the dog slept"]
    hidden = masked.propose([place(text, text.split()[1]) for text in texts])
    assert hidden[0] == hidden[1] == masked.propose([place(texts[0], "cat")])[0], "alone or beside others"


def test_of_a_word_of_several_pieces_each_piece_is_replaced(masked):
    for text, begin, end in (("a unbelievabel film", 2, 14), ("a filmic x", 2, 8)):
        (found,) = masked.propose([Blank(text, begin, end, False, 8)])
        assert 1 <= len(found) <= 8 and all(len(words_of(word)) == 1 for word in found)


def test_the_words_place_is_filled_not_another_mask_of_the_text(masked):
    mask = masked._tokenizer.mask_token
    text = f"{mask} is a good film"
    first, later = (masked.propose([place(text, word)])[0] for word in (mask, "good"))
    assert first != later


def test_texts_beyond_the_positions_are_cut_and_places_beyond_have_no_proposals(masked):
    text = "one " * 100 + "good"
    near, far = Blank(text, 0, 3, True, 10), Blank(text, text.index("good"), len(text), True, 10)
    found = masked.propose([near, far, far._replace(masked=False)])
    assert found[0] and found[1:] == [[], []]


def test_a_directory_without_a_masked_language_head_is_refused(tmp_path):
    saved(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="must be a masked-language model, lacks cls"):
        MaskedLM.load(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="absent"):
        MaskedLM.load(tmp_path / "absent")


# --- sentence encoders ------------------------------------------------------------------------------------------------

SENTENCES = ["a good film", "A rather long sentence, with commas; and more!", "x", "the film " * 40]
MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def encoder_at(directory, kind: str = "bert", pooling: dict | None = MEAN, modules: list[str] | None = None, **sizes):
    model = classifier(kind=kind, **sizes)
    base = getattr(model, model.base_model_prefix)
    base.save_pretrained(directory)
    tokenizer(kind).save_pretrained(directory)
    if pooling is not None:
        (directory / POOLING).parent.mkdir()
        (directory / POOLING).write_text(json.dumps(pooling))
    if modules is not None:
        (directory / MODULES).write_text(
            json.dumps([{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)])
        )
    return base.eval(), tokenizer(kind)


def mean_pooled(model, tokenizer, texts: list[str], max_length: int) -> np.ndarray:
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**ids).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows)).numpy()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_an_embedding_is_the_mean_over_tokens_of_length_one(tmp_path, kind):
    model, tok = encoder_at(tmp_path / kind, kind)
    found = SentenceEncoder.load(tmp_path / kind).embed(SENTENCES)
    assert found.dtype == np.float32 and np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert found == pytest.approx(mean_pooled(model, tok, SENTENCES, 512), abs=1e-4)


def test_the_packaged_encoder_is_minilm():
    encoder = SentenceEncoder.load("minilm")
    path = checkpoint.resolve("minilm")
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    found = encoder.embed([*SENTENCES, "word " * 300])
    assert found == pytest.approx(mean_pooled(model, tokenizer(), [*SENTENCES, "word " * 300], 256), abs=1e-4)
    assert encoder.name == "all-MiniLM-L6-v2"
    for text, row in zip(SENTENCES, found, strict=False):
        assert np.array_equal(encoder.embed([text])[0], row), "a text alone and in a batch has the same bits"


def test_long_texts_are_cut_where_the_encoder_says_and_that_is_part_of_its_key(tmp_path):
    model, tok = encoder_at(tmp_path / "a")
    whole = SentenceEncoder.load(tmp_path / "a")
    (tmp_path / "a" / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    cut = SentenceEncoder.load(tmp_path / "a")
    assert cut.embed(SENTENCES) == pytest.approx(mean_pooled(model, tok, SENTENCES, 16), abs=1e-4)
    assert cut.sha256 != whole.sha256 == SentenceEncoder.load(tmp_path / "a").sha256 or whole.sha256 != cut.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": None}, f"lacks {POOLING}"),
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}, f"{POOLING} says otherwise"),
        ({"pooling": {**MEAN, "pooling_mode_max_tokens": True}}, f"{POOLING} says otherwise"),
        ({"pooling": {"pooling_mode": "cls"}}, f"{POOLING} says otherwise"),
        ({"pooling": {}}, f"{POOLING} says otherwise"),
        ({"modules": ["Transformer", "Pooling", "Dense"]}, f"{MODULES} says otherwise"),
        ({"modules": ["WordEmbeddings", "Pooling"]}, f"{MODULES} says otherwise"),
    ],
)
def test_an_encoder_that_pools_in_another_way_is_refused(tmp_path, changes, message):
    encoder_at(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=f"must be a sentence encoder that takes the mean over tokens: {message}"):
        SentenceEncoder.load(tmp_path / "a")


PROMPTED = {"prompts": {"query": "query: ", "document": ""}}


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case must be false, as the tokenizer keeps"),
        ("sentence_roberta_config.json", {"do_lower_case": True}, "do_lower_case must be false"),
        (
            "sentence_bert_config.json",
            {"max_seq_length": "128"},
            "max_seq_length must be a number of tokens, got '128'",
        ),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length must be a number of tokens, got 0"),
        ("sentence_bert_config.json", [1], r"must hold an object, got \[1\]"),
        (
            "config_sentence_transformers.json",
            {**PROMPTED, "default_prompt_name": "query"},
            "the prompt of default_prompt_name must be empty, got 'query: '",
        ),
    ],
    ids=str,
)
def test_an_encoder_that_changes_texts_first_is_refused(tmp_path, name, held, message):
    encoder_at(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": False}))
    SentenceEncoder.load(tmp_path / "a")
    (tmp_path / "a" / name).write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=f"{name}: {message}|{name} {message}"):
        SentenceEncoder.load(tmp_path / "a")


@pytest.mark.parametrize("default", [None, "document"])
def test_an_encoder_that_would_change_nothing_is_taken(tmp_path, default):
    encoder_at(tmp_path / "a")
    (tmp_path / "a" / "sentence_bert_config.json").write_text('{"do_lower_case": true, "max_seq_length": null}')
    prompts = json.dumps({**PROMPTED, "default_prompt_name": default})
    (tmp_path / "a" / "config_sentence_transformers.json").write_text(prompts)
    assert SentenceEncoder.load(tmp_path / "a").embed(["A"]).shape == (1, 32)


@pytest.mark.parametrize(("sizes", "length"), [(None, 20), ({}, 20), ({"max_seq_length": 40}, 40)])
def test_an_encoder_without_a_length_of_its_own_cuts_where_its_tokenizer_does(tmp_path, sizes, length):
    model, tok = encoder_at(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 20}))
    if sizes is not None:
        (tmp_path / "a" / "sentence_bert_config.json").write_text(json.dumps(sizes))
    found = SentenceEncoder.load(tmp_path / "a").embed(SENTENCES)
    assert found == pytest.approx(mean_pooled(model, tok, SENTENCES, length), abs=1e-4)


@pytest.mark.parametrize("pooling", [MEAN, {"pooling_mode": "mean", "include_prompt": True}])
def test_mean_pooling_of_any_version_and_a_scaling_after_it_are_taken(tmp_path, pooling):
    encoder_at(tmp_path / "a", pooling=pooling, modules=["Transformer", "Pooling", "Normalize"])
    assert SentenceEncoder.load(tmp_path / "a").embed(["a"]).shape == (1, 32)
