"""Formats of batch files: plain or gzip-compressed JSON lines; a file of another format is rejected by name."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path
from typing import Any, BinaryIO, cast

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 1 << 16

_SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kind)
    for pattern, kind in (
        (rb"PAR1", "a Parquet file"),
        (rb"ARROW1|\xff\xff\xff\xff.{3}\0\x10", "an Arrow file"),
        (rb"Obj\x01", "an Avro file"),
        (rb"ORC[\x00-\x1f]", "an ORC file"),
        (rb"SQLite format 3\0", "an SQLite database"),
        (rb"\x89HDF", "an HDF5 file"),
        (rb"%PDF-", "a PDF document"),
        (rb"\x28\xb5\x2f\xfd", "compressed with Zstandard"),
        (rb"BZh[1-9]1AY&SY", "compressed with bzip2"),
        (rb"\xfd7zXZ\0", "compressed with xz"),
        (rb"\x04\x22\x4d\x18", "compressed with LZ4"),
        (rb"\xff\x06\0\0sNaPpY", "compressed with Snappy"),
        (rb"\x1f\x8b", "compressed twice"),
        (rb"PK\x03\x04", "a zip archive"),
        (rb".{257}ustar", "a tar archive"),
        (rb"\xff\xfe\0\0|\0\0\xfe\xff|\s*[{\[]\0\0\0|\0\0\0[{\[]", "UTF-32 text"),
        (rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]", "UTF-16 text"),
        (rb"version https://git-lfs", "a Git LFS pointer, not the file itself (git lfs pull)"),
        (rb"\s*<(?:!doctype|!--|\?xml|html|head|body|[a-z]+[ >])", "an HTML or XML document"),
        (rb"\s*\[\s*\{", "one JSON array"),
        (rb"\s*\{[ \t]*\r?\n[ \t]*\"", "one JSON document over several lines"),
    )
)
_TABLE_HEADER = re.compile(rb'"?[\w .-]+"?(?:[,;\t]"?[\w .-]*"?)+')
_MIN_TEXT_LINES = 10
"""In a shorter file, lines that are not JSON objects are bad rows, each with its own error."""


class _Bounded(io.RawIOBase):
    """Reader of the first `num_bytes` of a file; None: all."""

    def __init__(self, path: Path, num_bytes: int | None) -> None:
        self._file = path.open("rb", buffering=0)
        self._left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        view = memoryview(buffer)
        count = self._file.readinto(view if self._left is None else view[: self._left])
        if self._left is not None:
            self._left -= count or 0
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_input(path: Path, num_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading the uncompressed content of its first `num_bytes` (None: all).

    ValueError for a file that cannot be read or is not JSON lines.
    """
    try:
        raw = io.BufferedReader(_Bounded(path, num_bytes), _HEAD_BYTES)
    except OSError as error:
        raise ValueError(f"cannot read the input {path}: {error.strerror}") from error
    compressed = path.suffix == ".gz" or raw.peek(2).startswith(_GZIP_MAGIC)
    file = cast(io.BufferedReader, gzip.GzipFile(fileobj=raw)) if compressed else raw
    try:
        kind = _other_kind(file.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        if kind is not None:
            raise ValueError(f"{path} is {kind}; give JSON lines in UTF-8, one object per line (.jsonl or .jsonl.gz)")
    except (EOFError, OSError):
        pass  # damaged gzip data: reported with its position when it is read
    except ValueError:
        file.close()
        raw.close()
        raise
    return cast(BinaryIO, file)


def has_byte_order_mark(path: Path) -> bool:
    """Whether the text begins with a byte order mark; False for a file that cannot be read."""
    try:
        with open_input(path) as file:
            return file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
    except (EOFError, OSError):
        return False


def _other_kind(head: bytes) -> str | None:
    """Format of a file with this beginning, with its article; None for JSON lines and for unknown formats."""
    head = head.removeprefix(BYTE_ORDER_MARK)
    for pattern, kind in _SIGNATURES:
        if pattern.match(head):
            return kind
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    if any(line.startswith((b"{", BYTE_ORDER_MARK)) for line in lines):
        return None
    if len(lines) > 1 and _TABLE_HEADER.fullmatch(lines[0]):
        return "a table (CSV)"
    return "text of another kind: no line begins with {" if len(lines) >= _MIN_TEXT_LINES else None
