"""Random answers, written as tokens in each grammar and read again; their text spells tags and escapes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from shoal.runtime.chat.output import assemble
from shoal.runtime.tokenization.tokenizer import Part
from tests.support.outputs import TOKENS, as_parts, cut, parse, tokenizer_with

TOKENIZERS = {grammar: tokenizer_with(tokens) for grammar, tokens in TOKENS.items()}
TYPES = {"properties": {key: {"type": "string"} for key in "klm"}}
TOOLS = [{"function": {"name": name, "parameters": TYPES}} for name in "fgh"]
NUM_ANSWERS = 200
Call = tuple[str, dict[str, Any]]


def random_text(grammar: str, rng: random.Random) -> str:
    pieces = ["a", "b c", " ", "\n", '"', "\\", "<", "</", "{", "}", "```", "é⛵", "<｜DSML｜", *TOKENS[grammar]]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))


def random_call(grammar: str, rng: random.Random) -> Call:
    """A call whose arguments k, l and m are strings and n, o and p are not."""
    others = [7, -0.5, True, None, [1, "a\n"], {"b": {"c": '"'}}]
    keys = rng.sample("klmnop", rng.randint(0, 4))
    return rng.choice("fgh"), {k: random_text(grammar, rng) if k in "klm" else rng.choice(others) for k in keys}


def written_calls(grammar: str, calls: list[Call]) -> list[Part]:
    """The calls as the model writes them: markup as tokens where it has tokens, the rest as text."""
    parts: list[Part] = []

    def write(markup: str, text: str = "") -> None:
        parts.extend([*as_parts(grammar, markup), *([text] if text else [])])

    if grammar in ("deepseek_v3", "deepseek_v31"):
        header, fence_end = ("function<｜tool▁sep｜>", "\n```") if grammar == "deepseek_v3" else ("", "")
        write("<｜tool▁calls▁begin｜>")
        for name, arguments in calls:
            write("<｜tool▁call▁begin｜>" + header, name)
            write("\n```json\n" if fence_end else "<｜tool▁sep｜>", json.dumps(arguments, indent=1, ensure_ascii=False))
            write(fence_end + "<｜tool▁call▁end｜>")
        write("<｜tool▁calls▁end｜>")
    elif grammar == "kimi":
        write("<|tool_calls_section_begin|>")
        for n, (name, arguments) in enumerate(calls):
            write("<|tool_call_begin|>", f"functions.{name}:{n}")
            write("<|tool_call_argument_begin|>", json.dumps(arguments, ensure_ascii=False))
            write("<|tool_call_end|>")
        write("<|tool_calls_section_end|>")
    elif grammar == "glm":
        for name, arguments in calls:
            write("<tool_call>", name)
            for key, value in arguments.items():
                write("<arg_key>", key)
                write("</arg_key><arg_value>", value if isinstance(value, str) else json.dumps(value))
                write("</arg_value>")
            write("</tool_call>")
    else:
        block = "function_calls" if grammar == "deepseek_v32" else "tool_calls"
        write(f"\n\n<｜DSML｜{block}>\n")
        for name, arguments in calls:
            write(f'<｜DSML｜invoke name="{name}">\n')
            for key, value in arguments.items():
                is_string = isinstance(value, str)
                text = value if is_string else json.dumps(value)
                write(f'<｜DSML｜parameter name="{key}" string="{json.dumps(is_string)}">', text)
                write("</｜DSML｜parameter>\n")
            write("</｜DSML｜invoke>\n")
        write(f"</｜DSML｜{block}>")
    return parts


@pytest.mark.parametrize("grammar", sorted(TOKENS))
def test_an_answer_is_read_as_it_was_meant(grammar: str) -> None:
    rng = random.Random(grammar)
    for _ in range(NUM_ANSWERS):
        reasoning = "a" + random_text(grammar, rng)
        content = "a" + random_text(grammar, rng) + "b"
        calls = [random_call(grammar, rng) for _ in range(rng.randint(0, 3))]
        parts = [reasoning, *as_parts(grammar, "</think>"), content]
        parts += written_calls(grammar, calls) if calls else []
        pieces = [piece for p in parts for piece in (cut(p, rng, rng.randint(0, 5)) if isinstance(p, str) else [[p]])]
        deltas, is_malformed = parse(grammar, pieces, start="reasoning", tools=TOOLS, tokenizer=TOKENIZERS[grammar])
        output = assemble(deltas)
        assert (output.reasoning, output.content) == (reasoning, content)
        assert [(call.name, json.loads(call.arguments)) for call in output.tool_calls] == calls
        assert not is_malformed
