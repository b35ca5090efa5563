"""Prompts of GLM-4.6, 4.7 and 5 to 5.3.

[gMASK]<sop><|system|>{effort}<|system|>{tools}<|system|>{system}<|user|>{question}
<|assistant|><think>{reasoning}</think>{answer}{calls}<|observation|>{results}<|assistant|><think>

Turns have no end. In GLM-4.6 each of these is on a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..tokenization.tokenizer import THINK_END, THINK_START, Part, Special
from .conversation import ChatMessage, Conversation, ToolCall
from .rendering import (
    by_call,
    function_of,
    last_index,
    mark_tags,
    named_arguments,
    results_from,
    to_json,
    without_empty,
)

GMASK = "[gMASK]"
SOP = "<sop>"
END_OF_TEXT = "<|endoftext|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
OBSERVATION = "<|observation|>"
NO_THINK = "/nothink"
CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
KEY_START = "<arg_key>"
KEY_END = "</arg_key>"
VALUE_START = "<arg_value>"
VALUE_END = "</arg_value>"
RESULT_START = "<tool_response>"
RESULT_END = "</tool_response>"

_TOOLS_BEGIN = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_TOOLS_END = """</tools>

For each function call, output the function name and arguments within the following XML format:
"""
_CALL_EXAMPLE = (
    f"{CALL_START}{{function-name}}",
    *(f"{KEY_START}{{arg-key-1}}{KEY_END}", f"{VALUE_START}{{arg-value-1}}{VALUE_END}"),
    *(f"{KEY_START}{{arg-key-2}}{KEY_END}", f"{VALUE_START}{{arg-value-2}}{VALUE_END}"),
    *("...", CALL_END),
)
_CALL_TAGS = (CALL_START, CALL_END, KEY_START, KEY_END, VALUE_START, VALUE_END)

_OPEN = (Special(THINK_START),)
_CLOSED = (Special(THINK_END),)
_EMPTY = (Special(THINK_START), Special(THINK_END))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Version:
    """What differs between the chat templates."""

    line: str = ""
    """Text after the tags of roles and between the tags of calls and results."""
    has_no_think: bool = False
    """Whether questions end with /nothink when thinking is off."""
    shows_whole_tools: bool = False
    """Whether tools are shown as OpenAI's objects, or only their functions."""
    strips_reasoning: bool = False
    opening: tuple[Part, ...] = _OPEN
    """Begins the answer with thinking."""
    closing: tuple[Part, ...] = _CLOSED
    """Begins the answer without thinking."""
    no_reasoning: tuple[Part, ...] = _EMPTY
    """Begins an earlier answer without reasoning, or whose reasoning was cleared."""
    no_reasoning_yet: tuple[Part, ...] = _EMPTY
    """Begins an answer without reasoning after the last question, with thinking."""
    efforts: tuple[str, ...] | None = None
    """Efforts that have a line of their own; all others mean Max. None: there is no line."""
    can_stop_thinking: bool = True
    clears_reasoning: bool = True
    """Whether reasoning before the last question is dropped, unless the request says otherwise."""
    sorts_results: bool = False


_GLM_46 = _Version(
    line="\n", has_no_think=True, shows_whole_tools=True, strips_reasoning=True, opening=(), closing=("\n", *_EMPTY)
)
_GLM_5 = _Version(shows_whole_tools=True, strips_reasoning=True, no_reasoning=_CLOSED, no_reasoning_yet=_CLOSED)
_GLM_51 = _Version(strips_reasoning=True, no_reasoning=_CLOSED)
_GLM_52 = _Version(closing=_EMPTY, efforts=("high",))
_GLM_53 = _Version(efforts=("low", "high"), can_stop_thinking=False, clears_reasoning=False, sorts_results=True)


def encode_glm_46(conversation: Conversation) -> list[Part]:
    """GLM-4.6, which opens its reasoning itself."""
    return _encode(conversation, _GLM_46)


def encode_glm_5(conversation: Conversation) -> list[Part]:
    """GLM-4.7 and GLM-5."""
    return _encode(conversation, _GLM_5)


def encode_glm_51(conversation: Conversation) -> list[Part]:
    """GLM-5.1."""
    return _encode(conversation, _GLM_51)


def encode_glm_52(conversation: Conversation) -> list[Part]:
    """GLM-5.2."""
    return _encode(conversation, _GLM_52)


def encode_glm_53(conversation: Conversation) -> list[Part]:
    """GLM-5.3, which always thinks."""
    return _encode(conversation, _GLM_53)


def _encode(conversation: Conversation, version: _Version) -> list[Part]:
    messages = conversation.messages
    thinking = conversation.thinking or not version.can_stop_thinking
    clears = version.clears_reasoning if conversation.clear_thinking is None else conversation.clear_thinking
    last_question = last_index(messages, "user")
    parts = [Special(GMASK), Special(SOP), *_effort(conversation, version, thinking), *_tools(conversation, version)]
    for i, message in enumerate(messages):
        text = message.text("")
        if message.role == "system":
            parts += [Special(SYSTEM), version.line, text]
        elif message.role == "user":
            parts += [Special(USER), version.line, text]
            parts += [Special(NO_THINK)] if version.has_no_think and not thinking else ()
        elif message.role == "assistant":
            parts += [Special(ASSISTANT), version.line]
            if message.reasoning and (i > last_question or not clears):
                reasoning = message.reasoning.strip() if version.strips_reasoning else message.reasoning
                parts += [Special(THINK_START), reasoning, Special(THINK_END)]
            else:
                parts += version.no_reasoning_yet if i > last_question and thinking else version.no_reasoning
            parts += _answer(message, version)
        elif messages[i - 1].role != "tool":
            parts += [Special(OBSERVATION), *_results(results_from(messages, i), version)]
    if not messages[-1].is_prefix:
        parts += [Special(ASSISTANT), *(version.opening if thinking else version.closing)]
    return without_empty(parts)


def _effort(conversation: Conversation, version: _Version, thinking: bool) -> Iterator[Part]:
    if version.efforts is not None and thinking:
        effort = conversation.reasoning_effort
        yield Special(SYSTEM)
        yield f"Reasoning Effort: {effort.capitalize() if effort in version.efforts else 'Max'}"


def _tools(conversation: Conversation, version: _Version) -> Iterator[Part]:
    if not conversation.tools:
        return
    yield Special(SYSTEM)
    yield _TOOLS_BEGIN
    for tool in conversation.tools:
        function = {k: v for k, v in function_of(tool).items() if k not in ("strict", "defer_loading")}
        yield to_json(tool if version.shows_whole_tools else function) + "\n"
    yield _TOOLS_END
    yield from mark_tags(version.line.join(_CALL_EXAMPLE), _CALL_TAGS)


def _answer(message: ChatMessage, version: _Version) -> Iterator[Part]:
    text = message.text("")
    shown = text if message.is_prefix else text.strip()
    yield from (version.line, shown) if shown else ()
    for call in message.tool_calls:
        yield from _call(call, version.line)


def _call(call: ToolCall, line: str) -> Iterator[Part]:
    yield from (line, Special(CALL_START), call.name, line)
    for name, value in named_arguments(call).items():
        text = value if isinstance(value, str) else to_json(value)
        yield from (Special(KEY_START), name, Special(KEY_END), line)
        yield from (Special(VALUE_START), text, Special(VALUE_END), line)
    yield Special(CALL_END)


def _results(results: Sequence[ChatMessage], version: _Version) -> Iterator[Part]:
    line = version.line
    for result in by_call(results) if version.sorts_results else results:
        yield from (line, Special(RESULT_START), line, result.text(""), line, Special(RESULT_END))
