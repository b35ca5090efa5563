"""CUDA graphs of decode steps, in which every sequence has one token: the host launches all kernels at once.

A graph is captured for a number of sequences and a width of block tables when they first occur. Smaller batches are
padded with copies of their first sequence, which compute and write the same values; narrower tables are padded with
unused entries. Neither changes a bit of a row, since no kernel lets rows depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.math_utils import cdiv

from ..kv_cache.cache import KVCache
from ..models.forward import AttentionMetadata, StepContext
from ..models.model import Model
from ..scheduling.batch import Batch

MIN_TABLE_TOKENS = 2048
"""Tokens that the narrowest block tables hold; each wider one holds twice as many."""


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token, a generated one whose logits give the next."""
    return bool(batch.sequences) and all(
        s.num_logits == 1 and len(s.token_ids) == 1 and s.start >= s.num_prompt_tokens for s in batch.sequences
    )


def padded_size(count: int, largest: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, .. (powers of two and one and a half of them), at most `largest`."""
    power = 1 << (count - 1).bit_length()
    return min(largest, power * 3 // 4 if count <= power * 3 // 4 and power > 2 else power)


class DecodeGraphs:
    """Input buffers at fixed addresses, the graphs that read them, and two staging buffers that fill them in turn."""

    def __init__(
        self, model: Model, cache: KVCache, device: torch.device, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._max_num_seqs = max_num_seqs
        self._max_blocks = cdiv(max_model_len, cache.block_size)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # token ids | positions | slots of `size` sequences, then their block tables
        self._numbers = torch.zeros(3 * max_num_seqs, dtype=torch.int64, device=device)
        self._tables = torch.zeros(max_num_seqs * self._max_blocks, dtype=torch.int32, device=device)
        self._bounds = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._no_bounds = torch.zeros_like(self._bounds)
        self._staging = [
            tuple(torch.zeros_like(buffer, device="cpu").pin_memory() for buffer in (self._numbers, self._tables))
            for _ in range(2)
        ]

    def run(self, batch: Batch, known: tuple[Tensor, Sequence[int]] | None = None) -> Tensor:
        """Logits [N, vocab_size] fp32 of a batch for which `is_decode` holds; the next call overwrites them.

        known: (token ids on the device, index of each sequence's token in them); None: the token ids of the batch.
        """
        size = padded_size(len(batch.sequences), self._max_num_seqs)
        longest = max(len(s.block_table) for s in batch.sequences)
        least = max(1, MIN_TABLE_TOKENS // self._cache.block_size)
        width = min(self._max_blocks, max(least, 1 << (longest - 1).bit_length()))
        self._fill(batch, size, width, None if known is None else known[1])
        if known is not None:
            token_ids = self._numbers[:size]
            token_ids.copy_(known[0][token_ids])
        return self._replay(size, width)[: len(batch.sequences)]

    def _fill(self, batch: Batch, size: int, width: int, places: Sequence[int] | None) -> None:
        """Copy the batch to the input buffers; `places`, if given, stand in for token ids."""
        self._staging.reverse()  # the other one may still be on its way
        numbers, tables = self._staging[0]
        block_size = self._cache.block_size
        rows = numbers[: 3 * size].numpy().reshape(3, size)
        block_tables = tables[: size * width].numpy().reshape(size, width)
        for i, s in enumerate(batch.sequences):
            block_tables[i, : len(s.block_table)] = s.block_table
        count = len(batch.sequences)
        rows[0, :count] = [s.token_ids[0] for s in batch.sequences] if places is None else places
        rows[1, :count] = [s.start for s in batch.sequences]
        blocks = block_tables[np.arange(count), rows[1, :count] // block_size].astype(np.int64)
        rows[2, :count] = blocks * block_size + rows[1, :count] % block_size
        rows[:, count:] = rows[:, :1]
        block_tables[count:] = block_tables[:1]
        self._numbers[: 3 * size].copy_(numbers[: 3 * size], non_blocking=True)
        self._tables[: size * width].copy_(tables[: size * width], non_blocking=True)

    def _replay(self, size: int, width: int) -> Tensor:
        if (size, width) in self._graphs:
            graph, logits = self._graphs[size, width]
            graph.replay()
            return logits
        computed = self._forward(size, width)  # compiles kernels, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(size, width)
        self._graphs[size, width] = graph, logits
        return computed

    def _forward(self, size: int, width: int) -> Tensor:
        token_ids, positions, slots = self._numbers[: 3 * size].view(3, size)
        tables, block_size = self._tables[: size * width].view(size, width), self._cache.block_size
        metadata = AttentionMetadata(
            mha=PagedLayout(tables, self._no_bounds[: size + 1], positions[:0], block_size),
            mqa=PagedLayout(tables, self._bounds[: size + 1], positions, block_size),
            positions=positions,
            slot_mapping=slots,
        )
        hidden = self._model.forward(token_ids, StepContext(cache=self._cache, metadata=metadata))
        return self._model.compute_logits(hidden)
