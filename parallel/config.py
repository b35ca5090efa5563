"""The layout of one replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .settings import Setting, check_settings

TensorParallelSize = Annotated[
    int, Setting("Workers of a replica that share each request (tensor-parallel attention).", ge=1, short="-tp")
]
DataParallelSize = Annotated[
    int, Setting("Groups of a replica that run different requests (data-parallel attention).", ge=1, short="-dp")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """`dp x tp` ranks: rank = dp_rank * tp + tp_rank. Experts are split over all of them (ep = dp * tp)."""

    tensor_parallel_size: TensorParallelSize = 1
    data_parallel_size: DataParallelSize = 1

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    def dp_rank(self, rank: int) -> int:
        return rank // self.tensor_parallel_size

    def tp_rank(self, rank: int) -> int:
        return rank % self.tensor_parallel_size

    def tp_group(self, rank: int) -> list[int]:
        """Ranks that share the requests of `rank`, in order."""
        first = self.dp_rank(rank) * self.tensor_parallel_size
        return list(range(first, first + self.tensor_parallel_size))
