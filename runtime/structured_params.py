"""The form that the text of an answer must have, as a request asks for it."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

from msgspec import Struct
from msgspec.structs import force_setattr

from shoal.parallel.settings import Setting, build_settings, check_settings

MAX_GRAMMAR_CHARS = 128 * 1024
"""Limit for a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 10_000
MAX_SCHEMA_DEPTH = 64
"""Limit for objects and lists within each other."""


class StructuredOutputsParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Exactly one field is given; a bad value is a ValueError that names it. Names and meanings are vLLM's."""

    json: Annotated[
        str | Mapping[str, Any] | None, Setting("JSON Schema, as an object or as text: the answer is valid JSON.")
    ] = None
    """Kept as text."""
    regex: Annotated[
        str | None, Setting("Regular expression (Rust's syntax, no lookaround) that the whole answer matches.")
    ] = None
    choice: Annotated[Sequence[str] | None, Setting("The answer is one of these texts.")] = None
    """Kept as a tuple."""
    grammar: Annotated[
        str | None, Setting("Context-free grammar in llguidance's variant of Lark; `start` is the answer.")
    ] = None
    json_object: Annotated[bool, Setting("The answer is some JSON object.")] = False

    def __post_init__(self) -> None:
        check_settings(self)
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"structured_outputs takes one of {', '.join(self.__struct_fields__)}, got {got}")
        if self.json is not None:
            force_setattr(self, "json", _schema_text(self.json))
        if self.choice is not None:
            force_setattr(self, "choice", _checked_choices(self.choice))
        for name in ("regex", "grammar"):
            if (text := getattr(self, name)) is not None:
                _check_text(name, text)

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in self.__struct_fields__ if getattr(self, name) not in (None, False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutputsParams:
        """Build from plain data; an unknown name is a ValueError that suggests the nearest known one."""
        return build_settings(cls, values, "structured_outputs.")


def check_depth(name: str, value: object, levels: int = MAX_SCHEMA_DEPTH) -> None:
    """ValueError, naming it, for JSON with too many objects and lists within each other."""
    if not isinstance(value, Mapping | list | tuple):
        return
    if not levels:
        raise ValueError(f"{name} is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    for inner in value.values() if isinstance(value, Mapping) else value:
        check_depth(name, inner, levels - 1)


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    if isinstance(schema, str):
        _check_size("json", len(schema))
        try:
            schema = json_format.loads(schema, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"structured_outputs.json is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ValueError("structured_outputs.json must be a JSON Schema, which is an object")
    check_depth("structured_outputs.json", schema)
    try:
        text = json_format.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"structured_outputs.json cannot be written as JSON: {error}") from error
    _check_text("json", text)
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _checked_choices(choices: Sequence[str]) -> tuple[str, ...]:
    if not 0 < len(choices) <= MAX_CHOICES:
        raise ValueError(f"structured_outputs.choice must have 1 to {MAX_CHOICES} texts, got {len(choices)}")
    _check_size("choice", sum(map(len, choices)))
    for choice in choices:
        _check_text("choice", choice)
    return tuple(choices)


def _check_text(name: str, text: str) -> None:
    _check_size(name, len(text))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"structured_outputs.{name} has a lone surrogate, which is not a character") from error


def _check_size(name: str, num_chars: int) -> None:
    if num_chars > MAX_GRAMMAR_CHARS:
        raise ValueError(
            f"structured_outputs.{name} has {num_chars} characters, at most {MAX_GRAMMAR_CHARS} are allowed"
        )
