"""RMC: magnitude pruning by distillation from a teacher that is less sure where examples are easy. [Du et al. 2023]"""

from __future__ import annotations

from sparsebert.pruning.trained import imp
from sparsebert.pruning.trained.method import HeadConfig, Trained, passes

# The pruned models whose losses say what is easy are trained as long as this one.
METHOD = Trained(
    "rmc",
    HeadConfig,
    imp.METHOD.hook,
    floats=imp.METHOD.floats,
    passes=lambda config: 1 + passes(config),
    loss="rmc",
)
