"""Command line options derived from settings, and exit statuses of commands and errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import click

from shoal.parallel.settings import Declaration, alternatives, build_settings, declarations

from ..exit_codes import ExitCode
from ..report import EnginesFailed

Command = Callable[..., Any]
T = TypeVar("T")


def options(*classes: type, leave_out: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Decorator that adds an option for every setting of the classes; options that are not given are None."""
    known: dict[str, Declaration] = {}
    for cls in classes:
        known |= declarations(cls)
    made = [_option(declaration) for name, declaration in known.items() if name not in leave_out]

    def add(command: Command) -> Command:
        for option in reversed(made):
            if option is not None:
                command = option(command)
        return command

    return add


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None, which the user gave."""
    return {name: value for name, value in values.items() if value is not None}


def take(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build settings of `cls` from its options among those the user gave; ValueError names a bad value."""
    return build_settings(cls, {name: value for name, value in given(values).items() if name in declarations(cls)})


def exits(command: Callable[..., int]) -> Callable[..., NoReturn]:
    """Decorator that exits with a command's status; errors of the user are printed as one line on stderr."""

    @functools.wraps(command)
    def run(**arguments: Any) -> NoReturn:
        try:
            status = command(**arguments)
        except (ValueError, OSError, EnginesFailed) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            status = _status(error)
        except KeyboardInterrupt:
            # Commands that drain handle signals themselves; here nothing has started yet.
            status = ExitCode.INTERRUPTED
        sys.exit(int(status))

    return run


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _status(error: Exception) -> ExitCode:
    if isinstance(error, EnginesFailed):
        return ExitCode.ENGINE
    # If the module raised the error, it is loaded already; a usage error must not load Ray.
    module = sys.modules.get("shoal.cluster.workers.ray_cluster")
    is_layout = module is not None and isinstance(error, module.LayoutDoesNotFit)
    return ExitCode.LAYOUT if is_layout else ExitCode.USAGE


def _option(declaration: Declaration) -> Callable[[Command], Command] | None:
    """A click option; None for a mapping, which can be set only in a file or from Python."""
    name, setting = declaration.name, declaration.setting
    kinds = [kind for kind in alternatives(declaration.kind) if kind is not type(None)]
    flag = f"--{name.replace('_', '-')}"
    common: dict[str, Any] = {"default": None, "help": setting.help + _default(declaration)}
    if kinds == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", **common)
    if any(get_origin(kind) is Sequence for kind in kinds):
        kind, common["multiple"], common["callback"] = str, True, _one_or_many
    else:
        kind = str if str in kinds else kinds[0]
    if kind not in (str, int, float) and get_origin(kind) is not Literal:
        return None
    if kind in (str, int, float):
        common["type"] = kind
        common["metavar"] = setting.metavar or {str: "TEXT", int: "N", float: "X"}[kind]
    else:
        common["type"] = click.Choice(get_args(kind))
    names = [flag] if setting.short is None else [flag, setting.short]
    return click.option(*names, **common)


def _default(declaration: Declaration) -> str:
    if declaration.setting.derived is not None:
        return f" [default: {declaration.setting.derived}]"
    if declaration.default in (None, MISSING):
        return ""
    default = declaration.default
    return f" [default: {str(default).lower() if isinstance(default, bool) else default}]"


def _one_or_many(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> int | list[str] | None:
    """A single number as an int, everything else as a list."""
    if len(values) == 1 and values[0].isascii() and values[0].isdecimal():
        return int(values[0])
    return list(values) or None
