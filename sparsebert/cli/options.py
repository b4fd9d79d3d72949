"""Flags made from the config classes: one field, one flag, one help line, one default."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsebert.config import validated


def flags(config_class: type[BaseModel], **more: type[BaseModel]) -> Callable:
    """Decorates a command that takes `config`: its flags are the fields of `config_class` instead, validated
    together. more: the same of further arguments by their names; a field that two classes have is one flag, described
    by the first.
    """
    classes = {"config": config_class, **more}

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**values):
            given = {name: values.pop(name) for name in fields}
            configs = {
                argument: validated(cls, {name: given[name] for name in cls.model_fields})
                for argument, cls in classes.items()
            }
            return command(**configs, **values)

        fields: dict[str, FieldInfo] = {}
        for cls in classes.values():
            fields |= {name: field for name, field in cls.model_fields.items() if name not in fields}
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in classes]
        for name, field in fields.items():
            names = (field.json_schema_extra or {}).get("flags", ())
            annotation = Annotated[_plain(field.annotation), typer.Option(*names, help=field.description)]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=annotation)
            )
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # typer would read the command's own signature through it
        return run

    return decorate


def _default(field: FieldInfo):
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _plain(annotation):
    """The type without what pydantic checks of it, which `validated` does: `Positive | None` as `float | None`. A tuple
    is a flag that may be repeated.
    """
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]
    if get_origin(annotation) in (Union, UnionType):
        return functools.reduce(operator.or_, map(_plain, get_args(annotation)))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
