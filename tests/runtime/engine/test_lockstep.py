"""What one rank tells the others before a step, and what it makes of their answers; the simulation runs them all."""

from __future__ import annotations

from typing import Any, cast

import pytest

from shoal.parallel.config import ParallelConfig
from shoal.runtime.engine.lockstep import Lockstep, StepAgreement
from shoal.runtime.scheduling.batch import EMPTY_BATCH, Batch, ScheduledSequence

BATCH = Batch([ScheduledSequence(0, 4, [9], [1, 2], 4, num_logits=1)])


class Peers:
    """Rank 0 of three attention groups, as much of `ParallelGroups` as `Lockstep` uses; the others say `rows`."""

    def __init__(self, *rows: list[int], size: int = 3) -> None:
        self.config = ParallelConfig(data_parallel_size=size)
        self.rank = self.leader_rank = self.epoch = 0
        self.is_leader = True
        self.size = size
        self.world = self
        self.tp = Peers(size=1) if size > 1 else self
        self.rows = list(rows)
        self.said: list[tuple[str, list[int]]] = []

    def all_gather_ints(self, row: list[int], *, layer: int, op: str) -> list[list[int]]:
        self.said.append((op, row))
        return [row, *self.rows]


def lockstep(groups: Peers) -> Lockstep:
    return Lockstep(cast(Any, groups))


def test_a_rank_without_peers_asks_nobody() -> None:
    alone = lockstep(groups := Peers(size=1))
    assert alone.agree(BATCH, 2) == StepAgreement(BATCH, idle=False, stopped=False, num_prompt_slices=2)
    assert alone.agree(EMPTY_BATCH, 0).idle
    assert not alone.is_asleep
    alone.request_stop()
    assert alone.agree(BATCH, 0).stopped
    assert groups.said == []


def test_a_step_runs_if_any_rank_has_work_with_the_most_slices_of_any() -> None:
    mine = lockstep(groups := Peers([0, 0, 0], [77, 0, 3]))
    assert mine.agree(EMPTY_BATCH, 1) == StepAgreement(EMPTY_BATCH, idle=False, stopped=False, num_prompt_slices=3)
    assert groups.said == [("engine.agree", [0, 0, 1])]
    assert mine.agree(BATCH, 5).num_prompt_slices == 5
    assert groups.said[1] == ("engine.agree", [len(BATCH.pack()), 0, 5])


@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_if_any_rank_wants_to(rank: int) -> None:
    mine = lockstep(Peers([3, int(rank == 1), 0], [0, 0, 0]))
    if rank == 0:
        mine.request_stop()
    agreed = mine.agree(BATCH, 0)
    assert agreed.stopped
    assert not agreed.runs


def test_an_idle_replica_wakes_together_and_runs_in_the_step_after() -> None:
    mine = lockstep(groups := Peers([0, 0], [0, 0]))
    assert mine.is_asleep, "nothing is known of anybody's work"
    assert mine.wake(False) == StepAgreement(EMPTY_BATCH, idle=True, stopped=False)
    assert mine.is_asleep
    groups.rows = [[0, 0], [1, 0]]
    woken = mine.wake(False)
    assert (woken.woke, woken.idle, woken.runs) == (True, False, False)
    assert not mine.is_asleep
    assert groups.said == [("engine.wake", [0, 0])] * 2


def test_ranks_ask_whether_anybody_has_work_after_a_step_in_which_nobody_had() -> None:
    mine = lockstep(groups := Peers([4, 0, 0], [4, 0, 0]))
    mine.agree(EMPTY_BATCH, 0)
    assert not mine.is_asleep
    groups.rows = [[0, 0, 0], [0, 0, 0]]
    assert mine.agree(EMPTY_BATCH, 0).idle
    assert mine.is_asleep


def test_a_group_loses_its_kv_with_one_of_its_ranks_only() -> None:
    mine = lockstep(Peers())
    assert mine.rejoin([0])
    assert not mine.rejoin([1, 2])
    assert mine.is_asleep
