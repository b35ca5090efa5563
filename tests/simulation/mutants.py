"""Defects to put in on purpose: whoever looks for defects must see them, or proves nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from msgspec.structs import force_setattr

from shoal.cluster.jobs.journal import Journal, ProgressRecord, Record
from shoal.cluster.routing.request_router import RequestRouter
from shoal.cluster.supervision import membership
from shoal.parallel import kv_transport
from shoal.runtime import response
from shoal.runtime.engine.engine import Engine
from shoal.runtime.kv_cache import receiver
from shoal.runtime.kv_cache.receiver import KVReceiver
from shoal.runtime.kv_cache.sender import KVSender
from shoal.runtime.scheduling.block_manager import BlockManager, Eviction
from shoal.runtime.scheduling.scheduler import Scheduler
from shoal.runtime.scheduling.sequence import Sequence

Patch = pytest.MonkeyPatch


def records_are_not_checked(patch: Patch) -> None:
    patch.setattr(kv_transport, "check_payload", lambda chunk, payload: None)


def a_preempted_load_goes_on(patch: Patch) -> None:
    def restart(load: Any) -> None:
        load.num_preemptions = load.seq.num_preemptions

    patch.setattr(receiver._Load, "restart", restart)


def records_count_before_they_are_written(patch: Patch) -> None:
    commit = KVReceiver.commit

    def early(receiving: KVReceiver) -> None:
        for planned in receiving._planned:
            if planned.write.end < planned.load.seq.num_prompt_tokens:
                force_setattr(planned.write, "end", planned.write.end + 1)
        commit(receiving)

    patch.setattr(KVReceiver, "commit", early)


def an_export_is_released_when_it_is_complete(patch: Patch) -> None:
    patch.setattr(KVSender, "start_lease", KVSender.release)


def an_export_is_never_released(patch: Patch) -> None:
    patch.setattr(KVSender, "release", lambda sender, request_id: None)


def what_was_generated_is_forgotten_when_the_prefill_fails(patch: Patch) -> None:
    resume = Scheduler.resume

    def begin(scheduler: Scheduler, seq_id: int, output_token_ids: list[int]) -> None:
        whole = scheduler._sequences[seq_id].num_computed_tokens >= scheduler._sequences[seq_id].num_prompt_tokens
        resume(scheduler, seq_id, output_token_ids if whole else [])

    patch.setattr(Scheduler, "resume", begin)


def a_new_rank_finds_the_old_records(patch: Patch) -> None:
    def rejoin(engine: Engine, replaced: Collection[int]) -> None:
        engine.lockstep.rejoin(())

    patch.setattr(Engine, "rejoin", rejoin)


def nobody_is_told_who_was_replaced(patch: Patch) -> None:
    join = membership.Membership._join

    def forgetful(members: membership.Membership) -> list[membership.Action]:
        members._replaced.clear()
        return join(members)

    patch.setattr(membership.Membership, "_join", forgetful)


def what_is_known_is_told_again(patch: Patch) -> None:
    patch.setattr(response, "_after", lambda tokens, num_tokens, num_chars: tokens)


def a_lost_group_keeps_its_requests(patch: Patch) -> None:
    def lose(router: RequestRouter, group: int) -> list[Any]:
        router._groups[group].alive = False
        return []

    patch.setattr(RequestRouter, "lose", lose)


def blocks_are_free_while_they_are_read(patch: Patch) -> None:
    allocate = BlockManager.allocate

    def greedy(
        manager: BlockManager, seq: Sequence, num_tokens: int, prefix_blocks: list[int] | None = None
    ) -> list[Eviction]:
        evictions = allocate(manager, seq, num_tokens, prefix_blocks)
        manager.pool._free.extend(prefix_blocks or ())
        return evictions

    patch.setattr(BlockManager, "allocate", greedy)


def what_failed_counts_as_computed(patch: Patch) -> None:
    schedule = Scheduler.schedule

    def early(scheduler: Scheduler) -> Any:
        batch = schedule(scheduler)
        for part in batch.sequences:
            seq = scheduler._sequences[part.seq_id]
            if not part.num_logits:
                scheduler.block_manager.mark_computed(seq, part.start + len(part.token_ids))
        return batch

    update = Scheduler.update

    def late(scheduler: Scheduler, batch: Any, sampled: Any) -> None:
        for part in batch.sequences:
            seq = scheduler._sequences.get(part.seq_id)
            if seq is not None and not part.num_logits:
                seq.num_computed_tokens = part.start
        update(scheduler, batch, sampled)

    patch.setattr(Scheduler, "schedule", early)
    patch.setattr(Scheduler, "update", late)


def progress_is_journalled_twice(patch: Patch) -> None:
    append = Journal.append

    def twice(journal: Journal, records: list[Record]) -> None:
        append(journal, [*records, *[r for r in records if isinstance(r, ProgressRecord)]])

    patch.setattr(Journal, "append", twice)
