"""What a request learns of its prompt: echo, token ids, the routes of the tokenizer, the context's length."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.server.state import ServerState
from tests.support.app import CHAT, QUESTION, events, serve


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
