"""topk_mask on a GPU, by torch's sort of short vectors and its radix selection of long ones."""

from __future__ import annotations

import torch

SHORT = 4096  # max length that torch sorts in one thread block, many vectors at once


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`sparsebert.ops.topk_mask.topk_mask` of scores without NaN, float32 [..., n]; the host does not wait."""
    n = scores.shape[-1]
    if k in (0, n):
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    scores = scores + 0.0  # -0 becomes +0, as which it counts
    if n <= SHORT:
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order[..., :k], True)
    threshold = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > threshold, scores == threshold
    lacking = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= lacking))
