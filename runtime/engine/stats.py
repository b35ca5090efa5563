"""Counters of an engine, for whoever watches it."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What an engine has done by now, and what it holds. Only leaders schedule; a follower has zeros.

    Adding the counters of several engines gives those of all of them.
    """

    num_running_seqs: int = 0
    """Sequences that own blocks."""
    num_waiting_seqs: int = 0
    num_blocks: int = 0
    """KV cache blocks."""
    num_used_blocks: int = 0
    """Blocks in use by sequences."""
    num_cached_blocks: int = 0
    """Blocks that the prefix cache can find, in use or idle."""
    num_transfer_tokens: int = 0
    """Prompt tokens that are held for other replicas, or will be."""
    num_evicted_blocks: int = 0
    """Blocks that the prefix cache lost to sequences that needed them, in all."""
    num_preemptions: int = 0
    """Sequences whose blocks were taken, in all."""
    prefix_cache_queries: int = 0
    """Tokens that were looked up in the prefix cache, in all."""
    prefix_cache_hits: int = 0
    """Those of them that were found."""
    num_failed_transfers: int = 0
    """Prompts that were to be received and of which a part was computed here, in all."""
    num_transferred_bytes: int = 0
    """Bytes of KV cache entries that were published for other replicas or received from them, in all."""

    def __add__(self, other: EngineStats) -> EngineStats:
        return EngineStats(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    @property
    def totals(self) -> EngineStats:
        """What an engine that is gone has done: its counters, without what it held."""
        return EngineStats(**{name: getattr(self, name) for name in TOTALS})

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache in use by sequences."""
        return self.num_used_blocks / max(self.num_blocks, 1)

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of the prompt tokens that came from the prefix cache."""
        return self.prefix_cache_hits / max(self.prefix_cache_queries, 1)


TOTALS = (
    "num_evicted_blocks",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_failed_transfers",
    "num_transferred_bytes",
)
"""The fields that only grow; the others say what an engine holds."""
