"""The tokenizer of made models against transformers, which reads its directory as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from shoal.runtime.chat.formats import CHAT_FORMATS, choose_format
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.chat.prompt import render_prompt
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.chat_template import read_chat_template
from shoal.runtime.tokenization.tokenizer import Tokenizer

Message = dict[str, Any]


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CONVERSATIONS = [
    [message("user", "hi")],
    [message("system", "Be brief."), message("user", "hi"), message("system", "Be kind.")],
    [message("user", "1+1?"), message("assistant", "hm</think>2</think>"), message("user", "Ünd 2+2?\n")],
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "systems", "history"])
def test_transformers_renders_the_same_prompt(tmp_path: Path, messages: list[Message], thinking: bool) -> None:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, thinking=thinking, tokenize=False)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours is not None
    name = choose_format(read_chat_template(tmp_path), "deepseek_v3")
    conversation = read_conversation(messages, thinking=thinking)
    prompt = render_prompt(conversation, chat_format=CHAT_FORMATS[name], tokenizer=ours)
    assert ours.decode(prompt.token_ids, skip_special_tokens=False) == expected
    assert theirs.eos_token_id in ours.eos_token_ids
