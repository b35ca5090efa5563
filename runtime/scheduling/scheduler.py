"""Decides which tokens every step computes: continuous batching with chunked prefill, preemption and prefix reuse.

Plain Python and a function of the calls made on it alone: no tensors, clock, I/O or randomness, so that every rank
and the planner reach the same decisions.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from .batch import UNKNOWN_TOKEN, Batch, ScheduledSequence
from .block_manager import BlockManager
from .sequence import Sequence, SequenceStatus
from .transfer_buffer import TransferBuffer

_by_arrival = attrgetter("arrival")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_seqs: int
    """Most sequences that run, and so own blocks, at a time."""
    max_num_batched_tokens: int
    """Token budget of one step."""
    enable_chunked_prefill: bool = True
    """False: the known tokens of a waiting sequence are scheduled in one step or not at all."""
    max_chunk_size: int | None = None
    """Most tokens of one sequence in one step; None leaves only the budget."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_chunk_size is not None and not self.enable_chunked_prefill:
            raise ValueError(
                f"max_chunk_size={self.max_chunk_size} splits prompts: enable chunked prefill or leave it out"
            )


class Scheduler:
    """Waiting and running sequences, both in order of arrival, over the blocks of one `BlockManager`.

    A step is `batch = schedule()`, running the batch, and `update(batch, accepted)`. Between the two, a sequence may be
    finished, aborted or preempted; its part of the batch is then ignored.

    Every added sequence finishes: the oldest running one comes first in the budget and is never preempted for another,
    and alone it fits, because `add` refuses it otherwise.
    """

    def __init__(
        self, config: SchedulerConfig, block_manager: BlockManager, transfer_buffer: TransferBuffer | None = None
    ) -> None:
        """`transfer_buffer`: admits sequences whose prompts are sent to other replicas; None admits them all."""
        self.config = config
        self.block_manager = block_manager
        self.transfer_buffer = transfer_buffer or TransferBuffer()
        self.num_preemptions = 0
        self.num_evicted_blocks = 0
        """Blocks that the prefix cache lost to sequences that needed them."""
        self.prefix_cache_queries = 0
        """Tokens of admitted sequences that were looked up in the prefix cache."""
        self.prefix_cache_hits = 0
        """Those of them that were found."""
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_added = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that own blocks, running or loading, oldest first."""
        return tuple(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence behind all others; one that could never be finished is a ValueError with the numbers."""
        self._check_feasible(seq)
        seq.arrival = self._num_added
        self._num_added += 1
        self._sequences[seq.seq_id] = seq
        self._waiting.append(seq)

    def schedule(self) -> Batch:
        """Choose the tokens of the next step; empty only when nothing is unfinished, or all of it waits for others.

        Running sequences come first, in order of arrival, then waiting ones as long as the next of them fits.
        """
        scheduled: list[ScheduledSequence] = []
        budget = self.config.max_num_batched_tokens
        index = 0
        while index < len(self._running) and budget > 0:
            seq = self._running[index]
            if seq.status is SequenceStatus.LOADING:
                index += 1
                continue
            num_new = self._chunk_size(seq.num_tokens - seq.num_computed_tokens, budget)
            end = seq.num_computed_tokens + num_new
            assert end <= seq.max_positions, f"sequence {seq.seq_id} has its max_tokens={seq.max_tokens}: finish it"
            self._make_room(seq, end)
            if seq.status is not SequenceStatus.RUNNING:
                break
            self._allocate(seq, end)
            scheduled.append(_scheduled(seq, end))
            budget -= num_new
            index += 1
        self._admit(scheduled, budget)
        return Batch(scheduled)

    def schedule_ahead(self, batch: Batch) -> Batch | None:
        """The step after `batch`, which is all that runs and whose tokens are not known yet: one more of each sequence.

        Their token ids are UNKNOWN_TOKEN. A sequence that `batch` brings to its max_tokens is left out; one that ends
        otherwise is computed in vain. None where more is to be done than that: sequences wait or load, a prompt is not
        finished, a block is missing.
        """
        advanced = {s.seq_id for s in batch.sequences if s.num_logits}
        if self._waiting or not all(seq.seq_id in advanced for seq in self._running):
            return None
        going_on = [seq for seq in self._running if seq.num_tokens < seq.max_positions]
        manager = self.block_manager
        num_lacking = sum(self._num_blocks_lacking(seq, seq.num_tokens + 1) for seq in going_on)
        if not going_on or num_lacking > manager.num_free_blocks:
            return None
        scheduled = []
        for seq in going_on:
            start = seq.num_tokens
            self._allocate(seq, start + 1)
            table = list(seq.block_table)
            scheduled.append(
                ScheduledSequence(seq.seq_id, start, [UNKNOWN_TOKEN], table, seq.num_prompt_tokens, num_logits=1)
            )
        return Batch(scheduled)

    def update(self, batch: Batch, accepted: Mapping[int, list[int]]) -> None:
        """Account for a batch that ran.

        accepted: by sequence with `num_logits`, the 1 to `num_logits` tokens that follow its known ones. All but the
        last of them are the first of its draft tokens; the KV of the other drafts is not used and is written again.

        A sequence without a usable token (broken logits, say) must be finished before this call.
        """
        for part in batch.sequences:
            seq = self._sequences.get(part.seq_id)
            if seq is None or seq.status is not SequenceStatus.RUNNING:
                continue
            assert seq.num_computed_tokens == part.start, f"sequence {seq.seq_id} was updated with an old batch"
            end = part.start + len(part.token_ids)
            if part.num_logits:
                end -= self._accept(seq, part, accepted[seq.seq_id])
            self.block_manager.mark_computed(seq, end)
            if seq.prompt_logits_pending:
                covered = max(seq.num_delivered_prompt_logits, min(end, seq.num_prompt_tokens))
                seq.num_delivered_prompt_logits = covered

    def mark_received(self, seq_id: int, num_tokens: int) -> None:
        """Record that the KV of positions `[0, num_tokens)` of a loading sequence is in the cache."""
        seq = self._sequences[seq_id]
        assert seq.status is SequenceStatus.LOADING, f"sequence {seq_id} is {seq.status.value} and loads nothing"
        self.block_manager.mark_computed(seq, num_tokens)

    def resume(self, seq_id: int, output_token_ids: list[int]) -> None:
        """End the wait for a remote prefill; `output_token_ids` follow the prompt, and what is missing is computed.

        At least one known token must be missing from the cache: its logits give the next.
        """
        seq = self._sequences[seq_id]
        assert seq.remote_prefill_pending, f"sequence {seq_id} was resumed before"
        seq.remote_prefill_pending = False
        seq.output_token_ids.extend(output_token_ids)
        assert seq.num_computed_tokens < seq.num_tokens, f"sequence {seq_id} has nothing to compute"
        if seq.status is SequenceStatus.LOADING:
            seq.status = SequenceStatus.RUNNING

    def finish(self, seq_id: int, *, discard: bool = False) -> None:
        """Remove a sequence; `discard=True` also takes its tokens out of the prefix cache, after broken results."""
        seq = self._sequences.pop(seq_id)
        if seq.status is SequenceStatus.WAITING:
            self._waiting.remove(seq)
        else:
            self._remove_running(seq)
        self.block_manager.free(seq, discard=discard)
        seq.status = SequenceStatus.FINISHED

    def abort(self, seq_id: int) -> bool:
        """Finish a sequence before its end; False if it is unknown or already finished."""
        if seq_id not in self._sequences:
            return False
        self.finish(seq_id)
        return True

    def preempt(self, seq_id: int) -> None:
        """Free the blocks of a running or loading sequence; it waits in order of arrival to be computed again."""
        seq = self._sequences[seq_id]
        assert seq.status in (SequenceStatus.RUNNING, SequenceStatus.LOADING), (
            f"sequence {seq_id} is {seq.status.value} and cannot be preempted"
        )
        self._remove_running(seq)
        self.block_manager.free(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        # Only sequences that were preempted as well can be older, and those are all in front.
        place = 0
        while place < len(self._waiting) and self._waiting[place].arrival < seq.arrival:
            place += 1
        self._waiting.insert(place, seq)

    def _check_feasible(self, seq: Sequence) -> None:
        name = f"sequence {seq.seq_id}"
        assert self.config.enable_chunked_prefill or not seq.remote_prefill_pending, (
            "the part of a prompt that is not received is computed in chunks"
        )
        if seq.seq_id in self._sequences:
            raise ValueError(f"{name} is already scheduled; give every sequence its own id")
        if not seq.prompt_token_ids:
            raise ValueError(f"{name} has an empty prompt; it needs at least one token")
        if seq.max_tokens <= seq.num_output_tokens:
            raise ValueError(
                f"{name} has nothing to generate: it starts with {seq.num_output_tokens} generated tokens and "
                f"max_tokens={seq.max_tokens}"
            )
        size = f"{seq.num_prompt_tokens} prompt tokens and max_tokens={seq.max_tokens}"
        needed = self.block_manager.num_blocks_for(seq.max_positions)
        if needed > self.block_manager.num_blocks:
            raise ValueError(
                f"{name} can never fit: {size} need {needed} blocks of {self.block_manager.block_size} tokens, "
                f"the cache has {self.block_manager.num_blocks}; shorten it or enlarge the cache"
            )
        budget = self.config.max_num_batched_tokens
        if not self.config.enable_chunked_prefill and seq.max_positions > budget:
            raise ValueError(
                f"{name} can never be scheduled whole: {size} are up to {seq.max_positions} tokens at once, "
                f"max_num_batched_tokens is {budget}; raise it or enable chunked prefill"
            )

    def _chunk_size(self, num_remaining: int, budget: int) -> int:
        return min(num_remaining, budget, self.config.max_chunk_size or budget)

    def _make_room(self, seq: Sequence, end: int) -> None:
        """Preempt the latest arrivals, `seq` itself last, until there are blocks for positions `[0, end)` of `seq`."""
        manager = self.block_manager
        num_new = self._num_blocks_lacking(seq, end)
        while num_new > manager.num_free_blocks and seq.status is SequenceStatus.RUNNING:
            self.preempt(self._running[-1].seq_id)

    def _admit(self, scheduled: list[ScheduledSequence], budget: int) -> None:
        """Start waiting sequences, strictly in order, while tokens, places and blocks last.

        One is started only if all running sequences could go on to one token more than they know, so that work is not
        begun only to be preempted in the next step.
        """
        manager = self.block_manager
        if not self._waiting or budget == 0 or len(self._running) == self.config.max_num_seqs:
            return
        room = manager.num_free_blocks - sum(self._num_blocks_ahead(seq) for seq in self._running)
        while self._waiting and budget > 0 and room > 0 and len(self._running) < self.config.max_num_seqs:
            seq = self._waiting[0]
            if seq.remote_decode and not self.transfer_buffer.reserve(seq):
                break
            prefix_blocks = manager.match_prefix(seq)
            num_cached = len(prefix_blocks) * manager.block_size
            num_new = 0 if seq.remote_prefill_pending else self._chunk_size(seq.num_tokens - num_cached, budget)
            is_whole = seq.remote_prefill_pending or num_cached + num_new == seq.num_tokens
            if not (is_whole or self.config.enable_chunked_prefill):
                break
            taken = self._num_blocks_ahead(seq) - len(prefix_blocks) + manager.num_idle(prefix_blocks)
            if taken > room:
                break
            room -= taken
            budget -= num_new
            self._waiting.popleft()
            insort(self._running, seq, key=_by_arrival)
            self._count_hits(seq, num_cached)
            if seq.remote_prefill_pending:
                seq.status = SequenceStatus.LOADING
                self._allocate(seq, seq.num_prompt_tokens, prefix_blocks)
                continue
            seq.status = SequenceStatus.RUNNING
            self._allocate(seq, num_cached + num_new, prefix_blocks)
            scheduled.append(_scheduled(seq, num_cached + num_new))

    def _accept(self, seq: Sequence, part: ScheduledSequence, tokens: list[int]) -> int:
        """Append the accepted tokens; returns how many draft tokens were rejected."""
        drafts = part.token_ids[len(part.token_ids) - part.num_logits + 1 :]
        assert 1 <= len(tokens) <= part.num_logits, f"sequence {seq.seq_id} gets {len(tokens)} of {part.num_logits}"
        assert tokens[:-1] == drafts[: len(tokens) - 1], f"sequence {seq.seq_id} accepts what was no draft"
        seq.output_token_ids.extend(tokens)
        assert seq.num_output_tokens <= seq.max_tokens, f"sequence {seq.seq_id} exceeds max_tokens={seq.max_tokens}"
        return part.num_logits - len(tokens)

    def _allocate(self, seq: Sequence, num_tokens: int, prefix_blocks: list[int] | None = None) -> None:
        self.num_evicted_blocks += len(self.block_manager.allocate(seq, num_tokens, prefix_blocks))

    def _num_blocks_ahead(self, seq: Sequence) -> int:
        """Blocks that `seq` lacks for its known tokens and one more, if it can have one more."""
        return self._num_blocks_lacking(seq, min(seq.num_tokens + 1, seq.max_positions))

    def _num_blocks_lacking(self, seq: Sequence, num_positions: int) -> int:
        """Blocks to allocate for positions `[0, num_positions)`; rejected drafts may have left more than these."""
        return max(0, self.block_manager.num_blocks_for(num_positions) - len(seq.block_table))

    def _count_hits(self, seq: Sequence, num_cached: int) -> None:
        if self.block_manager.enable_prefix_caching and not seq.prompt_logits_pending:
            self.prefix_cache_queries += seq.num_tokens
            self.prefix_cache_hits += num_cached
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = min(num_cached, seq.num_prompt_tokens)

    def _remove_running(self, seq: Sequence) -> None:
        index = bisect_left(self._running, seq.arrival, key=_by_arrival)
        assert self._running[index] is seq, f"sequence {seq.seq_id} is not where its arrival puts it"
        del self._running[index]


def _scheduled(seq: Sequence, end: int) -> ScheduledSequence:
    """Positions `[num_computed_tokens, end)` of `seq`, whose blocks are allocated."""
    start = seq.num_computed_tokens
    pending = end - max(start, seq.num_delivered_prompt_logits) if seq.prompt_logits_pending else 0
    return ScheduledSequence(
        seq.seq_id,
        start,
        seq.slice(start, end),
        list(seq.block_table),
        seq.num_prompt_tokens,
        num_logits=int(end == seq.num_tokens),
        num_prompt_logits=max(0, pending),
    )
