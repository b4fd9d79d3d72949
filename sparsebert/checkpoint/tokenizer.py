"""Text to token ids, as stock `transformers` does it: by tokenizer.json and by what tokenizer_config.json says beside.

FIELDS and CLASSES say what is understood: a field or a part of tokenizer.json that would change ids in one version of
transformers and not in another is refused by name. Needs numpy and tokenizers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors

from sparsebert.architectures import Facts
from sparsebert.checkpoint.files import REBUILD, parse_json
from sparsebert.errors import CheckpointError, InputError, UnsupportedError, first_line, shown

CONFIG, DOCUMENT, SPECIAL, ADDED = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
VOCABULARIES = (DOCUMENT, "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
FILES = (CONFIG, SPECIAL, ADDED, "merges.txt", *VOCABULARIES)
LONG = 16  # characters a token: a text of more is read piece by piece, until enough of it is known
PIECE = 8192  # characters of such a piece

Text = str | tuple[str, str]
Settings = dict[str, Any]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _unset(value: Any) -> bool:
    return value in (None, False, [], {}, ())


# Fields of tokenizer_config.json that change ids or token types, and the values that are understood. What
# is not here sets nothing in the tokenizers of CLASSES: paths, templates, padding, decoding, remarks.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer_class": (lambda v: v is None or isinstance(v, str), "a class's name"),
    "do_lower_case": (_is_bool, "true or false"),
    "strip_accents": (lambda v: v is None or _is_bool(v), "true, false or null"),
    "tokenize_chinese_chars": (_is_bool, "true or false"),
    "add_prefix_space": (_is_bool, "true or false"),
    "truncation_side": (lambda v: v in ("left", "right"), "left or right"),
    "model_input_names": (
        lambda v: isinstance(v, list) and {"input_ids", "attention_mask"} <= set(v) <= _INPUTS and v[0] == "input_ids",
        "input_ids, attention_mask and token_type_ids or not",
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
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BERT_TOKENS = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
_ROBERTA_TOKENS = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
    "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
# Where a text may be cut in two whose tokens, one behind the other, are those of the whole.
_BETWEEN_WORDS = re.compile(r"(?<=[0-9A-Za-z])(?= [0-9A-Za-z])")
_BETWEEN_WORDS_OR_CHINESE = re.compile(_BETWEEN_WORDS.pattern + "|(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])")


@dataclass(frozen=True)
class _Class:
    """A tokenizer class of transformers. types: whether its token types reach the model. tokens: its special tokens.

    parts: by the settings, the normalizer and the pre-tokenizer that the class makes. post: its post-processor, of the
    special tokens and a function from token to id. model: what tokenizer.json's model has to be. normalizers: other
    normalizers that a tokenizer.json of it may have, which the class replaces by its own of the same result.
    empty: of a vocabulary's files, the tokenizer where there is no tokenizer.json.
    """

    name: str
    types: bool
    tokens: dict[str, str]
    parts: Callable[[Settings, Any], tuple[Any, Any]]
    post: Callable[[dict[str, str], Callable[[str], int]], Any]
    model: dict[str, Any]
    empty: Callable[[Mapping[str, bytes | None], dict[str, str]], Tokenizer | None]


def _bert_parts(settings: Settings, document: Any) -> tuple[Any, Any]:
    normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )
    return normalizer, pre_tokenizers.BertPreTokenizer()


def _bert_post(tokens: dict[str, str], of: Callable[[str], int]) -> Any:
    start, end = tokens["cls_token"], tokens["sep_token"]
    return processors.TemplateProcessing(
        single=f"{start}:0 $A:0 {end}:0",
        pair=f"{start}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(start, of(start)), (end, of(end))],
    )


def _bert_empty(contents: Mapping[str, bytes | None], tokens: dict[str, str]) -> Tokenizer | None:
    data = contents.get("vocab.txt")
    if data is None:
        return None
    lines = data.decode("utf-8").split("\n")
    vocabulary = {line.rstrip(): i for i, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    return Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk_token"]))


def _roberta_parts(settings: Settings, document: Any) -> tuple[Any, Any]:
    return None, pre_tokenizers.ByteLevel(add_prefix_space=settings["add_prefix_space"])


def _roberta_post(tokens: dict[str, str], of: Callable[[str], int]) -> Any:
    start, end = tokens["cls_token"], tokens["sep_token"]
    return processors.RobertaProcessing((end, of(end)), (start, of(start)))


def _roberta_empty(contents: Mapping[str, bytes | None], tokens: dict[str, str]) -> Tokenizer | None:
    vocabulary, merges = contents.get("vocab.json"), contents.get("merges.txt")
    if vocabulary is None or merges is None:
        return None
    lines = [line for line in merges.decode("utf-8").split("\n") if line.strip() and not line.startswith("#version")]
    return Tokenizer(models.BPE(json.loads(vocabulary), [tuple(line.split()) for line in lines]))


def _xlm_parts(settings: Settings, document: Any) -> tuple[Any, Any]:
    scheme = "always" if settings["add_prefix_space"] else "never"
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    return _precompiled(document), pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])


def _precompiled(normalizer: Any) -> Any:
    """The character map of a tokenizer.json's normalizer, which alone the class keeps of it."""
    for part in normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer]:
        if isinstance(part, normalizers.Precompiled):
            return part
    return None


def _xlm_post(tokens: dict[str, str], of: Callable[[str], int]) -> Any:
    start, end = tokens["bos_token"], tokens["eos_token"]
    return processors.TemplateProcessing(
        single=[start, "$A", end],
        pair=[start, "$A", end, end, "$B", end],
        special_tokens=[(start, of(start)), (end, of(end))],
    )


_WORDPIECE = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
_BPE = {"type": "BPE", "dropout": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
_UNIGRAM = {"type": "Unigram", "unk_id": 3, "byte_fallback": False}
_BERT = _Class("BertTokenizer", True, _BERT_TOKENS, _bert_parts, _bert_post, _WORDPIECE, _bert_empty)
CLASSES = {
    "BertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "DistilBertTokenizer": _Class(
        "DistilBertTokenizer", False, _BERT_TOKENS, _bert_parts, _bert_post, _WORDPIECE, _bert_empty
    ),
    "RobertaTokenizer": _Class(
        "RobertaTokenizer", False, _ROBERTA_TOKENS, _roberta_parts, _roberta_post, _BPE, _roberta_empty
    ),
    "XLMRobertaTokenizer": _Class(
        "XLMRobertaTokenizer", False, _ROBERTA_TOKENS, _xlm_parts, _xlm_post, _UNIGRAM, lambda contents, tokens: None
    ),
    "PreTrainedTokenizerFast": None,  # tokenizer.json as it is
    "TokenizersBackend": None,
}
_DEFAULT_CLASS = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "electra": "BertTokenizer", "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}  # fmt: skip
_AS_IT_IS = "if tokenizer.json is what the model was trained with, set tokenizer_class to PreTrainedTokenizerFast in it"


class TextEncoder:
    """Token ids and token types of texts and pairs. It keeps no state between calls and takes no lock: threads, signal
    handlers and forked children may call it at once.

    max_length: tokens that a text is cut to where nothing else is said: the model's positions, or model_max_length of
    tokenizer_config.json where that is less. vocabulary: ids are below it.
    """

    def __init__(self, tokenizer: Tokenizer, *, types: bool, left: bool, max_length: int, pieces: re.Pattern | None):
        self._tokenizer, self._types, self._left, self._pieces = tokenizer, types, left, pieces
        self._templates = _templates(tokenizer)
        self.max_length = max_length
        added = tokenizer.get_added_tokens_decoder()
        self.vocabulary = max([tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])

    @classmethod
    def read(cls, contents: Mapping[str, bytes | None], config: dict, facts: Facts, path: Path) -> TextEncoder:
        """The tokenizer of a model directory. contents: name -> bytes of FILES, None for what is not there. config:
        config.json. Raises CheckpointError and UnsupportedError, naming file and field.
        """
        settings = _settings(contents, path)
        name = settings.get("tokenizer_class") or config.get("tokenizer_class")
        kind = facts.architecture.kind
        name = (name or _DEFAULT_CLASS[kind]).removesuffix("Fast") if name != "PreTrainedTokenizerFast" else name
        if name not in CLASSES:
            raise UnsupportedError(
                f"{path / CONFIG}: tokenizer_class must be one of {', '.join(CLASSES)}, got {shown(name)}",
                fix=_AS_IT_IS,
            )
        of = CLASSES[name]
        document = contents.get(DOCUMENT)
        if document is None and (of is None or all(contents.get(n) is None for n in VOCABULARIES)):
            raise CheckpointError(f"{path} has no tokenizer ({DOCUMENT})", fix=REBUILD)
        tokens = {k: _content(settings[k]) for k in _NAMED if settings.get(k)}
        if of is not None:
            tokens = of.tokens | tokens
        try:
            tokenizer = of.empty(contents, tokens) if document is None else Tokenizer.from_buffer(document)
        except Exception as error:  # tokenizers raises nothing narrower
            where = path / (DOCUMENT if document is not None else "vocab.txt")
            raise CheckpointError(f"{where} must be a tokenizer: {first_line(error)}", fix=REBUILD) from error
        if tokenizer is None:
            raise UnsupportedError(
                f"{path} has no {DOCUMENT}, nor a vocabulary of {name}",
                fix=f"write one: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})",
            )
        side = (tokenizer.truncation or {}).get("direction", "right")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if document is not None:
            _require_one_list_of_added_tokens(tokenizer, settings, contents, path)
        _add_special_tokens(tokenizer, settings, tokens)
        if of is not None:
            _as_class(tokenizer, of, settings, tokens, path, whole=document is None)
        elif "add_prefix_space" in settings:
            _require_prefix_space(tokenizer, settings["add_prefix_space"], path)
        inputs = settings.get("model_input_names", ["token_type_ids"] if of is not None and of.types else [])
        longest = settings.get("model_max_length") or settings.get("max_len") or facts.max_length
        found = cls(
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

    def encode(
        self,
        texts: Sequence[Text],
        *,
        max_length: int | None = None,
        truncate: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(token ids, token types) of each text, special tokens included.

        max_length: tokens that a text may have; None for any number. truncate: cut longer texts, of a pair the longer
        part first, on the side that the tokenizer says; without it InputError names the text. numbers: what an error
        calls the texts, None for 0, 1, 2, ….
        """
        long = float("inf") if max_length is None else max(PIECE, LONG * max_length)
        short = [i for i, text in enumerate(texts) if sum(map(len, _parts(text))) <= long]
        encoded = (
            dict(zip(short, self._tokenizer.encode_batch([texts[i] for i in short]), strict=True)) if short else {}
        )
        ids, types = [], []
        for i, text in enumerate(texts):
            found = encoded.get(i)
            if found is None or (max_length is not None and len(found) > max_length):
                if not truncate:
                    self._refuse_long(text, found, max_length, i if numbers is None else numbers[i])
                row, kinds = self._cut(text, max_length)
            else:
                row, kinds = found.ids, found.type_ids
            ids.append(row)
            types.append(kinds if self._types else [0] * len(row))
        return ids, types

    def _refuse_long(self, text: Text, found: Encoding | None, most: int, number: int) -> None:
        """InputError for a text of too many tokens; of a long one no more is read than shows it."""
        if found is not None:
            has = str(len(found))
        else:
            count = self._special(text)
            for part in _parts(text):
                stream = _Stream(self._tokenizer, part, self._pieces, left=False)
                stream.fetch(most + 1 - count)
                count += stream.count
            if count <= most:
                return
            has = f"more than {most}"
        raise InputError(
            f"texts must have at most {most} tokens, texts[{number}] has {has}",
            fix="pass truncate=True to cut them, or shorten it",
        )

    def _special(self, text: Text) -> int:
        """Special tokens that are put around a text or pair."""
        return sum(part is None for _, _, part in self._templates[len(_parts(text))])

    def _cut(self, text: Text, most: int) -> tuple[list[int], list[int]]:
        """Token ids and token types of a text or pair that has at least so many, cut to so many."""
        parts = _parts(text)
        room = most - self._special(text)
        if room < len(parts):
            raise InputError(
                f"max_length must leave room for {len(parts)} tokens beside the special ones, got {most}",
                fix="choose a larger max_length",
            )
        streams = [_Stream(self._tokenizer, part, self._pieces, self._left) for part in parts]
        for stream in streams:
            stream.fetch(room + 1)
        keep = [room]
        if len(streams) == 2:
            a, b = streams
            while room % 2 and a.count > room and b.count > room:  # who gets the odd token hangs on which is longer
                shorter, longer = (a, b) if a.count <= b.count else (b, a)
                if shorter.done and (longer.done or longer.count > shorter.count):
                    break
                stream = longer if shorter.done else shorter
                stream.fetch(stream.count + 1)
            keep = shares(a.count, b.count, room)
        ids, types = [], []
        for token, kind, part in self._templates[len(parts)]:
            row = [token] if part is None else streams[part].kept(keep[part])
            ids += row
            types += [kind] * len(row)
        return ids, types


class _Stream:
    """The tokens of one text without special ones, read piece by piece from its beginning or, `left`, from its end."""

    def __init__(self, tokenizer: Tokenizer, text: str, pieces: re.Pattern | None, left: bool):
        self._tokenizer, self._left = tokenizer, left
        self._rest = _split(text, pieces, left)
        self._found: list[int] = []
        self.count, self.done = 0, False

    def fetch(self, count: int) -> None:
        """Reads on until there are so many tokens, or no more."""
        while self.count < count and not self.done:
            piece = next(self._rest, None)
            if piece is None:
                self.done = True
            else:
                found = self._tokenizer.encode(piece, add_special_tokens=False).ids
                self.count += len(found)
                self._found = found + self._found if self._left else self._found + found

    def kept(self, tokens: int) -> list[int]:
        """The first, or last, so many of them."""
        return self._found[-tokens:] if self._left else self._found[:tokens]


def _split(text: str, pieces: re.Pattern | None, left: bool) -> Iterator[str]:
    if pieces is None or len(text) <= PIECE:
        yield text
        return
    if not left:
        start = 0
        while start < len(text):
            found = pieces.search(text, start + PIECE)
            end = found.start() if found else len(text)
            yield text[start:end]
            start = end
        return
    end = len(text)
    while end > 0:
        begin, window = 0, PIECE
        while end - PIECE > 0:
            low = max(0, end - PIECE - window)
            places = [m.start() for m in pieces.finditer(text, low, end - PIECE + 2) if m.start() > low]
            if places or low == 0:
                begin = places[-1] if places else 0
                break
            window *= 2
        yield text[begin:end]
        end = begin


def shares(first: int, second: int, room: int) -> list[int]:
    """Tokens that each part of a pair keeps of its own where both get `room`: the longer one is cut first, and of two
    long ones each keeps half, the longer the odd token; the second where they are equal.
    """
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [long, short] if first > second else [short, long]


def _parts(text: Text) -> tuple[str, ...]:
    return text if isinstance(text, tuple) else (text,)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _settings(contents: Mapping[str, bytes | None], path: Path) -> Settings:
    """tokenizer_config.json, checked, with the special tokens of special_tokens_map.json where it names none itself."""
    found: list[dict] = []
    for name in (CONFIG, SPECIAL):
        data = contents.get(name)
        document = {} if data is None else parse_json(data, path / name)
        if not isinstance(document, dict):
            raise CheckpointError(f"{path / name} must hold an object, got {shown(document)}", fix=REBUILD)
        found.append(document)
    settings, special = found
    for field in sorted(FIELDS.keys() & settings.keys()):
        holds, rule = FIELDS[field]
        if not holds(settings[field]):
            raise UnsupportedError(
                f"{path / CONFIG}: {field} must be {rule}, got {shown(settings[field])}",
                fix="save the tokenizer with a value that is understood",
            )
    if "added_tokens_decoder" not in settings:  # as transformers: else that file is not read
        settings = settings | special
    for field in _NAMED:
        token = settings.get(field)
        if token is not None and not isinstance(token if not isinstance(token, dict) else token.get("content"), str):
            raise CheckpointError(f"{path / CONFIG}: {field} must be a token, got {shown(token)}", fix=REBUILD)
    return {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True} | settings


def _added(token: Any) -> AddedToken:
    """A special token as a file has it: a string, or an object with how it is found in a text."""
    if not isinstance(token, dict):
        return AddedToken(str(token), special=True, normalized=False)
    flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], special=True, **flags)


def _add_special_tokens(tokenizer: Tokenizer, settings: Settings, tokens: dict[str, str]) -> None:
    """Those that the tokenizer does not find in a text yet."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    listed = [settings.get(name) or token for name, token in tokens.items()]
    listed += list(extra.values()) if isinstance(extra, dict) else extra
    new: dict[str, AddedToken] = {}
    for token in listed:
        if _content(token) not in known:
            new.setdefault(_content(token), _added(token))
    if new:
        tokenizer.add_tokens(list(new.values()))


def _require_one_list_of_added_tokens(
    tokenizer: Tokenizer, settings: Settings, contents: Mapping[str, bytes | None], path: Path
) -> None:
    """The added tokens of the other files must be those of tokenizer.json: versions of transformers differ in whom
    they believe.
    """
    held = {i: _flags(token) for i, token in tokenizer.get_added_tokens_decoder().items()}
    said: dict[int, Any] = {}
    where = CONFIG
    if "added_tokens_decoder" in settings:
        for number, token in settings["added_tokens_decoder"].items():
            said[int(number)] = _flags(_with_flags(token))
    elif contents.get(ADDED) is not None:
        where = ADDED
        said = {i: (content,) for content, i in parse_json(contents[ADDED], path / ADDED).items()}
        held = {i: flags[:1] for i, flags in held.items() if i in said}
    else:
        return
    different = sorted(i for i in said.keys() | held.keys() if said.get(i) != held.get(i))
    if different:
        i = different[0]
        raise UnsupportedError(
            f"{path / where}: added token {i} must be {DOCUMENT}'s {shown(held.get(i))}, is {shown(said.get(i))}",
            fix="save the tokenizer anew with save_pretrained",
        )


def _flags(token: AddedToken) -> tuple:
    return token.content, token.special, token.single_word, token.lstrip, token.rstrip, token.normalized


def _with_flags(token: dict) -> AddedToken:
    return AddedToken(**{name: token[name] for name in token if not name.startswith("__")})


def _state(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _as_class(
    tokenizer: Tokenizer, of: _Class, settings: Settings, tokens: dict[str, str], path: Path, *, whole: bool
) -> None:
    """Gives a tokenizer the parts that its class makes, after what tokenizer.json has instead was seen to be the same
    but for what the settings say. whole: whether it is new, without parts.
    """
    settings = {"add_prefix_space": of.model is _UNIGRAM} | settings
    normalizer, pre_tokenizer = of.parts(settings, tokenizer.normalizer)
    if not whole:
        made = of.model | ({"unk_token": tokens["unk_token"]} if of.model is _WORDPIECE else {})
        model = {name: value for name, value in _state(tokenizer.model).items() if name in made}
        _require_same(f"model of {of.name}", model, made, path)
        given, made = _state(tokenizer.normalizer), _state(normalizer)
        if of.model is _UNIGRAM:
            given = _without_space_rules(given)
        _require_same("normalizer", _open(given), _open(made), path)
        if of.model is not _UNIGRAM or _spaces(tokenizer.pre_tokenizer) is None:
            _require_same("pre_tokenizer", _open(_state(tokenizer.pre_tokenizer)), _open(_state(pre_tokenizer)), path)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    before = None if whole else _templates(tokenizer)

    def id_of(token: str) -> int:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"{path}: special token {token} must be in the vocabulary", fix=REBUILD)
        return found

    tokenizer.post_processor = of.post(tokens, id_of)
    if before is not None:
        _require_same("post_processor", before, _templates(tokenizer), path)


def _open(state: Any) -> Any:
    """A normalizer's or pre-tokenizer's state without what the settings decide."""
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
    """The normalizer of a converted sentencepiece model without what it does to spaces, which words are split at."""
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


def _spaces(pre_tokenizer: Any) -> Any:
    """The pre-tokenizer of newer conversions, which splits at spaces alone; None for another."""
    return pre_tokenizer if isinstance(pre_tokenizer, pre_tokenizers.Metaspace) else None


def _template(tokenizer: Tokenizer, parts: int) -> list[tuple[int, int, int | None]]:
    """How the post-processor arranges a text or a pair: the id and type of a special token and None, or 0, the type of
    a part's tokens and its number.
    """
    probes = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b")[:parts]]
    for probe in probes:
        probe.truncate(1)
    made = tokenizer.post_process(*probes)
    numbers = iter(range(parts))  # every post-processor keeps the order of the parts
    whole = zip(made.ids, made.type_ids, made.special_tokens_mask, strict=True)
    found = [(token, kind, None) if special else (0, kind, next(numbers, None)) for token, kind, special in whole]
    if [part for _, _, part in found if part is not None] != list(range(parts)):
        raise UnsupportedError("tokenizer must have one or more tokens for the texts 'a' and 'b'", fix=REBUILD)
    return found


def _templates(tokenizer: Tokenizer) -> dict[int, list]:
    return {parts: _template(tokenizer, parts) for parts in (1, 2)}


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


def _pieces(tokenizer: Tokenizer) -> re.Pattern | None:
    """Where long texts may be cut, None for nowhere: unknown ways of splitting, added tokens that hold spaces."""
    for token in tokenizer.get_added_tokens_decoder().values():
        bare = token.content.strip()
        if _BETWEEN_WORDS_OR_CHINESE.search(token.content) or bare != token.content:
            return None
        if (token.lstrip or token.rstrip) and re.search(r"^[0-9A-Za-z]|[0-9A-Za-z]$", bare):
            return None
    normalizer, splits = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    if (
        splits == {"type": "BertPreTokenizer"}
        and isinstance(normalizer, dict)
        and normalizer["type"] == "BertNormalizer"
    ):
        return _BETWEEN_WORDS_OR_CHINESE if normalizer["handle_chinese_chars"] else _BETWEEN_WORDS
    if (
        normalizer is None
        and isinstance(splits, dict)
        and splits["type"] == "ByteLevel"
        and splits.get("use_regex", True)
    ):
        return _BETWEEN_WORDS
    if isinstance(splits, dict) and splits["type"] == "Sequence":
        return (
            _BETWEEN_WORDS
            if [part["type"] for part in splits["pretokenizers"]] == ["WhitespaceSplit", "Metaspace"]
            else None
        )
    return None
