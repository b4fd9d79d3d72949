"""The inference runtime: a whole pruned encoder on sparse kernels. On the CPU it needs only numpy, safetensors and
tokenizers.
"""

from sparsebert.engine.engine import Engine

__all__ = ["Engine"]
