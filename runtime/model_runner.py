"""Turns the decision of a step into tensors and the tensors into logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.kernels.attention import PagedLayout

from .batch import Batch, ScheduledSequence
from .kv_cache import KVCache
from .models.deepseek import DeepseekModel
from .models.forward import AttentionMetadata, Tap

PROMPT_LOGITS_ROWS = 128
"""Prompt logits are made and consumed this many rows at a time, so that they never exist all at once."""

OnPromptLogits = Callable[[ScheduledSequence, int, Tensor], None]
"""(sequence, position of the first row, logits [n, V]) of prompt positions."""


class ModelRunner:
    """Runs batches on one rank. Ranks of a tp group run the same batch; a rank without tokens runs an empty one."""

    def __init__(self, model: DeepseekModel, cache: KVCache, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.tap: Tap | None = None

    @torch.inference_mode()
    def run(self, batch: Batch, num_prompt_slices: int, on_prompt_logits: OnPromptLogits | None = None) -> Tensor:
        """Computes every scheduled token and writes its cache record.

        `num_prompt_slices` is the largest `len(prompt_slices(batch))` of the replica's attention groups.
        Returns logits [N, vocab_size] fp32, one row per sequence with `sample`, in batch order (N = 0 on followers).
        """
        input_ids, metadata = self._prepare(batch)
        hidden = self.model.forward(input_ids, self.cache, metadata)
        self._prompt_logits(batch, hidden, num_prompt_slices, on_prompt_logits)
        ends = np.cumsum([len(s.token_ids) for s in batch.sequences])
        last = [int(end) - 1 for s, end in zip(batch.sequences, ends, strict=True) if s.sample]
        return self.model.compute_logits(hidden[torch.tensor(last, dtype=torch.int64, device=self.device)])

    def _prepare(self, batch: Batch) -> tuple[Tensor, AttentionMetadata]:
        sequences, block_size = batch.sequences, self.cache.block_size
        lengths = [len(s.token_ids) for s in sequences]
        total = sum(lengths)
        input_ids = np.fromiter((t for s in sequences for t in s.token_ids), np.int64, total)
        cu_seqlens = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        block_tables = np.zeros((len(sequences), max((len(s.block_table) for s in sequences), default=0)), np.int32)
        positions = np.empty(total, np.int64)
        slots = np.empty(total, np.int64)
        for i, s in enumerate(sequences):
            block_tables[i, : len(s.block_table)] = s.block_table
            rows = slice(cu_seqlens[i], cu_seqlens[i + 1])
            positions[rows] = where = np.arange(s.start, s.start + lengths[i])
            slots[rows] = block_tables[i, where // block_size].astype(np.int64) * block_size + where % block_size
        layout = PagedLayout(
            block_tables=self._tensor(block_tables),
            cu_seqlens_q=self._tensor(cu_seqlens),
            positions=self._tensor(positions),
            block_size=block_size,
        )
        return self._tensor(input_ids), AttentionMetadata(layout=layout, slot_mapping=self._tensor(slots), tap=self.tap)

    def _prompt_logits(
        self, batch: Batch, hidden: Tensor, num_slices: int, on_prompt_logits: OnPromptLogits | None
    ) -> None:
        """Show the prompt logits that were asked for; every rank of the replica takes part in every slice."""
        slices = prompt_slices(batch)
        for s, start, rows in slices:
            logits = self.model.compute_logits(hidden[rows])
            if on_prompt_logits is not None:
                on_prompt_logits(s, start, logits)
        for _ in range(num_slices - len(slices)):
            self.model.compute_logits(hidden[:0])

    def _tensor(self, array: NDArray[np.integer[Any]]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def prompt_slices(batch: Batch) -> list[tuple[ScheduledSequence, int, slice]]:
    """The prompt logits that a batch asks for: (sequence, position of the first one, rows of the batch's tokens)."""
    slices, offset = [], 0
    for s in batch.sequences:
        length = len(s.token_ids)
        for first in range(length - s.num_prompt_logits, length, PROMPT_LOGITS_ROWS):
            rows = slice(offset + first, offset + min(first + PROMPT_LOGITS_ROWS, length))
            slices.append((s, s.start + first, rows))
        offset += length
    return slices
