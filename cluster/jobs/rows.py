"""Parsing of rows: from the values of a row to a checked `BatchRow` with its request and the form of its answer.

Two forms are supported: OpenAI batch lines (`custom_id`, `method`, `url`, `body`) and plain rows (`prompt` or
`messages`, with sampling fields beside them or under `sampling_params`). A field that is neither known nor harmless
makes the line a `BadRow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.runtime.chat.prompt import ChatPrompt
from shoal.runtime.plain_numbers import whole_number
from shoal.runtime.types import Request

from ..openai.errors import ApiError, json_type
from ..openai.fields import SAMPLING_FIELDS, check_fields, shown, without_nulls
from ..openai.requests import (
    ENDPOINTS,
    ParsedRequest,
    RequestDefaults,
    build_request,
    encode_chat,
    encode_prompt,
    parse_chat,
    parse_completion,
)
from .input.bad_row import BadRow, Place
from .input.columns import PLAIN_COLUMNS, Columns
from .input.rows import InputRow
from .row_fields import OPENAI_LINE_FIELDS, PLAIN_FIELDS, PROMPT_FIELDS

MAX_CUSTOM_ID_CHARS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRow:
    """A checked row."""

    index: int
    """Position among the rows, from 0."""
    place: Place
    custom_id: str
    parsed: ParsedRequest
    kept: bytes = b""
    """Columns that the answer repeats, as the text of a JSON object; empty for none."""

    @property
    def request_id(self) -> str:
        """Id of the row's request."""
        return f"row-{self.index}"

    @property
    def request(self) -> Request:
        """The row's request, from its beginning."""
        return self.parsed.to_request(self.request_id, self.index)


def row_custom_id(index: int, row: Mapping[str, Any]) -> str:
    """The row's label: `custom_id`, for plain rows also `id`, and `row-<index>` where a plain row has neither."""
    plain = _is_plain(row)
    value = row.get("custom_id")
    if value is None and plain:
        value = row.get("id")
        if value is None:
            return f"row-{index}"
        value = value if (number := whole_number(value)) is None else str(number)
    if value is None:
        raise BadRow("missing_custom_id", "the line has no custom_id; give each line a string of its own")
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID_CHARS:
        text = f"{len(value)} characters" if isinstance(value, str) else json_type(value)
        raise BadRow(
            "invalid_custom_id", f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters, got {text}"
        )
    return value


def parse_row(
    source: InputRow, row: Mapping[str, Any], kept: bytes, custom_id: str, defaults: RequestDefaults
) -> BatchRow:
    """Check a row's values and tokenise its prompt; BadRow names the error."""
    try:
        parsed = _parse_plain(row, defaults) if _is_plain(row) else _parse_openai(row, defaults)
    except ApiError as error:
        raise BadRow(error.code, error.message, error.param, custom_id=custom_id) from error
    return BatchRow(index=source.index, place=source.place, custom_id=custom_id, parsed=parsed, kept=kept)


def read_row(source: InputRow, defaults: RequestDefaults, columns: Columns = PLAIN_COLUMNS) -> BatchRow:
    """Read and check a row whose custom id is known not to be a repeated one; BadRow names the error."""
    row, kept = source.values(columns)
    return parse_row(source, row, kept, row_custom_id(source.index, row), defaults)


def _is_plain(row: Mapping[str, Any]) -> bool:
    return not row.keys() & {"method", "url", "body"}


def _parse_openai(row: Mapping[str, Any], defaults: RequestDefaults) -> ParsedRequest:
    check_fields(row, OPENAI_LINE_FIELDS)
    if row.get("method", "POST") != "POST":
        raise ApiError("unsupported_method", f"method must be POST, got {shown(row['method'])}", "method")
    url = row.get("url")
    if url not in ENDPOINTS:
        raise ApiError("unsupported_url", f"url must be {' or '.join(ENDPOINTS)}, got {shown(url)}", "url")
    body = row.get("body")
    if not isinstance(body, dict):
        raise ApiError("invalid_type", f"body must be an object, got {json_type(body)}", "body")
    parse = parse_chat if url == "/v1/chat/completions" else parse_completion
    return parse(body, defaults)


def _parse_plain(row: Mapping[str, Any], defaults: RequestDefaults) -> ParsedRequest:
    check_fields(row, PLAIN_FIELDS)
    row = without_nulls(row)
    nested = row.get("sampling_params", {})
    if not isinstance(nested, dict):
        raise ApiError("invalid_type", f"sampling_params must be an object, got {json_type(nested)}", "sampling_params")
    check_fields(nested, SAMPLING_FIELDS, "sampling_params.")
    nested = without_nulls(nested)
    values = {name: row[name] for name in SAMPLING_FIELDS & row.keys()}
    if twice := sorted(values.keys() & nested.keys()):
        raise ApiError("invalid_parameter", f"{twice[0]} is given both in the row and in sampling_params", twice[0])
    if len(given := sorted(PROMPT_FIELDS & row.keys())) > 1:
        raise ApiError("invalid_parameter", f"give one of {' and '.join(given)}, not both", given[0])
    values |= nested
    if "messages" in row:
        return build_request("/v1/chat/completions", encode_chat(row, defaults), values, defaults)
    return build_request("/v1/completions", _prompt(row, defaults), values, defaults)


def _prompt(row: Mapping[str, Any], defaults: RequestDefaults) -> ChatPrompt:
    if "prompt_token_ids" not in row:
        return encode_prompt(row, defaults)
    token_ids = row["prompt_token_ids"]
    if not isinstance(token_ids, list):
        message = f"prompt_token_ids must be a list, got {json_type(token_ids)}"
        raise ApiError("invalid_type", message, "prompt_token_ids")
    return encode_prompt({"prompt": token_ids}, defaults)
