"""JSON types that tools declare for their parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .json_arguments import json_type

Types = frozenset[str]
STRING: Types = frozenset({"string"})
MAX_REFERENCES = 8
"""One after the other; a schema may refer to itself."""


def parameter_types(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Types | None]]:
    """Per tool and parameter, what `declared_types` finds in its schema."""
    types = {}
    for tool in tools:
        function = _mapping(tool.get("function"))
        parameters = _mapping(function.get("parameters"))
        properties = _mapping(parameters.get("properties"))
        types[str(function.get("name"))] = {str(k): declared_types(v, parameters) for k, v in properties.items()}
    return types


def resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a schema refers to within `root`, or the schema itself."""
    found = _mapping(schema)
    for _ in range(MAX_REFERENCES):
        reference = found.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for part in reference.split("/")[1:]:
            target = _mapping(target).get(part.replace("~1", "/").replace("~0", "~"))
        found = _mapping(target)
    return found


def declared_types(schema: Any, root: Mapping[str, Any]) -> Types | None:
    """JSON Schema's names of the types that a schema within `root` allows; None if it does not say."""
    schema = resolved(schema, root)
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset([declared])
    if isinstance(declared, list):
        return frozenset(map(str, declared))
    if isinstance(values := schema.get("enum"), list):
        return frozenset(str(json_type(json.dumps(value))) for value in values)
    members = schema.get("anyOf", schema.get("oneOf"))
    types = [declared_types(member, root) for member in members] if isinstance(members, list) else []
    known = [t for t in types if t is not None]
    return frozenset[str]().union(*known) if known and len(known) == len(types) else None


def is_value(text: str, types: Types | None) -> bool:
    """Whether the text of an argument is JSON that stands for itself; otherwise it is a string.

    Declared types without string take any JSON. A string among others leaves what the others allow. Without declared
    types, all JSON but a string stands for itself.
    """
    found = json_type(text)
    if found is None:
        return False
    if types is None:
        return found != "string"
    if "string" not in types:
        return True
    return found != "string" and (found in types or (found == "integer" and "number" in types))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
