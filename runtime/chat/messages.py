"""OpenAI's messages and tools, checked and read into a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from .conversation import ChatMessage, Conversation, Role, ToolCall

_FIELDS = {
    "system": {"content"},
    "user": {"content"},
    "assistant": {"content", "refusal", "tool_calls", "prefix"},
    "tool": {"content", "tool_call_id"},
}
# Clients send these back with the answers that they were given, or for other services.
_FIELDS_OF_EVERY_ROLE = {"role", "name", "annotations", "id", "reasoning_content", "reasoning"}


def read_conversation(
    messages: object,
    *,
    tools: object = None,
    thinking: bool = False,
    reasoning_effort: str | None = None,
    clear_thinking: bool | None = None,
    drop_thinking: bool | None = None,
    response_schema: Any = None,
    continue_final_message: bool = False,
) -> Conversation:
    """Read messages and tools as they come from JSON.

    Roles: system, developer, user, assistant, tool. Content is a string, a list of text parts, or for an assistant
    null, which a `refusal` stands in for. Reasoning of an assistant is `reasoning_content` or `reasoning`. A last
    assistant message with `prefix: true`, or any with `continue_final_message`, is continued.
    ValueError: what no chat format can express, by the index of the message or tool.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a non-empty list")
    read: list[ChatMessage] = []
    current_round = _Round(())
    for i, message in enumerate(messages):
        item = _read_message(message, i)
        if item.role == "tool":
            item = replace(item, call_index=current_round.answer(message.get("tool_call_id"), i))
        elif item.role != "system":
            current_round = _Round(item.tool_calls)
        read.append(item)
    if continue_final_message:
        read[-1] = _as_prefix(read[-1], len(read) - 1)
    _check_prefix(read)
    _check_end(read)
    return Conversation(
        messages=tuple(read),
        tools=_read_tools(tools),
        thinking=thinking,
        reasoning_effort=reasoning_effort,
        clear_thinking=clear_thinking,
        drop_thinking=drop_thinking,
        response_schema=response_schema,
    )


class _Round:
    """The calls of an assistant message, while the tool messages that answer them are read."""

    def __init__(self, calls: Sequence[ToolCall]) -> None:
        self._has_calls = bool(calls)
        self._open = dict(enumerate(calls))

    def answer(self, call_id: object, index: int) -> int:
        """The position of the call that messages[index] answers; without ids, calls are answered in order."""
        if not self._has_calls:
            raise ValueError(f"messages[{index}]: a tool message must follow an assistant message with tool_calls")
        if not isinstance(call_id, str | None):
            raise ValueError(f"messages[{index}]: tool_call_id must be a string, got {call_id!r}")
        for position, call in self._open.items():
            if call_id is None or call.id is None or call.id == call_id:
                del self._open[position]
                return position
        raise ValueError(
            f"messages[{index}]: tool_call_id {call_id!r} is none of the calls that still want a result: "
            f"{', '.join(repr(call.id) for call in self._open.values()) or 'all have one'}"
        )


def _read_message(message: object, index: int) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}] must be an object with role and content, got {message!r}")
    given = message.get("role")
    if not isinstance(given, str) or given not in (*_FIELDS, "developer"):
        raise ValueError(f"messages[{index}]: role must be one of {', '.join(_FIELDS)}, developer, got {given!r}")
    role = cast(Role, "system" if given == "developer" else given)
    known = _FIELDS[role] | _FIELDS_OF_EVERY_ROLE
    unknown = sorted(str(k) for k, v in message.items() if k not in known and v not in (None, [], {}))
    if unknown:
        raise ValueError(f"messages[{index}]: chat formats have no {', '.join(unknown)} for role {given}")
    if role == "assistant":
        return _read_assistant(message, index)
    return ChatMessage(role=role, content=_read_content(message, index), is_developer=given == "developer")


def _read_assistant(message: Mapping[str, Any], index: int) -> ChatMessage:
    prefix, calls = message.get("prefix"), message.get("tool_calls")
    if not isinstance(prefix, bool | None):
        raise ValueError(f"messages[{index}]: prefix must be true or false, got {prefix!r}")
    if not isinstance(calls, list | None):
        raise ValueError(f"messages[{index}]: tool_calls must be a list, got {calls!r}")
    texts = ("refusal", "reasoning_content", "reasoning")
    for name in texts:
        if not isinstance(message.get(name), str | None):
            raise ValueError(f"messages[{index}]: {name} must be a string, got {message[name]!r}")
    if not calls and all(message.get(name) is None for name in ("content", *texts)):
        raise ValueError(f"messages[{index}]: an assistant message needs content or tool_calls")
    content: tuple[str, ...] = ()
    if message.get("content") is not None:
        content = _read_content(message, index)
    elif message.get("refusal") is not None:
        content = (message["refusal"],)
    reasoning = message.get("reasoning_content")
    return ChatMessage(
        role="assistant",
        content=content,
        reasoning=message.get("reasoning") if reasoning is None else reasoning,
        tool_calls=tuple(_read_call(call, index) for call in calls or ()),
        is_prefix=bool(prefix),
    )


def _read_call(call: object, index: int) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(call.get("id"), str | None)
        or not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("arguments"), str | Mapping)
    ):
        raise ValueError(
            f'messages[{index}]: a tool call must be {{"id": ..., "type": "function", '
            f'"function": {{"name": ..., "arguments": "JSON text"}}}}, got {call!r}'
        )
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=call.get("id"), name=function["name"], arguments=arguments)


def _read_content(message: Mapping[str, Any], index: int) -> tuple[str, ...]:
    content = message.get("content")
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        raise ValueError(f"messages[{index}]: content must be a string or a list of text parts, got {content!r}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'messages[{index}]: a content part must be {{"type": "text", "text": ...}}, got {part!r}')
    return tuple(part["text"] for part in content)


def _as_prefix(message: ChatMessage, index: int) -> ChatMessage:
    if message.role != "assistant":
        raise ValueError(
            f"messages[{index}]: continue_final_message needs an assistant message to continue, got role {message.role}"
        )
    return replace(message, is_prefix=True)


def _check_prefix(messages: Sequence[ChatMessage]) -> None:
    for i, message in enumerate(messages):
        if message.is_prefix and i != len(messages) - 1:
            raise ValueError(f"messages[{i}]: only the last message can have prefix: true")
        if message.is_prefix and message.tool_calls:
            raise ValueError(f"messages[{i}]: a message to continue cannot have tool_calls")


def _check_end(messages: Sequence[ChatMessage]) -> None:
    last = next((message for message in reversed(messages) if message.role != "system"), None)
    if last is not None and last.role == "assistant" and not last.is_prefix:
        raise ValueError(
            f"messages[{len(messages) - 1}]: nothing is left to answer; end with a user or tool message, or with an "
            "assistant message that has prefix: true"
        )


def _read_tools(tools: object) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list, got {tools!r}")
    for i, tool in enumerate(tools):
        _check_tool(tool, f"tools[{i}]")
    return tuple(tools)


def _check_tool(tool: object, path: str) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(function, Mapping):
        raise ValueError(f'{path} must be {{"type": "function", "function": {{"name": ..., ...}}}}, got {tool!r}')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{path}.function.name must be a non-empty string, got {function.get('name')!r}")
    if not isinstance(function.get("description"), str | None):
        raise ValueError(f"{path}.function.description must be a string, got {function['description']!r}")
    if not isinstance(function.get("parameters"), Mapping | None):
        raise ValueError(
            f"{path}.function.parameters must be a JSON schema (an object), got {function['parameters']!r}"
        )
