"""What a chat request says about its conversation, beside the messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.runtime.chat.call_grammar import CallRules

from .errors import ApiError, json_type
from .fields import check_fields, shown, without_nulls

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TEMPLATE_SWITCHES = ("thinking", "enable_thinking", "clear_thinking", "drop_thinking")
_CHOICES = 'auto, none, required, or {"type": "function", "function": {"name": ..}}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """Options of a conversation, as a chat format takes them."""

    tools: Sequence[Mapping[str, Any]] | None = None
    """None also with tool_choice "none"."""
    calls: CallRules | None = None
    """The calls that the answer must have; None: as the model likes."""
    thinking: bool | None = None
    """None: as the chat format does by default."""
    reasoning_effort: str | None = None
    clear_thinking: bool | None = None
    drop_thinking: bool | None = None
    continue_final_message: bool = False


def read_chat_options(body: Mapping[str, Any], *, thinking: bool | None) -> ChatOptions:
    """Read the options of a body without nulls; ApiError names what is wrong. thinking: for a body that is silent."""
    switches = read_template_kwargs(body.get("chat_template_kwargs", {}))
    effort = body.get("reasoning_effort")
    if effort is not None and effort not in REASONING_EFFORTS:
        message = f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}, got {shown(effort)}"
        raise ApiError("invalid_parameter", message, "reasoning_effort")
    tools, calls = _read_tools(body)
    wanted = switches.get("thinking")
    if wanted is None:
        wanted = False if effort == "none" else thinking
    return ChatOptions(
        tools=tools,
        calls=calls,
        thinking=wanted,
        reasoning_effort=effort,
        clear_thinking=switches.get("clear_thinking"),
        drop_thinking=switches.get("drop_thinking"),
        continue_final_message=_continues_final_message(body),
    )


def read_template_kwargs(kwargs: object) -> dict[str, bool]:
    """The switches of chat_template_kwargs; `enable_thinking` means the same as `thinking` and becomes it."""
    path = "chat_template_kwargs"
    if not isinstance(kwargs, Mapping):
        raise ApiError("invalid_type", f"{path} must be an object, got {json_type(kwargs)}", path)
    check_fields(kwargs, _TEMPLATE_SWITCHES, f"{path}.")
    given = without_nulls(kwargs)
    for name, value in given.items():
        if not isinstance(value, bool):
            message = f"{path}.{name} must be true or false, got {json_type(value)}"
            raise ApiError("invalid_type", message, f"{path}.{name}")
    if "enable_thinking" in given:
        enabled = given.pop("enable_thinking")
        if given.setdefault("thinking", enabled) is not enabled:
            message = f"{path}.thinking and {path}.enable_thinking mean the same and contradict each other; give one"
            raise ApiError("invalid_parameter", message, path)
    return given


def _read_tools(body: Mapping[str, Any]) -> tuple[Any, CallRules | None]:
    """The tools to show, not checked yet, and the calls that are asked for."""
    tools = body.get("tools")
    choice = body.get("tool_choice", "auto")
    # One call that is forced, unless several are asked for: a weak model would go on calling.
    is_parallel = body.get("parallel_tool_calls", choice == "auto")
    if not isinstance(is_parallel, bool):
        message = f"parallel_tool_calls must be true or false, got {json_type(is_parallel)}"
        raise ApiError("invalid_type", message, "parallel_tool_calls")
    if choice == "none":
        return None, None
    if choice == "auto":
        return tools, CallRules(is_required=False, is_parallel=is_parallel) if _has_strict(tools) else None
    name = None if choice == "required" else _named_tool(choice)
    if not tools:
        raise ApiError("invalid_parameter", f"tool_choice = {shown(choice)} needs tools", "tool_choice")
    return tools, CallRules(is_required=True, name=name, is_parallel=is_parallel)


def _has_strict(tools: Any) -> bool:
    if not isinstance(tools, list):
        return False  # the chat format says what is wrong
    functions = [tool.get("function") for tool in tools if isinstance(tool, Mapping)]
    return any(isinstance(function, Mapping) and function.get("strict") is True for function in functions)


def _named_tool(choice: object) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ApiError("invalid_parameter", f"tool_choice must be {_CHOICES}, got {shown(choice)}", "tool_choice")
    return name


def _continues_final_message(body: Mapping[str, Any]) -> bool:
    """Whether vLLM's pair of switches asks to continue the last message; one switch alone may stand for both."""
    continues = body.get("continue_final_message", False)
    adds_header = body.get("add_generation_prompt", not continues)
    for name, value in (("continue_final_message", continues), ("add_generation_prompt", adds_header)):
        if not isinstance(value, bool):
            raise ApiError("invalid_type", f"{name} must be true or false, got {json_type(value)}", name)
    if continues and adds_header:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise ApiError("invalid_parameter", message, "continue_final_message")
    if not continues and not adds_header:
        message = "add_generation_prompt false is not supported: an answer needs its header; remove it"
        raise ApiError("unsupported_field", message, "add_generation_prompt")
    return bool(continues)
