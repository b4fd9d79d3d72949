"""The added tokens of a tokenizer, which are found in a text before it is split: those that its files list, and the
special tokens of its settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from sparsebert.checkpoint.files import REBUILD, parse_json
from sparsebert.checkpoint.tokenizer_classes import Settings
from sparsebert.errors import CheckpointError, UnsupportedError, shown

CONFIG, DOCUMENT, SPECIAL, ADDED = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("extra_special_tokens", "additional_special_tokens")  # the second one's older name
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_ORIGINAL = "copy tokenizer.json there from the model that it was trained from"


def content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def require_tokens(document: dict, path: Path) -> None:
    """Raises CheckpointError, naming file and field, for a token in tokenizer_config.json or special_tokens_map.json
    that is none.
    """
    for field, value in document.items():
        if field == "added_tokens_decoder":
            for number, token in value.items():
                if not (re.fullmatch("[0-9]{1,9}", number) and isinstance(token, dict) and _is_token(token)):
                    raise CheckpointError(
                        f"{path}: {field} must map ids to tokens, got {shown({number: token})}", fix=REBUILD
                    )
            continue
        tokens = [value] if field in NAMED or _is_named(field, value) else []
        if field in LISTS:
            tokens = value.values() if isinstance(value, dict) else value or []
        for token in tokens:
            if not _is_token(token) and (token is not None or field in LISTS):
                what = "hold tokens" if field in LISTS else "be a token"
                raise CheckpointError(f"{path}: {field} must {what}, got {shown(token)}", fix=REBUILD)


def _is_token(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            isinstance(value.get("content"), str)
            and _is_token(value["content"])
            and all(value.get(flag) is None or isinstance(value[flag], bool) for flag in _FLAGS)
        )
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # tokenizers takes UTF-8 only


def _is_named(field: str, value: Any) -> bool:
    """Whether a field of the settings is a special token of a name that the model's author chose."""
    return field.endswith("_token") and field not in NAMED and isinstance(value, (str, dict))


def _more(settings: dict) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(field, token) of the special tokens without a standard name, in the order in which transformers numbers new
    ones: those with names of their own, and those of a list.
    """
    extra = settings.get(LISTS[0]) or settings.get(LISTS[1]) or []
    own = {field: value for field, value in settings.items() if _is_named(field, value)}
    own = dict(sorted(own.items(), key=lambda row: isinstance(row[1], str)))  # objects first
    if isinstance(extra, dict):
        own, extra = own | extra, []
    return list(own.items()), [(LISTS[0], token) for token in extra]


def add(
    tokenizer: Tokenizer,
    config: Settings,
    special_map: Settings,
    tokens: dict[str, str],
    contents: Mapping[str, bytes | None],
    path: Path,
    *,
    whole: bool,
) -> None:
    """Adds the tokens that the tokenizer does not yet find in texts: if it is new, first those that the files list.
    Checks the lists. config, special_map: the settings in CONFIG and in SPECIAL. tokens: the special tokens of NAMED.
    whole: True for a new tokenizer, False for tokenizer.json's.
    """
    settings = config | special_map
    own, extra = _more(settings)
    special = [(name, settings.get(name) or tokens[name]) for name in NAMED if name in tokens] + own + extra
    where, listed = _listed(settings, contents, path)
    if whole:
        _add_listed(tokenizer, where, listed, {content(token) for _, token in special}, path)
    elif where is not None:
        _require_same(tokenizer, where, listed, path)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    _require_agreement(config, special_map, known, path)
    new: dict[str, AddedToken] = {}
    for name, token in special:
        if content(token) in known:
            continue
        wanted, first = _special(token), new.setdefault(content(token), _special(token))
        if _flags(wanted) != _flags(first):
            raise UnsupportedError(
                f"{path}: special token {shown(content(token))} must be matched in one way, {name} has "
                f"{shown(_flags(wanted)[1:])}, another field {shown(_flags(first)[1:])}",
                fix="correct one of them",
            )
    if new:
        tokenizer.add_tokens(list(new.values()))


def require_different(tokenizer: Tokenizer, path: Path) -> None:
    """Raises UnsupportedError if two added tokens are the same in a normalised text: which of them is found there then
    changes from load to load.
    """
    found: dict[str, str] = {}
    for token in tokenizer.get_added_tokens_decoder().values() if tokenizer.normalizer is not None else ():
        if not token.normalized:
            continue
        other = found.setdefault(tokenizer.normalizer.normalize_str(token.content), token.content)
        if other != token.content:
            raise UnsupportedError(
                f"{path}: added tokens {shown(other)} and {shown(token.content)} must differ, are the same after the "
                "tokenizer has normalised a text",
                fix="save the tokenizer anew with one of them, or with normalized false",
            )


def _require_agreement(config: dict, special: dict, known: set[str], path: Path) -> None:
    """Raises UnsupportedError if both files have special tokens without a standard name, and differ in those that are
    not known: versions of transformers differ in which file they use.
    """
    for ours, theirs in zip(_more(config), _more(special), strict=True):
        wanted, found = (
            [(name, _flags(_special(token))) for name, token in rows if content(token) not in known]
            for rows in (ours, theirs)
        )
        if ours and theirs and wanted != found:
            raise UnsupportedError(
                f"{path / SPECIAL}: {theirs[0][0]} and others must be {shown(ours)}, as in {CONFIG}, are "
                f"{shown(theirs)}",
                fix="correct one of them",
            )


def _listed(
    settings: Settings, contents: Mapping[str, bytes | None], path: Path
) -> tuple[str | None, dict[int, AddedToken]]:
    """The file that lists added tokens, None if no file does, and id -> token there. transformers ignores
    added_tokens.json beside an added_tokens_decoder.
    """
    if "added_tokens_decoder" in settings:
        return CONFIG, {int(i): _added(token) for i, token in settings["added_tokens_decoder"].items()}
    data = contents.get(ADDED)
    if data is None:
        return None, {}
    ids = parse_json(data, path / ADDED)
    if not isinstance(ids, dict) or not all(type(i) is int and i >= 0 and _is_token(t) for t, i in ids.items()):
        raise CheckpointError(f"{path / ADDED} must map tokens to ids, got {shown(ids)}", fix=REBUILD)
    return ADDED, {i: AddedToken(token, normalized=True) for token, i in ids.items()}


def _add_listed(
    tokenizer: Tokenizer, where: str | None, listed: dict[int, AddedToken], special: set[str], path: Path
) -> None:
    """Adds the listed tokens to a new tokenizer. Raises UnsupportedError if one gets another id than the listed one, or
    if versions of transformers differ in how they match it.
    """
    added = [token for _, token in sorted(listed.items())]
    tokenizer.add_tokens(added)
    for i, token in sorted(listed.items()):
        got = tokenizer.token_to_id(token.content)
        if got != i:
            raise UnsupportedError(
                f"{path / where}: added token {shown(token.content)} must have the id {got}, which follows from the "
                f"vocabulary, has {i}",
                fix=_ORIGINAL,
            )
        if where == ADDED and token.content in special:
            raise UnsupportedError(
                f"{path / where}: added token {shown(token.content)} must not be a special token: how it is matched "
                "is not said",
                fix=_ORIGINAL,
            )


def _require_same(tokenizer: Tokenizer, where: str, listed: dict[int, AddedToken], path: Path) -> None:
    """Raises UnsupportedError unless the file lists the same added tokens as tokenizer.json: versions of transformers
    differ in which file they use.
    """
    held: dict[int, Any] = {i: _flags(token) for i, token in tokenizer.get_added_tokens_decoder().items()}
    said: dict[int, Any] = {i: _flags(token) for i, token in listed.items()}
    if where == ADDED:  # which has no flags, and not the tokens of the vocabulary
        said, held = ({i: row[i][:1] for i in row if i in said} for row in (said, held))
    different = sorted(i for i in said.keys() | held.keys() if said.get(i) != held.get(i))
    if different:
        i = different[0]
        raise UnsupportedError(
            f"{path / where}: added token {i} must be {DOCUMENT}'s {shown(held.get(i))}, is {shown(said.get(i))}",
            fix="save the tokenizer anew with save_pretrained",
        )


def _flags(token: AddedToken) -> tuple:
    return token.content, token.special, token.single_word, token.lstrip, token.rstrip, token.normalized


def _added(token: dict) -> AddedToken:
    flags = {name: token[name] for name in _FLAGS if token.get(name) is not None}
    return AddedToken(token["content"], **flags)


def _special(token: Any) -> AddedToken:
    """A special token of the settings: a string, or an object that says how it is matched in a text."""
    if not isinstance(token, dict):
        return AddedToken(token, special=True, normalized=False)
    return _added(token | {"special": True})
