"""admm_prune: which weights of a linear to keep, by the alternating direction method of multipliers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.patterns import VNM, NofM, Pattern, kept_in, require_fits

# ρ, in units in which H has a unit diagonal, at the start and at the end of the iterations. Measured on 384 -> 384
# layers of correlated and of GELU inputs at 50 to 95 %, 2:4 and 32x1, as the error after a refit: starts of 0.05 and
# 0.2 and ends of 2 to 6 cost up to 6.4 %. At 192 -> 64 a start of 0.3 costs up to 14 % (the first support freezes), one
# of 0.003 that ends below 0.1 a factor of up to 4.3 (it does not converge).
RHO_START, RHO_END = 0.1, 1.0
RAMP = 0.4  # share of the iterations in which the sparsity climbs
SETTLED = 3e-4  # stops when a smaller share of the kept weights changes in an iteration


def admm_prune(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    per_row: bool = False,
    iterations: int = 120,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """The support of a V of the given pattern with a small tr((V - W*) H (V - W*)ᵀ): bool [rows, n_in], True = kept.

    weight: W*, float64 [rows, n_in]. h: float64 [n_in, n_in], symmetric positive definite.
    iterations: at least 1; half of the default gives an error up to 4 % higher.
    In units in which H has a unit diagonal (B0 = W* D, Hn = D⁻¹ H D⁻¹, D² = diag H), each iteration projects B + U on
    the pattern (Z), adds what was lost to U, and solves (Hn + ρ) for the next B. The sparsity climbs to its end by a
    cubic over the first 40 % of the iterations; from there on ρ grows by a constant factor an iteration, U shrinking
    with it, until the support stands still. A pattern that implies its sparsity has no climb. The weights themselves
    are `masked_lstsq`'s work. [Boyd et al. 2011 §9.1; Boža 2024, whose released global branch skips the climb.]
    Iterations are float32, about B = B~ Qᵀ in the eigenvectors Q of Hn, where the solve is a division; the result does
    not depend on `threads`. Raises InputError for a wrong type or shape, values that are not finite, a pattern that
    does not fit, and an H that is not positive definite.
    """
    _check(weight, h, pattern, sparsity, iterations)
    rows, n_in = weight.shape
    if kept_in(pattern, rows, n_in, sparsity) == rows * n_in:
        return torch.ones(rows, n_in, dtype=torch.bool)
    core = _dispatch.core()
    threads, isa = _dispatch.threads(threads), _dispatch.isa(isa)
    b0, hn = _normalised(weight, h)
    # Float32: an eigenvalue is only ever used beside ρ, a million times its rounding.
    eigenvalues, q = torch.linalg.eigh(hn.float())
    x = b0.float()
    start = x @ q
    state = {
        "q": _panels(q, core.ADMM_PANEL), "qt": _panels(_padded(q.T, core.ADMM_PANEL, 1), core.ADMM_PANEL),
        "eigenvalues": _padded(eigenvalues[None], 1, core.ADMM_PANEL)[0],
        "goal": _padded(start * eigenvalues, core.ADMM_BLOCK_ROWS, core.ADMM_PANEL),
        "b": _padded(start, core.ADMM_BLOCK_ROWS, core.ADMM_PANEL),
    }  # fmt: skip
    state |= {"u": torch.zeros_like(state["b"]), "x": x, "scores": x.square()}
    arrays = {name: array.numpy() for name, array in state.items()}
    last = None
    for level, rho, growth, climbed in _schedule(pattern, sparsity, iterations):
        keep = pattern_mask(state["scores"], pattern, level, per_row=per_row)
        if climbed:
            if _settled(keep, last):
                break
            last = keep
        core.admm_prune_step(**arrays, keep=keep.numpy(), rho=rho, shrink=1 / growth, isa=isa, threads=threads)
    return keep


def admm_prune_ref(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    per_row: bool = False,
    iterations: int = 120,
) -> torch.Tensor:
    """What `admm_prune` computes, in float64 and without eigenvectors."""
    b0, hn = _normalised(weight, h)
    b, u, last = b0, torch.zeros_like(b0), None
    for level, rho, growth, climbed in _schedule(pattern, sparsity, iterations):
        keep = pattern_mask((b + u).square().float(), pattern, level, per_row=per_row)
        if climbed:
            if _settled(keep, last):
                break
            last = keep
        z = torch.where(keep, b + u, 0.0)
        u = u + b - z
        b = torch.linalg.solve(hn + rho * torch.eye(len(hn)), b0 @ hn + rho * (z - u), left=False)
        u = u / growth
    return keep


def _normalised(weight: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 = W* D and Hn = D⁻¹ H D⁻¹. InputError where H is not positive definite."""
    _, info = torch.linalg.cholesky_ex(h)
    if info.item():
        raise InputError(
            f"h must be positive definite, pivot {info.item() - 1} of {len(h)} is not above 0",
            fix="raise the damping or give more calibration tokens",
        )
    d = h.diagonal().sqrt()
    return weight * d, h / d / d[:, None]


def _schedule(pattern: Pattern, sparsity: float, iterations: int) -> Iterator[tuple[float, float, float, bool]]:
    """For every iteration: its sparsity, its ρ, the factor from there to the next ρ, and whether the climb is over."""
    ramp = int(RAMP * iterations)
    factor = (RHO_END / RHO_START) ** (1 / (iterations - ramp))
    rho = RHO_START
    for i in range(1, iterations + 1):
        climbed = i >= ramp
        fixed = climbed or isinstance(pattern, NofM | VNM)
        growth = factor if climbed else 1.0
        yield sparsity if fixed else sparsity * (1 - (1 - i / ramp) ** 3), rho, growth, climbed
        rho *= growth


def _settled(keep: torch.Tensor, last: torch.Tensor | None) -> bool:
    """Whether a negligible share of the kept weights is new."""
    return last is not None and int((keep & ~last).sum()) < SETTLED * int(keep.sum())


def _padded(matrix: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The matrix with zeros up to multiples of `rows` and `cols`."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % cols, 0, -matrix.shape[0] % rows)).contiguous()


def _panels(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """[panels, rows, width]: panels of `width` columns, one after the other."""
    padded = _padded(matrix, 1, width)
    return padded.view(len(padded), -1, width).transpose(0, 1).contiguous()


def _check(weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float, iterations: int) -> None:
    for name, array in (("weight", weight), ("h", h)):
        if array.dtype != torch.float64 or array.ndim != 2 or array.device.type != "cpu":
            raise InputError(
                f"{name} must be 2-d float64 on the CPU, got {array.dtype} {list(array.shape)} on {array.device}",
                fix="convert it first",
            )
        if not array.isfinite().all():
            raise InputError(f"{name} must be finite, got inf or NaN", fix="repair what it is made from")
    if list(h.shape) != [weight.shape[1]] * 2:
        raise InputError(f"h must be [n_in = {weight.shape[1]}, n_in], got {list(h.shape)}", fix="match weight and h")
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}", fix="pass 1 or more")
    require_fits(pattern, *weight.shape, sparsity)
