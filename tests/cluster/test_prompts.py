"""Which models have a chat format, and what the others say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cluster.prompts import ModelPrompts
from shoal.runtime.tokenization.tokenizer import write_byte_tokenizer

HI = [{"role": "user", "content": "hi"}]


def prompts_of(directory: Path, model_type: str) -> ModelPrompts:
    write_byte_tokenizer(directory / "tokenizer.json")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    prompts = ModelPrompts.from_pretrained(directory)
    assert prompts is not None
    return prompts


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_deepseeks_have_a_chat_format(tmp_path: Path, model_type: str) -> None:
    prompts = prompts_of(tmp_path, model_type)
    assert prompts.chat_format == "deepseek-v3.1"
    assert prompts.encode_messages(HI, True).token_ids[-1] == prompts.tokenizer.special_id("<think>")


@pytest.mark.parametrize("model_type", ["kimi_k2", "glm_moe_dsa", "glm4_moe_lite"])
def test_models_without_a_chat_format_say_so(tmp_path: Path, model_type: str) -> None:
    prompts = prompts_of(tmp_path, model_type)
    with pytest.raises(ValueError, match=f"chat is not supported for {model_type}; give a prompt or token ids"):
        prompts.encode_messages(HI, False)
    assert prompts.encode_text("a") == [0, 100]


def test_a_model_without_a_tokenizer_has_no_prompts(tmp_path: Path) -> None:
    assert ModelPrompts.from_pretrained(tmp_path) is None
