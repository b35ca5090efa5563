"""Lines of a batch file; a line that is not one JSON object within the limits is a `BadRow`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ...openai.errors import ApiError
from ...openai.json_object import parse_object
from .bad_row import BadRow
from .files import InputFile
from .formats import BYTE_ORDER_MARK, DAMAGED, open_text

MAX_LINE_BYTES = 8 << 20


class InputLine(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """A line that is not blank, without its line ending."""

    number: int
    """Position among the lines, from 1; blank lines count."""
    byte_offset: int
    """Offset of the line's first byte, in the uncompressed text."""
    num_bytes: int
    data: bytes
    """Empty when the line is longer than the limit: it is skipped without being kept in memory."""


def read_lines(file: InputFile, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[InputLine]:
    """Yield the lines of a JSON lines file, plain or compressed, in order, with one line in memory at a time.

    A byte order mark at the start is skipped. LF and CRLF both end a line, the last line needs no ending, and blank
    lines are skipped. ValueError if the file has another format or cannot be read to its end.
    """
    number = 0
    offset = 0
    try:
        with open_text(file) as text:
            while piece := text.readline(max_line_bytes + 2):
                num_read = len(piece)
                if number == 0 and piece.startswith(BYTE_ORDER_MARK):
                    piece = piece.removeprefix(BYTE_ORDER_MARK)
                    offset = len(BYTE_ORDER_MARK)
                    num_read -= offset
                data = piece.rstrip(b"\r\n") if piece.endswith(b"\n") else piece
                line_bytes = len(data)
                if line_bytes > max_line_bytes:
                    data = b""
                    while not piece.endswith(b"\n") and (piece := text.readline(1 << 20)):
                        num_read += len(piece)
                        line_bytes += len(piece.rstrip(b"\r\n"))
                number += 1
                if line_bytes > max_line_bytes or data.strip():
                    yield InputLine(number, offset, line_bytes, data)
                offset += num_read
    except DAMAGED as error:
        message = f"{file.url}: the compressed data is damaged after line {number} ({error}); compress the file again"
        raise ValueError(message) from error


def parse_line(line: InputLine, *, max_line_bytes: int = MAX_LINE_BYTES) -> dict[str, Any]:
    """Parse the JSON object of a line; BadRow for anything else."""
    if line.num_bytes > max_line_bytes:
        raise BadRow("line_too_long", f"the line has {line.num_bytes} bytes, at most {max_line_bytes} are allowed")
    try:
        return parse_object(line.data, place="line")
    except ApiError as error:
        raise BadRow(error.code, error.message) from error
