"""The output projection over several ranks: the same bits as on one, where they are needed and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed import Store  # type: ignore[attr-defined]

from shoal.kernels.ops import Ops
from shoal.parallel.config import ParallelConfig
from shoal.parallel.groups import init_groups
from shoal.parallel.lm_head import ParallelLMHead, vocab_shard
from tests.support.spawn import run_ranks

VOCAB, HIDDEN = 203, 64


def weights() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def rows_of(dp_rank: int, call: int) -> torch.Tensor:
    """Another number of rows in every group and call; group 1 has none in the first."""
    generator = torch.Generator().manual_seed(10 * call + dp_rank)
    num_rows = (3 * dp_rank + 5 * call + 4) % 7
    return torch.randn(num_rows, HIDDEN, generator=generator).to(torch.bfloat16)


def logits_of_calls(rank: int, store: Store, tp: int, dp: int, over_world: bool) -> list[NDArray[np.float32]]:
    config = ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)
    groups = init_groups(config, rank, store, timeout_s=60.0)
    comm = groups.world if over_world else groups.tp
    part = weights()[vocab_shard(VOCAB, comm.rank, comm.size)]
    ops = Ops("cpu")
    head = ParallelLMHead(ops, VOCAB, comm, tp)
    weight = ops.pack_weight(part)
    return [head(rows_of(groups.dp_rank, call), weight).numpy() for call in range(3)]


@pytest.mark.parametrize(("tp", "dp", "over_world"), [(1, 3, True), (2, 2, True), (2, 2, False), (3, 1, True)])
def test_leaders_get_the_logits_of_their_rows(tp: int, dp: int, over_world: bool) -> None:
    ops = Ops("cpu")
    whole = ops.pack_weight(weights())
    for rank, results in enumerate(run_ranks(logits_of_calls, tp * dp, tp, dp, over_world)):
        for call, logits in enumerate(results):
            rows = rows_of(rank // tp, call)
            expected = ops.linear(rows, whole, out_dtype=torch.float32)
            assert np.array_equal(logits, expected if rank % tp == 0 else expected[:0]), (rank, call)
    assert len(rows_of(1, 0)) == 0
    assert len(rows_of(0, 0)) > 0


def test_shards_cover_the_vocabulary_and_differ_by_one_token_at_most() -> None:
    shards = [vocab_shard(10, rank, 4) for rank in range(4)]
    assert shards == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]
