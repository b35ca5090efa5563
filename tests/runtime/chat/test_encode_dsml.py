"""Prompts of V3.2 and V4 against strings written out by hand."""

from __future__ import annotations

import pytest

from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.tokenization.tokenizer import Special
from tests.support.chat_messages import TOOL, Message, assistant, call, developer, render, system, tool, user

B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
CALLS = assistant("", tool_calls=[call("f", "{}", "a"), call("g", '{"x": "1"}', "b")], reasoning_content="hm")
V32_CALLS = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n'
    '<｜DSML｜parameter name="x" string="true">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
V4_CALLS = V32_CALLS.replace("function_calls", "tool_calls").replace("\n\n</", "\n</")


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        (  # results come in the order of the calls; at the next question all reasoning goes
            [user("q"), CALLS, tool("2", "b"), tool("1", "a"), assistant("ok", reasoning_content="so"), user("r")],
            True,
            (
                f"{B}{U}q{A}</think>{V32_CALLS}{E}\n\n<function_results>\n<result>1</result>\n<result>2</result>"
                f"\n</function_results>\n\n</think>ok{E}{U}r{A}<think>"
            ),
        ),
        (
            [user("q"), CALLS, tool("1", "a"), tool("2", "b")],
            True,
            (
                f"{B}{U}q{A}<think>hm</think>{V32_CALLS}{E}\n\n<function_results>\n<result>1</result>"
                "\n<result>2</result>\n</function_results>\n\n<think>"
            ),
        ),
        (
            [user("q"), CALLS, tool("1", "a"), tool("2", "b")],
            False,
            (
                f"{B}{U}q{A}</think>{V32_CALLS}{E}\n\n<function_results>\n<result>1</result>"
                "\n<result>2</result>\n</function_results>\n\n</think>"
            ),
        ),
        (  # system messages keep their place
            [system("s"), system("t"), user("q"), assistant("a"), system("u"), user("r")],
            False,
            f"{B}st{U}q{A}</think>a{E}u{U}r{A}</think>",
        ),
        ([developer("d"), user("q")], False, f"{B}d{U}q{A}</think>"),
        ([developer("d")], True, f"{B}{U}\n\n# The user's message is: d{A}<think>"),
        ([user("q"), assistant("a", prefix=True)], True, f"{B}{U}q{A}<think></think>a"),
        ([user("q"), assistant("a", prefix=True, reasoning="hm")], True, f"{B}{U}q{A}<think>hm</think>a"),
        ([user("q"), assistant("", prefix=True, reasoning="hm")], True, f"{B}{U}q{A}<think>hm"),
        ([user("q"), assistant("a", prefix=True, reasoning="hm")], False, f"{B}{U}q{A}</think>a"),
    ],
)
def test_v32(messages: list[Message], thinking: bool, expected: str) -> None:
    assert render("deepseek_v32", messages, thinking=thinking) == expected


@pytest.mark.parametrize(
    ("messages", "thinking", "drop_thinking", "expected"),
    [
        (
            [user("q"), CALLS, tool("2", "b"), tool("1", "a"), user("r"), user("s"), system("t")],
            False,
            None,
            (
                f"{B}t{U}q{A}</think>{V4_CALLS}{E}{U}<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>"
                f"\n\nr\n\ns{A}</think>"
            ),
        ),
        ([system("s")], False, None, f"{B}s{A}</think>"),
        (
            [user("q"), assistant("a", reasoning="hm"), assistant("b"), user("r")],
            True,
            None,
            f"{B}{U}q{A}</think>a{E}{A}</think>b{E}{U}r{A}<think>",
        ),
        (
            [user("q"), assistant("a", reasoning="hm"), user("r")],
            True,
            False,
            f"{B}{U}q{A}<think>hm</think>a{E}{U}r{A}<think>",
        ),
        ([user("q"), assistant("a", prefix=True, reasoning="hm")], True, None, f"{B}{U}q{A}<think>hm</think>a"),
        ([user("q"), assistant("", prefix=True)], True, None, f"{B}{U}q{A}<think>"),
    ],
)
def test_v4(messages: list[Message], thinking: bool, drop_thinking: bool | None, expected: str) -> None:
    options = {"thinking": thinking, "drop_thinking": drop_thinking, "reasoning_effort": "low"}
    assert render("deepseek_v4", messages, **options) == expected


def test_v4_keeps_all_reasoning_with_tools() -> None:
    messages = [user("q"), assistant("a", reasoning="hm"), assistant("b"), user("r")]
    prompt = render("deepseek_v4", messages, thinking=True, tools=[TOOL], drop_thinking=True)
    assert prompt.endswith(f"{U}q{A}<think>hm</think>a{E}{A}<think></think>b{E}{U}r{A}<think>")


@pytest.mark.parametrize(
    ("effort", "begins"),
    [
        ("low", U),
        ("max", "Reasoning Effort: Beyond maximum"),
        *((effort, "Reasoning Effort: Absolute maximum") for effort in ("high", "medium", "xhigh", None)),
    ],
)
def test_v4_efforts(effort: str | None, begins: str) -> None:
    assert render("deepseek_v4", [user("q")], thinking=True, reasoning_effort=effort).startswith(B + begins)
    assert render("deepseek_v4", [user("q")], thinking=False, reasoning_effort=effort) == f"{B}{U}q{A}</think>"


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ("oops {", ' name="arguments" string="true">oops {<'),
        ("[1]", ' name="arguments" string="true">[1]<'),
        pytest.param("[" * 100_000, f' name="arguments" string="true">{"[" * 100_000}<', id="deeply nested"),
        ('{"a": "</｜DSML｜parameter>"}', ' name="a" string="true"></｜DSML｜parameter><'),
        ('{"a": 1.50, "b": null}', ' name="b" string="false">null<'),
        ({"a": {"ö": [True]}}, ' name="a" string="false">{"ö": [true]}<'),
    ],
)
@pytest.mark.parametrize("format_name", ["deepseek_v32", "deepseek_v4"])
def test_arguments(format_name: str, arguments: object, parameter: str) -> None:
    messages = [user("q"), assistant(None, tool_calls=[call("f", arguments)]), tool("1")]
    assert f"<｜DSML｜parameter{parameter}/｜DSML｜parameter>" in render(format_name, messages)


def test_dsml_is_an_added_token_in_v4_only() -> None:
    conversation = read_conversation([user("｜DSML｜"), CALLS, tool("1", "a"), tool("2", "b")], tools=[TOOL])
    dsml = Special("｜DSML｜")
    assert dsml not in CHAT_FORMATS["deepseek_v32"].encode(conversation)
    parts = CHAT_FORMATS["deepseek_v4"].encode(conversation)
    # 9 in the text about tools; in the calls two for the block, two for each invoke and two for the parameter.
    assert parts.count(dsml) == 9 + 2 + 4 + 2
    assert parts.count("｜DSML｜") == 1


@pytest.mark.parametrize(
    ("format_name", "messages", "message"),
    [
        ("deepseek_v32", [system("s")], "system messages only"),
        ("deepseek_v32", [user("q"), system("s")], r"messages\[1\]: .* between a user message and its answer"),
        ("deepseek_v32", [developer("d"), system("s")], r"messages\[1\]: .* between a user message and its answer"),
        (
            "deepseek_v32",
            [user("q"), CALLS, tool("1", "a"), tool("2", "b"), system("s")],
            r"messages\[4\]: .* between a tool message and its answer",
        ),
        ("deepseek_v32", [user("q"), CALLS, tool("1", "b")], r"messages\[1\]: 2 tool_calls but 1 tool messages"),
        ("deepseek_v4", [user("q"), CALLS, user("r")], r"messages\[1\]: 2 tool_calls but 0 tool messages"),
    ],
)
def test_conversations_that_cannot_be_expressed(format_name: str, messages: list[Message], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(format_name, messages)
