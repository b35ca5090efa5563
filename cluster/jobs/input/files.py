"""Files of an input, on this machine or in an object store."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import object_stores

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".parquet")
"""Files of these names are inputs in a directory; a file that is named itself may have any."""
_BUFFER_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """The part of a file that a job reads; what is appended later does not belong to it."""

    url: str
    """A path or a URL."""
    num_bytes: int
    modified: str | None = None
    """When a file in an object store was written last; None for a file of this machine."""

    def open(self) -> BinaryIO:
        """Open for reading; ValueError for a file that cannot be read."""
        try:
            raw = open(self.url, "rb", buffering=0) if self.modified is None else object_stores.open_object(self.url)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"cannot read the input {self.url}: {error.strerror or error}") from error
        return io.BufferedReader(_Bounded(raw, self.num_bytes), _BUFFER_BYTES)

    def open_whole(self) -> Any:
        """Open for pyarrow's readers; ValueError for a file that cannot be read."""
        try:
            return open(self.url, "rb") if self.modified is None else object_stores.open_object(self.url)
        except OSError as error:
            raise ValueError(f"cannot read the input {self.url}: {error.strerror or error}") from error

    def fingerprint(self) -> str:
        """Text that changes with the content: its SHA-256; in an object store, its length and age."""
        if self.modified is None:
            return file_sha256(Path(self.url), self.num_bytes)
        return f"{self.num_bytes} bytes of {self.modified}"


class _Bounded(io.RawIOBase):
    """Reader of the first `num_bytes` of a file."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self._file = file
        self._left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count: int = self._file.readinto(memoryview(buffer)[: self._left])
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def find_files(entries: Sequence[str]) -> list[InputFile]:
    """The files of paths, URLs, directories and patterns, in the given order; those of one entry by their names.

    Directories are searched to any depth, but for files and directories whose names begin with . or _.
    ValueError for an entry without files and for a file that is given twice.
    """
    if not entries:
        raise ValueError("the input is an empty list; give at least one file")
    files: dict[str, InputFile] = {}
    for entry in entries:
        for file in _find_remote(entry) if is_url(entry) else _find_local(entry):
            if files.setdefault(file.url, file) is not file:
                raise ValueError(f"the input {file.url} is given twice")
    return list(files.values())


def is_url(entry: str) -> bool:
    """Whether an entry is a URL, as opposed to a path."""
    return object_stores.SCHEME.match(entry) is not None


def file_sha256(path: Path, num_bytes: int | None = None) -> str:
    """`sha256:<hex>` of the first `num_bytes` (None: all) of a file as stored, without decompression."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if num_bytes is None else num_bytes
        while left > 0 and (piece := file.read(min(left, _CHUNK_BYTES))):
            hashed.update(piece)
            left -= len(piece)
    return f"sha256:{hashed.hexdigest()}"


def _find_local(entry: str) -> list[InputFile]:
    if os.path.isdir(entry):
        paths = _inputs_below(entry)
    elif not os.path.exists(entry) and object_stores.WILDCARD.search(entry):
        paths = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path))
    elif os.path.isfile(entry):
        paths = [entry]
    else:
        raise ValueError(f"the input {entry} is not a file, a directory or a pattern that some file matches")
    if not paths:
        raise _no_file(entry)
    return [InputFile(path, os.stat(path).st_size) for path in paths]


def _inputs_below(directory: str) -> list[str]:
    found: list[str] = []
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith((".", "_"))]
        found += [os.path.join(parent, name) for name in names if _is_input(name)]
    return sorted(found)


def _is_input(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith((".", "_"))


def _find_remote(entry: str) -> list[InputFile]:
    objects = object_stores.find_objects(entry, is_input=_is_input)
    if not objects:
        raise _no_file(entry)
    return [InputFile(one.url, one.num_bytes, one.modified) for one in objects]


def _no_file(entry: str) -> ValueError:
    return ValueError(f"the input {entry} has no file; in a directory they end in {', '.join(SUFFIXES)}")
