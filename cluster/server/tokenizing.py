"""The routes that only need the tokenizer, in vLLM's shapes: load generators and lm-eval use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.runtime.tokenization.chat_template import read_chat_template
from shoal.runtime.tokenization.tokenizer import Tokenizer, read_json

from ..openai.errors import ApiError, json_type
from ..openai.fields import CONVERSATION_FIELDS, check_fields, without_nulls
from ..openai.requests import RequestDefaults, check_text_length, encode_chat, read_flag, read_token_ids

_TOKENIZE_FIELDS = {"prompt", "add_special_tokens", "return_token_strs", *CONVERSATION_FIELDS}
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenize(body: Mapping[str, Any], defaults: RequestDefaults) -> dict[str, Any]:
    """The token ids of a text or a conversation, as an answer would have them for its prompt."""
    check_fields(body, _TOKENIZE_FIELDS)
    body = without_nulls(body)
    tokenizer = _tokenizer(defaults)
    if "messages" in body:
        token_ids = encode_chat(body, defaults).token_ids
    else:
        token_ids = _text_token_ids(body, tokenizer, defaults)
    texts = None
    if read_flag(body, "return_token_strs"):
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in token_ids]
    max_model_len = defaults.limits.max_model_len
    return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts}


def detokenize(body: Mapping[str, Any], defaults: RequestDefaults) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    check_fields(body, {"tokens"})
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise ApiError("invalid_type", "tokens must be a list of token ids", "tokens")
    token_ids = read_token_ids(tokens, "tokens")
    if any(not 0 <= token < defaults.limits.vocab_size for token in token_ids):
        message = f"tokens must be in the vocabulary [0, {defaults.limits.vocab_size})"
        raise ApiError("token_out_of_vocabulary", message, "tokens")
    return {"prompt": _tokenizer(defaults).decode(token_ids, skip_special_tokens=False)}


def tokenizer_info(model: str | Path, defaults: RequestDefaults) -> dict[str, Any]:
    """The class, the special tokens and the chat template of a model directory."""
    _tokenizer(defaults)
    settings = read_json(Path(model) / "tokenizer_config.json") or {}
    info: dict[str, Any] = {"tokenizer_class": settings.get("tokenizer_class", "PreTrainedTokenizerFast")}
    for name in _SPECIAL_TOKENS:
        value = settings.get(name)
        info[name] = value.get("content") if isinstance(value, dict) else value
    return info | {"chat_template": read_chat_template(model), "model_max_length": defaults.limits.max_model_len}


def _text_token_ids(body: Mapping[str, Any], tokenizer: Tokenizer, defaults: RequestDefaults) -> list[int]:
    """Without `add_special_tokens`, a text that is one special token stands for it: so clients learn its id."""
    text = body.get("prompt")
    if not isinstance(text, str):
        raise ApiError("invalid_type", f"prompt must be a string, got {json_type(text)}", "prompt")
    check_text_length(len(text), defaults, "prompt")
    if read_flag({"add_special_tokens": True, **body}, "add_special_tokens"):
        return tokenizer.encode_prompt(text)
    special = tokenizer.special_id(text)
    return tokenizer.encode(text) if special is None else [special]


def _tokenizer(defaults: RequestDefaults) -> Tokenizer:
    if defaults.tokenizer is None:
        raise ApiError("no_tokenizer", "the model directory has no tokenizer")
    return defaults.tokenizer
