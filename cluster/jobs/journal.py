"""The journal: an append-only file of checksummed records, of which a prefix survives a crash.

    file:    magic (8 bytes) | record | record | ...
    record:  payload length (4 bytes, little endian) | CRC-32 of the payload (4 bytes) | payload (msgpack: tag, fields)

`append` returns after fsync, so appended records survive any crash. A record torn by a crash is truncated when the file
is opened again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from shoal.runtime.types import GeneratedTokens

MAGIC = b"SHOALJ03"
"""The last two characters are the version."""
MAX_PAYLOAD_BYTES = 1 << 26
"""Longest payload that is written."""

_HEADER = struct.Struct("<II")


class RowRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """A finished row: the end of its line and the digest of its content."""

    index: int
    failed: bool
    """Whether the line is in the error file, not in the part file."""
    end_offset: int
    """Offset in that file of the end of the line, which is durable before the record is written."""
    digest: bytes
    """SHA-256 of the row's answer."""
    num_prompt_tokens: int
    num_output_tokens: int


class ProgressRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """New tokens of an unfinished row."""

    index: int
    sample_index: int
    start: int
    """Number of tokens of this sample in earlier records."""
    new: GeneratedTokens


class LossRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """An unfinished row that was interrupted by the loss of its worker."""

    index: int
    num_losses: int
    """Number of losses in all runs so far."""


Record = RowRecord | ProgressRecord | LossRecord

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class Journal:
    """A journal file opened for appending. The caller ensures that no other process opens it."""

    def __init__(self, path: Path, replay: Callable[[Record], None]) -> None:
        """Call `replay` for every intact record in order, then truncate the file after the last one.

        ValueError if the file is not a journal or contains records of another version.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        file_size = os.fstat(self._fd).st_size
        try:
            self._repair(file_size, replay)
        except BaseException:
            os.close(self._fd)
            raise

    def _repair(self, file_size: int, replay: Callable[[Record], None]) -> None:
        with self.path.open("rb") as file:
            magic = file.read(len(MAGIC))
            if not MAGIC.startswith(magic):
                raise ValueError(
                    f"{self.path} is not a journal of this version; use another output directory or --overwrite"
                )
            self._size = len(MAGIC)
            if magic == MAGIC:
                while (record := _read_record(file)) is not None:
                    replay(record)
                    self._size = file.tell()
        self.num_dropped_bytes = max(file_size - self._size, 0) if magic == MAGIC else len(magic)
        """Number of truncated bytes of a torn record."""
        if magic != MAGIC:
            write_fully(self._fd, MAGIC, 0)
        os.ftruncate(self._fd, self._size)
        os.fsync(self._fd)

    def append(self, records: Sequence[Record]) -> None:
        """Write records and fsync. After an OSError none of them is in the journal."""
        data = b"".join(_encode(record) for record in records)
        try:
            write_fully(self._fd, data, self._size)
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        os.close(self._fd)


def write_fully(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`, in several calls where the system writes less at once."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _encode(record: Record) -> bytes:
    payload = _ENCODER.encode(record)
    assert len(payload) <= MAX_PAYLOAD_BYTES
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def _read_record(file: BinaryIO) -> Record | None:
    """The next record; None after the last intact one."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    size, checksum = _HEADER.unpack(header)
    if not 0 < size <= MAX_PAYLOAD_BYTES:
        return None
    payload = file.read(size)
    if len(payload) < size or zlib.crc32(payload) != checksum:
        return None
    try:
        return _DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{file.name} holds a record of another kind ({error}); start over with --overwrite"
        ) from error
