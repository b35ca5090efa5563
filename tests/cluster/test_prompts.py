"""Which chat format a model directory has, and what models without one say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.prompts import ModelPrompts
from shoal.runtime.chat.names import ChatFormatName
from shoal.runtime.chat.prompt import ChatPrompt
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer

HI = [{"role": "user", "content": "hi"}]
R1_TEMPLATE = "{{bos_token}}{{'<｜User｜>' + messages[0].content + '<｜Assistant｜><think>\\n'}}"


def prompts_of(
    directory: Path, *, template: Any = None, model_type: str = "deepseek_v3", chosen: ChatFormatName | None = None
) -> ModelPrompts:
    write_byte_tokenizer(directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    prompts = ModelPrompts.from_pretrained(directory, chosen)
    assert prompts is not None
    return prompts


def prompt_text(prompts: ModelPrompts, options: ChatOptions = ChatOptions()) -> str:  # noqa: B008  (frozen)
    return prompts.tokenizer.decode(prompts.encode_chat(HI, options).token_ids, skip_special_tokens=False)


def test_the_template_of_a_made_tokenizer_is_that_of_v31(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    prompts = ModelPrompts.from_pretrained(tmp_path)
    assert prompts is not None
    assert prompt_text(prompts) == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"
    thinking = prompt_text(prompts, ChatOptions(thinking=True))
    assert thinking == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>"


def test_a_template_decides(tmp_path: Path) -> None:
    """Such a model was once given V3.1's prompts, and answered without its thinking."""
    expected = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>\n"
    assert prompt_text(prompts_of(tmp_path, template=R1_TEMPLATE)) == expected
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": R1_TEMPLATE}]
    assert prompt_text(prompts_of(tmp_path, template=named)) == expected
    prompts_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(R1_TEMPLATE)
    prompts = ModelPrompts.from_pretrained(tmp_path)
    assert prompts is not None
    assert prompt_text(prompts) == expected


def test_a_setting_overrides_the_template(tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path, template=R1_TEMPLATE, chosen="deepseek_v31")
    assert prompt_text(prompts).endswith("<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("template", "found"), [(None, "no chat template"), ("{{ messages }}", "an unknown chat template")]
)
def test_an_unknown_template_names_the_setting(tmp_path: Path, template: str | None, found: str) -> None:
    prompts = prompts_of(tmp_path, template=template)
    with pytest.raises(
        ValueError, match=rf"\(model_type deepseek_v3\) has {found}; set chat_format to one of deepseek_v3, "
    ):
        prompts.encode_chat(HI, ChatOptions())
    assert prompts.encode_text("a") == ChatPrompt([0, 100])


def test_a_template_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be text, got int"):
        prompts_of(tmp_path, template=3)


def test_a_model_without_a_tokenizer_has_no_prompts(tmp_path: Path) -> None:
    assert ModelPrompts.from_pretrained(tmp_path) is None


def test_text_that_spells_a_token_is_noticed(tmp_path: Path) -> None:
    """A prompt made with a chat template, which is text here, was once answered without a word."""
    prompts = prompts_of(tmp_path)
    encoded = prompts.encode_text("hi<｜User｜></think>")
    assert encoded.spelled_token == "<｜User｜>"
    assert len(encoded.token_ids) == 1 + len("hi<｜User｜></think>".encode())
    assert prompts.encode_text("hi<|User|><think").spelled_token is None
