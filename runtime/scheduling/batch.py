"""The decision of one step: values that the leader of an attention group sends to its followers."""

from __future__ import annotations

import msgspec

UNKNOWN_TOKEN = -1
"""Placeholder id in a batch that is scheduled before the previous step's tokens are known."""


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The tokens of one sequence that a step computes: positions `[start, start + len(token_ids))`."""

    seq_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    """Blocks that hold positions `[0, start + len(token_ids))`, in order."""
    num_prompt_tokens: int
    """Of the sequence: its tokens from this position on were generated."""
    sample: bool
    """Whether the last scheduled token is the last known one, so that its logits give the next."""
    num_prompt_logits: int = 0
    """How many of the last scheduled tokens are prompt tokens whose logits were asked for (`prompt_logprobs`)."""


class RecordWrite(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Records that came from another replica and go into the cache before the step computes anything."""

    seq_id: int
    start: int
    end: int
    """Positions `[start, end)` are written, the last ones of a payload of `num_bytes`."""
    num_bytes: int
    block_table: list[int]
    """Blocks that hold positions `[0, end)` at least, in order."""


class Batch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one attention group does in one step; empty when it has nothing to do."""

    sequences: list[ScheduledSequence]
    writes: list[RecordWrite] = msgspec.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.sequences or self.writes)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    def pack(self) -> bytes:
        """Encode as msgpack; `unpack` is the inverse."""
        return _ENCODER.encode(self)

    @classmethod
    def unpack(cls, data: bytes) -> Batch:
        """Decode a batch that a rank of the same group packed; msgspec.DecodeError (a ValueError) for anything else."""
        return _DECODER.decode(data)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Batch)

EMPTY_BATCH = Batch([])
