"""Chat formats: from messages to the parts of a prompt, and from an output to its reasoning and its answer.

DeepSeek V3.1's format (its chat template; V3.1-Terminus and V3.2-Exp share it):

    <bos>{system}<User>{question}<Assistant></think>{answer}<eos><User>{question}<Assistant><think>

The last tag is `<think>` with thinking and `</think>` without. Earlier answers are shown without their reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

Message = Mapping[str, Any]

_FIELDS = {
    "system": {"content"},
    "user": {"content"},
    "assistant": {"content", "refusal", "tool_calls", "prefix"},
    "tool": {"content", "tool_call_id"},
}
# Clients send these back with the answers that they were given, or for other services; no format shows them.
_FIELDS_WITHOUT_EFFECT = {"role", "name", "annotations", "id", "reasoning_content", "reasoning"}


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The way in which a family of models writes conversations."""

    encode: Callable[..., list[Part]]
    """`encode(messages, thinking=..., tokenizer=...)`: the prompt up to and including the header of the answer."""
    reasoning_start: str
    reasoning_end: str
    """Added tokens around the reasoning that precedes an answer."""

    def reasoning_is_open(self, parts: Sequence[Part]) -> bool:
        """Whether a rendered prompt ends inside reasoning, so that the output starts there."""
        last = next((part for part in reversed(parts) if isinstance(part, Special)), None)
        return last == Special(self.reasoning_start)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as token ids, and the token that ends the reasoning which the prompt leaves open, if it does."""

    token_ids: list[int]
    reasoning_end_token_id: int | None = None


def render_chat(
    messages: Sequence[Message], *, chat_format: ChatFormat, thinking: bool, tokenizer: Tokenizer
) -> ChatPrompt:
    """ValueError for messages that the format cannot express, by index, and for tokens that the tokenizer lacks."""
    parts = chat_format.encode(messages, thinking=thinking, tokenizer=tokenizer)
    is_open = chat_format.reasoning_is_open(parts)
    end = tokenizer.special_id(chat_format.reasoning_end) if is_open else None
    return ChatPrompt(tokenizer.encode_rendered(parts), end)


def split_reasoning(
    text: str, token_ids: Sequence[int], *, end_token_id: int, tokenizer: Tokenizer, skip_special_tokens: bool = True
) -> tuple[str, str | None]:
    """The reasoning and the answer of an output that starts inside its reasoning; None for an answer not begun.

    The first `end_token_id` splits them. Ordinary tokens that spell the same text are part of the reasoning.
    """
    if end_token_id not in token_ids:
        return text, None
    position = list(token_ids).index(end_token_id)
    reasoning = tokenizer.decode(token_ids[:position], skip_special_tokens)
    with_end = tokenizer.decode(token_ids[: position + 1], skip_special_tokens)
    return text[: len(reasoning)], text[len(with_end) :]


def encode_deepseek_v31(messages: Sequence[Message], *, thinking: bool, tokenizer: Tokenizer) -> list[Part]:
    """Render OpenAI-style messages for `Tokenizer.encode_rendered`; all their text stays text, whatever it spells.

    Roles: system and developer (all joined by a blank line at the top), user, assistant (`content`, `tool_calls`; its
    reasoning, up to the first `</think>` of the content, is dropped, as the format has it; a `refusal` stands in for
    missing content), tool. Content is a string
    or a list of text parts, which are joined by newlines. A last assistant message with `prefix: true` is continued as
    it stands, inside its reasoning if `thinking`.
    ValueError: a message that the format cannot express, by its index; special tokens the tokenizer lacks, by name.
    """
    _check_messages(messages)
    parts: list[Part] = [
        Special(BOS),
        "\n\n".join(_text(m, i) for i, m in enumerate(messages) if _role(m) == "system"),
    ]
    previous = ""
    for i, message in enumerate(messages):
        role = _role(message)
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


DEEPSEEK_V31 = ChatFormat(encode=encode_deepseek_v31, reasoning_start=THINK_START, reasoning_end=THINK_END)
CHAT_FORMATS: dict[str, ChatFormat] = {"deepseek-v3.1": DEEPSEEK_V31}
"""The formats that a family of models can name."""


def render_text(parts: Sequence[Part]) -> str:
    """The prompt as one string, for people to read: encoding it again could turn a user's text into special tokens."""
    return "".join(p if isinstance(p, str) else p.text for p in parts)


def _role(message: Message) -> str:
    """The message's role; developer is OpenAI's newer name of system."""
    role: str = message["role"]
    return "system" if role == "developer" else role


def _arguments(value: str | Message) -> str:
    """The arguments of a call as JSON text; some clients send them parsed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _assistant_turn(message: Message, index: int) -> list[Part]:
    text = _text(message, index) if message.get("content") is not None else message.get("refusal") or ""
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
            function = call["function"]
            parts += [Special(TOOL_CALL_BEGIN), function["name"], Special(TOOL_SEP)]
            parts += [_arguments(function["arguments"]), Special(TOOL_CALL_END)]
        parts.append(Special(TOOL_CALLS_END))
    return [*parts, Special(EOS)]


def _text(message: Message, index: int) -> str:
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


def _check_messages(messages: Sequence[Message]) -> None:
    """Check everything about messages except their text."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a non-empty list")
    previous = ""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}] must be an object with role and content, got {message!r}")
        role = message.get("role")
        if not isinstance(role, str) or role not in (*_FIELDS, "developer"):
            raise ValueError(f"messages[{i}]: role must be one of {', '.join(_FIELDS)}, developer, got {role!r}")
        role = _role(message)
        known = _FIELDS[role] | _FIELDS_WITHOUT_EFFECT
        unknown = sorted(str(k) for k, v in message.items() if k not in known and v not in (None, [], {}))
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


def _check_assistant(message: Message, index: int, is_last: bool) -> None:
    prefix, calls = message.get("prefix"), message.get("tool_calls")
    if prefix is not None and not isinstance(prefix, bool):
        raise ValueError(f"messages[{index}]: prefix must be true or false, got {prefix!r}")
    if prefix and not is_last:
        raise ValueError(f"messages[{index}]: only the last message can have prefix: true")
    if prefix and (calls or message.get("reasoning_content") or message.get("reasoning")):
        raise ValueError(f"messages[{index}]: a message with prefix: true has content only")
    texts = ("content", "refusal", "reasoning_content", "reasoning")
    if not calls and all(message.get(name) is None for name in texts):
        raise ValueError(f"messages[{index}]: an assistant message needs content or tool_calls")
    if not isinstance(message.get("refusal"), str | None):
        raise ValueError(f"messages[{index}]: refusal must be a string, got {message['refusal']!r}")
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"messages[{index}]: tool_calls must be a list, got {calls!r}")
    for call in calls or []:
        function = call.get("function") if isinstance(call, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), str | Mapping)
        ):
            raise ValueError(
                f"messages[{index}]: a tool call must be "
                f'{{"type": "function", "function": {{"name": ..., "arguments": "JSON text"}}}}, got {call!r}'
            )
