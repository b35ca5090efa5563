"""Response bodies against literals: reasoning, texts, offsets and bytes of tokens."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from shoal.cluster.openai.requests import Endpoint, ParsedRequest
from shoal.cluster.openai.responses import chat_completion, completion, failure
from shoal.runtime.chat.prompt import OutputFormat
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams

BOS, EOS, THINK_END = 0, 1, 260
UNKNOWN = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return tokenizer


def ids(data: bytes) -> list[int]:
    return [3 + byte for byte in data]


def request(endpoint: Endpoint, num_logprobs: int | None = None, reasoning: bool = False) -> ParsedRequest:
    return ParsedRequest(
        endpoint=endpoint,
        prompt_token_ids=(BOS, 5, 6),
        params=SamplingParams(logprobs=num_logprobs),
        num_logprobs=num_logprobs,
        output_format=OutputFormat("deepseek_v31", "reasoning", (), THINK_END) if reasoning else None,
    )


def output(token_ids: list[int], tokenizer: Tokenizer | None, others: dict[int, float] | None = None) -> RequestOutput:
    """Token i has the log-probability -(i + 1); `others` are further ones at every position."""
    logprobs = [
        {token: Logprob(-(i + 1.0), 1)} | {t: Logprob(p, 2 + k) for k, (t, p) in enumerate((others or {}).items())}
        for i, token in enumerate(token_ids)
    ]
    text = "" if tokenizer is None else tokenizer.decode(token_ids)
    sample = CompletionOutput(index=0, text=text, token_ids=token_ids, logprobs=logprobs, finish_reason="stop")
    return RequestOutput(request_id="r", prompt_token_ids=[BOS, 5, 6], outputs=[sample], finished=True)


def write(answer: RequestOutput, asked: ParsedRequest, tokenizer: Tokenizer | None) -> dict[str, Any]:
    body = chat_completion if asked.endpoint == "/v1/chat/completions" else completion
    return body(answer, asked, id="x-1", created=7, model="m", tokenizer=tokenizer)


def test_a_completion(tokenizer: Tokenizer) -> None:
    assert write(output([*ids(b"Hi"), EOS], tokenizer), request("/v1/completions"), tokenizer) == {
        "id": "x-1",
        "object": "text_completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "Hi",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": [75, 108, 1],
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }


def test_completion_logprobs_have_one_entry_per_token_and_offsets_of_the_text(tokenizer: Tokenizer) -> None:
    token_ids = [*ids("é😀!".encode()), UNKNOWN, EOS]
    body = write(
        output(token_ids, tokenizer, {3 + 0x81: -20.0, 3 + 0x82: -21.0}), request("/v1/completions", 2), tokenizer
    )
    logprobs = body["choices"][0]["logprobs"]
    assert body["choices"][0]["text"] == "é😀!"
    assert logprobs["tokens"] == [
        *(r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"),
        *("!", "token_id:300", "<｜end▁of▁sentence｜>"),
    ]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 3, 3]
    assert logprobs["token_logprobs"] == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0]
    for text, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {text: logprob, r"bytes:\x81": -20.0, r"bytes:\x82": -21.0}


class SameText:
    """A tokenizer whose tokens 5 and 6 have the same text."""

    separator = b""

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes | None:
        return b"a" if token_id in (5, 6) else b"b"


def test_tokens_with_equal_texts_are_told_apart() -> None:
    tokenizer: Any = SameText()
    body = write(output([5], None, {6: -3.0, 7: -4.0}), request("/v1/completions", 2), tokenizer)
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -1.0, "token_id:6": -3.0, "b": -4.0}]


def test_chat_logprobs_have_bytes_always(tokenizer: Tokenizer) -> None:
    answer = output(ids("é".encode()), tokenizer, {100: -math.inf, UNKNOWN: -2.0})
    content = write(answer, request("/v1/chat/completions", 1), tokenizer)["choices"][0]["logprobs"]["content"]
    first = {"token": r"bytes:\xc3", "token_id": 198, "logprob": -1.0, "bytes": [0xC3]}
    assert content[0] == {**first, "top_logprobs": [first]}
    content = write(answer, request("/v1/chat/completions", 3), tokenizer)["choices"][0]["logprobs"]["content"]
    assert content[1]["top_logprobs"] == [
        {"token": r"bytes:\xa9", "token_id": 172, "logprob": -2.0, "bytes": [0xA9]},
        {"token": "a", "token_id": 100, "logprob": -9999.0, "bytes": [97]},
        {"token": "token_id:300", "token_id": 300, "logprob": -2.0, "bytes": None},
    ]


def test_without_a_tokenizer_tokens_go_by_their_ids() -> None:
    logprobs = write(output([5, 6], None), request("/v1/completions", 0), None)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["token_id:5", "token_id:6"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"token_id:5": -1.0}, {"token_id:6": -2.0}],
        "text_offset": [0, 0],
    }


@pytest.mark.parametrize(
    ("token_ids", "reasoning", "message"),
    [
        ([*ids(b"a plan"), THINK_END, *ids(b"42")], True, {"reasoning_content": "a plan", "content": "42"}),
        (ids(b"a plan that was cut"), True, {"reasoning_content": "a plan that was cut", "content": None}),
        (ids(b"a</think>b"), True, {"reasoning_content": "a</think>b", "content": None}),
        ([THINK_END, *ids(b"x</think>")], True, {"reasoning_content": "", "content": "x</think>"}),
        ([*ids(b"x"), THINK_END, *ids(b"y")], False, {"content": "x</think>y"}),
    ],
)
def test_reasoning_is_apart_from_the_answer(
    tokenizer: Tokenizer, token_ids: list[int], reasoning: bool, message: dict[str, str | None]
) -> None:
    body = write(output(token_ids, tokenizer), request("/v1/chat/completions", reasoning=reasoning), tokenizer)
    assert body["choices"][0]["message"] == {"role": "assistant", **message}


def test_prompt_logprobs(tokenizer: Tokenizer) -> None:
    answer = output(ids(b"x"), tokenizer)
    answer.prompt_logprobs = [None, {100: Logprob(-0.5, 1)}, {101: Logprob(-0.25, 1)}]
    assert write(answer, request("/v1/completions"), tokenizer)["prompt_logprobs"] == [
        None,
        {"100": {"token": "a", "token_id": 100, "logprob": -0.5, "bytes": [97]}},
        {"101": {"token": "b", "token_id": 101, "logprob": -0.25, "bytes": [98]}},
    ]


@pytest.mark.parametrize(
    ("reason", "error", "logprob", "code", "message"),
    [
        ("error", "NaN logits", -1.0, "generation_failed", "NaN logits"),
        ("error", None, -1.0, "generation_failed", "the engine gave no reason"),
        ("abort", None, -1.0, "aborted", "the request was aborted"),
        ("stop", None, math.nan, "non_finite_logprob", "the model gave NaN for a log-probability"),
    ],
)
def test_outputs_that_are_no_answers(
    reason: FinishReason, error: str | None, logprob: float, code: str, message: str
) -> None:
    answer = output([5], None)
    assert failure(answer) is None
    (sample,) = answer.outputs
    sample.finish_reason, sample.error = reason, error
    sample.logprobs = [{5: Logprob(logprob, 1)}]
    found = failure(answer)
    assert found is not None
    assert (found.code, found.message) == (code, message)
    assert found.body(500)["error"]["type"] == "error"


TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(("ended_by", "finish_reason"), [("stop", "tool_calls"), ("length", "length")])
def test_calls_are_apart_from_the_content(tokenizer: Tokenizer, ended_by: Any, finish_reason: str) -> None:
    def special(text: str) -> int:
        token_id = tokenizer.special_id(text)
        assert token_id is not None
        return token_id

    call = [
        special("<｜tool▁call▁begin｜>"),
        *ids(b"tide"),
        special("<｜tool▁sep｜>"),
        *ids(b'{"port": "Brest"}'),
        special("<｜tool▁call▁end｜>"),
    ]
    token_ids = [
        *ids(b"Looking."),
        special("<｜tool▁calls▁begin｜>"),
        *call,
        *call,
        special("<｜tool▁calls▁end｜>"),
        EOS,
    ]
    answer = output(token_ids, tokenizer)
    answer.outputs[0].finish_reason = ended_by
    asked = replace(request("/v1/chat/completions"), output_format=OutputFormat("deepseek_v31", "content", (TOOL,)))
    (choice,) = write(answer, asked, tokenizer)["choices"]
    assert choice["message"]["content"] == "Looking."
    assert choice["finish_reason"] == finish_reason
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == second["function"] == {"name": "tide", "arguments": '{"port": "Brest"}'}
    assert first["type"] == "function"
    assert re.fullmatch("call_[0-9a-f]{24}", first["id"])
    assert first["id"] != second["id"]
    assert write(answer, asked, tokenizer)["choices"] == [choice], "a row's line depends on the row alone"
    without_tools = replace(asked, output_format=OutputFormat("deepseek_v31", "content"))
    (choice,) = write(answer, without_tools, tokenizer)["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer.outputs[0].text}
