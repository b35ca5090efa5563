"""Several ranks on one GPU: every layout gives the bits of one rank.

NCCL refuses two ranks on one device, so the bytes of tensors go through the store here; all else is what runs on many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shoal.parallel import groups as groups_module
from shoal.parallel.collectives import Communicator
from shoal.parallel.groups import ParallelGroups, single_process_groups
from shoal.parallel.transport import SocketMesh
from tests.support.invariance import Point, Rows, differing, make_model, run_point, run_points_on_rank
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.gpu

MODELS = [("deepseek_v32", "bfloat16"), ("deepseek_v32", "fp8"), ("deepseek_v3", "float32")]
POINTS = [
    Point("dp 2", dp=2),
    Point("tp 2", tp=2),
    Point("tp 2, chunks of 7, preempted", tp=2, engine={"max_chunk_size": 7}, preempt_every=3),
    Point("dp 2, budget of 5 tokens", dp=2, engine={"max_num_batched_tokens": 5}),
    Point("tp 2 x dp 2", tp=2, dp=2),
]


class Done:
    """A collective that is over when it has been started."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class StoreExchange:
    """`alltoall` of ProcessGroupNCCL, through a store."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size, self._count = store, rank, size, 0

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], /) -> Any:
        self._count += 1
        peers = [peer for peer in range(self._size) if peer != self._rank]
        for peer in peers:
            data: Any = b"-" + inputs[peer].cpu().numpy().tobytes()  # bytes are taken, whatever the signature says
            self._store.set(f"{self._count}/{self._rank}/{peer}", data)
        outputs[self._rank].copy_(inputs[self._rank])
        for peer in peers:
            received = bytearray(self._store.get(f"{self._count}/{peer}/{self._rank}")[1:])
            if received:
                outputs[peer].copy_(torch.frombuffer(received, dtype=torch.uint8))
            self._store.delete_key(f"{self._count}/{peer}/{self._rank}")
        return Done()

    def abort(self) -> None:
        pass


def backends(
    store: Store, groups: ParallelGroups, group: Communicator, stop: Callable[[], bool]
) -> tuple[SocketMesh, StoreExchange]:
    mesh, _ = create_backends(store, replace(groups, device=torch.device("cpu")), group, stop)
    return mesh, StoreExchange(PrefixStore("tensors", store), group.rank, group.size)


create_backends = groups_module._create_backends


def rows_of_rank(
    rank: int, store: Store, models: list[tuple[Path, str]], points: list[Point], device: str
) -> list[list[Rows]]:
    groups_module._create_backends = backends
    return run_points_on_rank(rank, store, models, points, device)


def compare(directory: Path, device: str) -> dict[str, list[int]]:
    """Which rows of which model and layout differ from those of one rank."""
    models = [(make_model(directory, model_type, dtype), dtype) for model_type, dtype in MODELS]
    alone = single_process_groups(torch.device(device))
    expected = [run_point(Point("reference"), model_dir, dtype, alone) for model_dir, dtype in models]
    per_rank = run_ranks(rows_of_rank, 4, models, POINTS, device, timeout_s=400.0)
    wrong = {}
    for index, (_, dtype) in enumerate(models):
        for number, point in enumerate(POINTS):
            rows = {row: value for rank in per_rank for row, value in rank[index][number].items()}
            assert len(rows) == len(expected[index]) == 7
            wrong[f"{MODELS[index][0]} {dtype}, {point.name}"] = differing(rows, expected[index])
    return wrong


def test_every_layout_gives_the_bits_of_one_rank(tmp_path: Path) -> None:
    assert {name: rows for name, rows in compare(tmp_path, "cuda").items() if rows} == {}
