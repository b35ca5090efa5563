"""Writes the bodies of OpenAI's responses from finished outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from shoal.runtime.chat.output import ParsedToolCall, finish_reason
from shoal.runtime.chat.prompt import OutputFormat, parse_output
from shoal.runtime.tokenization.detokenizer import token_offsets
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import CompletionOutput, Logprob, RequestOutput

from .errors import ApiError
from .requests import ParsedRequest

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def failure(output: RequestOutput) -> ApiError | None:
    """Why a finished output cannot be shown as an answer: one of its samples failed."""
    for sample in output.outputs:
        if sample.finish_reason == "error":
            return ApiError("generation_failed", sample.error or "the engine gave no reason")
        if sample.finish_reason == "abort":
            return ApiError("aborted", sample.error or "the request was aborted")
        if any(math.isnan(p.logprob) for position in sample.logprobs or () for p in position.values()):
            return ApiError("non_finite_logprob", "the model gave NaN for a log-probability")
    return None


def chat_completion(
    output: RequestOutput, request: ParsedRequest, *, id: str, created: int, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The body of a /v1/chat/completions response. created: seconds since 1970."""
    choices = []
    for sample in sorted(output.outputs, key=lambda c: c.index):
        logprobs = None
        if request.num_logprobs is not None:
            logprobs = _chat_logprobs(sample, request.num_logprobs, tokenizer)
        choice = _choice(sample, {"message": {"role": "assistant", "content": sample.text}, "logprobs": logprobs})
        if request.output_format is not None:
            assert tokenizer is not None, "a chat prompt was encoded without a tokenizer"
            choice |= parsed_answer(
                sample,
                request.output_format,
                id=f"{id}/{sample.index}",
                tokenizer=tokenizer,
                skip_special_tokens=request.params.skip_special_tokens,
            )
        choices.append(choice)
    body = {"id": id, "object": "chat.completion", "created": created, "model": model, "choices": choices}
    return body | _usage_and_prompt(output, request, tokenizer)


def completion(
    output: RequestOutput, request: ParsedRequest, *, id: str, created: int, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The body of a /v1/completions response. created: seconds since 1970."""
    choices = []
    for sample in sorted(output.outputs, key=lambda c: c.index):
        logprobs = None
        if request.num_logprobs is not None:
            logprobs = _completion_logprobs(sample, tokenizer, request.params.skip_special_tokens)
        choices.append(_choice(sample, {"text": sample.text, "logprobs": logprobs}))
    body = {"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices}
    return body | _usage_and_prompt(output, request, tokenizer)


def parsed_answer(
    sample: CompletionOutput, output_format: OutputFormat, *, id: str, tokenizer: Tokenizer, skip_special_tokens: bool
) -> dict[str, Any]:
    """`message` and `finish_reason` of an answer to a chat prompt. id: names the answer; ids of its calls follow."""
    output = parse_output(
        sample.text,
        sample.token_ids,
        output_format,
        tokenizer=tokenizer,
        skip_special_tokens=skip_special_tokens,
    )
    message: dict[str, Any] = {"role": "assistant"}
    if output_format.start == "reasoning" or output.reasoning is not None:
        message["reasoning_content"] = output.reasoning or ""
    message["content"] = output.content
    if output.tool_calls:
        message["tool_calls"] = [_tool_call(call, f"{id}/{i}") for i, call in enumerate(output.tool_calls)]
    answer: dict[str, Any] = {"message": message}
    if sample.finish_reason is not None:
        answer["finish_reason"] = finish_reason(output, sample.finish_reason)
    if output.is_malformed:
        answer["is_malformed"] = True
    return answer


def _tool_call(call: ParsedToolCall, name: str) -> dict[str, Any]:
    """A call; one that the model gave no id gets one that depends on `name` alone."""
    call_id = call.id or f"call_{hashlib.sha256(name.encode()).hexdigest()[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _choice(sample: CompletionOutput, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": sample.index,
        **answer,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "token_ids": sample.token_ids,
    }


def _usage_and_prompt(output: RequestOutput, request: ParsedRequest, tokenizer: Tokenizer | None) -> dict[str, Any]:
    num_prompt_tokens = len(request.prompt_token_ids)
    num_output_tokens = sum(len(sample.token_ids) for sample in output.outputs)
    body: dict[str, Any] = {}
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [
            position and {str(token): _entry(token, entry, tokenizer) for token, entry in position.items()}
            for position in output.prompt_logprobs
        ]
    body["usage"] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }
    return body


def _chat_logprobs(sample: CompletionOutput, num_top: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    content = []
    for token, position in zip(sample.token_ids, sample.logprobs or (), strict=True):
        top = sorted(position.items(), key=lambda item: (item[1].rank, item[0]))[:num_top]
        alternatives = [_entry(*item, tokenizer) for item in top]
        content.append(_entry(token, position[token], tokenizer) | {"top_logprobs": alternatives})
    return {"content": content}


def _completion_logprobs(
    sample: CompletionOutput, tokenizer: Tokenizer | None, skip_special_tokens: bool
) -> dict[str, Any]:
    """OpenAI's older form: one list entry per token; offsets are in characters of the sample's text."""
    positions = sample.logprobs or []
    chosen = [position[token] for token, position in zip(sample.token_ids, positions, strict=True)]
    return {
        "tokens": [_text(token, tokenizer) for token in sample.token_ids],
        "token_logprobs": [_finite(entry.logprob) for entry in chosen],
        "top_logprobs": [_by_text(position, tokenizer) for position in positions],
        "text_offset": _offsets(sample.token_ids, tokenizer, skip_special_tokens),
    }


def _offsets(token_ids: Sequence[int], tokenizer: Tokenizer | None, skip_special_tokens: bool) -> list[int]:
    if tokenizer is None:  # the text is empty
        return [0] * len(token_ids)
    return token_offsets(tokenizer, token_ids, skip_special_tokens)


def _by_text(position: dict[int, Logprob], tokenizer: Tokenizer | None) -> dict[str, float]:
    """Log-probabilities by the tokens' texts; of tokens with the same text, the later ones go by their ids."""
    by_text: dict[str, float] = {}
    for token, entry in position.items():
        text = _text(token, tokenizer)
        by_text[f"token_id:{token}" if text in by_text else text] = _finite(entry.logprob)
    return by_text


def _entry(token: int, entry: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    data = _bytes(token, tokenizer)
    return {
        "token": _text(token, tokenizer),
        "token_id": token,
        "logprob": _finite(entry.logprob),
        "bytes": None if data is None else list(data),
    }


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    r"""A token's text; `bytes:\xf0\x9f` where its bytes are no text by themselves, `token_id:5` where it has none."""
    data = _bytes(token, tokenizer)
    if data is None:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bytes(token: int, tokenizer: Tokenizer | None) -> bytes | None:
    return None if tokenizer is None else tokenizer.token_bytes(token, skip_special_tokens=False)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
