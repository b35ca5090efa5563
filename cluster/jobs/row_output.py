"""Output line of a row in OpenAI's batch format, and the digest of its content.

A line depends only on the row and its answer (no time, no host, no cache statistics), so that the files of two runs are
equal byte for byte up to the order of their lines.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Logprob, RequestOutput

from ..openai.errors import ApiError
from ..openai.responses import chat_completion, completion, failure
from .input.bad_row import Place
from .rows import BatchRow


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRow:
    """A row's output line and digest."""

    index: int
    failed: bool
    data: bytes
    """One line, with its line ending."""
    digest: bytes
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


def answered_row(row: BatchRow, output: RequestOutput, model: str, tokenizer: Tokenizer | None) -> FinishedRow:
    """The output row of a finished request; a failed row if any of its samples failed."""
    if (error := failure(output)) is not None:
        return failed_row(row.index, row.custom_id, error, row.place, kept=row.kept, status_code=500)
    is_chat = row.parsed.endpoint == "/v1/chat/completions"
    write = chat_completion if is_chat else completion
    body = write(
        output,
        row.parsed,
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{row.index}",
        created=0,
        model=model,
        tokenizer=tokenizer,
    )
    return FinishedRow(
        index=row.index,
        failed=False,
        data=_line(row.index, row.custom_id, 200, body, None, row.kept),
        digest=answer_digest(row.index, row.custom_id, output),
        num_prompt_tokens=body["usage"]["prompt_tokens"],
        num_output_tokens=body["usage"]["completion_tokens"],
    )


def failed_row(
    index: int,
    custom_id: str | None,
    error: ApiError,
    place: Place,
    *,
    kept: bytes = b"",
    status_code: int = 400,
) -> FinishedRow:
    """The error row of an input row; `status_code` is 400 for an error of the row, 500 for one of the engine."""
    hashed = hashlib.sha256(b"error")
    _hash_label(hashed, index, custom_id)
    hashed.update(error.code.encode())
    details = {"code": error.code, "message": error.message, **place.facts()}
    data = _line(index, custom_id, status_code, error.body(status_code), details, kept)
    return FinishedRow(index=index, failed=True, data=data, digest=hashed.digest())


def answer_digest(index: int, custom_id: str, output: RequestOutput) -> bytes:
    """SHA-256 over index, custom_id and, for every sample, its tokens, finish reason and exact logprobs.

    Floats are hashed with their 64 bits, the entries of a position in the order (rank, token id).
    """
    hashed = hashlib.sha256(b"answer")
    _hash_label(hashed, index, custom_id)
    hashed.update(struct.pack("<I", len(output.outputs)))
    for sample in sorted(output.outputs, key=lambda c: c.index):
        hashed.update(struct.pack("<II", sample.index, len(sample.token_ids)))
        hashed.update(struct.pack(f"<{len(sample.token_ids)}I", *sample.token_ids))
        hashed.update(f"{sample.finish_reason}".encode())
        hashed.update(b"-" if sample.cumulative_logprob is None else struct.pack("<d", sample.cumulative_logprob))
        for position in sample.logprobs or ():
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


def _line(
    index: int,
    custom_id: str | None,
    status_code: int,
    body: Mapping[str, Any],
    error: object,
    kept: bytes,
) -> bytes:
    value = {
        "id": f"batch_req_{index}",
        "custom_id": custom_id,
        "response": {"status_code": status_code, "request_id": f"req_{index}", "body": body},
        "error": error,
    }
    if kept:
        value["columns"] = json.loads(kept)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
