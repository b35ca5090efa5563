"""Digests of whole files, computed once per node and kept.

A digest covers every byte: XXH3 (128 bits) of each piece of 64 MiB, and SHA-256 over those. It tells files apart that
differ by accident or by editing; it is no defence against a file that was made to collide.

Cost. Reading from the page cache and hashing takes 0.19 s per GiB and core, which is 4 % of the time that loading an
FP8 checkpoint on that core takes, and 6 % for bfloat16 (AMD EPYC with AVX2: loading takes 4.4 and 3.0 s per GiB). It
is spent once: a digest is kept with the version of its file (size, mtime, ctime), and as long as that stays, asking
again takes milliseconds (0.1 % of loading). Processes of a node that ask at the same time, such as the ranks of a
replica, share the files among them through locks.

A file whose bytes change without a write, on a failing disk for instance, keeps its version and so its digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO

import torch
import xxhash

from .safetensors_file import FileVersion, SafetensorsFile

MIN_KEPT_BYTES = 64 << 20
"""Digests of smaller files are computed each time, in milliseconds."""
PATIENCE_S = 600.0
"""Longest wait for other processes that finish no file meanwhile; their files are hashed here after it."""

_PIECE_BYTES = 64 << 20
_BUFFER_BYTES = 512 << 10
"""Fits a core's L2 cache, so that hashing reads no memory again."""
_POLL_S = 0.02
_SETTLED_NS = 2_000_000_000
"""A file written more recently may be written again within its clock's granularity: its digest is not kept."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DigestCache:
    """Digests that are kept in `folder`: one entry per version of a file, locked while a process hashes the file.

    An entry has about 300 bytes and stays when its file goes; any entry may be removed at any time.
    """

    folder: Path
    min_kept_bytes: int = MIN_KEPT_BYTES
    clock_ns: Callable[[], int] = time.time_ns
    is_usable: bool = True

    def digest(self, file: SafetensorsFile, executor: Executor) -> str | None:
        """The digest (hex) of a file, kept or computed; None while another process computes it.

        Where nothing can be kept, a warning is logged and this process hashes every file itself.
        """
        if not self.is_usable or file.version.size < self.min_kept_bytes:
            return _hash_file(file, executor)
        with _open_unchanged(file):
            pass  # a digest is kept of the version whose header was read, which must be the present one
        try:
            return self._shared_digest(file, executor)
        except OSError as error:
            _logger.warning(
                "digests of the weights cannot be kept in %s (%s): every process reads all files once more when it "
                "starts; set SHOAL_CACHE_DIR to a directory that can be written",
                self.folder,
                error,
            )
            self.is_usable = False
            return _hash_file(file, executor)

    def _shared_digest(self, file: SafetensorsFile, executor: Executor) -> str | None:
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        with (self.folder / _entry_name(file)).open("a+b") as entry:
            if digest := _read_entry(entry):
                return digest
            try:
                fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if digest := _read_entry(entry):
                return digest
            is_settled = self.clock_ns() - file.version.ctime_ns > _SETTLED_NS
            digest = _hash_file(file, executor)
            if is_settled:
                _write_entry(entry, file, digest)
            return digest


def file_digests(
    files: Iterable[SafetensorsFile], cache: DigestCache, *, patience_s: float = PATIENCE_S
) -> dict[Path, str]:
    """The digest (hex) of each file, kept or computed with as many threads as torch uses.

    ValueError when a file changed after its header was read, or cannot be read.
    """
    digests: dict[Path, str] = {}
    pending = list(files)
    progressed_at = time.monotonic()
    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        while pending:
            for file in pending:
                if digest := cache.digest(file, executor):
                    digests[file.path] = digest
            busy = [file for file in pending if file.path not in digests]
            if len(busy) < len(pending):
                progressed_at = time.monotonic()
            elif time.monotonic() - progressed_at < patience_s:
                time.sleep(_POLL_S)
            else:
                digests |= {file.path: _hash_file(file, executor) for file in busy}
                busy = []
            pending = busy
    return digests


def _entry_name(file: SafetensorsFile) -> str:
    """Name of the entry of one version of a file, the same for every link to the file.

    Nodes that share the folder but have copies of their own of the file do not get into each other's way.
    """
    key = hashlib.sha256(bytes(file.path.resolve()))
    key.update(repr(tuple(file.version)).encode())
    return f"digest-{key.hexdigest()[:32]}.json"


def _read_entry(entry: IO[bytes]) -> str | None:
    """The digest that an entry holds; None if it is new, incomplete or damaged."""
    entry.seek(0)
    try:
        kept = json.loads(entry.read())
    except ValueError:
        return None
    digest = kept.get("digest") if isinstance(kept, dict) else None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _write_entry(entry: IO[bytes], file: SafetensorsFile, digest: str) -> None:
    entry.truncate(0)
    kept = {"path": str(file.path.resolve()), "version": file.version._asdict(), "digest": digest}
    entry.write(json.dumps(kept).encode())


def _hash_file(file: SafetensorsFile, executor: Executor) -> str:
    hashed = hashlib.sha256(file.version.size.to_bytes(8, "little"))
    for digest in executor.map(partial(_hash_piece, file), range(0, file.version.size, _PIECE_BYTES)):
        hashed.update(digest)
    return hashed.hexdigest()


def _hash_piece(file: SafetensorsFile, begin: int) -> bytes:
    """XXH3 of the `_PIECE_BYTES` bytes from `begin` on, or of those up to the end; other threads run meanwhile."""
    hashed = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    remaining = min(_PIECE_BYTES, file.version.size - begin)
    with _open_unchanged(file) as opened:
        opened.seek(begin)
        while remaining and (count := opened.readinto(buffer[: min(len(buffer), remaining)])):
            hashed.update(buffer[:count])
            remaining -= count
    return hashed.digest()


@contextmanager
def _open_unchanged(file: SafetensorsFile) -> Iterator[FileIO]:
    """Open a file to read it; ValueError if at the end it is not the version whose header was read."""
    try:
        with FileIO(file.path) as opened:
            yield opened
            if FileVersion.of(opened.fileno()) != file.version:
                raise ValueError(f"{file.path} changed since the checkpoint was opened; start again")
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read ({error}); download the file again") from error
