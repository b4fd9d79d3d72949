"""GPU kernels, one file per op, named after the op: `kernels/X.py` holds the GPU kernel of `sparsebert.ops.X`. It is
written in Triton, or in torch's products (cuBLAS, cuSOLVER), or calls a kernel in CUDA C++ (csrc/cuda/X.cu).

Installed as `sparsebert.kernels`. An op calls its kernel for tensors on a GPU. None of them has run on a GPU yet.
"""

from types import ModuleType

from sparsebert.errors import UnsupportedError


def cuda_core() -> ModuleType:
    """The compiled CUDA kernels, `sparsebert._cuda`. Raises UnsupportedError if they cannot be imported."""
    try:
        from sparsebert import _cuda
    except ImportError as error:
        raise UnsupportedError(
            f"the CUDA kernels sparsebert._cuda cannot be imported: {error}",
            fix="install the package again where nvcc is on the PATH",
        ) from error
    return _cuda


def require_full_float32(what: str, instead: str | None = None) -> None:
    """Raises UnsupportedError if torch may round the factors of float32 products on a GPU to TF32. what: needs them
    whole; instead: another way out than setting it.
    """
    import torch

    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        raise UnsupportedError(
            f"{what} needs full float32 matmuls, torch.backends.cuda.matmul.fp32_precision is 'tf32'",
            fix="set it to 'ieee'" + (f", or {instead}" if instead else ""),
        )
