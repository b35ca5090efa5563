"""The layout of one replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """`dp x tp` ranks: rank = dp_rank * tp + tp_rank. Experts are split over all of them (ep = dp * tp)."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    def dp_rank(self, rank: int) -> int:
        return rank // self.tensor_parallel_size

    def tp_rank(self, rank: int) -> int:
        return rank % self.tensor_parallel_size

    def tp_group(self, rank: int) -> list[int]:
        """The ranks that share `rank`'s requests, in order."""
        first = self.dp_rank(rank) * self.tensor_parallel_size
        return list(range(first, first + self.tensor_parallel_size))
