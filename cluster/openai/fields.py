"""The table of request fields, shared by everything that reads OpenAI's format."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.runtime.types import SamplingParams

from .errors import ApiError, clipped, json_type

MAX_SHOWN_CHARS = 60
"""Longest value or name that a message repeats."""

FORM_FIELDS = frozenset({"response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"})
"""Other ways to write `structured_outputs`."""
SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) | FORM_FIELDS
CONVERSATION_FIELDS = frozenset(
    {
        "messages",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
    }
)
CHAT_FIELDS = SAMPLING_FIELDS | {
    "max_completion_tokens",
    "top_logprobs",
    "return_token_ids",
    *CONVERSATION_FIELDS,
}
COMPLETION_FIELDS = SAMPLING_FIELDS | {"prompt", "echo", "return_token_ids"}

FIELDS_WITHOUT_EFFECT = frozenset(
    {
        "model",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "priority",
    }
)
"""They say nothing about the answer: which model, who asks, how the service should file it."""


@dataclass(frozen=True, slots=True)
class UnsupportedField:
    """A field of OpenAI's or vLLM's API that is refused, unless its value asks for nothing."""

    harmless: tuple[object, ...]
    """Values that ask for nothing; null always does."""
    advice: str = "remove it"


UNSUPPORTED_FIELDS: dict[str, UnsupportedField] = {
    "stream": UnsupportedField((False,), "remove it: answers come whole"),
    "stream_options": UnsupportedField((), "remove it: answers come whole"),
    "functions": UnsupportedField(([],), "use tools"),
    "function_call": UnsupportedField(("none", "auto")),
    "modalities": UnsupportedField((["text"],), "answers are text"),
    "audio": UnsupportedField((), "answers are text"),
    "verbosity": UnsupportedField(("medium",), "ask for it in a message"),
    "prediction": UnsupportedField(()),
    "web_search_options": UnsupportedField(()),
    "suffix": UnsupportedField(("",)),
    "best_of": UnsupportedField((1,), "use n"),
    "use_beam_search": UnsupportedField((False,)),
    "length_penalty": UnsupportedField((1.0,)),
    "spaces_between_special_tokens": UnsupportedField((True,)),
    "add_special_tokens": UnsupportedField((True,), "give token ids to choose the first token"),
    "include_reasoning": UnsupportedField((True,), "drop reasoning_content from the answer"),
    "chat_template": UnsupportedField((), "give token ids for a format of your own"),
    "documents": UnsupportedField(([],), "put them into a message"),
    "bad_words": UnsupportedField(([],), "use logit_bias"),
    "allowed_token_ids": UnsupportedField((), "use logit_bias"),
}


def check_fields(values: Mapping[str, Any], known: Collection[str], path: str = "") -> None:
    """ApiError for the first field that is neither known nor harmless, with the nearest known one."""
    for name, value in values.items():
        if name in known or (not path and name in FIELDS_WITHOUT_EFFECT):
            continue
        param = path + clipped(name, MAX_SHOWN_CHARS)
        unsupported = UNSUPPORTED_FIELDS.get(name)
        if unsupported is None:
            close = difflib.get_close_matches(clipped(name, MAX_SHOWN_CHARS), sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError("unknown_field", f"{param} is not a known field{hint}", param)
        if value is not None and not any(_equal(value, harmless) for harmless in unsupported.harmless):
            message = f"{param} = {shown(value)} is not supported; {unsupported.advice}"
            raise ApiError("unsupported_field", message, param)


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are given: clients write null for "not given"."""
    return {name: value for name, value in values.items() if value is not None}


def shown(value: object) -> str:
    """A value for a message: short, whatever a request holds."""
    if isinstance(value, str):
        return repr(clipped(value, MAX_SHOWN_CHARS))
    return repr(value) if isinstance(value, bool | int | float) else json_type(value)


def _equal(value: object, harmless: object) -> bool:
    """Equality in which 1 and 1.0 are the same number, and neither is true."""
    return isinstance(value, bool) is isinstance(harmless, bool) and value == harmless
