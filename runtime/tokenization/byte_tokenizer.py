"""A tokenizer of single bytes, for models that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .byte_level import byte_alphabet
from .tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    THINK_END,
    THINK_START,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_OUTPUT_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    TOOL_SEP,
    USER,
)

_SENTENCE_TOKENS = (BOS, EOS, PAD)
# DeepSeek adds these with special=false, so that decoding keeps them.
_MARKUP_TOKENS = (
    *(THINK_START, THINK_END, USER, ASSISTANT),
    *(TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END),
    *(TOOL_OUTPUTS_BEGIN, TOOL_OUTPUTS_END, TOOL_OUTPUT_BEGIN, TOOL_OUTPUT_END, TOOL_SEP),
)


# For programs that render prompts themselves; Shoal reads off it which chat format the model has, and never runs it.
_CHAT_TEMPLATE = """\
{%- set thinking = thinking is defined and thinking -%}
{{- bos_token -}}
{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{- '<｜Assistant｜></think>' + message.content.split('</think>', 1)[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}
"""


def write_byte_tokenizer(path: str | Path) -> int:
    """Write a tokenizer.json of single bytes and DeepSeek's special tokens; returns the vocabulary's size.

    Ids: sentence and pad tokens 0-2 as in DeepSeek's, byte b at 3 + b, then the think, chat and tool tokens. A
    tokenizer_config.json beside it has DeepSeek-V3.1's way to write messages of text as its chat template.
    """
    vocab = [*_SENTENCE_TOKENS, *byte_alphabet()]
    contents = [*_SENTENCE_TOKENS, *_MARKUP_TOKENS]
    ids = [*range(len(_SENTENCE_TOKENS)), *range(len(vocab), len(vocab) + len(_MARKUP_TOKENS))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": i, "content": t, **flags, "normalized": t in _MARKUP_TOKENS, "special": t in _SENTENCE_TOKENS}
        for i, t in zip(ids, contents, strict=True)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}, "merges": []}
    spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    _write_json(Path(path), spec)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(Path(path).with_name("tokenizer_config.json"), settings)
    assert len(vocab) + len(_MARKUP_TOKENS) == 272, "a multiple of 16, as kernels want it"
    return len(vocab) + len(_MARKUP_TOKENS)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
