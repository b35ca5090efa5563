"""Chat messages to a prompt in the format of DeepSeek V3.1 (its chat template; V3.1-Terminus and V3.2-Exp share it).

    <bos>{system}<User>{question}<Assistant></think>{answer}<eos><User>{question}<Assistant><think>

The last tag is `<think>` when thinking and `</think>` when not. Earlier answers are shown without their thinking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    THINK_END,
    THINK_START,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_OUTPUT_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_SEP,
    USER,
    Part,
    Special,
    Tokenizer,
)

_FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls", "prefix"},
    "tool": {"role", "content", "tool_call_id"},
}


def split_thinking(text: str) -> tuple[str, str]:
    """The thinking and the answer of a text that begins with thinking; one that was cut off has no answer yet."""
    thinking, _, answer = text.partition(THINK_END)
    return thinking, answer


def encode_chat(messages: Sequence[Mapping[str, Any]], *, thinking: bool, tokenizer: Tokenizer) -> list[Part]:
    """Render OpenAI-style messages for `Tokenizer.encode_rendered`; all their text stays text, whatever it spells.

    Roles: system (all joined by a blank line at the top), user, assistant (`content`, `tool_calls`; its thinking, in
    `reasoning_content` or up to the first `</think>` of the content, is dropped, as the format has it), tool.
    Content is a string or a list of text parts, which are joined by newlines. A last assistant message with
    `prefix: true` is continued as it stands, inside its thinking if `thinking`.
    ValueError: a message that the format cannot express, by its index; special tokens the tokenizer lacks, by name.
    """
    _check_messages(messages)
    parts: list[Part] = [
        Special(BOS),
        "\n\n".join(_text(m, i) for i, m in enumerate(messages) if m["role"] == "system"),
    ]
    previous = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            parts += [Special(USER), _text(message, i)]
        elif role == "assistant":
            if previous != "tool":  # an answer to a tool's output follows it directly
                inside = thinking and message.get("prefix")
                parts += [Special(ASSISTANT), Special(THINK_START if inside else THINK_END)]
            parts += _assistant_turn(message, i)
        elif role == "tool":
            parts += [Special(TOOL_OUTPUT_BEGIN), _text(message, i), Special(TOOL_OUTPUT_END)]
        if role != "system":
            previous = role
    if previous == "user":
        parts += [Special(ASSISTANT), Special(THINK_START if thinking else THINK_END)]
    parts = [p for p in parts if p != ""]
    lacking = {p.text for p in parts if isinstance(p, Special) and tokenizer.special_id(p.text) is None}
    if lacking:
        raise ValueError(
            f"this tokenizer has no token {', '.join(sorted(lacking))}, which this conversation needs; "
            "send a prompt or token ids instead"
        )
    return parts


def render_text(parts: Sequence[Part]) -> str:
    """The prompt as one string, for people to read: encoding it again could turn a user's text into special tokens."""
    return "".join(p if isinstance(p, str) else p.text for p in parts)


def _assistant_turn(message: Mapping[str, Any], index: int) -> list[Part]:
    text = _text(message, index) if message.get("content") is not None else ""
    if message.get("prefix"):
        if THINK_END in text:
            raise ValueError(f"messages[{index}]: a prefix must not contain {THINK_END}; it is continued as it stands")
        return [text]
    if THINK_END in text:
        text = text.split(THINK_END, 1)[1]
    parts: list[Part] = [text]
    if calls := message.get("tool_calls"):
        parts.append(Special(TOOL_CALLS_BEGIN))
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            parts += [Special(TOOL_CALL_BEGIN), name, Special(TOOL_SEP), arguments, Special(TOOL_CALL_END)]
        parts.append(Special(TOOL_CALLS_END))
    return [*parts, Special(EOS)]


def _text(message: Mapping[str, Any], index: int) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"messages[{index}]: content must be a string or a list of text parts, got {content!r}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'messages[{index}]: a content part must be {{"type": "text", "text": ...}}, got {part!r}')
        texts.append(part["text"])
    return "\n".join(texts)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Everything about messages but their text."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a non-empty list")
    previous = ""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}] must be an object with role and content, got {message!r}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _FIELDS:
            raise ValueError(f"messages[{i}]: role must be one of {', '.join(_FIELDS)}, got {role!r}")
        unknown = sorted(str(k) for k, v in message.items() if k not in _FIELDS[role] and v is not None)
        if unknown:
            raise ValueError(f"messages[{i}]: the prompt format has no {', '.join(unknown)} for role {role}")
        if role == "assistant":
            _check_assistant(message, i, is_last=i == len(messages) - 1)
        if role == "tool" and previous not in ("tool call", "tool"):
            raise ValueError(f"messages[{i}]: a tool message must follow an assistant message with tool_calls")
        if role != "system":
            previous = "tool call" if message.get("tool_calls") else role
    if previous == "":
        raise ValueError("messages has system messages only; add a user message")
    if previous == "tool call" or (previous == "assistant" and not messages[-1].get("prefix")):
        raise ValueError(
            f"messages[{len(messages) - 1}]: nothing is left to answer; end with a user or tool message, or with an "
            "assistant message that has prefix: true"
        )


def _check_assistant(message: Mapping[str, Any], index: int, is_last: bool) -> None:
    prefix, calls = message.get("prefix"), message.get("tool_calls")
    if prefix is not None and not isinstance(prefix, bool):
        raise ValueError(f"messages[{index}]: prefix must be true or false, got {prefix!r}")
    if prefix and not is_last:
        raise ValueError(f"messages[{index}]: only the last message can have prefix: true")
    if prefix and (calls or message.get("reasoning_content")):
        raise ValueError(f"messages[{index}]: a message with prefix: true has content only")
    if message.get("content") is None and not calls:
        raise ValueError(f"messages[{index}]: an assistant message needs content or tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"messages[{index}]: tool_calls must be a list, got {calls!r}")
    for call in calls or []:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not all(
            isinstance(function.get(k), str) for k in ("name", "arguments")
        ):
            raise ValueError(
                f"messages[{index}]: a tool call must be "
                f'{{"type": "function", "function": {{"name": ..., "arguments": "JSON text"}}}}, got {call!r}'
            )
