"""Counters of an engine, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine has done by now, and what it holds. Only leaders schedule; a follower has zeros."""

    num_running_seqs: int
    """Sequences that own blocks."""
    num_waiting_seqs: int
    num_blocks: int
    """KV cache blocks."""
    num_used_blocks: int
    """Blocks in use by sequences."""
    num_cached_blocks: int
    """Blocks that the prefix cache can find, in use or idle."""
    num_evicted_blocks: int
    """Blocks that the prefix cache lost to sequences that needed them, in all."""
    num_preemptions: int
    """Sequences whose blocks were taken, in all."""
    prefix_cache_queries: int
    """Tokens that were looked up in the prefix cache, in all."""
    prefix_cache_hits: int
    """Those of them that were found."""
    num_transfer_tokens: int
    """Prompt tokens that are held for other replicas, or will be."""
    num_failed_transfers: int
    """Prompts that were to be received and of which a part was computed here, in all."""
