"""The routes against shoal-tiny in this process, through ASGI without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.metrics.meter import RequestMeter
from shoal.cluster.metrics.prometheus import PrometheusInstruments
from shoal.cluster.prompts import request_defaults
from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.cluster.server.app import Api, ServedModel, make_app
from shoal.cluster.server.bodies import MAX_BODY_BYTES
from shoal.cluster.server.request_log import RequestLog
from shoal.cluster.server.state import ServerState

ARGS = EngineArgs(model=str(BUNDLED_MODEL), num_threads_per_worker=1, max_num_seqs=8)
QUESTION = [{"role": "user", "content": "What is 4821 + 7790?"}]
CHAT = {"model": "shoal-tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 100}
THINKING = {**CHAT, "chat_template_kwargs": {"thinking": True}}
INSTRUMENTS = PrometheusInstruments("shoal_")
Use = Callable[[httpx.AsyncClient, AsyncEngines, ServerState], Awaitable[None]]


@pytest.fixture(scope="module")
def engines() -> Iterator[EngineThread]:
    thread = EngineThread(lambda: InProcessEngine(ARGS), lambda: RequestMeter([INSTRUMENTS], model_name="shoal-tiny"))
    yield thread
    thread.close()


def serve(
    engines: EngineThread,
    use: Use,
    *,
    keys: tuple[str, ...] = (),
    limit: int = 100,
    ready: bool = True,
    lines: list[str] | None = None,
) -> None:
    """Run `use` with a client of an app on these engines."""

    async def run() -> None:
        state = ServerState(stall_timeout_s=60.0)
        client = AsyncEngines(engines)
        if ready:
            state.set_ready(client)
        model = ServedModel(
            names=["shoal-tiny"], root=str(BUNDLED_MODEL), created=1, defaults=request_defaults(ARGS, {}, thinking=None)
        )
        log = RequestLog(None if lines is None else lines.append)
        api = Api(model, state, max_num_queued_reqs=limit, metrics=INSTRUMENTS, log=log)
        app = make_app(api, keys=keys)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal", timeout=600) as http:
            await use(http, client, state)

    asyncio.run(run())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which ends with [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


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


@pytest.mark.parametrize("prompt", ["The quick brown fox", [21, 22, 23, 24]])
def test_echo_scores_the_prompt(engines: EngineThread, prompt: Any) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 2, "ignore_eos": True}
    with LLM(num_threads_per_worker=1) as llm:
        (scored,) = llm.generate([prompt], SamplingParams(**greedy, logprobs=1, prompt_logprobs=1))
        text = llm.get_tokenizer().decode(scored.prompt_token_ids)
    assert scored.prompt_logprobs is not None
    assert scored.outputs[0].logprobs is not None
    positions = [*scored.prompt_logprobs, *scored.outputs[0].logprobs]
    tokens = [*scored.prompt_token_ids, *scored.outputs[0].token_ids]
    values = [position and position[token].logprob for position, token in zip(positions, tokens, strict=True)]

    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {"prompt": prompt, "echo": True, **greedy}
        for max_tokens, stream in ((2, False), (2, True), (0, False), (0, True)):
            count = len(values) - 2 + max_tokens
            body = {**asked, "logprobs": 1, "max_tokens": max_tokens, "stream": stream}
            response = await http.post("/v1/completions", json=body)
            parts = [event["choices"][0] for event in events(response)] if stream else response.json()["choices"]
            shown = [part["logprobs"] for part in parts if part["logprobs"] is not None]
            assert [value for part in shown for value in part["token_logprobs"]] == values[:count]
            likeliest = [top for part in shown for top in part["top_logprobs"]]
            assert likeliest[0] is None
            assert [max(top.values()) for top in likeliest[1:]] == [
                max(p.logprob for p in position.values()) for position in positions[1:count] if position is not None
            ]
            offsets = [offset for part in shown for offset in part["text_offset"]]
            assert (len(offsets), offsets) == (count, sorted(offsets))
            assert "".join(part["text"] for part in parts) == text + (scored.outputs[0].text if max_tokens else "")
            assert parts[-1]["finish_reason"] == "length"
            if not stream:
                assert response.json()["usage"]["completion_tokens"] == max_tokens
                assert "prompt_logprobs" not in response.json()
        plain = (await http.post("/v1/completions", json={**asked, "max_tokens": 2})).json()["choices"][0]
        assert (plain["text"], plain["logprobs"]) == (text + scored.outputs[0].text, None)

    serve(engines, use)


def test_token_ids_are_returned_to_who_asks(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {"prompt": [21, 22, 23], "temperature": 0, "max_tokens": 5, "return_token_ids": True}
        (whole,) = (await http.post("/v1/completions", json=asked)).json()["choices"]
        assert (whole["prompt_token_ids"], len(whole["token_ids"])) == ([21, 22, 23], 5)
        found = events(await http.post("/v1/completions", json={**asked, "stream": True}))
        ids = [event["choices"][0].get("token_ids", []) for event in found]
        assert [token for part in ids for token in part] == whole["token_ids"]
        assert found[0]["choices"][0]["prompt_token_ids"] == [21, 22, 23]
        body = (await http.post("/v1/chat/completions", json={**CHAT, "return_token_ids": True})).json()
        assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]

    serve(engines, use)


def test_routes_of_the_tokenizer(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        info = (await http.get("/tokenizer_info")).json()
        assert info["eos_token"] == "<｜end▁of▁sentence｜>"
        assert info["chat_template"].startswith("{%-")
        text = "What is 12 + 30?"
        served = (await http.post("/v1/completions", json={"prompt": text, "return_token_ids": True})).json()
        tokenized = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert tokenized["tokens"] == served["choices"][0]["prompt_token_ids"]
        assert "".join(tokenized["token_strs"]) == info["bos_token"] + text
        assert (tokenized["count"], tokenized["max_model_len"]) == (len(tokenized["tokens"]), 4096)
        plain = (await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()
        assert plain["tokens"] == tokenized["tokens"][1:]
        back = (await http.post("/detokenize", json={"tokens": tokenized["tokens"]})).json()
        assert back == {"prompt": info["bos_token"] + text}
        eos = (await http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False})).json()
        assert (await http.post("/detokenize", json={"tokens": eos["tokens"]})).json()["prompt"] == info["eos_token"]
        assert eos["count"] == 1
        chat = (await http.post("/tokenize", json={"messages": QUESTION})).json()
        asked = (await http.post("/v1/chat/completions", json={**CHAT, "return_token_ids": True})).json()
        assert chat["tokens"] == asked["prompt_token_ids"]

    serve(engines, use)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "one two three " * 200_000}),
        ("/v1/completions", {"prompt": "one two three " * 1000}),
        ("/v1/completions", {"prompt": [5] * 5000}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "one two three " * 200_000}]}),
        ("/tokenize", {"prompt": "one two three " * 200_000}),
    ],
)
def test_what_exceeds_the_context_is_said_in_the_words_that_clients_know(
    engines: EngineThread, path: str, body: Any
) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        response = await http.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["message"].startswith("This model's maximum context length is 4096 tokens")

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
        bad = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
        refused = (await http.post("/v1/chat/completions", json={**CHAT, "response_format": bad})).json()
        assert (refused["error"]["code"], refused["error"]["param"]) == ("invalid_grammar", "response_format")

    serve(engines, use)


def series(text: str) -> dict[str, float]:
    """The values of a scrape by name and labels."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_count_what_was_answered(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        async def scrape() -> dict[str, float]:
            response = await http.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            return series(response.text)

        label = '{model_name="shoal-tiny"}'
        await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        before = await scrape()
        whole = await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True})
        await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True, "stream": True})
        after = await scrape()
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        assert whole.status_code == 200, whole.text
        num_prompt_tokens = whole.json()["usage"]["prompt_tokens"]
        assert grown[f"shoal_prompt_tokens_total{label}"] == 2 * num_prompt_tokens
        assert grown[f"shoal_generation_tokens_total{label}"] == 10
        assert grown['shoal_request_success_total{finished_reason="length",model_name="shoal-tiny"}'] == 2
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
            assert grown[f"shoal_{name}_seconds_count{label}"] == 2
        assert grown[f"shoal_inter_token_latency_seconds_count{label}"] == 4, "the gaps of the stream"
        assert (
            after[f"shoal_time_to_first_token_seconds_sum{label}"]
            <= after[f"shoal_e2e_request_latency_seconds_sum{label}"]
        )
        engine = '{engine="mixed:0",model_name="shoal-tiny",role="mixed"}'
        assert after[f"shoal_num_requests_running{engine}"] == 0
        assert grown[f"shoal_prefix_cache_queries_total{engine}"] > 0
        asked = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True}
        asking = asyncio.ensure_future(http.post("/v1/completions", json=asked))
        while (await scrape())[f"shoal_num_requests_running{engine}"] == 0:
            assert not asking.done()
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while (await scrape())[f"shoal_num_requests_running{engine}"] > 0:
            await asyncio.sleep(0.01)
        scraped = await http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert scraped.headers["content-type"].startswith("application/openmetrics-text")

    serve(engines, use)


def test_every_request_has_a_line_in_the_log(engines: EngineThread) -> None:
    lines: list[str] = []
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "X-Request-Id": "mine"}

    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {"prompt": [21, 22, 23], "max_tokens": 4, "ignore_eos": True}
        await http.post("/v1/completions", json=asked, headers=trace)
        await http.post("/v1/completions", json={**asked, "stream": True, "n": 2})
        await http.post("/v1/completions", json={**asked, "max_tokens": 0})
        asking = asyncio.ensure_future(http.post("/v1/completions", json={**asked, "max_tokens": 1500}))
        while client.num_requests == 0:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    serve(engines, use, lines=lines)
    whole, streamed, refused, left = map(json.loads, lines)
    assert {name: whole[name] for name in ("status", "request_id", "path", "traceparent")} == {
        "status": 200,
        "request_id": "mine",
        "path": "/v1/completions",
        "traceparent": trace["traceparent"],
    }
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["finish_reasons"]) == (3, 4, ["length"])
    assert whole["e2e_s"] >= whole["prefill_s"] + whole["decode_s"] > 0
    assert (streamed["completion_tokens"], streamed["finish_reasons"]) == (8, ["length", "length"])
    assert (refused["status"], refused["code"]) == (400, "invalid_parameter")
    assert (left["status"], left["finish_reasons"]) == (499, [])
