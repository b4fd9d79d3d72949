"""Distillation with the zeros fixed: what closed forms leave undone."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from sparsebert import data
from sparsebert.encoders import Progress, autocast, bucketed, collate, encoder_linears, no_progress, tokenize
from sparsebert.pruning.calibration import Batches, Calibration

STEPS, BATCH, LR, WARMUP = 300, 64, 5e-4, 20
CHECK_EVERY = 50  # steps, on the held-out texts
SWAPPED = 0.2  # share of the words that have neighbours


def distill(
    model, teacher, calibration: Calibration, *, perturb: bool, seed: int, progress: Progress = no_progress
) -> None:
    """Up to 300 Adam steps on unlabelled calibration texts towards the teacher's function; zeros stay zeros.

    Loss: KL(teacher ‖ model) + the mean over layers of the mean squared difference of hidden states, in units of the
    teacher's variance there (last layer: of the first token alone). With `perturb`, in half of each batch a fifth of
    the words are swapped for neighbours, and the teacher sees the same text. Embeddings stay as they are; dropout is
    off. The weights kept are those of lowest KL on the held-out texts, of the start and every 50th step.
    """
    masks = {name: module.weight != 0 for name, module in encoder_linears(model).items()}
    embeddings = {id(p) for p in model.base_model.embeddings.parameters()}
    trained = {name: p for name, p in model.named_parameters() if id(p) not in embeddings}
    optimizer = torch.optim.Adam(trained.values(), lr=LR, fused=True)
    reference = logits_of(teacher, calibration.held_out_batches)
    best, kept = kl(reference, logits_of(model, calibration.held_out_batches)), _copy(trained)
    rng = np.random.default_rng(seed)
    for step, batch in enumerate(_texts(calibration, perturb, rng)):
        with torch.no_grad(), autocast():
            wanted = teacher(**batch, output_hidden_states=True)
        with torch.enable_grad():
            with autocast():
                got = model(**batch, output_hidden_states=True)
            _loss(wanted, got, batch["attention_mask"].bool()).backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in masks.items():
                trained[f"{name}.weight"].mul_(mask)
        if (step + 1) % CHECK_EVERY == 0:
            reached = kl(reference, logits_of(model, calibration.held_out_batches))
            if reached < best:
                best, kept = reached, _copy(trained)
        progress(step + 1, STEPS)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(kept[name])


def _loss(wanted, got, real: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.kl_div(
        got.logits.float().log_softmax(-1),
        wanted.logits.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    layers = list(zip(wanted.hidden_states[1:], got.hidden_states[1:], strict=True))
    for depth, (target, hidden) in enumerate(layers, start=1):
        if depth == len(layers):
            target, hidden = target[:, 0], hidden[:, 0]
        else:
            target, hidden = target[real], hidden[real]
        target = target.float()
        loss = loss + nn.functional.mse_loss(hidden.float(), target) / target.var() / len(layers)
    return loss


def _texts(calibration: Calibration, perturb: bool, rng: np.random.Generator):
    """STEPS batches of BATCH texts of similar length, in epochs."""
    examples, done = calibration.texts, 0
    while done < STEPS:
        if perturb:
            swap = rng.random(len(examples)) < 0.5
            encoded = tokenize(calibration.tokenizer, _swapped(examples, swap, rng), calibration.max_length)
        else:
            encoded = tokenize(calibration.tokenizer, examples, calibration.max_length)
        for rows in bucketed(encoded, BATCH, rng)[: STEPS - done]:
            done += 1
            yield collate(calibration.tokenizer, encoded, rows)


def _swapped(examples: data.Examples, which: np.ndarray, rng: np.random.Generator) -> data.Examples:
    def column(texts):
        return [swap_words(text, rng) if swap else text for text, swap in zip(texts, which, strict=True)]

    return replace(
        examples, texts=column(examples.texts), texts_b=None if examples.texts_b is None else column(examples.texts_b)
    )


def swap_words(text: str, rng: np.random.Generator, share: float = SWAPPED) -> str:
    """The text with about `share` of its words that have neighbours replaced by one of them at random."""
    near = data.word_neighbors()

    def swap(match: re.Match) -> str:
        options = near.get(match[0].lower())
        return match[0] if options is None or rng.random() >= share else options[rng.integers(len(options))]

    return re.sub(r"[A-Za-z]+", swap, text)


@torch.inference_mode()
def logits_of(model, batches: Batches) -> torch.Tensor:
    """float32 [texts, labels], in the order of the batches."""
    return torch.cat([model(**batch).logits.float() for batch in batches])


def kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over texts of KL(softmax(reference) ‖ softmax(logits)), nats."""
    return nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()


def _copy(trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.items()}
