"""Placement of experts on ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .groups import ParallelGroups


@dataclass(frozen=True)
class ExpertPlacement:
    """Physical expert slots per rank, each holding one logical expert.

    `slots[r][s]` is the logical expert in local slot s of rank r. Ranks may hold different numbers of slots, possibly
    none, and an expert may have several copies, also on one rank. All copies have the same weights, so the choice of
    the copy never changes a token's bits. ValueError if an expert is unknown or has no slot.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError("an expert placement needs at least one rank")
        held = {expert for rank_slots in self.slots for expert in rank_slots}
        if unknown := sorted(held - set(range(self.num_experts))):
            raise ValueError(
                f"the placement names experts {unknown}, the model has experts 0 to {self.num_experts - 1}"
            )
        if missing := sorted(set(range(self.num_experts)) - held):
            raise ValueError(f"experts {missing} have no slot; every expert needs one on some rank")

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """One copy each, in order; the first `num_experts % num_ranks` ranks hold one more than the others.

        5 experts, 3 ranks:  rank 0: e0 e1 | rank 1: e2 e3 | rank 2: e4
        """
        share, extra = divmod(num_experts, num_ranks)
        starts = [rank * share + min(rank, extra) for rank in range(num_ranks + 1)]
        return cls(num_experts, tuple(tuple(range(starts[rank], starts[rank + 1])) for rank in range(num_ranks)))

    @classmethod
    def round_robin(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """One copy each, assigned to the ranks in turn, so that every rank holds experts of every routing group.

        5 experts, 3 ranks:  rank 0: e0 e3 | rank 1: e1 e4 | rank 2: e2
        """
        return cls(num_experts, tuple(tuple(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    def local_experts(self, rank: int) -> list[int]:
        """Logical expert in each local slot of `rank`."""
        return list(self.slots[rank])

    @cached_property
    def copies(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per logical expert, (rank, local slot) of its copies in ascending order."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.num_experts)]
        for rank, rank_slots in enumerate(self.slots):
            for slot, expert in enumerate(rank_slots):
                found[expert].append((rank, slot))
        return tuple(tuple(places) for places in found)

    def lookup(self, source_rank: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """(rank [num_experts], local slot [num_experts]) int64: the copy of each expert for tokens of `source_rank`.

        The copy's number is `source_rank % number of copies`: load is spread, and the choice depends on the rank only.
        """
        chosen = [places[source_rank % len(places)] for places in self.copies]
        table = torch.tensor(chosen, dtype=torch.int64, device=device).reshape(self.num_experts, 2)
        return table[:, 0].contiguous(), table[:, 1].contiguous()


def default_placement(num_experts: int, groups: ParallelGroups) -> ExpertPlacement:
    """One copy of each expert: round-robin on one node, contiguous over several.

    On one node that spreads the routing groups, whose loads differ; over several nodes it keeps each routing group
    together, so that a token's experts are on few nodes.
    """
    place = ExpertPlacement.contiguous if spans_nodes(groups) else ExpertPlacement.round_robin
    return place(num_experts, groups.world.size)


def spans_nodes(groups: ParallelGroups) -> bool:
    """Whether the replica has ranks on more than one node."""
    return groups.local_world_size < groups.world.size
