"""The spool: checked and tokenised rows of an input, written by the first pass and read by the second.

    magic (8 bytes) | record | record | ... | end mark (8 bytes)
    record: length of the payload (4 bytes) | CRC-32 of index and payload (4 bytes) | row index (8 bytes) | payload

Integers are little endian, the payload is msgpack, a prompt token takes 4 bytes. The file is renamed to its final name
when it is complete and durable, and is deleted when the job is finished.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from shoal.runtime.chat.prompt import OutputFormat
from shoal.runtime.types import SamplingParams

from ..openai.requests import ENDPOINTS, ParsedRequest
from .input.bad_row import Place
from .rows import BatchRow

_MAGIC, _END = b"SHROWS02", b"SHROWEND"
_HEADER = struct.Struct("<II")
_INDEX = struct.Struct("<Q")
_BUFFER_BYTES = 1 << 20


class _Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    place: Place
    custom_id: str
    endpoint: int
    """Position in `ENDPOINTS`."""
    prompt_token_ids: bytes
    """Little-endian uint32 values."""
    params: SamplingParams
    num_logprobs: int | None
    output_format: OutputFormat | None
    kept: bytes


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Payload)


class RowSpoolWriter:
    """Writes a spool file in constant memory. Every method raises OSError when the disk is full or broken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(path.name + ".new")
        self._file = open(self._new, "wb", buffering=_BUFFER_BYTES, opener=_open_private)  # noqa: SIM115
        self._file.write(_MAGIC)

    def add(self, index: int, payload: bytes) -> None:
        """Add a row as `encode_row` has it."""
        packed = _INDEX.pack(index)
        self._file.write(_HEADER.pack(len(payload), zlib.crc32(payload, zlib.crc32(packed))) + packed + payload)

    def finish(self) -> None:
        """Make the rows durable and rename the file to its final name."""
        self._file.write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._new.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def discard(self) -> None:
        """Delete the file, unless `finish` was called."""
        with suppress(OSError):  # closing flushes the buffer, which a full disk may prevent
            self._file.close()
        self._new.unlink(missing_ok=True)


def read_spool(path: Path, skip: Callable[[int], bool]) -> Iterator[BatchRow]:
    """Yield the rows of a spool file in input order, without those for whose index `skip` is true.

    ValueError for a damaged file.
    """
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise _damaged(path, 0)
        while (header := file.read(_HEADER.size + _INDEX.size)) != _END:
            start = file.tell() - len(header)
            if len(header) != _HEADER.size + _INDEX.size:
                raise _damaged(path, start)
            length, crc = _HEADER.unpack_from(header)
            (index,) = _INDEX.unpack_from(header, _HEADER.size)
            payload = file.read(length)
            if len(payload) != length or zlib.crc32(payload, zlib.crc32(header[_HEADER.size :])) != crc:
                raise _damaged(path, start)
            if not skip(index):
                yield decode_row(index, payload)


def _damaged(path: Path, offset: int) -> ValueError:
    return ValueError(f"{path} is damaged at byte {offset}; delete it and run again, then the input is checked again")


def encode_row(row: BatchRow) -> bytes:
    """A row without its index, as the payload of a record."""
    parsed = row.parsed
    payload = _Payload(
        place=row.place,
        custom_id=row.custom_id,
        endpoint=ENDPOINTS.index(parsed.endpoint),
        prompt_token_ids=np.asarray(parsed.prompt_token_ids, dtype="<u4").tobytes(),
        params=parsed.params,
        num_logprobs=parsed.num_logprobs,
        output_format=parsed.output_format,
        kept=row.kept,
    )
    return _ENCODER.encode(payload)


def decode_row(index: int, data: bytes) -> BatchRow:
    """The row of a payload."""
    payload = _DECODER.decode(data)
    parsed = ParsedRequest(
        endpoint=ENDPOINTS[payload.endpoint],
        prompt_token_ids=tuple(np.frombuffer(payload.prompt_token_ids, dtype="<u4").tolist()),
        params=payload.params,
        num_logprobs=payload.num_logprobs,
        output_format=payload.output_format,
    )
    return BatchRow(
        index=index,
        place=payload.place,
        custom_id=payload.custom_id,
        parsed=parsed,
        kept=payload.kept,
    )


def _open_private(path: str, flags: int) -> int:
    """Open a file without write permission for other users, whatever the umask."""
    return os.open(path, flags, 0o644)
