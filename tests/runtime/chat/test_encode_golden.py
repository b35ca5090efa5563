"""Every prompt of the golden cases, made by running the public references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.chat.rendering import render_text

CASES = [
    case
    for line in (Path(__file__).parent / "chat_cases.jsonl").read_text(encoding="utf-8").splitlines()
    if (case := json.loads(line))["type"] == "encode"
]


def test_every_format_has_a_case() -> None:
    assert {case["family"] for case in CASES} == set(CHAT_FORMATS)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_prompt(case: dict[str, Any]) -> None:
    request = dict(case["input"])
    chat_format = CHAT_FORMATS[case["family"]]
    messages, tools = _without_tools(request.pop("messages"), request.pop("tools", None))
    thinking = chat_format.choose_thinking(
        thinking=request.pop("thinking", None), reasoning_effort=request.get("reasoning_effort")
    )
    schema = request.pop("response_format", {}).get("json_schema", {}).get("schema")
    conversation = read_conversation(messages, tools=tools, thinking=thinking, response_schema=schema, **request)
    assert render_text(chat_format.encode(conversation)) == case["expected"]["prompt"]


def _without_tools(messages: list[dict[str, Any]], tools: Any) -> tuple[list[dict[str, Any]], Any]:
    """V3.2's reference has the tools in a message; requests have them beside the messages."""
    stripped = [{k: v for k, v in message.items() if k != "tools"} for message in messages]
    return stripped, tools or next((message["tools"] for message in messages if "tools" in message), None)
