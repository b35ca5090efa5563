"""The golden cases of reading outputs: whole, in their chunks, cut at random, and as tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.runtime.chat.output import assemble, finish_reason
from shoal.runtime.tokenization.tokenizer import Part, Tokenizer
from tests.support.outputs import TOKENS, as_parts, cut, parse, parse_cases, tokenizer_with

CASES = parse_cases()
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])


def message(case: dict[str, Any], pieces: Sequence[Sequence[Part]], tokenizer: Tokenizer | None = None) -> Any:
    """The message of an output in pieces, written as the golden cases write it."""
    given = case["input"]
    deltas, _ = parse(case["grammar"], pieces, start=given["start"], tools=given["tools"], tokenizer=tokenizer)
    output = assemble(deltas)
    calls = [
        {"name": call.name, "arguments": json_value(call.arguments)} | ({"id": call.id} if call.id else {})
        for call in output.tool_calls
    ]
    return {
        "reasoning_content": output.reasoning,
        "content": output.content,
        "tool_calls": calls,
        "finish_reason": finish_reason(given["ended_by"], has_calls=bool(output.tool_calls)),
    }


def json_value(text: str) -> Any:
    """The value of JSON text; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def expected(case: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "arguments": json_value(call["arguments"])} for call in case["expected"]["tool_calls"]]
    kept = ("reasoning_content", "content", "finish_reason")
    return {name: case["expected"][name] for name in kept} | {"tool_calls": calls}


def test_every_grammar_has_cases() -> None:
    assert {case["grammar"] for case in CASES} == set(TOKENS)
    assert len(CASES) == 57 + 16


@EVERY_CASE
def test_a_whole_text(case: dict[str, Any]) -> None:
    assert message(case, [[case["input"]["text"]]]) == expected(case)


@EVERY_CASE
def test_any_cut(case: dict[str, Any]) -> None:
    text = case["input"]["text"]
    rng = random.Random(text)
    assert message(case, [[character] for character in text]) == expected(case)
    for num_cuts in range(1, 31):
        pieces = cut(text, rng, num_cuts)
        assert message(case, pieces) == expected(case), pieces


@EVERY_CASE
def test_tokens(case: dict[str, Any]) -> None:
    """Tags that have tokens are read from these alone, together or one by one."""
    tokenizer = tokenizer_with(TOKENS[case["grammar"]])
    parts = as_parts(case["grammar"], case["input"]["text"])
    assert message(case, [parts], tokenizer) == expected(case)
    assert message(case, [[part] for part in parts], tokenizer) == expected(case)


@pytest.mark.parametrize("case", [c for c in CASES if "chunks" in c["input"]], ids=lambda case: case["id"])
def test_the_chunks_of_a_case(case: dict[str, Any]) -> None:
    assert message(case, [[chunk] for chunk in case["input"]["chunks"]]) == expected(case)


# V3.2's tags for calls have no tokens.
CASES_OF_TOKENS = [c for c in CASES if c["grammar"] != "deepseek_v32" or "｜DSML｜" not in c["input"]["text"]]


@pytest.mark.parametrize("case", CASES_OF_TOKENS, ids=lambda case: case["id"])
def test_text_that_spells_tokens_is_text(case: dict[str, Any]) -> None:
    """With the tokenizer's tokens known, nothing of a text is read as one of them."""
    given = case["input"]
    tokenizer = tokenizer_with(TOKENS[case["grammar"]])
    deltas, _ = parse(case["grammar"], [[given["text"]]], start=given["start"], tokenizer=tokenizer)
    output = assemble(deltas)
    text = output.reasoning if given["start"] == "reasoning" else output.content
    assert (text, output.tool_calls) == (given["text"], [])
