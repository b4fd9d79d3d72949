"""Maps the names of tensors in files to their names in stock `transformers` classifiers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sparsebert.architectures import ARCHITECTURES, Architecture, Facts
from sparsebert.checkpoint.files import REBUILD
from sparsebert.errors import CheckpointError, UnsupportedError

_WORDS = "embeddings.word_embeddings.weight"
_OLD_NORMS = re.compile(r"((?:LayerNorm|layer_norm))\.(gamma|beta)$")  # BERT checkpoints of 2018 to 2020
_BUFFERS = {"position_ids", "token_type_ids"}  # written by old versions; they hold 0, 1, 2, …
# Parts of names that show unfinished work of a tool, or a model that no stock classifier matches, and the fix.
_UNFINISHED = (
    (
        re.compile(r"lora_|base_layer|adapter|modules_to_save"),
        "merge the adapter first: model.merge_and_unload().save_pretrained(DIR)",
    ),
    (re.compile(r"parametrizations"), "call torch.nn.utils.parametrize.remove_parametrizations, then save the model"),
    (re.compile(r"distance_embedding"), "use a model of absolute positions"),
    (re.compile(r"crossattention"), "train it as an encoder, without cross attention"),
)


def canonical(raw: Iterable[str], architecture: Architecture, path: Path) -> dict[str, str]:
    """Stock name -> name in the file, of every tensor. Accepts names from compiled and wrapped modules, gamma and beta
    of old norms, and a prefix too many or too few before the encoder's name.
    """
    cleaned = {name: _without_wrappers(name) for name in raw}
    root, base_missing = _root(cleaned.values(), architecture, path)
    inside = ("embeddings.", "embeddings_project.", "pooler.", architecture.layers.partition(".")[0] + ".")
    found: dict[str, str] = {}
    for name, stock in cleaned.items():
        stock = stock.removeprefix(root)
        if base_missing and stock.startswith(inside):
            stock = f"{architecture.base}.{stock}"
        if stock in found:
            raise CheckpointError(
                f"{path}: tensors {found[stock]} and {name} are both {stock}", fix="save the model with one of them"
            )
        found[stock] = name
    return found


def _without_wrappers(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[0] == "module" and len(parts) > 1:
        parts.pop(0)
    return _OLD_NORMS.sub(lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", ".".join(parts))


def _root(names: Iterable[str], architecture: Architecture, path: Path) -> tuple[str, bool]:
    """(prefix before the classifier's names, whether the encoder's own name is missing in them)."""
    before = sorted({name[: -len(_WORDS)] for name in names if name == _WORDS or name.endswith("." + _WORDS)})
    stock = f"{architecture.base}."
    if not before or stock in before:
        return "", False
    if len(before) > 1:
        raise CheckpointError(
            f"{path} must hold one encoder, has word embeddings of {', '.join(before)}", fix="save the classifier alone"
        )
    (prefix,) = before
    if prefix.endswith("." + stock):
        return prefix.removesuffix(stock), False
    last = prefix.removesuffix(".").rpartition(".")[2]
    others = sorted(a.kind for a in ARCHITECTURES.values() if a.base == last)
    if others:
        raise CheckpointError(
            f"{path} has the tensors of model_type {' or '.join(others)}, config.json says {architecture.kind}",
            fix="correct model_type, or restore config.json from its source",
        )
    return prefix, True


def require_places(names: Iterable[str], facts: Facts, path: Path) -> None:
    """Raises an error, naming the cause, if the encoder has another number of layers than config.json says, or a tensor
    that does not belong to that model. Tensors outside the encoder are allowed: heads of pretraining, which no
    classifier reads.
    """
    architecture = facts.architecture
    base, layers = f"{architecture.base}.", f"{architecture.base}.{architecture.layers}."
    field = architecture.fields["layers"][0]
    names = list(names)
    inside = [name for name in names if name.startswith(base) or ".modules_to_save." in name]
    numbers = {
        int(n) for name in inside if name.startswith(layers) and (n := name[len(layers) :].split(".")[0]).isdigit()
    }
    held = max(numbers, default=-1) + 1
    if held != facts.layers:
        raise CheckpointError(
            f"{path} holds {held} layers, config.json says {field} {facts.layers}",
            fix=f"correct {field}, or save the model with its own config.json" if held else REBUILD,
        )
    places = {name for name, _ in facts.encoder_tensors()}
    for name in inside:
        if name in places or name.rpartition(".")[2] in _BUFFERS or name.startswith(f"{base}pooler."):
            continue
        if name.endswith((".weight_orig", ".weight_mask")) and name.rpartition(".")[0] + ".weight" in places:
            continue  # torch.nn.utils.prune before its `remove`: their product is the weight
        for pattern, cure in _UNFINISHED:
            if pattern.search(name):
                raise UnsupportedError(f"{path} has tensor {name}, which no stock classifier has", fix=cure)
        raise CheckpointError(f"{path} has tensor {name}, for which config.json has no place", fix=REBUILD)
