"""Small models for tests: stock architectures with random weights and the packaged encoder's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers

from sparsebert import checkpoint

SIZES = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(checkpoint.resolve("minilm"), local_files_only=True)


def classifier(kind: str = "bert", labels: int = 2, seed: int = 0, **changes):
    """A classifier whose weights are large enough that its layers and attention matter to the logits."""
    names = {
        "bert": "Bert",
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "electra": "Electra",
        "distilbert": "DistilBert",
    }
    sizes = {**SIZES, **changes}
    if kind == "electra":
        sizes.setdefault("embedding_size", sizes["hidden_size"])
    if kind == "distilbert":
        sizes = {
            "vocab_size": sizes["vocab_size"], "dim": sizes["hidden_size"], "n_layers": sizes["num_hidden_layers"],
            "n_heads": sizes["num_attention_heads"], "hidden_dim": sizes["intermediate_size"],
        }  # fmt: skip
    config = getattr(transformers, f"{names[kind]}Config")(num_labels=labels, pad_token_id=0, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{names[kind]}ForSequenceClassification")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "LayerNorm" not in name and "layer_norm" not in name:
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model.eval()


def stock(directory: Path) -> Path:
    """The directory as transformers would have written it: without its seal."""
    shutil.rmtree(directory / "sparsebert")
    config = json.loads((directory / "config.json").read_text())
    del config["sparsebert"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def saved(directory: Path, model=None, **changes) -> Path:
    """A model directory as the package writes it."""
    checkpoint.save(
        model or classifier(**changes), tokenizer(), directory, recipe={"command": "test"}, key="test", figures={}
    )
    return directory
