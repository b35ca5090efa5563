"""The output directory of a batch job: its rows, its journal and its state.

    run.json          identity and state of the job, and the digest of its outputs
    part-00000.jsonl  answered rows, in the order in which they finished
    errors.jsonl      rows that could not be answered
    journal.log       finished rows, the valid lengths of the two files above, and tokens of unfinished rows
    faults.json       lost workers and the recovery from each loss; absent until the first
    rows.spool        rows that passed the check, with their tokens; deleted when the job is finished
    digests.bin       per input row: state (1 byte: 0 open, 1 answered, 2 failed), digest of its content (32 bytes)

A group of rows is committed in this order: lines, fsync, journal records, fsync. After a crash, lines without a record
are truncated, so that every row is in exactly one file exactly once. `digests.bin` is rebuilt from the journal.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shoal.parallel.failpoints import Failpoints
from shoal.runtime.response import without_text
from shoal.runtime.types import GeneratedTokens, Tokens

from .journal import MAGIC, Journal, LossRecord, ProgressRecord, Record, RowRecord, write_fully
from .row_output import FinishedRow

State = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelled"]
"""OpenAI's words for the state of a batch."""

RUN_FILE = "run.json"
PART_FILE = "part-00000.jsonl"
ERROR_FILE = "errors.jsonl"
JOURNAL_FILE = "journal.log"
DIGEST_FILE = "digests.bin"
LOCK_FILE = "job.lock"
CUSTOM_ID_FILE = "custom_ids.sqlite"
FAULT_FILE = "faults.json"
SPOOL_FILE = "rows.spool"

_SLOT_BYTES = 33
_DIGEST_CHUNK_ROWS = 4096


@dataclass(slots=True)
class RowCounts:
    """Finished rows of a job and their tokens."""

    completed: int = 0
    failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def finished(self) -> int:
        return self.completed + self.failed


class BatchOutput:
    """An output directory opened by one process, to which finished rows are committed in groups.

    Every method that writes raises OSError when the disk is full or broken. Afterwards the object can only be closed;
    rows committed before are durable, and the directory can be opened again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        overwrite: bool = False,
        commit_rows: int = 1024,
        commit_bytes: int = 8 << 20,
        commit_interval_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        failpoints: Failpoints | None = None,
    ) -> None:
        """Open or resume; ValueError if another process uses the directory, or its files are not those of a job."""
        self.directory = directory
        self.counts = RowCounts()
        self._commit_rows = commit_rows
        self._commit_bytes = commit_bytes
        self._commit_interval_s = commit_interval_s
        self._clock = clock
        self._failpoints = failpoints or Failpoints()
        self._pending: list[FinishedRow] = []
        self._pending_bytes = 0
        self._pending_progress: list[ProgressRecord | LossRecord] = []
        self._generated: dict[int, dict[int, GeneratedTokens]] = {}
        self._losses: dict[int, int] = {}
        self.num_open_tokens = 0
        """Tokens of unfinished rows, of all runs."""
        self._open_tokens: dict[int, int] = {}
        """The same by row."""
        self._last_commit = clock()
        directory.mkdir(0o755, parents=True, exist_ok=True)
        self._resources = ExitStack()
        try:
            self._open(overwrite)
        except BaseException:
            self._resources.close()
            raise

    def _open(self, overwrite: bool) -> None:
        directory = self.directory
        self._resources.callback(os.close, _lock(directory))
        if overwrite:
            _remove_job(directory)
        self.run: dict[str, Any] = _read_run(directory)
        """Content of run.json; empty for a new job."""
        self._digests = self._open_file(DIGEST_FILE)
        os.ftruncate(self._digests, 0)
        self._files = {False: self._open_file(PART_FILE), True: self._open_file(ERROR_FILE)}
        self._sizes = {False: 0, True: 0}
        self._journal = Journal(directory / JOURNAL_FILE, self._replay)
        self._resources.callback(self._journal.close)
        self.num_dropped_bytes = self._journal.num_dropped_bytes
        """Number of truncated bytes of a torn journal record; its rows are answered again."""
        for failed, name in ((False, PART_FILE), (True, ERROR_FILE)):
            size = os.fstat(self._files[failed]).st_size
            if size < self._sizes[failed]:
                raise ValueError(
                    f"{directory / name} has {size} bytes, but the journal knows of {self._sizes[failed]}: the "
                    f"file was changed from outside; start over with --overwrite"
                )
            os.ftruncate(self._files[failed], self._sizes[failed])
        fsync_directory(directory)

    def _open_file(self, name: str) -> int:
        fd = _open_file(self.directory / name)
        self._resources.callback(os.close, fd)
        return fd

    def is_finished(self, index: int) -> bool:
        """Whether the row has a committed line."""
        return os.pread(self._digests, 1, index * _SLOT_BYTES) not in (b"", b"\0")

    def add(self, row: FinishedRow) -> None:
        """Add a finished row; it is durable after the next commit."""
        self._pending.append(row)
        self._pending_bytes += len(row.data)
        if len(self._pending) >= self._commit_rows or self._pending_bytes >= self._commit_bytes:
            self.commit()

    def add_progress(self, index: int, tokens: Tokens) -> None:
        """Add new tokens of an unfinished row; they are durable after the next commit."""
        logprobs = None if tokens.logprobs is None else without_text(tokens.logprobs)
        new = GeneratedTokens(tokens.token_ids, logprobs)
        self._pending_progress.append(ProgressRecord(index, tokens.sample_index, tokens.start, new))
        self._add_open_tokens(index, len(tokens.token_ids))

    def add_losses(self, index: int, num_losses: int) -> None:
        """Set the number of worker losses that interrupted a row; durable after the next commit."""
        self._losses[index] = num_losses
        self._pending_progress.append(LossRecord(index, num_losses))

    def num_losses(self, index: int) -> int:
        """Number of worker losses that interrupted this unfinished row, in all runs."""
        return self._losses.get(index, 0)

    @property
    def num_begun(self) -> tuple[int, int]:
        """Number of unfinished rows with tokens from earlier runs, and number of these tokens."""
        tokens = [sum(len(g.token_ids) for g in row.values()) for row in self._generated.values()]
        return len(tokens), sum(tokens)

    def take_generated(self, index: int) -> tuple[GeneratedTokens, ...]:
        """Tokens of an unfinished row from earlier runs, per sample; may be called once per row."""
        row = self._generated.pop(index, {})
        return tuple(row.get(i, GeneratedTokens()) for i in range(max(row, default=-1) + 1))

    def commit_if_due(self) -> None:
        """Commit if there are uncommitted rows or tokens and the commit interval has passed."""
        if (self._pending or self._pending_progress) and self._clock() - self._last_commit >= self._commit_interval_s:
            self.commit()

    def commit(self) -> None:
        """Make all added rows and tokens durable; after an OSError none of them are."""
        self._last_commit = self._clock()
        finished = {row.index for row in self._pending}
        progress = [record for record in self._pending_progress if record.index not in finished]
        if not self._pending and not progress:
            return
        sizes = dict(self._sizes)
        records: list[RowRecord] = []
        for row in self._pending:
            sizes[row.failed] += len(row.data)
            self._write_slot(row.index, row.failed, row.digest)
            records.append(
                RowRecord(
                    row.index, row.failed, sizes[row.failed], row.digest, row.num_prompt_tokens, row.num_output_tokens
                )
            )
        for failed, fd in self._files.items():
            if sizes[failed] > self._sizes[failed]:
                data = b"".join(row.data for row in self._pending if row.failed is failed)
                write_fully(fd, data, self._sizes[failed])
                os.fsync(fd)
        self._failpoints.reach("job.commit")
        self._journal.append([*records, *progress])
        for record in records:
            self._count(record)
            self._losses.pop(record.index, None)
        self._pending = []
        self._pending_progress = []
        self._pending_bytes = 0

    def digest(self, num_rows: int) -> str:
        """`sha256:<hex>` over the digests of all rows in input order; every row must be finished."""
        hashed = hashlib.sha256()
        for first in range(0, num_rows, _DIGEST_CHUNK_ROWS):
            count = min(_DIGEST_CHUNK_ROWS, num_rows - first)
            slots = os.pread(self._digests, count * _SLOT_BYTES, first * _SLOT_BYTES)
            assert len(slots) == count * _SLOT_BYTES, "a row without a digest"
            for start in range(0, len(slots), _SLOT_BYTES):
                assert slots[start], f"row {first + start // _SLOT_BYTES} is not finished"
                hashed.update(slots[start + 1 : start + _SLOT_BYTES])
        return f"sha256:{hashed.hexdigest()}"

    def save_run(self, **changes: Any) -> None:
        """Update fields of run.json atomically."""
        self.run |= changes
        write_json(self.directory / RUN_FILE, self.run)

    def close(self) -> None:
        """Release the directory. Uncommitted rows are answered again by the next run."""
        self._resources.close()

    def _count(self, record: RowRecord) -> None:
        self._sizes[record.failed] = record.end_offset
        if record.failed:
            self.counts.failed += 1
        else:
            self.counts.completed += 1
        self.num_open_tokens -= self._open_tokens.pop(record.index, 0)
        self.counts.num_prompt_tokens += record.num_prompt_tokens
        self.counts.num_output_tokens += record.num_output_tokens

    def _replay(self, record: Record) -> None:
        if isinstance(record, ProgressRecord):
            self._add_generated(record)
        elif isinstance(record, LossRecord):
            self._losses[record.index] = record.num_losses
        else:
            self._generated.pop(record.index, None)
            self._losses.pop(record.index, None)
            self._count(record)
            self._write_slot(record.index, record.failed, record.digest)

    def _add_generated(self, record: ProgressRecord) -> None:
        row = self._generated.setdefault(record.index, {})
        before = row.get(record.sample_index, GeneratedTokens())
        assert len(before.token_ids) == record.start, f"row {record.index}: progress does not follow what came before"
        row[record.sample_index] = before.extended(record.new)
        self._add_open_tokens(record.index, len(record.new.token_ids))

    def _add_open_tokens(self, index: int, count: int) -> None:
        self.num_open_tokens += count
        self._open_tokens[index] = self._open_tokens.get(index, 0) + count

    def _write_slot(self, index: int, failed: bool, digest: bytes) -> None:
        write_fully(self._digests, (b"\2" if failed else b"\1") + digest, index * _SLOT_BYTES)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with open(_open_file(new), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_file(path: Path) -> int:
    """Open for reading and writing; other users get no write permission, whatever the umask."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _lock(directory: Path) -> int:
    """Lock the directory until this process ends; the kernel releases the lock however it ends."""
    fd = _open_file(directory / LOCK_FILE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise ValueError(
            f"process {owner or '(unknown)'} is already writing to {directory}; wait for it, or use "
            f"another output directory"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _remove_job(directory: Path) -> None:
    # run.json first: without it the other files are not taken for a job that can be resumed.
    for name in (RUN_FILE, JOURNAL_FILE, PART_FILE, ERROR_FILE, DIGEST_FILE, CUSTOM_ID_FILE, FAULT_FILE, SPOOL_FILE):
        (directory / name).unlink(missing_ok=True)


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / RUN_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # A run killed before it wrote run.json leaves a journal of only its magic.
        smallest = {JOURNAL_FILE: len(MAGIC) + 1, PART_FILE: 1, ERROR_FILE: 1}
        if leftover := [name for name, size in smallest.items() if _size(directory / name) >= size]:
            raise ValueError(
                f"{directory} holds {leftover[0]} but no {RUN_FILE}: it is not a job that can be resumed; use another "
                f"output directory, or --overwrite to delete its files"
            ) from None
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON; start over with --overwrite") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not describe a job; start over with --overwrite")
    return value


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
