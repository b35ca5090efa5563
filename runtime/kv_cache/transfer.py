"""Both ends of handing a prompt's cache records from the replica that computes it to the one that goes on.

`KVExporter` publishes a prompt chunk by chunk while it is being computed. `KVLoader` reads the chunks into the blocks
of a waiting sequence. A record counts as computed only after it arrived, was checked, and was written by every rank of
the attention group; so attention never sees a part of a record, or one of another chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from shoal.parallel.kv_transport import Fetch, KVChunk, KVTransport, TransferError, checksum_of
from shoal.parallel.request_id import RequestId

from ..scheduling.batch import RecordWrite
from ..scheduling.scheduler import Scheduler
from ..scheduling.sequence import Sequence, SequenceStatus
from ..types import PromptLoaded
from .cache import KVCache

MAX_FETCHES = 4
"""Chunks that are read at a time."""
MAX_ATTEMPTS = 2
"""Reads of one chunk before its prompt is computed here instead."""

Clock = Callable[[], float]


@dataclass(slots=True)
class _Export:
    """A prompt whose records others read."""

    seq: Sequence
    num_published: int = 0
    generations: list[int] = field(default_factory=list)
    lease_ends: float | None = None
    """None while the prompt is being computed."""


class KVExporter:
    """Publishes the records of prompts and holds them until they are released or their lease ends."""

    def __init__(
        self,
        transport: KVTransport,
        cache: KVCache,
        scheduler: Scheduler,
        *,
        fingerprint: bytes,
        chunk_tokens: int,
        lease_s: float,
        clock: Clock,
    ) -> None:
        """`chunk_tokens`: most tokens of a chunk."""
        self._transport, self._cache, self._scheduler = transport, cache, scheduler
        self._fingerprint, self._chunk_tokens, self._lease_s, self._clock = fingerprint, chunk_tokens, lease_s, clock
        self._exports: dict[RequestId, _Export] = {}
        self._num_chunks = 0

    @property
    def num_requests(self) -> int:
        """Requests whose records are published, or will be."""
        return len(self._exports)

    def begin(self, request_id: RequestId, seq: Sequence) -> None:
        self._exports[request_id] = _Export(seq)

    def publish(self, request_id: RequestId, *, epoch: int) -> list[KVChunk]:
        """The prompt records that were computed since the last call, published; call it before the blocks are freed."""
        export = self._exports[request_id]
        seq = export.seq
        chunks = []
        while (start := export.num_published) < (computed := min(seq.num_computed_tokens, seq.num_prompt_tokens)):
            end = min(computed, start + self._chunk_tokens)
            payload = self._cache.read_records(self._cache.slots(seq.block_table, start, end))
            generation = self._num_chunks
            self._num_chunks += 1
            address = self._transport.publish(payload, generation=generation)
            export.generations.append(generation)
            export.num_published = end
            chunks.append(
                KVChunk(
                    id=request_id,
                    start=start,
                    end=end,
                    fingerprint=self._fingerprint,
                    epoch=epoch,
                    generation=generation,
                    num_bytes=payload.numel(),
                    checksum=checksum_of(payload, epoch=epoch, generation=generation, start=start, end=end),
                    address=address,
                )
            )
        return chunks

    def end(self, request_id: RequestId) -> None:
        """The prompt is complete and its sequence finished: the lease begins."""
        self._exports[request_id].lease_ends = self._clock() + self._lease_s

    def release(self, request_id: RequestId) -> None:
        """Forget what was published of a request whose sequence is finished; unknown ones are ignored."""
        export = self._exports.pop(request_id, None)
        if export is not None:
            for generation in export.generations:
                self._transport.release(generation)
            self._scheduler.release_export(export.seq)

    def expire(self) -> None:
        """Release what nobody read within its lease."""
        now = self._clock()
        for request_id in [i for i, e in self._exports.items() if e.lease_ends is not None and e.lease_ends <= now]:
            self.release(request_id)


@dataclass(slots=True)
class _Load:
    """A sequence that waits for its prompt's records."""

    request_id: RequestId
    seq: Sequence
    deadline: float
    """Of the next news."""
    chunks: list[KVChunk] = field(default_factory=list)
    """Announced so far: `[0, end of the last)`, without gaps."""
    num_written: int = 0
    """Chunks whose records are in the cache; the others are fetched, in order, from here on."""
    fetches: dict[int, Fetch] = field(default_factory=dict)
    """By number of the chunk."""
    num_failures: Counter[int] = field(default_factory=Counter)
    """Failed reads, by number of the chunk."""
    num_preemptions: int = 0
    """Of the sequence when its current blocks were allocated: after another one, nothing is written."""
    output_token_ids: list[int] = field(default_factory=list)
    """What follows the prompt, as far as it is known: all of it once the prefill ended."""
    prefill_ended: bool = False
    error: str | None = None

    @property
    def num_announced(self) -> int:
        return self.chunks[-1].end if self.chunks else 0

    def drop_fetches(self) -> None:
        for fetch in self.fetches.values():
            fetch.close()
        self.fetches.clear()

    def begin_again(self) -> None:
        self.drop_fetches()
        self.num_written = 0
        self.num_preemptions = self.seq.num_preemptions


@dataclass(frozen=True, slots=True)
class PlannedWrite:
    """One write of a step, with its payload."""

    write: RecordWrite
    payload: Tensor


class KVLoader:
    """Brings announced chunks into the cache: `plan` before a step, `commit` after it."""

    def __init__(
        self,
        transport: KVTransport,
        scheduler: Scheduler,
        *,
        fingerprint: bytes,
        bytes_per_token: int,
        max_step_tokens: int,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        """`timeout_s`: the longest wait for news of a prompt, and for a read."""
        self._transport, self._scheduler = transport, scheduler
        self._fingerprint, self._bytes_per_token = fingerprint, bytes_per_token
        self._max_step_tokens, self._timeout_s, self._clock = max_step_tokens, timeout_s, clock
        self._loads: dict[int, _Load] = {}
        self._planned: list[tuple[_Load, PlannedWrite]] = []

    @property
    def num_requests(self) -> int:
        """Requests that wait for records."""
        return len(self._loads)

    def expect(self, request_id: RequestId, seq: Sequence) -> None:
        """Chunks of the prompt of `seq`, which awaits records, will be announced. What it has generated is put aside
        until it starts."""
        assert seq.awaits_records
        load = _Load(request_id, seq, self._clock() + self._timeout_s, output_token_ids=seq.output_token_ids)
        seq.output_token_ids = []
        self._loads[seq.seq_id] = load

    def add_chunk(self, seq_id: int, chunk: KVChunk) -> None:
        """A chunk was published. Duplicates and prompts that wait no longer are ignored; a gap fails the prompt."""
        load = self._loads.get(seq_id)
        if load is None or chunk.end <= load.num_announced:
            return
        load.deadline = self._clock() + self._timeout_s
        if (problem := self._problem(load, chunk)) is not None:
            load.error = problem
        else:
            load.chunks.append(chunk)

    def end_prefill(self, seq_id: int, output_token_ids: list[int] | None) -> None:
        """No more chunks will come: the prompt is complete and these tokens follow it, or (None) its prefill failed."""
        load = self._loads.get(seq_id)
        if load is None:
            return
        load.deadline = self._clock() + self._timeout_s
        if output_token_ids is not None:
            load.output_token_ids, load.prefill_ended = output_token_ids, True
        if load.error is not None:
            return
        if output_token_ids is None:
            load.error = "the replica that computed the prompt failed"
        elif load.num_announced < load.seq.num_prompt_tokens:
            load.error = f"{load.num_announced} of {load.seq.num_prompt_tokens} prompt tokens were published"

    def drop(self, seq_id: int) -> None:
        """The sequence is gone."""
        load = self._loads.pop(seq_id, None)
        if load is not None:
            load.drop_fetches()

    def advance(self) -> list[PromptLoaded]:
        """Start the sequences whose prompts are complete, or that wait no longer for the rest of theirs."""
        done = []
        for load in list(self._loads.values()):
            if load.error is None and self._clock() >= load.deadline:
                load.error = f"no news of the prompt in {self._timeout_s:g} s"
            complete = load.prefill_ended and load.num_written == len(load.chunks)
            if load.error is None and not (complete and load.seq.status is SequenceStatus.LOADING):
                continue
            seq = load.seq
            if load.error is None and load.output_token_ids:
                self._scheduler.loaded(seq.seq_id, seq.num_prompt_tokens)
            self._scheduler.start(seq.seq_id, load.output_token_ids)
            self.drop(seq.seq_id)
            done.append(PromptLoaded(id=load.request_id, error=load.error))
        return done

    def plan(self) -> list[PlannedWrite]:
        """What arrived since the last step, in order of position, as much as a step may write; starts further reads."""
        self._planned.clear()
        budget = self._max_step_tokens
        for load in self._loads.values():
            if load.num_preemptions != load.seq.num_preemptions:
                load.begin_again()
            if load.seq.status is not SequenceStatus.LOADING:
                load.deadline = self._clock() + self._timeout_s
            elif load.error is None:
                self._skip_cached(load)
                budget = self._plan_one(load, budget)
        self._start_fetches()
        return [planned for _, planned in self._planned]

    @property
    def is_reading(self) -> bool:
        """Whether chunks are on their way."""
        return any(load.fetches for load in self._loads.values())

    def commit(self) -> None:
        """The planned writes are done on every rank of the attention group."""
        for load, planned in self._planned:
            load.fetches.pop(load.num_written).close()
            load.num_written += 1
            load.deadline = self._clock() + self._timeout_s
            # The last position is left out until a token follows it: without one, it is computed again.
            end = min(planned.write.end, load.seq.num_prompt_tokens - 1)
            if end > load.seq.num_computed_tokens:
                self._scheduler.loaded(load.seq.seq_id, end)
        self._planned.clear()

    def _skip_cached(self, load: _Load) -> None:
        """Chunks whose positions the prefix cache had need not be read."""
        while load.num_written < len(load.chunks) and load.chunks[load.num_written].end <= load.seq.num_computed_tokens:
            if (fetch := load.fetches.pop(load.num_written, None)) is not None:
                fetch.close()
            load.num_written += 1

    def _plan_one(self, load: _Load, budget: int) -> int:
        number = load.num_written
        while budget > 0 and (payload := self._poll(load, number)) is not None:
            chunk = load.chunks[number]
            start = max(chunk.start, load.seq.num_computed_tokens)
            write = RecordWrite(load.seq.seq_id, start, chunk.end, chunk.num_bytes, list(load.seq.block_table))
            self._planned.append((load, PlannedWrite(write, payload)))
            budget -= chunk.end - chunk.start
            number += 1
        return budget

    def _start_fetches(self) -> None:
        room = MAX_FETCHES - sum(len(load.fetches) for load in self._loads.values())
        for load in self._loads.values():
            if load.seq.status is not SequenceStatus.LOADING or load.error is not None:
                continue
            for number in range(load.num_written, len(load.chunks)):
                if room <= 0:
                    return
                if number not in load.fetches:
                    load.fetches[number] = self._transport.fetch(load.chunks[number], timeout_s=self._timeout_s)
                    room -= 1

    def _poll(self, load: _Load, number: int) -> Tensor | None:
        """The chunk's payload, if it is here; a failed read is begun again, or fails the prompt."""
        fetch = load.fetches.get(number)
        if fetch is None:
            return None
        try:
            return fetch.poll()
        except TransferError as error:
            load.fetches.pop(number).close()
            load.num_failures[number] += 1
            if load.num_failures[number] == MAX_ATTEMPTS:
                load.error = str(error)
            return None

    def _problem(self, load: _Load, chunk: KVChunk) -> str | None:
        """Why a chunk is not the next one of this prompt, for this model."""
        if chunk.fingerprint != self._fingerprint:
            return "the records were computed by another model, dtype or kernel backend"
        if chunk.start != load.num_announced or not chunk.start < chunk.end <= load.seq.num_prompt_tokens:
            return f"positions {chunk.start} to {chunk.end} were published after {load.num_announced}"
        if chunk.num_bytes != (chunk.end - chunk.start) * self._bytes_per_token:
            return f"{chunk.num_bytes} bytes were published for {chunk.end - chunk.start} tokens"
        return None
