"""Finds repeated custom ids among any number of rows."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO, ENOSPC
from pathlib import Path


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
            self._db.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, file INTEGER, number INTEGER) WITHOUT ROWID")
            self._db.execute("BEGIN")

    def add(self, custom_id: str, file: int, number: int) -> tuple[int, int] | None:
        """Add the id of row `number` of a file; returns file and number of the earlier row with this id, or None.

        OSError when the disk is full.
        """
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        with self._disk_errors():
            added = self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", (digest, file, number)).rowcount
            if added:
                return None
            first: tuple[int, int]
            first = self._db.execute("SELECT file, number FROM ids WHERE digest = ?", (digest,)).fetchone()
            return first

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
