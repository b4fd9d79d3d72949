"""The methods that train with labels. A new method is a file here and an entry in TRAINED."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from pydantic import create_model

from sparsebert.pruning.trained import (
    bag_of_tricks,
    early_robust,
    imp,
    mask,
    rmc,
    robust_ticket,
    soft_movement,
    super_ticket,
)
from sparsebert.pruning.trained.method import Trained, TrainedConfig

__all__ = ["TRAINED", "SubnetConfig"]

TRAINED = {
    method.name: method
    for method in (
        mask.METHOD, imp.METHOD, imp.REWOUND, soft_movement.METHOD, robust_ticket.METHOD, super_ticket.METHOD,
        early_robust.METHOD, rmc.METHOD, bag_of_tricks.METHOD,
    )
}  # fmt: skip


def flat(methods: Iterable[Trained]) -> type[TrainedConfig]:
    """One class with the flags of all methods. The description of a flag names the methods that have it. If several
    methods have a flag, its type and default must be the same in all.
    """
    fields: dict[str, tuple] = {}
    said: dict[str, dict[str, list[str]]] = {}
    for method in methods:
        for name, field in method.config.model_fields.items():
            if name in TrainedConfig.model_fields:
                continue
            of_first = fields.setdefault(name, (field.annotation, copy.copy(field)))[1]
            if (of_first.annotation, of_first.default) != (field.annotation, field.default):
                raise TypeError(f"{name} of {method.name} must have the type and default that it has in other methods")
            said.setdefault(name, {}).setdefault(field.description, []).append(method.name)
    for name, (_, field) in fields.items():
        field.description = "; ".join(f"{', '.join(names)}: {text}" for text, names in said[name].items())
    return create_model("SubnetConfig", __base__=TrainedConfig, __module__=__name__, **fields)


SubnetConfig = flat(TRAINED.values())
