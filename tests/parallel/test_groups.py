from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from shoal.parallel import groups as groups_module
from shoal.parallel.collectives import CollectiveError
from shoal.parallel.config import ParallelConfig
from shoal.parallel.groups import create_groups, init_groups, single_process_groups
from tests.support.spawn import run_ranks

LAYOUTS = [(2, 2), (4, 1), (1, 4), (2, 2), (1, 2), (2, 1)]


def join_layouts(rank: int, store: Store) -> list[Any]:
    """Every layout, in a new epoch of one store: what this rank is and whom it hears; None where it has no part."""
    found: list[Any] = []
    for epoch, (tp, dp) in enumerate(LAYOUTS):
        if rank >= tp * dp:
            found.append(None)
            continue
        config = ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)
        groups = init_groups(config, rank, store, epoch=epoch, hostname="127.0.0.1")
        groups.set_step(9)
        assert groups.world.step == groups.tp.step == 9
        assert groups.world.epoch == groups.tp.epoch == epoch
        in_tp = [row[0] for row in groups.tp.all_gather_ints([rank], layer=-1, op="hello")]
        in_world = [row[0] for row in groups.world.all_gather_ints([rank], layer=-1, op="hello")]
        sizes = (groups.tp.rank, groups.tp.size, groups.world.rank, groups.world.size, groups.local_world_size)
        found.append((groups.dp_rank, groups.tp_rank, groups.is_leader, groups.leader_rank, in_tp, in_world, sizes))
    return found


def test_ranks_find_their_groups_in_every_epoch() -> None:
    results = run_ranks(join_layouts, 4, timeout_s=600)
    for index, (tp, dp) in enumerate(LAYOUTS):
        world = list(range(tp * dp))
        for rank in range(4):
            leader = rank // tp * tp
            expected = (
                rank // tp,
                rank % tp,
                rank % tp == 0,
                leader,
                list(range(leader, leader + tp)),
                world,
                (rank % tp, tp, rank, tp * dp, tp * dp),
            )
            assert results[rank][index] == (expected if rank < tp * dp else None)


def survive(rank: int, store: Store) -> list[int]:
    """Ranks 0 to 2 until rank 2 is killed in the middle of a collective; process 3 then takes its place."""
    config = ParallelConfig(data_parallel_size=3)
    if rank == 3:
        store.wait(["left/0", "left/1"], timedelta(seconds=30))
        groups = create_groups(config, 2, local_world_size=3)
        with pytest.raises(CollectiveError, match="it was never formed"):
            groups.world.all_gather_ints([rank], layer=-1, op="too early")
        groups.join(store, 1)
        return [row[0] for row in groups.world.all_gather_ints([rank], layer=-1, op="after")]
    groups = init_groups(config, rank, store)
    for number in range(100):
        if rank == 2 and number == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            groups.world.all_gather_ints([number], layer=-1, op="before")
        except CollectiveError:
            break
    else:
        raise AssertionError("the group went on without rank 2")
    store.set(f"left/{rank}", "")
    groups.join(store, 1)
    groups.abort("an abort of the epoch before", epoch=0)
    return [row[0] for row in groups.world.all_gather_ints([rank], layer=-1, op="after")]


def test_survivors_of_a_killed_rank_go_on_with_a_new_one() -> None:
    results = run_ranks(survive, 4, timeout_s=600, may_die=(2,))
    assert results == [[0, 1, 3], [0, 1, 3], None, [0, 1, 3]]


def give_up(rank: int, store: Store) -> float:
    if rank == 1:
        return 0.0
    begin = time.monotonic()
    with pytest.raises(CollectiveError, match="waiting for the other ranks was given up"):
        init_groups(ParallelConfig(data_parallel_size=2), rank, store, stop=lambda: time.monotonic() - begin > 0.2)
    return time.monotonic() - begin


def test_a_rank_stops_waiting_for_peers_that_will_not_come() -> None:
    waited, _ = run_ranks(give_up, 2, timeout_s=600)
    assert 0.2 < waited < 10


def test_single_process_groups() -> None:
    groups = single_process_groups()
    assert (groups.rank, groups.dp_rank, groups.tp_rank, groups.is_leader, groups.local_world_size) == (
        0,
        0,
        0,
        True,
        1,
    )
    assert groups.world.size == groups.tp.size == 1
    assert groups.device == torch.device("cpu")
    assert groups.tp.all_gather_ints([3], layer=-1, op="x") == [[3]]


def test_a_layout_of_one_rank_needs_no_peers() -> None:
    groups = init_groups(ParallelConfig(), 0, HashStore(), epoch=3)
    assert groups.world.size == groups.tp.size == 1
    assert groups.world.epoch == 3


def test_a_rank_outside_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not in a layout of 2 ranks; use 0 to 1"):
        init_groups(ParallelConfig(data_parallel_size=2), 2, HashStore())


def test_peers_that_do_not_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "MIN_CREATION_TIMEOUT_S", 0.3)
    with pytest.raises(CollectiveError, match=r"rank 0 could not form group 'world' of ranks \[0, 1\] in epoch 7"):
        init_groups(ParallelConfig(data_parallel_size=2), 0, HashStore(), epoch=7, timeout_s=0.1)


def test_ranks_need_the_same_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "MIN_CREATION_TIMEOUT_S", 1.0)

    def join(secrets: list[bytes]) -> list[str]:
        config, store = ParallelConfig(data_parallel_size=2), HashStore()

        def one(rank: int) -> str:
            try:
                return str(init_groups(config, rank, store, timeout_s=1.0, secret=secrets[rank]).world.size)
            except CollectiveError as error:
                return str(error)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(one, range(2)))

    assert join([b"ours", b"ours"]) == ["2", "2"]
    first, second = join([b"ours", b"theirs"])
    assert "rank 0 could not form group 'world'" in first
    assert "lost a connection" in second
