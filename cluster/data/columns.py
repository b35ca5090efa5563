"""The columns that a processor adds to a dataset, with their Arrow types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from msgspec.structs import replace

from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Logprob, RequestOutput

from ..openai.errors import ApiError, clipped
from .rows import INPUT_COLUMNS, RowRequest

ERROR_COLUMN = "__inference_error__"
MAX_PROMPT_CHARS = 500
"""Longest part of its prompt that a row keeps which cannot be answered."""

_LOGPROBS = pa.map_(
    pa.int64(), pa.struct([("logprob", pa.float64()), ("rank", pa.int64()), ("decoded_token", pa.string())])
)
_LOGPROB_COLUMNS = ("logprobs", "prompt_logprobs")
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int64())),
        ("num_input_tokens", pa.int64()),
        ("generated_tokens", pa.list_(pa.int64())),
        ("generated_text", pa.string()),
        ("num_generated_tokens", pa.int64()),
        ("logprobs", pa.list_(_LOGPROBS)),
        ("prompt_logprobs", pa.list_(_LOGPROBS)),
        ("metrics", pa.struct([("num_cached_tokens", pa.int64())])),
        ("request_id", pa.int64()),
        ("batch_uuid", pa.string()),
        ("time_taken_llm", pa.float64()),
        ("params", pa.string()),
        (ERROR_COLUMN, pa.string()),
    ]
)
"""The columns with their types."""
_NOTHING = {
    "prompt": "",
    "prompt_token_ids": [],
    "num_input_tokens": 0,
    "generated_tokens": [],
    "generated_text": "",
    "num_generated_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "metrics": None,
    "request_id": -1,
    "time_taken_llm": -1.0,
    "params": "",
}
"""Values of a row that has no answer."""


def read_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The columns of a batch from which requests are made, row by row."""
    rows: list[dict[str, Any]] = table.select([c for c in INPUT_COLUMNS if c in table.column_names]).to_pylist()
    return rows or [{} for _ in range(table.num_rows)]


def answered(
    request: RowRequest, output: RequestOutput, tokenizer: Tokenizer | None, *, request_id: int, seconds: float
) -> dict[str, Any]:
    """The columns of an answer, without its batch."""
    (sample,) = output.outputs
    shown = request.parsed.num_logprobs
    return {
        "prompt": request.prompt,
        "prompt_token_ids": request.parsed.prompt_token_ids,
        "num_input_tokens": len(request.parsed.prompt_token_ids),
        "generated_tokens": sample.token_ids,
        "generated_text": sample.text if request.wants_text else "",
        "num_generated_tokens": len(sample.token_ids),
        "logprobs": _positions(sample.logprobs, tokenizer) if shown is not None else None,
        "prompt_logprobs": _positions(output.prompt_logprobs, tokenizer),
        "metrics": {"num_cached_tokens": output.num_cached_tokens},
        "request_id": request_id,
        "time_taken_llm": seconds,
        "params": str(replace(request.parsed.params, logprobs=shown)),
        ERROR_COLUMN: "",
    }


def failed(error: ApiError, prompt: object) -> dict[str, Any]:
    """The columns of a row that cannot be answered, without its batch."""
    text = clipped(prompt, MAX_PROMPT_CHARS) if isinstance(prompt, str) else ""
    return {**_NOTHING, "prompt": text, ERROR_COLUMN: f"{error.code}: {error.message}"}


def add_columns(table: pa.Table, rows: Sequence[Mapping[str, Any]], *, batch_uuid: str) -> pa.Table:
    """The batch with the columns of its rows, which take the place of columns of the same name."""
    table = table.drop_columns([name for name in SCHEMA.names if name in table.column_names])
    for field in SCHEMA:
        values = [batch_uuid if field.name == "batch_uuid" else row[field.name] for row in rows]
        table = table.append_column(field, pa.array(values, type=field.type))
    return table


def restore_types(table: pa.Table) -> pa.Table:
    """The block with its types back where it has no value from which Ray could tell them: all its rows failed."""
    for position, field in enumerate(table.schema):
        is_unknown = pa.types.is_null(field.type) or field.type == pa.list_(pa.null())
        if is_unknown and field.name in SCHEMA.names and field.name not in _LOGPROB_COLUMNS:
            wanted = SCHEMA.field(field.name)
            table = table.set_column(position, wanted, table.column(position).cast(wanted.type))
    return table


def with_logprobs_by_token(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the log-probabilities of a position as a mapping by token id, for which Arrow has pairs."""
    return row | {name: _mappings(row[name]) for name in _LOGPROB_COLUMNS}


def _positions(
    positions: Sequence[Mapping[int, Logprob] | None] | None, tokenizer: Tokenizer | None
) -> list[list[tuple[int, dict[str, Any]]] | None] | None:
    """Per position, token ids with their log-probability, rank and text."""
    if positions is None:
        return None
    return [None if position is None else _pairs(position, tokenizer) for position in positions]


def _pairs(position: Mapping[int, Logprob], tokenizer: Tokenizer | None) -> list[tuple[int, dict[str, Any]]]:
    return [(token, _entry(token, entry, tokenizer)) for token, entry in position.items()]


def _entry(token: int, entry: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = None if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": text}


def _mappings(positions: Sequence[Any] | None) -> list[dict[int, dict[str, Any]] | None] | None:
    return None if positions is None else [None if position is None else dict(position) for position in positions]
