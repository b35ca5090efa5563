"""Sequences in pages, for the tests of the kernels that read entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout


class Sequences:
    """Whole sequences' keys and queries; `span` puts some of their tokens into one step."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, *, heads: int = 3, latent: int = 40, rope: int = 8, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.latent, self.width = latent, latent + rope
        self.keys = [torch.randn(n, self.width, generator=generator).to(dtype) for n in lengths]
        self.queries = [torch.randn(n, heads, self.width, generator=generator).to(dtype) for n in lengths]
        self.weights = [torch.randn(n, heads, generator=generator) for n in lengths]

    def span(
        self, spans: list[tuple[int, int]], *, block_size: int = 16, seed: int = 0, spare_blocks: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, PagedLayout]:
        """Positions [start, stop) of each sequence -> queries, index weights, entries and layout.

        Blocks lie in an order of `seed`, rows are wider than a key, and what nobody wrote is NaN.
        """
        generator = torch.Generator().manual_seed(seed)
        max_blocks = max(-(-len(k) // block_size) for k in self.keys) + spare_blocks
        tables = torch.randperm(len(self.keys) * max_blocks, generator=generator).view(-1, max_blocks).int()
        kv_cache = torch.full((tables.numel() * block_size, self.width + 16), math.nan, dtype=self.keys[0].dtype)
        for table, keys, (_, stop) in zip(tables, self.keys, spans, strict=True):
            written = torch.arange(stop)
            slots = table.long()[written // block_size] * block_size + written % block_size
            kv_cache[slots, : self.width] = keys[:stop]
        queries = torch.cat([q[start:stop] for q, (start, stop) in zip(self.queries, spans, strict=True)])
        weights = torch.cat([w[start:stop] for w, (start, stop) in zip(self.weights, spans, strict=True)])
        bounds = torch.tensor([0] + [stop - start for start, stop in spans]).cumsum(0).int()
        positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
        return queries, weights, kv_cache, PagedLayout(tables, bounds, positions, block_size)


def index_pages(kv_cache: Tensor, dim: int, block_size: int = 16) -> Tensor:
    """Pages of index keys that are the first `dim` columns of entries."""
    return kv_cache[:, :dim].reshape(-1, block_size * dim)


def to_device(layout: PagedLayout, device: str) -> PagedLayout:
    return PagedLayout(
        layout.block_tables.to(device), layout.cu_seqlens_q.to(device), layout.positions.to(device), layout.block_size
    )


def random_selection(positions: Tensor, topk: int) -> Tensor:
    """[T, topk] int32: up to `topk` positions of each context, ascending, then -1."""
    selected = torch.full((len(positions), topk), -1, dtype=torch.int32)
    for row, context in zip(selected, (positions + 1).tolist(), strict=True):
        chosen = torch.randperm(context)[:topk].sort().values
        row[: len(chosen)] = chosen.int()
    return selected
