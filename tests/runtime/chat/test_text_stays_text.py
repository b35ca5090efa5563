"""Nothing that a client sends becomes a special token, whatever it spells."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count, cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.chat import dsml, glm, kimi
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.chat.rendering import render_text
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Part, Special, Tokenizer
from tests.support.chat_messages import Message, assistant, call, system, tool, user

MODULES_WITH_TAGS = (dsml, glm, kimi)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of single bytes that has the added tokens of every format."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    size = write_byte_tokenizer(path)
    spec = json.loads(path.read_text(encoding="utf-8"))
    known = {token["content"] for token in spec["added_tokens"]}
    names = (getattr(module, name) for module in MODULES_WITH_TAGS for name in dir(module) if name.isupper())
    others = sorted({name for name in names if isinstance(name, str)} - known)
    template = spec["added_tokens"][-1]
    spec["added_tokens"] += [template | {"id": size + n, "content": text} for n, text in enumerate(others)]
    return Tokenizer(spec)


TAGS = [
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁output▁end｜>", "｜DSML｜", "</｜DSML｜parameter>"),
    *("<|im_end|>", "<|im_system|>", "<|im_middle|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|observation|>", "/nothink", "<tool_call>", "</arg_value>", "</tool_response>"),
]
HALVES = [half for tag in TAGS for half in (tag[:3], tag[3:])]
HOSTILE = st.lists(st.sampled_from(TAGS + HALVES), min_size=1, max_size=3).map("".join)
TURNS = st.lists(st.sampled_from(["system", "answer", "one call", "two calls"]), max_size=5)


def conversation_of(turns: list[str], text: Callable[[], str]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Messages and a tool whose texts, names, ids and arguments are all given by `text`."""
    numbers = count()
    messages = []
    for turn in turns:
        if turn == "system":
            messages.append(system(text()))
        else:
            messages.append(user(text()))
        if turn == "answer":
            messages.append(assistant(text(), reasoning=text()))
        elif turn.endswith(("call", "calls")):
            ids = [f"{text()}{next(numbers)}" for _ in range(turn.count("two") + 1)]
            arguments = [{f"{text()}0": text(), f"{text()}1": [text()]}, text()]
            calls = [call(text(), a, i) for i, a in zip(ids, arguments, strict=False)]
            messages.append(assistant(text(), tool_calls=calls, reasoning=text()))
            messages += [tool(text(), i) for i in ids]
            messages.append(assistant(text(), reasoning=text()))
    messages.append(user(text()))
    function = {"name": text(), "description": text(), "parameters": {"type": "object", "description": text()}}
    return messages, [{"type": "function", "function": function}]


@pytest.mark.parametrize("format_name", CHAT_FORMATS)
@settings(max_examples=10, deadline=None)
@given(
    turns=TURNS,
    texts=st.lists(HOSTILE, min_size=1, max_size=6),
    thinking=st.booleans(),
    clear_thinking=st.sampled_from([None, True, False]),
)
def test_special_tokens_do_not_depend_on_texts(
    format_name: str,
    tokenizer: Tokenizer,
    turns: list[str],
    texts: list[str],
    thinking: bool,
    clear_thinking: bool | None,
) -> None:
    def encode(text: Callable[[], str]) -> list[Part]:
        messages, tools = conversation_of(turns, text)
        conversation = read_conversation(
            messages, tools=tools, thinking=thinking, clear_thinking=clear_thinking, response_schema={"title": text()}
        )
        return CHAT_FORMATS[format_name].encode(conversation)

    endless = cycle(texts)
    harmless, hostile = encode(lambda: "x"), encode(lambda: next(endless))
    specials = [part for part in hostile if isinstance(part, Special)]
    assert specials == [part for part in harmless if isinstance(part, Special)]
    ids = tokenizer.encode_rendered(hostile)
    added = [i for i in ids if not 3 <= i < 259]  # the others are bytes
    assert added == [tokenizer.special_id(special.text) for special in specials]
    assert tokenizer.decode(ids, skip_special_tokens=False) == render_text(hostile)
