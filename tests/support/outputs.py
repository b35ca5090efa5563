"""Outputs of chat models for tests: golden cases, their tags, and ways to parse and cut them."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.runtime.chat.output import ContentDelta, OutputDelta, ParsedOutput, ReasoningDelta, StartState, assemble
from shoal.runtime.chat.parsers import make_parser
from shoal.runtime.tokenization.tokenizer import Part, Special, Tokenizer

CASES_FILE = Path(__file__).parents[1] / "runtime" / "chat" / "chat_cases.jsonl"

GRAMMARS = {
    "deepseek_v3": "deepseek_v3",
    "deepseek_r1": "deepseek_v3",
    "deepseek_r1_0528": "deepseek_v3",
    "deepseek_v31": "deepseek_v31",
    "deepseek_v32": "deepseek_v32",
    "kimi_k2": "kimi",
    "kimi_k2_thinking": "kimi",
    "glm_46": "glm",
    "glm_5": "glm",
}
"""Grammar per family of the golden cases."""

_THINK = ("<think>", "</think>")
_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
TOKENS = {
    "deepseek_v3": _THINK + _DEEPSEEK,
    "deepseek_v31": _THINK + _DEEPSEEK,
    "deepseek_v32": _THINK,
    "deepseek_v4": (*_THINK, "｜DSML｜"),
    "kimi": (
        *_THINK,
        *(f"<|tool_calls_section_{name}|>" for name in ("begin", "end")),
        *(f"<|tool_call_{name}|>" for name in ("begin", "argument_begin", "end")),
    ),
    "glm": (*_THINK, *(f"<{slash}{name}>" for name in ("tool_call", "arg_key", "arg_value") for slash in ("", "/"))),
}
"""Added tokens of each grammar's tokenizers that its tags are made of."""
SEPARATORS = {
    "deepseek_v3": ("function", "\n```json\n", "\n```", "```", "\n"),
    "deepseek_v31": (),
    "deepseek_v32": (
        *(
            "｜DSML｜",
            "<｜DSML｜function_calls>",
            "</｜DSML｜function_calls>",
            '<｜DSML｜invoke name="',
            '">',
            "\n\n",
            "{",
        ),
        *(
            "</｜DSML｜invoke>",
            '<｜DSML｜parameter name="',
            '" string="true">',
            '" string="false">',
            "</｜DSML｜parameter>",
        ),
    ),
    "deepseek_v4": (
        *("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="', '">', "\n\n", "{"),
        *(
            "</｜DSML｜invoke>",
            '<｜DSML｜parameter name="',
            '" string="true">',
            '" string="false">',
            "</｜DSML｜parameter>",
        ),
    ),
    "kimi": ("functions.", ":0"),
    "glm": ("\n",),
}
"""Text with a meaning in each grammar, tags that are text included."""


def parse_cases() -> list[dict[str, Any]]:
    """The golden cases of parsing, and those of V3.2 once more as V4's."""
    lines = CASES_FILE.read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["type"] == "parse"]
    for case in cases:
        case["grammar"] = GRAMMARS[case["family"]]
    return cases + [_as_v4(case) for case in cases if case["grammar"] == "deepseek_v32"]


def _as_v4(case: dict[str, Any]) -> dict[str, Any]:
    case = json.loads(json.dumps(case).replace("function_calls", "tool_calls"))
    if "chunks" in case["input"]:
        del case["input"]["chunks"]  # cut within the name
    return {**case, "grammar": "deepseek_v4", "id": case["id"].replace("v32", "v4")}


def parse(
    grammar: str,
    pieces: Sequence[Sequence[Part]],
    *,
    start: StartState = "content",
    tools: Sequence[dict[str, Any]] = (),
    parse_tools: bool = True,
    tokenizer: Tokenizer | None = None,
) -> tuple[list[OutputDelta], bool]:
    """Deltas of an output that comes in pieces, and whether it is malformed."""
    parser = make_parser(grammar, start=start, tools=tools, parse_tools=parse_tools, tokenizer=tokenizer)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return deltas + parser.finish(), parser.is_malformed


def parse_text(grammar: str, text: str, **options: Any) -> ParsedOutput:
    """The whole of an output that comes as one text."""
    return assemble(parse(grammar, [[text]], **options)[0])


def delta_text(delta: OutputDelta) -> str:
    """All characters of a delta."""
    if isinstance(delta, ReasoningDelta | ContentDelta):
        return delta.text
    return (delta.id or "") + (delta.name or "") + delta.arguments


def cut(text: str, rng: random.Random, num_cuts: int) -> list[list[Part]]:
    """Cut a text at random places, two cuts at the same place included."""
    places = [0, *sorted(rng.randint(0, len(text)) for _ in range(num_cuts)), len(text)]
    return [[text[a:b]] for a, b in itertools.pairwise(places)]


def as_parts(grammar: str, text: str) -> list[Part]:
    """The parts of an output in which all that spells an added token is one."""
    pieces = re.split("(" + "|".join(map(re.escape, TOKENS[grammar])) + ")", text)
    return [Special(piece) if piece in TOKENS[grammar] else piece for piece in pieces if piece]


def tokenizer_with(tokens: Sequence[str], *, special: bool = False) -> Tokenizer:
    """A tokenizer of single bytes, byte b at id b, whose added tokens follow from id 256 on."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    added = [{"id": 256 + i, "content": token, **flags} for i, token in enumerate(tokens)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(alphabet)}, "merges": []}
    return Tokenizer(
        {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    )
