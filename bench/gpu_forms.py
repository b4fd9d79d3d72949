"""The forms of a linear on a GPU, as bench.gpu_report checks and times them: all rows of
`sparsebert.engine.cuda_forms.FORMS`.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from bench.gpu_place import Place
from sparsebert.engine.cuda_costs import copied, kind_of
from sparsebert.engine.cuda_forms import FORMS
from sparsebert.errors import UnsupportedError
from sparsebert.kernels.sparse_matmul import sparse_matmul
from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.patterns import Pattern, sparsity_of

TRUNCATED = 2e-2  # the interpreter cuts off the digits that bfloat16 has not, twice in some forms
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class FormLinear:
    """activation(W x + b) in one form. size: bytes of the weight that it reads. Raises UnsupportedError if the form is
    not available here.
    """

    def __init__(
        self,
        place: Place,
        form: str,
        weight: np.ndarray,
        bias: torch.Tensor | None = None,
        activation: str = "none",
        dtype: torch.dtype = torch.bfloat16,
    ):
        missing = FORMS[form].missing(place.device)
        if missing is not None:
            raise UnsupportedError(f"form {form} is not available: {missing}", fix="leave it out")
        self.packed = FORMS[form].pack(weight, dtype, place.device)
        self.bias = None if bias is None else bias.to(place.device)
        self.activation, self.tolerance = activation, FORMS[form].tolerance[DTYPE_NAMES[dtype]]
        if place.rehearsal and dtype == torch.bfloat16:
            self.tolerance = TRUNCATED
        self.size = FORMS[form].entries(weight != 0) * dtype.itemsize

    def copy(self) -> FormLinear:
        """The same linear at another place in memory."""
        other = copy.copy(self)
        other.packed = copied(self.packed)
        return other

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """y [n_out, tokens]. x: [n_in, tokens]."""
        return sparse_matmul(x, self.packed, self.bias, self.activation, out=out)


def forms_of(dtype: torch.dtype) -> list[str]:
    """The names of all forms that have this dtype."""
    return [form.name for form in FORMS.values() if DTYPE_NAMES[dtype] in form.tolerance]


def samples(form: str, n_out: int, n_in: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Weights that a form can hold: its own sample, and one without zeros; of zeros alone, if it cannot hold that."""
    own, full = FORMS[form].sample(n_out, n_in, rng), rng.standard_normal((n_out, n_in), np.float32)
    return [own, full if FORMS[form].entries(full != 0) is not None else np.zeros_like(own)]


def patterned(pattern: Pattern, n_out: int, n_in: int, sparsity: float, rng: np.random.Generator) -> np.ndarray:
    """A random weight in a pattern, float32 [n_out, n_in]. sparsity: if the pattern implies none."""
    scores = torch.from_numpy(rng.random((n_out, n_in), np.float32))
    implied = sparsity_of(pattern, None if hasattr(pattern, "m") else sparsity)
    return rng.standard_normal((n_out, n_in), np.float32) * pattern_mask(scores, pattern, implied).numpy()


def that_hold(place: Place, weight: np.ndarray, tokens: int, *, sparse: bool) -> list[str]:
    """The forms in bf16 that can hold a weight here, and are meant for batches of so many tokens. sparse: only those
    that read less than all of its values.
    """
    here = [name for name in forms_of(torch.bfloat16) if FORMS[name].missing(place.device) is None]
    read = {name: FORMS[name].entries(weight != 0) for name in here if kind_of(tokens) <= FORMS[name].longest}
    most = weight.size - 1 if sparse else math.inf
    return [name for name, entries in read.items() if entries is not None and entries <= most]
