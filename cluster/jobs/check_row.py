"""The check of one row, in this process or another: everything but whether its custom id was there before."""

from __future__ import annotations

import msgspec

from ..openai.requests import RequestDefaults
from .input.bad_row import BadRow
from .input.columns import Columns
from .input.rows import InputRow
from .rows import parse_row, row_custom_id
from .spool import encode_row


class CheckedRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a check has found."""

    custom_id: str | None
    """None for a row whose label could not be read."""
    payload: bytes = b""
    """The row as the spool has it; empty for a bad one."""
    num_prompt_tokens: int = 0
    spelled_token: str | None = None
    """An added token that the text of the prompt spells."""
    error: tuple[str, str, str | None] | None = None
    """Why it is a bad row: code, message, field."""


def check_row(source: InputRow, columns: Columns, defaults: RequestDefaults) -> CheckedRow:
    """Read a row and tokenise its prompt."""
    custom_id = None
    try:
        row, kept = source.values(columns)
        custom_id = row_custom_id(source.index, row)
        good = parse_row(source, row, kept, custom_id, defaults)
    except BadRow as error:
        return CheckedRow(custom_id, error=(error.code, error.message, error.param))
    return CheckedRow(
        custom_id,
        payload=encode_row(good),
        num_prompt_tokens=len(good.parsed.prompt_token_ids),
        spelled_token=good.parsed.spelled_token,
    )
