"""Flags made from the config classes: one field, one flag, one help line, one default. --help shows the basic ones."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import typer
import typer.core
from pydantic.fields import FieldInfo
from rich.markup import escape
from typer.exceptions import TyperException

from sparsebert.config import Settings, validated

EXPERT = "Expert options"
HELP = ["-h", "--help", "--help-all"]  # where there is nothing more to show


def option(*names: str, help: str, panel: str | None = None, **more):
    """A flag whose help is plain text: "[default: …]" would else be markup of rich, and vanish."""
    return typer.Option(*names, help=escape(help), rich_help_panel=panel, **more)


class _Helpful:
    """Names the flags of help in one order; Click takes them from a set."""

    def get_help_option_names(self, ctx: typer.Context) -> list[str]:
        return sorted(super().get_help_option_names(ctx), key=len)


class _Group(_Helpful, typer.core.TyperGroup):
    pass


class Commands(typer.Typer):
    """A Typer whose commands have a short --help (`Command`)."""

    def __init__(self, **settings):
        super().__init__(cls=_Group, context_settings={"help_option_names": HELP}, **settings)

    def command(self, name: str | None = None, **settings) -> Callable:
        return super().command(name, cls=Command, **settings)


class Command(_Helpful, typer.core.TyperCommand):
    """A command whose --help shows the flags under no heading; --help-all shows the others too, or is the same."""

    def __init__(self, *values, **settings):
        super().__init__(*values, **settings)
        short = any(param.rich_help_panel is not None for param in self.params)
        self.context_settings["help_option_names"] = HELP[:2] if short else HELP

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        try:
            self._require_once(ctx, args)
            return super().parse_args(ctx, args)
        except TyperException as error:
            error.ctx = getattr(error, "ctx", None) or ctx  # an option without its value does not know its command
            raise

    def _require_once(self, ctx: typer.Context, args: list[str]) -> None:
        """BadParameter for an option of one value that is given twice: the first one would be dropped."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param, times in Counter(given).items():
            if times > 1 and not (param.param_type_name == "argument" or param.is_flag or param.multiple):
                raise typer.BadParameter("is given twice, and takes one value", ctx, param)

    def format_help(self, ctx: typer.Context, formatter) -> None:
        short = copy.copy(self)
        short.params = [param for param in self.params if param.rich_help_panel is None]
        if len(short.params) < len(self.params):
            short.epilog = f"all options: {ctx.command_path} --help-all"
        typer.core.TyperCommand.format_help(short, ctx, formatter)


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.core.TyperCommand.format_help(ctx.command, ctx, ctx.make_formatter())
        raise typer.Exit


HELP_ALL = option("--help-all", is_eager=True, callback=_show_all, help="show all options and stop")


def flags(basic: tuple[str, ...] | None = None, **classes: type[Settings]) -> Callable:
    """Decorates a command: where it takes an argument that `classes` names, it gets flags, one for each field of that
    class, which are validated together.

    A class with a heading has its flags listed under it. basic: fields of `config` whose flags are listed first (None:
    all); its others are expert options. A field that two classes have is one flag, described by the first. If there are
    flags under a heading, there is --help-all.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(help_all: bool = False, **values):
            given = {name: values.pop(name) for name in fields}
            configs = {
                argument: validated(cls, {name: given[name] for name in cls.model_fields})
                for argument, cls in classes.items()
            }
            return command(**configs, **values)

        fields: set[str] = set()
        parameters, grouped = [], False
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            cls = classes.get(parameter.name)
            if cls is None:
                parameters.append(parameter)
                continue
            new = {name: field for name, field in cls.model_fields.items() if name not in fields}
            fields |= new.keys()
            for name, field in new.items():
                expert = parameter.name == "config" and basic is not None and name not in basic
                first = parameter.name == "config" and basic is not None and not expert
                under = EXPERT if expert else None if first else cls.heading or None
                parameters.append(_parameter(name, field, under, cls.variables))
                grouped |= under is not None
        if grouped:
            parameters.append(
                inspect.Parameter(
                    "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, HELP_ALL]
                )
            )
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # typer would read the command's own signature through it
        return run

    return decorate


def _parameter(name: str, field: FieldInfo, under: str | None, variables: str | None) -> inspect.Parameter:
    """The flag of a field, listed under a heading. variables: what the environment variables begin with that stand for
    flags.
    """
    names = (field.json_schema_extra or {}).get("flags", ())
    if field.annotation is bool:  # without its --no-, which every default is
        names = (f"--{name.replace('_', '-')}",)
    more = {} if variables is None else {"envvar": f"{variables}{name.upper()}", "show_envvar": False}
    annotation = Annotated[_plain(field.annotation), option(*names, help=field.description, panel=under, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=annotation)


def _default(field: FieldInfo):
    if field.is_required():
        return inspect.Parameter.empty
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
