"""Small models for tests: stock architectures with random weights, and a tokenizer of each kind."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sparsebert import checkpoint, data

SIZES = {
    "vocab_size": 12000,  # the first of BERT's 30,522: with all of them a step of training takes twice as long
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@functools.cache
def tokenizer(kind: str = "bert"):
    """A tokenizer of the architecture's kind: word pieces, byte-level BPE, or a unigram model of sentencepiece."""
    words = sorted(data.word_neighbors())[::7]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "roberta":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(words, trainer)
        model = json.loads(made.to_str())["model"]
        return transformers.RobertaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    if kind == "xlm-roberta":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=1500, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator(words, trainer)
        return transformers.XLMRobertaTokenizer(vocab=list(map(tuple, json.loads(made.to_str())["model"]["vocab"])))
    whole = transformers.AutoTokenizer.from_pretrained(checkpoint.resolve("minilm"), local_files_only=True)
    # Special tokens, letters and their continuations come first, then words by frequency.
    vocabulary = {token: i for token, i in whole.get_vocab().items() if i < SIZES["vocab_size"]}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=whole.model_max_length)


def classifier(kind: str = "bert", labels: int | Sequence[str] = 2, seed: int = 0, **changes):
    """A classifier whose weights are large enough that its layers and attention matter to the logits. labels: their
    names or their number; two get the names of sentiment, three those of NLI, any other number none.
    """
    named = {2: data.SENTIMENT, 3: data.NLI}.get(labels) if isinstance(labels, int) else labels
    model = _built(kind, labels if isinstance(labels, int) else len(labels), seed, **changes)
    model = copy.deepcopy(model)  # takes a fifth of the time of building it again
    if named is not None:
        model.config.id2label = dict(enumerate(named))
        model.config.label2id = {name: i for i, name in enumerate(named)}
    return model


@functools.lru_cache(maxsize=32)  # 4 MB each, most of it word embeddings
def _built(kind: str, labels: int, seed: int, **changes):
    names = {
        "bert": "Bert",
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "electra": "Electra",
        "distilbert": "DistilBert",
    }
    sizes = {**SIZES, **changes}
    if kind in {"roberta", "xlm-roberta"}:  # their positions begin after the padding token's id, which is not 0
        sizes = {**SIZES, "vocab_size": len(tokenizer(kind)), "max_position_embeddings": 514, **changes}
    if kind == "electra":
        sizes.setdefault("embedding_size", sizes["hidden_size"])
    if kind == "distilbert":
        sizes = {
            "vocab_size": sizes["vocab_size"], "dim": sizes["hidden_size"], "n_layers": sizes["num_hidden_layers"],
            "n_heads": sizes["num_attention_heads"], "hidden_dim": sizes["intermediate_size"],
        }  # fmt: skip
    config = getattr(transformers, f"{names[kind]}Config")(num_labels=labels, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{names[kind]}ForSequenceClassification")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "LayerNorm" not in name and "layer_norm" not in name:
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model.eval()


def stock(directory: Path) -> Path:
    """Removes the seal of a directory, so that it is as transformers would have written it."""
    shutil.rmtree(directory / "sparsebert")
    config = json.loads((directory / "config.json").read_text())
    del config["sparsebert"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def flipped():
    """`classifier` with its outputs in the opposite order, under the same names."""
    model = classifier()
    with torch.no_grad():
        for part in (model.classifier.weight, model.classifier.bias):
            part.copy_(part.flip(0))
    return model


def saved(directory: Path, model=None, **changes) -> Path:
    """Writes a model directory as the package does."""
    model = model or classifier(**changes)
    checkpoint.save(model, tokenizer(model.config.model_type), directory, recipe={"command": "test"}, figures={})
    return directory
