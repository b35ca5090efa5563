"""Formats of batch files: Parquet, or JSON lines, plain or compressed; a file of another format is rejected by name."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from typing import Any, BinaryIO, cast

import zstandard

from .files import InputFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What reading damaged data of a compressed file raises."""
GIVE = "JSON lines in UTF-8, one object per line (.jsonl, .jsonl.gz, .jsonl.zst), or Parquet"
_PARQUET_MAGIC, _GZIP_MAGIC, _ZSTD_MAGIC = b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_HEAD_BYTES = 1 << 16
_ZSTD_BYTES = 1 << 10
"""Compressed bytes at a time, which may become 32,768 times as many."""

_SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kind)
    for pattern, kind in (
        (rb"PAR1", "a Parquet file within a compressed one"),
        (rb"ARROW1|\xff\xff\xff\xff.{3}\0\x10", "an Arrow file"),
        (rb"Obj\x01", "an Avro file"),
        (rb"ORC[\x00-\x1f]", "an ORC file"),
        (rb"SQLite format 3\0", "an SQLite database"),
        (rb"\x89HDF", "an HDF5 file"),
        (rb"%PDF-", "a PDF document"),
        (rb"BZh[1-9]1AY&SY", "compressed with bzip2"),
        (rb"\xfd7zXZ\0", "compressed with xz"),
        (rb"\x04\x22\x4d\x18", "compressed with LZ4"),
        (rb"\xff\x06\0\0sNaPpY", "compressed with Snappy"),
        (rb"\x1f\x8b|\x28\xb5\x2f\xfd", "compressed twice"),
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


class _ZstdFile(io.RawIOBase):
    """Reader of Zstandard frames, one after the other; EOFError where the last one is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        """The frame that has begun and not ended."""
        self._rest = b""
        """What was read beyond the end of a frame."""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            data = self._rest or self._file.read(_ZSTD_BYTES)
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("the last frame has no end")
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            self._rest = b""
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(file: InputFile) -> BinaryIO:
    """Open a file of JSON lines for reading its uncompressed content.

    ValueError for a file that cannot be read or is not JSON lines. Reading raises one of DAMAGED for compressed data
    that is damaged.
    """
    raw = file.open()
    text = _uncompressed(raw, is_gzip=file.url.endswith(".gz"))
    try:
        kind = _other_kind(text.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        if kind is not None:
            raise ValueError(f"{file.url} is {kind}; give {GIVE}")
    except DAMAGED:
        pass  # reported with its position when it is read
    except ValueError:
        text.close()
        raw.close()
        raise
    return cast(BinaryIO, text)


def is_parquet(file: InputFile) -> bool:
    """Whether a file is a Parquet file, by its first bytes."""
    with file.open() as raw:
        return raw.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC


def has_byte_order_mark(file: InputFile) -> bool:
    """Whether a file is text that begins with a byte order mark; False for one that cannot be read."""
    try:
        if is_parquet(file):
            return False
        with open_text(file) as text:
            return text.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
    except (*DAMAGED, OSError):
        return False


def _uncompressed(raw: BinaryIO, *, is_gzip: bool) -> io.BufferedReader:
    buffered = cast(io.BufferedReader, raw)
    head = buffered.peek(len(_ZSTD_MAGIC))
    if is_gzip or head.startswith(_GZIP_MAGIC):
        return cast(io.BufferedReader, gzip.GzipFile(fileobj=buffered))
    if head.startswith(_ZSTD_MAGIC):
        return io.BufferedReader(_ZstdFile(buffered), _HEAD_BYTES)
    return buffered


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
