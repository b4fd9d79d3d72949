"""`TextEncoder` gives the ids and token types of stock transformers, or refuses and names the setting."""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
import threading
import time

import models
import pytest
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sparsebert import checkpoint
from sparsebert.checkpoint import encoding
from sparsebert.checkpoint.encoding import shares
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError, UnsupportedError

KINDS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")
TEXTS = [
    "Stocks FELL today, by 3.5 %!", "café naïve déjà vu ÅNGSTRÖM ﬁ ½", "你好，世界 hello 日本語テキスト",
    "مرحبا بالعالم שלום", "tabs\tand\nnew  lines   and    spaces ", " leading", "a1b2c3 1234567", "x" * 150,
    "[SEP] [MASK] <s> </s> <pad> <mask> [PAD]", "it's we'll I'D don't", "\u0130stanbul ſ Ω", "A" * 90 + "b" * 30,
    "e\u0301 combining \u200b zero width \u00a0 hard space \u3000", "😀 emoji 👩\u200d👩\u200d👧 ok",
    "control \x01\x02 chars \ufffd", "ok", "the [E1] good [e1]s, a smile smiles [NEW]film",
]  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A stock directory of each kind. No test changes it; `variant` copies it with other settings."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: models.stock(models.saved(root / kind, kind=kind, num_hidden_layers=1)) for kind in KINDS}


def variant(directory, tmp_path, config=None, document=None, **files):
    """A copy of a directory with other fields in tokenizer_config.json, `document` applied to tokenizer.json."""
    copy = shutil.copytree(directory, tmp_path / f"variant-{len(list(tmp_path.iterdir()))}")
    for name, change in (("tokenizer_config.json", config), ("tokenizer.json", document)):
        held = json.loads((copy / name).read_text())
        held = change(held) or held if callable(change) else held | (change or {})
        (copy / name).write_text(json.dumps({k: v for k, v in held.items() if v is not REMOVED}))
    for name, text in files.items():
        path = copy / name.replace("__", ".")
        path.write_text(text) if text is not None else path.unlink()
    return copy


REMOVED = object()


def theirs(directory, texts, limit=None):
    stock = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    rows = []
    for text in texts:
        pair = text if isinstance(text, tuple) else (text,)
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        rows.append(stock(*pair, **cut))
    ids = [row["input_ids"] for row in rows]
    return ids, [row.get("token_type_ids", [0] * len(row["input_ids"])) for row in rows]


def everything():
    pairs = [(a, b) for a, b in zip(TEXTS, [*TEXTS[3:], *TEXTS[:3]], strict=True)]
    return [
        *TEXTS,
        *pairs,
        " ".join(TEXTS),
        (" ".join(TEXTS), "short"),
        ("short", " ".join(TEXTS)),
        (" ".join(TEXTS),) * 2,
    ]


def check(directory, limits=(None, 4, 5, 16, 33, 64)):
    ours, texts = checkpoint.read(directory).tokenizer, everything()
    for limit in limits:
        some = [t for t in texts if limit is None or limit > 4 or isinstance(t, str)]
        if limit is not None and limit < 7:
            some = [t for t in some if isinstance(t, str)]
        got = ours.encode(some, max_length=limit, truncate=True)
        want = theirs(directory, some, limit)
        assert list(map(list, got[0])) == want[0] and list(map(list, got[1])) == want[1]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_types_are_those_of_transformers(directories, kind):
    check(directories[kind])


def token(content, **flags):
    off = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    return {"content": content, **off, **flags}


def roomy(tmp_path, kind):
    """A stock directory with more rows of embeddings than tokens."""
    return models.stock(models.saved(tmp_path / "m", kind=kind, vocab_size=30530, num_hidden_layers=1))


HONOURED = {
    "types for the fast base class": ("bert", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "fast base class with types": (
        "bert",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    ),
    "fast name": ("bert", {"tokenizer_class": "BertTokenizerFast"}),
    "no class": ("bert", {"tokenizer_class": REMOVED}),
    "no class, roberta": ("roberta", {"tokenizer_class": REMOVED}),
    "no class, xlm-roberta": ("xlm-roberta", {"tokenizer_class": REMOVED}),
    "electra class": ("electra", {"tokenizer_class": "ElectraTokenizerFast"}),
    "distilbert class": ("distilbert", {"tokenizer_class": "DistilBertTokenizer"}),
    "bert without types": ("bert", {"model_input_names": ["input_ids", "attention_mask"]}),
    "left": ("bert", {"truncation_side": "left"}),
    "left, roberta": ("roberta", {"truncation_side": "left"}),
    "padding left": ("bert", {"padding_side": "left"}),
    "cased": ("bert", {"do_lower_case": False}),
    "cased and stripped": ("bert", {"do_lower_case": False, "strip_accents": True}),
    "accents kept": ("bert", {"strip_accents": False}),
    "chinese kept": ("bert", {"tokenize_chinese_chars": False}),
    "prefix space": ("roberta", {"add_prefix_space": True}),
    "no prefix space": ("xlm-roberta", {"add_prefix_space": False}),
    "short model": ("bert", {"model_max_length": 20}),
    "extra special": ("bert", {"extra_special_tokens": ["stocks", "[NEW]"], "config_of_mine": 3}),
    "additional special": ("bert", {"additional_special_tokens": ["FELL"]}),
    "additional special, as an object": (
        "bert",
        {
            "additional_special_tokens": [
                {
                    "__type": "AddedToken",
                    "content": "FELL",
                    "lstrip": True,
                    "rstrip": False,
                    "single_word": True,
                    "normalized": False,
                    "special": True,
                },
            ],
        },
    ),
    "extra special by name": ("bert", {"extra_special_tokens": {"image_token": "stocks"}}),
    "special of its own name": ("bert", {"doc_token": "[NEW]", "film_token": "stocks", "no_token": 3}),
    "special of its own name, as an object": (
        "bert",
        {
            "doc_token": {
                "__type": "AddedToken",
                "content": "smile",
                "lstrip": True,
                "rstrip": False,
                "single_word": True,
                "normalized": True,
                "special": True,
            },
        },
    ),
    "special of names of two kinds": (
        "bert",
        {"b_token": "[NEW]", "extra_special_tokens": {"a_token": "[E1]"}, "bos_token": "[B]", "mask_token": "[M]"},
    ),
    "special ones, objects before strings": (
        "bert",
        {"doc_token": "[NEW]", "a_token": {"__type": "AddedToken", **token("[E1]", special=True, lstrip=True)}},
    ),
    "special of its own name, xlm-roberta": ("xlm-roberta", {"doc_token": "film"}),
    "prefix space of the fast base class": (
        "roberta",
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False},
    ),
    "basic": ("bert", {"do_basic_tokenize": True, "never_split": None, "name_or_path": "x", "use_fast": False}),
}


@pytest.mark.parametrize("name", HONOURED)
def test_settings_are_honoured_as_transformers_does(directories, tmp_path, name):
    kind, changes = HONOURED[name]
    if "special" in name:  # more embedding rows for new tokens
        directories = {kind: roomy(tmp_path, kind)}
    check(variant(directories[kind], tmp_path, changes))


def edit(part, **changes):
    def change(document):
        document[part] = (document[part] or {}) | changes

    return change


SPACE_RULES = (
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
)


def with_rules(*rules):
    """Gives tokenizer.json the normalizer of converted sentencepiece models, followed by `rules`."""
    return lambda document: document | {"normalizer": {"type": "Sequence", "normalizers": [*SPACE_RULES, *rules]}}


def test_rules_for_spaces_of_a_converted_model_change_no_ids(directories, tmp_path):
    check(variant(directories["xlm-roberta"], tmp_path, {}, with_rules()))


REFUSED = {
    "another class": ("bert", {"tokenizer_class": "BertJapaneseTokenizer"}, None, "tokenizer_class must be one of"),
    "no basic": ("bert", {"do_basic_tokenize": False}, None, "do_basic_tokenize must be true"),
    "split special": ("bert", {"split_special_tokens": True}, None, "split_special_tokens must be false"),
    "odd inputs": ("bert", {"model_input_names": ["input_ids", "bbox"]}, None, "model_input_names must be"),
    "custom code": ("bert", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, None, "auto_map must be absent"),
    "sampling": ("xlm-roberta", {"sp_model_kwargs": {"enable_sampling": True}}, None, "sp_model_kwargs must be empty"),
    "side": ("bert", {"truncation_side": "top"}, None, "truncation_side must be left or right, got 'top'"),
    "lower": ("bert", {"do_lower_case": "yes"}, None, "do_lower_case must be true or false"),
    "control characters kept": ("bert", {}, edit("normalizer", clean_text=False), "normalizer must be"),
    "another normalizer": ("bert", {}, lambda d: d | {"normalizer": {"type": "NFC"}}, "normalizer must be"),
    "another splitting": ("bert", {}, lambda d: d | {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer must be"),
    "longer words": ("bert", {}, edit("model", max_input_chars_per_word=200), "model of BertTokenizer must be"),
    "another prefix": ("bert", {}, edit("model", continuing_subword_prefix="@@"), "model of BertTokenizer must be"),
    "no special tokens": ("bert", {}, lambda d: d | {"post_processor": None}, "post_processor must be"),
    "dropout": ("roberta", {}, edit("model", dropout=0.1), "model of RobertaTokenizer must be"),
    "other unknown": ("xlm-roberta", {}, edit("model", unk_id=0), "model of XLMRobertaTokenizer must be"),
    "another prefix space of the fast base class": (
        "roberta", {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, None,
        "add_prefix_space must be False, as in tokenizer.json, got True",
    ),
    "a rule that replaces more than spaces": (
        "xlm-roberta", {}, with_rules({"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        "normalizer must be",
    ),
    "a rule that is none of spaces": ("xlm-roberta", {}, with_rules({"type": "Lowercase"}), "normalizer must be"),
    "two lists of added tokens": (
        "bert", {"added_tokens_decoder": {"100": {"content": "[UNK]", "special": True}}}, None, "added token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_understood_are_refused_by_name(directories, tmp_path, name):
    kind, config, document, message = REFUSED[name]
    made = variant(directories[kind], tmp_path, config, document)
    with pytest.raises(UnsupportedError, match=message) as raised:
        _ = checkpoint.read(made).tokenizer
    assert str(made) in str(raised.value)


def test_a_refused_document_may_be_taken_as_it_is(directories, tmp_path):
    made = variant(directories["bert"], tmp_path, {}, REFUSED["longer words"][2])
    with pytest.raises(UnsupportedError, match="set tokenizer_class to PreTrainedTokenizerFast"):
        _ = checkpoint.read(made).tokenizer
    check(variant(made, tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_a_vocabulary_alone_is_enough(directories, tmp_path):
    vocabulary = models.tokenizer().get_vocab()
    text = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get))
    for config in ({}, {"do_lower_case": False}):
        check(variant(directories["bert"], tmp_path, config, vocab__txt=text, tokenizer__json=None))


def without_document(directory, tmp_path, config=None, **files):
    """`variant` with the vocabulary's own files in place of tokenizer.json."""
    document = json.loads((directory / "tokenizer.json").read_text())
    model = document["model"]
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}
    if model["type"] == "WordPiece":
        own = {"vocab__txt": "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get))}
    else:
        merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
        own = {"vocab__json": json.dumps(vocabulary), "merges__txt": "#version: 0.2\n" + merges}
    return variant(directory, tmp_path, config, tokenizer__json=None, **own, **files)


def test_byte_level_vocabulary_and_merges_alone_are_enough(directories, tmp_path):
    check(without_document(directories["roberta"], tmp_path))


BESIDE_A_VOCABULARY = {
    "a list": ("bert", {}, {"[E1]": 12000, "[NEW]": 12001, "smile": 2868}),
    "flags": ("bert", {"12000": token("[E1]", normalized=True), "12001": token("[NEW]", lstrip=True)}, None),
    "flags, which the list lacks": ("bert", {"2868": token("smile", single_word=True)}, {"smile": 2868}),
    "a special one with other flags": ("bert", {"103": token("[MASK]", lstrip=True, normalized=True)}, None),
    "byte level": ("roberta", {"1501": token("[E1]", lstrip=True, rstrip=True)}, None),
    "byte level, a special one with other flags": ("roberta", {"1500": token("<mask>", lstrip=True)}, None),
    "byte level, a list": ("roberta", {}, {"[NEW]": 1502, "[E1]": 1501}),
}


@pytest.mark.parametrize("name", BESIDE_A_VOCABULARY)
def test_added_tokens_beside_a_vocabulary_are_found_as_transformers_finds_them(tmp_path, name):
    kind, flags, ids = BESIDE_A_VOCABULARY[name]
    config = {"added_tokens_decoder": flags} if flags else {}
    listed = {} if ids is None else {"added_tokens__json": json.dumps(ids)}
    check(without_document(roomy(tmp_path, kind), tmp_path, config, **listed))


def test_a_special_token_of_two_fields_that_differ_in_its_flags_is_refused(directories, tmp_path):
    config = {"doc_token": "[E1]", "extra_special_tokens": ["[NEW]", token("[E1]", lstrip=True)]}
    made = variant(directories["bert"], tmp_path, config)
    with pytest.raises(
        UnsupportedError, match=r"special token '\[E1\]' must be matched in one way, extra_special_tokens"
    ):
        _ = checkpoint.read(made).tokenizer


def test_a_null_takes_a_special_token_of_the_class_away(tmp_path):
    check(without_document(roomy(tmp_path, "bert"), tmp_path, {"mask_token": None, "pad_token": None}))


@pytest.mark.parametrize(
    ("config", "ids", "says"),
    [
        ({}, {"[E1]": 12001}, r"added_tokens.json: added token '\[E1\]' must have the id 12000, .* has 12001"),
        ({}, {"[MASK]": 103}, r"added_tokens.json: added token '\[MASK\]' must not be a special token"),
        (
            {"added_tokens_decoder": {"103": token("[E1]")}},
            None,
            r"tokenizer_config.json: added token '\[E1\]' must have the id 12000, .* has 103",
        ),
        ({}, {"covid19": 12000, "COVID19": 12001}, "added tokens 'covid19' and 'COVID19' must differ, are the same"),
    ],
)
def test_added_tokens_beside_a_vocabulary_that_versions_read_differently_are_refused(tmp_path, config, ids, says):
    listed = {} if ids is None else {"added_tokens__json": json.dumps(ids)}
    made = without_document(roomy(tmp_path, "bert"), tmp_path, config, **listed)
    with pytest.raises(UnsupportedError, match=says):
        _ = checkpoint.read(made).tokenizer


MAP = {
    "a token of its own name": {"doc_token": token("[NEW]", lstrip=True)},
    "a list": {"additional_special_tokens": ["[NEW]", "stocks"]},
}


@pytest.mark.parametrize("name", MAP)
def test_the_special_tokens_of_their_own_file_are_those_of_transformers(tmp_path, name):
    check(variant(roomy(tmp_path, "bert"), tmp_path, special_tokens_map__json=json.dumps(MAP[name])))


def test_files_may_differ_in_tokens_that_tokenizer_json_has(directories, tmp_path):
    special = {"additional_special_tokens": [token("[MASK]", lstrip=True), "[SEP]"]}
    config = {"extra_special_tokens": ["[MASK]"]}
    check(variant(directories["bert"], tmp_path, config, special_tokens_map__json=json.dumps(special)))


@pytest.mark.parametrize(
    ("config", "special", "field"),
    [
        ({"doc_token": "[NEW]"}, {"doc_token": "[E1]"}, "doc_token"),
        ({"doc_token": "[NEW]"}, {"other_token": "[E1]"}, "other_token"),
        ({"additional_special_tokens": ["[NEW]"]}, {"additional_special_tokens": ["[E1]"]}, "extra_special_tokens"),
        ({"extra_special_tokens": ["[NEW]"]}, {"extra_special_tokens": ["[NEW]", "[E1]"]}, "extra_special_tokens"),
        ({"extra_special_tokens": ["[NEW]"]}, {"extra_special_tokens": [token("[NEW]", lstrip=True)]}, "extra_special"),
    ],
)
def test_two_files_that_list_other_special_tokens_are_refused(directories, tmp_path, config, special, field):
    made = variant(directories["bert"], tmp_path, config, special_tokens_map__json=json.dumps(special))
    with pytest.raises(UnsupportedError, match=rf"special_tokens_map.json: {field}.* must be .*as in tokenizer_config"):
        _ = checkpoint.read(made).tokenizer


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"model": 3}', ""])
def test_damaged_tokenizer_files_are_one_line(directories, tmp_path, text):
    for name in ("tokenizer__json", "tokenizer_config__json"):
        made = variant(directories["bert"], tmp_path, **{name: text})
        if text == '{"model": 3}' and name.startswith("tokenizer_c"):
            continue  # a field that means nothing
        with pytest.raises(CheckpointError, match=name.replace("__", r"\.")):
            _ = checkpoint.read(made).tokenizer


def test_more_tokens_than_rows_are_refused(tmp_path):
    made = models.stock(models.saved(tmp_path / "m", num_hidden_layers=1))
    made = variant(made, tmp_path, {"extra_special_tokens": ["[NEW]"]})
    with pytest.raises(CheckpointError, match="tokenizer has 12001 tokens, the model 12000"):
        _ = checkpoint.read(made).tokenizer


alphabet = st.text(st.characters(codec="utf-8") | st.sampled_from("  abcXYZ012.,'你好é\u0301"), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(alphabet | st.tuples(alphabet, alphabet), min_size=1, max_size=3),
    limit=st.none() | st.integers(8, 40),
)
@example(texts=[("a " * 30, "b " * 31)], limit=8)
@example(texts=[("a " * 31, "b " * 30)], limit=8)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_any_text_gets_the_ids_of_transformers(directories, kind, texts, limit):
    for side in ("left", "right"):
        key = kind, side
        if key not in CACHE:
            directory = directories[kind]
            stock = transformers.AutoTokenizer.from_pretrained(directory)
            stock.truncation_side = side
            encoder = checkpoint.read(directory).tokenizer
            encoder._left = side == "left"
            CACHE[key] = encoder, stock
        encoder, stock = CACHE[key]
        ids, types = encoder.encode(texts, max_length=limit, truncate=True)
        for i, text in enumerate(texts):
            pair = text if isinstance(text, tuple) else (text,)
            cut = {} if limit is None else {"truncation": True, "max_length": limit}
            want = stock(*pair, **cut)
            assert list(ids[i]) == want["input_ids"]
            assert list(types[i]) == want.get("token_type_ids", [0] * len(ids[i]))


CACHE: dict = {}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_long_texts_are_read_in_pieces_to_the_same_ids(directories, tmp_path, monkeypatch, kind, side):
    monkeypatch.setattr(encoding, "PIECE", 300)  # transformers' memory grows as the square of a long pair
    monkeypatch.setattr(encoding, "LONG", 0)
    made = variant(directories[kind], tmp_path, {"truncation_side": side})
    rng = random.Random(0)
    parts = [
        "word",
        "Other",
        "naïve",
        "3.5",
        "it's",
        "中文字",
        "x" * 120,
        "\n\n",
        "e\u0301",
        "[SEP]",
        "<mask>",
        "  ",
        "a\nb",
        "c\td",
        "!?..!!",
        "#@[SEP][SEP]!e\u0301.",
    ]
    if kind == "bert":
        parts += ["w" * 1500, " " * 1500]
    long = [" ".join(rng.choice(parts) for _ in range(400)) for _ in range(2)]
    odd = " ".join(rng.choice(parts) for _ in range(405))
    texts = [long[0], (long[0], long[1]), (long[0], "short"), ("short one", long[1]), (long[0], odd), (odd, long[0])]
    encoder = checkpoint.read(made).tokenizer
    assert len(long[0]) > 5 * encoding.PIECE
    for limit in (9, 127, 255, 256):
        some = texts if limit > 9 else texts[:1]
        got = encoder.encode(some, max_length=limit, truncate=True)
        want = theirs(made, some, limit)
        assert list(map(list, got[0])) == want[0] and list(map(list, got[1])) == want[1]


TEN_MEGABYTES = {
    "words": "a b " * 2_500_000, "one word": "word" * 2_500_000, "spaces": " " * 10_000_000 + "x",
    "lines": "line\n" * 2_000_000, "chinese": "你好世界" * 1_000_000, "punctuation": "!?" * 5_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", TEN_MEGABYTES)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_ten_megabytes_are_cut_or_refused_quickly(directories, kind, name):
    if kind != "bert" and name not in ("words", "lines"):
        pytest.skip("its tokens hang on the whole of a word, or of spaces")
    encoder = checkpoint.read(directories[kind]).tokenizer
    text = TEN_MEGABYTES[name]
    start = time.process_time()
    ids, _ = encoder.encode([text], max_length=512, truncate=True)
    short = {"one word": [101, 100, 102], "spaces": [101, 1060, 102]}.get(name)
    if short is None:
        assert len(ids[0]) == 512
        with pytest.raises(InputError, match=r"at most 512 tokens, texts\[7\] has more than 512; pass truncate=True"):
            encoder.encode([text], max_length=512, numbers=[7])
    else:
        assert ids[0] == short
    assert time.process_time() - start < 10  # some would take minutes as a whole, and memory for their square


def test_a_text_too_long_is_refused_with_its_length(directories):
    encoder = checkpoint.read(directories["bert"]).tokenizer
    with pytest.raises(InputError, match=r"at most 16 tokens, texts\[1\] has 42"):
        encoder.encode(["short", "good " * 40], max_length=16)
    with pytest.raises(InputError, match="max_length must leave room for 2 tokens"):
        encoder.encode([("good " * 40, "b")], max_length=4, truncate=True)


def test_the_longer_part_is_cut_first():
    assert shares(10, 3, 9) == [6, 3] and shares(3, 10, 9) == [3, 6]
    assert shares(10, 11, 9) == [4, 5] and shares(11, 10, 9) == [5, 4] and shares(10, 10, 9) == [4, 5]
    assert shares(2, 3, 9) == [2, 7]


def test_the_default_length_is_the_models_or_what_the_tokenizer_says(directories, tmp_path):
    assert checkpoint.read(directories["roberta"]).tokenizer.max_length == 512  # of 514 positions two are unused
    for said, want in ((20, 20), (1e30, 512), (4096, 512)):
        made = variant(directories["bert"], tmp_path, {"model_max_length": said})
        assert checkpoint.read(made).tokenizer.max_length == want


def test_many_threads_encode_at_once(directories):
    encoder = checkpoint.read(directories["bert"]).tokenizer
    texts = ["good " * n for n in range(1, 60)]
    want = [encoder.encode([text], max_length=20, truncate=True) for text in texts]
    wrong = []

    def run(limit):
        for text, row in zip(texts, want, strict=True):
            got = encoder.encode([text], max_length=limit, truncate=limit is not None)
            if limit == 20 and got != row:
                wrong.append(text)

    threads = [threading.Thread(target=run, args=(limit,)) for limit in (20, 30, None, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_texts_read_in_small_pieces_are_cut_as_the_whole_is(directories, tmp_path, monkeypatch, kind, side):
    monkeypatch.setattr(encoding, "PIECE", 40)
    monkeypatch.setattr(encoding, "LONG", 0)
    encoder = checkpoint.read(variant(directories[kind], tmp_path, {"truncation_side": side})).tokenizer
    whole = Tokenizer.from_file(str(directories[kind] / "tokenizer.json"))
    whole.no_padding()
    rng = random.Random(1)
    words = ["word", "Other", "naïve", "3.5", "it's", "中文字", "\n\n", "[SEP]", "  ", "a\nb", "x" * 50, "!?..![SEP]?"]
    long = [" ".join(rng.choice(words) for _ in range(n)) for n in (14, 15, 31)]
    rows = [*long, *itertools.product(long, repeat=2), ("short", long[2]), (long[2], "short"), ("so", "short"), "one"]
    for limit in (8, 21, 22):
        whole.enable_truncation(limit, direction=side)
        ids, types = encoder.encode(rows, max_length=limit, truncate=True)
        want = [whole.encode(*row) if isinstance(row, tuple) else whole.encode(row) for row in rows]
        assert ids == [row.ids for row in want]
        assert not encoder._types or types == [row.type_ids for row in want]
    count = len(encoder.encode([long[0]])[0][0])
    assert len(encoder.encode([long[0]], max_length=count)[0][0]) == count, "one that just fits is no fault"
    with pytest.raises(InputError, match=rf"texts\[1\] has more than {count - 1}; pass truncate=True"):
        encoder.encode(["a", long[0]], max_length=count - 1)
    pair = sum(len(encoder.encode([text])[0][0]) for text in long[:2])
    with pytest.raises(InputError, match=rf"at most {pair - 9} tokens, texts\[0\] has more than {pair - 9}"):
        encoder.encode([(long[0], long[1])], max_length=pair - 9)


def test_words_and_spaces_of_thousands_of_characters_are_one_token_however_long(directories):
    encoder = checkpoint.read(directories["bert"]).tokenizer
    unknown = 100
    for text in ("a " + "x" * 30_000 + " b", "a " + "x" * 1000 + " b", "a" + " " * 30_000 + "x" * 101 + " b"):
        assert encoder.encode([text], max_length=512, truncate=True)[0] == [[101, 1037, unknown, 1038, 102]]
        assert encoder.encode([text], max_length=5)[0] == [[101, 1037, unknown, 1038, 102]]


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        ("bert", {"cls_token": 3}, "cls_token must be a token, got 3"),
        ("bert", {"sep_token": {"lstrip": True}}, r"sep_token must be a token, got \{'lstrip': True\}"),
        ("bert", "[]", r"tokenizer_config.json must hold an object, got \[\]"),
    ],
)
def test_special_tokens_that_are_none_are_named(directories, tmp_path, kind, config, says):
    if isinstance(config, str):
        made = variant(directories[kind], tmp_path, tokenizer_config__json=config)
    else:
        made = variant(directories[kind], tmp_path, config)
    with pytest.raises(CheckpointError, match=says):
        _ = checkpoint.read(made).tokenizer


MALFORMED = {
    "tokenizer_config": [
        {"added_tokens_decoder": {"a": {}}}, {"added_tokens_decoder": {"0": "[PAD]"}}, {"cls_token": {"content": None}},
        {"added_tokens_decoder": {"0": {"content": 5}}}, {"added_tokens_decoder": {"0": {"content": "a", "lstrip": 1}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, {"extra_special_tokens": [{"a": 1}]},
        {"extra_special_tokens": [None]}, {"sep_token": None},
        {"extra_special_tokens": {"a": 5}}, {"extra_special_tokens": ["\ud800"]},
        {"additional_special_tokens": [{"content": 5}]}, {"model_input_names": ["input_ids", ["a"]]},
        {"model_input_names": [["a"]]}, {"doc_token": {"a": 1}}, {"mask_token": "\ud800"}, {"cls_token": ["a"]},
        {"tokenizer_class": 5}, {"model_input_names": []},
    ],
    "special_tokens_map": [
        {"additional_special_tokens": [{"x": 1}]}, {"additional_special_tokens": 5}, {"cls_token": 5},
        {"model_input_names": 5}, {"do_lower_case": "yes"}, [1],
    ],
    "added_tokens": [[1], None, {"a": "b"}, {"a": [1]}, {"a": True}, {"a": -1}, {"\ud800": 3}],
    "config": [{"tokenizer_class": 5}, {"architectures": 1}, {"architectures": "BertModel"}, {"architectures": [None]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "held"), [(name, held) for name, rows in MALFORMED.items() for held in rows], ids=lambda v: str(v)[:60]
)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_malformed_settings_are_one_line_that_names_file_and_field(directories, tmp_path, name, held, alone):
    make = without_document if alone else variant
    made = make(directories["bert"], tmp_path, {"tokenizer_class": REMOVED} if name == "config" else {})
    path = made / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | held if isinstance(held, dict) else held))
    with pytest.raises((CheckpointError, UnsupportedError)) as raised:
        Engine.load(made, cached=False)
    assert f"{path.name}" in raised.value.problem
    assert not isinstance(held, dict) or name == "added_tokens" or next(iter(held)) in raised.value.problem


def test_a_damaged_vocabulary_is_named(directories, tmp_path):
    for kind, name in (("bert", "vocab.txt"), ("roberta", "vocab.json")):
        made = without_document(directories[kind], tmp_path)
        (made / name).write_bytes(b"\xff")
        with pytest.raises(CheckpointError, match=f"{name} must be a tokenizer"):
            _ = checkpoint.read(made).tokenizer


def test_a_word_too_long_for_a_tokenizer_of_long_words_stays_unknown():
    stock = copy.deepcopy(models.tokenizer())
    stock.backend_tokenizer.model.max_input_chars_per_word = 1000
    for length in (999, 1000, 1001, 5000):
        word = "a" * length
        got = checkpoint.piecewise(stock).encode([word], max_length=600, truncate=True)[0]
        assert got == [stock(word, truncation=True, max_length=600)["input_ids"]]
