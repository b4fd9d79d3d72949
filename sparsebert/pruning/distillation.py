"""Distillation towards the dense model with the zeros fixed. It follows the closed forms."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsebert import data
from sparsebert.encoders import (
    Progress,
    autocast,
    bucketed,
    collate,
    encoder_linears,
    forwards_replaced,
    frozen,
    moved,
    no_progress,
    tokenize,
)
from sparsebert.heads import problem_of
from sparsebert.machine import bf16_is_fast
from sparsebert.ops.sparse_matmul import Linear, PackedRows, pack, sparse_matmul
from sparsebert.pruning.calibration import TOKENS_PER_BATCH, Batches, Calibration

STEPS, BATCH, LR, WARMUP = 300, 128, 3e-4, 20
AVERAGED = 50  # steps in the running mean of the weights
CHECK_EVERY = 50  # steps between two checks on the held-out texts
SPARSE_BELOW = 0.3  # density of a linear below which its products are quicker without the zeros
CHANGED = 0.5  # share of the texts with swapped words; also the share of those joined to another text
SWAPPED = 0.2  # share of the words with neighbours that are swapped


def distill(
    model, teacher, calibration: Calibration, *, perturb: bool, seed: int, progress: Progress = no_progress
) -> None:
    """Trains the model by 300 Adam steps on the unlabelled calibration texts to give the teacher's outputs; zeros stay
    zeros.

    Loss: the mean divergence from the teacher (heads.Problem; for one label per text KL(teacher ‖ model)). With
    `perturb`, a fifth of the words in half of the texts are swapped for neighbours, and half of the texts are joined to
    another one; the teacher sees the same text. The embeddings are not trained; dropout is off. Every 50 steps a
    running mean of the weights over about 50 steps is checked. The weights nearest to the teacher on the held-out texts
    are kept: one of these means, or the weights at the start.
    """
    linears = encoder_linears(model)
    masks = {module: module.weight != 0 for module in linears.values()}
    # With what projects them to the hidden size, if ELECTRA has it.
    embeddings = nn.ModuleList(m for name, m in model.base_model.named_children() if name.startswith("embeddings"))
    resting = {id(p) for p in embeddings.parameters()}
    trained = [p for p in model.parameters() if id(p) not in resting]
    optimizer = torch.optim.Adam(trained, lr=LR, fused=True)
    mean = AveragedModel(model, avg_fn=lambda mean, p, steps: mean + (p - mean) * max(1 / (steps + 1), 1 / AVERAGED))
    reference = logits_of(teacher, calibration.held_out_batches)
    problem = problem_of(model.config.to_dict())
    spread = problem.spread(reference.cpu())

    def distance(logits: torch.Tensor) -> float:
        return problem.divergence(reference, logits, spread).mean().item()

    best, kept = distance(logits_of(model, calibration.held_out_batches)), copy.deepcopy(model.state_dict())
    rng = np.random.default_rng(seed)
    # Sparse products were not compared with bf16 products, so they are not used if those are fast, as on every GPU.
    fast = [] if bf16_is_fast(model.device) else [m for m in linears.values() if masks[m].float().mean() < SPARSE_BELOW]
    with frozen(embeddings), _by_sparse_products({m: masks[m] for m in fast}) as take_weights:
        for step, batch in enumerate(_texts(calibration, perturb, rng)):
            take_weights()
            for part, share in _parts(moved(batch, model.device)):
                with torch.no_grad(), autocast(device=model.device):
                    wanted = teacher(**part).logits.float()
                with torch.enable_grad():
                    with autocast(device=model.device):
                        got = model(**part).logits.float()
                    (share * problem.divergence(wanted, got, spread).mean()).backward()
            for group in optimizer.param_groups:
                group["lr"] = LR * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for module, mask in masks.items():
                    module.weight.mul_(mask)
            mean.update_parameters(model)
            if (step + 1) % CHECK_EVERY == 0:
                reached = distance(logits_of(mean.module, calibration.held_out_batches))
                if reached < best:
                    best, kept = reached, copy.deepcopy(mean.module.state_dict())
            progress(step + 1, STEPS)
    model.load_state_dict(kept)


class _SparseProduct(torch.autograd.Function):
    """x Wᵀ + b, and the gradient for x, by the kernel for sparse weights. The gradient for W is a dense product; only
    its part inside the mask is used.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, packed, transposed):
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat)
        ctx.transposed, ctx.shape = transposed, x.shape
        y = sparse_matmul(flat.contiguous().numpy(), Linear(packed, None if bias is None else bias.numpy()))
        return torch.from_numpy(y).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = torch.from_numpy(sparse_matmul(flat.numpy(), Linear(ctx.transposed))).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_x, flat.T @ x, for_bias, None, None


@contextmanager
def _by_sparse_products(masks: dict[nn.Linear, torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Inside this context these linears multiply only the weights that their masks keep. Yields the function to call
    after every change of their weights.
    """
    packed: dict[nn.Linear, tuple[PackedRows, PackedRows]] = {}
    sources: dict[nn.Linear, list[torch.Tensor]] = {}  # for each packed value the number of its weight, from 1; 0: none
    for module, mask in masks.items():
        if mask.numel() > 1 << 24:
            raise ValueError("a linear with sparse products must have at most 2^24 weights, which float32 can number")
        numbers = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
        packed[module] = tuple(pack(part.float().numpy()) for part in (numbers, numbers.T))
        sources[module] = [torch.from_numpy(part.values.astype(np.int64)) for part in packed[module]]

    def take_weights() -> None:
        for module, both in sources.items():
            weights = torch.cat([torch.zeros(1), module.weight.detach().flatten()])
            packed[module] = tuple(
                replace(old, values=weights[source].numpy()) for old, source in zip(packed[module], both, strict=True)
            )

    def forward_of(module):
        return lambda x: _SparseProduct.apply(x, module.weight, module.bias, *packed[module])

    with forwards_replaced(masks, forward_of):
        yield take_weights


def _texts(calibration: Calibration, perturb: bool, rng: np.random.Generator):
    """Yields STEPS batches of BATCH texts of similar length, epoch by epoch."""
    examples, done = calibration.texts, 0
    while done < STEPS:
        if perturb:
            encoded = tokenize(calibration.tokenizer, _changed(examples, rng), calibration.max_length)
        else:
            encoded = tokenize(calibration.tokenizer, examples, calibration.max_length)
        for rows in bucketed(encoded, BATCH, rng)[: STEPS - done]:
            done += 1
            yield collate(calibration.tokenizer, encoded, rows)


def _parts(batch: dict[str, torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """Yields (part, its share of the batch's texts). A part has about TOKENS_PER_BATCH tokens, so that long texts need
    no more memory than in calibration.
    """
    texts, length = batch["input_ids"].shape
    size = max(1, TOKENS_PER_BATCH // length)
    for start in range(0, texts, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        yield part, len(part["input_ids"]) / texts


def _changed(examples: data.Examples, rng: np.random.Generator) -> data.Examples:
    """The examples: some are joined to another one, some get swapped words."""
    joined, swapped = rng.random((2, len(examples))) < CHANGED
    others = rng.permutation(len(examples))

    def column(texts: list[str]) -> list[str]:
        pairs = zip(texts, others, joined, strict=True)
        texts = [f"{text} {texts[other]}" if join else text for text, other, join in pairs]
        return [swap_words(text, rng) if swap else text for text, swap in zip(texts, swapped, strict=True)]

    return replace(
        examples, texts=column(examples.texts), texts_b=None if examples.texts_b is None else column(examples.texts_b)
    )


def swap_words(text: str, rng: np.random.Generator, share: float = SWAPPED) -> str:
    """The text, in which about `share` of the words with neighbours are replaced by a random neighbour."""
    near = data.word_neighbors()

    def swap(match: re.Match) -> str:
        options = near.get(match[0].lower())
        return match[0] if options is None or rng.random() >= share else options[rng.integers(len(options))]

    return re.sub(r"[A-Za-z]+", swap, text)


@torch.inference_mode()
def logits_of(model, batches: Batches) -> torch.Tensor:
    """float32 [texts, labels], in the order of the batches."""
    return torch.cat([model(**moved(batch, model.device)).logits.float() for batch in batches])
