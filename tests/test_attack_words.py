"""What attacks are made of: words, transformations, constraints, a tagger, and the files that they read."""

from __future__ import annotations

import json
import math
import string
import warnings
import zipfile
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from conftest import local_data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsebert import environment
from sparsebert.config import AttackConfig
from sparsebert.errors import DataError, SparsebertWarning
from sparsebert.robustness.attacks import RECIPES, Plan, resources
from sparsebert.robustness.attacks import transformations as changes
from sparsebert.robustness.attacks.attack import ENCODER, Attack, Candidate
from sparsebert.robustness.attacks.constraints import (
    changed_at_most,
    edits_at_most,
    same_part_of_speech,
    similar,
    within,
)
from sparsebert.robustness.attacks.plan import textfooler_stopwords
from sparsebert.robustness.attacks.resources import Neighbours, Resources, Synonyms
from sparsebert.robustness.attacks.tagger import UNIVERSAL, Tagger
from sparsebert.robustness.attacks.transformations import Draws, Source
from sparsebert.robustness.attacks.words import LOOKALIKES, Text, spans_of, words_of

# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A good, good film!", ["A", "good", "good", "film"]),
        ("don't   re-make it", ["don't", "re-make", "it"]),
        ("'quoted' -dash- _under_ *star* @at@", ["quoted", "dash", "under", "star", "at"]),
        ("it's the actors' well--made film", ["it's", "the", "actors", "well--made", "film"]),
        ("user@host snake_case 5*4 1990s", ["user@host", "snake_case", "5*4", "1990s"]),
        ("3.5 e.g. and/or (yes)no", ["3", "5", "e", "g", "and", "or", "yes", "no"]),
        ("a.-b x_.y", ["a", "b", "x", "y"]),
        ("gοod ‘curly’ it’s", ["gοod", "curly", "it", "s"]),
        ("`tick` b×c", ["`tick`", "b×c"]),  # both are among the letters that look like others
        ("fi𝚏m 𝟕up ˗x", ["fi𝚏m", "𝟕up", "˗x"]),
        ("été naïve 電影", ["été", "naïve", "電影"]),
        ("tab\tline\nbreak\u00a0hard", ["tab", "line", "break", "hard"]),
        ("", []),
        (" \n ", []),
        ("... -- ' ' -_*@ !", []),
    ],
)
def test_words_are_those_of_textattack(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("text", "index", "without"),
    [
        ("a good film", 0, "good film"),
        ("a good film", 1, "a film"),
        ("a good film", 2, "a good "),  # as in TextAttack: only where something follows
        ("a good film.", 2, "a good."),
        ("  a good", 0, "  good"),
        ("a  good film", 1, "a  film"),
        ("a\tgood film", 1, "a\t film"),
        ("'a' good", 0, "'' good"),
        ("word", 0, ""),
        ("(word)", 0, "()"),
    ],
)
def test_a_word_is_removed_with_one_space(text, index, without):
    assert Text(text).with_word(index, "").text == without


def test_several_words_in_place_of_one_are_all_the_latest_and_later_ones_move():
    start = Text("a good long film", frozenset({0, 1, 3}))
    made = start.with_word(1, "very very good")
    assert made.text == "a very very good long film" and made.latest == (1, 2, 3)
    assert made.changed == {0, 1, 2, 3, 5}
    assert made.words == words_of(made.text) == ["a", "very", "very", "good", "long", "film"]
    assert (start.text, start.changed) == ("a good long film", {0, 1, 3}), "the text itself stays"


def test_one_word_in_place_of_one_moves_nothing():
    made = Text("a good long film", frozenset({0, 3})).with_word(1, "well-made")
    assert (made.latest, made.changed) == ((1,), {0, 1, 3})
    again = made.with_word(1, "re'made")
    assert (again.text, again.changed) == ("a re'made long film", {0, 1, 3})


ALPHABET = st.text(st.sampled_from("ab Z1é.,'-_*@`˗\n\t(𝟕"), max_size=24)
WORDS = st.one_of(st.text(st.sampled_from("abZ1-'`"), min_size=1, max_size=5), st.sampled_from(["x y", "a-", "x y z"]))


@given(ALPHABET)
@settings(max_examples=100, deadline=None)
def test_spans_cut_the_words_out_of_the_text_in_order(text):
    spans = spans_of(text)
    assert [text[a:b] for a, b in spans] == words_of(text) and all(a < b for a, b in spans)
    assert all(before[1] < after[0] for before, after in pairwise(spans)), "something is between"


@given(ALPHABET, WORDS, st.data())
@settings(max_examples=150, deadline=None)
@example("a.-b", "c", None)
def test_a_new_word_changes_nothing_else(text, word, data):
    old = Text(text)
    if not old.words or not words_of(word):
        return
    index = 0 if data is None else data.draw(st.integers(0, len(old.words) - 1))
    changed = frozenset() if data is None else data.draw(st.frozensets(st.integers(0, len(old.words) - 1)))
    old.changed = changed
    start, end = old.spans[index]
    made = old.with_word(index, word)
    assert made.text == text[:start] + word + text[end:]
    assert made.spans == spans_of(made.text)
    assert made.words == words_of(made.text) == old.words[:index] + words_of(word) + old.words[index + 1 :]
    assert [made.words[i] for i in made.latest] == words_of(word)
    moved = len(words_of(word)) - 1
    others = {i if i < index else i + moved for i in changed - {index}}
    assert made.changed == others | set(made.latest)


def test_windows_stand_around_a_word_and_stop_at_both_ends():
    text = Text("0, 1. 2 3 4 5 6 7! 8 9?")
    assert [text.window(i, 5) for i in (0, 1, 2, 3, 7, 8, 9)] == [
        "0, 1. 2 3 4", "0, 1. 2 3 4", "0, 1. 2 3 4", "1. 2 3 4 5", "5 6 7! 8 9", "5 6 7! 8 9", "5 6 7! 8 9",
    ]  # fmt: skip
    assert text.window(4, None) == "0, 1. 2 3 4 5 6 7! 8 9", "the whole text, from its first word to its last"
    assert {text.window(i, 15) for i in range(10)} == {text.window(0, None)}, "a text shorter than the window"
    assert Text("(one)").window(0, 15) == "one"


# --- transformations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "near"),
    [("good", "fine"), ("GOOD", "FINE"), ("Good", "Fine"), ("gOOd", "fiNe"), ("I", "fiNe"), ("1", "fiNe")],
)
def test_a_neighbour_is_written_in_the_case_of_the_word(word, near):
    assert changes.in_case_of(word, "fiNe") == near


def source(seed: int = 0, text: str = "some text") -> Source:
    return Source(Resources(), Draws(seed, text))


def test_draws_depend_on_seed_text_and_purpose_and_on_nothing_else():
    draws = Draws(3, "a text")
    first = [draws.below(10**9, "swap", word) for word in ("a", "b")]
    assert first == [draws.below(10**9, "swap", word) for word in ("b", "a")][::-1]
    others = [
        Draws(4, "a text").below(10**9, "swap", "a"), Draws(3, "b text").below(10**9, "swap", "a"),
        draws.below(10**9, "delete", "a"), first[1],
    ]  # fmt: skip
    assert len({first[0], *others}) == 5
    assert first[0] == Draws(3, "a text").below(10**9, "swap", "a")


def test_draws_are_even():
    counts = np.bincount([Draws(0, "t").below(5, i) for i in range(5000)], minlength=5)
    assert len(counts) == 5 and counts.min() > 880  # 1,000 ± 28 each


OF_CHARACTERS = {
    "swap": changes.swap_characters,
    "swap inside": changes.inner(changes.swap_characters),
    "substitute": changes.substitute_character,
    "delete": changes.delete_character,
    "delete inside": changes.inner(changes.delete_character),
    "insert": changes.insert_character,
    "lookalikes": changes.lookalikes,
}
PLAIN = st.text(st.sampled_from(string.ascii_letters + "0123456789'-é"), min_size=1, max_size=12).filter(
    lambda word: words_of(word) == [word]
)


@given(PLAIN, st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_a_change_of_a_character_is_one_edit_that_leaves_one_word(word, seed):
    for name, change in OF_CHARACTERS.items():
        for other in change(word, source(seed)):
            assert len(words_of(other)) == 1, name
            assert within(word, other, 2 if "swap" in name else 1), name
            if "inside" in name:
                assert (other[0], other[-1]) == (word[0], word[-1])
            lengths = {"delete": -1, "insert": 1}
            assert len(other) - len(word) == lengths.get(name.split()[0], 0)
            if "swap" in name:
                assert sorted(other) == sorted(word)


@given(PLAIN)
@settings(max_examples=100, deadline=None)
def test_a_space_falls_inside_the_word(word):
    found = changes.insert_space(word, source())
    assert [other.replace(" ", "") for other in found] == ([word] if len(word) > 2 else [])
    assert all(not part.strip() == "" for other in found for part in other.split(" "))


@pytest.mark.parametrize(
    ("change", "shortest"),
    [("swap", 2), ("swap inside", 4), ("substitute", 2), ("delete", 2), ("delete inside", 3), ("insert", 2)],
)
def test_words_too_short_for_a_change_have_none(change, shortest):
    lengths = [len(OF_CHARACTERS[change]("abcdefg"[:n], source())) for n in range(1, 8)]
    assert lengths == [int(n >= shortest) for n in range(1, 8)]


def test_every_place_is_drawn_at_some_seed():
    found = {name: {change("abcd", source(seed))[0] for seed in range(300)} for name, change in OF_CHARACTERS.items()}
    assert found["swap"] == {"bacd", "acbd", "abdc"} and found["swap inside"] == {"acbd"}
    assert found["delete"] == {"bcd", "acd", "abd", "abc"} and found["delete inside"] == {"acd", "abd"}
    upper = [other for other in found["insert"] if not other.islower()]
    assert {next(i for i, c in enumerate(other) if c.isupper()) for other in upper} == {0, 1, 2, 3}
    assert {changes.insert_space("abcd", source(seed))[0] for seed in range(50)} == {"a bcd", "ab cd"}


def test_each_character_in_turn_looks_like_another():
    assert changes.lookalikes("aXa", source()) == ["ɑXa", "aXɑ"]
    assert len(set(LOOKALIKES.values()) & set(LOOKALIKES)) <= 2 and all(a != b for a, b in LOOKALIKES.items())


def test_neighbours_are_the_nearest_ones_that_are_near_enough():
    asked = []
    table = type("Table", (), {"of": staticmethod(lambda word, least: asked.append((word, least)) or ["x", "y", "z"])})
    stub = Source(type("R", (), {"neighbours": table})(), Draws(0, ""))
    assert changes.neighbours(2, 0.5)("Good", stub) == ["X", "Y"] and asked == [("Good", 0.5)]


# --- constraints -----------------------------------------------------------------------------------------------------


def toy(original: str, resources=None) -> Attack:
    return Attack(RECIPES["pwws"], resources, 0, Text(original), None, True, 0, 0, frozenset())


def ask(steps, models=None):
    """What a part of an attack returns, asking `models` by name."""
    answer = None
    while True:
        try:
            question = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = models[question.model](question.items)


def allowed(constraint, attack: Attack, texts: list[Text], text: Text | None = None, models=None) -> list[str]:
    candidates = [Candidate(made) for made in texts]
    found = ask(constraint(attack, candidates, text or attack.original), models)
    assert found == [c for c in candidates if c in found], "in their order"
    return [candidate.text.text for candidate in found]


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left = [i]
        for j, y in enumerate(b, 1):
            left.append(min(row[j] + 1, left[-1] + 1, row[j - 1] + (x != y)))
        row = left
    return row[-1]


SHORT = st.text(st.sampled_from("abc"), max_size=24)


@given(SHORT, SHORT, st.integers(0, 25))
@settings(max_examples=300, deadline=None)
def test_columns_of_bits_decide_as_the_whole_table(a, b, most):
    assert within(a, b, most) == (levenshtein(a, b) <= most)


def test_edits_are_counted_from_the_original():
    attack = toy("abc def")
    text = attack.original.with_word(0, "xyz")
    assert allowed(edits_at_most(4), attack, [text.with_word(1, "dex"), text.with_word(1, "dxx")], text) == ["xyz dex"]


def test_at_most_a_share_of_the_words_differs_rounded_up():
    attack = toy("a b c d e f")  # 0.4 of 6 are 2.4, so 3
    made = [attack.original]
    for i in range(4):
        made.append(made[-1].with_word(i, "x"))
    assert allowed(changed_at_most(0.4), attack, made) == ["a b c d e f", "x b c d e f", "x x c d e f", "x x x d e f"]


class Parts:
    """A tagger that knows each word's tag, and notes what it was asked."""

    def __init__(self, **tags: str):
        self.tags, self.asked = tags, []

    def tag(self, words: tuple[str, ...], at: int) -> str:
        self.asked.append((words, at))
        return self.tags[words[at]]


def with_tagger(tagger, synonyms=None):
    return type("R", (), {"tagger": None if tagger is None else (tagger, "sha"), "synonyms": synonyms})()


def test_parts_of_speech_must_agree_and_nouns_may_stand_for_verbs():
    tagger = Parts(a="DET", run="VERB", sprint="NOUN", fast="ADJ", go="VERB")
    attack = toy("a run", with_tagger(tagger))
    made = [attack.original.with_word(1, word) for word in ("sprint", "fast", "go")]
    assert allowed(same_part_of_speech, attack, made) == ["a sprint", "a go"]
    attack = toy("a fast", with_tagger(tagger))
    assert allowed(same_part_of_speech, attack, [attack.original.with_word(1, "run")]) == []


def test_a_word_is_tagged_between_four_words_before_it_and_three_after_it():
    tagger = Parts(**dict.fromkeys("abcdefghij", "NOUN"), x="NOUN")
    attack = toy("a b c d e f g h i j", with_tagger(tagger))
    text = attack.original.with_word(4, "j")  # words around it that were changed before do not matter
    allowed(same_part_of_speech, attack, [text.with_word(5, "x")], text)
    # The tagger needs two of the three words after it.
    assert tagger.asked == [(("b", "c", "d", "e", "f", "g", "h"), 4), (("b", "c", "d", "e", "x", "g", "h"), 4)]


def test_of_equal_words_around_it_the_first_ones_tag_counts_as_in_textattack():
    tagger = Parts(a="DET", b="NOUN")
    attack = toy("a b", with_tagger(tagger))
    allowed(same_part_of_speech, attack, [attack.original.with_word(1, "a")])
    assert tagger.asked == [(("a", "b"), 1), (("a", "a"), 0)]


def test_without_a_tagger_wordnets_parts_of_speech_decide_and_unknown_words_have_all():
    parts = {"run": {"noun", "verb"}, "fast": {"adj", "adv"}, "go": {"verb"}, "quick": {"adj"}, "zzz": set()}
    synonyms = type("S", (), {"parts": staticmethod(parts.__getitem__)})()
    attack = toy("run", with_tagger(None, synonyms))
    made = [attack.original.with_word(0, word) for word in ("go", "fast", "zzz")]
    assert allowed(same_part_of_speech, attack, made) == ["go", "zzz"]
    attack = toy("quick", with_tagger(None, synonyms))
    made = [attack.original.with_word(0, word) for word in ("fast", "go")]
    assert allowed(same_part_of_speech, attack, made) == ["fast"]


def test_a_word_beyond_the_original_has_no_part_of_speech_to_keep():
    attack = toy("a", with_tagger(Parts(a="DET", b="DET", c="DET")))
    assert allowed(same_part_of_speech, attack, [attack.original.with_word(0, "b c")]) == []


def angles(**degrees: float):
    """A model of text -> unit vector at so many degrees, by the text's name; and what it was asked."""
    asked = []

    def embed(texts):
        asked.extend(texts)
        radians = np.radians([degrees[text.replace(" ", "_")] for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)

    return {ENCODER: embed}, asked


WITH_ENCODER = type("R", (), {"encoder": True})()


@pytest.mark.parametrize(("angular", "threshold"), [(True, 1 - 60 / 180), (False, math.cos(math.radians(60)))])
def test_similar_texts_are_those_within_an_angle_or_a_cosine(angular, threshold):
    models, _ = angles(a=0, b=59, c=61, d=180)
    attack = toy("a", WITH_ENCODER)
    candidates = [Candidate(attack.original.with_word(0, word)) for word in "bcd"]
    found = ask(similar(threshold, angular=angular)(attack, candidates, attack.original), models)
    assert [candidate.text.text for candidate in found] == ["b"]
    wanted = [1 - 59 / 180, 1 - 61 / 180, 0] if angular else np.cos(np.radians([59, 61, 180]))
    assert [candidate.similarity for candidate in candidates] == pytest.approx(wanted, abs=1e-3)


def test_texts_are_compared_with_the_original_or_with_the_text_before_the_change():
    degrees = {"a_a": 0, "b_a": 40, "b_c": 80}
    for to_original, found in ((True, []), (False, ["b c"])):
        models, _ = angles(**degrees)
        attack = toy("a a", WITH_ENCODER)
        before = attack.original.with_word(0, "b")
        constraint = similar(1 - 50 / 180, to_original=to_original)
        assert allowed(constraint, attack, [before.with_word(1, "c")], before, models) == found


def test_only_the_window_around_the_change_is_compared_and_texts_shorter_than_it_are_allowed_unseen():
    models, asked = angles(**{"b_c_d": 0, "b_x_d": 90})
    attack = toy("a b c d e", WITH_ENCODER)
    assert allowed(similar(0.6, window=3), attack, [attack.original.with_word(2, "x")], None, models) == []
    assert asked == ["b c d", "b x d"]
    candidates = [Candidate(attack.original.with_word(2, "x"))]
    assert ask(similar(0.9, window=6)(attack, candidates, attack.original)) == candidates
    assert candidates[0].similarity == 1, "so that a search may compare it"


def test_a_text_that_grew_is_compared_with_the_window_of_the_shorter_one():
    models, asked = angles(**{"a_b_c": 0, "b_x_y": 10, "a_b_x": 10})
    attack = toy("a b c", WITH_ENCODER)
    made = attack.original.with_word(2, "x y")
    assert allowed(similar(0.9, window=3), attack, [made], None, models) == [made.text]
    assert asked == ["a b c", "b x y"]


def test_without_an_encoder_every_text_is_allowed_and_no_similarity_claimed():
    attack = toy("a", type("R", (), {"encoder": None})())
    candidates = [Candidate(attack.original.with_word(0, "b"))]
    assert ask(similar(0.99)(attack, candidates, attack.original)) == candidates and candidates[0].similarity is None


def test_a_text_is_embedded_once():
    models, asked = angles(a=0, b=10, c=20)
    attack = toy("a", WITH_ENCODER)
    for _ in range(2):
        allowed(similar(0.5), attack, [attack.original.with_word(0, word) for word in "bc"], None, models)
    assert sorted(asked) == ["a", "b", "c"]


# --- the tagger ------------------------------------------------------------------------------------------------------


def test_a_tag_is_the_dictionarys_or_that_of_the_largest_sum():
    weights = {
        "i suffix ing": {"VBG": 2.0, "NN": 1.5},
        "i-1 tag DT": {"NN": 1.0},
        "i pref1 X": {"NNP": 9.0},
        "i-1 tag -START-": {"JJ": 0.25},
    }
    tagger = Tagger(weights, {"the": "DT"}, ["VBG", "NN", "NNP", "JJ"])
    assert tagger.tag(("running",), 0) == "VERB"
    assert tagger.tag(("the", "running"), 1) == "NOUN" and tagger.tag(("the", "running"), 0) == "DET"
    assert tagger.tag(("Xing",), 0) == "NOUN" and tagger.tag(("other",), 0) == "ADJ"


def test_of_equal_sums_the_tag_last_in_the_alphabet_wins_as_in_nltk():
    assert Tagger({}, {}, ["JJ", "VB", "NN"]).tag(("x",), 0) == "VERB"


@pytest.mark.parametrize(
    ("word", "seen"),
    [("1990", "!YEAR"), ("12", "!DIGITS"), ("3rd", "!DIGITS"), ("well-made", "!HYPHEN"), ("Film", "film")],
)
def test_numbers_and_hyphens_are_alike(word, seen):
    assert Tagger({f"i word {seen}": {"JJ": 1.0}}, {}, ["VB", "JJ"]).tag((word,), 0) == "ADJ"


def test_what_stands_two_words_away_matters_and_no_further():
    weights = {"i+2 word x": {"JJ": 1.0}, "i-2 word x": {"RB": 1.0}}
    tagger = Tagger(weights, {}, ["VB", "JJ", "RB"])
    words = ("a", "b", "c", "x", "d", "e", "f")
    assert [tagger.tag(words, i) for i in range(7)] == ["VERB", "ADJ", "VERB", "VERB", "VERB", "ADV", "VERB"]


def test_a_tag_that_has_no_universal_one_is_x():
    assert Tagger({}, {"x": "-LRB-"}, []).tag(("x",), 0) == "X"


@pytest.fixture
def nltk_at_hand(data_at_hand) -> Path:
    return environment.data_dir() / "attack" / "nltk"


def test_the_universal_tags_are_nltks(nltk_at_hand):
    with zipfile.ZipFile(nltk_at_hand / "universal_tagset.zip") as packed:
        lines = packed.read("universal_tagset/en-ptb.map").decode().split("\n")
    theirs = dict(line.split("\t") for line in lines if line)
    assert {tag: theirs.get(tag) for tag in UNIVERSAL} == UNIVERSAL


@local_data
def test_real_sentences_get_their_tags():
    tagger, _ = Resources().tagger
    sentences = {
        "The old man bought two very cheap tickets quickly": "DET ADJ NOUN VERB NUM ADV ADJ NOUN ADV",
        "She will not refuse it because they run fast": "PRON VERB ADV VERB PRON ADP PRON VERB ADV",
        "a gripping film and a well-made script": "DET NOUN NOUN CONJ DET ADJ NOUN",
    }
    for sentence, tags in sentences.items():
        words = tuple(sentence.split())
        assert [tagger.tag(words, i) for i in range(len(words))] == tags.split(), sentence


# --- files -----------------------------------------------------------------------------------------------------------


def vectors(path: Path, lines: str) -> Neighbours:
    path.write_text(lines)
    return Neighbours.read(path)


def test_neighbours_by_vectors_are_the_nearest_first_within_a_cosine(tmp_path):
    found = vectors(tmp_path / "v.txt", "good 1 0\nfine 10 1\nok 1 1\nbad -3 0\n\nGreat 2 0.1\n")
    assert found.of("good", -1) == ["great", "fine", "ok", "bad"]
    assert found.of("Good", 0.5) == ["great", "fine", "ok"] and found.of("good", 0.8) == ["great", "fine"]
    assert found.of("unknown", -1) == [] and found.name == "v.txt"
    (tmp_path / "w.txt").write_text("good 1 0\n")
    assert Neighbours.read(tmp_path / "w.txt").of("good", -1) == [] != found.sha256
    assert Neighbours.read(tmp_path / "w.txt").sha256 != found.sha256


def test_a_word_has_fifty_neighbours_at_most(tmp_path):
    n = resources.NEIGHBOURS + 20
    angles = np.linspace(0, 1, n)
    text = "".join(f"w{i} {np.cos(a)} {np.sin(a)}\n" for i, a in enumerate(angles))
    assert vectors(tmp_path / "v.txt", text).of("w0", -1) == [f"w{i}" for i in range(1, resources.NEIGHBOURS + 1)]
    table = {"w0": [f"w{i}" for i in range(1, n)]}
    assert vectors(tmp_path / "t.json", json.dumps(table)).of("W0", 0.9) == table["w0"][: resources.NEIGHBOURS]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("good 1 0\nfine 1\n", "v.txt, line 2: must be a word and its 2 numbers"),
        ("good 1 0\n\nfine 1 x\n", "v.txt, line 3: must be a word and its 2 numbers"),
        ("good\n", "v.txt, line 1: must be a word and its numbers"),
        ("good 1 nan\n", "v.txt, line 1: must be"),
        ("good 1 1e99\n", "v.txt, line 1: must be"),
        ("", "v.txt holds no word vectors"),
        ("\n \n", "v.txt holds no word vectors"),
        ("{", "v.txt must be JSON, word -> list of words"),
        ('{"good": 3}', "v.txt must be JSON, word -> list of words"),
        ('{"good": "fine"}', "v.txt must be JSON, word -> list of words"),
        ('{"good": ["fine", null]}', "v.txt must be JSON, word -> list of words"),
        ('["good"]', "v.txt, line 1: must be"),
    ],
)
def test_a_malformed_file_of_neighbours_is_refused_naming_the_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=message), warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors(tmp_path / "v.txt", lines)


def test_a_missing_file_of_neighbours_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neighbours .*absent\.txt cannot be read: No such file"):
        Neighbours.read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        Neighbours.read(tmp_path)


def test_the_packaged_neighbours_are_at_most_eight_whatever_the_case():
    found = Neighbours.packaged()
    assert 1 <= len(found.of("good", 0.5)) <= 8 and found.of("Good", 0.5) == found.of("good", -1)
    assert found.of("no such word", -1) == []


def test_synonyms_are_found_of_inflected_words_in_any_part_of_speech():
    synonyms = Synonyms()
    assert "film" in synonyms.of("movies") and "movie" not in synonyms.of("movie")
    assert {"bargain", "purchase"} <= set(synonyms.of("buy")) == set(synonyms.of("buys")), "as a noun and as a verb"
    assert synonyms.of("women") == synonyms.of("woman") != [] and synonyms.parts("larger") == {"adj"}
    assert synonyms.of("Good") == synonyms.of("good")
    assert synonyms.of("qqqq") == [] and synonyms.parts("qqqq") == set()
    assert {"noun", "verb"} <= synonyms.parts("Runs") and synonyms.parts("quickly") == {"adv"}
    assert all(words_of(word) == [word] for word in synonyms.of("good")), "single words"


@pytest.fixture
def no_nltk(tmp_path, monkeypatch) -> Path:
    """Neither NLTK's data nor the local data sets; the home is an empty folder."""
    monkeypatch.delenv("SPARSEBERT_DATA", raising=False)
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


NAME = "averaged_perceptron_tagger_eng"
TAGGER = {"weights": "{}", "tagdict": '{"the": "DT"}', "classes": '["DT", "NN"]'}


def lay(folder: Path, kind: str, package: str, contents: dict[str, str], packed: bool) -> None:
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    if packed:
        with zipfile.ZipFile(place / f"{package}.zip", "w") as file:
            for name, text in contents.items():
                file.writestr(f"{package}/{name}", text)
    else:
        (place / package).mkdir()
        for name, text in contents.items():
            (place / package / name).write_text(text)


@pytest.mark.parametrize(("packed", "where"), list(product([True, False], ["NLTK_DATA", "home", "SPARSEBERT_DATA"])))
def test_nltks_data_is_found_in_folders_and_zips(no_nltk, monkeypatch, packed, where):
    assert Resources().tagger is None and Resources().stopwords is None
    root, kinds = no_nltk / "data", ("taggers", "corpora")
    if where == "NLTK_DATA":
        monkeypatch.setenv(where, f"{no_nltk / 'absent'}:{root}")
    elif where == "home":
        root = no_nltk / "home" / "nltk_data"
    else:
        kinds = ("attack/nltk", "attack/nltk")
        root.mkdir()
        monkeypatch.setenv(where, str(root))
    lay(root, kinds[0], NAME, {f"{NAME}.{part}.json": text for part, text in TAGGER.items()}, packed)
    lay(root, kinds[1], "stopwords", {"english": "a\nthe\n", "german": "der\n"}, packed)
    tagger, sha256 = Resources().tagger
    assert tagger.tag(("the",), 0) == "DET" and len(sha256) == 64
    assert Resources().stopwords[0] == {"a", "the"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({**TAGGER, "weights": "{"}, "is damaged"),
        ({**TAGGER, "weights": "[]"}, "is damaged"),
        ({**TAGGER, "weights": '{"bias": [1]}'}, "is damaged"),
        ({**TAGGER, "weights": '{"bias": {"NN": "x"}}'}, "is damaged"),
        ({**TAGGER, "weights": '{"bias": {"UNKNOWN": 1.0}}'}, "is damaged"),
        ({**TAGGER, "tagdict": '["the"]'}, "is damaged"),
        ({**TAGGER, "tagdict": '{"the": 3}'}, "is damaged"),
        ({**TAGGER, "classes": "3"}, "is damaged"),
        ({**TAGGER, "classes": "[]"}, "is damaged"),
        ({**TAGGER, "classes": "[1, 2]"}, "is damaged"),
        ({"weights": "{}", "tagdict": "{}"}, "cannot be read"),
    ],
)
def test_a_damaged_tagger_is_refused_at_once(no_nltk, monkeypatch, contents, message):
    monkeypatch.setenv("NLTK_DATA", str(no_nltk))
    lay(no_nltk, "taggers", NAME, {f"{NAME}.{part}.json": text for part, text in contents.items()}, True)
    with pytest.raises(DataError, match=message):
        _ = Resources().tagger


def test_damaged_zips_and_stop_words_are_refused(no_nltk, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(no_nltk))
    (no_nltk / "taggers").mkdir()
    (no_nltk / "taggers" / f"{NAME}.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"eng\.zip cannot be read: File is not a zip file"):
        _ = Resources().tagger
    (no_nltk / "corpora" / "stopwords").mkdir(parents=True)
    with pytest.raises(DataError, match="english cannot be read: No such file"):
        _ = Resources().stopwords
    (no_nltk / "corpora" / "stopwords" / "english").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="stop"):
        _ = Resources().stopwords


def test_a_stand_in_is_named_in_the_variant_and_warned_of(no_nltk):
    shared = Resources(encoder="none")
    plan = Plan(RECIPES["textfooler"], shared, AttackConfig(), True)
    with pytest.warns(SparsebertWarning, match="textfooler: NLTK's tagger is not here"):
        plan.warn_of_stand_ins()
    assert plan.variant.startswith("textfooler (counter-fitted-8, WordNet's parts of speech, no sentence encoder; ")
    plan = Plan(RECIPES["pwws"], shared, AttackConfig(), True)
    with pytest.warns(
        SparsebertWarning, match="pwws: NLTK's stop words are not here, TextFooler's longer list is used"
    ):
        plan.warn_of_stand_ins()
    assert plan.variant.startswith("pwws (Open English WordNet, TextFooler's stop words; ")
    assert plan.stopwords == textfooler_stopwords() and {"the", "of"} <= plan.stopwords


@local_data
def test_nothing_is_warned_of_where_nltks_data_is_at_hand():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = Resources(encoder="none")
        plans = [Plan(RECIPES[name], shared, AttackConfig(), True) for name in ("textfooler", "pwws")]
        for plan in plans:
            plan.warn_of_stand_ins()
    assert "NLTK's tagger" in plans[0].variant and "NLTK's stop words" in plans[1].variant
    assert plans[0].stopwords == textfooler_stopwords() != plans[1].stopwords
