"""Limits for JSON Schemas that would take seconds, or all memory, to compile; llguidance has none for these.

They count what a schema has, so that a schema is refused on every machine or on none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

MAX_PROPERTIES = 1000
"""Per object; compiling takes time in the square of it."""
MAX_PATTERN_PROPERTIES = 64
"""In all objects together; within an object each is compared with each."""
MAX_MERGED_REGEXES = 6
"""Patterns, formats and length limits for one text; the states of their intersection multiply."""
MAX_MULTIPLE = 10_000
"""Product of the different multipleOf of a schema, without powers of 10: a state machine has a state per remainder."""
MAX_LEVELS = 400
"""Schemas within each other, through references, too: llguidance needs stack for each."""

_REGEXES = ("pattern", "format", "minLength")
_MERGED = ("allOf", "anyOf", "oneOf", "$ref")
"""Keywords whose schemas apply to the same value."""
_NOT_APPLIED = ("const", "enum", "default", "examples", "$defs", "definitions")
"""Keywords whose values are data, or schemas that apply only where a `$ref` names them."""
_MAPS = ("properties", "patternProperties")
"""Keywords whose values are objects with schemas."""


def check_schema(schema: Mapping[str, Any]) -> None:
    """ValueError for a schema that is above a limit."""
    objects = list(_objects(schema))
    multiple = math.prod({_coefficient(o["multipleOf"]) for o in objects if "multipleOf" in o})
    if multiple > MAX_MULTIPLE:
        raise ValueError(
            f"the values of multipleOf, without powers of 10, have the product {multiple}, at most {MAX_MULTIPLE} is "
            "supported"
        )
    if (count := max(_length(o.get("properties")) for o in objects)) > MAX_PROPERTIES:
        raise ValueError(f"an object has {count} properties, at most {MAX_PROPERTIES} are supported")
    if (count := sum(_length(o.get("patternProperties")) for o in objects)) > MAX_PATTERN_PROPERTIES:
        raise ValueError(f"there are {count} patternProperties, at most {MAX_PATTERN_PROPERTIES} are supported")
    if (count := _MergedRegexes(schema).count(schema)) > MAX_MERGED_REGEXES:
        raise ValueError(
            f"up to {count} patterns, formats and lengths apply to one text, at most {MAX_MERGED_REGEXES} are supported"
        )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a schema, the schema itself first: all its schemas, and others."""
    if isinstance(value, Mapping):
        yield value
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _objects(inner)


def _length(value: object) -> int:
    return len(value) if isinstance(value, Mapping) else 0


def _coefficient(value: object) -> int:
    """The digits of a number without zeros at the end; 1 for what is no number, which llguidance refuses."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 1
    return max(1, int("".join(map(str, Decimal(repr(value)).as_tuple().digits)).strip("0") or "1"))


class _MergedRegexes:
    """Counts how many regular expressions of a schema may apply to one text."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._counts: dict[int, int] = {}

    def count(self, schema: object, level: int = 0) -> int:
        """An upper bound; 0 within itself, for a schema that refers to itself."""
        if level > MAX_LEVELS:
            raise ValueError(f"its schemas are more than {MAX_LEVELS} levels deep, with what they refer to")
        if not isinstance(schema, Mapping):
            return 0
        if id(schema) in self._counts:
            return self._counts[id(schema)]
        self._counts[id(schema)] = 0
        here = sum(name in schema for name in _REGEXES) + ("maxLength" in schema and "minLength" not in schema)
        for inner in _inner(schema):
            here = max(here, self.count(inner, level + 1))
        for same in _list(schema.get("allOf")):
            here += self.count(same, level + 1)
        for options in (_list(schema.get("anyOf")), _list(schema.get("oneOf"))):
            most = 0
            for option in options:
                most = max(most, self.count(option, level + 1))
            here += most
        here += self.count(self._target(schema.get("$ref")), level + 1)
        self._counts[id(schema)] = here
        return here

    def _target(self, reference: object) -> object:
        """What a reference within the schema refers to; None for others."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        target: object = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        return target


def _inner(schema: Mapping[str, Any]) -> list[object]:
    """The schemas of a schema that apply to other values than it does, and what is no schema."""
    found: list[object] = []
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, Mapping):
            found += value.values()
        elif name not in (*_MERGED, *_NOT_APPLIED):
            found += value if isinstance(value, list) else [value]
    return found


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
