"""Budget of the host memory in which prompts wait for other replicas to read them."""

from __future__ import annotations

from .sequence import Sequence, SequenceStatus


class TransferBuffer:
    """Prompt tokens whose KV is held for other replicas, or will be.

    A sequence with `remote_decode` reserves room before it is admitted and holds it until its KV was read: through
    preemption and beyond its end. One sequence alone may exceed `max_tokens`, so that every prompt gets its turn.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"a transfer buffer must hold at least 1 token, got max_tokens={max_tokens}")
        self.max_tokens = max_tokens
        self._reserved: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        return sum(self._reserved.values())

    def reserve(self, seq: Sequence) -> bool:
        """Take room for the prompt of `seq`, once; False if there is none now."""
        if seq.seq_id in self._reserved:
            return True
        num_tokens = self.num_tokens
        if self.max_tokens is not None and 0 < num_tokens > self.max_tokens - seq.num_prompt_tokens:
            return False
        self._reserved[seq.seq_id] = seq.num_prompt_tokens
        return True

    def holds(self, seq_id: int) -> bool:
        return seq_id in self._reserved

    def release(self, seq: Sequence) -> None:
        """Give the room of a finished sequence back; does nothing if it never had any."""
        assert seq.status is SequenceStatus.FINISHED, f"sequence {seq.seq_id} may still send its KV"
        self._reserved.pop(seq.seq_id, None)
