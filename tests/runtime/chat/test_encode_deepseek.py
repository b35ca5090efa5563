"""Prompts of V3, R1, V3.1 and V3.2-Exp against strings written out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat_messages import TOOL, Message, assistant, call, developer, render, system, tool, user

B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
CALLS = assistant(None, tool_calls=[call("f", '{"x": 1}'), call("g", "{}")])


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        (
            [user("q"), assistant("<think>hm</think>a</think>b"), user("r")],
            False,
            f"{B}{U}q{A}</think>a</think>b{E}{U}r{A}</think>",
        ),
        (  # a refusal, and an answer that was cut off inside its reasoning
            [user("q"), assistant(None, refusal="No."), user("r"), assistant(None, reasoning_content="hm"), user("s")],
            False,
            f"{B}{U}q{A}</think>No.{E}{U}r{A}</think>{E}{U}s{A}</think>",
        ),
        ([developer("A"), user("q"), system("B")], True, f"{B}A\n\nB{U}q{A}<think>"),
        ([user([{"type": "text", "text": t} for t in ("one", "two")])], False, f"{B}{U}one\ntwo{A}</think>"),
        ([assistant("a"), assistant("b"), user("q")], False, f"{B}a{E}b{E}{U}q{A}</think>"),
        ([user("q"), assistant("a"), assistant("b"), user("r")], True, f"{B}{U}q{A}</think>a{E}b{E}{U}r{A}<think>"),
        ([user("q"), assistant("The answer", prefix=True)], False, f"{B}{U}q{A}</think>The answer"),
        ([user("q"), assistant("Let me", prefix=True)], True, f"{B}{U}q{A}<think>Let me"),
        (
            [user("q"), CALLS, tool("1"), assistant("Let me", prefix=True)],
            True,
            (
                f"{B}{U}q{A}</think><｜tool▁calls▁begin｜>"
                '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>'
                f"<｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{E}"
                "<｜tool▁output▁begin｜>1<｜tool▁output▁end｜>Let me"
            ),
        ),
        (
            [
                user("q"),
                assistant("hm</think>Wait. ", tool_calls=[call("f", {"a": "ö"})]),
                tool("1"),
                assistant("done"),
                user("r"),
            ],
            True,
            (
                f"{B}{U}q{A}</think>Wait. <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
                f'{{"a": "ö"}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{E}<｜tool▁output▁begin｜>1<｜tool▁output▁end｜>'
                f"done{E}{U}r{A}<think>"
            ),
        ),
    ],
)
@pytest.mark.parametrize("format_name", ["deepseek_v31", "deepseek_v32_exp"])
def test_v31(format_name: str, messages: list[Message], thinking: bool, expected: str) -> None:
    assert render(format_name, messages, thinking=thinking) == expected


def test_v31_tools_without_system_and_with_few_fields() -> None:
    bare = {"type": "function", "function": {"name": "g"}}
    prompt = render("deepseek_v31", [user("q")], tools=[TOOL, bare])
    assert prompt.startswith(
        f"{B}\n\n## Tools\nYou have access to the following tools:\n\n"
        '### f\nDescription: Do it.\n\nParameters: {"type": "object"}\n\n'
        "### g\nDescription: \n\nParameters: {}\n\nIMPORTANT: "
    )
    assert prompt.endswith(f"without separators or spaces\n{U}q{A}</think>")


@pytest.mark.parametrize(
    ("format_name", "messages", "expected"),
    [
        ("deepseek_v3", [user("q"), assistant("a</think>b"), user("r")], f"{B}{U}q{A}a</think>b{E}{U}r{A}"),
        ("deepseek_r1_0528", [user("q"), assistant("a</think>b</think>c"), user("r")], f"{B}{U}q{A}c{E}{U}r{A}"),
        ("deepseek_r1", [user("q"), assistant("Well", prefix=True)], f"{B}{U}q{A}Well"),
        ("deepseek_r1", [user("q"), user("r"), system("s")], f"{B}s{U}q{A}{U}r{A}<think>\n"),
        (
            "deepseek_r1",
            [user("q"), assistant("", tool_calls=[call("f", "{}")]), tool("1")],
            (
                f"{B}{U}q{A}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{{}}\n```"
                f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{E}"
                "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
            ),
        ),
    ],
)
def test_v3_and_r1(format_name: str, messages: list[Message], expected: str) -> None:
    assert render(format_name, messages) == expected


@pytest.mark.parametrize("format_name", ["deepseek_v3", "deepseek_r1", "deepseek_r1_0528"])
def test_tools_of_v3_show_its_way_to_write_calls(format_name: str) -> None:
    prompt = render(format_name, [system("s"), user("q")], tools=[TOOL])
    assert prompt.startswith(f"{B}s\n\n## Tools\n")
    assert "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```<｜tool▁call▁end｜>" in prompt


@pytest.mark.parametrize("format_name", ["deepseek_v3", "deepseek_r1", "deepseek_r1_0528", "deepseek_v31"])
def test_system_messages_alone_get_no_answer(format_name: str) -> None:
    with pytest.raises(ValueError, match="system messages only"):
        render(format_name, [system("s")])


@pytest.mark.parametrize(
    ("format_name", "prefix", "message"),
    [
        ("deepseek_v3", {"reasoning_content": "hm"}, r"messages\[1\]: .* content only"),
        ("deepseek_r1", {"reasoning_content": "hm"}, r"messages\[1\]: .* content only"),
        ("deepseek_v31", {"reasoning": "hm"}, r"messages\[1\]: .* content only"),
        ("deepseek_v31", {"content": "hm</think>a"}, r"messages\[1\]: a prefix must not contain"),
        ("deepseek_r1_0528", {"content": "hm</think>a"}, r"messages\[1\]: a prefix must not contain"),
    ],
)
def test_prefixes_that_cannot_be_continued(format_name: str, prefix: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(format_name, [user("q"), assistant("a", prefix=True) | prefix])
