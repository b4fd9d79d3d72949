"""Pruning in bench.gpu_report: against the CPU at a small size, then timed on BERT-base and BERT-large."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from unittest import mock

import numpy as np
import torch

from bench import harness
from bench.gpu_models import BERT_BASE, BERT_LARGE, TINY, WORDS, classifier, tokenizer
from bench.gpu_place import SPARSITY, Case, Goal, Place, against, near
from bench.harness import Row
from sparsebert import data, encoders
from sparsebert.config import PruneConfig
from sparsebert.encoders import encoder_linears
from sparsebert.errors import UnsupportedError
from sparsebert.pruning import draw, prune

PRUNED_ALIKE = 1e-3  # float32 sums in another order, through the layers before
# Methods that decide by formulas; those of ADMM amplify the last digits of sums, so that they keep other weights.
EXACT = ({"method": "sparsegpt"}, {"method": "obs"}, {"method": "knowledge", "tier": 0, "without": "admm"})
AS_GOOD = 2.0  # times the divergence that the CPU's weights give


def pruning(place: Place) -> Iterator[Case]:
    """Random weights and texts: first against the CPU at a small size, then tier 1 is timed."""
    for settings in EXACT:
        title = ", ".join(f"{name} {value}" for name, value in settings.items())
        yield Case(f"weights as on the CPU: {title}", partial(_as_on_the_cpu, place, settings))
    yield Case("logits as near as the CPU's: tier 1", partial(_as_near_as_the_cpus, place))
    for name, sizes, bound in (("BERT-base", BERT_BASE, 30), ("BERT-large", BERT_LARGE, 90)):
        tokens = 1500 if place.small else 150_000
        run = partial(_pruning, place, TINY if place.small else sizes, tokens, (Goal("seconds", "≤", bound),))
        yield Case(f"tier 1, {name}, {tokens} tokens", run)


def _settings(place: Place, tokens: int, device: str | None = None, **settings) -> PruneConfig:
    if "device" not in PruneConfig.model_fields:
        raise UnsupportedError("this version prunes on the CPU only", fix="take one whose PruneConfig has a device")
    device = device or ("cpu" if place.rehearsal else "cuda")
    return PruneConfig(sparsity=SPARSITY, calibration_tokens=tokens, device=device, **settings)


def _on_both(place: Place, problem: str, **settings) -> tuple[list[torch.nn.Module], list[dict]]:
    """A small model, then the same pruned on the CPU and on the device, and the calibration batches. Products are
    float32 on both.
    """
    models, tokens = [classifier(TINY, place.seed_of(problem)) for _ in range(3)], 1500
    texts = _texts(place, models[0], tokens)
    with mock.patch.object(encoders, "bf16_is_fast", lambda *given: False):
        for model, device in zip(models[1:], ("cpu", None), strict=True):
            prune(model, texts, _settings(place, tokens, device, **settings))
    return models, texts.batches


def _as_on_the_cpu(place: Place, settings: dict) -> Row:
    """The pruned weights. In about one problem of thirty a near-tie falls differently, so a second one decides."""
    try:
        return _same_weights(place, "first", settings)
    except harness.WrongOutput:
        return _same_weights(place, "second", settings)


def _same_weights(place: Place, problem: str, settings: dict) -> Row:
    (_, *models), _ = _on_both(place, problem, **settings)
    want, got = ({name: one.weight for name, one in encoder_linears(model).items()} for model in models)
    return near(got, want, PRUNED_ALIKE)


def _as_near_as_the_cpus(place: Place) -> Row:
    models, batches = _on_both(place, "tier 1", tier=1)
    with torch.inference_mode():
        dense, *found = (torch.cat([model(**batch).logits for batch in batches]) for model in models)
    cpus, mine = (float((logits - dense).square().sum()) for logits in found)
    if not mine <= AS_GOOD * cpus:
        raise harness.WrongOutput(f"the logits are off by {mine / cpus:.2f} times as much as with the CPU's weights")
    return {"error": max(0.0, mine / cpus - 1), "tolerance": AS_GOOD - 1}


def _texts(place: Place, model: torch.nn.Module, tokens: int):
    """Calibration texts of random words, of about 128 tokens, or of 32 if the model's positions are few."""
    length = min(128, model.config.max_position_embeddings - 8) - 2
    rng = np.random.default_rng(place.seed_of("texts"))
    number = -(-tokens * 5 // 4 // length) + 40  # some are held out
    texts = [" ".join(rng.choice(WORDS, length)) for _ in range(number)]
    examples = data.Examples("random", "train", texts, None, None)
    return draw(model, tokenizer(), examples, tokens, None, seed=0)


def _pruning(place: Place, sizes: dict, tokens: int, goals: tuple[Goal, ...]) -> Row:
    settings, model = _settings(place, tokens, tier=1), classifier(sizes, place.seed_of("pruned"))
    texts = _texts(place, model, tokens)
    start = time.perf_counter()
    result = prune(model, texts, settings)
    seconds = time.perf_counter() - start
    if abs(result.sparsity - SPARSITY) > 1e-3:
        raise harness.WrongOutput(f"a share of {result.sparsity:.4f} is zero, {SPARSITY} was asked for")
    if any(not weight.isfinite().all() for weight in model.parameters()):
        raise harness.WrongOutput("a weight is not finite")
    row = {"ms": 1e3 * seconds, "seconds": seconds, "why": f"{result.tokens} tokens"}
    return row | against(place, row, goals)
