"""The decision of one step, as plain values that travel between ranks as msgpack."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The tokens of one sequence that a step computes: positions `[start, start + len(token_ids))`."""

    seq_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    """Blocks that hold positions `[0, start + len(token_ids))`, in order."""
    num_logits: int
    """How many of the last scheduled tokens need logits: 0 in the middle of a prompt, 1 to sample, more for prompt logprobs."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one attention group computes in one step; empty when it has nothing to do."""

    sequences: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    def pack(self) -> bytes:
        """To msgpack bytes; `unpack` is the inverse."""
        rows = [(s.seq_id, s.start, s.token_ids, s.block_table, s.num_logits) for s in self.sequences]
        packed = msgpack.packb(rows)
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Batch:
        return cls([ScheduledSequence(*row) for row in msgpack.unpackb(data)])


EMPTY_BATCH = Batch([])
