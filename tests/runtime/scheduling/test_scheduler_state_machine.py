"""Random requests against random limits: every one finishes, and every record it reads is the one it should read.

The cache is simulated: the record of a position is its whole history (salt, tokens and roles up to it), so that a block
shared too early, too late, too widely or overwritten while in use shows up as a wrong record.
"""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from shoal.runtime.scheduling.batch import Batch, ScheduledSequence
from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from shoal.runtime.scheduling.sequence import Sequence, SequenceStatus
from shoal.runtime.scheduling.transfer_buffer import TransferBuffer

pytestmark = pytest.mark.slow

Record = tuple[bytes, tuple[int, ...], int]


@dataclass(slots=True)
class Life:
    """What the machine knows about a sequence, apart from the scheduler."""

    seq: Sequence
    num_computed: int | None = None
    """Positions computed, loaded or hit since the last preemption; None before a life has blocks."""
    num_reserved: int = 0
    """Positions that got blocks at once because their records were to be loaded."""
    num_prompt_logits: int = 0

    num_preemptions: int = 0

    def preempted(self) -> None:
        self.num_preemptions += 1
        self.num_computed = None
        self.num_reserved = 0

    @property
    def prompt_logits_missing(self) -> bool:
        return self.seq.needs_prompt_logits and self.num_prompt_logits < self.seq.num_prompt_tokens


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 16),
        chunking=st.one_of(st.none(), st.integers(1, 5), st.just("whole")),
        prefix_caching=st.sampled_from([True, True, False]),
        max_transfer_tokens=st.one_of(st.none(), st.integers(1, 20)),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        chunking: int | str | None,
        prefix_caching: bool,
        max_transfer_tokens: int | None,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_chunked_prefill=chunking != "whole",
            max_chunk_size=chunking if isinstance(chunking, int) else None,
        )
        self.manager = BlockManager(
            num_blocks, block_size, enable_prefix_caching=prefix_caching, fingerprint=b"state machine"
        )
        self.buffer = TransferBuffer(max_transfer_tokens)
        self.scheduler = Scheduler(self.config, self.manager, self.buffer)
        self.records: dict[int, Record] = {}
        self.lives: dict[int, Life] = {}
        self.exported: list[Sequence] = []
        self.num_added = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_tokens=st.integers(1, 8),
        num_generated=st.sampled_from([0, 0, 0, 2]),
        salt=st.sampled_from([b"", b"", b"", b"salt"]),
        needs_prompt_logits=st.sampled_from([False, False, False, True]),
        handoff=st.sampled_from(["", "", "export", "load"]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        num_generated: int,
        salt: bytes,
        needs_prompt_logits: bool,
        handoff: str,
    ) -> None:
        remote_prefill_pending = handoff == "load" and self.config.enable_chunked_prefill
        if remote_prefill_pending:
            num_generated, needs_prompt_logits = 0, False
        seq = Sequence(
            seq_id=self.num_added,
            prompt_token_ids=prompt,
            max_tokens=max_tokens + num_generated,
            output_token_ids=[0] * num_generated,
            salt=salt,
            needs_prompt_logits=needs_prompt_logits,
            remote_prefill_pending=remote_prefill_pending,
            remote_decode=handoff == "export",
        )
        self.num_added += 1
        num_positions = len(prompt) + num_generated + max_tokens - 1
        fits = num_positions <= self.manager.num_blocks * self.manager.block_size
        if not self.config.enable_chunked_prefill:
            fits = fits and num_positions <= self.config.max_num_batched_tokens
        try:
            self.scheduler.add(seq)
        except ValueError:
            assert not fits
        else:
            assert fits
            self.lives[seq.seq_id] = Life(seq)

    @rule()
    def step(self) -> None:
        self.update(self.schedule())

    @rule(data=st.data())
    def step_with_drafts(self, data: st.DataObject) -> None:
        """As speculative decoding does: guessed tokens follow the last known one, some of them right."""
        batch = self.schedule()
        self.update(Batch([self.draft(part, data) for part in batch.sequences]))

    @rule(data=st.data(), whole=st.booleans())
    def records_arrive(self, data: st.DataObject, whole: bool) -> None:
        """Receive part of a loading sequence's KV, without its last position, or all of it, then a token."""
        loading = [i for i, life in self.lives.items() if life.seq.status is SequenceStatus.LOADING]
        if not loading:
            return
        seq = self.lives[data.draw(st.sampled_from(loading))].seq
        last = seq.num_prompt_tokens - 1
        begin = seq.num_computed_tokens
        end = last + 1 if whole else data.draw(st.integers(min(begin, last), last))
        self.check_records(seq.seq_id, seq.block_table, 0, begin)
        for position in range(begin, end):
            assert self.manager.pool.ref_count(seq.block_table[position // self.manager.block_size]) == 1
            self.records[self.slot(seq.block_table, position)] = record(seq, position)
        if end > begin:
            self.scheduler.mark_received(seq.seq_id, end)
            self.lives[seq.seq_id].num_computed = end
        if whole:
            self.begin(seq, [1])

    @rule(data=st.data(), tokens=st.sampled_from([[], [0], [1, 0]]))
    def records_do_not_arrive(self, data: st.DataObject, tokens: list[int]) -> None:
        awaiting = [i for i, life in self.lives.items() if life.seq.remote_prefill_pending]
        if awaiting:
            seq = self.lives[data.draw(st.sampled_from(awaiting))].seq
            self.begin(seq, tokens[: seq.max_tokens - 1])

    def begin(self, seq: Sequence, tokens: list[int]) -> None:
        """Start it; one whose tokens are all there by then is finished, as nothing is left to compute."""
        loading = seq.status is SequenceStatus.LOADING
        self.scheduler.resume(seq.seq_id, tokens)
        if seq.num_output_tokens == seq.max_tokens:
            self.scheduler.finish(seq.seq_id)
            self.forget(seq.seq_id)
        elif loading:
            self.lives[seq.seq_id].num_reserved = seq.num_prompt_tokens

    @rule(data=st.data())
    def exported_records_are_read(self, data: st.DataObject) -> None:
        if self.exported:
            self.buffer.release(self.exported.pop(data.draw(st.integers(0, len(self.exported) - 1))))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), action=st.sampled_from(["abort", "discard", "preempt"]))
    def step_interrupted(self, data: st.DataObject, action: str) -> None:
        batch = self.schedule()
        self.interrupt(data, action)
        self.update(batch)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), action=st.sampled_from(["abort", "discard", "preempt"]))
    def interrupt(self, data: st.DataObject, action: str) -> None:
        if action == "preempt":
            running = [i for i, life in self.lives.items() if life.seq.status is not SequenceStatus.WAITING]
            if running:
                seq_id = data.draw(st.sampled_from(running))
                self.scheduler.preempt(seq_id)
                self.lives[seq_id].preempted()
            return
        seq_id = data.draw(st.sampled_from(sorted(self.lives)))
        if action == "abort":
            assert self.scheduler.abort(seq_id)
        else:
            self.scheduler.finish(seq_id, discard=True)
        self.forget(seq_id)

    def forget(self, seq_id: int) -> None:
        seq = self.lives.pop(seq_id).seq
        if seq.remote_decode:
            self.exported.append(seq)

    @invariant()
    def blocks_and_counts_agree(self) -> None:
        self.manager.check_integrity()
        statuses = [life.seq.status for life in self.lives.values()]
        admitted = statuses.count(SequenceStatus.RUNNING) + statuses.count(SequenceStatus.LOADING)
        assert self.scheduler.num_running == admitted <= self.config.max_num_seqs
        admitted_or_sent = [life.seq for life in self.lives.values()] + self.exported
        exporting = [s for s in admitted_or_sent if self.buffer.holds(s.seq_id)]
        assert self.buffer.num_tokens == sum(s.num_prompt_tokens for s in exporting)
        limit = self.buffer.max_tokens
        assert limit is None or self.buffer.num_tokens <= limit or len(exporting) == 1
        assert self.scheduler.num_waiting == statuses.count(SequenceStatus.WAITING)
        assert self.scheduler.has_unfinished == bool(self.lives)
        assert self.scheduler.prefix_cache_hits <= self.scheduler.prefix_cache_queries

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for seq in self.exported:
            self.buffer.release(seq)
        self.exported.clear()
        for life in [life for life in self.lives.values() if life.seq.remote_prefill_pending]:
            self.begin(life.seq, [])
        # Without interruptions the oldest running sequence is never preempted and computes a position or more a step.
        num_steps = sum(life.seq.max_positions for life in self.lives.values())
        for _ in range(num_steps):
            self.step()
            for seq in self.exported:
                self.buffer.release(seq)
            self.exported.clear()
            self.blocks_and_counts_agree()
        assert not self.lives, f"{len(self.lives)} sequences did not finish in {num_steps} steps"
        assert self.manager.num_free_blocks == self.manager.num_blocks

    def schedule(self) -> Batch:
        """Schedule, check the decision, and run it on the simulated cache."""
        running = [i for i, life in self.lives.items() if life.seq.status is SequenceStatus.RUNNING]
        batch = self.scheduler.schedule()
        for life in self.lives.values():
            # Room may be taken from a sequence that then fits again, as its blocks were left in the prefix cache.
            while life.num_preemptions < life.seq.num_preemptions:
                life.preempted()
            if life.seq.status is SequenceStatus.LOADING and life.num_computed is None:
                life.num_computed = life.seq.num_computed_tokens
                self.check_begin(life, life.num_computed)
                self.check_records(life.seq.seq_id, life.seq.block_table, 0, life.num_computed)
        held_up = self.exported or any(life.seq.remote_prefill_pending for life in self.lives.values())
        assert bool(batch.sequences) == bool(self.lives) or (held_up and not batch.sequences)
        assert not any(self.lives[part.seq_id].seq.remote_prefill_pending for part in batch.sequences)
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        order = [part.seq_id for part in batch.sequences]
        assert len(set(order)) == len(order)
        old = [i for i in order if i in running]
        new = [i for i in order if i not in running]
        assert order == sorted(old) + sorted(new)
        if new:
            assert max(new) < min((i for i, life in self.lives.items() if life.seq.block_table == []), default=2**63)
        # Every record that a step builds on was written before it, or belongs to the sequence's own chunk.
        for part in batch.sequences:
            self.check_records(part.seq_id, part.block_table, 0, part.start)
        for part in batch.sequences:
            seq = self.lives[part.seq_id].seq
            end = part.start + len(part.token_ids)
            self.check_chunk(self.lives[part.seq_id], part.start, end, part.num_prompt_logits or part.num_logits)
            assert part.token_ids == seq.token_ids[part.start : end]
            assert part.block_table == seq.block_table
            reserved = self.lives[part.seq_id].num_reserved
            assert len(part.block_table) == self.manager.num_blocks_for(max(end, reserved))
            for position in range(part.start, end):
                assert self.manager.pool.ref_count(part.block_table[position // self.manager.block_size]) == 1
                self.records[self.slot(part.block_table, position)] = record(seq, position)
        for part in batch.sequences:
            self.check_records(part.seq_id, part.block_table, 0, part.start + len(part.token_ids))
        return batch

    def draft(self, part: ScheduledSequence, data: st.DataObject) -> ScheduledSequence:
        """The same part with drafts, where blocks are free; their records are those of the guessed history."""
        seq = self.lives[part.seq_id].seq
        end = part.start + len(part.token_ids)
        most = min(3, seq.max_positions - end) if part.num_logits else 0
        drafts = data.draw(st.lists(st.integers(0, 1), max_size=most))
        num_blocks = self.manager.num_blocks_for(end + len(drafts)) - len(seq.block_table)
        if not drafts or num_blocks > self.manager.num_free_blocks:
            return part
        self.manager.allocate(seq, end + len(drafts))
        self.lives[part.seq_id].num_reserved = max(self.lives[part.seq_id].num_reserved, end + len(drafts))
        guessed = seq.token_ids + drafts
        for position in range(end, end + len(drafts)):
            self.records[self.slot(seq.block_table, position)] = (
                seq.salt,
                tuple(guessed[: position + 1]),
                seq.num_prompt_tokens,
            )
        return replace(part, token_ids=part.token_ids + drafts, num_logits=1 + len(drafts))

    def check_chunk(self, life: Life, start: int, end: int, num_logits: int) -> None:
        """The chunk goes on where the last one of this life ended, and asks for the logits that are missing."""
        seq = life.seq
        assert start < end <= seq.num_tokens
        if life.num_computed is None:
            self.check_begin(life, start)
        else:
            assert start == life.num_computed
        if self.config.max_chunk_size is not None:
            assert end - start <= self.config.max_chunk_size
        if not self.config.enable_chunked_prefill:
            assert end == seq.num_tokens
        if life.prompt_logits_missing:
            assert num_logits == len(range(max(start, life.num_prompt_logits), end))
        else:
            assert num_logits == (1 if end == seq.num_tokens else 0)

    def check_begin(self, life: Life, start: int) -> None:
        """A life begins at its first position, or after blocks from the prefix cache."""
        assert start % self.manager.block_size == 0
        assert start == 0 or (self.manager.enable_prefix_caching and not life.prompt_logits_missing)

    def update(self, batch: Batch) -> None:
        sampled: dict[int, list[int]] = {}
        for part in batch.sequences:
            life = self.lives.get(part.seq_id)
            if life is None or life.seq.status is SequenceStatus.WAITING:
                continue
            end = part.start + len(part.token_ids)
            if part.num_logits:
                drafts = part.token_ids[len(part.token_ids) - part.num_logits + 1 :]
                sampled[part.seq_id] = accepted(life.seq.token_ids, drafts)
                end -= part.num_logits - len(sampled[part.seq_id])
            life.num_computed = end
            life.num_prompt_logits = max(life.num_prompt_logits, min(end, life.seq.num_prompt_tokens))
        num_tokens = {i: life.seq.num_tokens for i, life in self.lives.items()}
        self.scheduler.update(batch, sampled)
        for seq_id, life in list(self.lives.items()):
            assert life.seq.num_tokens == num_tokens[seq_id] + len(sampled.get(seq_id, []))
            assert life.seq.num_computed_tokens == (life.num_computed or 0)
            if life.seq.num_output_tokens == life.seq.max_tokens:
                self.scheduler.finish(seq_id)
                self.forget(seq_id)

    def check_records(self, seq_id: int, block_table: list[int], start: int, end: int) -> None:
        seq = self.lives[seq_id].seq
        for position in range(start, end):
            found = self.records.get(self.slot(block_table, position))
            assert found == record(seq, position), f"sequence {seq_id} reads a wrong record at position {position}"

    def slot(self, block_table: list[int], position: int) -> int:
        size = self.manager.block_size
        return block_table[position // size] * size + position % size


def accepted(tokens: list[int], drafts: list[int]) -> list[int]:
    """The tokens that follow, up to the first one that is not the draft in its place."""
    new: list[int] = []
    while len(new) <= len(drafts) and new == drafts[: len(new)]:
        new.append(sum(tokens + new) % 3 % 2)
    return new


def record(seq: Sequence, position: int) -> Record:
    """The history of a position: salt, tokens up to it, and how many of those are prompt tokens."""
    return seq.salt, tuple(seq.token_ids[: position + 1]), min(position + 1, seq.num_prompt_tokens)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
