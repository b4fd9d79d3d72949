"""Faster parts for training on a CPU, beside the matrix products: attention that stores no scores, dropout that stores
no mask, and an embedding gradient that is written only in the rows of the batch's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sparsebert.ops.attention import attention
from sparsebert.ops.dropout import dropout

NAME = "sparsebert"  # name of the attention in transformers


def fuse(model: nn.Module) -> None:
    """Makes a transformers encoder use these parts from now on, with the same parameters under the same names. Dropout
    is seeded by torch's generator, but does not drop the same values as torch would. The gradients of embeddings are
    found in `.grad` only.
    """
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
        elif type(module) is nn.Embedding and not module.sparse and module.max_norm is None:
            module.__class__ = Embedding


class Dropout(nn.Dropout):
    """nn.Dropout by `ops.dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p, _seed()) if self.training and self.p else x


class Embedding(nn.Embedding):
    """nn.Embedding that keeps one tensor for its weight's gradient. Only the rows of the batch before are set to zero
    again. A new tensor in each step would take a tenth of the step: it is tens of MB of fresh memory for a vocabulary
    of 30,000.
    """

    own_gradient: torch.Tensor | None = None
    written: Sequence[torch.Tensor] = ()  # the rows of own_gradient that may not be zero

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(ids)
        return _Rows.apply(self.weight, ids, self)

    def add_to_gradient(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        rows, places = ids.unique(return_inverse=True)
        weight = self.weight
        if weight.grad is None:
            if self.own_gradient is None:
                self.own_gradient = torch.zeros_like(weight)
            for written in self.written:
                self.own_gradient[written] = 0
            self.written = []
            weight.grad = self.own_gradient
        if weight.grad is self.own_gradient:
            self.written = [*self.written, rows]
        # Each row is added once, however often its token occurs in the batch.
        added = torch.ops.aten.embedding_dense_backward(gradient, places, len(rows), -1, False)
        if self.padding_idx is not None:
            added[rows == self.padding_idx] = 0
        weight.grad.index_add_(0, rows, added)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, ids: torch.Tensor, module: Embedding) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.module = module
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        ctx.module.add_to_gradient(*ctx.saved_tensors, gradient)
        return None, None, None


def _attend(module, q, k, v, keep: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs):
    """As transformers calls it: [sequences, heads, tokens, size] in, [sequences, tokens, heads, size] out."""
    by_token = [x.transpose(1, 2) for x in (q, k, v)]
    return attention(*by_token, keep, scale=scaling, dropout=dropout, seed=_seed() if dropout else 0), None


def _seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, flash_attention_mask)  # the mask: one row per sequence, None if all is kept
