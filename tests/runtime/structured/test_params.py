"""What a request may ask for, and how it travels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from shoal.runtime.structured_params import (
    MAX_CHOICES,
    MAX_GRAMMAR_CHARS,
    MAX_SCHEMA_DEPTH,
    StructuredOutputsParams,
)
from shoal.runtime.types import SamplingParams

SCHEMA = {"type": "object", "properties": {"ü": {"type": "integer"}, "a": {"const": 1.5}}}


def nested(depth: int) -> Any:
    schema: Any = True
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "structured_outputs takes one of json, regex, choice, grammar, json_object, got none of them"),
        ({"json_object": False}, "got none of them"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"jsn": {}}, r"structured_outputs\.jsn is not a known setting; did you mean json\?"),
        ({"json": ["a"]}, "json must be non-empty text, a mapping"),
        ({"json": "[]"}, r"structured_outputs\.json must be a JSON Schema, which is an object"),
        ({"json": "{"}, r"structured_outputs\.json is not JSON: Expecting property name"),
        ({"json": '{"maximum": NaN}'}, "NaN is not a JSON number"),
        ({"json": {"maximum": float("inf")}}, "cannot be written as JSON"),
        ({"json": {"const": {1}}}, "cannot be written as JSON"),
        ({"json": {"const": "\ud800"}}, r"structured_outputs\.json has a lone surrogate"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "nested more than 64 levels deep"),
        ({"json": "[" * 100_000}, r"structured_outputs\.json is not JSON"),
        ({"json": " " * (MAX_GRAMMAR_CHARS + 1)}, r"structured_outputs\.json has 131073 characters, at most 131072"),
        ({"regex": ""}, "regex must be non-empty text"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, r"structured_outputs\.regex has 131073 characters"),
        ({"regex": 5}, "regex must be non-empty text"),
        ({"grammar": "\udfff"}, r"structured_outputs\.grammar has a lone surrogate"),
        ({"choice": []}, r"structured_outputs\.choice must have 1 to 10000 texts, got 0"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "must have 1 to 10000 texts, got 10001"),
        ({"choice": ["a" * 70_000, "b" * 70_000]}, r"structured_outputs\.choice has 140000 characters"),
        ({"choice": ["a", ""]}, "choice must be a list of non-empty texts"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"json_object": "yes"}, "json_object must be true or false"),
    ],
)
def test_bad_values_are_named(form: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_dict({"structured_outputs": form})


def test_what_is_at_a_limit_is_fine() -> None:
    for form in (
        {"json": nested(MAX_SCHEMA_DEPTH)},
        {"regex": "a" * MAX_GRAMMAR_CHARS},
        {"choice": ["a" * 13] * MAX_CHOICES},
    ):
        assert SamplingParams.from_dict({"structured_outputs": form}).structured_outputs is not None


def test_a_form_says_where_the_answer_ends() -> None:
    with pytest.raises(ValueError, match="ignore_eos cannot be combined with structured_outputs"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match="structured_outputs must be a mapping"):
        SamplingParams.from_dict({"structured_outputs": "json"})


def test_a_schema_is_kept_as_text_in_the_order_of_its_keys() -> None:
    params = StructuredOutputsParams(json=SCHEMA)
    assert params.json == '{"type": "object", "properties": {"ü": {"type": "integer"}, "a": {"const": 1.5}}}'
    assert StructuredOutputsParams(json=json.dumps(SCHEMA)) == params
    assert StructuredOutputsParams(json=params.json) == params
    assert (params.kind, StructuredOutputsParams(json_object=True).kind) == ("json", "json_object")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aü☃ 0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab☃"), inner, max_size=3),
    max_leaves=8,
)
FORMS = st.one_of(
    st.builds(lambda schema: {"json": schema}, st.dictionaries(st.text("ab"), VALUES, max_size=3)),
    st.builds(lambda text: {"regex": text}, st.text("ab☃", min_size=1)),
    st.builds(lambda text: {"grammar": text}, st.text("ab☃", min_size=1)),
    st.builds(lambda texts: {"choice": texts}, st.lists(st.text("ab☃", min_size=1), min_size=1, max_size=3)),
    st.just({"json_object": True}),
)


@given(FORMS)
def test_forms_survive_the_wire(form: dict[str, Any]) -> None:
    """Whole numbers of any size, too: the schema travels as text."""
    params = SamplingParams.from_dict({"structured_outputs": form})
    received = msgpack.decode(msgpack.encode(params), type=SamplingParams)
    assert received == params
    assert msgpack.encode(received) == msgpack.encode(params)
    if "json" in form:
        assert received.structured_outputs is not None
        assert isinstance(received.structured_outputs.json, str)
        assert json.loads(received.structured_outputs.json) == form["json"]
