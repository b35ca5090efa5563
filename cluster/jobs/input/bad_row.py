"""What is wrong with a row, and where it is."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...openai.errors import ApiError


class BadRow(ApiError):  # noqa: N818  (a finding about the input, not a fault)
    """Reason why a row of an input cannot be answered."""

    def __init__(self, code: str, message: str, param: str | None = None, *, custom_id: str | None = None) -> None:
        super().__init__(code, message, param)
        self.custom_id = custom_id


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a row is in an input."""

    kind: Literal["line", "row"]
    """A line of text or a row of a table."""
    number: int
    """Its position in its file, from 1; blank lines count."""
    byte_offset: int | None = None
    """Offset of a line's first byte, in the uncompressed text."""
    file: str | None = None
    """None where the input is one file."""

    def __str__(self) -> str:
        return f"{self.kind} {self.number}" + ("" if self.file is None else f" of {self.file}")

    def facts(self) -> dict[str, Any]:
        """The fields of an error line."""
        facts: dict[str, Any] = {} if self.file is None else {"file": self.file}
        facts[self.kind] = self.number
        return facts if self.byte_offset is None else facts | {"byte_offset": self.byte_offset}
