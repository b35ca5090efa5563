"""Reads the KV of prompts that other replicas compute into the blocks of the sequences that wait for them.

The KV of a position counts as computed only after it arrived, was checked, and was written by every rank of the
attention group, so attention never sees a part of a chunk, or another chunk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from shoal.parallel.kv_transport import Fetch, KVChunk, KVTransport, TransferError
from shoal.parallel.request_id import RequestId
from shoal.parallel.spans import Spans

from ..scheduling.batch import KVWrite
from ..scheduling.scheduler import Scheduler
from ..scheduling.sequence import Sequence, SequenceStatus
from ..types import PromptLoaded
from .sender import Clock

MAX_FETCHES = 4
"""Chunks that are read at a time."""
MAX_ATTEMPTS = 2
"""Reads of one chunk before its prompt is computed here instead."""


@dataclass(slots=True)
class _Load:
    """A sequence that waits for the KV of its prompt."""

    request_id: RequestId
    seq: Sequence
    deadline: float
    """The load fails if nothing new is known of the prompt by this time."""
    chunks: list[KVChunk] = field(default_factory=list)
    """Announced so far: positions `[0, chunks[-1].end)`, without gaps."""
    num_written: int = 0
    """Chunks that are in the cache; the others are fetched, in order, from here on."""
    fetches: dict[int, Fetch] = field(default_factory=dict)
    """Reads in progress, by index of the chunk."""
    num_failures: Counter[int] = field(default_factory=Counter)
    """Failed reads, by index of the chunk."""
    num_preemptions: int = 0
    """Preemptions of the sequence before its current blocks were allocated: after another one, nothing is written."""
    output_token_ids: list[int] = field(default_factory=list)
    """Known tokens after the prompt; all of them once the prefill ended."""
    prefill_ended: bool = False
    error: str | None = None

    @property
    def num_announced(self) -> int:
        return self.chunks[-1].end if self.chunks else 0

    def drop_fetches(self) -> None:
        for fetch in self.fetches.values():
            fetch.close()
        self.fetches.clear()

    def restart(self) -> None:
        self.drop_fetches()
        self.num_written = 0
        self.num_preemptions = self.seq.num_preemptions


@dataclass(frozen=True, slots=True)
class _PlannedWrite:
    load: _Load
    write: KVWrite
    payload: Tensor


class KVReceiver:
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
        spans: Spans,
    ) -> None:
        """`timeout_s`: the longest wait for news of a prompt, and for a read."""
        self._transport = transport
        self._scheduler = scheduler
        self._fingerprint = fingerprint
        self._bytes_per_token = bytes_per_token
        self._max_step_tokens = max_step_tokens
        self._timeout_s = timeout_s
        self._clock = clock
        self._spans = spans
        self._loads: dict[int, _Load] = {}
        self._planned: list[_PlannedWrite] = []
        self.num_bytes = 0
        """Received and written to the cache so far."""

    @property
    def num_requests(self) -> int:
        """Requests that wait for their prompts."""
        return len(self._loads)

    @property
    def is_reading(self) -> bool:
        """Whether any chunk is being read."""
        return any(load.fetches for load in self._loads.values())

    def expect(self, request_id: RequestId, seq: Sequence) -> None:
        """Wait for the prompt of `seq`, whose chunks will be announced.

        What the sequence has generated so far is put aside until it resumes.
        """
        assert seq.remote_prefill_pending
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
            load.output_token_ids = output_token_ids
            load.prefill_ended = True
        if load.error is not None:
            return
        if output_token_ids is None:
            load.error = "the replica that computed the prompt failed"
        elif load.num_announced < load.seq.num_prompt_tokens:
            load.error = f"{load.num_announced} of {load.seq.num_prompt_tokens} prompt tokens were published"

    def drop(self, seq_id: int) -> None:
        """Stop waiting for a sequence that was aborted; does nothing if it does not wait."""
        load = self._loads.pop(seq_id, None)
        if load is not None:
            load.drop_fetches()

    def resume_complete(self) -> list[PromptLoaded]:
        """Resume the sequences whose prompts are complete, or whose loads failed: they compute what is missing."""
        resumed = []
        for load in list(self._loads.values()):
            if load.error is None and self._clock() >= load.deadline:
                load.error = f"no news of the prompt in {self._timeout_s:g} s"
            complete = load.prefill_ended and load.num_written == len(load.chunks)
            if load.error is None and not (complete and load.seq.status is SequenceStatus.LOADING):
                continue
            seq = load.seq
            if load.error is None and load.output_token_ids:
                self._scheduler.mark_received(seq.seq_id, seq.num_prompt_tokens)
            self._scheduler.resume(seq.seq_id, load.output_token_ids)
            self.drop(seq.seq_id)
            resumed.append(PromptLoaded(id=load.request_id, error=load.error))
        return resumed

    def plan(self) -> list[KVWrite]:
        """What arrived since the last step, in order of position, as much as a step may write; starts further reads."""
        self._planned.clear()
        budget = self._max_step_tokens
        for load in self._loads.values():
            if load.num_preemptions != load.seq.num_preemptions:
                load.restart()
            if load.seq.status is not SequenceStatus.LOADING:
                load.deadline = self._clock() + self._timeout_s
            elif load.error is None:
                self._skip_cached(load)
                budget = self._plan_one(load, budget)
        self._start_fetches()
        return [planned.write for planned in self._planned]

    def payload(self, index: int) -> Tensor:
        """What the `index`-th planned write writes, [num_bytes] uint8."""
        return self._planned[index].payload

    def commit(self) -> None:
        """The planned writes are done on every rank of the attention group."""
        for planned in self._planned:
            load = planned.load
            load.fetches.pop(load.num_written).close()
            load.num_written += 1
            self.num_bytes += planned.write.num_bytes
            load.deadline = self._clock() + self._timeout_s
            # The last position is left out until a token follows it: without one, it is computed again.
            end = min(planned.write.end, load.seq.num_prompt_tokens - 1)
            if end > load.seq.num_computed_tokens:
                self._scheduler.mark_received(load.seq.seq_id, end)
        self._planned.clear()

    def _skip_cached(self, load: _Load) -> None:
        """Skip chunks whose positions were in the prefix cache."""
        while load.num_written < len(load.chunks) and load.chunks[load.num_written].end <= load.seq.num_computed_tokens:
            if (fetch := load.fetches.pop(load.num_written, None)) is not None:
                fetch.close()
            load.num_written += 1

    def _plan_one(self, load: _Load, budget: int) -> int:
        """Plan the chunks of one load that arrived; returns what is left of the step's budget, in tokens."""
        index = load.num_written
        while budget > 0 and (payload := self._poll(load, index)) is not None:
            chunk = load.chunks[index]
            start = max(chunk.start, load.seq.num_computed_tokens)
            write = KVWrite(load.seq.seq_id, start, chunk.end, chunk.num_bytes, list(load.seq.block_table))
            self._planned.append(_PlannedWrite(load, write, payload))
            budget -= chunk.end - chunk.start
            index += 1
        return budget

    def _start_fetches(self) -> None:
        room = MAX_FETCHES - sum(len(load.fetches) for load in self._loads.values())
        for load in self._loads.values():
            if load.seq.status is not SequenceStatus.LOADING or load.error is not None:
                continue
            for index in range(load.num_written, len(load.chunks)):
                if room <= 0:
                    return
                if index not in load.fetches:
                    with self._spans("kv.fetch"):
                        load.fetches[index] = self._transport.fetch(load.chunks[index], timeout_s=self._timeout_s)
                    room -= 1

    def _poll(self, load: _Load, index: int) -> Tensor | None:
        """The chunk's payload, if it has arrived; a failed read is repeated, or fails the load."""
        fetch = load.fetches.get(index)
        if fetch is None:
            return None
        try:
            return fetch.poll()
        except TransferError as error:
            load.fetches.pop(index).close()
            load.num_failures[index] += 1
            if load.num_failures[index] == MAX_ATTEMPTS:
                load.error = str(error)
            return None

    def _problem(self, load: _Load, chunk: KVChunk) -> str | None:
        """Why a chunk is not the next one of this prompt, for this model."""
        if chunk.fingerprint != self._fingerprint:
            return "KV cache fingerprint mismatch: the sender runs another model, dtype or kernel backend"
        if chunk.start != load.num_announced or not chunk.start < chunk.end <= load.seq.num_prompt_tokens:
            return (
                f"KV chunk [{chunk.start}, {chunk.end}) is out of order: expected it to start at {load.num_announced}"
            )
        if chunk.num_bytes != (chunk.end - chunk.start) * self._bytes_per_token:
            return f"{chunk.num_bytes} bytes were published for {chunk.end - chunk.start} tokens"
        return None
