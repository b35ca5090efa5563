"""Answers that have a form: calls that are asked for, and schemas."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.server.state import ServerState
from tests.support.app import CHAT, events, serve

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TRIP = {"type": "function", "function": {"name": "trip", "parameters": CITY}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "trip"}}])
@pytest.mark.parametrize("thinking", [False, True])
def test_calls_can_be_forced(engines: EngineThread, choice: Any, thinking: bool) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {**CHAT, "max_tokens": 300, "tools": [TRIP], "tool_choice": choice}
        asked["chat_template_kwargs"] = {"thinking": thinking}
        (whole,) = (await http.post("/v1/chat/completions", json=asked)).json()["choices"]
        (call,) = whole["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert (call["function"]["name"], whole["finish_reason"]) == ("trip", "tool_calls")
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Paris", "Rome")
        assert bool(whole["message"].get("reasoning_content")) is thinking
        found = events(await http.post("/v1/chat/completions", json={**asked, "stream": True}))
        parts = [part for event in found for part in event["choices"][0]["delta"].get("tool_calls", [])]
        assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]

    serve(engines, use)


def test_an_answer_keeps_to_a_schema(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY, "strict": True}}
        asked = {**CHAT, "temperature": 1.0, "seed": 1, "response_format": form}
        (whole,) = (await http.post("/v1/chat/completions", json=asked)).json()["choices"]
        assert set(json.loads(whole["message"]["content"])) == {"city", "days"}
        both = (
            await http.post("/v1/chat/completions", json={**asked, "tools": [TRIP], "tool_choice": "required"})
        ).json()
        assert both["error"]["code"] == "invalid_parameter"
        either = {**asked, "tools": [TRIP], "temperature": 0}
        (answer,) = (await http.post("/v1/chat/completions", json=either)).json()["choices"]
        calls = answer["message"].get("tool_calls")
        text = calls[0]["function"]["arguments"] if calls else answer["message"]["content"]
        assert set(json.loads(text)) == {"city", "days"}
        bad = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
        refused = (await http.post("/v1/chat/completions", json={**CHAT, "response_format": bad})).json()
        assert (refused["error"]["code"], refused["error"]["param"]) == ("invalid_grammar", "response_format")

    serve(engines, use)
