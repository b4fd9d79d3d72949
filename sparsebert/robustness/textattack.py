"""Our engine as the model of TextAttack's attacks, for those who already use TextAttack.

TextAttack needs transformers 4 and so an environment of its own: `pip install 'sparsebert[textattack]'`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from textattack.models.wrappers import ModelWrapper

from sparsebert.engine import Engine


class EngineWrapper(ModelWrapper):
    """A model wrapper for TextAttack. It is called with texts, or pairs as tuples, and returns logits, float32 [texts,
    labels], in the order of the model's labels. Long texts are cut as transformers cuts them.

    >>> wrapper = EngineWrapper(Engine.load("sst2-s875", batch_invariant=True))
    >>> attack = textattack.attack_recipes.TextFoolerJin2019.build(wrapper)
    """

    def __init__(self, engine: Engine, max_length: int | None = None):
        self.model, self._max_length = engine, max_length

    def __call__(self, text_input_list: Sequence[str | tuple[str, str]]) -> np.ndarray:
        return self.model.logits(list(text_input_list), max_length=self._max_length, truncate=True)
