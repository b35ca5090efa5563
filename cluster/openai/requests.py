"""Reads the bodies of OpenAI's requests: from JSON values to token ids and checked sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from shoal.parallel.settings import SettingError
from shoal.runtime.chat.prompt import ChatPrompt, OutputFormat
from shoal.runtime.plain_numbers import whole_number
from shoal.runtime.request_limits import RequestLimits, check_request, context_length
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Request, SamplingParams

from .chat_options import ChatOptions, read_chat_options
from .errors import ApiError, json_type
from .fields import CHAT_FIELDS, COMPLETION_FIELDS, SAMPLING_FIELDS, check_fields, shown, without_nulls
from .prompt_params import prompt_params
from .structured import read_form

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("/v1/chat/completions", "/v1/completions")


class PromptEncoder(Protocol):
    """A model's tokenizer and chat format. Both methods raise ValueError for what they cannot encode."""

    def encode_text(self, text: str) -> ChatPrompt:
        """The prompt of a completion."""
        ...

    def encode_chat(self, messages: list[dict[str, Any]], options: ChatOptions) -> ChatPrompt:
        """The prompt of a conversation, up to where the answer begins."""
        ...


@dataclass(frozen=True, kw_only=True)
class RequestDefaults:
    """Limits that requests are checked against, and values for the fields that they leave out."""

    limits: RequestLimits
    encoder: PromptEncoder | None = None
    """None: the model has no tokenizer, and only prompts of token ids can be answered."""
    tokenizer: Tokenizer | None = None
    """For the text and the bytes of tokens in answers."""
    structured_outputs: StructuredOutputs | None = None
    """Checks the forms of answers; None leaves that to the engines."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling fields for requests that do not set them."""
    thinking: bool | None = None
    """Whether to think where a request does not say; None: as the chat format does by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedRequest:
    """A request that can be answered."""

    endpoint: Endpoint
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    num_logprobs: int | None
    """Alternatives per token that the answer shows; None shows no logprobs (they are computed all the same)."""
    output_format: OutputFormat | None = None
    """How the output is read; None: it is text."""
    spelled_token: str | None = None
    """See `ChatPrompt`."""
    echo: bool = False
    """The answer begins with the prompt, and its logprobs with those of the prompt."""
    scores_prompt: bool = False
    """`max_tokens` 0: the one token that engines generate is not shown."""
    return_token_ids: bool = False
    """The answer has the token ids of the prompt, and its events those of their texts."""

    def to_request(self, request_id: str, index: int) -> Request:
        """The request for an engine. index: its position in the run."""
        return Request(
            request_id=request_id,
            prompt_token_ids=self.prompt_token_ids,
            params=self.params,
            index=index,
            reasoning_end_token_id=None if self.output_format is None else self.output_format.reasoning_end_token_id,
        )


def parse_chat(body: Mapping[str, Any], defaults: RequestDefaults) -> ParsedRequest:
    """Read the body of a /v1/chat/completions request; ApiError names what is wrong."""
    check_fields(body, CHAT_FIELDS)
    body = without_nulls(body)
    values = {name: body[name] for name in SAMPLING_FIELDS & body.keys()}
    prompt = encode_chat(body, defaults)
    values.setdefault("max_tokens", None)  # OpenAI's default for chat: up to the context's end
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise ApiError(
                "invalid_parameter", "give max_tokens or max_completion_tokens, not both", "max_completion_tokens"
            )
        values["max_tokens"] = body["max_completion_tokens"]
    values.pop("logprobs", None)
    if "logprobs" in body or "top_logprobs" in body:
        values["logprobs"] = _chat_logprobs(body)
    if "max_tokens" in defaults.sampling and values["max_tokens"] is None:
        del values["max_tokens"]
    parsed = build_request("/v1/chat/completions", prompt, values, defaults)
    return replace(parsed, return_token_ids=read_flag(body, "return_token_ids"))


def parse_completion(body: Mapping[str, Any], defaults: RequestDefaults) -> ParsedRequest:
    """Read the body of a /v1/completions request; ApiError names what is wrong."""
    check_fields(body, COMPLETION_FIELDS)
    body = without_nulls(body)
    values = {name: body[name] for name in SAMPLING_FIELDS & body.keys()}
    echo = read_flag(body, "echo")
    scores_prompt = echo and whole_number(values.get("max_tokens")) == 0
    if scores_prompt:
        values["max_tokens"] = 1
    if echo:
        values |= _echoed_logprobs(values, defaults)
    parsed = build_request("/v1/completions", encode_prompt(body, defaults), values, defaults)
    return replace(parsed, echo=echo, scores_prompt=scores_prompt, return_token_ids=read_flag(body, "return_token_ids"))


def build_request(
    endpoint: Endpoint, prompt: ChatPrompt, values: Mapping[str, Any], defaults: RequestDefaults
) -> ParsedRequest:
    """Complete sampling fields with the defaults and check them; ApiError for values that cannot be used."""
    own, form_field = read_form(values)
    values = dict(defaults.sampling) | own
    _check_shapes(values)
    if values.get("logit_bias"):
        values["logit_bias"] = {int(key): bias for key, bias in values["logit_bias"].items()}
    if values.get("stop") and defaults.encoder is None:
        message = "stop strings need a tokenizer, and the model directory has none; use stop_token_ids"
        raise ApiError("no_tokenizer", message, "stop")
    show_logprobs = values.get("logprobs") is not None
    try:
        params = SamplingParams(**(values | {"logprobs": values["logprobs"] if show_logprobs else 0}))
        params = prompt_params(params, prompt, defaults.tokenizer)
    except ValueError as error:
        param = error.name if isinstance(error, SettingError) else None
        raise ApiError("invalid_parameter", str(error), param) from error
    parsed = ParsedRequest(
        endpoint=endpoint,
        prompt_token_ids=tuple(prompt.token_ids),
        params=params,
        num_logprobs=params.logprobs if show_logprobs else None,
        output_format=prompt.output_format,
        spelled_token=prompt.spelled_token,
    )
    if (problem := check_request(parsed.to_request("", 0), defaults.limits)) is not None:
        raise ApiError(problem.code, problem.message)
    if (max_tokens := whole_number(own.get("max_tokens"))) is not None and max_tokens > defaults.limits.max_model_len:
        message = f"{context_length(defaults.limits)}; max_tokens is {max_tokens}"
        raise ApiError("context_length_exceeded", message, "max_tokens")
    if defaults.structured_outputs is not None:
        try:
            defaults.structured_outputs.check(params)
        except ValueError as error:
            param = form_field or (None if prompt.calls is None else "tools")
            raise ApiError("invalid_grammar", str(error), param) from error
    return parsed


def encode_chat(body: Mapping[str, Any], defaults: RequestDefaults) -> ChatPrompt:
    """The prompt of a body that has `messages`."""
    messages = body.get("messages")
    if messages is None:
        raise ApiError("missing_prompt", "the request has no messages", "messages")
    if not isinstance(messages, list):
        raise ApiError("invalid_type", f"messages must be a list, got {json_type(messages)}", "messages")
    if not messages:
        raise ApiError("empty_prompt", "messages is empty; give at least one message", "messages")
    options = read_chat_options(body, thinking=defaults.thinking)
    if defaults.encoder is None:
        message = "messages need a tokenizer, and the model directory has none; give token ids"
        raise ApiError("no_tokenizer", message, "messages")
    checked = [_message(i, m) for i, m in enumerate(messages)]
    check_text_length(sum(map(_num_chars, checked)), defaults, "messages")
    try:
        return defaults.encoder.encode_chat(checked, options)
    except ValueError as error:
        raise ApiError("invalid_messages", str(error), "messages") from error


def encode_prompt(body: Mapping[str, Any], defaults: RequestDefaults) -> ChatPrompt:
    """The prompt of a body that has `prompt`: text, token ids, or {"prompt_token_ids": ids}."""
    prompt = body.get("prompt")
    if prompt is None:
        raise ApiError("missing_prompt", "the request has neither prompt nor messages", "prompt")
    if isinstance(prompt, dict):
        check_fields(prompt, {"prompt_token_ids"}, "prompt.")
        prompt = prompt.get("prompt_token_ids")
        if not isinstance(prompt, list):
            message = f"prompt.prompt_token_ids must be a list, got {json_type(prompt)}"
            raise ApiError("invalid_type", message, "prompt.prompt_token_ids")
    if isinstance(prompt, list):
        return ChatPrompt(read_token_ids(prompt, "prompt"))
    if not isinstance(prompt, str):
        message = f"prompt must be a string or a list of token ids, got {json_type(prompt)}"
        raise ApiError("invalid_type", message, "prompt")
    if not prompt:
        raise ApiError("empty_prompt", "the prompt is empty; give it at least one token", "prompt")
    if defaults.encoder is None:
        message = "a text prompt needs a tokenizer, and the model directory has none; give token ids"
        raise ApiError("no_tokenizer", message, "prompt")
    check_text_length(len(prompt), defaults, "prompt")
    return defaults.encoder.encode_text(prompt)


def read_flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, and false where it is missing or null."""
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise ApiError("invalid_type", f"{name} must be true or false, got {json_type(value)}", name)
    return bool(value)


def _echoed_logprobs(values: Mapping[str, Any], defaults: RequestDefaults) -> dict[str, Any]:
    """The prompt's logprobs, which an echoed prompt has where the answer has some."""
    if values.get("prompt_logprobs") is not None:
        message = "echo shows the prompt's logprobs where logprobs asks for them; remove prompt_logprobs"
        raise ApiError("invalid_parameter", message, "prompt_logprobs")
    return {"prompt_logprobs": values.get("logprobs", defaults.sampling.get("logprobs"))}


def read_token_ids(values: Sequence[object], name: str) -> list[int]:
    """The token ids of a list in a field; ApiError for other values."""
    if values and isinstance(values[0], str | list):
        raise ApiError("unsupported_value", f"{name} is a list of prompts; ask for each one by itself", name)
    token_ids: list[int] = []
    for i, value in enumerate(values):
        token_id = whole_number(value)
        if token_id is None:
            got = shown(value) if isinstance(value, float) else json_type(value)
            raise ApiError("invalid_type", f"{name}[{i}] must be a token id, got {got}", name)
        token_ids.append(token_id)
    return token_ids


def _message(position: int, message: object) -> dict[str, Any]:
    """Check what every prompt format takes for granted; the encoder checks the rest."""
    if not isinstance(message, dict):
        raise ApiError("invalid_type", f"messages[{position}] must be an object, got {json_type(message)}", "messages")
    if not isinstance(message.get("role"), str):
        got = json_type(message.get("role"))
        raise ApiError("invalid_type", f"messages[{position}].role must be a string, got {got}", "messages")
    return message


def _num_chars(message: Mapping[str, Any]) -> int:
    """Characters of a message that certainly are in the prompt."""
    content = message.get("content")
    if isinstance(content, list):
        return sum(
            len(part["text"]) for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return len(content) if isinstance(content, str) else 0


def check_text_length(num_chars: int, defaults: RequestDefaults, param: str) -> None:
    """Refuse a text that cannot fit before it is tokenised, which takes seconds for a megabyte."""
    longest = None if defaults.tokenizer is None else defaults.tokenizer.longest_token
    max_model_len = defaults.limits.max_model_len
    if longest is not None and num_chars > max_model_len * longest:
        message = (
            f"{context_length(defaults.limits)}; the prompt has {num_chars} characters, and no token has more than "
            f"{longest}"
        )
        raise ApiError("context_length_exceeded", message, param)


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    """Alternatives per token; chat asks with `logprobs: true` and `top_logprobs: k`."""
    asked = body.get("logprobs", False)
    top = whole_number(body.get("top_logprobs", 0))
    if not isinstance(asked, bool):
        message = f"logprobs must be true or false for chat, got {json_type(asked)}"
        raise ApiError("invalid_type", message, "logprobs")
    if top is None:
        message = f"top_logprobs must be a whole number, got {json_type(body['top_logprobs'])}"
        raise ApiError("invalid_type", message, "top_logprobs")
    if top and not asked:
        raise ApiError("invalid_parameter", "top_logprobs needs logprobs: true", "top_logprobs")
    return top if asked else None


def _check_shapes(values: Mapping[str, Any]) -> None:
    """Check what SamplingParams takes for granted: that lists are lists and biases are objects."""
    if not isinstance(values.get("stop"), str | list | tuple | None):
        message = f"stop must be a string or a list of strings, got {json_type(values['stop'])}"
        raise ApiError("invalid_type", message, "stop")
    if not isinstance(values.get("stop_token_ids"), list | tuple | None):
        message = f"stop_token_ids must be a list, got {json_type(values['stop_token_ids'])}"
        raise ApiError("invalid_type", message, "stop_token_ids")
    bias = values.get("logit_bias")
    if not isinstance(bias, dict | None):
        raise ApiError("invalid_type", f"logit_bias must be an object, got {json_type(bias)}", "logit_bias")
    for key in bias or {}:
        if not (str(key).isascii() and str(key).isdecimal() and len(str(key)) <= 9):
            raise ApiError("invalid_type", f"logit_bias keys must be token ids, got {shown(key)}", "logit_bias")
