"""Tools as TypeScript declarations, the way in which Kimi K2.5 reads them.

namespace functions {
// Predicted height of the tide.
type tide_height = (_: {
  // Name of the port
  port: string,
  hour?: number
}) => any;
}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_INDENT = "  "
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION_TYPES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}


def declare_functions(functions: Iterable[Mapping[str, Any]]) -> str | None:
    """The declarations, or None for schemas with parts that they cannot show (`oneOf`, foreign references, ...)."""
    try:
        declarations = [_Declaration(function).text() for function in functions]
    except (KeyError, TypeError, AttributeError, _UnknownSchemaError):
        return None
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(declarations) + "\n}\n"


class _UnknownSchemaError(Exception):
    pass


class _Declaration:
    """One function, and the named types that its schema defines on the way."""

    def __init__(self, function: Mapping[str, Any]) -> None:
        self._function = function
        self._definitions: dict[str, Any] = {}
        self._refers_to_itself = False

    def text(self) -> str:
        """The interfaces that the parameters refer to, the description and the type of the function."""
        schema = self._function.get("parameters") or {}
        parameters = self._object(schema, "")
        lines = []
        if self._refers_to_itself:
            properties = schema.get("properties") or {}
            fields = [self._field(name, field, schema, _INDENT) for name, field in properties.items()]
            lines.append(f"interface parameters {_braces(fields, '')}")
            parameters = "parameters"
        for name, definition in list(self._definitions.items()):
            lines += _comment_lines(definition.get("description"), "")
            lines.append(f"interface {name} {self._type(definition, '')}")
        lines += _comment_lines(self._function.get("description"), "")
        lines.append(f"type {self._function['name']} = (_: {parameters}) => any;")
        return "\n".join(lines)

    def _type(self, schema: Any, indent: str) -> str:
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if schema == {}:
            return "any"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join(self._type(option, indent) for option in schema["anyOf"])
        if "enum" in schema:
            return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])
        kind = schema["type"]
        if isinstance(kind, list):
            return " | ".join(_UNION_TYPES[option] for option in kind)
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema, indent)
        return "number" if kind == "integer" else str(kind)

    def _reference(self, reference: str) -> str:
        if reference == "#":
            self._refers_to_itself = True
            return "parameters"
        name = reference.removeprefix("#/$defs/")
        if name not in self._definitions:
            raise _UnknownSchemaError(reference)
        return name

    def _object(self, schema: Mapping[str, Any], indent: str) -> str:
        self._definitions.update(schema.get("$defs") or {})
        properties = schema.get("properties") or {}
        required = schema.get("required") or ()
        names = sorted(properties, key=lambda name: (name not in required, name))
        fields = [self._field(name, properties[name], schema, indent + _INDENT) for name in names]
        others = schema.get("additionalProperties")
        if others is not None:
            other_type = "never" if others is False else self._type(others, indent + _INDENT)
            fields.append(f"{indent}{_INDENT}[k: string]: {other_type}")
        return _braces(fields, indent)

    def _field(self, name: str, schema: Any, parent: Mapping[str, Any], indent: str) -> str:
        lines = _comments(schema, indent)
        default = schema.get("default") if isinstance(schema, Mapping) else None
        if default is not None:
            is_number = isinstance(default, int | float)
            lines.append(f"{indent}// Default: {default if is_number else json.dumps(default, ensure_ascii=False)}")
        mark = "" if name in (parent.get("required") or ()) else "?"
        return "\n".join([*lines, f"{indent}{name}{mark}: {self._type(schema, indent)}"])

    def _array(self, schema: Mapping[str, Any], indent: str) -> str:
        item = schema.get("items") or {}
        inner = indent + _INDENT
        comments = _comments(item, inner)
        if not comments:
            return f"Array<{self._type(item, indent)}>"
        return "\n".join(["Array<", *comments, f"{inner}{self._type(item, inner)}", f"{indent}>"])


def _braces(fields: Sequence[str], indent: str) -> str:
    return "{\n" + ",\n".join(fields) + "\n" + indent + "}" if fields else "{}"


def _comments(schema: Any, indent: str) -> list[str]:
    """The description and the constraints of a schema as lines of comments."""
    if not isinstance(schema, Mapping):
        return []
    lines = _comment_lines(schema.get("description"), indent)
    is_plain = not {"$ref", "anyOf", "enum"} & schema.keys() and isinstance(schema.get("type"), str)
    names = _CONSTRAINTS.get(schema["type"], ()) if is_plain else ()
    constraints = [f"{name}: {schema[name]}" for name in names if name in schema]
    return [*lines, f"{indent}// {', '.join(constraints)}"] if constraints else lines


def _comment_lines(text: str | None, indent: str) -> list[str]:
    return [f"{indent}// {line}" if line else "" for line in text.split("\n")] if text else []
