"""Inputs that `Engine.logits` takes, and inputs that it refuses, naming the text."""

from __future__ import annotations

import array
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import classifier, saved, stock, tokenizer

from sparsebert import data
from sparsebert.config import PruneConfig
from sparsebert.data import Examples
from sparsebert.encoders import no_progress
from sparsebert.engine import Engine
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import LONGEST, CheckpointError, InputError, cut, shown
from sparsebert.pruning import prune

TEXT, PAIR, IDS = "a gripping film", ("a premise", "its hypothesis"), [101, 2204, 102]
VOCABULARY = 12000


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = classifier(labels=3)
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.8))
    return saved(tmp_path_factory.mktemp("calls") / "m", model)


@pytest.fixture(scope="module")
def loaded(directory):
    return Engine.load(directory, dtype="fp32", threads=1, batch_invariant=True)


@pytest.fixture(scope="module")
def alone(loaded):
    return [loaded.logits([row]) for row in (TEXT, PAIR, IDS)]


def test_one_call_may_hold_a_string_a_pair_and_ids(loaded, alone):
    got = loaded.logits([TEXT, PAIR, IDS, TEXT])
    assert got.dtype == np.float32 and np.array_equal(got, np.concatenate([*alone, alone[0]]))
    assert len(np.unique(got, axis=0)) == 3


def test_pairs_may_be_lists_as_cross_encoders_take_them(loaded, alone):
    assert np.array_equal(loaded.logits([list(PAIR)]), alone[1])
    assert np.array_equal(loaded.logits(np.array([PAIR, PAIR])), np.concatenate([alone[1]] * 2))
    # A list of two strings is two texts; only inside another list it is a pair.
    assert len(loaded.logits(list(PAIR))) == 2 and not np.array_equal(loaded.logits(list(PAIR))[:1], alone[1])


@pytest.mark.parametrize(
    "texts",
    [
        (row for row in [TEXT]), iter([TEXT]), (TEXT,), {0: TEXT}.values(), np.array([TEXT]), [np.str_(TEXT)],
        np.array([TEXT], dtype=object),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_texts_may_come_in_anything_that_has_an_order(loaded, alone, texts):
    assert np.array_equal(loaded.logits(texts), alone[0])


@pytest.mark.parametrize(
    "ids",
    [
        [IDS], [tuple(IDS)], np.array([IDS]), [np.array(IDS, np.uint16)], torch.tensor([IDS]), [torch.tensor(IDS)],
        torch.tensor([IDS], dtype=torch.int32), [[np.int64(i) for i in IDS]], [array.array("i", IDS)],
    ],
    ids=lambda value: f"{type(value).__name__} of {type(value[0]).__name__}",
)  # fmt: skip
def test_ids_may_come_in_lists_arrays_and_tensors(loaded, alone, ids):
    assert np.array_equal(loaded.logits(ids), alone[2])


def test_token_ids_are_texts_as_well(loaded):
    texts = data.load(data.get_task("mr"), "test", limit=20).texts
    ids = [tokenizer()(text)["input_ids"] for text in texts]
    assert np.array_equal(loaded.logits(ids), loaded.logits(texts))
    with pytest.raises(InputError, match=r"at most 4 tokens, texts\[0\]"):
        loaded.logits(ids, max_length=4)


@pytest.mark.parametrize("texts", [[], (), iter([]), np.empty((0, 3), int), torch.empty(0, 3, dtype=torch.long)])
def test_no_texts_are_no_logits(loaded, texts):
    assert loaded.logits(texts).shape == (0, 3)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["ok", ""], r"texts\[1\] must be a non-empty string, got ''"),
        (["   "], r"texts\[0\] must be a non-empty string"),
        ([("a", "b"), ("c", "d"), ("e", "")], r"texts\[2\]\[1\] must be a non-empty string"),
        (["ok", "a\udcff"], r"texts\[1\] must be valid Unicode, has the lone surrogate '\\udcff' at 1"),
        (["ok", None], r"texts\[1\] must be a string, a pair of strings, or token ids, got None;"),
        (["ok", {"text": "a"}], r"texts\[1\] must be .*got dict"),
        ([b"bytes"], r"texts\[0\] must be .*got bytes b'bytes'"),
        ([("a", "b", "c")], r"texts\[0\] must be .*got tuple"),
        ([["a"]], r"texts\[0\] must be .*got list \['a'\]"),
        ([("a", None)], r"texts\[0\] must be"),
        ([()], r"texts\[0\] must be"),
        ([[]], r"texts\[0\] must be"),
        (IDS, r"texts\[0\] must be .*got int 101"),
        ([[101.0, 102.0]], r"texts\[0\] must be"),
        ([[True, False]], r"texts\[0\] must be"),
        ([np.array([True])], r"texts\[0\] must be"),
        (torch.zeros(1, 3), r"texts\[0\] must be"),
        ([[[101, 102]]], r"texts\[0\] must be"),
        (["ok", [101, VOCABULARY, 102]], r"texts\[1\]: token ids must be at least 0 and below 12000, got 12000"),
        ([[101, -1]], r"texts\[0\]: token ids .*got -1"),
        ([[101, 2**40, 102]], r"texts\[0\]: token ids .*got 1099511627776"),
        ([[101, 10**5000]], r"texts\[0\]: token ids .*got <an integer of 16610 bits>"),
        ("a string", r"texts must be a list, got str 'a string'"),
        (b"bytes", r"texts must be a list, got bytes"),
        ({"a": "b"}, r"texts must be a list, got dict"),
        ({"a", "b"}, r"texts must be a list, got set"),
        (None, r"texts must be a list, got None;"),
        (7, r"texts must be a list, got int 7"),
        (np.array("text"), r"texts must be a list, got ndarray"),
        (torch.empty(1, 3, device="meta"), r"texts cannot be read from Tensor"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_its_place(loaded, texts, says):
    with pytest.raises(InputError, match=says) as refused:
        loaded.logits(texts)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


@pytest.mark.parametrize("length", [2, 513, -1, 7.5, True, "7", int, pytest.param(10**5000, id="huge"), math.nan])
def test_a_length_the_model_cannot_take_is_refused(loaded, length):
    with pytest.raises(InputError, match="max_length must be an integer from 3 to 512"):
        loaded.logits(["a"], max_length=length)


def test_numpys_integers_are_lengths(loaded, alone):
    assert np.array_equal(loaded.logits([TEXT], max_length=np.int64(16)), alone[0])


def test_truncate_is_yes_or_no(loaded):
    with pytest.raises(InputError, match="truncate must be True or False, got 'no'"):
        loaded.logits(["a"], truncate="no")


def test_a_text_that_is_too_long_is_cut_only_on_request(loaded):
    long = "good " * 600
    with pytest.raises(InputError, match=r"at most 512 tokens, texts\[1\] has 602; pass truncate=True"):
        loaded.logits(["short", long])
    with pytest.raises(InputError, match=r"at most 16 tokens, texts\[0\] has 602"):
        loaded.logits([long, "short"], max_length=16)
    with pytest.raises(InputError, match=r"at most 4 tokens, texts\[1\] has 5"):
        loaded.logits(["a", [101, 1, 2, 3, 102]], max_length=4)
    cut_at_16 = loaded.logits(["good " * 14, long, [101] * 9], max_length=16, truncate=True)
    assert np.array_equal(cut_at_16[0], cut_at_16[1])
    assert np.array_equal(loaded.logits([[101] * 20], max_length=9, truncate=True)[0], cut_at_16[2])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(0, 40), st.integers(5, 40))
def test_texts_are_cut_as_transformers_cuts_them(loaded, first, second, length):
    words = "the film is a gripping tale of two towns and what they lost to the sea".split()
    parts = [" ".join((words * 3)[:n]) for n in (first, second) if n]
    want = tokenizer()(*parts, truncation=True, max_length=length)
    whole = len(tokenizer()(*parts)["input_ids"])
    ids, types, cut = loaded.encode(
        [IDS, parts[0] if len(parts) == 1 else tuple(parts)], max_length=length, truncate=True
    )
    assert ids == [IDS, want["input_ids"]] and types == [[0, 0, 0], want["token_type_ids"]]
    assert cut == [1] * (whole > length)


def test_what_was_cut_is_told_by_its_number(loaded):
    fits, long, spaced = "good " * 510, "good " * 511, "good" + " " * 100_000
    ids, types, cut = loaded.encode([fits, long, ("a", long), [101] * 600, spaced, "word " * 100_000], truncate=True)
    assert cut == [1, 2, 3, 5] and list(map(len, ids)) == list(map(len, types)) == [512, 512, 512, 512, 3, 512]
    assert np.array_equal(loaded.forward(ids, types)[:2], loaded.logits([fits, long], truncate=True))
    assert loaded.encode([]) == ([], [], []) and len(loaded.logits([])) == 0


def test_texts_are_cut_to_what_the_tokenizer_says_where_nothing_else_is(directory, loaded, tmp_path):
    short = stock(shutil.copytree(directory, tmp_path / "short"))
    settings = json.loads((short / "tokenizer_config.json").read_text())
    (short / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 20}))
    with pytest.warns(UserWarning, match="unsealed"):
        engine = Engine.load(short, dtype="fp32", threads=1, batch_invariant=True)
    long = ["good " * 60]
    assert np.array_equal(engine.logits(long, truncate=True), loaded.logits(long, max_length=20, truncate=True))
    assert np.array_equal(engine.logits(long), loaded.logits(long))  # not cut: the model has positions for it


def test_a_long_text_is_bounded_before_it_is_tokenized(loaded, monkeypatch):
    # 10 MB, of which only a few thousand characters matter.
    pieces, encode = [], type(loaded._inputs._tokenizer._tokenizer).encode

    class Counting:
        def __getattr__(self, name, inner=loaded._inputs._tokenizer._tokenizer):
            if name == "encode":
                return lambda text, **options: pieces.append(len(text)) or encode(inner, text, **options)
            return getattr(inner, name)

    monkeypatch.setattr(loaded._inputs._tokenizer, "_tokenizer", Counting())
    text = "a gripping film " * 650_000
    cut_at_16 = loaded.logits([text, text[:1000]], max_length=16, truncate=True)
    assert np.array_equal(cut_at_16[0], cut_at_16[1])
    with pytest.raises(InputError, match=r"at most 512 tokens, texts\[1\] has more than 512"):
        loaded.logits(["ok", text])
    assert sum(pieces) < 100_000


# Anything a caller may pass: sound rows, rows with a fault, and values that are not rows.
sound = st.one_of(
    st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and text.isprintable()),
    st.tuples(st.sampled_from(["a", "film"]), st.sampled_from(["b", "play"])),
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=9),
)
odd = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
        st.builds(lambda: 10**5000), st.just("\ud800"), st.builds(object), st.just(np.float32(1)),
        st.just(np.array([[1.5]])), st.just(torch.tensor([[5]])),
        st.just(np.array([2**63], np.uint64)), st.just(range(3)),
    ),
    lambda parts: st.one_of(
        st.lists(parts, max_size=3), st.tuples(parts, parts), st.dictionaries(st.text(max_size=2), parts, max_size=2)
    ),
    max_leaves=6,
)  # fmt: skip
lengths = st.one_of(st.none(), st.integers(3, 512), st.just(np.int32(8)), odd)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.lists(st.one_of(sound, odd), max_size=4), odd), lengths, st.one_of(st.booleans(), odd))
def test_any_call_is_answered_or_refused(loaded, texts, max_length, truncate):
    try:
        got = loaded.logits(texts, max_length=max_length, truncate=truncate)
    except InputError as error:
        assert len(str(error)) < 2 * LONGEST + 20 and "\n" not in str(error)
    else:
        assert got.dtype == np.float32 and got.shape == (len(texts), 3) and np.isfinite(got).all()
        assert not isinstance(texts, (str, bytes, dict, set)) and not isinstance(max_length, (bool, float))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sound, min_size=1, max_size=5))
def test_sound_calls_are_answered_a_text_at_a_time(loaded, rows):
    assert np.array_equal(loaded.logits(rows), np.concatenate([loaded.logits([row]) for row in rows]))


def test_an_engine_describes_itself(loaded, directory):
    assert repr(loaded) == f"<Engine {shown(str(directory))}: bert, 3 labels, fp32, 1 threads>"
    assert len(repr(loaded)) < 300


def test_a_padding_token_inside_a_text_has_no_position_in_roberta(tmp_path):
    engine = Engine.load(saved(tmp_path / "m", kind="roberta"), dtype="fp32")
    for text in ("a <pad> film", [0, 5, 1, 2]):
        with pytest.raises(
            InputError, match=r"texts\[1\] holds the padding token, id 1, which roberta gives no position"
        ):
            engine.logits(["a film", text])


def test_logits_that_are_not_finite_are_refused_by_their_place(tmp_path):
    model = classifier()
    with torch.no_grad():  # one word alone makes the norm's sum of squares overflow
        model.bert.embeddings.word_embeddings.weight[2204] = 3e38
    broken = Engine.load(saved(tmp_path / "m", model), dtype="fp32")
    with pytest.raises(CheckpointError, match=r"logits must be finite, those of texts\[1\] are \[nan, nan\]"):
        broken.logits([[101, 5, 102], IDS])
    texts = ["a film"] * 100 + ["good"]  # "good" is id 2204, in the last of several engine calls
    with pytest.raises(CheckpointError, match=r"those of texts\[100\] are"):
        Classifier.load(tmp_path / "m").predict(
            Examples("t", "s", texts, None, None), max_length=16, progress=no_progress
        )


class Mute:
    def __repr__(self):
        raise ValueError("no words")


def test_messages_show_any_value_in_a_few_words():
    assert shown("a" * 5000).startswith("'aaa") and len(shown("a" * 5000)) <= 80
    assert "integer of" in shown(10**5000) and "integer of" in shown([10**5000])
    assert shown(Mute()).startswith("<Mute instance")
    assert len(shown(np.zeros(10**6))) <= 80 and len(shown([["x" * 99] * 99] * 99)) <= 210
    assert cut("a\n  b") == "a b"
    long = cut("a" * 4000 + "z" * 4000)
    assert len(long) < LONGEST + 10 and long.startswith("aaa") and long.endswith("zzz")
    assert len(str(InputError("p" * 9999, fix="f" * 9999))) < 2 * LONGEST + 20


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_at_the_end_of_ids_is_dropped(tmp_path, kind):
    made = Engine.load(saved(tmp_path / "m", kind=kind))
    texts = ["a film", "a much longer film is here"]
    padded = tokenizer(kind)(texts, padding=True, return_tensors="pt")["input_ids"]
    assert len(set(map(len, tokenizer(kind)(texts)["input_ids"]))) == 2
    for form in (padded, padded.numpy(), padded.tolist()):
        np.testing.assert_array_equal(made.logits(form), made.logits(tokenizer(kind)(texts)["input_ids"]))
    padding = int(padded[0, -1])
    with pytest.raises(InputError, match=r"texts\[1\] must have a token other than padding"):
        made.logits([[101, 5], [padding, padding]])


def test_types_of_another_number_are_refused(loaded):
    with pytest.raises(InputError, match="type_ids must have as many tokens as ids, 3 in total, got 2"):
        loaded.forward([[101, 5, 102]], [[0, 0]])
