"""The rank that a worker is given."""

from __future__ import annotations

import msgspec

from shoal.parallel.config import ParallelConfig


class Assignment(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A rank of a replica in one epoch, and what the ranks found out when the replica first formed."""

    epoch: int
    rank: int
    tensor_parallel_size: int
    data_parallel_size: int
    store_host: str
    store_port: int
    replaced: tuple[int, ...] = ()
    """Ranks whose workers changed since the last epoch that all ranks joined."""
    local_world_size: int | None = None
    """None until the ranks have agreed on it in the first epoch; likewise for the next two fields."""
    num_kv_blocks: int | None = None
    max_model_len: int | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """The layout of the replica."""
        return ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size
        )
