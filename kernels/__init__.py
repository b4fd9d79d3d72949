"""GPU kernels, one file per op, named after the op: `kernels/X.py` holds the GPU kernel of `sparsebert.ops.X`. It is
written in Triton, or calls one in CUDA C++ (csrc/cuda/X.cu).

Installed as `sparsebert.kernels`. No op dispatches by itself to a kernel that has not been measured.
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
