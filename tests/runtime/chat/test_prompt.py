"""Conversations to token ids and outputs to messages, with a tokenizer."""

from __future__ import annotations

import pytest

from shoal.runtime.chat import glm, kimi
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.chat.output import ParsedOutput
from shoal.runtime.chat.prompt import ChatPrompt, OutputFormat, parse_output, render_prompt
from shoal.runtime.tokenization.tokenizer import EOS, THINK_END, THINK_START, Tokenizer
from tests.support.outputs import tokenizer_with

TOOL = {"type": "function", "function": {"name": "f"}}


def prompt(tokenizer: Tokenizer, name: str, *, thinking: bool = False, **options: object) -> ChatPrompt:
    conversation = read_conversation([{"role": "user", "content": "hi"}], thinking=thinking, **options)  # type: ignore[arg-type]
    return render_prompt(conversation, chat_format=CHAT_FORMATS[name], tokenizer=tokenizer)


def test_how_an_output_is_read_follows_from_the_prompt() -> None:
    tokenizer = tokenizer_with(
        [THINK_START, THINK_END, EOS, "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    )
    plain = prompt(tokenizer, "deepseek_v31")
    assert plain.output_format == OutputFormat("deepseek_v31", "content")
    assert plain.reasoning_end_token_id is None
    thinking = prompt(tokenizer, "deepseek_v31", thinking=True)
    assert thinking.reasoning_end_token_id == tokenizer.special_id(THINK_END)
    assert thinking.output_format == OutputFormat("deepseek_v31", "reasoning", (), tokenizer.special_id(THINK_END))


def test_a_token_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"this tokenizer has no token <｜Assistant｜>, <｜User｜>, which"):
        prompt(tokenizer_with([THINK_END, "<｜begin▁of▁sentence｜>"]), "deepseek_v31")


def test_tokens_that_end_a_turn() -> None:
    tags = [kimi.IM_END, kimi.IM_MIDDLE, "<|im_user|>", "<|im_system|>", "<|im_assistant|>"]
    tokenizer = tokenizer_with(tags)
    assert prompt(tokenizer, "kimi_k2").stop_token_ids == (tokenizer.special_id(kimi.IM_END),)
    tags = [glm.GMASK, glm.SOP, glm.USER, glm.OBSERVATION, "<|system|>", "<|assistant|>", THINK_START, THINK_END]
    tokenizer = tokenizer_with(tags)
    ends = (tokenizer.special_id(glm.USER), tokenizer.special_id(glm.OBSERVATION))
    assert prompt(tokenizer, "glm_5").stop_token_ids == ends, "and no end of text, which this tokenizer lacks"


def test_a_stop_string_cuts_what_is_read() -> None:
    tokenizer = tokenizer_with([THINK_START, THINK_END])
    end = tokenizer.special_id(THINK_END)
    assert end is not None
    output_format = OutputFormat("deepseek_v31", "reasoning", (), end)
    token_ids = [*tokenizer.encode("hm"), end, *tokenizer.encode("42 STOP")]
    whole = tokenizer.decode(token_ids)
    cut = whole.removesuffix("STOP")
    found = parse_output(cut, token_ids, output_format, tokenizer=tokenizer)
    assert found == ParsedOutput(reasoning="hm", content="42 ", tool_calls=[])
