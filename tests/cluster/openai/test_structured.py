"""Fields that ask for the form of an answer: what they mean, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.cluster.jobs.input.bad_row import BadRow
from shoal.cluster.jobs.rows import read_row
from shoal.cluster.openai.errors import ApiError
from shoal.cluster.openai.requests import ParsedRequest, RequestDefaults, parse_chat, parse_completion
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.structured_params import StructuredOutputsParams
from tests.support.batch_input import first_row
from tests.support.structured import byte_tokenizer
from tests.support.stub_job import RULES, ByteEncoder

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> RequestDefaults:
    """Forms are compiled, too."""
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return RequestDefaults(
        limits=RequestLimits(vocab_size=512, max_model_len=128),
        encoder=ByteEncoder(),
        tokenizer=tokenizer,
        structured_outputs=StructuredOutputs(tokenizer, 512),
    )


def parse_everywhere(fields: dict[str, Any], rules: RequestDefaults) -> list[ParsedRequest]:
    """As chat, as completion, and as rows of a batch: plain, nested, and in OpenAI's form."""

    def row(value: dict[str, Any]) -> ParsedRequest:
        data = json.dumps(value).encode()
        return read_row(first_row(data), rules).parsed

    chat = {"messages": MESSAGES, **fields}
    return [
        parse_chat(chat, rules),
        parse_completion({"prompt": "x", **fields}, rules),
        row({"prompt": "x", **fields}),
        row({"messages": MESSAGES, "sampling_params": fields}),
        row({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat}),
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            {"json": SCHEMA},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"], "guided_json": None}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'start: "x"'}, {"grammar": 'start: "x"'}),
    ],
)
def test_every_way_to_ask_means_the_same(
    rules: RequestDefaults, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    for parsed in parse_everywhere(fields, rules):
        assert parsed.params.structured_outputs == StructuredOutputsParams(**expected)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
def test_without_a_form(rules: RequestDefaults, fields: dict[str, Any]) -> None:
    for parsed in parse_everywhere(fields, rules):
        assert parsed.params.structured_outputs is None


def test_a_request_goes_before_the_defaults(rules: RequestDefaults) -> None:
    defaults = RequestDefaults(
        limits=rules.limits,
        encoder=rules.encoder,
        sampling={"structured_outputs": {"regex": "a"}},
        structured_outputs=rules.structured_outputs,
    )
    default = StructuredOutputsParams(regex="a")
    assert parse_completion({"prompt": "x"}, defaults).params.structured_outputs == default
    asked = parse_completion({"prompt": "x", "guided_choice": ["b"]}, defaults)
    assert asked.params.structured_outputs == StructuredOutputsParams(choice=["b"])
    free = parse_completion({"prompt": "x", "response_format": {"type": "text"}}, defaults)
    assert free.params.structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        ({"response_format": "json"}, "invalid_type", "response_format", "must be an object, got a string"),
        ({"response_format": {"type": "xml"}}, "invalid_parameter", "response_format.type", "json_schema, got 'xml'"),
        ({"response_format": {}}, "invalid_parameter", "response_format.type", "text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "invalid_type", "response_format.json_schema", "got null"),
        (
            {"response_format": {"type": "json_schema", "schema": {}}},
            "unknown_field",
            "response_format.schema",
            "did you mean json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "invalid_type",
            "response_format.json_schema.schema",
            "must be an object, got null",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strct": True}}},
            "unknown_field",
            "response_format.json_schema.strct",
            "did you mean strict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "invalid_grammar",
            "response_format",
            'Unimplemented keys: ["not"]',
        ),
        ({"guided_regex": "("}, "invalid_grammar", "guided_regex", "unclosed group"),
        ({"guided_choice": "yes"}, "invalid_grammar", "guided_choice", "choice must be a list"),
        ({"structured_outputs": ["a"]}, "invalid_type", "structured_outputs", "must be an object, got a list"),
        ({"structured_outputs": {"jsn": {}}}, "invalid_grammar", "structured_outputs", "did you mean json"),
        (
            {"structured_outputs": {"grammar": "x"}},
            "invalid_grammar",
            "structured_outputs",
            "structured_outputs.grammar",
        ),
        (
            {"guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}},
            "invalid_parameter",
            "guided_json",
            "give one of guided_json and structured_outputs, not both",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "invalid_parameter", None, "ignore_eos cannot be combined"),
    ],
)
def test_errors_name_the_field(
    rules: RequestDefaults, fields: dict[str, Any], code: str, param: str | None, message: str
) -> None:
    with pytest.raises(ApiError) as error:
        parse_chat({"messages": MESSAGES, **fields}, rules)
    assert (error.value.code, error.value.param) == (code, param)
    assert message in error.value.message
    data = json.dumps({"custom_id": "a", "prompt": "x", **fields}).encode()
    with pytest.raises(BadRow) as bad:
        read_row(first_row(data), rules)
    assert bad.value.code == code


def test_a_default_that_cannot_be_enforced_is_an_error_of_the_row(rules: RequestDefaults) -> None:
    defaults = RequestDefaults(
        limits=rules.limits,
        encoder=rules.encoder,
        sampling={"structured_outputs": {"json": {"uniqueItems": True}}},
        structured_outputs=rules.structured_outputs,
    )
    with pytest.raises(ApiError, match="uniqueItems") as error:
        parse_completion({"prompt": "x"}, defaults)
    assert (error.value.code, error.value.param) == ("invalid_grammar", None)


def test_without_a_tokenizer_the_engines_are_asked() -> None:
    assert parse_completion({"prompt": "x", "guided_regex": "("}, RULES).params.structured_outputs is not None


def test_a_schema_above_the_limit_is_a_bad_row(rules: RequestDefaults) -> None:
    schema = {"enum": ["x" * 1000] * 200}
    with pytest.raises(ApiError, match="at most 131072 are allowed"):
        parse_completion({"prompt": "x", "guided_json": schema}, rules)
