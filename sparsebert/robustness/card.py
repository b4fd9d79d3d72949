"""The trade-off card: what models can do, under attack and elsewhere too, beside what they cost."""

from __future__ import annotations

import math
from pathlib import Path

from sparsebert import checkpoint

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def facts(directory: str | Path) -> dict:
    """What a model directory holds: directory, weights_sha256, content_sha256, method and pattern (None unless this
    package pruned it), dtype (int8 or that of the file), sparsity (share of zeros in the layers' linears), parameters,
    non_zeros, and bytes: what the tensors take without their zeros, each as non-zeros in its dtype and one bit per
    weight that says where they are, or whole if that is less.
    """
    files = checkpoint.read(directory)
    tensors = files.tensors
    made = files.config.get("sparsebert") or {}
    total = zeros = weights = size = 0
    for name, tensor in tensors.items():
        count, nnz, width = math.prod(tensor["shape"]), tensor["nnz"], _BYTES[tensor["dtype"]]
        if ".layer." in name and name.endswith(".weight") and len(tensor["shape"]) == 2:
            zeros, weights = zeros + count - nnz, weights + count
            width = 1 if files.scales is not None else width
        total += count
        size += min(count * width, nnz * width + -(-count // 8))
    return {
        "directory": str(directory), "weights_sha256": files.weights_sha256, "content_sha256": files.content_sha256,
        "method": made.get("method"), "pattern": made.get("pattern"),
        "dtype": "int8" if files.scales is not None else max(t["dtype"].lower() for t in tensors.values()),
        "sparsity": zeros / weights if weights else None, "parameters": total,
        "non_zeros": sum(tensor["nnz"] for tensor in tensors.values()), "bytes": size,
    }  # fmt: skip
