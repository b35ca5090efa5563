"""Notices that an input was rewritten between the check of its rows and their answers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .input import InputLine
from .journal import write_fully

_DIGEST_BYTES = 8
_WRITE_BYTES = 1 << 16


class LineDigests:
    """A file with 8 bytes for every row of an input, in input order: a digest of its line."""

    def __init__(self, path: Path) -> None:
        """OSError when there is no room for the file."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._pending = bytearray()
        self._size = 0

    def add(self, line: InputLine) -> None:
        """Take the next row."""
        self._pending += _digest(line)
        if len(self._pending) >= _WRITE_BYTES:
            self._write()

    def flush(self) -> None:
        """Make the digests of all rows durable."""
        self._write()
        os.fsync(self._fd)

    def check(self, line: InputLine) -> None:
        """ValueError, which names the line, if it is not what it was when it was added."""
        if os.pread(self._fd, _DIGEST_BYTES, line.index * _DIGEST_BYTES) != _digest(line):
            raise ValueError(
                f"line {line.number} of the input is not what it was when the rows were checked: restore the input, or "
                f"start over with --overwrite"
            )

    def close(self) -> None:
        os.close(self._fd)

    def _write(self) -> None:
        write_fully(self._fd, bytes(self._pending), self._size)
        self._size += len(self._pending)
        self._pending.clear()


def _digest(line: InputLine) -> bytes:
    hashed = hashlib.blake2b(line.data, digest_size=_DIGEST_BYTES)
    hashed.update(line.num_bytes.to_bytes(8, "little"))  # too long a line is not held
    return hashed.digest()
