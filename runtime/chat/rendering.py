"""What the writers of prompts share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..tokenization.tokenizer import Part, Special
from .conversation import ChatMessage, Conversation, ToolCall


def render_text(parts: Sequence[Part]) -> str:
    """The prompt as one string, for people to read: encoding it again could turn a user's text into special tokens."""
    return "".join(part if isinstance(part, str) else part.text for part in parts)


def mark_tags(text: str, tags: Iterable[str]) -> list[Part]:
    """Text of the format itself, with the tags in it as added tokens. Never give it text of a user."""
    known = frozenset(tags)
    pattern = "|".join(re.escape(tag) for tag in known)
    pieces = re.split(f"({pattern})", text)
    return [Special(piece) if piece in known else piece for piece in pieces if piece]


def without_empty(parts: Iterable[Part]) -> list[Part]:
    """The parts without empty texts, so that the last one is what the prompt ends with."""
    return [part for part in parts if part != ""]


def to_json(value: Any) -> str:
    """JSON as most formats write it: default separators, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a tool describes."""
    function: Mapping[str, Any] = tool["function"]
    return function


def named_arguments(call: ToolCall) -> dict[str, Any]:
    """Arguments by name, for formats that write each apart.

    Text that is no JSON object, which models write too, becomes a single argument named "arguments".
    """
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"arguments": call.arguments}


def results_from(messages: Sequence[ChatMessage], start: int) -> Sequence[ChatMessage]:
    """The tool messages in a row that begin at `start`."""
    end = start
    while end < len(messages) and messages[end].role == "tool":
        end += 1
    return messages[start:end]


def by_call(results: Iterable[ChatMessage]) -> list[ChatMessage]:
    """Tool messages of one round in the order of the calls that they answer."""
    return sorted(results, key=lambda result: result.call_index or 0)


def last_index(messages: Sequence[ChatMessage], *roles: str) -> int:
    """Index of the last message of one of these roles; -1 if there is none."""
    return max((i for i, message in enumerate(messages) if message.role in roles), default=-1)


def check_has_question(conversation: Conversation) -> None:
    """Refuse a conversation of system messages alone, for formats that write no header after it."""
    if all(message.role == "system" for message in conversation.messages):
        raise ValueError("messages has system messages only; add a user message")


def check_prefix_has_content_only(conversation: Conversation) -> None:
    """Refuse reasoning in a message to continue, for formats that could not show it."""
    if conversation.messages[-1].is_prefix and conversation.messages[-1].reasoning is not None:
        raise ValueError(
            f"messages[{len(conversation.messages) - 1}]: in this chat format a message to continue has content only; "
            "leave its reasoning out"
        )
