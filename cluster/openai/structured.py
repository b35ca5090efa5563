"""Fields that ask for the form of an answer: OpenAI's `response_format`, vLLM's `structured_outputs`, `guided_*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.runtime.structured_params import StructuredOutputsParams

from .errors import ApiError, json_type
from .fields import FORM_FIELDS, check_fields, shown, without_nulls

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def read_form(values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The fields of a request with the form of the answer as `structured_outputs` alone, and the field that gave it.

    A request may leave the form out, or give it once. ApiError names what is wrong.
    """
    given = [
        name for name in sorted({"structured_outputs", *FORM_FIELDS} & values.keys()) if not _is_text(name, values)
    ]
    others = {name: value for name, value in values.items() if name not in FORM_FIELDS}
    if not given:
        return others | ({"structured_outputs": None} if "response_format" in values else {}), None
    if len(given) > 1:
        raise ApiError("invalid_parameter", f"give one of {' and '.join(given)}, not both", given[0])
    field = given[0]
    form = _form(field, values[field])
    try:
        return others | {"structured_outputs": StructuredOutputsParams.from_dict(form)}, field
    except ValueError as error:
        raise ApiError("invalid_grammar", str(error), field) from error


def _is_text(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a field asks for no form."""
    return name == "response_format" and values[name] == {"type": "text"}


def _form(field: str, value: Any) -> dict[str, Any]:
    """`structured_outputs` as plain data."""
    if field in _GUIDED:
        return {_GUIDED[field]: value}
    if not isinstance(value, Mapping):
        raise ApiError("invalid_type", f"{field} must be an object, got {json_type(value)}", field)
    return without_nulls(value) if field == "structured_outputs" else _response_format(value)


def _response_format(value: Mapping[str, Any]) -> dict[str, Any]:
    check_fields(value, ("type", "json_schema"), "response_format.")
    kind = value.get("type")
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        message = f"response_format.type must be one of text, json_object, json_schema, got {shown(kind)}"
        raise ApiError("invalid_parameter", message, "response_format.type")
    asked = value.get("json_schema")
    if not isinstance(asked, Mapping):
        message = f"response_format.json_schema must be an object, got {json_type(asked)}"
        raise ApiError("invalid_type", message, "response_format.json_schema")
    check_fields(asked, ("name", "description", "schema", "strict"), "response_format.json_schema.")
    schema = asked.get("schema")
    if not isinstance(schema, Mapping):
        message = f"response_format.json_schema.schema must be an object, got {json_type(schema)}"
        raise ApiError("invalid_type", message, "response_format.json_schema.schema")
    return {"json": schema}
