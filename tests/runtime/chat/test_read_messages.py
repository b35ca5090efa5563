"""What is read from OpenAI's messages and tools, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.runtime.chat.conversation import ChatMessage, ToolCall
from shoal.runtime.chat.messages import read_conversation
from tests.support.chat_messages import TOOL, assistant, call, developer, system, tool, user

CALLS = assistant(None, tool_calls=[call("f", '{"x": 1}', "a"), call("g", "{}", "b")])


def test_a_conversation_with_all_roles() -> None:
    messages = [
        developer([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]),
        user("q") | {"name": "Bob"},
        assistant(None, reasoning_content="hm", tool_calls=[call("f", {"city": "Köln", "n": [1, 2]})]),
        tool("1") | {"name": "f"},
        assistant("a", refusal=None, annotations=[], audio=None, function_call=None, tool_calls=[], id="msg_1"),
        user("r"),
    ]
    conversation = read_conversation(messages, tools=[TOOL], thinking=True, reasoning_effort="low", clear_thinking=True)
    assert conversation.messages == (
        ChatMessage(role="system", content=("A", "B"), is_developer=True),
        ChatMessage(role="user", content=("q",)),
        ChatMessage(
            role="assistant",
            reasoning="hm",
            tool_calls=(ToolCall(id="call_1", name="f", arguments='{"city": "Köln", "n": [1, 2]}'),),
        ),
        ChatMessage(role="tool", content=("1",), call_index=0),
        ChatMessage(role="assistant", content=("a",)),
        ChatMessage(role="user", content=("r",)),
    )
    assert conversation.tools == (TOOL,)
    assert (conversation.thinking, conversation.reasoning_effort, conversation.clear_thinking) == (True, "low", True)


@pytest.mark.parametrize(
    ("fields", "content", "reasoning"),
    [
        ({"content": "a", "refusal": "No."}, ("a",), None),
        ({"content": None, "refusal": "No."}, ("No.",), None),
        ({"content": "", "refusal": "No."}, ("",), None),
        ({"content": None, "reasoning": "hm"}, (), "hm"),
        ({"content": None, "reasoning": "old", "reasoning_content": "hm"}, (), "hm"),
        ({"content": None, "reasoning": "hm", "reasoning_content": None}, (), "hm"),
        ({"content": "<think>hm</think>a"}, ("<think>hm</think>a",), None),
        ({"content": []}, (), None),
    ],
)
def test_content_and_reasoning_of_an_answer(
    fields: dict[str, Any], content: tuple[str, ...], reasoning: str | None
) -> None:
    message = read_conversation([user("q"), {"role": "assistant", **fields}, user("r")]).messages[1]
    assert (message.content, message.reasoning) == (content, reasoning)


def test_arguments_as_text_stay_as_they_are() -> None:
    messages = [user("q"), assistant(None, tool_calls=[call("f", '{"a":1.50, ')]), tool("1")]
    assert read_conversation(messages).messages[1].tool_calls[0].arguments == '{"a":1.50, '


@pytest.mark.parametrize(
    ("call_ids", "result_ids", "expected"),
    [
        (["a", "b"], ["a", "b"], [0, 1]),
        (["a", "b"], ["b", "a"], [1, 0]),
        (["a", "b"], ["b"], [1]),
        (["a", "a"], ["a", "a"], [0, 1]),
        (["a", "b"], [None, None], [0, 1]),
        ([None, None], ["a", "b"], [0, 1]),
    ],
)
def test_results_find_their_calls(
    call_ids: list[str | None], result_ids: list[str | None], expected: list[int]
) -> None:
    calls = assistant(None, tool_calls=[call("f", "{}", call_id) for call_id in call_ids])
    messages = [user("q"), calls, system("s"), *(tool("1", call_id) for call_id in result_ids)]
    results = [message.call_index for message in read_conversation(messages).messages if message.role == "tool"]
    assert results == expected


def test_a_message_to_continue() -> None:
    prefixed = read_conversation([user("q"), assistant("a", prefix=True)])
    continued = read_conversation([user("q"), assistant("a")], continue_final_message=True)
    assert prefixed == continued
    assert [message.is_prefix for message in prefixed.messages] == [False, True]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([user("q"), {"role": "robot", "content": "x"}], r"messages\[1\]: role must be one of .* got 'robot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: role"),
        ([{"content": "x"}], r"messages\[0\]: role"),
        ([user(None)], r"messages\[0\]: content must be"),
        ([user(5)], r"messages\[0\]: content must be"),
        ([user([{"type": "image_url", "image_url": {}}])], r"messages\[0\]: a content part"),
        ([user([{"type": "text", "text": 5}])], r"messages\[0\]: a content part"),
        ([user(["x"])], r"messages\[0\]: a content part"),
        ([user("q") | {"audio": {"id": 1}}], r"messages\[0\]: chat formats have no audio for role user"),
        ([user("q") | {"tool_calls": [call("f", "")]}], r"messages\[0\]: chat formats have no tool_calls"),
        ([developer("q") | {"tools": [TOOL]}], r"messages\[0\]: chat formats have no tools for role developer"),
        ([user("q"), assistant(None), user("r")], r"messages\[1\]: an assistant message needs content"),
        ([user("q"), assistant(None, refusal=5), user("r")], r"messages\[1\]: refusal must be a string, got 5"),
        ([user("q"), assistant("a", reasoning={}), user("r")], r"messages\[1\]: reasoning must be a string, got \{\}"),
        ([user("q"), assistant("a"), user("r"), assistant("b")], r"messages\[3\]: nothing is left to answer"),
        ([user("q"), assistant("a"), system("s")], r"messages\[2\]: nothing is left to answer"),
        ([user("q"), CALLS], r"messages\[1\]: nothing is left to answer"),
        ([user("q"), assistant("a", prefix="yes")], r"messages\[1\]: prefix must be true or false"),
        ([assistant("a", prefix=True), user("q")], r"messages\[0\]: only the last message"),
        ([user("q"), CALLS | {"prefix": True}], r"messages\[1\]: a message to continue cannot have tool_calls"),
        ([user("q"), assistant("a", tool_calls={})], r"messages\[1\]: tool_calls must be a list"),
        ([user("q"), assistant("a", tool_calls=["f"])], r"messages\[1\]: a tool call must be"),
        ([user("q"), assistant("a", tool_calls=[call("f", 5)])], r"messages\[1\]: a tool call must be"),
        ([user("q"), assistant("a", tool_calls=[call("f", "{}") | {"id": 5}])], r"messages\[1\]: a tool call must be"),
        ([user("q"), tool("1")], r"messages\[1\]: a tool message must follow"),
        ([user("q"), assistant("a"), tool("1")], r"messages\[2\]: a tool message must follow"),
        ([user("q"), CALLS, user("r"), tool("1", "a")], r"messages\[3\]: a tool message must follow"),
        ([user("q"), CALLS, tool("1", "c")], r"messages\[2\]: tool_call_id 'c' is none of the calls .*: 'a', 'b'"),
        ([user("q"), CALLS, tool("1", "a"), tool("2", "a")], r"messages\[3\]: tool_call_id 'a' is none .*: 'b'"),
        ([user("q"), CALLS, *[tool("1", None)] * 3], r"messages\[4\]: tool_call_id None is none .*: all have one"),
        ([user("q"), CALLS, tool("1") | {"tool_call_id": 7}], r"messages\[2\]: tool_call_id must be a string"),
    ],
)
def test_messages_that_no_format_can_express(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conversation(messages)


def test_only_an_answer_can_be_continued() -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]: continue_final_message needs an assistant message"):
        read_conversation([user("q")], continue_final_message=True)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools must be a list"),
        (["f"], r"tools\[0\] must be"),
        ([TOOL, {"type": "custom", "custom": {"name": "f"}}], r"tools\[1\] must be"),
        ([{"function": {"name": "f"}}], r"tools\[0\] must be"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function\.name must be a non-empty string, got None"),
        ([{"type": "function", "function": {"name": ""}}], r"tools\[0\]\.function\.name must be a non-empty string"),
        ([{"type": "function", "function": {"name": "f", "description": 5}}], r"tools\[0\]\.function\.description"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], r"tools\[0\]\.function\.parameters"),
    ],
)
def test_tools_that_cannot_be_shown(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conversation([user("q")], tools=tools)
