"""A conversation as a chat format sees it, read from OpenAI's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call in an assistant message."""

    id: str | None
    name: str
    arguments: str
    """JSON text as the client sent it; arguments that were sent as an object, dumped with default separators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """One checked message."""

    role: Role
    content: tuple[str, ...] = ()
    """Text parts, which a format joins in its own way; () for missing or null content."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    call_index: int | None = None
    """The call that a tool message answers: its position among the calls of the assistant message before it."""
    is_developer: bool = False
    """Whether the role was `developer`, which formats without such a role read as system."""
    is_prefix: bool = False
    """Whether the answer continues this last assistant message."""

    def text(self, separator: str) -> str:
        """The content with its parts joined."""
        return separator.join(self.content)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages and the options that change how they are written."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools as OpenAI's objects {"type": "function", "function": {..}}, with the keys in the order they were given."""
    thinking: bool = False
    reasoning_effort: str | None = None
    clear_thinking: bool | None = None
    """GLM: whether earlier reasoning is dropped; None: as the format does by default."""
    drop_thinking: bool | None = None
    """DeepSeek-V4: the same."""
    response_schema: Any = None
    """JSON value that the answer must follow, for formats that write it into the prompt."""
