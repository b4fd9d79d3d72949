"""masked_lstsq on a GPU: one thread block per group of rows that keep the same columns (csrc/cuda/masked_lstsq.cu)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sparsebert.errors import InputError, UnsupportedError
from sparsebert.kernels import cuda_core


def masked_lstsq(
    target: torch.Tensor,
    h: torch.Tensor,
    mask: torch.Tensor,
    *,
    complement: bool = False,
    supports: Supports | None = None,
    which: np.ndarray | None = None,
) -> torch.Tensor:
    """`sparsebert.ops.masked_lstsq.masked_lstsq` without a row_metric: H_SS v_S = t_S for each row's support S.

    target: T, float64 [rows, n_in]. h: H, float64 [n_in, n_in], symmetric positive definite; only i <= j is read.
    mask: bool [rows, n_in], True = kept; a row may be empty. All are contiguous and on one GPU.
    complement: solves for the removed columns instead, which is cheaper if a row keeps more than half of them. target
    is then W* = T H⁻¹, and h is H⁻¹, of which both halves are read.
    supports: `supports_of` the mask, if they are known. which: those to solve, at least one, bool [count]; rows of the
    others are zero. None: all. The op checks all of these.
    Returns V, float64 [rows, n_in], exactly zero outside the mask. Rows of equal support share one factorisation, by
    Cholesky in float64; other rows do not affect a row. Systems are in shared memory if
    all of them fit (at most 192 columns on sm_80, 224 on sm_90, if few rows share them), else in the GPU's memory.
    Raises InputError for an H that is not positive definite on a support, naming row and pivot, for which the host
    waits for the GPU. Raises UnsupportedError if the CUDA kernels are not built, or do not run on this GPU.

    It has not run on a GPU yet.
    """
    core = cuda_core()
    mask = mask.view(torch.uint8) != 0  # a bool may hold any byte
    v = target.new_zeros(target.shape)
    groups = groups_of(supports_of(mask) if supports is None else supports, target.shape[1], complement, which)
    count = len(groups.row_ptr) - 1
    failed = torch.empty(count, dtype=torch.int64, device=v.device)
    with torch.cuda.device_of(v):
        try:
            doubles = core.masked_lstsq_work(groups.k, groups.g, count)
            work = torch.empty(doubles, dtype=torch.float64, device=v.device)
            core.masked_lstsq(
                target=target.data_ptr(),
                h=h.data_ptr(),
                n_in=target.shape[1],
                mask=mask.data_ptr(),
                row_ptr=groups.row_ptr.data_ptr(),
                rows=groups.rows.data_ptr(),
                count=count,
                complement=complement,
                k=groups.k,
                g=groups.g,
                work=work.data_ptr(),
                v=v.data_ptr(),
                failed=failed.data_ptr(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
        except RuntimeError as error:
            raise UnsupportedError(
                f"masked_lstsq's CUDA kernel cannot run here: {error}", fix="move target, h and mask to the CPU"
            ) from error
    failed = failed.cpu().numpy()
    if (failed >= 0).any():
        rows, row_ptr = groups.rows.cpu().numpy(), groups.row_ptr.cpu().numpy()
        row, pivot = min((int(rows[row_ptr[group]]), int(failed[group])) for group in np.flatnonzero(failed >= 0))
        raise InputError(
            f"h must be positive definite on every support, pivot {pivot} of row {row} is not above 0",
            fix="raise the damping or give more calibration tokens",
        )
    return v


class Groups(NamedTuple):
    """Rows of equal support side by side, the largest systems first, so that no multiprocessor begins a large one at
    the end.
    """

    rows: torch.Tensor  # int32 [rows]
    row_ptr: torch.Tensor  # int64 [count + 1], indices into rows
    k: int  # the largest system
    g: int  # the most rows of a group


class Supports(NamedTuple):
    """The distinct supports of a mask's rows."""

    group_of: torch.Tensor  # int64 [rows], the support of each row
    kept: np.ndarray  # int64 [count], the number of columns of each
    sizes: np.ndarray  # int64 [count], the number of rows of each


def supports_of(mask: torch.Tensor) -> Supports:
    """The supports of a mask, bool [rows, n_in]. The host waits for the GPU, as their number is not known."""
    supports, group_of, sizes = mask.unique(dim=0, return_inverse=True, return_counts=True)
    return Supports(group_of, *torch.stack([supports.sum(1), sizes]).cpu().numpy())


def groups_of(supports: Supports, n_in: int, complement: bool, which: np.ndarray | None = None) -> Groups:
    """The groups of the supports that `which` is true for, bool [count]; None: of all."""
    systems = n_in - supports.kept if complement else supports.kept
    chosen = np.arange(len(systems)) if which is None else np.flatnonzero(which)
    order = chosen[np.argsort(-systems[chosen], kind="stable")]
    rank = np.full(len(systems), len(order))
    rank[order] = np.arange(len(order))
    row_ptr = np.concatenate([[0], np.cumsum(supports.sizes[order])])
    device = supports.group_of.device
    of_row = torch.from_numpy(rank).to(device)[supports.group_of]
    rows = of_row.argsort(stable=True)[: row_ptr[-1]].to(torch.int32)
    largest, most = int(systems[order].max()), int(supports.sizes[order].max())
    return Groups(rows, torch.from_numpy(row_ptr).to(device), largest, most)
