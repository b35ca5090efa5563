"""Output projection with its vocabulary split over ranks; logits go to the ranks that sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops

from .collectives import Communicator


def vocab_shard(vocab_size: int, rank: int, num_ranks: int) -> slice:
    """Half-open range of the vocabulary whose logits `rank` computes; sizes differ by at most one."""
    return slice(rank * vocab_size // num_ranks, (rank + 1) * vocab_size // num_ranks)


class ParallelLMHead:
    """Logits of the hidden states of several tensor-parallel groups, computed by all their ranks.

    rows:   g0: a b | g1: c     -> every rank: a b c
    logits: every rank: its tokens' columns of a b c -> first rank of g0: a b | first rank of g1: c
    """

    def __init__(self, ops: Ops, vocab_size: int, comm: Communicator, group_size: int) -> None:
        """`comm` consists of tensor-parallel groups of `group_size` ranks."""
        assert comm.size % group_size == 0
        self.ops = ops
        self.vocab_size = vocab_size
        self.comm = comm
        self.leaders = range(0, comm.size, group_size)
        self.leader = comm.rank - comm.rank % group_size
        shards = [vocab_shard(vocab_size, r, comm.size) for r in range(comm.size)]
        self._widths = [s.stop - s.start for s in shards]

    def __call__(self, hidden: Tensor, weight: PackedWeight) -> Tensor:
        """hidden [N, H] -> logits [N, vocab_size] fp32 on the first rank of each group, [0, vocab_size] on the others.

        weight: this rank's rows (see `vocab_shard`) of the weight [vocab_size, H].
        A collective: every rank of `comm` calls it with its own group's rows, possibly none.
        Accumulated in fp32 and not rounded to the compute dtype; the same bits for every split.
        """
        if self.comm.size == 1:
            return self.ops.linear(hidden, weight, out_dtype=torch.float32)
        rows = self._gather_rows(hidden)
        part = self.ops.linear(torch.cat(rows), weight, out_dtype=torch.float32)
        return self._collect(list(torch.split(part, [len(r) for r in rows])))

    def _gather_rows(self, hidden: Tensor) -> list[Tensor]:
        """Rows of every group, in the order of the groups."""
        if len(self.leaders) == 1:
            return [hidden]
        none = torch.empty(0, dtype=torch.uint8, device=hidden.device)
        own = hidden.contiguous().view(torch.uint8).flatten() if self.comm.rank == self.leader else none
        group = range(self.leader, self.leader + self.leaders.step)
        segments: Sequence[Tensor] = [none if r in group else own for r in range(self.comm.size)]
        received = self.comm.all_to_all_bytes(segments, layer=-1, op="lm_head.rows")
        width = hidden.shape[1]
        return [
            hidden if leader == self.leader else received[leader].view(hidden.dtype).view(-1, width)
            for leader in self.leaders
        ]

    def _collect(self, parts: list[Tensor]) -> Tensor:
        """This rank's columns of every group's logits -> all columns of its own group's logits."""
        num_rows = len(parts[self.leader // self.leaders.step]) if self.comm.rank == self.leader else 0
        none = torch.empty(0, dtype=torch.uint8, device=parts[0].device)
        segments = [none] * self.comm.size
        for leader, part in zip(self.leaders, parts, strict=True):
            segments[leader] = part.contiguous().view(torch.uint8).flatten()
        received = self.comm.all_to_all_bytes(segments, layer=-1, op="lm_head")
        if not num_rows:
            return parts[0].new_empty(0, self.vocab_size)
        columns = [r.view(torch.float32).view(num_rows, -1) for r in received]
        assert [c.shape[1] for c in columns] == self._widths
        return torch.cat(columns, dim=1)
