"""Builds the tokenizer of a model directory as stock `transformers` does, from tokenizer.json and
tokenizer_config.json.

FIELDS and tokenizer_classes.py say what is supported. A field, or a part of tokenizer.json, that would change ids in
one version of transformers and not in another is refused by name. Needs numpy and tokenizers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from sparsebert.architectures import Facts
from sparsebert.checkpoint import added_tokens
from sparsebert.checkpoint.added_tokens import ADDED, CONFIG, DOCUMENT, NAMED, SPECIAL
from sparsebert.checkpoint.encoding import Pieces, TextEncoder, templates
from sparsebert.checkpoint.files import REBUILD, parse_json
from sparsebert.checkpoint.tokenizer_classes import CLASSES, DEFAULT_CLASS, UNIGRAM, WORDPIECE, Settings, TokenizerClass
from sparsebert.errors import CheckpointError, UnsupportedError, first_line, shown

VOCABULARIES = (DOCUMENT, "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
FILES = (CONFIG, SPECIAL, ADDED, "merges.txt", *VOCABULARIES)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _unset(value: Any) -> bool:
    return value in (None, False, [], {}, ())


# Fields of tokenizer_config.json that change ids or token types -> (check of a value, the rule in words). All other
# fields change nothing in the tokenizers of CLASSES: paths, templates, padding, decoding, remarks.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer_class": (lambda v: v is None or isinstance(v, str), "a class's name"),
    "do_lower_case": (_is_bool, "true or false"),
    "strip_accents": (lambda v: v is None or _is_bool(v), "true, false or null"),
    "tokenize_chinese_chars": (_is_bool, "true or false"),
    "add_prefix_space": (_is_bool, "true or false"),
    "truncation_side": (lambda v: v in ("left", "right"), "left or right"),
    "model_input_names": (
        lambda v: _are_strings(v) and {"input_ids", "attention_mask"} <= set(v) <= _INPUTS and v[0] == "input_ids",
        "input_ids, attention_mask and optionally token_type_ids",
    ),
    "model_max_length": (lambda v: v is None or (type(v) in (int, float) and v > 0), "a number of tokens"),
    "max_len": (lambda v: v is None or (type(v) in (int, float) and v > 0), "a number of tokens"),
    "added_tokens_decoder": (lambda v: isinstance(v, dict), "an object"),
    "additional_special_tokens": (lambda v: v is None or isinstance(v, list), "a list"),
    "extra_special_tokens": (lambda v: v is None or isinstance(v, (list, dict)), "a list"),
    "do_basic_tokenize": (lambda v: v is None or v is True, "true: words are split before their pieces"),
    "split_special_tokens": (_unset, "false"),
    "add_bos_token": (_unset, "false: special tokens are those of the class"),
    "add_eos_token": (_unset, "false: special tokens are those of the class"),
    "never_split": (lambda v: v is None or isinstance(v, list), "a list"),
    "sp_model_kwargs": (_unset, "empty: pieces are not drawn at random"),
    "init_inputs": (_unset, "empty"),
    "auto_map": (_unset, "absent: code that comes with a model is not run"),
    "fix_mistral_regex": (_unset, "absent"),
}
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
# Where a text may be cut in two so that the tokens of the two parts, joined, are those of the whole text.
_AT_SPACES = re.compile("(?<=[0-9A-Za-z])(?= [0-9A-Za-z])")
_BETWEEN_WORDS = re.compile("(?<=[0-9A-Za-z])(?=[ \\t\\r\\n][0-9A-Za-z])")
_BETWEEN_PUNCTUATION = re.compile(r"(?<=[!-/:-@\[-`{-~])(?=[!-/:-@\[-`{-~])")  # of which each is a word to BERT
_BETWEEN_WORDS_OR_CHINESE = re.compile(_BETWEEN_WORDS.pattern + "|(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])")
_AS_IT_IS = (
    "if tokenizer.json is what the model was trained with, set tokenizer_class to PreTrainedTokenizerFast in "
    "tokenizer_config.json"
)


def read(contents: Mapping[str, bytes | None], config: dict, facts: Facts, path: Path) -> TextEncoder:
    """The tokenizer of a model directory. contents: name -> bytes of FILES, None for a missing file. config:
    config.json. Raises CheckpointError and UnsupportedError, naming file and field.
    """
    own, special = _settings(contents, path)
    settings = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True} | own | special
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if name and not isinstance(name, str):
        raise CheckpointError(
            f"{path}/config.json: tokenizer_class must be a class's name, got {shown(name)}", fix=REBUILD
        )
    kind = facts.architecture.kind
    name = (name or DEFAULT_CLASS[kind]).removesuffix("Fast") if name != "PreTrainedTokenizerFast" else name
    if name not in CLASSES:
        raise UnsupportedError(
            f"{path / CONFIG}: tokenizer_class must be one of {', '.join(CLASSES)}, got {shown(name)}",
            fix=_AS_IT_IS,
        )
    of = CLASSES[name]
    document = contents.get(DOCUMENT)
    if document is None and (of is None or all(contents.get(n) is None for n in VOCABULARIES)):
        raise CheckpointError(
            f"{path} has no tokenizer ({DOCUMENT})",
            fix="copy tokenizer.json and tokenizer_config.json there from the model that it was trained from",
        )
    tokens = {name: added_tokens.content(settings[name]) for name in NAMED if settings.get(name)}
    if of is not None:  # a null in the settings overrides a class's token
        tokens = {name: token for name, token in of.tokens.items() if name not in settings} | tokens
        for name in sorted(of.tokens.keys() - tokens.keys() - {"pad_token", "mask_token"}):
            raise CheckpointError(f"{path / CONFIG}: {name} must be a token, got {shown(settings[name])}", fix=REBUILD)
    try:
        tokenizer = of.empty(contents, tokens) if document is None else Tokenizer.from_buffer(document)
    except Exception as error:  # tokenizers raises nothing narrower
        where = next(file for file in VOCABULARIES if contents.get(file) is not None)
        raise CheckpointError(f"{path / where} must be a tokenizer: {first_line(error)}", fix=REBUILD) from error
    if tokenizer is None:
        raise UnsupportedError(
            f"{path} has no {DOCUMENT}, nor a vocabulary of {name}",
            fix=f"write one: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})",
        )
    side = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added_tokens.add(tokenizer, own, special, tokens, contents, path, whole=document is None)
    if of is not None:
        _as_class(tokenizer, of, settings, tokens, path, whole=document is None)
    elif "add_prefix_space" in settings:
        _require_prefix_space(tokenizer, settings["add_prefix_space"], path)
    added_tokens.require_different(tokenizer, path)
    inputs = settings.get("model_input_names", ["token_type_ids"] if of is not None and of.types else [])
    longest = settings.get("model_max_length") or settings.get("max_len") or facts.max_length
    found = TextEncoder(
        tokenizer,
        types="token_type_ids" in inputs,
        left=settings.get("truncation_side", side) == "left",
        max_length=max(3, min(int(min(longest, 2**31)), facts.max_length)),
        pieces=_pieces(tokenizer),
    )
    if found.vocabulary > facts.vocabulary:
        raise CheckpointError(
            f"{path}: tokenizer has {found.vocabulary} tokens, the model {facts.vocabulary}",
            fix="save the tokenizer that the model was trained with, or resize the model's embeddings",
        )
    return found


def _settings(contents: Mapping[str, bytes | None], path: Path) -> tuple[Settings, Settings]:
    """tokenizer_config.json and special_tokens_map.json, checked. The second overrides the first; it is empty if the
    first has an added_tokens_decoder.
    """
    found: list[dict] = []
    for name in (CONFIG, SPECIAL):
        data = contents.get(name)
        document = {} if data is None else parse_json(data, path / name)
        if not isinstance(document, dict):
            raise CheckpointError(f"{path / name} must hold an object, got {shown(document)}", fix=REBUILD)
        found.append(document)
    settings, special = found
    if "added_tokens_decoder" in settings:  # as in transformers, which then ignores that file
        special = {}
    for name, document in ((CONFIG, settings), (SPECIAL, special)):
        for field in sorted(FIELDS.keys() & document.keys()):
            holds, rule = FIELDS[field]
            if not holds(document[field]):
                raise UnsupportedError(
                    f"{path / name}: {field} must be {rule}, got {shown(document[field])}",
                    fix="save the tokenizer with a value that is understood",
                )
        added_tokens.require_tokens(document, path / name)
    return settings, special


def _state(part: Any) -> Any:
    """A part of a tokenizer in the form that tokenizer.json has."""
    return None if part is None else json.loads(part.__getstate__())


def _as_class(
    tokenizer: Tokenizer, of: TokenizerClass, settings: Settings, tokens: dict[str, str], path: Path, *, whole: bool
) -> None:
    """Gives a tokenizer the normalizer, pre-tokenizer and post-processor of its class. First checks that the parts in
    tokenizer.json are the same, apart from what the settings decide. whole: True for a new tokenizer, without parts.
    """
    settings = {"add_prefix_space": of.model is UNIGRAM} | settings
    normalizer, pre_tokenizer = of.parts(settings, tokenizer.normalizer)
    if not whole:
        made = of.model | ({"unk_token": tokens["unk_token"]} if of.model is WORDPIECE else {})
        model = {name: value for name, value in _state(tokenizer.model).items() if name in made}
        _require_same(f"model of {of.name}", model, made, path)
        given, made = _state(tokenizer.normalizer), _state(normalizer)
        if of.model is UNIGRAM:
            given = _without_space_rules(given)
        _require_same("normalizer", _open(given), _open(made), path)
        # A newer conversion splits only at spaces; its normalizer handles spaces so that the words are the same.
        if not (of.model is UNIGRAM and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace)):
            _require_same("pre_tokenizer", _open(_state(tokenizer.pre_tokenizer)), _open(_state(pre_tokenizer)), path)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    before = None if whole else templates(tokenizer)

    def id_of(token: str) -> int:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"{path}: special token {token} must be in the vocabulary", fix=REBUILD)
        return found

    tokenizer.post_processor = of.post(tokens, id_of)
    if before is not None:
        _require_same("post_processor", before, templates(tokenizer), path)


def _open(state: Any) -> Any:
    """The state of a normalizer or pre-tokenizer, without the fields that the settings decide."""
    decided = (
        "lowercase",
        "strip_accents",
        "handle_chinese_chars",
        "add_prefix_space",
        "prepend_scheme",
        "trim_offsets",
    )
    if isinstance(state, dict):
        parts = {name: _open(value) for name, value in state.items() if name not in decided}
        return (
            parts["normalizers"][0]
            if parts.get("type") == "Sequence" and len(parts.get("normalizers", ())) == 1
            else parts
        )
    return [_open(part) for part in state] if isinstance(state, list) else state


def _without_space_rules(state: Any) -> Any:
    """The normalizer of a converted sentencepiece model, without its rules for spaces: words are split at spaces
    anyway.
    """
    if not isinstance(state, dict) or state.get("type") != "Sequence":
        return state
    rules = [
        part for part in state["normalizers"] if part["type"] not in ("Strip", "Replace") or not _only_spaces(part)
    ]
    return state | {"normalizers": rules} if rules else None


def _only_spaces(part: dict) -> bool:
    if part["type"] == "Strip":
        return True
    return part.get("pattern") in ({"Regex": " {2,}"}, {"String": "  "}) and part.get("content") in (" ", "▁")


def _require_same(part: str, given: Any, made: Any, path: Path) -> None:
    if given != made:
        raise UnsupportedError(f"{path / DOCUMENT}: {part} must be {shown(made)}, is {shown(given)}", fix=_AS_IT_IS)


def _require_prefix_space(tokenizer: Tokenizer, wanted: bool, path: Path) -> None:
    state = _state(tokenizer.pre_tokenizer)
    if isinstance(state, dict) and state.get("add_prefix_space", wanted) != wanted:
        raise UnsupportedError(
            f"{path / CONFIG}: add_prefix_space must be {not wanted}, as in {DOCUMENT}, got {wanted}",
            fix="correct one of them",
        )


def piecewise(tokenizer) -> TextEncoder | None:
    """A TextEncoder that cuts long texts as a fast tokenizer of transformers does, but without reading them to their
    end. None if the tokenizer has to read the whole text.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    pieces = _pieces(backend)
    if pieces is None:
        return None
    types = "token_type_ids" in tokenizer.model_input_names
    left = tokenizer.truncation_side == "left"
    return TextEncoder(backend, types=types, left=left, max_length=2**31, pieces=pieces)


def _pieces(tokenizer: Tokenizer) -> Pieces | None:
    """How long texts may be read piece by piece. None if they must be read as a whole: for an unknown way of splitting,
    or added tokens that hold or swallow spaces.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    for token in added:
        bare = token.content.strip()
        if _BETWEEN_WORDS_OR_CHINESE.search(token.content) or bare != token.content:
            return None
        if (token.lstrip or token.rstrip) and re.search(r"^[0-9A-Za-z]|[0-9A-Za-z]$", bare):
            return None
    normalizer, splits = _state(tokenizer.normalizer) or {}, _state(tokenizer.pre_tokenizer) or {}
    kinds = [part["type"] for part in splits.get("pretokenizers", [splits]) if part]
    if kinds == ["BertPreTokenizer"] and normalizer.get("type") == "BertNormalizer":
        between = _BETWEEN_WORDS_OR_CHINESE if normalizer["handle_chinese_chars"] else _BETWEEN_WORDS
        if not any(_BETWEEN_PUNCTUATION.search(token.content) for token in added):
            between = re.compile(f"{between.pattern}|{_BETWEEN_PUNCTUATION.pattern}")
        # Words above 1,000 letters are cut to 1,000 (Pieces.shortened): both must be unknown to the model.
        bounded = getattr(tokenizer.model, "max_input_chars_per_word", 10**9) < 1000
        inside_words = any(re.fullmatch("[0-9A-Za-z]+", token.content) for token in added)
        return Pieces(between, word_pieces=bounded and not inside_words)
    if kinds == ["WhitespaceSplit", "Metaspace"]:
        return Pieces(_BETWEEN_WORDS, word_pieces=False)
    if kinds == ["ByteLevel"] and not normalizer and splits.get("use_regex", True):
        # add_prefix_space puts a space before a piece that begins with a line's end, but not if it begins with a space.
        return Pieces(_AT_SPACES if splits["add_prefix_space"] else _BETWEEN_WORDS, word_pieces=False)
    return None
