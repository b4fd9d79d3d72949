"""The models of bench.gpu_report: directories of random weights, our engine on them, and dense BERT in plain torch."""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from bench import harness
from bench.gpu_place import Place
from bench.harness import Row
from sparsebert import checkpoint
from sparsebert.cli.timing import LABELS
from sparsebert.config import PruneConfig
from sparsebert.engine import Engine
from sparsebert.engine.formats import DTYPES

# Few positions, as each golden text is interpreted in a rehearsal.
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 24, "initializer_range": 0.2,
}  # fmt: skip
BERT_BASE = {"initializer_range": 0.04}  # larger than the default, so that attention matters to the logits
BERT_LARGE = BERT_BASE | {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
}  # fmt: skip
Ids = list[list[int]]


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = 30522  # of BERT
WORDS = [f"word{i}" for i in range(VOCABULARY - len(SPECIALS) - 2 * len(LETTERS))]


@functools.cache
def tokenizer():
    """BERT's tokenizer, with a vocabulary of invented words, and of letters for all others."""
    pieces = [*SPECIALS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def classifier(sizes: dict, seed: int) -> torch.nn.Module:
    """A stock BERT classifier of random weights, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(**sizes, num_labels=LABELS)
        return transformers.BertForSequenceClassification(config).eval()


def directory_of(place: Place, name: str, sizes: dict, pattern: str, sparsity: float) -> Path:
    """A model directory of random weights, pruned by magnitude; the sections share it."""
    from sparsebert.pruning import prune

    directory = place.folder / f"{name}-{pattern}-{sparsity:g}".replace(":", "-")
    if not directory.exists():
        model = classifier(sizes, place.seed_of(name))
        implied = {} if ":" in pattern else {"sparsity": sparsity}
        prune(model, None, PruneConfig(method="magnitude", pattern=pattern, **implied))
        checkpoint.save(model, tokenizer(), directory, recipe={"command": "bench"}, figures={})
    return directory


@functools.lru_cache(maxsize=1)
def engine_of(place: Place, directory: Path, dtype: str, **settings) -> Engine:
    """Our engine on the place's device; the last one is kept for the next case."""
    if place.rehearsal:
        pretend_gpu()
    return Engine.load(directory, dtype=dtype, device="cuda", cached=False, **settings)


@functools.cache
def pretend_gpu() -> None:
    """Lets the engine take this processor for a GPU, as Triton's interpreter does."""
    from sparsebert import machine
    from sparsebert.engine import cuda

    machine.require_start = lambda: None
    for module in (machine, cuda):
        module.require_device = lambda: torch.device("cpu")


def token_ids(rng: np.random.Generator, lengths: Sequence[int], vocabulary: int) -> Ids:
    """Random token ids of these lengths, without those of the padding."""
    return [rng.integers(1000, vocabulary, length).tolist() for length in lengths]


@functools.lru_cache(maxsize=2)
def reference(directory: Path) -> torch.nn.Module:
    """The stock model of a directory, in float32."""
    model, _ = checkpoint.load(directory)
    return model.eval()


def expected_logits(directory: Path, ids: Ids) -> np.ndarray:
    """torch's logits in float32 on the CPU, one text at a time."""
    with torch.inference_mode():
        rows = [reference(directory)(torch.tensor([row])).logits for row in ids]
    return torch.cat(rows).numpy()


def checked_logits(logits: np.ndarray, want: np.ndarray, dtype: str) -> Row:
    """The row of a check of logits. Raises harness.WrongOutput if they are further from torch's than an engine's dtype
    allows.
    """
    allowed = checkpoint.GOLDEN_TOLERANCE + DTYPES[dtype].tolerance * float(np.abs(want).max())
    return {"error": harness.check("logits", {"they": lambda: logits}, want, allowed), "tolerance": allowed}


class DenseBert:
    """BERT as a function of torch's operators alone, in bf16, with scaled_dot_product_attention: what the engine must
    not be slower than. All texts have one length.
    """

    def __init__(self, directory: Path, device: torch.device):
        model = reference(directory)
        self.heads, self.eps = model.config.num_attention_heads, model.config.layer_norm_eps
        state = {name: tensor.to(device, torch.bfloat16) for name, tensor in model.state_dict().items()}
        embeddings = "bert.embeddings."
        self.words = state[f"{embeddings}word_embeddings.weight"]
        types = state[f"{embeddings}token_type_embeddings.weight"]
        self.positions = state[f"{embeddings}position_embeddings.weight"] + types[0]
        self.norm = state[f"{embeddings}LayerNorm.weight"], state[f"{embeddings}LayerNorm.bias"]
        self.layers = []
        for i in range(model.config.num_hidden_layers):
            layer = f"bert.encoder.layer.{i}."

            def part(name: str, layer=layer) -> tuple[torch.Tensor, torch.Tensor]:
                return state[f"{layer}{name}.weight"], state[f"{layer}{name}.bias"]

            qkv = zip(*(part(f"attention.self.{name}") for name in ("query", "key", "value")), strict=True)
            self.layers.append((
                tuple(map(torch.cat, qkv)), part("attention.output.dense"), part("attention.output.LayerNorm"),
                part("intermediate.dense"), part("output.dense"), part("output.LayerNorm"),
            ))  # fmt: skip
        self.pooler = state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"]
        self.classifier = state["classifier.weight"], state["classifier.bias"]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [texts, labels]. ids: int64 [texts, tokens]."""
        texts, tokens = ids.shape
        x = self._normed(self.words[ids] + self.positions[:tokens], self.norm)
        for qkv, out, norm, up, down, last in self.layers:
            q, k, v = F.linear(x, *qkv).view(texts, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = self._normed(x + F.linear(attended, *out), norm)
            x = self._normed(x + F.linear(F.gelu(F.linear(x, *up)), *down), last)
        return F.linear(torch.tanh(F.linear(x[:, 0], *self.pooler)), *self.classifier).float()

    def _normed(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, self.eps)
