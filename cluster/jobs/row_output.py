"""How one row is answered in a file: its OpenAI output line, and the digest of its content.

A line depends on the row and its answer only (no time, no host, no cache statistics), so that the files of two runs can
be compared byte for byte, up to the order of the lines.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.runtime.tokenization.chat import split_thinking
from shoal.runtime.types import CompletionOutput, Logprob, RequestOutput

from .rows import BatchRow

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRow:
    """A row's line and digest, ready to be written."""

    index: int
    failed: bool
    data: bytes
    """One line, with its line ending."""
    digest: bytes
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


def answered_row(row: BatchRow, output: RequestOutput, model: str) -> FinishedRow:
    """The row of a finished request; a failed row where any of its continuations failed."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            return _failed(row, "generation_failed", completion.error or "the engine gave no reason")
        if completion.finish_reason == "abort":
            return _failed(row, "aborted", completion.error or "the request was aborted")
        if any(math.isnan(p.logprob) for position in completion.logprobs or () for p in position.values()):
            return _failed(row, "non_finite_logprob", "the model gave NaN for a log-probability")
    num_prompt_tokens = len(row.request.prompt_token_ids)
    num_output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    body = _body(row, output, model)
    body["usage"] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }
    return FinishedRow(
        index=row.line.index,
        failed=False,
        data=_line(row.line.index, row.custom_id, 200, body, None),
        digest=answer_digest(row.line.index, row.custom_id, output),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
    )


def failed_row(
    index: int, custom_id: str | None, code: str, message: str, *, line: int, byte_offset: int, status_code: int = 400
) -> FinishedRow:
    """The error row of an input line. `status_code` is 400 for the row's own fault and 500 for the engine's."""
    error = {"code": code, "message": message, "line": line, "byte_offset": byte_offset}
    body = {
        "error": {"code": code, "message": message, "type": "invalid_request_error" if status_code == 400 else "error"}
    }
    hashed = hashlib.sha256(b"error")
    _hash_label(hashed, index, custom_id)
    hashed.update(code.encode())
    data = _line(index, custom_id, status_code, body, error)
    return FinishedRow(index=index, failed=True, data=data, digest=hashed.digest())


def answer_digest(index: int, custom_id: str, output: RequestOutput) -> bytes:
    """SHA-256 over index, custom_id and, for every continuation, its tokens, finish reason and exact logprobs.

    Floats count with their 64 bits. Entries of one position are taken in the order (rank, token id).
    """
    hashed = hashlib.sha256(b"answer")
    _hash_label(hashed, index, custom_id)
    hashed.update(struct.pack("<I", len(output.outputs)))
    for completion in sorted(output.outputs, key=lambda c: c.index):
        hashed.update(struct.pack("<II", completion.index, len(completion.token_ids)))
        hashed.update(struct.pack(f"<{len(completion.token_ids)}I", *completion.token_ids))
        hashed.update(f"{completion.finish_reason}".encode())
        hashed.update(
            b"-" if completion.cumulative_logprob is None else struct.pack("<d", completion.cumulative_logprob)
        )
        for position in completion.logprobs or ():
            _hash_position(hashed, position)
    for prompt_position in output.prompt_logprobs or ():
        _hash_position(hashed, prompt_position or {})
    return hashed.digest()


def _hash_label(hashed: hashlib._Hash, index: int, custom_id: str | None) -> None:
    label = (custom_id or "").encode()
    hashed.update(struct.pack("<QI", index, len(label)) + label)


def _hash_position(hashed: hashlib._Hash, position: Mapping[int, Logprob]) -> None:
    hashed.update(struct.pack("<I", len(position)))
    for token, entry in sorted(position.items(), key=lambda item: (item[1].rank, item[0])):
        hashed.update(struct.pack("<IId", token, entry.rank, entry.logprob))


def _failed(row: BatchRow, code: str, message: str) -> FinishedRow:
    line = row.line
    return failed_row(
        line.index, row.custom_id, code, message, line=line.number, byte_offset=line.byte_offset, status_code=500
    )


def _line(index: int, custom_id: str | None, status_code: int, body: Mapping[str, Any], error: object) -> bytes:
    value = {
        "id": f"batch_req_{index}",
        "custom_id": custom_id,
        "response": {"status_code": status_code, "request_id": f"req_{index}", "body": body},
        "error": error,
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _body(row: BatchRow, output: RequestOutput, model: str) -> dict[str, Any]:
    chat = row.endpoint == "/v1/chat/completions"
    choices = []
    for completion in sorted(output.outputs, key=lambda c: c.index):
        answer = {"message": _message(completion.text, row.thinking)} if chat else {"text": completion.text}
        logprobs = None
        if row.num_logprobs is not None:
            logprobs = _chat_logprobs(completion, row.num_logprobs) if chat else _completion_logprobs(completion)
        choices.append(
            {
                "index": completion.index,
                **answer,
                "logprobs": logprobs,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "token_ids": completion.token_ids,
            }
        )
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{row.line.index}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": choices,
    }
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [
            position and {str(token): _entry(token, entry) for token, entry in position.items()}
            for position in output.prompt_logprobs
        ]
    return body


def _message(text: str, thinking: bool) -> dict[str, Any]:
    if not thinking:
        return {"role": "assistant", "content": text}
    reasoning, content = split_thinking(text)
    return {"role": "assistant", "reasoning_content": reasoning, "content": content}


def _chat_logprobs(completion: CompletionOutput, num_top: int) -> dict[str, Any]:
    content = []
    for token, position in zip(completion.token_ids, completion.logprobs or (), strict=True):
        top = sorted(position.items(), key=lambda item: (item[1].rank, item[0]))[:num_top]
        content.append(_entry(token, position[token]) | {"top_logprobs": [_entry(*item) for item in top]})
    return {"content": content}


def _completion_logprobs(completion: CompletionOutput) -> dict[str, Any]:
    entries = [position[token] for token, position in zip(completion.token_ids, completion.logprobs or (), strict=True)]
    texts = [_text(token, entry) for token, entry in zip(completion.token_ids, entries, strict=True)]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            {_text(token, entry): _finite(entry.logprob) for token, entry in position.items()}
            for position in completion.logprobs or ()
        ],
        "text_offset": offsets[: len(texts)],
    }


def _entry(token: int, entry: Logprob) -> dict[str, Any]:
    text = _text(token, entry)
    # A token that holds part of a character was decoded to U+FFFD, which is not what it stands for.
    known = entry.decoded_token is not None and "\ufffd" not in entry.decoded_token
    encoded = list(text.encode()) if known else None
    return {"token": text, "token_id": token, "logprob": _finite(entry.logprob), "bytes": encoded}


def _text(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
