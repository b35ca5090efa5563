"""Writes the bodies of OpenAI's responses from finished outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from shoal.runtime.chat.output import ParsedToolCall, finish_reason
from shoal.runtime.chat.prompt import OutputFormat, parse_output
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import CompletionOutput, RequestOutput

from .errors import ApiError
from .logprobs import Position, chat_logprobs, completion_logprobs, first_offsets, logprob_entry
from .requests import ParsedRequest
from .usage import usage_of


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
            logprobs = chat_logprobs(sample.token_ids, sample.logprobs or (), request.num_logprobs, tokenizer)
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
    if request.return_token_ids:
        body["prompt_token_ids"] = list(request.prompt_token_ids)
    return body | _usage_and_prompt(output, request, tokenizer)


def completion(
    output: RequestOutput, request: ParsedRequest, *, id: str, created: int, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The body of a /v1/completions response. created: seconds since 1970."""
    choices = []
    for sample in sorted(output.outputs, key=lambda c: c.index):
        choice = _choice(sample, {"text": sample.text})
        if request.scores_prompt:
            choice |= {"text": "", "finish_reason": "length", "stop_reason": None, "token_ids": []}
        if request.echo:
            choice["text"] = prompt_text(request, tokenizer) + choice["text"]
        choice["logprobs"] = _completion_logprobs(choice["token_ids"], sample, output, request, tokenizer)
        if request.return_token_ids:
            choice["prompt_token_ids"] = list(request.prompt_token_ids)
        choices.append(choice)
    body = {"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices}
    return body | _usage_and_prompt(output, request, tokenizer)


def prompt_text(request: ParsedRequest, tokenizer: Tokenizer | None) -> str:
    """The text of a prompt, as `echo` shows it."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(request.prompt_token_ids, skip_special_tokens=request.params.skip_special_tokens)


def _completion_logprobs(
    token_ids: Sequence[int],
    sample: CompletionOutput,
    output: RequestOutput,
    request: ParsedRequest,
    tokenizer: Tokenizer | None,
) -> dict[str, Any] | None:
    if request.num_logprobs is None:
        return None
    positions: Sequence[Position | None] = (sample.logprobs or [])[: len(token_ids)]
    if request.echo:
        assert output.prompt_logprobs is not None
        token_ids = [*request.prompt_token_ids, *token_ids]
        positions = [*output.prompt_logprobs, *positions]
    offsets = first_offsets(tokenizer, skip_special_tokens=request.params.skip_special_tokens)
    return completion_logprobs(token_ids, positions, tokenizer, offsets)


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
        message["tool_calls"] = [_tool_call(call, call_id(id, i)) for i, call in enumerate(output.tool_calls)]
    answer: dict[str, Any] = {"message": message}
    if sample.finish_reason is not None:
        answer["finish_reason"] = finish_reason(sample.finish_reason, has_calls=bool(output.tool_calls))
    if output.is_malformed:
        answer["is_malformed"] = True
    return answer


def call_id(answer_id: str, index: int) -> str:
    """The id of a call that the model gave none; it depends on the answer's id alone."""
    return f"call_{hashlib.sha256(f'{answer_id}/{index}'.encode()).hexdigest()[:24]}"


def _tool_call(call: ParsedToolCall, own_id: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or own_id, "type": "function", "function": function}


def _choice(sample: CompletionOutput, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": sample.index,
        **answer,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "token_ids": sample.token_ids,
    }


def _usage_and_prompt(output: RequestOutput, request: ParsedRequest, tokenizer: Tokenizer | None) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if output.prompt_logprobs is not None and not request.echo:
        body["prompt_logprobs"] = [
            position and {str(token): logprob_entry(token, entry, tokenizer) for token, entry in position.items()}
            for position in output.prompt_logprobs
        ]
    body["usage"] = usage_of(output, request).body()
    return body
