"""The paged cache tensors: one record per token and layer holds everything attention will ask for."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

ROW_ALIGNMENT = 16
"""Of a record on a GPU, in bytes."""


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """The fields of one token's record in one layer, side by side in this order.

    latent | rope_key | index_key      (a layer without an indexer of its own has no index_key)

    They are one row, so no prefix hit, transfer or offload can carry the latents and forget the index keys.
    """

    fields: tuple[tuple[str, int], ...]
    """Names and columns."""
    dtype: torch.dtype
    """Of a column: that of the computation, or `FP8_RECORDS`."""

    @property
    def width(self) -> int:
        return sum(width for _, width in self.fields)

    def offset(self, name: str) -> int:
        """First column of a field."""
        starts = accumulate((width for _, width in self.fields), initial=0)
        return dict(zip((n for n, _ in self.fields), starts, strict=False))[name]


class KVCache:
    """`records[layer]`: [num_blocks * block_size, width] of that layer's record; slot = block * block_size + offset."""

    def __init__(self, specs: list[RecordSpec], *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.specs = specs
        self.num_blocks = num_blocks
        self.block_size = block_size
        num_slots = num_blocks * block_size
        sparse = any(name == "index_key" for spec in specs for name, _ in spec.fields)
        self.records = [_allocate(num_slots, spec, device, huge_pages=sparse) for spec in specs]

    @property
    def bytes_per_token(self) -> int:
        """Of one token's records in all layers."""
        return sum(layer.shape[1] * layer.element_size() for layer in self.records)

    def slots(self, block_table: list[int], start: int, end: int) -> Tensor:
        """Where positions `[start, end)` of a sequence have their records, [end - start] int64."""
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table, dtype=torch.int64)[positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).to(self.records[0].device)

    def read_records(self, slots: Tensor) -> Tensor:
        """The records of T tokens in all layers, [T * bytes_per_token] uint8 in host memory.

        layer 0: T records | layer 1: T records | ..
        """
        return torch.cat([layer[slots].flatten().view(torch.uint8) for layer in self.records]).cpu()

    def write_records(self, slots: Tensor, payload: Tensor) -> None:
        """The inverse of `read_records`; only the last `len(slots)` tokens of the payload are written."""
        num_tokens = payload.numel() // self.bytes_per_token
        assert payload.numel() == num_tokens * self.bytes_per_token
        offset = 0
        for layer in self.records:
            size = num_tokens * layer.shape[1] * layer.element_size()
            records = payload[offset : offset + size].view(layer.dtype).view(num_tokens, -1)
            layer.index_copy_(0, slots, records[num_tokens - len(slots) :].to(layer.device))
            offset += size


def _allocate(num_slots: int, spec: RecordSpec, device: torch.device, *, huge_pages: bool) -> Tensor:
    """[num_slots, width], not filled: pages that no token uses are never touched, attention reads written slots only.

    On a GPU rows begin at multiples of 16 bytes, which its memory likes best.

    huge_pages   on a CPU, use them where the system has them: sparse attention reads records and keys all over the
                 cache, and with small pages finding one takes as long as reading it
    """
    if device.type != "cpu":
        alignment = ROW_ALIGNMENT // spec.dtype.itemsize
        row = -(-spec.width // alignment) * alignment
        return torch.empty(num_slots, row, dtype=spec.dtype, device=device)[:, : spec.width]
    size = num_slots * spec.width
    if not huge_pages or size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_slots, spec.width, dtype=spec.dtype)
    memory = mmap.mmap(-1, size * spec.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=spec.dtype).view(num_slots, spec.width)


def bytes_per_block(specs: list[RecordSpec], block_size: int) -> int:
    """Memory of one block over all layers."""
    return sum(spec.width * spec.dtype.itemsize for spec in specs) * block_size
