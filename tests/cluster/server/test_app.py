"""The routes: answers, errors, and the life of a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.server.bodies import MAX_BODY_BYTES
from shoal.cluster.server.state import ServerState
from tests.support.app import QUESTION, THINKING, events, serve


def test_answers_are_those_of_the_python_interface(engines: EngineThread) -> None:
    with LLM(num_threads_per_worker=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=100)
        (chat,) = llm.chat(QUESTION, params, thinking=True)
        texts = llm.generate(["What is", "Sort"], SamplingParams(temperature=0, max_tokens=6, logprobs=1))

    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        body = (await http.post("/v1/chat/completions", json=THINKING)).json()
        (choice,) = body["choices"]
        assert choice["message"] == chat.outputs[0].message
        assert choice["message"]["content"] == "12611"
        assert choice["token_ids"] == chat.outputs[0].token_ids
        assert choice["finish_reason"] == "stop"
        assert body["usage"]["prompt_tokens"] == len(chat.prompt_token_ids)
        assert set(body["usage"]["prompt_tokens_details"]) == {"cached_tokens"}
        asked = {"prompt": ["What is", "Sort"], "temperature": 0, "max_tokens": 6, "logprobs": 1}
        body = (await http.post("/v1/completions", json=asked)).json()
        assert [c["text"] for c in body["choices"]] == [output.outputs[0].text for output in texts]
        assert [c["index"] for c in body["choices"]] == [0, 1]
        assert body["usage"]["completion_tokens"] == 12
        assert "seed" not in body
        assert client.num_requests == 0

    serve(engines, use)


def test_a_stream_adds_up_to_the_whole_answer(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        whole = (await http.post("/v1/chat/completions", json=THINKING)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await http.post("/v1/chat/completions", json={**THINKING, **options})
        found = events(response)
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len({event["id"] for event in found}) == 1
        deltas = [event["choices"][0]["delta"] for event in found[:-1]]
        message = whole["choices"][0]["message"]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == message["reasoning_content"]
        assert "".join(d.get("content", "") for d in deltas) == message["content"]
        assert [e["choices"][0]["finish_reason"] for e in found[:-1]] == [None] * (len(deltas) - 1) + ["stop"]
        assert found[-1]["choices"] == []
        usage = dict(whole["usage"])
        assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] - len("12611") - 1
        assert {**found[-1]["usage"], "prompt_tokens_details": usage["prompt_tokens_details"]} == usage
        assert len(found) > 10, "it was not streamed"
        asked = {"prompt": ["What is", "Sort"], "temperature": 0, "max_tokens": 6, "stream": True}
        texts = {0: "", 1: ""}
        *parts, last = events(
            await http.post("/v1/completions", json=asked | {"stream_options": options["stream_options"]})
        )
        assert last["usage"]["completion_tokens"] == 12, "of both prompts"
        for event in parts:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        whole = (await http.post("/v1/completions", json={**asked, "stream": False})).json()
        assert list(texts.values()) == [choice["text"] for choice in whole["choices"]]

    serve(engines, use)


def test_a_seed_is_drawn_and_told(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {"prompt": "What is", "temperature": 1.5, "max_tokens": 8}
        first, second = [(await http.post("/v1/completions", json=asked)).json() for _ in range(2)]
        assert first["seed"] != second["seed"]
        again = (await http.post("/v1/completions", json={**asked, "seed": first["seed"]})).json()
        assert again["choices"] == first["choices"]
        streamed = events(await http.post("/v1/completions", json={**asked, "stream": True}))
        again = (await http.post("/v1/completions", json={**asked, "seed": streamed[0]["seed"]})).json()
        assert again["choices"][0]["text"] == "".join(event["choices"][0]["text"] for event in streamed)

    serve(engines, use)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("top_p", 2),
        ("n", 0),
        ("max_tokens", -3),
        ("stop", 5),
        ("stop", ["a"] * 65),
        ("seed", 1.5),
    ],
)
def test_errors_name_the_field(engines: EngineThread, name: str, value: Any) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        error = (await http.post("/v1/completions", json={"prompt": "a", name: value})).json()["error"]
        assert error["param"] == name
        assert name in error["message"]

    serve(engines, use)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/completions", b"[]", 400, "not_an_object"),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "nested_too_deep"),
        ("POST", "/v1/completions", {"prompt": "a", "max_token": 1}, 400, "unknown_field"),
        ("POST", "/v1/completions", {"prompt": "a", "stream": 1}, 400, "invalid_type"),
        ("POST", "/v1/completions", {"prompt": "a", "stream_options": {}}, 400, "invalid_parameter"),
        ("POST", "/v1/completions", {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "unknown_field"),
        ("POST", "/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "model_not_found"),
        ("POST", "/v1/completions", b" " * (MAX_BODY_BYTES + 1), 413, "body_too_large"),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "invalid_parameter"),
        ("POST", "/v1/completions", {"prompt": "a", "echo": 1}, 400, "invalid_type"),
        ("POST", "/v1/completions", {"prompt": "a", "echo": True, "prompt_logprobs": 1}, 400, "invalid_parameter"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user"}], "echo": True}, 400, "unknown_field"),
        ("POST", "/detokenize", {"tokens": [1, "a"]}, 400, "invalid_type"),
        ("POST", "/detokenize", {"tokens": [10**6]}, 400, "token_out_of_vocabulary"),
        ("POST", "/tokenize", {"prompt": 5}, 400, "invalid_type"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "empty_prompt"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "robot"}]}, 400, "invalid_messages"),
        ("POST", "/v1/chat/completions", {"messages": QUESTION, "tools": 1}, 400, "invalid_messages"),
        ("POST", "/v1/completions", {"prompt": ["a"] * 101}, 400, "invalid_parameter"),
        ("POST", "/v1/completions/", {"prompt": "a"}, 404, "not_found"),
        ("GET", "/v1/models/gpt", None, 404, "model_not_found"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("GET", "/v1/completions", None, 405, "method_not_allowed"),
    ],
)
def test_what_cannot_be_answered_is_an_error_in_openais_format(
    engines: EngineThread, method: str, path: str, body: Any, status: int, code: str
) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        response = await http.request(method, path, content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert set(response.json()["error"]) == {"code", "message", "type", "param"}
        assert client.num_requests == 0

    serve(engines, use)


def test_a_server_that_starts_drains_or_is_full_says_so(engines: EngineThread) -> None:
    async def starting(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        assert (await http.get("/live")).status_code == 200
        refused = await http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        state.set_ready(client)
        assert (await http.get("/health")).json() == {"status": "ready"}
        state.drain()
        assert (await http.get("/health")).json() == {"status": "draining", "reason": "the server is shutting down"}
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 503
        state.fail("RuntimeError: x")
        assert (await http.get("/health")).json()["status"] == "dead"

    async def full(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        refused = await http.post("/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert (await http.post("/v1/completions", json={"prompt": "a", "n": 2, "max_tokens": 2})).status_code == 200

    serve(engines, starting, ready=False)
    serve(engines, full, limit=2)


def test_keys_guard_all_routes_but_two(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        for path in ("/live", "/health"):
            assert (await http.get(path)).status_code == 200
        for header in (None, "Bearer wrong", "Bearer ", "first"):
            headers = {} if header is None else {"Authorization": header}
            refused = await http.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in ("first", "second"):
            allowed = await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert allowed.json()["data"][0]["id"] == "shoal-tiny"

    serve(engines, use, keys=("first", "second"))


def test_a_request_id_is_returned_or_made(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        given = await http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "mine:1"})
        assert given.headers["x-request-id"] == "mine:1"
        assert given.json()["id"] == "cmpl-mine:1"
        for bad in (b"a b", "é".encode()):
            asked = [await http.get("/nowhere", headers={b"X-Request-Id": bad}) for _ in "ab"]
            made = {response.headers["x-request-id"] for response in asked}
            assert len(made) == 2
            assert all(one.isalnum() for one in made)

    serve(engines, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(engines: EngineThread, stream: bool) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": stream}
        asking = asyncio.ensure_future(http.post("/v1/completions", json=asked))
        while client.num_requests == 0:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert client.num_requests == 0

    serve(engines, use)
