"""Turns the JSON object of a batch line into a checked `BatchRow`: what to ask the engine and how to answer.

Two forms are read: OpenAI batch lines (`custom_id`, `method`, `url`, `body`) and plain rows (`prompt` or `messages`,
with sampling fields beside them or under `sampling_params`). A field that is neither known nor harmless is a `BadRow`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from shoal.runtime.request_limits import RequestLimits, check_request
from shoal.runtime.types import Request, SamplingParams

from .input import BadRow, InputLine, clipped, json_type, parse_line

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("/v1/chat/completions", "/v1/completions")

MAX_CUSTOM_ID_CHARS = 512
MAX_SHOWN_CHARS = 60
"""Of a value or a name in a message."""

SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
# Accepted and without effect: they say nothing about the answer.
_IGNORED_FIELDS = frozenset({"model", "user", "metadata", "store", "service_tier"})
_OPENAI_LINE_FIELDS = ("custom_id", "method", "url", "body")
_BODY_FIELDS = {
    "/v1/chat/completions": {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"},
    "/v1/completions": {"prompt"},
}
_PLAIN_FIELDS = frozenset(
    {"custom_id", "id", "prompt", "prompt_token_ids", "messages", "sampling_params", "chat_template_kwargs"}
)
# Known to OpenAI's API, not to us: accepted only with the values that ask for nothing.
_UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "reasoning_effort": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


class PromptEncoder(Protocol):
    """A model's tokenizer and prompt format. Both methods raise ValueError for what they cannot encode."""

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a completion prompt."""
        ...

    def encode_messages(self, messages: list[dict[str, Any]], thinking: bool) -> list[int]:
        """The token ids of a conversation, up to and including the header of the answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What a row is checked against and completed with."""

    limits: RequestLimits
    encoder: PromptEncoder | None = None
    """None: the model has no tokenizer, and only prompts of token ids can be answered."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling fields for rows that do not set them."""
    thinking: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRow:
    """One row that can be answered."""

    line: InputLine
    custom_id: str
    endpoint: Endpoint
    request: Request
    num_logprobs: int | None
    """Alternatives per token that the answer shows; None shows no logprobs (the request has them all the same)."""
    thinking: bool = False
    """The answer begins with thinking, up to `</think>`."""


def row_custom_id(line: InputLine, row: Mapping[str, Any]) -> str:
    """The row's label: `custom_id`, for plain rows also `id`, and `row-<index>` where a plain row has neither."""
    plain = _is_plain(row)
    value = row.get("custom_id")
    if value is None and plain:
        value = row.get("id")
        if value is None:
            return f"row-{line.index}"
        value = str(value) if type(value) is int else value
    if value is None:
        raise BadRow("missing_custom_id", "the line has no custom_id; give each line a string of its own")
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID_CHARS:
        text = f"{len(value)} characters" if isinstance(value, str) else json_type(value)
        raise BadRow(
            "invalid_custom_id", f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters, got {text}"
        )
    return value


def parse_row(line: InputLine, row: Mapping[str, Any], custom_id: str, rules: RowRules) -> BatchRow:
    """Check a parsed line and tokenise its prompt. BadRow names what is wrong."""
    try:
        return (
            _parse_plain(line, row, custom_id, rules) if _is_plain(row) else _parse_openai(line, row, custom_id, rules)
        )
    except BadRow as error:
        error.custom_id = custom_id
        raise


def read_row(line: InputLine, rules: RowRules) -> BatchRow:
    """`parse_line` and `parse_row` in one step, for a line that is known not to repeat a custom id."""
    row = parse_line(line)
    return parse_row(line, row, row_custom_id(line, row), rules)


def _is_plain(row: Mapping[str, Any]) -> bool:
    return not row.keys() & {"method", "url", "body"}


def _parse_openai(line: InputLine, row: Mapping[str, Any], custom_id: str, rules: RowRules) -> BatchRow:
    _refuse_unknown(row, frozenset(_OPENAI_LINE_FIELDS), "")
    if row.get("method", "POST") != "POST":
        raise BadRow("unsupported_method", f"method must be POST, got {_shown(row['method'])}")
    url = row.get("url")
    endpoint = next((known for known in ENDPOINTS if known == url), None)
    if endpoint is None:
        raise BadRow("unsupported_url", f"url must be {' or '.join(ENDPOINTS)}, got {_shown(url)}")
    body = row.get("body")
    if not isinstance(body, dict):
        raise BadRow("invalid_type", f"body must be an object, got {json_type(body)}")
    _refuse_unknown(body, SAMPLING_FIELDS | _BODY_FIELDS[endpoint] | _IGNORED_FIELDS, "body.")
    body = _without_nulls(body)
    values = {name: body[name] for name in SAMPLING_FIELDS & body.keys()}
    thinking = False
    if endpoint == "/v1/chat/completions":
        prompt, thinking = _encode_chat(body, rules)
        values.setdefault("max_tokens", None)
        if "max_completion_tokens" in body:
            if "max_tokens" in body:
                raise BadRow("invalid_parameter", "give max_tokens or max_completion_tokens, not both")
            values["max_tokens"] = body["max_completion_tokens"]
        values.pop("logprobs", None)
        if "logprobs" in body or "top_logprobs" in body:
            values["logprobs"] = _chat_logprobs(body)
    else:
        prompt = _encode_prompt(body, rules)
    # OpenAI's chat default is "no limit"; a default of the job stands before it.
    if "max_tokens" in rules.sampling and values.get("max_tokens") is None:
        values.pop("max_tokens", None)
    return _build(line, custom_id, endpoint, prompt, values, rules, thinking=thinking)


def _parse_plain(line: InputLine, row: Mapping[str, Any], custom_id: str, rules: RowRules) -> BatchRow:
    _refuse_unknown(row, SAMPLING_FIELDS | _PLAIN_FIELDS | _IGNORED_FIELDS, "")
    row = _without_nulls(row)
    nested = row.get("sampling_params", {})
    if not isinstance(nested, dict):
        raise BadRow("invalid_type", f"sampling_params must be an object, got {json_type(nested)}")
    _refuse_unknown(nested, SAMPLING_FIELDS, "sampling_params.")
    values = {name: row[name] for name in SAMPLING_FIELDS & row.keys()}
    if twice := sorted(values.keys() & nested.keys()):
        raise BadRow("invalid_parameter", f"{twice[0]} is given both in the row and in sampling_params")
    if len(given := sorted({"prompt", "prompt_token_ids", "messages"} & row.keys())) > 1:
        raise BadRow("invalid_parameter", f"give one of {' and '.join(given)}, not both")
    values |= nested
    if "messages" in row:
        prompt, thinking = _encode_chat(row, rules)
        return _build(line, custom_id, "/v1/chat/completions", prompt, values, rules, thinking=thinking)
    if "prompt_token_ids" in row:
        row = {"prompt": row["prompt_token_ids"]}
        if not isinstance(row["prompt"], list):
            raise BadRow("invalid_type", f"prompt_token_ids must be a list, got {json_type(row['prompt'])}")
    return _build(line, custom_id, "/v1/completions", _encode_prompt(row, rules), values, rules)


def _build(
    line: InputLine,
    custom_id: str,
    endpoint: Endpoint,
    prompt: Sequence[int],
    values: dict[str, Any],
    rules: RowRules,
    *,
    thinking: bool = False,
) -> BatchRow:
    values = dict(rules.sampling) | values
    _check_shapes(values)
    if values.get("logit_bias"):
        values["logit_bias"] = {int(key): bias for key, bias in values["logit_bias"].items()}
    if values.get("stop") and rules.encoder is None:
        raise BadRow(
            "no_tokenizer", "stop strings need a tokenizer, and the model directory has none; use stop_token_ids"
        )
    num_logprobs = values.get("logprobs")
    try:
        params = SamplingParams(**(values | {"logprobs": 0 if num_logprobs is None else num_logprobs}))
    except ValueError as error:
        raise BadRow("invalid_parameter", str(error)) from error
    request = Request(request_id=f"row-{line.index}", prompt_token_ids=tuple(prompt), params=params, index=line.index)
    if (problem := check_request(request, rules.limits)) is not None:
        raise BadRow(problem.code, problem.message)
    return BatchRow(
        line=line,
        custom_id=custom_id,
        endpoint=endpoint,
        request=request,
        num_logprobs=num_logprobs,
        thinking=thinking,
    )


def _encode_chat(body: Mapping[str, Any], rules: RowRules) -> tuple[list[int], bool]:
    """The prompt, and whether it asks for thinking."""
    messages = body.get("messages")
    if messages is None:
        raise BadRow("missing_prompt", "the row has no messages")
    if not isinstance(messages, list):
        raise BadRow("invalid_type", f"messages must be a list, got {json_type(messages)}")
    if not messages:
        raise BadRow("empty_prompt", "messages is empty; give at least one message")
    thinking = _thinking(body.get("chat_template_kwargs", {}), rules.thinking)
    if rules.encoder is None:
        raise BadRow("no_tokenizer", "messages need a tokenizer, and the model directory has none; give token ids")
    try:
        return rules.encoder.encode_messages([_message(i, m) for i, m in enumerate(messages)], thinking), thinking
    except ValueError as error:
        raise BadRow("invalid_messages", str(error)) from error


def _encode_prompt(body: Mapping[str, Any], rules: RowRules) -> list[int]:
    prompt = body.get("prompt")
    if prompt is None:
        raise BadRow("missing_prompt", "the row has neither prompt nor messages")
    if isinstance(prompt, dict):
        _refuse_unknown(prompt, frozenset({"prompt_token_ids"}), "prompt.")
        prompt = prompt.get("prompt_token_ids")
        if not isinstance(prompt, list):
            raise BadRow("invalid_type", f"prompt.prompt_token_ids must be a list, got {json_type(prompt)}")
    if isinstance(prompt, list):
        if prompt and isinstance(prompt[0], str | list):
            raise BadRow("unsupported_value", "prompt is a list of prompts; give each one a line of its own")
        if (bad := next((i for i, token in enumerate(prompt) if type(token) is not int), None)) is not None:
            raise BadRow("invalid_type", f"prompt[{bad}] must be a token id, got {json_type(prompt[bad])}")
        return prompt
    if not isinstance(prompt, str):
        raise BadRow("invalid_type", f"prompt must be a string or a list of token ids, got {json_type(prompt)}")
    if not prompt:
        raise BadRow("empty_prompt", "the prompt is empty; give it at least one token")
    if rules.encoder is None:
        raise BadRow(
            "no_tokenizer", "a text prompt needs a tokenizer, and the model directory has none; give token ids"
        )
    return rules.encoder.encode_text(prompt)


def _message(position: int, message: object) -> dict[str, Any]:
    """What every prompt format takes for granted; the encoder checks the rest."""
    if not isinstance(message, dict):
        raise BadRow("invalid_type", f"messages[{position}] must be an object, got {json_type(message)}")
    if not isinstance(message.get("role"), str):
        raise BadRow(
            "invalid_type", f"messages[{position}].role must be a string, got {json_type(message.get('role'))}"
        )
    return message


def _thinking(kwargs: object, default: bool) -> bool:
    if not isinstance(kwargs, dict):
        raise BadRow("invalid_type", f"chat_template_kwargs must be an object, got {json_type(kwargs)}")
    _refuse_unknown(kwargs, frozenset({"thinking"}), "chat_template_kwargs.")
    thinking = kwargs.get("thinking", default)
    if not isinstance(thinking, bool):
        raise BadRow("invalid_type", f"chat_template_kwargs.thinking must be true or false, got {json_type(thinking)}")
    return thinking


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    """Chat asks with `logprobs: true` and `top_logprobs: k`."""
    asked, top = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not isinstance(asked, bool):
        raise BadRow("invalid_type", f"logprobs must be true or false for chat, got {json_type(asked)}")
    if type(top) is not int:
        raise BadRow("invalid_type", f"top_logprobs must be a whole number, got {json_type(top)}")
    if top and not asked:
        raise BadRow("invalid_parameter", "top_logprobs needs logprobs: true")
    return top if asked else None


def _check_shapes(values: Mapping[str, Any]) -> None:
    """What SamplingParams takes for granted: that lists are lists and biases are objects."""
    if not isinstance(values.get("stop"), str | list | None):
        raise BadRow("invalid_type", f"stop must be a string or a list of strings, got {json_type(values['stop'])}")
    if not isinstance(values.get("stop_token_ids"), list | None):
        raise BadRow("invalid_type", f"stop_token_ids must be a list, got {json_type(values['stop_token_ids'])}")
    bias = values.get("logit_bias")
    if not isinstance(bias, dict | None):
        raise BadRow("invalid_type", f"logit_bias must be an object, got {json_type(bias)}")
    for key in bias or {}:
        if not (str(key).isascii() and str(key).isdecimal() and len(str(key)) <= 9):
            raise BadRow("invalid_type", f"logit_bias keys must be token ids, got {_shown(key)}")


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Clients write null for "not given"."""
    return {name: value for name, value in values.items() if value is not None}


def _refuse_unknown(values: Mapping[str, Any], known: frozenset[str] | set[str], path: str) -> None:
    for name, value in values.items():
        if name in known:
            continue
        if name not in _UNSUPPORTED_FIELDS:
            shown = clipped(name, MAX_SHOWN_CHARS)
            close = difflib.get_close_matches(shown, sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise BadRow("unknown_field", f"{path}{shown} is not a known field{hint}")
        if value is not None and not any(type(value) is type(v) and value == v for v in _UNSUPPORTED_FIELDS[name]):
            raise BadRow("unsupported_field", f"{path}{name} = {_shown(value)} is not supported; remove it")


def _shown(value: object) -> str:
    """A value for a message: short, whatever a row holds."""
    return (
        repr(clipped(value, MAX_SHOWN_CHARS))
        if isinstance(value, str)
        else repr(value)
        if type(value) in (int, bool)
        else json_type(value)
    )
