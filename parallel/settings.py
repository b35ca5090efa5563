"""Settings: fields of dataclasses and msgspec Structs whose annotations carry the allowed values and the help text.

    max_num_seqs: Annotated[int, Setting("Sequences that a group runs at a time.", ge=1)] = 64

The validation here, the command line's options, the keys of a job file and docs/settings.md are all derived from the
field. This module is in the lowest layer that has settings and imports nothing that is slow to load.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

MAX_SHOWN_CHARS = 100
"""Longest value that an error message repeats."""

T = TypeVar("T")


class SettingError(ValueError):
    """A value that a setting does not allow."""

    def __init__(self, name: str, message: str) -> None:
        """name: the setting, without the path to it."""
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Setting:
    """Metadata of a settings field: help text, range, and command line details."""

    help: str
    """One to three sentences, shown by `--help` and in docs/settings.md."""
    ge: float | None = None
    """Minimum of a number; `gt`, `le` and `lt` as in annotated-types and pydantic."""
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    short: str | None = None
    """Short form of the command line option."""
    metavar: str | None = None
    """Placeholder of the value in `--help`."""
    is_path: bool = False
    """Whether the text is a path, which is not blank and contains no NUL."""
    derived: str | None = None
    """Meaning of None where it is the default."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """A field of a settings class: name, type without `Annotated`, metadata, default."""

    name: str
    kind: Any
    setting: Setting
    default: Any
    """`dataclasses.MISSING` for a required field."""

    @property
    def allowed(self) -> str:
        """Description of the allowed values."""
        *others, last = (_described(kind, self.setting) for kind in alternatives(self.kind))
        return f"{', '.join(others)} or {last}" if others else last

    def check(self, value: object, path: str = "") -> None:
        """SettingError unless `value` is allowed. Types are strict: neither true nor "8" nor 8.0 is a whole number."""
        if type(value) is int and not _fits_64_bits(value):
            raise SettingError(self.name, f"{path}{self.name} must fit into 64 bits, got {shown(value)}")
        if not any(_matches(value, kind, self.setting) for kind in alternatives(self.kind)):
            raise SettingError(self.name, f"{path}{self.name} must be {self.allowed}, got {shown(value)}")


def declarations(cls: type) -> dict[str, Declaration]:
    """The settings of a class by name, inherited ones last. Fields without a `Setting` are left out."""
    return _read_annotations(cls)


@functools.cache
def _read_annotations(cls: type) -> dict[str, Declaration]:
    hints = get_type_hints(cls, include_extras=True)
    defaults = _defaults(cls)
    found = {}
    for name in sorted(defaults, key=lambda name: name not in cls.__annotations__):
        kind, *extras = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (None,)
        setting = next((extra for extra in extras if isinstance(extra, Setting)), None)
        if setting is not None:
            found[name] = Declaration(name, kind, setting, defaults[name])
    return found


def _defaults(cls: type) -> dict[str, Any]:
    """Default per field of a dataclass or Struct; `dataclasses.MISSING` for a required field."""
    if issubclass(cls, msgspec.Struct):
        return {f.name: MISSING if f.default is msgspec.NODEFAULT else f.default for f in msgspec.structs.fields(cls)}
    assert is_dataclass(cls)
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}


def check_settings(settings: Any) -> None:
    """SettingError for the first field of a settings object with a value that is not allowed. For `__post_init__`.

    Default values are not checked.
    """
    for name, declaration in declarations(type(settings)).items():
        value = getattr(settings, name)
        if value is not declaration.default:  # saves time: a request has twenty settings and few are not the default
            declaration.check(value)


def check_values(cls: type, values: Mapping[Any, Any], path: str = "") -> None:
    """ValueError for an unknown name, a missing required one, or a value that is not allowed.

    `path` is a prefix of the names in messages, for nested settings: "chat_template_kwargs.".
    """
    known = declarations(cls)
    refuse_unknown(values, known, path)
    for name, declaration in known.items():
        if name in values:
            declaration.check(values[name], path)
        elif declaration.default is MISSING:
            raise ValueError(f"{path}{name} is missing; give it ({declaration.setting.help.rstrip('.')})")


def build_settings(cls: type[T], values: Mapping[Any, Any], path: str = "") -> T:
    """Build settings from plain data, checked with `check_values`."""
    check_values(cls, values, path)
    return cls(**values)


def refuse_unknown(names: Iterable[object], known: Collection[str], path: str = "") -> None:
    """ValueError for an unknown name, with the nearest known one."""
    for name in names:
        if name not in known:
            raise ValueError(f"{path}{name} is not a known setting; {did_you_mean(str(name), known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name[:MAX_SHOWN_CHARS].replace("-", "_"), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"


def shown(value: object) -> str:
    """`repr` of a value, truncated to MAX_SHOWN_CHARS."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def _matches(value: object, kind: Any, setting: Setting) -> bool:
    origin = get_origin(kind)
    if kind in (None, types.NoneType):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return _fits_64_bits(value) and _in_range(value, setting)
    if kind is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return math.isfinite(value) and _in_range(value, setting)
    if kind is str:
        return isinstance(value, str) and (_is_path(value) if setting.is_path else value != "")
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is Sequence:
        (item,) = get_args(kind)
        return isinstance(value, list | tuple) and (item is Any or all(_matches(v, item, setting) for v in value))
    if origin is Mapping:
        return isinstance(value, Mapping)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return isinstance(value, kind | Mapping)  # the class that has the field builds it from a mapping
    assert is_dataclass(kind), f"settings of the type {kind} are not supported"
    return isinstance(value, kind)  # type: ignore[arg-type]


def _is_path(value: str) -> bool:
    return value.strip() != "" and "\0" not in value


def _fits_64_bits(value: int) -> bool:
    """Whether messages between processes can hold the number."""
    return -(2**63) <= value < 2**63


def _in_range(value: float, setting: Setting) -> bool:
    return (
        (setting.ge is None or value >= setting.ge)
        and (setting.gt is None or value > setting.gt)
        and (setting.le is None or value <= setting.le)
        and (setting.lt is None or value < setting.lt)
    )


def _described(kind: Any, setting: Setting) -> str:
    origin = get_origin(kind)
    if kind in (None, types.NoneType):
        return "null"
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _described_range(setting)
    if kind is str:
        return "a path" if setting.is_path else "non-empty text"
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin is Sequence:
        texts = "paths" if setting.is_path else "non-empty texts"
        items = {int: "whole numbers" + _described_range(setting), str: texts}
        return f"a list of {items.get(get_args(kind)[0], 'values')}"
    return "a mapping (key: value)"


def _described_range(setting: Setting) -> str:
    if setting.ge is not None and setting.le is not None:
        return f" between {setting.ge} and {setting.le}"
    limits = []
    if setting.ge is not None:
        limits.append(f"of at least {setting.ge}")
    if setting.gt is not None:
        limits.append(f"above {setting.gt}")
    if setting.le is not None:
        limits.append(f"at most {setting.le}")
    if setting.lt is not None:
        limits.append(f"below {setting.lt}")
    return f" {' and '.join(limits)}" if limits else ""
