"""The tokenizer classes of transformers for BERT-like classifiers, as its version 5 builds them. A tokenizer.json that
differs from what its class builds is refused, because versions of transformers treat it differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

Settings = dict[str, Any]

_BERT_TOKENS = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
_ROBERTA_TOKENS = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
    "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class of transformers.

    types: whether its token types reach the model.
    tokens: its special tokens.
    parts: function (settings, normalizer of tokenizer.json) -> (normalizer, pre-tokenizer) of the class.
    post: function (special tokens, function from token to id) -> its post-processor.
    model: the fields that the model in tokenizer.json must have.
    empty: function (contents of the files, special tokens) -> the tokenizer if there is no tokenizer.json, made from
        the vocabulary's files; None if these are not enough.
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
    """The character map in a tokenizer.json's normalizer, the only part of it that the class keeps; None if it has
    none.
    """
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


WORDPIECE = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
_BPE = {"type": "BPE", "dropout": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
UNIGRAM = {"type": "Unigram", "unk_id": 3, "byte_fallback": False}
_BERT = TokenizerClass("BertTokenizer", True, _BERT_TOKENS, _bert_parts, _bert_post, WORDPIECE, _bert_empty)
CLASSES = {
    "BertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "DistilBertTokenizer": TokenizerClass(
        "DistilBertTokenizer", False, _BERT_TOKENS, _bert_parts, _bert_post, WORDPIECE, _bert_empty
    ),
    "RobertaTokenizer": TokenizerClass(
        "RobertaTokenizer", False, _ROBERTA_TOKENS, _roberta_parts, _roberta_post, _BPE, _roberta_empty
    ),
    "XLMRobertaTokenizer": TokenizerClass(
        "XLMRobertaTokenizer", False, _ROBERTA_TOKENS, _xlm_parts, _xlm_post, UNIGRAM, lambda contents, tokens: None
    ),
    "PreTrainedTokenizerFast": None,  # uses tokenizer.json unchanged
    "TokenizersBackend": None,
}
DEFAULT_CLASS = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "electra": "BertTokenizer", "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}  # fmt: skip
