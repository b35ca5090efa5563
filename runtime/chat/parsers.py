"""Parsers of outputs by the name of their grammar."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ..tokenization.tokenizer import THINK_END, THINK_START, Tokenizer
from .deepseek_parsers import DeepSeekV3Parser, DeepSeekV31Parser
from .dsml_parsers import DeepSeekV4Parser, DeepSeekV32Parser
from .glm_parser import GlmParser
from .grammar_parser import GrammarParser, ParserOptions
from .kimi_parser import KimiParser
from .output import OutputParser, StartState

PARSERS: dict[str, type[GrammarParser]] = {
    "deepseek_v3": DeepSeekV3Parser,  # and R1
    "deepseek_v31": DeepSeekV31Parser,  # and V3.2-Exp
    "deepseek_v32": DeepSeekV32Parser,
    "deepseek_v4": DeepSeekV4Parser,
    "kimi": KimiParser,
    "glm": GlmParser,
}


@functools.cache
def tag_tokens(grammar: str) -> frozenset[str]:
    """Added tokens that the tags of a grammar are made of."""
    return frozenset({THINK_START, THINK_END, *PARSERS[grammar].tokens})


def make_parser(
    grammar: str,
    *,
    start: StartState,
    tools: Sequence[Mapping[str, Any]] = (),
    parse_tools: bool,
    tokenizer: Tokenizer | None = None,
) -> OutputParser:
    """Parser for one output.

    `tools` are OpenAI's objects, whose schemas GLM's grammar needs. Without `parse_tools` nothing is read as a call.
    With the output's tokenizer, tags that are added tokens are read from `Special` only, and text that spells one stays
    text. Without it, tags are found in text.
    """
    options = ParserOptions(start=start, tools=tools, parse_tools=parse_tools, tokenizer=tokenizer)
    return PARSERS[grammar](options)
