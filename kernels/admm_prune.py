"""admm_prune in dense products of torch: on a GPU, by cuBLAS and cuSOLVER, and on the CPU if a metric couples rows."""

from __future__ import annotations

import torch

from sparsebert.kernels import require_full_float32


class Iterations:
    """The state of the iterations of `sparsebert.ops.admm_prune`, float32, in the eigenvectors Q of Hn and P of the
    metric Bn. Its device is that of the arguments; the host does not wait for it.

    b0: W* scaled by both diagonals, float64 [rows, n_in]. hn, metric: Hn and Bn, float64, of unit diagonal; metric
    None: the identity. eigenvalues: of Hn, and of Bn if it is given. scores: (B + U)^2, [rows, n_in].
    Raises UnsupportedError on a GPU if torch may round a product's factors to TF32.
    """

    def __init__(self, b0: torch.Tensor, hn: torch.Tensor, metric: torch.Tensor | None = None):
        if b0.is_cuda:
            require_full_float32("admm_prune")
        # Float32 is enough: an eigenvalue is only used together with rho, a million times its rounding.
        across, self._q = torch.linalg.eigh(hn.float())
        self.eigenvalues = [across]
        self._both, self._p = across.clamp_min(0), None
        if metric is not None:
            down, self._p = torch.linalg.eigh(metric.float())
            self.eigenvalues.append(down)
            self._both = down.clamp_min(0)[:, None] * self._both
        self._x = b0.float()
        self._goal = self._both * self._turned(self._x)
        self.scores = self._x.square()

    def step(self, keep: torch.Tensor, rho: float, growth: float) -> None:
        """Runs one iteration with this rho, which grows by the factor `growth` after it. keep: bool [rows, n_in], the
        mask of Z.
        """
        x = self._x
        # Z - U is X where it is kept and -X elsewhere; U is 0 and X.
        b = (self._goal + rho * self._turned(torch.where(keep, x, -x))) / (self._both + rho)
        b = b @ self._q.T if self._p is None else self._p @ b @ self._q.T
        self._x = torch.where(keep, 0.0, x / growth) + b
        self.scores = self._x.square()

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Pᵀ x Q."""
        return x @ self._q if self._p is None else self._p.T @ x @ self._q
