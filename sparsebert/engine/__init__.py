"""The inference runtime: a whole pruned encoder on sparse kernels. On the CPU it needs numpy, safetensors and
tokenizers only.
"""

from sparsebert.engine.engine import Engine

__all__ = ["Engine"]
