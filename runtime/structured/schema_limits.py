"""Limits for JSON Schemas that would take seconds, or all memory, to compile; llguidance has none for these.

They count what a schema has, so that a schema is refused on every machine or on none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

MAX_PROPERTIES = 1000
"""Per object; compiling takes time in the square of it."""
MAX_PATTERN_PROPERTIES = 32
"""Per object; each is compared with each."""
MAX_MERGED_REGEXES = 6
"""Patterns, formats and length limits for one text; the states of their intersection multiply."""
MAX_MULTIPLE = 10_000
"""Product of the different multipleOf of a schema, without powers of 10: a state machine has a state per remainder."""

_REGEXES = ("pattern", "format", "minLength")
_MERGED = ("allOf", "anyOf", "oneOf", "$ref")
"""Keywords whose schemas apply to the same value."""
_DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
_DEFINITIONS = ("$defs", "definitions")
"""Keywords whose schemas apply only where a `$ref` names them."""


def check_schema(schema: Mapping[str, Any]) -> None:
    """ValueError for a schema that is above a limit."""
    multiple = 1
    for coefficient in {_coefficient(s["multipleOf"]) for s in _subschemas(schema) if "multipleOf" in s}:
        multiple *= coefficient
    if multiple > MAX_MULTIPLE:
        raise ValueError(
            f"the values of multipleOf, without powers of 10, have the product {multiple}, at most {MAX_MULTIPLE} is "
            "supported"
        )
    for subschema in _subschemas(schema):
        for name, limit in (("properties", MAX_PROPERTIES), ("patternProperties", MAX_PATTERN_PROPERTIES)):
            if (count := _length(subschema.get(name))) > limit:
                raise ValueError(f"an object has {count} {name}, at most {limit} are supported")
    if (count := _MergedRegexes(schema).count(schema)) > MAX_MERGED_REGEXES:
        raise ValueError(
            f"up to {count} patterns, formats and lengths apply to one text, at most {MAX_MERGED_REGEXES} are supported"
        )


def _subschemas(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a schema that may be a schema, the schema itself first."""
    if isinstance(value, Mapping):
        yield value
        for name, inner in value.items():
            if name not in _DATA:
                yield from _subschemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _subschemas(inner)


def _length(value: object) -> int:
    return len(value) if isinstance(value, Mapping) else 0


def _coefficient(value: object) -> int:
    """The digits of a number without zeros at the end; 1 for what is no number, which llguidance refuses."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 1
    return max(1, int("".join(map(str, Decimal(repr(value)).as_tuple().digits)).strip("0") or "1"))


_APART = (*_MERGED, *_DATA, *_DEFINITIONS)


class _MergedRegexes:
    """Counts how many regular expressions of a schema may apply to one text."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._counts: dict[int, int] = {}

    def count(self, schema: object) -> int:
        """An upper bound; 0 within itself, for a schema that refers to itself."""
        if isinstance(schema, list):
            return max(map(self.count, schema), default=0)
        if not isinstance(schema, Mapping):
            return 0
        if id(schema) not in self._counts:
            self._counts[id(schema)] = 0
            self._counts[id(schema)] = self._count(schema)
        return self._counts[id(schema)]

    def _count(self, schema: Mapping[str, Any]) -> int:
        own = sum(name in schema for name in _REGEXES) + ("maxLength" in schema and "minLength" not in schema)
        within = [self.count(value) for name, value in schema.items() if name not in _APART]
        merged = sum(map(self.count, _list(schema.get("allOf"))))
        merged += self.count(_list(schema.get("anyOf"))) + self.count(_list(schema.get("oneOf")))
        return max(own, *within, 0) + merged + self.count(self._target(schema.get("$ref")))

    def _target(self, reference: object) -> object:
        """What a reference within the schema refers to; None for others."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        target: object = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        return target


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
