"""Checks of a request against a model's limits, shared by everything that accepts requests."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Request, RowError

MAX_LOGPROB_CELLS = 4_000_000
"""Upper bound of n x max_tokens x (logprobs + 1) plus the same for the prompt. A log-probability takes about 230 bytes
of memory, so that no request needs more than a gigabyte. A context of 128k tokens with 20 alternatives each passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Largest request that a model and the KV cache of an engine can take."""

    vocab_size: int
    max_model_len: int


def check_request(request: Request, limits: RequestLimits) -> RowError | None:
    """Why a request cannot be answered; None if it can."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        return RowError(code="empty_prompt", message="the prompt is empty; give it at least one token")
    if (bad := next((t for t in prompt if not 0 <= t < limits.vocab_size), None)) is not None:
        return _out_of_vocabulary("prompt token id", bad, limits)
    if len(prompt) >= limits.max_model_len:
        return RowError(
            code="context_length_exceeded",
            message=f"{context_length(limits)}; the prompt has {len(prompt)}, and at least one token of output must "
            "fit, too",
        )
    for name, ids in (("stop token id", params.stop_token_ids or ()), ("logit_bias token id", params.logit_bias or ())):
        if (bad := next((t for t in ids if not 0 <= t < limits.vocab_size), None)) is not None:
            return _out_of_vocabulary(name, bad, limits)
    width = max(params.logprobs or 0, params.prompt_logprobs or 0)
    if width > limits.vocab_size:
        return RowError(
            code="invalid_parameter",
            message=f"{width} logprobs were asked for, but the vocabulary has {limits.vocab_size} tokens",
        )
    length = max_output_tokens(request, limits.max_model_len)
    cells = params.n * length * ((params.logprobs or 0) + 1) + len(prompt) * ((params.prompt_logprobs or 0) + 1)
    if cells > MAX_LOGPROB_CELLS:
        return RowError(
            code="request_too_large",
            message=f"n x max_tokens x (logprobs + 1) plus the prompt's logprobs is {cells}, at most "
            f"{MAX_LOGPROB_CELLS} are allowed; lower n, max_tokens or logprobs",
        )
    return None


def max_output_tokens(request: Request, max_model_len: int) -> int:
    """Longest output of a request: `max_tokens`, cut to the room that the prompt leaves in `max_model_len`."""
    room = max_model_len - len(request.prompt_token_ids)
    return room if request.params.max_tokens is None else min(request.params.max_tokens, room)


def context_length(limits: RequestLimits) -> str:
    """The words by which clients know that a request does not fit."""
    return f"This model's maximum context length is {limits.max_model_len} tokens"


def _out_of_vocabulary(name: str, token_id: int, limits: RequestLimits) -> RowError:
    return RowError(
        code="token_out_of_vocabulary",
        message=f"{name} {token_id} is outside the vocabulary [0, {limits.vocab_size})",
    )
