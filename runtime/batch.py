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
    sample: bool
    """Whether the last scheduled token is the last known one, so that its logits give the next."""
    num_prompt_logits: int = 0
    """How many of the last scheduled tokens are prompt tokens whose logits were asked for (`prompt_logprobs`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one attention group computes in one step; empty when it has nothing to do."""

    sequences: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    def pack(self) -> bytes:
        """To msgpack bytes; `unpack` is the inverse."""
        rows = [(s.seq_id, s.start, s.token_ids, s.block_table, s.sample, s.num_prompt_logits) for s in self.sequences]
        packed = msgpack.packb(rows)
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Batch:
        return cls([ScheduledSequence(*row) for row in msgpack.unpackb(data)])


EMPTY_BATCH = Batch([])
