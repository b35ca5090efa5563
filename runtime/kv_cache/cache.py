"""The paged KV cache: latents and indexer keys of every layer."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.kv_format import gather_index_keys, index_key_width, scatter_index_keys
from shoal.kernels.math_utils import round_up

ROW_ALIGNMENT = 16
"""Bytes; alignment of a token's latent on a GPU."""


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The KV cache entry of a token in one layer, in the formats of kernels/kv_format.py."""

    width: int
    """Columns of the latent (with the rope key)."""
    index_dim: int
    """Dimensions of the indexer key; 0 in a layer without an indexer of its own."""
    dtype: torch.dtype
    """Storage dtype of latent and indexer key: the compute dtype, or `FP8_CACHE`."""

    @property
    def index_width(self) -> int:
        """Columns that the indexer key takes."""
        return index_key_width(self.dtype, self.index_dim)

    @property
    def num_bytes(self) -> int:
        return (self.width + self.index_width) * self.dtype.itemsize


class KVCache:
    """The entries of all layers in `num_blocks` blocks; slot = block * block_size + offset.

    All KV movement goes through `read_kv` and `write_kv`, which handle both tensors, so no transfer or offload can
    carry the latents and forget the indexer keys.
    """

    latents: list[Tensor]
    """Latents, per layer [num_blocks * block_size, width]."""
    index_keys: list[Tensor | None]
    """Indexer keys, per layer one page per block, [num_blocks, block_size * index_width]; None without an indexer."""

    def __init__(self, specs: list[KVCacheSpec], *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.specs = specs
        self.num_blocks = num_blocks
        self.block_size = block_size
        huge_pages = any(spec.index_dim for spec in specs)
        self.latents, self.index_keys = [], []
        for spec in specs:
            self.latents.append(_allocate_latents(num_blocks * block_size, spec, device, huge_pages=huge_pages))
            page = block_size * spec.index_width
            self.index_keys.append(
                _allocate(num_blocks, page, spec.dtype, device, huge_pages=huge_pages) if page else None
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return sum(spec.num_bytes for spec in self.specs)

    def slots(self, block_table: list[int], start: int, end: int) -> Tensor:
        """Slots of positions `[start, end)` of a sequence, [end - start] int64."""
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table, dtype=torch.int64)[positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).to(self.latents[0].device)

    def read_kv(self, slots: Tensor) -> Tensor:
        """The entries of T tokens in all layers, [T * bytes_per_token] uint8 in host memory.

        layer 0: T latents, then T indexer keys in the order of `gather_index_keys` | layer 1: the same | ..
        """
        rows = []
        for spec, latents, index_keys in zip(self.specs, self.latents, self.index_keys, strict=True):
            rows.append(latents[slots])
            if index_keys is not None:
                rows.append(gather_index_keys(index_keys, slots, spec.index_dim))
        return torch.cat([part.flatten().view(torch.uint8) for part in rows]).cpu()

    def write_kv(self, slots: Tensor, payload: Tensor) -> None:
        """Inverse of `read_kv`; only the last `len(slots)` tokens of the payload are written."""
        num_tokens = payload.numel() // self.bytes_per_token
        assert payload.numel() == num_tokens * self.bytes_per_token
        offset = 0

        def next_rows(width: int, like: Tensor) -> Tensor:
            nonlocal offset
            begin, offset = offset, offset + num_tokens * width * like.element_size()
            rows = payload[begin:offset].view(like.dtype).view(num_tokens, width)
            return rows[num_tokens - len(slots) :].to(like.device)

        for spec, latents, index_keys in zip(self.specs, self.latents, self.index_keys, strict=True):
            latents.index_copy_(0, slots, next_rows(spec.width, latents))
            if index_keys is not None:
                scatter_index_keys(index_keys, slots, next_rows(spec.index_width, index_keys), spec.index_dim)


def _allocate_latents(num_slots: int, spec: KVCacheSpec, device: torch.device, *, huge_pages: bool) -> Tensor:
    """[num_slots, width]; on a GPU rows start at multiples of 16 bytes, for vectorised loads."""
    alignment = 1 if device.type == "cpu" else ROW_ALIGNMENT // spec.dtype.itemsize
    row = round_up(spec.width, alignment)
    return _allocate(num_slots, row, spec.dtype, device, huge_pages=huge_pages)[:, : spec.width]


def _allocate(rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, huge_pages: bool) -> Tensor:
    """[rows, columns], uninitialised: attention reads written slots only, so pages that no token uses stay unmapped.

    huge_pages   on a CPU, use huge pages where the system has them: sparse attention reads entries all over the cache,
                 and with small pages a TLB miss takes as long as the read
    """
    size = rows * columns
    if device.type != "cpu" or not huge_pages or size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)


def bytes_per_block(specs: list[KVCacheSpec], block_size: int) -> int:
    """Memory of one block over all layers."""
    return sum(spec.num_bytes for spec in specs) * block_size
