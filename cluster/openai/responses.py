"""Writes the bodies of OpenAI's responses from finished outputs."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from shoal.runtime.chat.output import ParsedToolCall, finish_reason
from shoal.runtime.chat.prompt import OutputFormat, parse_output
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import CompletionOutput, RequestOutput

from .errors import ApiError
from .logprobs import chat_logprobs, completion_logprobs, first_offsets, logprob_entry
from .requests import ParsedRequest


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
    return body | _usage_and_prompt(output, request, tokenizer)


def completion(
    output: RequestOutput, request: ParsedRequest, *, id: str, created: int, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The body of a /v1/completions response. created: seconds since 1970."""
    choices = []
    for sample in sorted(output.outputs, key=lambda c: c.index):
        logprobs = None
        if request.num_logprobs is not None:
            offsets = first_offsets(tokenizer, skip_special_tokens=request.params.skip_special_tokens)
            logprobs = completion_logprobs(sample.token_ids, sample.logprobs or (), tokenizer, offsets)
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
    num_prompt_tokens = len(request.prompt_token_ids)
    num_output_tokens = sum(len(sample.token_ids) for sample in output.outputs)
    body: dict[str, Any] = {}
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [
            position and {str(token): logprob_entry(token, entry, tokenizer) for token, entry in position.items()}
            for position in output.prompt_logprobs
        ]
    body["usage"] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }
    return body
