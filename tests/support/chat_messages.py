"""Messages as clients send them."""

from __future__ import annotations

from typing import Any

from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.chat.rendering import render_text

Message = dict[str, Any]

TOOL = {"type": "function", "function": {"name": "f", "description": "Do it.", "parameters": {"type": "object"}}}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def developer(content: Any) -> Message:
    return {"role": "developer", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def tool(content: Any, call_id: str | None = "call_1") -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(name: str, arguments: Any, call_id: str | None = "call_1") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def render(format_name: str, messages: list[Message], **options: Any) -> str:
    return render_text(CHAT_FORMATS[format_name].encode(read_conversation(messages, **options)))
