"""Outputs that are broken at random: no error, the same result for every cut, and no text lost.

Text is lost if a character that is no part of a tag is in no delta. Three kinds of text are dropped on purpose: white
space where only tags can stand, text after the calls (GLM keeps it), and a tag that the end of the output cuts off
where only tags can stand.
Each mark below is in the output once, so it is easy to find. A mark within a tag makes it text, which must not be lost.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from shoal.runtime.chat.output import OutputDelta, assemble
from tests.support.outputs import SEPARATORS, TOKENS, as_parts, cut, delta_text, parse, parse_cases, tokenizer_with

MARKS = "①②③④⑤⑥⑦⑧⑨"
CASES = parse_cases()
TOKENIZERS = {grammar: tokenizer_with(tokens) for grammar, tokens in TOKENS.items()}
EVERY_GRAMMAR = pytest.mark.parametrize("grammar", sorted(TOKENS))
# After one of these, text may be dropped.
CALLS_ENDS = {
    "deepseek_v3": ("<｜tool▁calls▁end｜>",),
    "deepseek_v31": ("<｜tool▁calls▁end｜>",),
    "deepseek_v32": ("</｜DSML｜function_calls>", "</｜DSML｜invoke>"),
    "deepseek_v4": ("</｜DSML｜tool_calls>", "</｜DSML｜invoke>"),
    "kimi": ("<|tool_calls_section_end|>",),
    "glm": (),
}
NUM_OUTPUTS = 300


def broken(grammar: str, rng: random.Random) -> dict[str, Any]:
    """A case's input with tags and characters deleted, doubled and inserted, and with marks."""
    case = rng.choice([case for case in CASES if case["grammar"] == grammar])
    text = case["input"]["text"]
    pieces = [*TOKENS[grammar], *SEPARATORS[grammar]]
    for _ in range(rng.randint(0, 4)):
        piece = rng.choice(pieces)
        place = rng.randint(0, len(text))
        action = rng.choice(["insert", "insert piece", "delete", "delete piece", "double piece", "end"])
        if action == "insert":
            text = text[:place] + rng.choice(' \n\t"\\{}<>/|｜`:é⛵') + text[place:]
        elif action == "insert piece":
            text = text[:place] + piece + text[place:]
        elif action == "delete":
            text = text[:place] + text[place + rng.randint(1, 3) :]
        elif action == "delete piece":
            text = text.replace(piece, "", 1)
        elif action == "double piece":
            text = text.replace(piece, piece + piece, 1)
        elif rng.random() < 0.3:
            text = text[:place]
    for mark in MARKS[: rng.randint(0, len(MARKS))]:
        place = rng.randint(0, len(text))
        text = text[:place] + mark + text[place:]
    return {
        **case["input"],
        "text": text,
        "start": rng.choice(["reasoning", "content", "auto", case["input"]["start"]]),
    }


def lost_marks(grammar: str, text: str, deltas: list[OutputDelta]) -> set[str]:
    """Marks that are in no delta and stand before any text that may be dropped."""
    found = set("".join(map(delta_text, deltas)))
    ends = [text.find(tag) for tag in CALLS_ENDS[grammar] if tag in text]
    return (set(MARKS) & set(text[: min(ends, default=len(text))])) - found


def check_broken_output(grammar: str, rng: random.Random) -> None:
    given = broken(grammar, rng)
    text = given["text"]
    options: dict[str, Any] = {"start": given["start"], "tools": rng.choice([given["tools"], []])}
    deltas, is_malformed = parse(grammar, [[text]], **options)
    output = assemble(deltas)
    assert lost_marks(grammar, text, deltas) == set(), given
    for pieces in (cut(text, rng, rng.randint(1, 20)), [[character] for character in text]):
        deltas, malformed_too = parse(grammar, pieces, **options)
        assert (assemble(deltas), malformed_too) == (output, is_malformed), (given, pieces)
    tokenizer = TOKENIZERS[grammar]
    parts = as_parts(grammar, text)
    deltas, is_malformed = parse(grammar, [parts], tokenizer=tokenizer, **options)
    assert lost_marks(grammar, text, deltas) == set(), given
    one_by_one, malformed_too = parse(
        grammar,
        [[p] for p in parts],
        tokenizer=tokenizer,
        **options,
    )
    assert (assemble(one_by_one), malformed_too) == (assemble(deltas), is_malformed), given


@EVERY_GRAMMAR
def test_broken_outputs(grammar: str) -> None:
    rng = random.Random(grammar)
    for _ in range(NUM_OUTPUTS):
        check_broken_output(grammar, rng)
