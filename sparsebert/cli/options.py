"""Flags made from the config classes: one field, one flag, one help line, one default."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from sparsebert.config import Settings, validated

EXPERT = "Expert options"


def option(*names: str, help: str, panel: str | None = None, **more):
    """A flag whose help is plain text: "[default: …]" would else be markup of rich, and vanish."""
    return typer.Option(*names, help=escape(help), rich_help_panel=panel, **more)


def flags(config_class: type[Settings], basic: tuple[str, ...] | None = None, **more: type[Settings]) -> Callable:
    """Decorates a command that takes `config`: its flags are the fields of `config_class`, validated together.

    basic: fields whose flags --help lists first (None: all); it lists the others of `config_class` as expert options.
    more: further config classes by the names of their arguments, listed under their headings. A field that two classes
    have is one flag, described by the first.
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
        headings: dict[str, str] = {}
        for cls in classes.values():
            headings |= {name: cls.heading for name in cls.model_fields if name not in fields}
            fields |= {name: field for name, field in cls.model_fields.items() if name not in fields}
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in classes]
        for name, field in fields.items():
            names = (field.json_schema_extra or {}).get("flags", ())
            if field.annotation is bool:  # without its --no-, which every default is
                names = (f"--{name.replace('_', '-')}",)
            own = name in config_class.model_fields
            under = (None if basic is None or name in basic else EXPERT) if own else headings[name]
            annotation = Annotated[_plain(field.annotation), option(*names, help=field.description, panel=under)]
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
