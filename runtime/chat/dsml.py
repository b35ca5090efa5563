"""Prompts of DeepSeek V3.2 and V4, which write calls in DSML.

V3.2  <bos>{system}<User>{question}<Assistant><think>{reasoning}</think>{answer}{calls}<eos>{results}<think>
V4    <bos>{effort}{system}<User>{question}<Assistant><think>{reasoning}</think>{answer}{calls}<eos>
      <User>{results}<Assistant><think>

Without thinking each `<think>{reasoning}</think>` is `</think>`, and so it is where earlier reasoning is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from ..tokenization.tokenizer import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER, Part, Special
from .conversation import ChatMessage, Conversation, ToolCall
from .rendering import (
    by_call,
    check_has_question,
    function_of,
    last_index,
    mark_tags,
    named_arguments,
    results_from,
    to_json,
    without_empty,
)

DSML = "｜DSML｜"
"""Marks the tags of calls: ordinary text in V3.2, an added token in V4."""

_TOOLS_V32 = """

## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the \
user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
"""
_TOOLS_V32_END = "\n</functions>\n"

_TOOLS_V4 = """

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_V4_END = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"

_EFFORT_HIGH = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_EFFORT_MAX = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""
_EFFORTS = {"low": "", "max": _EFFORT_MAX}

_RESPONSE_FORMAT = """

## Response Format:

You MUST strictly adhere to the following schema to reply:
"""


def encode_deepseek_v32(conversation: Conversation) -> list[Part]:
    """V3.2: system messages keep their place; a question or a round of results ends with the tag for its answer."""
    messages, thinking = conversation.messages, conversation.thinking
    questions = _questions_v32(messages)
    if not questions:
        check_has_question(conversation)
    _check_rounds(messages)
    _check_places_of_system(messages, questions)
    last_question = max(questions, default=-1)
    instructions = [*_tools_v32(conversation), *_response_format(conversation)]
    first_system = next((i for i, message in enumerate(messages) if message.role == "system"), None)
    parts: list[Part] = [Special(BOS), *(instructions if first_system is None else ())]
    for i, message in enumerate(messages):
        text = message.text("\n")
        own_instructions = instructions if i == first_system else []
        if i in questions:
            title = "\n\n# The user's message is: " if message.is_developer else ""
            parts += [Special(USER), *own_instructions, title, text]
            parts += [Special(ASSISTANT), _think_tag(thinking and i == last_question)]
        elif message.role == "assistant":
            calls = _calls(message.tool_calls, "function_calls", DSML, if_empty="\n")
            parts += _answer(message, calls, shows_reasoning=thinking and i > last_question)
        elif message.role == "system":
            parts += [text, *own_instructions]
        elif messages[i - 1].role != "tool":
            parts += [*_results_v32(by_call(results_from(messages, i)))]
            parts += ["\n\n", _think_tag(thinking and i > last_question)]
    return without_empty(parts)


def encode_deepseek_v4(conversation: Conversation) -> list[Part]:
    """V4: system messages move to the front; questions and results in a row are one user turn.

    All reasoning is kept if there are tools, or else only that after the last user turn (`drop_thinking` False: all).
    """
    _check_rounds(conversation.messages)
    thinking = conversation.thinking
    messages = [message for message in conversation.messages if message.role != "system"]
    system = _joined_texts(message for message in conversation.messages if message.role == "system")
    drops_reasoning = conversation.drop_thinking is not False and not conversation.tools
    first_kept = last_index(messages, "user", "tool") if drops_reasoning else 0
    parts: list[Part] = [Special(BOS), _effort(conversation) if thinking else "", system]
    parts += [*_tools_v4(conversation), *_response_format(conversation)]
    for is_answer, group in groupby(enumerate(messages), key=lambda item: item[1].role == "assistant"):
        if not is_answer:
            parts += [Special(USER), _user_turn_v4([message for _, message in group])]
            continue
        for i, message in group:
            shows_reasoning = thinking and i >= first_kept
            calls = _calls(message.tool_calls, "tool_calls", Special(DSML), if_empty="")
            parts += [Special(ASSISTANT), _think_tag(shows_reasoning)]
            parts += _answer(message, calls, shows_reasoning=shows_reasoning)
    if not conversation.messages[-1].is_prefix:
        parts += [Special(ASSISTANT), _think_tag(thinking)]
    return without_empty(parts)


def _questions_v32(messages: Sequence[ChatMessage]) -> frozenset[int]:
    """Indices of the messages that are written as the user's.

    A developer message is the search agent's question, or, if there are user messages too, what it is to OpenAI:
    a system message.
    """
    users = frozenset(i for i, message in enumerate(messages) if message.role == "user")
    return users or frozenset(i for i, message in enumerate(messages) if message.is_developer)


def _think_tag(is_open: bool) -> Part:
    return Special(THINK_START if is_open else THINK_END)


def _answer(message: ChatMessage, calls: Iterable[Part], *, shows_reasoning: bool) -> list[Part]:
    """An assistant message after its header, which has opened the reasoning if it is shown."""
    text = message.text("\n")
    parts: list[Part] = []
    if shows_reasoning:
        parts.append(message.reasoning or "")
        if text or not message.is_prefix:  # a prefix without content continues its reasoning
            parts.append(Special(THINK_END))
    parts += [text, *calls]
    return parts if message.is_prefix else [*parts, Special(EOS)]


def _results_v32(results: Sequence[ChatMessage]) -> Iterator[Part]:
    yield "\n\n<function_results>"
    for result in results:
        yield from ("\n<result>", result.text("\n"), "</result>")
    yield "\n</function_results>"


def _user_turn_v4(messages: Sequence[ChatMessage]) -> str:
    blocks = []
    for role, group in groupby(messages, key=lambda message: message.role):
        if role == "tool":
            blocks += ["<tool_result>" + result.text("\n") + "</tool_result>" for result in by_call(group)]
        else:
            blocks.append(_joined_texts(group))
    return "\n\n".join(blocks)


def _joined_texts(messages: Iterable[ChatMessage]) -> str:
    """Texts with a blank line between them; V4 skips empty ones."""
    return "\n\n".join(filter(None, (message.text("\n") for message in messages)))


def _calls(calls: Sequence[ToolCall], block: str, dsml: Part, *, if_empty: str) -> Iterator[Part]:
    """The block of calls, whose tags are named with `dsml`; `if_empty` stands for the parameters of a call without."""
    if not calls:
        return
    yield from ("\n\n<", dsml, f"{block}>\n")
    for call in calls:
        yield from ("<", dsml, f'invoke name="{call.name}">\n')
        arguments = named_arguments(call)
        for name, value in arguments.items():
            is_string = isinstance(value, str)
            yield from ("<", dsml, f'parameter name="{name}" string="{"true" if is_string else "false"}">')
            yield value if is_string else to_json(value)
            yield from ("</", dsml, "parameter>\n")
        yield "" if arguments else if_empty
        yield from ("</", dsml, "invoke>\n")
    yield from ("</", dsml, f"{block}>")


def _tools_v32(conversation: Conversation) -> Iterator[Part]:
    if conversation.tools:
        yield from mark_tags(_TOOLS_V32, (THINK_START, THINK_END))
        yield "\n".join(to_json(function_of(tool)) for tool in conversation.tools)
        yield _TOOLS_V32_END


def _tools_v4(conversation: Conversation) -> Iterator[Part]:
    if conversation.tools:
        yield from mark_tags(_TOOLS_V4, (THINK_START, THINK_END, DSML))
        yield "\n".join(to_json(function_of(tool)) for tool in conversation.tools)
        yield _TOOLS_V4_END


def _response_format(conversation: Conversation) -> Iterator[Part]:
    if conversation.response_schema is not None:
        yield _RESPONSE_FORMAT
        yield to_json(conversation.response_schema)


def _effort(conversation: Conversation) -> str:
    """DeepSeek's own library writes the text of "high" for every other effort, and without one."""
    return _EFFORTS.get(conversation.reasoning_effort or "high", _EFFORT_HIGH)


def _check_rounds(messages: Sequence[ChatMessage]) -> None:
    """Refuse rounds of calls that lack results: the models have never seen any."""
    num_results: Counter[int] = Counter()
    last_answer = 0
    for i, message in enumerate(messages):
        if message.role == "assistant":
            last_answer = i
        elif message.role == "tool":
            num_results[last_answer] += 1
    for i, message in enumerate(messages):
        if num_results[i] < len(message.tool_calls):
            raise ValueError(
                f"messages[{i}]: {len(message.tool_calls)} tool_calls but {num_results[i]} tool messages after them; "
                "in this chat format every call needs its result"
            )


def _check_places_of_system(messages: Sequence[ChatMessage], questions: frozenset[int]) -> None:
    """Refuse system messages where the tag for an answer has already been written."""
    previous = None
    for i, message in enumerate(messages):
        if message.role == "system" and i not in questions and previous in ("user", "tool"):
            raise ValueError(
                f"messages[{i}]: in this chat format a system message cannot stand between a {previous} message and "
                "its answer; put it before"
            )
        previous = "user" if i in questions else message.role
