"""admm_prune, admm_path: choose the weights of a linear to keep, by the alternating direction method of multipliers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from scipy.linalg import solve_sylvester

from sparsebert.errors import InputError
from sparsebert.kernels import admm_prune as kernel
from sparsebert.ops import _dispatch
from sparsebert.ops.topk_mask import chosen, pattern_mask, require_numbers
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, Unstructured, kept_in, require_fits

# ρ grows from g / SPREAD to g * SPREAD. g is the geometric mean of the eigenvalues of H scaled to a unit diagonal,
# times the same mean of a row_metric. Costs are increases of the error after a refit, measured on the moments and
# metrics of a fine-tuned MiniLM, at 50 and 87.5 %, with single rows and 32x1. g is 0.6 in the first layer and 0.05 in
# the last; with a metric 0.35 and 0.01. One ρ for all layers (0.1 to 1) costs 6 to 25 % in the last layer. An end at 2
# g costs up to 20 %, at 12 g 1 %. A start at g / 2 costs up to 4 %, at g / 20 1 %. If ρ stays below 0.3 g, the
# iterations do not converge: the error grows by a factor of 1.8.
SPREAD = 6.0
# In `admm_path` ρ grows by this factor, from g on. A factor of 2 costs up to 4 % at the highest sparsities; a start at
# g / 2 costs 15 % at the lowest.
PATH_SPREAD = 3.0
PATH_ITERATIONS = 7  # per level; 5 cost up to 4 % more
RAMP = 0.4  # share of the iterations in which the sparsity climbs
SETTLED = 3e-4  # stops if a smaller share of the kept weights changes in one iteration


def admm_prune(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    row_metric: torch.Tensor | None = None,
    per_row: bool = False,
    iterations: int = 120,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """Chooses the support of a V with the given pattern and a small tr(B (V - W*) H (V - W*)ᵀ). Returns bool [rows,
    n_in], True = kept.

    weight: W*, float64 [rows, n_in], on the CPU or a GPU. h: H, float64 [n_in, n_in], symmetric positive definite.
    row_metric: B, float64 [rows, rows], symmetric positive definite; B_ij weights the product of the errors of outputs
    i and j. None: the identity.
    iterations: at least 1; half of the default gives an error up to 4 % higher.
    Weights are scaled so that H has a unit diagonal (B0 = W* D, Hn = D⁻¹ H D⁻¹, D² = diag H). Each iteration projects B
    + U onto the pattern (giving Z), adds B - Z to U, and solves a system with Hn + ρ for the next B. During the first
    40 % of the iterations the sparsity climbs to its final value along a cubic. After that ρ, which is of the size of
    Hn's eigenvalues, grows by a constant factor per iteration, and U shrinks by the same factor, until the support no
    longer changes. A pattern that implies its sparsity has that sparsity from the start. `masked_lstsq` computes the
    weights themselves. [Boyd et al. 2011 §9.1; Boža 2024, whose released global branch skips the climb.]
    Iterations run in float32 on B~, where B = B~ Qᵀ and Q holds the eigenvectors of Hn: there the solve is a division.
    The result does not depend on `threads`. With a row_metric, rows are scaled to its unit diagonal as well, and the
    solve is a division in the eigenvectors of both matrices; these are dense torch products, on torch's threads, and so
    are all on a GPU. There `threads` and `isa` are ignored, and the host waits once per iteration after the climb.
    Raises InputError for a wrong type or shape, values that are not finite, a pattern that does not fit, and an H or
    row_metric that is not positive definite. Raises UnsupportedError on a GPU if torch's matrix products are set to
    TF32.
    """
    _check(weight, h, row_metric, pattern, sparsity, iterations)
    rows, n_in = weight.shape
    if kept_in(pattern, rows, n_in, sparsity) == rows * n_in:
        return torch.ones(rows, n_in, dtype=torch.bool, device=weight.device)
    run, size = _begun(weight, h, row_metric, threads, isa)
    last = None
    for level, rho, growth, climbed in _schedule(pattern, sparsity, iterations, size):
        keep = chosen(run.scores, pattern, level, per_row=per_row)
        if climbed:
            if _settled(keep, last):
                break
            last = keep
        run.step(keep, rho, growth)
    require_numbers(run.scores)
    return keep


def admm_path(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Unstructured | Grouped,
    levels: Sequence[float],
    *,
    iterations: int = PATH_ITERATIONS,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """Supports of V at each of `levels`, which are rising sparsities, from one climb: bool [levels, rows, n_in].

    weight, h, threads, isa: as for `admm_prune`. Runs the iterations of `admm_prune`, `iterations` of them per level.
    Each level starts from the state that the level below reached, while ρ grows from g to PATH_SPREAD g. Supports are
    not nested: a higher level may keep a weight that a lower level removed.
    9 levels from 0.15 to 0.985 take 63 iterations instead of 1080. Errors after a refit are up to 6 % above those of
    `admm_prune` with 32x1 or GELU inputs, and up to 20 % above with normal inputs, unstructured at 0.6 (see the bench).
    Raises InputError as `admm_prune` does, and also for levels that do not rise and for a pattern that implies its
    sparsity.
    """
    if isinstance(pattern, NofM | VNM):
        raise InputError(f"pattern must not imply its sparsity, got {pattern}", fix="use admm_prune")
    if not levels or any(a >= b for a, b in itertools.pairwise(levels)) or not 0 <= levels[0] <= levels[-1] < 1:
        raise InputError(f"levels must be rising sparsities in [0, 1), got {list(levels)}", fix="sort them")
    _check(weight, h, None, pattern, levels[-1], iterations)
    run, size = _begun(weight, h, None, threads, isa)
    supports = torch.empty(len(levels), *weight.shape, dtype=torch.bool, device=weight.device)
    for level, rho, growth, last in _path(levels, iterations, size):
        run.step(chosen(run.scores, pattern, levels[level]), rho, growth)
        if last:
            supports[level] = chosen(run.scores, pattern, levels[level])
    require_numbers(run.scores)
    return supports


def admm_prune_ref(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    row_metric: torch.Tensor | None = None,
    per_row: bool = False,
    iterations: int = 120,
) -> torch.Tensor:
    """Reference for `admm_prune`, in float64 and without eigenvectors: each iteration solves B X Hn + ρ X = … as a
    Sylvester equation.
    """
    b0, hn = _normalised(weight, h)
    metric = torch.eye(len(weight), dtype=torch.float64)
    if row_metric is not None:
        b0, metric = _normalised(b0.T, row_metric, "row_metric")
        b0 = b0.T
    inverse = torch.linalg.inv(metric)
    b, u, last = b0, torch.zeros_like(b0), None
    size = _size(torch.linalg.eigvalsh(hn)) * _size(torch.linalg.eigvalsh(metric))
    for level, rho, growth, climbed in _schedule(pattern, sparsity, iterations, size):
        keep = pattern_mask((b + u).square().float(), pattern, level, per_row=per_row)
        if climbed:
            if _settled(keep, last):
                break
            last = keep
        z = torch.where(keep, b + u, 0.0)
        u = u + b - z
        b = torch.from_numpy(
            solve_sylvester(rho * inverse.numpy(), hn.numpy(), (b0 @ hn + rho * inverse @ (z - u)).numpy())
        )
        u = u / growth
    return keep


def admm_path_ref(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Unstructured | Grouped,
    levels: Sequence[float],
    *,
    iterations: int = PATH_ITERATIONS,
) -> torch.Tensor:
    """Reference for `admm_path`, in float64 and without eigenvectors."""
    b0, hn = _normalised(weight, h)
    b, u, supports = b0, torch.zeros_like(b0), []
    for level, rho, growth, last in _path(levels, iterations, _size(torch.linalg.eigvalsh(hn))):
        z = torch.where(pattern_mask((b + u).square().float(), pattern, levels[level]), b + u, 0.0)
        u = u + b - z
        b = torch.linalg.solve(hn + rho * torch.eye(len(hn), dtype=hn.dtype), b0 @ hn + rho * (z - u), left=False)
        u = u / growth
        if last:
            supports.append(pattern_mask((b + u).square().float(), pattern, levels[level]))
    return torch.stack(supports)


def _begun(
    weight: torch.Tensor, h: torch.Tensor, row_metric: torch.Tensor | None, threads: int | None, isa: str | None
) -> tuple[_Run | kernel.Iterations, float]:
    """The iterations at their start, and the `_size` of the eigenvalues that rho is added to."""
    b0, hn = _normalised(weight, h)
    metric = None
    if row_metric is not None:
        b0, metric = _normalised(b0.T, row_metric, "row_metric")
        b0 = b0.T
    if metric is None and not weight.is_cuda:
        run = _Run(b0, hn, _dispatch.threads(threads), _dispatch.isa(isa))
    else:
        run = kernel.Iterations(b0, hn, metric)
    return run, math.prod(_size(eigenvalues) for eigenvalues in run.eigenvalues)


class _Run:
    """The state of the iterations without a row_metric, float32, in the eigenvectors Q of Hn. eigenvalues: of Hn.
    scores: (B + U)², [rows, n_in].
    """

    def __init__(self, b0: torch.Tensor, hn: torch.Tensor, threads: int, isa: str):
        self._core, self._options = _dispatch.core(), {"threads": threads, "isa": isa}
        # Float32 is enough: an eigenvalue is only used together with ρ, a million times the rounding of an eigenvalue.
        eigenvalues, q = torch.linalg.eigh(hn.float())
        self.eigenvalues = [eigenvalues]
        panel, block = self._core.ADMM_PANEL, self._core.ADMM_BLOCK_ROWS
        x = b0.float()
        start = x @ q
        state = {
            "q": _panels(q, panel), "qt": _panels(_padded(q.T, panel, 1), panel),
            "eigenvalues": _padded(eigenvalues[None], 1, panel)[0],
            "goal": _padded(start * eigenvalues, block, panel), "b": _padded(start, block, panel),
        }  # fmt: skip
        self.scores = x.square()
        state |= {"u": torch.zeros_like(state["b"]), "x": x, "scores": self.scores}
        self._arrays = {name: array.numpy() for name, array in state.items()}

    def step(self, keep: torch.Tensor, rho: float, growth: float) -> None:
        """Runs one iteration with this ρ. growth: the factor by which ρ grows after it."""
        self._core.admm_prune_step(**self._arrays, keep=keep.numpy(), rho=rho, shrink=1 / growth, **self._options)


def _normalised(weight: torch.Tensor, h: torch.Tensor, name: str = "h") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns B0 = W* D and Hn = D⁻¹ H D⁻¹. Raises InputError if H is not positive definite."""
    _, info = torch.linalg.cholesky_ex(h)
    if info.item():
        raise InputError(
            f"{name} must be positive definite, pivot {info.item() - 1} of {len(h)} is not above 0",
            fix="raise the damping or give more calibration tokens",
        )
    d = h.diagonal().sqrt()
    return weight * d, h / d / d[:, None]


def _size(eigenvalues: torch.Tensor) -> float:
    """The geometric mean of the eigenvalues. Those below 1e-6, which float32 cannot tell from 0, count as 1e-6."""
    return math.exp(eigenvalues.double().clamp_min(1e-6).log().mean())


def _schedule(
    pattern: Pattern, sparsity: float, iterations: int, size: float
) -> Iterator[tuple[float, float, float, bool]]:
    """Yields for every iteration: its sparsity, its ρ, the factor to the next ρ, and whether the climb is over.

    size: `_size` of the eigenvalues that ρ is added to.
    """
    ramp = int(RAMP * iterations)
    rho, factor = size / SPREAD, SPREAD ** (2 / (iterations - ramp))
    for i in range(1, iterations + 1):
        climbed = i >= ramp
        fixed = climbed or isinstance(pattern, NofM | VNM)
        growth = factor if climbed else 1.0
        yield sparsity if fixed else sparsity * (1 - (1 - i / ramp) ** 3), rho, growth, climbed
        rho *= growth


def _path(levels: Sequence[float], iterations: int, size: float) -> Iterator[tuple[int, float, float, bool]]:
    """Yields for every iteration: its level's index, its ρ, the factor to the next ρ, and whether it is the level's
    last.
    """
    rho, growth = size, PATH_SPREAD ** (1 / (len(levels) * iterations))
    for level in range(len(levels)):
        for i in range(1, iterations + 1):
            yield level, rho, growth, i == iterations
            rho *= growth


def _settled(keep: torch.Tensor, last: torch.Tensor | None) -> bool:
    """Whether only a negligible share of the kept weights is new."""
    return last is not None and bool((keep & ~last).sum() < SETTLED * keep.sum(dtype=torch.float64))


def _padded(matrix: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The matrix, padded with zeros to multiples of `rows` and `cols`."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % cols, 0, -matrix.shape[0] % rows)).contiguous()


def _panels(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """[panels, rows, width]: panels of `width` columns, one after the other."""
    padded = _padded(matrix, 1, width)
    return padded.view(len(padded), -1, width).transpose(0, 1).contiguous()


def _check(
    weight: torch.Tensor,
    h: torch.Tensor,
    row_metric: torch.Tensor | None,
    pattern: Pattern,
    sparsity: float,
    iterations: int,
) -> None:
    arrays = {"weight": weight, "h": h} | ({} if row_metric is None else {"row_metric": row_metric})
    device, where = _dispatch.place(weight)
    for name, array in arrays.items():
        if array.dtype != torch.float64 or array.ndim != 2 or array.device != device:
            raise InputError(
                f"{name} must be 2-d float64 on {where}, got {array.dtype} {list(array.shape)} on {array.device}",
                fix="convert it first",
            )
    _dispatch.require_finite({name: array.isfinite().all() for name, array in arrays.items()})
    if list(h.shape) != [weight.shape[1]] * 2:
        raise InputError(f"h must be [n_in = {weight.shape[1]}, n_in], got {list(h.shape)}", fix="match weight and h")
    if row_metric is not None and list(row_metric.shape) != [weight.shape[0]] * 2:
        raise InputError(
            f"row_metric must be [rows = {weight.shape[0]}, rows], got {list(row_metric.shape)}",
            fix="match weight and row_metric",
        )
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}", fix="pass 1 or more")
    require_fits(pattern, *weight.shape, sparsity)
