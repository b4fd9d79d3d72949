"""The linear layers, token counts and sparsities that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsebert.cli.timing import random_model
from sparsebert.config import BenchConfig


@dataclass(frozen=True)
class Linear:
    """One linear layer of an encoder: W [n_out, n_in], followed by GELU or not."""

    model: str
    name: str
    n_in: int
    n_out: int
    gelu: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.name} {self.n_in}→{self.n_out}"


LINEARS = (
    Linear("MiniLM", "out", 384, 384),
    Linear("MiniLM", "qkv", 384, 1152),
    Linear("MiniLM", "ffn1+gelu", 384, 1536, gelu=True),
    Linear("MiniLM", "ffn2", 1536, 384),
    Linear("BERT", "out", 768, 768),
    Linear("BERT", "ffn1+gelu", 768, 3072, gelu=True),
    Linear("BERT", "ffn2", 3072, 768),
)
# A short sentence, an average one, a full one, and a ragged batch of 32 (27.2 tokens on average).
TOKENS = (8, 27, 128, 870)
SPARSITIES = (0.75, 0.875, 0.90, 0.95)


def random_weight(n_out: int, n_in: int, sparsity: float, seed: int = 0) -> np.ndarray:
    """Float32 [n_out, n_in] with exactly floor(sparsity * size) zeros in random places, scaled to keep x's variance."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(n_out * n_in, np.float32)
    weight[weight == 0] = 1.0  # zeros are counted, so none may come by chance
    weight /= np.sqrt(max(1.0, n_in * (1 - sparsity)), dtype=np.float32)
    weight[rng.permutation(weight.size)[: int(sparsity * weight.size)]] = 0.0
    return weight.reshape(n_out, n_in)


def random_mask(n_out: int, n_in: int, sparsity: float, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Mask of random kept weights, bool [n_out, n_in]. Every `rows` consecutive rows share their columns."""
    kept = np.ones(n_out // rows * n_in, bool)
    kept[rng.permutation(kept.size)[: int(sparsity * kept.size)]] = False
    return kept.reshape(-1, n_in).repeat(rows, 0)


def random_input(tokens: int, n_in: int, seed: int = 1) -> np.ndarray:
    """Float32 [tokens, n_in], normal with variance 1, as a layer norm leaves it."""
    return np.random.default_rng(seed).standard_normal((tokens, n_in), np.float32)


def layer_problem(rows: int, n_in: int, gelu: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(W* [rows, n_in], H [n_in, n_in]), float64, similar to the problems of the layer-wise solvers in an encoder.

    H: centred second moments of 4 n_in tokens of correlated inputs, damped by 1 % of the mean diagonal. The inputs are
    random mixtures of variables whose deviations fall as a power law; with `gelu`, the GELU of such inputs. W*: normal
    weights, rows of different sizes, plus a little noise.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, n_in + 1) ** -0.5
    x = (rng.standard_normal((4 * n_in, n_in), np.float32) * spectrum) @ rng.standard_normal((n_in, n_in), np.float32)
    x = x / x.std() * rng.lognormal(0, 0.4, n_in) + rng.normal(0, 0.5, n_in)
    if gelu:
        x = x - 0.5
        x = x * 0.5 * (1 + np.tanh(0.79788456 * (x + 0.044715 * x**3)))
    x = (x - x.mean(0)).astype(np.float64)
    h = x.T @ x / len(x)
    h[np.diag_indices(n_in)] += 0.01 * h.diagonal().mean()
    weight = rng.standard_normal((rows, n_in)) * rng.lognormal(0, 0.3, (rows, 1)) / np.sqrt(n_in)
    return weight + 0.1 * rng.standard_normal((rows, n_in)) / np.sqrt(n_in), h


def low_rank_metric(rows: int) -> torch.Tensor:
    """A row metric in which few directions of the outputs matter: float64 [rows, rows], of rank 5 plus a floor of a
    tenth of the mean diagonal.
    """
    directions = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = directions @ directions.T
    return metric / metric.diagonal().mean() + 0.1 * torch.eye(rows, dtype=torch.float64)


def random_moments(n_in: int, seed: int = 0) -> torch.Tensor:
    """Second moments H of correlated inputs, like those of an encoder's layers: float64 [n_in, n_in], eigenvalues j^-1
    in random directions, damped by 1 % of their mean.
    """
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(n_in, n_in, generator=generator, dtype=torch.float64))
    h = (directions / torch.arange(1, n_in + 1)) @ directions.T
    h += 0.01 * h.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    return torch.triu(h) + torch.triu(h, 1).T


def random_directory(model: str, pattern: str, sparsity: float, folder: Path, dtype: str = "auto") -> Path:
    """A model directory with random weights, with the scales of int8 if that is the dtype. `sparsity` is only used by
    patterns that imply none.
    """
    implied = {} if ":" in pattern else {"sparsity": sparsity}
    return random_model(BenchConfig(random=model, pattern=pattern, dtype=dtype, **implied), folder)
