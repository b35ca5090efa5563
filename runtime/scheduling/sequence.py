"""One continuation of one prompt, as the scheduler and the block manager see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .prefix_index import PrefixNode


class SequenceStatus(Enum):
    """Waiting sequences own no blocks; loading and running ones do; finished ones have left the scheduler."""

    WAITING = "waiting"
    LOADING = "loading"
    """Its prompt's KV is being received from another replica."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """Tokens and progress of one continuation; `n > 1` is several sequences of the same prompt.

    The caller fills the first group of fields. A sequence may start with `output_token_ids` that were generated
    earlier: they are recomputed like those of a preempted sequence.
    """

    seq_id: int
    prompt_token_ids: list[int]
    max_tokens: int
    """Most tokens to generate; the caller finishes the sequence when it has them."""
    output_token_ids: list[int] = field(default_factory=list)
    needs_prompt_logits: bool = False
    """Every prompt position needs logits once, so nothing of the prompt may come from the prefix cache before that."""
    remote_prefill_pending: bool = False
    """Another replica computes the prompt: once admitted the sequence loads, and computes nothing before `resume`."""
    remote_decode: bool = False
    """The prompt's KV is sent to another replica, from a buffer that must have room for it."""
    salt: bytes = b""
    """Sequences share cached blocks only with sequences of the same salt."""

    # Set by the scheduler and the block manager.
    status: SequenceStatus = SequenceStatus.WAITING
    arrival: int = -1
    """Position in the order of `Scheduler.add` calls; preemption keeps it."""
    num_computed_tokens: int = 0
    """Positions `[0, num_computed_tokens)` have their KV in the cache, in the blocks of `block_table`."""
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Prompt tokens that the first admission found in the prefix cache."""
    num_delivered_prompt_logits: int = 0
    """Prompt positions `[0, this)` had their logits computed; recomputing them does not ask again."""
    num_preemptions: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the leading full blocks, as far as they were needed; kept through preemption."""
    prefix: PrefixNode | None = None
    """Content of the computed full blocks, the last one first."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and what was generated so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_positions(self) -> int:
        """Most positions that are ever computed; the last generated token is not, as nothing follows it."""
        return len(self.prompt_token_ids) + self.max_tokens - 1

    @property
    def prompt_logits_pending(self) -> bool:
        return self.needs_prompt_logits and self.num_delivered_prompt_logits < len(self.prompt_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """All known tokens, a new list."""
        return self.prompt_token_ids + self.output_token_ids

    def slice(self, start: int, end: int) -> list[int]:
        """Known tokens at positions `[start, end)`, a new list, at the cost of its length."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]
