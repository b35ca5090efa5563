"""The decision of one step, as plain values that travel between ranks as msgpack."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgpack

UNKNOWN_TOKEN = -1
"""Placeholder id in a batch that is scheduled before the previous step's tokens are known."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The tokens of one sequence that a step computes: positions `[start, start + len(token_ids))`."""

    seq_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    """Blocks that hold positions `[0, start + len(token_ids))`, in order."""
    num_prompt_tokens: int
    """Prompt length of the sequence: its tokens from this position on were generated."""
    num_logits: int
    """How many of the last scheduled tokens have their logits sampled: 0 before the last known token, 1 with it, and
    k + 1 if k draft tokens follow it."""
    num_prompt_logits: int = 0
    """How many of the last scheduled tokens are prompt tokens whose logits are scored (`prompt_logprobs`)."""


@dataclass(frozen=True, slots=True)
class KVWrite:
    """KV that was received from another replica and is written to the cache before the step computes anything."""

    seq_id: int
    start: int
    end: int
    """Positions `[start, end)` are written, from the end of a payload of `num_bytes`."""
    num_bytes: int
    block_table: list[int]
    """Blocks that hold positions `[0, end)` at least, in order."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one attention group computes in one step; empty if it has nothing to compute."""

    sequences: list[ScheduledSequence]
    writes: list[KVWrite] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.sequences or self.writes)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    def pack(self) -> bytes:
        """To msgpack bytes; `unpack` is the inverse."""
        rows = [
            (s.seq_id, s.start, s.token_ids, s.block_table, s.num_prompt_tokens, s.num_logits, s.num_prompt_logits)
            for s in self.sequences
        ]
        writes = [(w.seq_id, w.start, w.end, w.num_bytes, w.block_table) for w in self.writes]
        packed = msgpack.packb([rows, writes])
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Batch:
        rows, writes = msgpack.unpackb(data)
        return cls([ScheduledSequence(*row) for row in rows], [KVWrite(*row) for row in writes])


EMPTY_BATCH = Batch([])
