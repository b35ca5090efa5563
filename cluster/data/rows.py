"""Rows of a dataset to requests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from shoal.runtime.chat.prompt import ChatPrompt

from ..openai.errors import ApiError, json_type
from ..openai.fields import SAMPLING_FIELDS, check_fields, without_nulls
from ..openai.requests import ParsedRequest, RequestDefaults, build_request, encode_chat, encode_prompt
from .config import EngineProcessorConfig

INPUT_COLUMNS = ("messages", "prompt", "tokenized_prompt", "sampling_params", "chat_template_kwargs")
"""Columns that are read; each may be missing."""


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A row that can be answered."""

    parsed: ParsedRequest
    prompt: str
    """The text of the prompt; empty for token ids alone."""
    wants_text: bool


class RowReader:
    """Reads the rows of a processor; `read` raises ApiError for a row that cannot be answered."""

    def __init__(
        self, config: EngineProcessorConfig, defaults: RequestDefaults, chat_template_kwargs: Mapping[str, Any]
    ) -> None:
        """defaults: their sampling fields are for rows without sampling_params."""
        self._defaults = defaults
        self._without_defaults = replace(defaults, sampling={})
        self._applies_chat_template = config.chat_template.enabled
        self._tokenizes = config.tokenizes
        self._detokenizes = config.detokenizes
        self._chat_template_kwargs = chat_template_kwargs
        self._seed = config.engine_args.seed

    def read(self, row: Mapping[str, Any]) -> RowRequest:
        """The request of a row."""
        row = without_nulls(plain(row))
        sampling = row.get("sampling_params")
        defaults = self._defaults if sampling is None else self._without_defaults
        values = _sampling_values({} if sampling is None else sampling)
        wants_text = values.pop("detokenize", True) is not False or self._detokenizes
        if self._applies_chat_template and "messages" in row:
            prompt = encode_chat(self._conversation(row), defaults)
            assert defaults.tokenizer is not None, "encode_chat refuses messages without one"
            text = defaults.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
            parsed = build_request("/v1/chat/completions", prompt, values, defaults)
        else:
            prompt = self._encode_prompt(row, defaults)
            text = row.get("prompt", "")
            parsed = build_request("/v1/completions", prompt, values, defaults)
        return RowRequest(self._with_seed(parsed), text if isinstance(text, str) else "", wants_text)

    def _conversation(self, row: dict[str, Any]) -> dict[str, Any]:
        """The messages with their options; a last message of the assistant is continued."""
        kwargs = row.get("chat_template_kwargs", {})
        if not isinstance(kwargs, dict):
            message = f"chat_template_kwargs must be a mapping, got {json_type(kwargs)}"
            raise ApiError("invalid_type", message, "chat_template_kwargs")
        messages = row["messages"]
        last = messages[-1] if isinstance(messages, list) and messages else None
        return {
            "messages": messages,
            "chat_template_kwargs": {**self._chat_template_kwargs, **without_nulls(kwargs)},
            "continue_final_message": isinstance(last, dict) and last.get("role") == "assistant",
        }

    def _encode_prompt(self, row: dict[str, Any], defaults: RequestDefaults) -> ChatPrompt:
        has_text, has_tokens = "prompt" in row, "tokenized_prompt" in row
        if not has_text and not has_tokens:
            wanted = (
                "messages, prompt or tokenized_prompt" if self._applies_chat_template else "prompt or tokenized_prompt"
            )
            raise ApiError("missing_prompt", f"the row has no {wanted}")
        takes_text = has_text and (self._tokenizes or not has_tokens)
        return encode_prompt({"prompt": row["prompt" if takes_text else "tokenized_prompt"]}, defaults)

    def _with_seed(self, parsed: ParsedRequest) -> ParsedRequest:
        if parsed.params.seed is not None or parsed.params.greedy:
            return parsed
        seed = row_seed(self._seed, parsed.prompt_token_ids)
        return replace(parsed, params=msgspec.structs.replace(parsed.params, seed=seed))


def row_seed(seed: int, prompt_token_ids: Sequence[int]) -> int:
    """The seed, of 63 bits, of a row that brings none. Blocks and their order do not matter, as Ray may change them."""
    tokens = " ".join(map(str, prompt_token_ids))
    digest = hashlib.sha256(f"shoal row {seed} {tokens}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def plain(value: Any) -> Any:
    """A value of a column as JSON would have it: lists for arrays and tuples, Python's numbers for numpy's."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _sampling_values(sampling: object) -> dict[str, Any]:
    """The given fields. Arrow writes null where another row of the block has a value, in mappings too."""
    if not isinstance(sampling, dict):
        message = f"sampling_params must be a mapping, got {json_type(sampling)}"
        raise ApiError("invalid_type", message, "sampling_params")
    values = without_nulls(sampling)
    check_fields(values, SAMPLING_FIELDS | {"detokenize"}, "sampling_params.")
    values = {name: value for name, value in values.items() if name in SAMPLING_FIELDS | {"detokenize"}}
    if isinstance(values.get("logit_bias"), dict):
        values["logit_bias"] = without_nulls(values["logit_bias"])
    if values.get("n", 1) != 1:
        message = "sampling_params.n must be 1: a row has one answer; repeat the row, with a seed for each"
        raise ApiError("unsupported_value", message, "sampling_params.n")
    return values
