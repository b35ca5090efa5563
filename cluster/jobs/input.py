"""Lines of a batch file; a line that is not one JSON object within the limits is a `BadRow`."""

from __future__ import annotations

import gzip
import hashlib
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any, cast

from ..openai.errors import ApiError
from ..openai.json_object import parse_object
from .input_format import BYTE_ORDER_MARK, open_input

MAX_LINE_BYTES = 8 << 20


class BadRow(ApiError):  # noqa: N818  (a finding about the input, not a fault)
    """Reason why a row of a file cannot be answered."""

    def __init__(self, code: str, message: str, param: str | None = None, *, custom_id: str | None = None) -> None:
        super().__init__(code, message, param)
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line that is not blank, without its line ending."""

    index: int
    """Position among the rows, from 0; blank lines do not count."""
    number: int
    """Position among the lines, from 1; blank lines count."""
    byte_offset: int
    """Offset of the line's first byte, in the uncompressed text."""
    num_bytes: int
    data: bytes
    """Empty when the line is longer than the limit: it is skipped without being kept in memory."""


def read_lines(
    path: Path, *, max_line_bytes: int = MAX_LINE_BYTES, num_bytes: int | None = None
) -> Iterator[InputLine]:
    """Yield the rows of a JSON lines file, plain or compressed with gzip, in order, with one line in memory at a time.

    Only the first `num_bytes` of the file are read (None: all).

    A byte order mark at the start is skipped. LF and CRLF both end a line, the last line needs no ending, and blank
    lines are skipped. ValueError if the file has another format or cannot be read to its end.
    """
    index = 0
    number = 0
    offset = 0
    try:
        with open_input(path, num_bytes) as file:
            while piece := file.readline(max_line_bytes + 2):
                num_read = len(piece)
                if number == 0 and piece.startswith(BYTE_ORDER_MARK):
                    piece = piece.removeprefix(BYTE_ORDER_MARK)
                    offset = len(BYTE_ORDER_MARK)
                    num_read -= offset
                data = piece.rstrip(b"\r\n") if piece.endswith(b"\n") else piece
                line_bytes = len(data)
                if line_bytes > max_line_bytes:
                    data = b""
                    while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
                        num_read += len(piece)
                        line_bytes += len(piece.rstrip(b"\r\n"))
                number += 1
                if line_bytes > max_line_bytes or data.strip():
                    yield InputLine(index, number, offset, line_bytes, data)
                    index += 1
                offset += num_read
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"{path}: the gzip data is damaged after line {number} ({error}); compress the file again"
        raise ValueError(message) from error


def parse_line(line: InputLine, *, max_line_bytes: int = MAX_LINE_BYTES) -> dict[str, Any]:
    """Parse the JSON object of a line; BadRow for anything else."""
    if line.num_bytes > max_line_bytes:
        raise BadRow("line_too_long", f"the line has {line.num_bytes} bytes, at most {max_line_bytes} are allowed")
    try:
        return parse_object(line.data, place="line")
    except ApiError as error:
        raise BadRow(error.code, error.message) from error


def file_sha256(path: Path, num_bytes: int | None = None) -> str:
    """`sha256:<hex>` of the first `num_bytes` (None: all) of a file as stored, without decompression."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if num_bytes is None else num_bytes
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            hashed.update(piece)
            left -= len(piece)
    return f"sha256:{hashed.hexdigest()}"


class CustomIdIndex:
    """Index of custom ids that finds repeated ones: 16-byte digests in a file, so that memory use is constant.

    `close` deletes the file.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; OSError when the disk is full."""
        path.unlink(missing_ok=True)
        self._path = path
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644))  # fails with the system's own error
        self._db = sqlite3.connect(path, isolation_level=None)
        with self._disk_errors():
            for setting in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-2048", "temp_store=FILE"):
                self._db.execute(f"PRAGMA {setting}")
            self._db.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")
            self._db.execute("BEGIN")

    def add(self, custom_id: str, line: int) -> int | None:
        """Add the id of `line`; returns the earlier line with this id, or None. OSError when the disk is full."""
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        with self._disk_errors():
            added = self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, line)).rowcount
            if added:
                return None
            return cast(int, self._db.execute("SELECT line FROM ids WHERE digest = ?", (digest,)).fetchone()[0])

    def close(self) -> None:
        try:
            with self._disk_errors():
                self._db.close()
        finally:
            self._path.unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            number = ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else EIO
            raise OSError(number, os.strerror(number), str(self._path)) from error
