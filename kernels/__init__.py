"""Triton kernels, one file an op, named after it: `kernels/X.py` holds the GPU kernel of `sparsebert.ops.X`.

Installed as `sparsebert.kernels`. A kernel that has not been measured is never dispatched to on its own.
"""
