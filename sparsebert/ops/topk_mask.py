"""topk_mask: the k highest scores, exactly k, without a sort; `topk_threshold`: the lowest of them; `pattern_mask`: the
same within a sparsity pattern.
"""

from __future__ import annotations

import torch

from sparsebert.errors import InputError
from sparsebert.kernels import topk_mask as kernel
from sparsebert.ops import _dispatch
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, kept_in, require_fits


def topk_mask(scores: torch.Tensor, k: int, *, threads: int | None = None, isa: str | None = None) -> torch.Tensor:
    """True at exactly the k highest scores of every vector along the last dimension; of equal scores, those with the
    lower index.

    scores: float32 [..., n], contiguous, on the CPU or a GPU, no NaN; -0 and +0 are equal, infinities are ordered.
    k: 0 to n.
    Returns bool [..., n], True = kept. On a GPU `threads` and `isa` are ignored, and the host waits to know whether
    there is a NaN. Raises InputError for another type, layout or k, and for NaN.
    """
    _check(scores, k)
    if scores.is_cuda:
        require_numbers(scores)
        return kernel.topk_mask(scores.detach(), k)
    n = scores.shape[-1]
    keep = _dispatch.core().topk_mask(
        scores.detach().view(-1, n).numpy(), k, _dispatch.isa(isa), _dispatch.threads(threads)
    )
    if keep is None:
        raise _not_a_number()
    return torch.from_numpy(keep).view(scores.shape)


def topk_mask_ref(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Reference for `topk_mask`, by a stable sort."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order[..., :k], True)


def topk_threshold(scores: torch.Tensor, k: int, *, threads: int | None = None, isa: str | None = None) -> torch.Tensor:
    """The k-th highest score of every vector along the last dimension. `scores >= threshold` keeps k scores, and any
    others that equal the threshold.

    scores: as for `topk_mask`; infinities included. k: 1 to n. Returns float32 [...]. Raises InputError as `topk_mask`
    does, and for k = 0.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}", fix="correct k, or use a threshold of infinity")
    keep = topk_mask(scores, k, threads=threads, isa=isa)
    return torch.where(keep, scores.detach(), torch.inf).amin(-1)


def pattern_mask(scores: torch.Tensor, pattern: Pattern, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
    """The mask of the weights with the highest scores that `pattern` can keep at `sparsity`: bool [n_out, n_in].

    scores: float32 [n_out, n_in], at least 0; the score of a set of weights is the sum of their scores.
    Unstructured: the highest of the whole matrix, or with `per_row` n_in - floor(sparsity * n_in) of each row. N:M: the
    n highest of every m consecutive ones of a row. Grouped: as unstructured, on the sums over each group of consecutive
    rows; with kept_multiple, a group's columns are sorted by falling score and kept in whole chunks. V:N:M: in every
    block of v rows and m columns the 4 columns with the highest sums, and of these the n highest of each row. Raises
    InputError if the pattern does not divide the matrix or would keep no weight, and for NaN.
    """
    if scores.is_cuda:
        require_numbers(scores)
    return chosen(scores, pattern, sparsity, per_row=per_row)


def chosen(scores: torch.Tensor, pattern: Pattern, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
    """`pattern_mask`, which on a GPU does not look for NaN: the host does not wait."""
    n_out, n_in = scores.shape
    require_fits(pattern, n_out, n_in, sparsity)
    if isinstance(pattern, NofM):
        return _topk(scores.reshape(-1, pattern.m), pattern.n).view(n_out, n_in)
    if isinstance(pattern, VNM):
        blocks = scores.view(n_out // pattern.v, pattern.v, n_in // pattern.m, pattern.m)
        shared = _topk(blocks.sum(1).contiguous(), 4)[:, None]
        # Scores are at least 0, so a column that is not shared ranks below every one that is.
        return _topk(torch.where(shared, blocks, -1.0), pattern.n).view(n_out, n_in)
    rows, multiple = (pattern.rows, pattern.kept_multiple) if isinstance(pattern, Grouped) else (1, 1)
    sums = scores.view(-1, rows, n_in).sum(1) if rows > 1 else scores
    budget_rows = rows if per_row else n_out  # rows that share one budget
    require_fits(pattern, budget_rows, n_in, sparsity)
    kept = kept_in(pattern, budget_rows, n_in, sparsity) // (rows * multiple)
    if multiple == 1:
        keep = _highest(sums, kept, per_row)
    else:
        # A group's chunks fall in score, so the highest chunks of all groups are always the first ones of each.
        order = torch.argsort(sums, dim=1, descending=True, stable=True)
        chunks = sums.gather(1, order).view(len(sums), -1, multiple).sum(2)
        first = _highest(chunks, kept, per_row).repeat_interleave(multiple, 1)
        keep = torch.zeros(sums.shape, dtype=torch.bool, device=sums.device).scatter_(1, order, first)
    return keep.repeat_interleave(rows, 0) if rows > 1 else keep


def _highest(scores: torch.Tensor, kept: int, per_row: bool) -> torch.Tensor:
    """The mask of the `kept` highest scores of each row, or of the whole matrix."""
    return _topk(scores if per_row else scores.flatten(), kept).view_as(scores)


def _topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    return kernel.topk_mask(scores.detach(), k) if scores.is_cuda else topk_mask(scores, k)


def require_numbers(scores: torch.Tensor) -> None:
    """Raises InputError for NaN; for scores on a GPU the host waits."""
    if scores.isnan().any():
        raise _not_a_number()


def _not_a_number() -> InputError:
    return InputError("scores must have no NaN", fix="check how they were computed")


def _check(scores: torch.Tensor, k: int) -> None:
    device, where = _dispatch.place(scores)
    if scores.dtype != torch.float32 or scores.ndim < 1 or scores.device != device or not scores.is_contiguous():
        raise InputError(
            f"scores must be contiguous float32 [..., n] on {where}, got {scores.dtype} {list(scores.shape)} on "
            f"{scores.device}",
            fix="convert them first",
        )
    if not 0 <= k <= scores.shape[-1]:
        raise InputError(f"k must be between 0 and n = {scores.shape[-1]}, got {k}", fix="correct k")
