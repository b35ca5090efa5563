"""A batch job as `run_job` does it, with the product's journal in memory: killed at any write, and resumed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, cast

from msgspec.structs import replace

from shoal.cluster.jobs.journal import Journal, ProgressRecord, Record, RowRecord
from shoal.cluster.replicas.replica_pool import ReplicaPool
from shoal.runtime.response import without_text
from shoal.runtime.types import GeneratedTokens, Request, RequestOutput, Tokens

from .model import Row
from .oracle import Ledger
from .virtual import DriverKilled, World

POLL_TIMEOUT_S = 0.1


class MemoryFile:
    """A file and as much of the module `os` as the journal uses. Its disk may fill up, or its writer be killed."""

    O_RDWR, O_CREAT, O_CLOEXEC = os.O_RDWR, os.O_CREAT, os.O_CLOEXEC

    def __init__(self, rng: Random) -> None:
        self.data = bytearray()
        self.writes_left: int | None = None
        """Until one that does not succeed."""
        self.is_full = False
        """What that one meets with; else its writer is killed in the middle of it."""
        self._rng = rng

    def open(self, path_or_mode: Any, *_: Any) -> Any:
        """As `os.open(file, ..)` or as `file.open("rb")`."""
        return self if path_or_mode is self else io.BytesIO(self.data)

    def close(self, _fd: Any) -> None:
        pass

    def fsync(self, _fd: Any) -> None:
        pass

    def fstat(self, _fd: Any) -> Any:
        return _Status(len(self.data))

    def ftruncate(self, _fd: Any, size: int) -> None:
        del self.data[size:]

    def pwrite(self, _fd: Any, data: memoryview, offset: int) -> int:
        size = len(data)
        fails = self.writes_left == 0
        if self.writes_left is not None:
            self.writes_left -= 1
        if fails:
            size = self._rng.randint(0, size)
        self.data[offset : offset + size] = data[:size]
        if fails and self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        if fails:
            raise DriverKilled
        return size


@dataclass
class _Status:
    st_size: int


class Job:
    """The rows, their journal, and what outlives a driver."""

    def __init__(self, rows: Mapping[str, Row], rng: Random) -> None:
        self.rows, self.rng = rows, rng
        self.file = MemoryFile(rng)
        self.aborted: set[str] = set()
        self._told: dict[tuple[str, int], int] = {}
        """The most tokens of a sample that any driver was told of."""

    def open(self) -> JobRun:
        """For one driver: read the journal, and cut off what the last driver did not finish writing."""
        finished: list[str] = []
        generated: dict[tuple[str, int], GeneratedTokens] = {}

        def replay(record: Record) -> None:
            name = f"row-{record.index}"
            if isinstance(record, RowRecord):
                assert record.digest == digest_of(self.rows[name]), f"{name}: a wrong answer is in the journal"
                finished.append(name)
                return
            assert isinstance(record, ProgressRecord), "this driver loses no workers"
            before = generated.get((name, record.sample_index), GeneratedTokens())
            assert record.start == len(before.token_ids), f"{name}: the journal has a gap"
            generated[name, record.sample_index] = before.extended(record.new)

        journal = Journal(cast(Any, self.file), replay)
        assert len(set(finished)) == len(finished), f"finished twice: {finished}"
        for (name, index), tokens in generated.items():
            count = len(tokens.token_ids)
            assert count <= self._told[name, index], f"{name}: the journal has tokens that nobody told"
            assert list(tokens.token_ids) == self.rows[name].answers[index].output[:count], f"{name}: wrong tokens"
        return JobRun(self, journal, set(finished), generated)

    def note_told(self, ledger: Ledger) -> None:
        for place, count in ledger.told.items():
            self._told[place] = max(count, self._told.get(place, 0))


class JobRun:
    """What one driver does."""

    def __init__(
        self, job: Job, journal: Journal, finished: set[str], generated: dict[tuple[str, int], GeneratedTokens]
    ) -> None:
        self._job, self._journal, self._generated = job, journal, generated
        told = {place: len(tokens.token_ids) for place, tokens in generated.items()}
        self.ledger = Ledger(job.rows, told, finished, set(job.aborted))
        self._capacity = job.rng.randint(1, len(job.rows))
        self._commit_interval_s = job.rng.choice([0.0, 0.05, 0.2])
        self._aborts_at = job.rng.randint(1, 12) if job.rng.random() < 0.2 else -1
        """The poll after which nobody wants one of the rows any more."""
        self._pending: list[Record] = []
        self._last_commit = 0.0

    def answer(self, world: World, pool: ReplicaPool) -> None:
        """All rows that have no answer yet."""
        to_ask = [name for name in self._job.rows if name in self.ledger.open]
        in_flight: set[str] = set()
        num_polls = 0
        while to_ask or in_flight:
            num_polls += 1
            new, to_ask = to_ask[: self._capacity - len(in_flight)], to_ask[self._capacity - len(in_flight) :]
            in_flight |= set(new)
            pool.submit([self._request(name) for name in new])
            for output in pool.poll(POLL_TIMEOUT_S):
                self.ledger.take(output)
                row = self._job.rows[output.request_id]
                if isinstance(output, RequestOutput):
                    in_flight.remove(output.request_id)
                    self._pending.append(_record_of(row))
                elif isinstance(output, Tokens):
                    self._pending.append(_progress_of(row, output))
            self._job.note_told(self.ledger)
            if world.now - self._last_commit >= self._commit_interval_s:
                self._commit(world)
            if in_flight and num_polls == self._aborts_at:
                in_flight -= {self._abort(pool, self._job.rng.choice(sorted(in_flight)))}
        self._commit(world)

    def _request(self, name: str) -> Request:
        row = self._job.rows[name].request
        known = tuple(self._generated.get((name, i), GeneratedTokens()) for i in range(row.params.n))
        return replace(row, generated=known if any(g.token_ids for g in known) else ())

    def _abort(self, pool: ReplicaPool, name: str) -> str:
        pool.abort([name])
        self.ledger.aborted.add(name)
        self._job.aborted.add(name)
        return name

    def _commit(self, world: World) -> None:
        self._last_commit = world.now
        finished = {r.index for r in self._pending if isinstance(r, RowRecord)}
        records = [r for r in self._pending if isinstance(r, RowRecord) or r.index not in finished]
        if records:
            self._journal.append(records)
        self._pending = []


def digest_of(row: Row) -> bytes:
    return hashlib.sha256(repr([a.output for a in row.answers]).encode()).digest()


def _progress_of(row: Row, tokens: Tokens) -> ProgressRecord:
    logprobs = None if tokens.logprobs is None else without_text(tokens.logprobs)
    new = GeneratedTokens(tokens.token_ids, logprobs)
    return ProgressRecord(row.request.index, tokens.sample_index, tokens.start, new)


def _record_of(row: Row) -> RowRecord:
    return RowRecord(row.request.index, False, 0, digest_of(row), 1, 1)
