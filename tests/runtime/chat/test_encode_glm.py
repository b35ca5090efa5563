"""Prompts of GLM-4.6 to 5.3 against strings written out by hand."""

from __future__ import annotations

import pytest

from tests.support.chat_messages import TOOL, Message, assistant, call, developer, render, system, tool, user

EARLIER = [user("q"), assistant(" a ", reasoning=" hm "), user("r")]
ROUND = [
    user("q"),
    assistant(None, tool_calls=[call("f", "{}", "a"), call("g", '{"x": "1", "y": [1, "ö"]}', "b")], reasoning=" hm "),
    tool("2", "b"),
    tool("1", "a"),
]
CALLS = (
    "<tool_call>f</tool_call><tool_call>g<arg_key>x</arg_key><arg_value>1</arg_value>"
    '<arg_key>y</arg_key><arg_value>[1, "ö"]</arg_value></tool_call>'
)
MAX = "<|system|>Reasoning Effort: Max"


@pytest.mark.parametrize(
    ("format_name", "thinking", "clear_thinking", "expected"),
    [
        ("glm_46", True, None, "<|user|>\nq<|assistant|>\n<think></think>\na<|user|>\nr<|assistant|>"),
        (
            "glm_46",
            False,
            None,
            "<|user|>\nq/nothink<|assistant|>\n<think></think>\na<|user|>\nr/nothink<|assistant|>\n<think></think>",
        ),
        ("glm_5", True, None, "<|user|>q<|assistant|></think>a<|user|>r<|assistant|><think>"),
        ("glm_5", False, True, "<|user|>q<|assistant|></think>a<|user|>r<|assistant|></think>"),
        ("glm_5", True, False, "<|user|>q<|assistant|><think>hm</think>a<|user|>r<|assistant|><think>"),
        ("glm_51", False, None, "<|user|>q<|assistant|></think>a<|user|>r<|assistant|></think>"),
        ("glm_52", False, None, "<|user|>q<|assistant|><think></think>a<|user|>r<|assistant|><think></think>"),
        ("glm_52", True, False, f"{MAX}<|user|>q<|assistant|><think> hm </think>a<|user|>r<|assistant|><think>"),
        ("glm_53", True, None, f"{MAX}<|user|>q<|assistant|><think> hm </think>a<|user|>r<|assistant|><think>"),
        ("glm_53", False, True, f"{MAX}<|user|>q<|assistant|><think></think>a<|user|>r<|assistant|><think>"),
    ],
)
def test_earlier_reasoning(format_name: str, thinking: bool, clear_thinking: bool | None, expected: str) -> None:
    prompt = render(format_name, EARLIER, thinking=thinking, clear_thinking=clear_thinking)
    assert prompt == "[gMASK]<sop>" + expected


@pytest.mark.parametrize(
    ("format_name", "reasoning", "results"),
    [("glm_5", "hm", "21"), ("glm_51", "hm", "21"), ("glm_52", " hm ", "21"), ("glm_53", " hm ", "12")],
)
def test_rounds_of_calls(format_name: str, reasoning: str, results: str) -> None:
    responses = "".join(f"<tool_response>{result}</tool_response>" for result in results)
    assert render(format_name, ROUND, thinking=True).endswith(
        f"<|user|>q<|assistant|><think>{reasoning}</think>{CALLS}<|observation|>{responses}<|assistant|><think>"
    )


@pytest.mark.parametrize(
    ("format_name", "thinking", "shown"),
    [
        ("glm_46", True, "\n<think></think>"),
        ("glm_5", True, "</think>"),
        ("glm_51", True, "<think></think>"),
        ("glm_51", False, "</think>"),
        ("glm_52", False, "<think></think>"),
        ("glm_53", True, "<think></think>"),
    ],
)
def test_calls_without_reasoning(format_name: str, thinking: bool, shown: str) -> None:
    messages = [user("q"), assistant("", tool_calls=[call("f", "{}")]), tool("1")]
    line = "\n" if format_name == "glm_46" else ""
    prompt = render(format_name, messages, thinking=thinking)
    assert f"<|assistant|>{shown}{line}<tool_call>f{line}</tool_call><|observation|>" in prompt


@pytest.mark.parametrize(
    ("format_name", "effort", "line"),
    [
        ("glm_52", "high", "High"),
        ("glm_52", "low", "Max"),
        ("glm_53", "high", "High"),
        ("glm_53", "low", "Low"),
        ("glm_53", "medium", "Max"),
        ("glm_53", None, "Max"),
    ],
)
def test_efforts(format_name: str, effort: str | None, line: str) -> None:
    prompt = render(format_name, [user("q")], thinking=True, reasoning_effort=effort)
    assert prompt == f"[gMASK]<sop><|system|>Reasoning Effort: {line}<|user|>q<|assistant|><think>"


@pytest.mark.parametrize(
    ("format_name", "messages", "thinking", "expected"),
    [
        ("glm_5", [developer("s")], True, "<|system|>s<|assistant|><think>"),
        ("glm_5", [user("q"), system("s")], True, "<|user|>q<|system|>s<|assistant|><think>"),
        (
            "glm_5",
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            True,
            "<|user|>ab<|assistant|><think>",
        ),
        ("glm_5", [user("q"), assistant(" a ", prefix=True)], True, "<|user|>q<|assistant|></think> a "),
        ("glm_46", [user("q"), assistant("a", prefix=True)], True, "<|user|>\nq<|assistant|>\n<think></think>\na"),
        (
            "glm_51",
            [user("q"), assistant("a", prefix=True, reasoning="hm")],
            True,
            "<|user|>q<|assistant|><think>hm</think>a",
        ),
        (  # tags in content are text
            "glm_5",
            [user("q"), assistant("x</think>y"), user("r")],
            True,
            "<|user|>q<|assistant|></think>x</think>y<|user|>r<|assistant|><think>",
        ),
    ],
)
def test_prompts(format_name: str, messages: list[Message], thinking: bool, expected: str) -> None:
    assert render(format_name, messages, thinking=thinking) == "[gMASK]<sop>" + expected


def test_arguments_that_are_no_object_are_one_argument() -> None:
    messages = [user("q"), assistant(None, tool_calls=[call("f", "oops {")]), tool("1")]
    call_text = "<tool_call>f<arg_key>arguments</arg_key><arg_value>oops {</arg_value></tool_call>"
    assert call_text in render("glm_5", messages)


@pytest.mark.parametrize(
    ("format_name", "line"),
    [
        ("glm_46", '{"type": "function", "function": {"name": "f", "strict": true, "defer_loading": false}}'),
        ("glm_5", '{"type": "function", "function": {"name": "f", "strict": true, "defer_loading": false}}'),
        ("glm_51", '{"name": "f"}'),
        ("glm_52", '{"name": "f"}'),
        ("glm_53", '{"name": "f"}'),
    ],
)
def test_tools(format_name: str, line: str) -> None:
    other = {"type": "function", "function": {"name": "f", "strict": True, "defer_loading": False}}
    prompt = render(format_name, [user("q")], tools=[other, TOOL])
    assert f"<tools>\n{line}\n{{" in prompt
