"""What a worker is told when it gets a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from shoal.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A rank of a replica in one epoch, and what the ranks found out when the replica was first formed."""

    epoch: int
    rank: int
    tensor_parallel_size: int
    data_parallel_size: int
    store_host: str
    store_port: int
    replaced: tuple[int, ...] = ()
    """Ranks that have other workers than in the last epoch that all joined."""
    ranks_on_node: int | None = None
    """None: not known yet, the ranks find it out together. So, too, with the next ones."""
    num_kv_blocks: int | None = None
    max_model_len: int | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """The layout of the replica."""
        return ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size
        )

    def to_values(self) -> list[Any]:
        """Plain values for msgpack."""
        return [getattr(self, f.name) for f in fields(self)]

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> Assignment:
        """The inverse of `to_values`."""
        named = dict(zip((f.name for f in fields(cls)), values, strict=True))
        return cls(**{**named, "replaced": tuple(named["replaced"])})
