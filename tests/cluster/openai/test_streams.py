"""Streams against whole responses: however an output is cut, the deltas add up."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.openai.requests import Endpoint, ParsedRequest
from shoal.cluster.openai.responses import chat_completion, completion
from shoal.cluster.openai.streams import ChatStream, CompletionStream, StreamHead, UsageOptions
from shoal.parallel.request_id import RequestId
from shoal.runtime.chat.output import StartState
from shoal.runtime.chat.prompt import OutputFormat
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.detokenizer import IncrementalDetokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import (
    CompletionOutput,
    Finished,
    Logprob,
    Prefilled,
    RequestOutput,
    SamplingParams,
    Tokens,
)

HEAD = StreamHead(id="x-1", created=7, model="m")
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
CALL = "<｜tool▁call▁begin｜>tide<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
TEXTS = {
    "content": "Grand départ ⛵ at 7.<｜end▁of▁sentence｜>",
    "reasoning and content": "91 = 7 x 13</think>No: 91 is 7 × 13.<｜end▁of▁sentence｜>",
    "reasoning alone": "so far, so",
    "calls": f"hm</think>Looking.<｜tool▁calls▁begin｜>{CALL.format(7)}{CALL.format([])}<｜tool▁calls▁end｜>",
    "calls alone": f"</think> <｜tool▁calls▁begin｜>{CALL.format({})}<｜tool▁calls▁end｜>",
    "broken calls": f"</think>a<｜tool▁calls▁begin｜>b{CALL.format(1)}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return tokenizer


def ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text in which tags are added tokens."""
    found: list[int] = []
    while text:
        tag = tokenizer.find_special(text)
        before, _, after = text.partition(tag) if tag else (text, "", "")
        found += tokenizer.encode(before)
        if tag:
            token_id = tokenizer.special_id(tag)
            assert token_id is not None
            found.append(token_id)
        text = after
    return found


def request(endpoint: Endpoint, text: str, num_logprobs: int | None, stop: list[str]) -> ParsedRequest:
    start: StartState = "reasoning" if text != TEXTS["content"] else "content"
    return ParsedRequest(
        endpoint=endpoint,
        prompt_token_ids=(0, 5, 6),
        params=SamplingParams(logprobs=0, n=2, stop=stop),
        num_logprobs=num_logprobs,
        output_format=OutputFormat("deepseek_v31", start, (TOOL,)) if "chat" in endpoint else None,
    )


def reports(
    token_ids: list[int], index: int, rng: random.Random, tokenizer: Tokenizer, stop: list[str]
) -> tuple[list[Tokens], CompletionOutput]:
    """What an engine reports of a sample in steps of several tokens, and all of it."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop)
    reported: list[Tokens] = []
    done = 0
    stopped = None
    while done < len(token_ids) and stopped is None:
        text_start = len(detokenizer.text)
        new: list[int] = []
        for token_id in token_ids[done : done + rng.randint(1, 4)]:
            new.append(token_id)
            if (stopped := detokenizer.append(token_id)) is not None:
                break
        done += len(new)
        if stopped is not None or done == len(token_ids):
            detokenizer.finish()
        logprobs = tuple({token_id: Logprob(-1.0 - token_id / 8, 1), 9: Logprob(-9.0, 2)} for token_id in new)
        reported.append(
            Tokens(
                id=RequestId("r"),
                sample_index=index,
                start=done - len(new),
                token_ids=tuple(new),
                logprobs=logprobs,
                text_start=text_start,
                text=detokenizer.text[text_start:],
            )
        )
    whole = CompletionOutput(
        index=index,
        text=detokenizer.text,
        token_ids=token_ids[:done],
        logprobs=[position for tokens in reported for position in tokens.logprobs or ()],
        finish_reason="stop",
        stop_reason=stopped,
    )
    return reported, whole


def summed(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The message that the deltas of one choice add up to, its logprobs and how it ended."""
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    logprobs: list[Any] = []
    ending: dict[str, Any] = {}
    for event in events:
        assert {name: event[name] for name in ("id", "created", "model")} == {"id": "x-1", "created": 7, "model": "m"}
        assert event["object"] == "chat.completion.chunk"
        for choice in [choice for choice in event["choices"] if choice["index"] == index]:
            assert not ending, "nothing follows the end"
            delta = dict(choice["delta"])
            for call in delta.pop("tool_calls", []):
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            for name, text in delta.items():
                message[name] = message.get(name, "") + text
            logprobs += (choice["logprobs"] or {"content": []})["content"]
            if choice["finish_reason"] is not None:
                ending = {k: v for k, v in choice.items() if k in ("finish_reason", "stop_reason", "is_malformed")}
    return {"message": message, "tool_calls": calls, "logprobs": logprobs, "ending": ending}


@pytest.mark.parametrize("stop", [[], ["7", "so f", "}"]], ids=["", "stop strings"])
@pytest.mark.parametrize("num_logprobs", [None, 1])
@pytest.mark.parametrize("name", TEXTS)
def test_deltas_of_a_chat_add_up(tokenizer: Tokenizer, name: str, num_logprobs: int | None, stop: list[str]) -> None:
    rng = random.Random(name)
    token_ids = ids(TEXTS[name], tokenizer)
    asked = request("/v1/chat/completions", TEXTS[name], num_logprobs, stop)
    for _ in range(20):
        first, second = (reports(token_ids, index, rng, tokenizer, stop) for index in (0, 1))
        stream = ChatStream(asked, HEAD, tokenizer=tokenizer)
        events = stream.begin()
        for tokens in rng.sample([0] * len(first[0]) + [1] * len(second[0]), len(first[0]) + len(second[0])):
            events += stream.add((first, second)[tokens][0].pop(0))
        for index, sample in enumerate((first[1], second[1])):
            end = Finished(id=RequestId("r"), sample_index=index, reason="stop", num_tokens=len(sample.token_ids))
            events += stream.finish(replace_stop(end, sample))
        assert stream.end(stream.usage) == []
        output = RequestOutput(request_id="r", prompt_token_ids=[0, 5, 6], outputs=[first[1], second[1]], finished=True)
        whole = chat_completion(output, asked, id="x-1", created=7, model="m", tokenizer=tokenizer)
        for choice in whole["choices"]:
            found = summed(events, choice["index"])
            message = dict(choice["message"])
            assert found["message"].pop("role") == "assistant"
            assert found["tool_calls"] == message.pop("tool_calls", [])
            message = {k: v or "" for k, v in message.items() if k != "role"}
            assert {**dict.fromkeys(message, ""), **found["message"]} == message
            assert found["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
            kept = ("finish_reason", "stop_reason", "is_malformed")
            assert found["ending"] == {k: v for k, v in choice.items() if k in kept}


def replace_stop(end: Finished, sample: CompletionOutput) -> Finished:
    return Finished(
        id=end.id,
        sample_index=end.sample_index,
        reason=end.reason,
        num_tokens=end.num_tokens,
        stop_reason=sample.stop_reason,
    )


@pytest.mark.parametrize("scores_prompt", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("num_logprobs", [None, 1])
def test_deltas_of_a_completion_add_up(
    tokenizer: Tokenizer, num_logprobs: int | None, echo: bool, scores_prompt: bool
) -> None:
    rng = random.Random(3)
    text = TEXTS["content"]
    asked = replace(
        request("/v1/completions", text, num_logprobs, []),
        params=SamplingParams(logprobs=0),
        echo=echo,
        scores_prompt=scores_prompt and echo,
    )
    scored = (None, *({t: Logprob(-0.5, 1)} for t in asked.prompt_token_ids[1:]))
    prefilled = Prefilled(id=RequestId("r"), num_cached_tokens=1, prompt_logprobs=scored if echo else None)
    for _ in range(20):
        reported, sample = reports(ids(text, tokenizer), 0, rng, tokenizer, [])
        stream = CompletionStream(asked, HEAD, tokenizer=tokenizer)
        events = [*stream.begin(), *stream.add(reported.pop(0)), *stream.prefill(prefilled)]
        events += [event for tokens in reported for event in stream.add(tokens)]
        events += stream.finish(Finished(id=RequestId("r"), sample_index=0, reason="length", num_tokens=9))
        output = RequestOutput(
            request_id="r",
            prompt_token_ids=list(asked.prompt_token_ids),
            outputs=[sample],
            finished=True,
            prompt_logprobs=list(scored),
        )
        (whole,) = completion(output, asked, id="x-1", created=7, model="m", tokenizer=tokenizer)["choices"]
        choices = [choice for event in events for choice in event["choices"]]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        assert [choice["finish_reason"] for choice in choices][-1] == "length"
        if num_logprobs is not None:
            for name, expected in whole["logprobs"].items():
                parts = [choice["logprobs"][name] for choice in choices if choice["logprobs"]]
                assert [value for part in parts for value in part] == expected


def test_usage_is_in_a_last_event_and_in_all_if_asked_for(tokenizer: Tokenizer) -> None:
    asked = replace(request("/v1/completions", "", None, []), params=SamplingParams())
    tokens = Tokens(id=RequestId("r"), sample_index=0, start=0, token_ids=(5, 6), text="ab")
    end = Finished(id=RequestId("r"), sample_index=0, reason="stop", num_tokens=2)

    def events(usage: UsageOptions) -> list[dict[str, Any]]:
        stream = CompletionStream(asked, HEAD, tokenizer=tokenizer, usage=usage)
        return [*stream.add(tokens), *stream.finish(end), *stream.end(stream.usage)]

    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, **details}
    assert ["usage" in event for event in events(UsageOptions())] == [False, False]
    last = events(UsageOptions(include_usage=True))
    assert [event["usage"] for event in last] == [None, None, counts]
    assert last[-1]["choices"] == []
    assert [e["usage"] for e in events(UsageOptions(continuous_usage_stats=True))] == [counts, counts]
