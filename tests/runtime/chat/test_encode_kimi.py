"""Prompts of Kimi K2, K2-Thinking and K2.5 against strings written out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.runtime.chat.typescript import declare_functions
from tests.support.chat_messages import TOOL, Message, assistant, call, render, system, tool, user

DEFAULT = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
HEADER = "<|im_assistant|>assistant<|im_middle|>"
FORMATS = ["kimi_k2_0905", "kimi_k2", "kimi_k2_thinking", "kimi_k25"]


def turn(role: str, text: str) -> str:
    tag = "system" if role not in ("user", "assistant") else role
    return f"<|im_{tag}|>{role}<|im_middle|>{text}<|im_end|>"


def written_calls(*ids_and_arguments: str) -> str:
    pairs = zip(ids_and_arguments[::2], ids_and_arguments[1::2], strict=True)
    calls = "".join(f"<|tool_call_begin|>{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>" for i, a in pairs)
    return f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"


@pytest.mark.parametrize(
    ("format_name", "messages", "thinking", "expected"),
    [
        ("kimi_k2_0905", [user("q"), system("s")], False, DEFAULT + turn("user", "q") + turn("system", "s") + HEADER),
        (
            "kimi_k2",
            [system("s"), user("q"), assistant("a", reasoning="hm"), user("r")],
            False,
            turn("system", "s") + turn("user", "q") + turn("assistant", "a") + turn("user", "r") + HEADER,
        ),
        ("kimi_k2_thinking", [user("q")], True, DEFAULT + turn("user", "q") + HEADER),
        (
            "kimi_k25",
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            True,
            turn("user", "ab") + HEADER + "<think>",
        ),
        ("kimi_k25", [user("q")], False, turn("user", "q") + HEADER + "<think></think>"),
        (
            "kimi_k2",
            [user("q"), assistant("Well", prefix=True)],
            False,
            DEFAULT + "\n" + turn("user", "q") + HEADER + "Well",
        ),
        (
            "kimi_k25",
            [user("q"), assistant("Well", prefix=True)],
            True,
            turn("user", "q") + HEADER + "<think></think>Well",
        ),
        (
            "kimi_k2_thinking",
            [system("s"), user("q"), assistant("Well", prefix=True, reasoning="hm")],
            True,
            turn("system", "s") + turn("user", "q") + HEADER + "<think>hm</think>Well",
        ),
    ],
)
def test_prompts(format_name: str, messages: list[Message], thinking: bool, expected: str) -> None:
    assert render(format_name, messages, thinking=thinking) == expected


def test_ids_of_other_origin_become_the_models_own() -> None:
    messages = [
        system("s"),
        user("q"),
        assistant(None, tool_calls=[call("f", "{}", "call_x"), call("functions.g", '{"a":1}', "functions.g:1")]),
        tool("2", "functions.g:1"),
        tool("1", "call_x"),
        assistant(None, tool_calls=[call("f", "{}", "functions.f:7"), call("g", "{}", "functions.f:3")]),
        tool("3", "functions.f:7"),
        tool("4", "functions.f:3"),
    ]
    expected = [
        turn("system", "s") + turn("user", "q"),
        turn("assistant", written_calls("functions.f:0", "{}", "functions.functions.g:1", '{"a":1}')),
        turn("functions.g", "## Return of functions.functions.g:1\n2"),
        turn("f", "## Return of functions.f:0\n1"),
        turn("assistant", written_calls("functions.f:7", "{}", "functions.g:3", "{}")),
        turn("f", "## Return of functions.f:7\n3") + turn("g", "## Return of functions.g:3\n4"),
        HEADER,
    ]
    assert render("kimi_k2", messages) == "".join(expected)


def test_reasoning_is_shown_after_the_last_answer_without_calls() -> None:
    calls = assistant("", tool_calls=[call("f", "{}", "functions.f:0")], reasoning="hm")
    result = tool("1", "functions.f:0")
    written = written_calls("functions.f:0", "{}")
    returned = turn("f", "## Return of functions.f:0\n1")
    prompt = render("kimi_k2_thinking", [system("s"), user("q"), calls, result])
    assert prompt.endswith(turn("assistant", f"<think>hm</think>{written}") + returned + HEADER)
    prompt = render(
        "kimi_k2_thinking", [system("s"), user("q"), calls, result, assistant("a", reasoning="so"), user("r")]
    )
    expected = turn("assistant", f"<think></think>{written}") + returned + turn("assistant", "<think></think>a")
    assert prompt.endswith(expected + turn("user", "r") + HEADER)


@pytest.mark.parametrize("format_name", ["kimi_k2_0905", "kimi_k2"])
def test_models_that_do_not_think_cannot_continue_reasoning(format_name: str) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\]: .* content only"):
        render(format_name, [user("q"), assistant("a", prefix=True, reasoning="hm")])


def test_schemas_without_typescript_are_sorted_json() -> None:
    parameters = {"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}]}}}
    odd = {"type": "function", "function": {"name": "g", "parameters": parameters}}
    prompt = render("kimi_k25", [user("q")], tools=[TOOL, odd])
    assert prompt.startswith(
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"Do it.","name":"f","parameters":'
        '{"type":"object"}},"type":"function"},{"function":{"name":"g","parameters":{"properties":{"a":{"oneOf":'
        '[{"type":"string"}]}},"type":"object"}},"type":"function"}]<|im_end|>'
    )


PROPERTIES: dict[str, Any] = {
    "zone": {"type": "string", "description": "Where.\n\nOr when.", "pattern": "^a", "maxLength": 9, "minLength": 1},
    "count": {"type": "integer", "minimum": 0, "default": 3},
    "kind": {"enum": ["a", 1], "description": "Kind.", "default": "a"},
    "tags": {"type": "array", "items": {"type": "string", "description": "A tag."}, "maxItems": 4},
    "any": {"anyOf": [{"type": "number"}, {"type": "array"}]},
    "maybe": {"type": ["integer", "null"]},
    "deep": {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": {"type": "string"},
    },
    "node": {"$ref": "#/$defs/Node"},
    "open": {"type": "object", "additionalProperties": True},
    "free": {},
    "none": False,
}


def test_typescript() -> None:
    parameters = {
        "type": "object",
        "$defs": {"Node": {"type": "object", "description": "A node.", "additionalProperties": False}},
        "properties": PROPERTIES,
        "required": ["zone", "count"],
    }
    expected = """\
# Tools

## functions
namespace functions {
// A node.
interface Node {
  [k: string]: never
}
// Do it.
type f = (_: {
  // minimum: 0
  // Default: 3
  count: number,
  // Where.

  // Or when.
  // maxLength: 9, minLength: 1, pattern: ^a
  zone: string,
  any?: number | Array<any>,
  deep?: {
    x: boolean,
    [k: string]: string
  },
  free?: any,
  // Kind.
  // Default: "a"
  kind?: "a" | 1,
  maybe?: number | null,
  node?: Node,
  none?: null,
  open?: {
    [k: string]: any
  },
  // maxItems: 4
  tags?: Array<
    // A tag.
    string
  >
}) => any;
type g = (_: {}) => any;
}
"""
    functions: list[dict[str, Any]] = [{"name": "f", "description": "Do it.", "parameters": parameters}, {"name": "g"}]
    assert declare_functions(functions) == expected


def test_typescript_of_a_schema_that_refers_to_itself() -> None:
    parameters = {"type": "object", "properties": {"z": {"type": "string"}, "next": {"$ref": "#"}}, "required": ["z"]}
    expected = "interface parameters {\n  z: string,\n  next?: parameters\n}\ntype f = (_: parameters) => any;\n}\n"
    declarations = declare_functions([{"name": "f", "parameters": parameters}])
    assert declarations is not None
    assert declarations.endswith(expected)


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}]},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "other.json"},
        {"type": ["file"]},
        {"type": "array", "items": "string"},
        {"type": "string", "description": 5},
        {"type": "object", "additionalProperties": "yes"},
        "string",
        None,
    ],
)
def test_schemas_that_typescript_cannot_show(schema: Any) -> None:
    parameters = {"type": "object", "properties": {"a": schema}}
    assert declare_functions([{"name": "f", "parameters": parameters}]) is None
