"""Triton kernels, one file per op, named after the op: `kernels/X.py` holds the GPU kernel of `sparsebert.ops.X`.

Installed as `sparsebert.kernels`. No op dispatches by itself to a kernel that has not been measured.
"""
