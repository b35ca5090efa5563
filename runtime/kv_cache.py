"""The paged cache tensors: one record per token and layer holds everything attention will ask for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """The fields of one token's record in one layer, side by side in this order.

    latent | rope_key | index_key      (a layer without an indexer of its own has no index_key)

    They are one row, so no prefix hit, transfer or offload can carry the latents and forget the index keys.
    """

    fields: tuple[tuple[str, int], ...]

    @property
    def width(self) -> int:
        return sum(width for _, width in self.fields)

    def offset(self, name: str) -> int:
        """First column of a field."""
        starts = accumulate((width for _, width in self.fields), initial=0)
        return dict(zip((n for n, _ in self.fields), starts, strict=False))[name]


class KVCache:
    """`records[layer]`: [num_blocks * block_size, width] of that layer's record; slot = block * block_size + offset."""

    def __init__(
        self, specs: list[RecordSpec], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.specs = specs
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Not filled: pages that no token uses are never touched, and attention reads written slots only.
        self.records = [torch.empty(num_blocks * block_size, spec.width, dtype=dtype, device=device) for spec in specs]

    def write(self, layer: int, slot_mapping: Tensor, record: Tensor) -> None:
        """Store `record` [T, width] in the slots of its tokens ([T] int64)."""
        self.records[layer].index_copy_(0, slot_mapping, record)


def bytes_per_block(specs: list[RecordSpec], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(spec.width for spec in specs) * block_size * dtype.itemsize
