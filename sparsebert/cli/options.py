"""Flags made from the config classes: one field, one flag, one help line, one default."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import typer
from pydantic import BaseModel, ValidationError

from sparsebert.errors import InputError


def flags(config_class: type[BaseModel]) -> Callable:
    """Decorates a command that takes `config`: its flags are the fields of `config_class` instead, validated
    together.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**values):
            fields = {name: values.pop(name) for name in config_class.model_fields}
            return command(config=validated(config_class, fields), **values)

        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        for name, field in config_class.model_fields.items():
            annotation = Annotated[field.annotation, typer.Option(help=field.description)]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
            )
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # typer would read the command's own signature through it
        return run

    return decorate


def validated(config_class: type[BaseModel], fields: dict) -> BaseModel:
    """`config_class(**fields)`, pydantic's complaint turned into one line."""
    try:
        return config_class(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Input should be ")
        raise InputError(
            f"{name} must be {rule}, got {first['input']!r}", fix=f"correct --{name.replace('_', '-')}"
        ) from error
