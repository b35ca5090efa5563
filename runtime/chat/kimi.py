"""Prompts of Kimi K2, K2-Thinking and K2.5.

<|im_system|>tool_declare<|im_middle|>{tools}<|im_end|><|im_system|>system<|im_middle|>{system}<|im_end|>
<|im_user|>user<|im_middle|>{question}<|im_end|><|im_assistant|>assistant<|im_middle|>{answer}<|im_end|>

The thinking models begin each answer with `<think>{reasoning}</think>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..tokenization.tokenizer import THINK_END, THINK_START, Part, Special
from .conversation import ChatMessage, Conversation, ToolCall
from .rendering import check_prefix_has_content_only, function_of, to_json, without_empty
from .typescript import declare_functions

IM_SYSTEM = "<|im_system|>"
IM_USER = "<|im_user|>"
IM_ASSISTANT = "<|im_assistant|>"
IM_MIDDLE = "<|im_middle|>"
IM_END = "<|im_end|>"
CALLS_BEGIN = "<|tool_calls_section_begin|>"
CALLS_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
CALL_ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"

_DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
_REASONING_START = (Special(THINK_START),)
_EMPTY_REASONING = (Special(THINK_START), Special(THINK_END))

Tools = Sequence[Mapping[str, Any]]


def _indented_tools(tools: Tools) -> str:
    return f"\n  # Tools\n  {to_json(tools)}"


def _compact_tools(tools: Tools) -> str:
    return json.dumps(tools, ensure_ascii=False, separators=(",", ":"))


def _sorted_tools(tools: Tools) -> str:
    return json.dumps(tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _typescript_tools(tools: Tools) -> str:
    """Sorted TypeScript; as Moonshot's tokenizer does, sorted JSON for schemas that have no TypeScript."""
    in_order = _sorted_tools(tools)
    return declare_functions(map(function_of, json.loads(in_order))) or in_order


@dataclass(frozen=True, kw_only=True, slots=True)
class _Revision:
    """What differs between the chat templates."""

    write_tools: Callable[[Tools], str]
    default_system: str = _DEFAULT_SYSTEM
    """Comes first unless a system message does."""
    after_default_system: str = ""
    before_result: str = ""
    shows_reasoning: bool = False


_K2_0905 = _Revision(write_tools=_indented_tools, before_result="    ")
_K2 = _Revision(write_tools=_sorted_tools, after_default_system="\n")
_K2_THINKING = _Revision(write_tools=_compact_tools, shows_reasoning=True)
_K25 = _Revision(write_tools=_typescript_tools, default_system="", shows_reasoning=True)


def encode_kimi_k2_0905(conversation: Conversation) -> list[Part]:
    """K2-Instruct-0905."""
    return _encode(conversation, _K2_0905)


def encode_kimi_k2(conversation: Conversation) -> list[Part]:
    """K2-Instruct as of its latest chat template."""
    return _encode(conversation, _K2)


def encode_kimi_k2_thinking(conversation: Conversation) -> list[Part]:
    """K2-Thinking, which opens its reasoning itself."""
    return _encode(conversation, _K2_THINKING)


def encode_kimi_k25(conversation: Conversation) -> list[Part]:
    """K2.5 and K2.6, whose prompt opens the reasoning, or closes it without thinking."""
    parts = _encode(conversation, _K25)
    if conversation.messages[-1].is_prefix:
        return parts
    return [*parts, *(_REASONING_START if conversation.thinking else _EMPTY_REASONING)]


def _encode(conversation: Conversation, revision: _Revision) -> list[Part]:
    if not revision.shows_reasoning:
        check_prefix_has_content_only(conversation)
    messages = _with_own_ids(conversation.messages)
    parts: list[Part] = []
    if conversation.tools:
        parts += _turn(IM_SYSTEM, "tool_declare", revision.write_tools(conversation.tools))
    if revision.default_system and messages[0].role != "system":
        parts += [*_turn(IM_SYSTEM, "system", revision.default_system), revision.after_default_system]
    last_answer = max(
        (i for i, message in enumerate(messages) if message.role == "assistant" and not message.tool_calls), default=-1
    )
    for i, (message, call) in enumerate(zip(messages, _answered_calls(messages), strict=True)):
        text = message.text("")
        if message.role == "assistant":
            parts += _header(IM_ASSISTANT, "assistant")
            if revision.shows_reasoning:
                parts += _reasoning(message) if i > last_answer or message.is_prefix else _EMPTY_REASONING
            parts += [text, *_calls(message.tool_calls)]
            parts += () if message.is_prefix else [Special(IM_END)]
        elif call is not None:
            parts += _turn(IM_SYSTEM, call.name, f"## Return of {call.id}\n{revision.before_result}{text}")
        elif message.role == "user":
            parts += _turn(IM_USER, "user", text)
        else:
            parts += _turn(IM_SYSTEM, "system", text)
    if not messages[-1].is_prefix:
        parts += _header(IM_ASSISTANT, "assistant")
    return without_empty(parts)


def _header(tag: str, name: str) -> list[Part]:
    return [Special(tag), name, Special(IM_MIDDLE)]


def _turn(tag: str, name: str, text: str) -> list[Part]:
    return [*_header(tag, name), text, Special(IM_END)]


def _reasoning(message: ChatMessage) -> list[Part]:
    return [Special(THINK_START), message.reasoning or "", Special(THINK_END)]


def _calls(calls: Sequence[ToolCall]) -> Iterator[Part]:
    if not calls:
        return
    yield Special(CALLS_BEGIN)
    for call in calls:
        assert call.id is not None
        yield from (Special(CALL_BEGIN), call.id, Special(CALL_ARGUMENT_BEGIN), call.arguments, Special(CALL_END))
    yield Special(CALLS_END)


def _answered_calls(messages: Sequence[ChatMessage]) -> Iterator[ToolCall | None]:
    """For each message, the call that it answers if it is a tool message."""
    calls: tuple[ToolCall, ...] = ()
    for message in messages:
        if message.role == "assistant":
            calls = message.tool_calls
        yield None if message.call_index is None else calls[message.call_index]


def _with_own_ids(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages with the ids that the model gives its calls, as others make it write bad ones.

    `functions.{name}:{n}`, where n counts the calls of the whole conversation; such an id is kept as it is.
    """
    renamed = []
    num_calls = 0
    for message in messages:
        calls = [_with_own_id(call, num_calls + n) for n, call in enumerate(message.tool_calls)]
        num_calls += len(calls)
        renamed.append(replace(message, tool_calls=tuple(calls)))
    return renamed


def _with_own_id(call: ToolCall, number: int) -> ToolCall:
    if re.fullmatch(f"functions\\.{re.escape(call.name)}:[0-9]+", call.id or ""):
        return call
    return replace(call, id=f"functions.{call.name}:{number}")
