from __future__ import annotations

import pytest
from msgspec.structs import replace

from shoal.runtime.scheduling.batch import EMPTY_BATCH, Batch
from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from shoal.runtime.scheduling.sequence import Sequence, SequenceStatus


def make_scheduler(
    *,
    num_blocks: int = 16,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    enable_chunked_prefill: bool = True,
    max_chunk_size: int | None = None,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        max_chunk_size=max_chunk_size,
    )
    manager = BlockManager(num_blocks, 4, enable_prefix_caching=enable_prefix_caching, fingerprint=b"model")
    return Scheduler(config, manager)


def make_seq(
    seq_id: int,
    num_prompt_tokens: int,
    max_tokens: int = 8,
    *,
    token: int | None = None,
    needs_prompt_logits: bool = False,
    output_token_ids: list[int] | None = None,
) -> Sequence:
    """A prompt of one repeated token, by default one that no other sequence has."""
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=[100 + seq_id if token is None else token] * num_prompt_tokens,
        max_tokens=max_tokens,
        needs_prompt_logits=needs_prompt_logits,
        output_token_ids=output_token_ids or [],
    )


def shape(batch: Batch) -> list[tuple[int, int, int, int]]:
    """(sequence, start, number of tokens, number of logits) of every part."""
    return [(s.seq_id, s.start, len(s.token_ids), s.num_prompt_logits or s.num_logits) for s in batch.sequences]


def step(scheduler: Scheduler, token: int = 7) -> list[tuple[int, int, int, int]]:
    batch = scheduler.schedule()
    scheduler.update(batch, {s.seq_id: [token] for s in batch.sequences})
    scheduler.block_manager.check_integrity()
    return shape(batch)


def test_the_budget_is_split_across_chunks_running_first_then_waiting() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make_seq(0, 12))
    scheduler.add(make_seq(1, 5))
    scheduler.add(make_seq(2, 3))
    assert step(scheduler) == [(0, 0, 10, 0)]
    assert step(scheduler) == [(0, 10, 2, 1), (1, 0, 5, 1), (2, 0, 3, 1)]
    assert step(scheduler) == [(0, 12, 1, 1), (1, 5, 1, 1), (2, 3, 1, 1)]
    scheduler.add(make_seq(3, 20))
    assert step(scheduler) == [(0, 13, 1, 1), (1, 6, 1, 1), (2, 4, 1, 1), (3, 0, 7, 0)]
    scheduler.finish(1)
    assert step(scheduler) == [(0, 14, 1, 1), (2, 5, 1, 1), (3, 7, 8, 0)]


def test_the_chunk_size_bounds_every_sequence() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, max_chunk_size=3)
    scheduler.add(make_seq(0, 7))
    scheduler.add(make_seq(1, 4))
    scheduler.add(make_seq(2, 9))
    assert step(scheduler) == [(0, 0, 3, 0), (1, 0, 3, 0), (2, 0, 2, 0)]
    assert step(scheduler) == [(0, 3, 3, 0), (1, 3, 1, 1), (2, 2, 3, 0)]
    assert step(scheduler) == [(0, 6, 1, 1), (1, 4, 1, 1), (2, 5, 3, 0)]


def test_without_chunked_prefill_a_prompt_is_scheduled_whole_and_nobody_overtakes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20, enable_chunked_prefill=False)
    scheduler.add(make_seq(0, 12))
    scheduler.add(make_seq(1, 9))
    scheduler.add(make_seq(2, 1))
    assert step(scheduler) == [(0, 0, 12, 1)]
    assert step(scheduler) == [(0, 12, 1, 1), (1, 0, 9, 1), (2, 0, 1, 1)]


def test_max_num_seqs_bounds_the_running_sequences() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id in range(3):
        scheduler.add(make_seq(seq_id, 2))
    assert step(scheduler) == [(0, 0, 2, 1), (1, 0, 2, 1)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.finish(0)
    assert step(scheduler) == [(1, 2, 1, 1), (2, 0, 2, 1)]


def test_batches_carry_tokens_and_exactly_the_blocks_they_need() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    seq = Sequence(seq_id=5, prompt_token_ids=[1, 2, 3, 4, 5, 6, 7, 8], max_tokens=3)
    scheduler.add(seq)
    tokens_and_blocks = []
    for token in (21, 22, 23, 24):
        batch = scheduler.schedule()
        tokens_and_blocks.append((batch.sequences[0].token_ids, batch.sequences[0].block_table))
        scheduler.update(batch, {5: [token]})
    assert tokens_and_blocks == [
        ([1, 2, 3, 4, 5, 6], [0, 1]),
        ([7, 8], [0, 1]),
        ([22], [0, 1, 2]),
        ([23], [0, 1, 2]),
    ]
    assert seq.output_token_ids == [22, 23, 24]
    with pytest.raises(AssertionError, match="sequence 5 has its max_tokens=3: finish it"):
        scheduler.schedule()


@pytest.mark.parametrize(
    ("num_prompt_tokens", "start", "num_tokens"),
    [(8, 4, 4), (9, 8, 1), (12, 8, 4), (13, 12, 1), (15, 12, 3)],
)
def test_hits_are_skipped_in_whole_blocks_up_to_the_last_token(
    num_prompt_tokens: int, start: int, num_tokens: int
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq(0, 13, token=1))
    assert step(scheduler) == [(0, 0, 13, 1)]
    scheduler.finish(0)
    seq = make_seq(1, num_prompt_tokens, token=1)
    scheduler.add(seq)
    assert step(scheduler) == [(1, start, num_tokens, 1)]
    assert seq.num_cached_tokens == start
    assert scheduler.prefix_cache_queries == 13 + num_prompt_tokens
    assert scheduler.prefix_cache_hits == start


def test_sequences_of_one_step_do_not_hit_each_other_but_those_of_the_next_do() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    for seq_id in range(3):
        scheduler.add(make_seq(seq_id, 9, token=1))
    assert step(scheduler) == [(0, 0, 9, 1), (1, 0, 9, 1), (2, 0, 2, 0)]
    scheduler.add(make_seq(3, 9, token=1))
    assert step(scheduler) == [(0, 9, 1, 1), (1, 9, 1, 1), (2, 2, 7, 1), (3, 8, 1, 1)]


def test_a_prompt_of_prompt_and_answer_hits_only_the_prompt_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq(0, 4, token=7))
    for _ in range(6):
        step(scheduler, token=7)
    scheduler.finish(0)
    scheduler.add(make_seq(1, 9, token=7))
    assert step(scheduler) == [(1, 4, 5, 1)]


def test_the_latest_arrivals_are_preempted_first_and_come_back_in_order() -> None:
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    scheduler.add(make_seq(0, 3, max_tokens=10))
    scheduler.add(make_seq(1, 2, max_tokens=10))
    scheduler.add(make_seq(2, 1, max_tokens=10))
    assert step(scheduler) == [(0, 0, 3, 1), (1, 0, 2, 1), (2, 0, 1, 1)]
    # One block each; sequence 0 takes the fourth for position 4, sequence 1 needs a fifth one step later.
    assert step(scheduler) == [(0, 3, 1, 1), (1, 2, 1, 1), (2, 1, 1, 1)]
    assert step(scheduler) == [(0, 4, 1, 1), (1, 3, 1, 1), (2, 2, 1, 1)]
    assert step(scheduler) == [(0, 5, 1, 1), (1, 4, 1, 1)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions) == (2, 1, 1)
    scheduler.add(make_seq(3, 1, max_tokens=1))
    assert [step(scheduler) for _ in range(2)] == [[(0, 6, 1, 1), (1, 5, 1, 1)], [(0, 7, 1, 1), (1, 6, 1, 1)]]
    assert step(scheduler) == [(0, 8, 1, 1)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions) == (1, 3, 2)
    scheduler.finish(0)
    # Sequence 1 knows 8 tokens and takes room for 9; sequence 2 knows 4 and would want 2 blocks, but one is left.
    assert step(scheduler) == [(1, 0, 8, 1)]
    scheduler.finish(1)
    assert step(scheduler) == [(2, 0, 4, 1), (3, 0, 1, 1)]


def test_a_sequence_preempts_itself_when_it_is_the_latest() -> None:
    scheduler = make_scheduler(num_blocks=3, enable_prefix_caching=False)
    scheduler.add(make_seq(0, 6, max_tokens=4))
    assert step(scheduler) == [(0, 0, 6, 1)]
    younger = make_seq(1, 2, max_tokens=6)
    scheduler.add(younger)
    assert step(scheduler) == [(0, 6, 1, 1), (1, 0, 2, 1)]
    assert step(scheduler) == [(0, 7, 1, 1), (1, 2, 1, 1)]
    scheduler.preempt(0)
    assert step(scheduler) == [(1, 3, 1, 1)]
    # The older one waits in front; it needs 3 blocks for its 9 tokens.
    assert step(scheduler) == [(1, 4, 1, 1)]
    scheduler.abort(1)
    assert step(scheduler) == [(0, 0, 9, 1)]


def test_preempted_sequences_wait_by_arrival_in_whatever_order_they_were_preempted() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    for seq_id in range(4):
        scheduler.add(make_seq(seq_id, 3))
    step(scheduler)
    for seq_id in (2, 0, 1):
        scheduler.preempt(seq_id)
    assert step(scheduler) == [(3, 3, 1, 1), (0, 0, 4, 1), (1, 0, 4, 1), (2, 0, 3, 0)]
    assert step(scheduler) == [(0, 4, 1, 1), (1, 4, 1, 1), (2, 3, 1, 1), (3, 4, 1, 1)]


def test_hits_on_idle_blocks_count_as_room_that_is_taken() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_seq(0, 9, token=1))
    step(scheduler)
    scheduler.finish(0)
    scheduler.add(make_seq(1, 5, max_tokens=2))
    scheduler.add(make_seq(2, 9, max_tokens=1, token=1))
    # Sequence 1 takes the two uncached blocks; the two idle ones are the prefix of sequence 2, which needs a third.
    assert step(scheduler) == [(1, 0, 5, 1)]
    scheduler.finish(1)
    assert step(scheduler) == [(2, 8, 1, 1)]


def test_a_preempted_sequence_recomputes_prompt_and_output_in_chunks_from_its_own_blocks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    seq = make_seq(0, 6, max_tokens=20)
    scheduler.add(seq)
    for _ in range(8):
        step(scheduler)
    assert (seq.num_computed_tokens, seq.num_output_tokens) == (12, 7)
    scheduler.preempt(0)
    assert seq.status is SequenceStatus.WAITING
    assert (seq.num_computed_tokens, seq.block_table) == (0, [])
    # Positions [0, 12) are three full blocks, the last of them [8, 12) generated; position 12 is the newest token.
    assert step(scheduler) == [(0, 12, 1, 1)]
    assert seq.num_cached_tokens == 0
    scheduler.preempt(0)
    scheduler.block_manager.free(seq, discard=True)
    assert [step(scheduler) for _ in range(3)] == [[(0, 0, 5, 0)], [(0, 5, 5, 0)], [(0, 10, 4, 1)]]


def test_generated_tokens_of_an_earlier_run_are_computed_with_the_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_seq(0, 5, max_tokens=4, output_token_ids=[1, 2]))
    assert [step(scheduler) for _ in range(2)] == [[(0, 0, 6, 0)], [(0, 6, 1, 1)]]


def test_admission_leaves_room_for_one_more_token_of_those_who_run() -> None:
    scheduler = make_scheduler(num_blocks=3)
    scheduler.add(make_seq(0, 7, max_tokens=3))
    assert step(scheduler) == [(0, 0, 7, 1)]
    scheduler.add(make_seq(1, 2, max_tokens=2))
    # Sequence 0 fills its second block now and could want the third in the next step, but no more after that.
    assert step(scheduler) == [(0, 7, 1, 1)]
    scheduler.finish(0)
    assert step(scheduler) == [(1, 0, 2, 1)]


def test_prompt_logits_are_asked_for_once() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    scheduler.add(make_seq(0, 12, token=1))
    for _ in range(3):
        step(scheduler)
    scheduler.finish(0)
    seq = make_seq(1, 12, token=1, needs_prompt_logits=True)
    scheduler.add(seq)
    queries = scheduler.prefix_cache_queries
    assert step(scheduler) == [(1, 0, 5, 5)]
    scheduler.preempt(1)
    assert step(scheduler) == [(1, 0, 5, 0)]
    assert step(scheduler) == [(1, 5, 5, 5)]
    scheduler.preempt(1)
    assert step(scheduler) == [(1, 0, 5, 0)]
    assert step(scheduler) == [(1, 5, 5, 0)]
    assert step(scheduler) == [(1, 10, 2, 2)]
    assert step(scheduler) == [(1, 12, 1, 1)]
    assert scheduler.prefix_cache_queries == queries
    scheduler.preempt(1)
    assert step(scheduler) == [(1, 12, 2, 1)]
    assert seq.num_cached_tokens == 0


def test_prompt_logits_of_a_chunk_that_was_delivered_in_part() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_seq(0, 3))
    scheduler.add(make_seq(1, 12, needs_prompt_logits=True))
    assert step(scheduler) == [(0, 0, 3, 1), (1, 0, 5, 5)]
    scheduler.preempt(1)
    scheduler.finish(0)
    assert step(scheduler) == [(1, 0, 8, 3)]


def test_what_is_finished_or_preempted_during_a_step_does_not_count() -> None:
    scheduler = make_scheduler()
    seqs = [make_seq(seq_id, 5) for seq_id in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    batch = scheduler.schedule()
    scheduler.finish(0, discard=True)
    scheduler.preempt(1)
    scheduler.update(batch, {1: [7], 2: [7]})
    assert [seq.output_token_ids for seq in seqs] == [[], [], [7]]
    assert step(scheduler) == [(2, 5, 1, 1), (1, 0, 5, 1)]


@pytest.mark.parametrize(
    ("accepted", "num_computed", "cached"),
    [
        ([21], 7, 1),  # both drafts are wrong: of position 7 nothing is known, so block 1 is not full
        ([11, 21], 8, 2),
        ([11, 12, 21], 9, 2),  # both are right
    ],
)
def test_accepted_drafts_are_computed_and_rejected_ones_are_not(
    accepted: list[int], num_computed: int, cached: int
) -> None:
    scheduler = make_scheduler()
    seq = Sequence(seq_id=0, prompt_token_ids=[1, 2, 3, 4, 5, 6], max_tokens=5)
    scheduler.add(seq)
    step(scheduler)
    (part,) = scheduler.schedule().sequences
    assert (part.start, part.token_ids, part.num_logits) == (6, [7], 1)
    scheduler.block_manager.allocate(seq, 9)
    batch = Batch([replace(part, token_ids=[7, 11, 12], num_logits=3)])
    scheduler.update(batch, {0: accepted})
    scheduler.block_manager.check_integrity()
    assert seq.output_token_ids == [7, *accepted]
    assert seq.num_computed_tokens == num_computed
    assert scheduler.block_manager.num_cached_blocks == cached
    assert step(scheduler) == [(0, num_computed, 1, 1)], "the last token is computed next, over the rejected draft"
    assert seq.block_table == [0, 1, 2]


def test_tokens_beyond_the_drafts_or_max_tokens_are_an_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(Sequence(seq_id=0, prompt_token_ids=[1], max_tokens=2))
    (part,) = scheduler.schedule().sequences
    with pytest.raises(AssertionError, match="sequence 0 gets 2 of 1"):
        scheduler.update(Batch([part]), {0: [7, 8]})
    with pytest.raises(AssertionError, match="accepts what was no draft"):
        scheduler.update(Batch([replace(part, token_ids=[1, 7], num_logits=2)]), {0: [8, 9]})
    with pytest.raises(AssertionError, match="exceeds max_tokens=2"):
        scheduler.update(Batch([replace(part, token_ids=[1, 7, 8], num_logits=3)]), {0: [7, 8, 9]})


def test_a_missing_token_is_an_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq(4, 5))
    with pytest.raises(KeyError, match="4"):
        scheduler.update(scheduler.schedule(), {})


def test_broken_results_leave_the_cache() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_seq(0, 9, token=1))
    step(scheduler)
    batch = scheduler.schedule()
    scheduler.finish(0, discard=True)
    scheduler.update(batch, {})
    scheduler.add(make_seq(1, 9, token=1))
    assert step(scheduler) == [(1, 0, 8, 0)]


def test_abort_works_in_every_state_and_tells_whether_it_did() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_seq(0, 5), make_seq(1, 5)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    assert scheduler.abort(1)
    assert scheduler.abort(0)
    assert not scheduler.abort(0)
    assert not scheduler.abort(9)
    assert not scheduler.has_unfinished
    assert [running.status, waiting.status] == [SequenceStatus.FINISHED] * 2
    assert scheduler.block_manager.num_free_blocks == 16
    assert scheduler.schedule() == EMPTY_BATCH


def test_a_sequence_that_fills_the_cache_exactly_is_accepted_and_finishes() -> None:
    scheduler = make_scheduler(num_blocks=3)
    seq = make_seq(0, 10, max_tokens=3)
    scheduler.add(seq)
    assert [step(scheduler) for _ in range(3)] == [[(0, 0, 10, 1)], [(0, 10, 1, 1)], [(0, 11, 1, 1)]]
    assert seq.num_output_tokens == 3
    scheduler.finish(0)
    scheduler.add(make_seq(1, 12, max_tokens=1))
    assert step(scheduler) == [(1, 0, 12, 1)]


def test_sequences_that_could_never_finish_are_refused_with_numbers() -> None:
    scheduler = make_scheduler(num_blocks=3)
    with pytest.raises(ValueError, match=r"11 prompt tokens and max_tokens=3 need 4 blocks of 4 .* has 3"):
        scheduler.add(make_seq(0, 11, max_tokens=3))
    with pytest.raises(ValueError, match="empty prompt"):
        scheduler.add(make_seq(0, 0))
    with pytest.raises(ValueError, match="starts with 2 generated tokens and max_tokens=2"):
        scheduler.add(make_seq(0, 1, max_tokens=2, output_token_ids=[1, 2]))
    assert not scheduler.has_unfinished
    scheduler.add(make_seq(0, 4))
    with pytest.raises(ValueError, match="sequence 0 is already scheduled"):
        scheduler.add(make_seq(0, 4))
    whole = make_scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False)
    whole.add(make_seq(0, 6, max_tokens=3))
    with pytest.raises(ValueError, match="up to 9 tokens at once, max_num_batched_tokens is 8"):
        whole.add(make_seq(1, 7, max_tokens=3))


def test_configurations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1, got 0"):
        SchedulerConfig(max_num_seqs=0, max_num_batched_tokens=1)
    with pytest.raises(ValueError, match="max_num_batched_tokens must be at least 1, got 0"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=0)
    with pytest.raises(ValueError, match="max_chunk_size must be at least 1, got 0"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1, max_chunk_size=0)
    with pytest.raises(ValueError, match="max_chunk_size=4 splits prompts"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8, max_chunk_size=4, enable_chunked_prefill=False)
