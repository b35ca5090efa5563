from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from shoal.parallel.config import ParallelConfig
from shoal.parallel.dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
from shoal.parallel.groups import init_groups
from shoal.parallel.placement import ExpertPlacement
from tests.support.dispatching import NUM_EXPERTS, in_out_rows, random_inputs, through
from tests.support.ops import CPU_OPS
from tests.support.spawn import barrier, run_ranks

PLACEMENTS: dict[str, Callable[[int], ExpertPlacement]] = {
    "contiguous": lambda n: ExpertPlacement.contiguous(NUM_EXPERTS, n),
    "permuted": lambda n: ExpertPlacement(NUM_EXPERTS, tuple(tuple(range(NUM_EXPERTS))[::-1][r::n] for r in range(n))),
    "copies": lambda n: ExpertPlacement(NUM_EXPERTS, tuple((r, 5, *range(NUM_EXPERTS)[r::n]) for r in range(n))),
    "one rank holds all": lambda n: ExpertPlacement(NUM_EXPERTS, (*((),) * (n - 1), tuple(range(NUM_EXPERTS)))),
}


def test_local_layout_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    topk_idx = torch.tensor([[2, 0], [0, -1], [1, 2]])
    weights = torch.tensor([[0.5, 0.25], [2.0, 100.0], [1.0, 0.5]])
    dispatcher = LocalTokenDispatcher(ExpertPlacement.contiguous(3, 1), CPU_OPS)
    tokens, handle = dispatcher.dispatch(x, topk_idx, weights, layer=0)
    # expert 0: t0 t1 | expert 1: t2 | expert 2: t0 t2
    assert tokens.x is x
    assert tokens.x_row.tolist() == [0, 1, 2, 0, 2]
    assert tokens.num_tokens_per_expert.tolist() == [2, 1, 2]
    assert handle.row_of.tolist() == [[3, 0], [1, -1], [2, 4]]
    y = torch.tensor([[4.0, 8.0], [1.0, 1.0], [10.0, 20.0], [2.0, 6.0], [8.0, 4.0]])
    assert dispatcher.combine(y, handle, layer=0)(None).tolist() == [[2, 5], [2, 2], [14, 22]]
    assert dispatcher.combine(y, handle, layer=0)(x).tolist() == [[3, 7], [5, 6], [19, 28]]


def test_local_layout_with_permuted_slots() -> None:
    x = torch.tensor([[1.0], [2.0]])
    dispatcher = LocalTokenDispatcher(ExpertPlacement(3, ((2, 0, 1),)), CPU_OPS)
    tokens, handle = dispatcher.dispatch(x, torch.tensor([[0, 1], [2, 0]]), torch.ones(2, 2), layer=0)
    assert tokens.x_row.tolist() == [1, 0, 1, 0]  # expert 2: t1 | expert 0: t0 t1 | expert 1: t0
    assert tokens.num_tokens_per_expert.tolist() == [1, 2, 1]
    assert handle.row_of.tolist() == [[1, 3], [0, 2]]


def test_local_without_tokens() -> None:
    dispatcher = LocalTokenDispatcher(ExpertPlacement.contiguous(3, 1), CPU_OPS)
    empty = (torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    tokens, handle = dispatcher.dispatch(*empty, layer=0)
    assert tokens.num_tokens_per_expert.tolist() == [0, 0, 0]
    assert dispatcher.combine(tokens.x, handle, layer=0)(None).shape == (0, 4)


def dispatch_by_hand(rank: int, store: Store) -> dict[str, Any]:
    """Rank 0 holds experts 0 1, rank 1 expert 2; H = 1."""
    comm = init_groups(ParallelConfig(data_parallel_size=2), rank, store, epoch=100).world
    buffer_bytes: list[list[int]] = []
    all_to_all_bytes = comm.all_to_all_bytes

    def recording(send_buffers: list[Tensor], *, layer: int, op: str) -> list[Tensor]:
        buffer_bytes.append([t.numel() for t in send_buffers])
        return all_to_all_bytes(send_buffers, layer=layer, op=op)

    comm.all_to_all_bytes = recording  # type: ignore[method-assign, assignment]
    dispatcher = AllToAllTokenDispatcher(ExpertPlacement.contiguous(3, 2), comm, CPU_OPS)
    x = torch.tensor([[10.0], [11.0]]) if rank == 0 else torch.tensor([[20.0], [21.0], [22.0]])
    topk_idx = torch.tensor([[1, 0], [2, -1]]) if rank == 0 else torch.tensor([[0, 2], [1, 0], [-1, -1]])
    tokens, handle = dispatcher.dispatch(x, topk_idx, torch.ones(topk_idx.shape), layer=7)
    out = dispatcher.combine(in_out_rows(tokens, tokens.x[tokens.x_row] * (rank + 1)), handle, layer=7)(None)
    assert tokens.out_row is not None
    return {
        "x": tokens.x.flatten().tolist(),
        "x_row": tokens.x_row.tolist(),
        "num_tokens_per_expert": tokens.num_tokens_per_expert.tolist(),
        "row_of": handle.row_of.tolist(),
        "out_row": tokens.out_row.tolist(),
        "num_sent": handle.num_sent,
        "num_received": handle.num_received,
        "buffer_bytes": buffer_bytes,
        "out": out.flatten().tolist(),
    }


def compare_with_local(rank: int, store: Store, world_size: int) -> list[str]:
    """The cases on this rank whose bits differ from the local dispatcher's; the number of cases comes last."""
    groups = init_groups(ParallelConfig(data_parallel_size=world_size), rank, store, epoch=world_size)
    local = LocalTokenDispatcher(ExpertPlacement.contiguous(NUM_EXPERTS, 1), CPU_OPS)
    wrong, count = [], 0
    for name, make in PLACEMENTS.items():
        placement = make(world_size)
        dispatcher = AllToAllTokenDispatcher(placement, groups.world, CPU_OPS)
        for dtype in (torch.float32, torch.bfloat16):
            for top_k, sizes in ((1, (3, 1, 2, 0)), (2, (0, 7, 0, 1)), (4, (9, 2, 0, 40)), (6, (0, 0, 0, 0))):
                count += 1
                inputs = random_inputs(sizes[rank], top_k, dtype, seed=100 * count + rank)
                expected = through(local, list(range(NUM_EXPERTS)), inputs)
                got = through(dispatcher, placement.local_experts(rank), inputs, layer=count)
                if got.dtype != dtype or not torch.equal(got, expected):
                    wrong.append(f"{name} {dtype} top_k={top_k}")
    return [*wrong, str(count)]


def every_check(rank: int, store: Store) -> dict[str, Any]:
    through(
        LocalTokenDispatcher(ExpertPlacement.contiguous(6, 1), CPU_OPS),
        list(range(6)),
        random_inputs(1, 1, torch.float32, 0),
    )
    barrier(store, "kernels are built", 4)
    results: dict[str, Any] = {f"world {n}": compare_with_local(rank, store, n) for n in (4, 3, 2) if rank < n}
    if rank < 2:
        results["by hand"] = dispatch_by_hand(rank, store)
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(every_check, 4, timeout_s=600)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_to_all_gives_the_bits_of_local(results: list[dict[str, Any]], world_size: int) -> None:
    assert [results[rank][f"world {world_size}"] for rank in range(world_size)] == [["32"]] * world_size


def test_all_to_all_layout_by_hand(results: list[dict[str, Any]]) -> None:
    # rank 0 holds e0: t10 t20 t21 | e1: t10 t21;  rank 1 holds e2: t11 t20
    first, second = results[0]["by hand"], results[1]["by hand"]
    assert first["x"] == [10, 20, 21]
    assert first["x_row"] == [0, 1, 2, 0, 2]
    assert first["num_tokens_per_expert"] == [3, 2]
    assert second["x"] == [11, 20]
    assert second["num_tokens_per_expert"] == [2]
    # arrivals at rank 0: (t10,e1) (t10,e0) | (t20,e0) (t21,e1) (t21,e0)
    assert first["out_row"] == [1, 2, 4, 0, 3]
    assert second["out_row"] == [0, 1]
    assert (first["num_sent"], first["num_received"]) == ([2, 1], [2, 3])
    assert (second["num_sent"], second["num_received"]) == ([3, 1], [1, 1])
    assert first["row_of"] == [[0, 1], [2, -1]]
    assert second["row_of"] == [[0, 3], [1, 2], [-1, -1]]
    # outputs: rank 0 returns its rows, rank 1 twice its rows
    assert first["out"] == [10 + 10, 22]
    assert second["out"] == [20 + 40, 21 + 21, 0]


def test_a_token_travels_once_to_each_rank(results: list[dict[str, Any]]) -> None:
    # two int32 sizes, two int32 for each pair, 4 bytes for each row: t10 goes once to rank 0 for two experts
    assert results[0]["by hand"]["buffer_bytes"] == [[8 + 8 * 2 + 4 * 1, 8 + 8 * 1 + 4 * 1]]
    assert results[1]["by hand"]["buffer_bytes"] == [[8 + 8 * 3 + 4 * 2, 8 + 8 * 1 + 4 * 1]]
