"""Prompts of DeepSeek V3, R1, V3.1 and V3.2-Exp.

V3       <bos>{system}<User>{question}<Assistant>{answer}<eos><User>{question}<Assistant>
R1       the same; the answer begins with `<think>`, which the prompt of the first release ends with
V3.1     <bos>{system}<User>{question}<Assistant></think>{answer}<eos><User>{question}<Assistant><think>

In V3.1 the last tag is `<think>` with thinking and `</think>` without. Reasoning of earlier answers is never shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..tokenization.tokenizer import (
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
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    TOOL_SEP,
    USER,
    Part,
    Special,
)
from .conversation import ChatMessage, Conversation, ToolCall
from .rendering import (
    check_has_question,
    check_prefix_has_content_only,
    function_of,
    mark_tags,
    results_from,
    to_json,
    without_empty,
)

_CALL_TAGS = (TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEP)

_TOOLS_BEGIN = """

## Tools
You have access to the following tools:
"""
_TOOLS_END_V31 = """
IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""
# DeepSeek published no text for V3 and R1: this is V3.1's with their way to write a call.
_TOOLS_END_V3 = """
IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name
```json
tool_call_arguments
```<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, begin each further one on a new line
"""


def encode_deepseek_v3(conversation: Conversation) -> list[Part]:
    """V3 and V3-0324, which do not think: `</think>` in an answer is text like any other."""
    return _encode_v3(conversation, before_answer=(), has_reasoning=False)


def encode_deepseek_r1(conversation: Conversation) -> list[Part]:
    """R1 since February 2025: the prompt opens the reasoning."""
    return _encode_v3(conversation, before_answer=(Special(THINK_START), "\n"), has_reasoning=True)


def encode_deepseek_r1_0528(conversation: Conversation) -> list[Part]:
    """R1-0528: the model opens the reasoning itself."""
    return _encode_v3(conversation, before_answer=(), has_reasoning=True)


def encode_deepseek_v31(conversation: Conversation) -> list[Part]:
    """V3.1 and V3.1-Terminus."""
    check_has_question(conversation)
    return _encode_v31(conversation)


def encode_deepseek_v32_exp(conversation: Conversation) -> list[Part]:
    """V3.2-Exp: V3.1, and a conversation of system messages alone is answered too."""
    return _encode_v31(conversation)


def _encode_v3(conversation: Conversation, *, before_answer: Iterable[Part], has_reasoning: bool) -> list[Part]:
    check_has_question(conversation)
    check_prefix_has_content_only(conversation)
    parts = [*_system(conversation, _TOOLS_END_V3)]
    turns = _turns(conversation)
    for i, message in enumerate(turns):
        if message.role == "user":
            parts += [Special(USER), message.text("\n"), Special(ASSISTANT)]
        elif message.role == "assistant":
            text = _text_after_reasoning(message, conversation, last=True) if has_reasoning else message.text("\n")
            parts += _answer(message, text, _calls_v3(message.tool_calls))
        elif turns[i - 1].role != "tool":
            results = map(_result, results_from(turns, i))
            parts += [Special(TOOL_OUTPUTS_BEGIN), *_joined_by_newline(results), Special(TOOL_OUTPUTS_END)]
    if turns[-1].role == "user":
        parts += before_answer
    return without_empty(parts)


def _encode_v31(conversation: Conversation) -> list[Part]:
    check_prefix_has_content_only(conversation)
    parts = [*_system(conversation, _TOOLS_END_V31)]
    previous = None
    for message in _turns(conversation):
        if message.role == "user":
            parts += [Special(USER), message.text("\n")]
        elif message.role == "assistant":
            if previous == "user":  # answers to tools and further answers have no header
                parts += _header_v31(is_reasoning=message.is_prefix and conversation.thinking)
            text = _text_after_reasoning(message, conversation, last=False)
            parts += _answer(message, text, _calls_v31(message.tool_calls))
        else:
            parts += _result(message)
        previous = message.role
    if previous in ("user", None):
        parts += _header_v31(is_reasoning=conversation.thinking)
    return without_empty(parts)


def _turns(conversation: Conversation) -> list[ChatMessage]:
    """The messages that keep their place: all but system messages, which move to the front."""
    return [message for message in conversation.messages if message.role != "system"]


def _system(conversation: Conversation, tools_end: str) -> Iterator[Part]:
    yield Special(BOS)
    yield "\n\n".join(message.text("\n") for message in conversation.messages if message.role == "system")
    if not conversation.tools:
        return
    yield _TOOLS_BEGIN
    for function in map(function_of, conversation.tools):
        yield f"\n### {function['name']}\nDescription: {function.get('description') or ''}\n\n"
        yield f"Parameters: {to_json(function.get('parameters') or {})}\n"
    yield from mark_tags(tools_end, _CALL_TAGS)


def _header_v31(*, is_reasoning: bool) -> list[Part]:
    return [Special(ASSISTANT), Special(THINK_START if is_reasoning else THINK_END)]


def _text_after_reasoning(message: ChatMessage, conversation: Conversation, *, last: bool) -> str:
    """The answer without the reasoning that its content begins with: all up to the last or the first `</think>`."""
    text = message.text("\n")
    if message.is_prefix and THINK_END in text:
        raise ValueError(
            f"messages[{len(conversation.messages) - 1}]: a prefix must not contain {THINK_END}; "
            "it is continued as it stands"
        )
    return text.split(THINK_END, -1 if last else 1)[-1]


def _answer(message: ChatMessage, text: str, calls: Iterable[Part]) -> list[Part]:
    return [text] if message.is_prefix else [text, *calls, Special(EOS)]


def _calls_v3(calls: Sequence[ToolCall]) -> Iterator[Part]:
    if not calls:
        return
    yield Special(TOOL_CALLS_BEGIN)
    yield from _joined_by_newline(
        [
            *(Special(TOOL_CALL_BEGIN), "function", Special(TOOL_SEP), call.name),
            *("\n```json\n", call.arguments, "\n```", Special(TOOL_CALL_END)),
        ]
        for call in calls
    )
    yield Special(TOOL_CALLS_END)


def _calls_v31(calls: Sequence[ToolCall]) -> Iterator[Part]:
    if not calls:
        return
    yield Special(TOOL_CALLS_BEGIN)
    for call in calls:
        yield from (Special(TOOL_CALL_BEGIN), call.name, Special(TOOL_SEP), call.arguments, Special(TOOL_CALL_END))
    yield Special(TOOL_CALLS_END)


def _result(message: ChatMessage) -> list[Part]:
    return [Special(TOOL_OUTPUT_BEGIN), message.text("\n"), Special(TOOL_OUTPUT_END)]


def _joined_by_newline(items: Iterable[Iterable[Part]]) -> Iterator[Part]:
    for i, item in enumerate(items):
        if i > 0:
            yield "\n"
        yield from item
