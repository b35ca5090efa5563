"""Bodies of requests: defaults, limits and the field that an error names. Rows of batch files test the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.openai.errors import ApiError
from shoal.cluster.openai.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    FIELDS_WITHOUT_EFFECT,
    FORM_FIELDS,
    UNSUPPORTED_FIELDS,
)
from shoal.cluster.openai.requests import RequestDefaults, parse_chat, parse_completion
from shoal.runtime.chat.prompt import ChatPrompt, OutputFormat
from shoal.runtime.types import SamplingParams
from tests.support.stub_job import RULES

DOCUMENT = Path(__file__).parents[3] / "docs" / "request-fields.md"
MESSAGES = [{"role": "user", "content": "hi"}]


def test_a_field_stands_in_one_part_of_the_table() -> None:
    known = CHAT_FIELDS | COMPLETION_FIELDS
    assert not known & FIELDS_WITHOUT_EFFECT
    assert not known & UNSUPPORTED_FIELDS.keys()
    assert not FIELDS_WITHOUT_EFFECT & UNSUPPORTED_FIELDS.keys()
    assert set(SamplingParams.__struct_fields__) <= known


@pytest.mark.docs
def test_the_document_lists_every_field() -> None:
    sampling = set(SamplingParams.__struct_fields__)

    def names(values: set[str] | frozenset[str]) -> str:
        return ", ".join(f"`{name}`" for name in sorted(values))

    lines = [
        "# Fields of requests",
        "",
        "The fields of OpenAI's chat completions and completions, in a batch file's `body` and in plain rows. A field",
        "that is null counts as not given, and whole numbers may be written as 16 or 16.0. `make docs` writes this",
        "page from the table that the code reads.",
        "",
        f"- Sampling: {names(sampling)}.",
        f"- Other ways to write `structured_outputs`: {names(FORM_FIELDS)}.",
        f"- Chat only: {names(CHAT_FIELDS - sampling - FORM_FIELDS)}.",
        f"- Completions only: {names(COMPLETION_FIELDS - sampling - FORM_FIELDS)}.",
        f"- Accepted without effect: {names(FIELDS_WITHOUT_EFFECT)}.",
        "",
        "Sampling fields that a request leaves out come from the job's `sampling`, then from the model's",
        "generation_config.json (`generation_config: none` turns that off), then from `SamplingParams`.",
        "",
        "With thinking on, stop strings apply to the answer and not to the reasoning before it, unless",
        "`stop_in_reasoning` is true.",
        "",
        "The form of an answer, of which a request has at most one: [structured-outputs.md](structured-outputs.md).",
        "",
        "Any other field is an error that names it and the nearest known one. These are refused unless their value",
        "asks for nothing:",
        "",
        "| field | accepted values | otherwise |",
        "|---|---|---|",
    ]
    for name, field in sorted(UNSUPPORTED_FIELDS.items()):
        accepted = ", ".join(f"`{json.dumps(value)}`" for value in (*field.harmless, None))
        lines.append(f"| `{name}` | {accepted} | {field.advice} |")
    text = "\n".join(lines) + "\n"
    if os.environ.get("SHOAL_WRITE_DOCS"):
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text, "run `make docs`"


def test_chat_goes_up_to_the_context_and_completions_to_16_tokens() -> None:
    assert parse_chat({"messages": MESSAGES}, RULES).params.max_tokens is None
    assert parse_completion({"prompt": "x"}, RULES).params.max_tokens == 16
    limited = RequestDefaults(limits=RULES.limits, encoder=RULES.encoder, sampling={"max_tokens": 5})
    assert parse_chat({"messages": MESSAGES}, limited).params.max_tokens == 5
    assert parse_chat({"messages": MESSAGES, "max_completion_tokens": 6}, limited).params.max_tokens == 6
    assert parse_completion({"prompt": "x"}, limited).params.max_tokens == 5


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": MESSAGES, "temprature": 1}, "unknown_field", "temprature"),
        ({"messages": MESSAGES, "reasoning_effort": "most"}, "invalid_parameter", "reasoning_effort"),
        ({"messages": MESSAGES, "n": True}, "invalid_parameter", "n"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "invalid_parameter", "tool_choice"),
        ({"messages": MESSAGES, "best_of": True}, "unsupported_field", "best_of"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": MESSAGES, "logprobs": 5}, "invalid_type", "logprobs"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"model": 1}}, "unknown_field", "chat_template_kwargs.model"),
    ],
)
def test_errors_name_the_field(body: dict[str, Any], code: str, param: str | None) -> None:
    with pytest.raises(ApiError) as error:
        parse_chat(body, RULES)
    assert (error.value.code, error.value.param) == (code, param)
    assert error.value.body(400)["error"] == {
        "code": code,
        "message": error.value.message,
        "type": "invalid_request_error",
        "param": param,
    }


class OpenReasoning:
    """A chat format that leaves the reasoning open where thinking is on, which token 9 ends."""

    def encode_text(self, text: str) -> ChatPrompt:
        return ChatPrompt([1], spelled_token="<x>" if "<x>" in text else None)

    def encode_chat(self, messages: list[dict[str, Any]], options: ChatOptions) -> ChatPrompt:
        if options.thinking:
            return ChatPrompt([1], OutputFormat("deepseek_v31", "reasoning", (), 9))
        return ChatPrompt([1], OutputFormat("deepseek_v31", "content"))


class EndsTurns(OpenReasoning):
    """A chat format whose turns end with token 7."""

    def encode_chat(self, messages: list[dict[str, Any]], options: ChatOptions) -> ChatPrompt:
        return ChatPrompt([1], stop_token_ids=(7,))


def test_tokens_that_end_a_turn_end_the_answer() -> None:
    defaults = RequestDefaults(limits=RULES.limits, encoder=EndsTurns())
    body = {"messages": MESSAGES, "stop_token_ids": [5]}
    assert parse_chat(body, defaults).params.stop_token_ids == (5, 7)
    assert parse_chat({**body, "ignore_eos": True}, defaults).params.stop_token_ids == (5,)
    assert parse_completion({"prompt": "x"}, defaults).params.stop_token_ids == ()


def test_the_prompt_says_whether_the_answer_starts_with_reasoning() -> None:
    defaults = RequestDefaults(limits=RULES.limits, encoder=OpenReasoning())
    parsed = parse_chat({"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": True}}, defaults)
    assert parsed.to_request("r", 0).reasoning_end_token_id == 9
    assert parse_chat({"messages": MESSAGES}, defaults).to_request("r", 0).reasoning_end_token_id is None
    completion = parse_completion({"prompt": "x"}, defaults)
    assert completion.to_request("r", 0).reasoning_end_token_id is None
    assert completion.spelled_token is None
    assert parse_completion({"prompt": "a<x>"}, defaults).spelled_token == "<x>"
