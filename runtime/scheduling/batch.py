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
    """Prompt length of the sequence: its tokens from this position on were generated."""
    num_logits: int
    """How many of the last scheduled tokens have their logits sampled: 0 before the last known token, 1 with it, and
    k + 1 if k draft tokens follow it."""
    num_prompt_logits: int = 0
    """How many of the last scheduled tokens are prompt tokens whose logits are scored (`prompt_logprobs`)."""


class KVWrite(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """KV that was received from another replica and is written to the cache before the step computes anything."""

    seq_id: int
    start: int
    end: int
    """Positions `[start, end)` are written, from the end of a payload of `num_bytes`."""
    num_bytes: int
    block_table: list[int]
    """Blocks that hold positions `[0, end)` at least, in order."""


class Batch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one attention group computes in one step; empty if it has nothing to compute."""

    sequences: list[ScheduledSequence]
    writes: list[KVWrite] = msgspec.field(default_factory=list)

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
