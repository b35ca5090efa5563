"""Turns the batch of a step into tensors, and the tensors into logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.parallel.spans import Spans

from ..kv_cache.cache import KVCache
from ..models.forward import AttentionMetadata, StepContext, Tap
from ..models.model import Model
from ..scheduling.batch import Batch, ScheduledSequence
from .cuda_graphs import DecodeGraphs, is_decode

PROMPT_LOGITS_ROWS = 128
"""Rows of prompt logits that are computed and consumed at a time, so that they never exist all at once."""

Rows = NDArray[np.int64]
OnPromptLogits = Callable[[ScheduledSequence, int, Tensor], None]
"""(sequence, position of the first row, logits [n, V]) of prompt positions."""


class ModelRunner:
    """Runs batches on one rank. Ranks of a tp group run the same batch; a rank without tokens runs an empty one."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.graphs = graphs
        self.spans = spans or Spans()
        self.tap: Tap | None = None

    @torch.inference_mode()
    def run(self, batch: Batch, num_prompt_slices: int, on_prompt_logits: OnPromptLogits | None = None) -> Tensor:
        """Compute every scheduled token and write its KV cache entry.

        `num_prompt_slices` is the largest `len(prompt_slices(batch))` of the replica's attention groups.
        Returns logits [N, vocab_size] fp32 in batch order, `num_logits` rows per sequence (N = 0 on followers).
        On a GPU the next call may overwrite them.
        """
        if self.graphs is not None and self.tap is None and is_decode(batch):
            return self.graphs.run(batch)
        with self.spans("engine.prepare"):
            input_ids, metadata, rows = self._prepare(batch)
        ctx = StepContext(cache=self.cache, metadata=metadata, spans=self.spans, tap=self.tap)
        hidden = self.model.forward(input_ids, ctx)
        self._prompt_logits(batch, hidden, rows, num_prompt_slices, on_prompt_logits)
        sampled = [row for s, r in zip(batch.sequences, rows, strict=True) for row in r[len(r) - s.num_logits :]]
        with self.spans("model.logits"):
            return self.model.compute_logits(hidden[self._tensor(np.array(sampled, np.int64))])

    @torch.inference_mode()
    def run_ahead(self, batch: Batch, token_ids: Tensor, places: Sequence[int]) -> Tensor:
        """`run` for sequences whose single token is only known on the device: token_ids[places[i]]."""
        if self.graphs is not None:
            return self.graphs.run(batch, (token_ids, places))
        known = token_ids.tolist()
        pairs = zip(batch.sequences, places, strict=True)
        return self.run(Batch([replace(s, token_ids=[known[place]]) for s, place in pairs]), 0)

    def _prepare(self, batch: Batch) -> tuple[Tensor, AttentionMetadata, list[Rows]]:
        """Input ids, attention metadata, and for each sequence the rows of its tokens."""
        sequences, block_size = batch.sequences, self.cache.block_size
        lengths = np.array([len(s.token_ids) for s in sequences], np.int64)
        starts = np.array([s.start for s in sequences], np.int64)
        limits = [self.model.config.num_mha_tokens(s.num_prompt_tokens) for s in sequences]
        firsts = np.clip(np.array(limits, np.int64) - starts, 0, lengths)  # tokens of the MHA form
        block_tables = np.zeros((len(sequences), max((len(s.block_table) for s in sequences), default=0)), np.int32)
        rows, total = _rows(firsts, lengths), int(lengths.sum())
        input_ids, positions, slots = (np.empty(total, np.int64) for _ in range(3))
        for i, s in enumerate(sequences):
            block_tables[i, : len(s.block_table)] = s.block_table
            where = np.arange(s.start, s.start + lengths[i])
            input_ids[rows[i]] = s.token_ids
            positions[rows[i]] = where
            slots[rows[i]] = block_tables[i, where // block_size].astype(np.int64) * block_size + where % block_size
        tables, boundary = self._tensor(block_tables), int(firsts.sum())
        metadata = AttentionMetadata(
            mha=self._layout(tables, firsts, positions[:boundary]),
            mqa=self._layout(tables, lengths - firsts, positions[boundary:]),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
        )
        return self._tensor(input_ids), metadata, rows

    def _layout(self, block_tables: Tensor, num_tokens: Rows, positions: Rows) -> PagedLayout:
        cu_seqlens = np.zeros(len(num_tokens) + 1, np.int32)
        np.cumsum(num_tokens, out=cu_seqlens[1:])
        return PagedLayout(block_tables, self._tensor(cu_seqlens), self._tensor(positions), self.cache.block_size)

    def _prompt_logits(
        self,
        batch: Batch,
        hidden: Tensor,
        rows: list[Rows],
        num_slices: int,
        on_prompt_logits: OnPromptLogits | None,
    ) -> None:
        """Compute the prompt logits that were asked for; every rank of the replica takes part in every slice."""
        slices = prompt_slices(batch)
        for i, tokens in slices:
            with self.spans("model.logits"):
                logits = self.model.compute_logits(hidden[self._tensor(rows[i][tokens])])
            if on_prompt_logits is not None:
                on_prompt_logits(batch.sequences[i], batch.sequences[i].start + tokens.start, logits)
        for _ in range(num_slices - len(slices)):
            with self.spans("model.logits"):
                self.model.compute_logits(hidden[:0])

    def _tensor(self, array: NDArray[np.integer[Any]]) -> Tensor:
        """Copy to the device, from page-locked memory so that the host does not wait."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def _rows(firsts: Rows, lengths: Rows) -> list[Rows]:
    """Rows of each sequence's tokens when the first tokens of all sequences come before the others.

    s0 has 2 + 1 tokens, s1 3 + 0, s2 0 + 2:    s0 s0 s1 s1 s1 | s0 s2 s2
    """
    rests = lengths - firsts
    first_ends, rest_ends = np.cumsum(firsts), firsts.sum() + np.cumsum(rests)
    return [
        np.concatenate([np.arange(f_end - f, f_end), np.arange(r_end - r, r_end)])
        for f, f_end, r, r_end in zip(firsts, first_ends, rests, rest_ends, strict=True)
    ]


def prompt_slices(batch: Batch) -> list[tuple[int, slice]]:
    """Prompt logits that a batch asks for: (index of the sequence, range of its scheduled tokens)."""
    slices = []
    for i, s in enumerate(batch.sequences):
        length = len(s.token_ids)
        for first in range(length - s.num_prompt_logits, length, PROMPT_LOGITS_ROWS):
            slices.append((i, slice(first, min(first + PROMPT_LOGITS_ROWS, length))))
    return slices
