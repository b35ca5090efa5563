"""Block tables of sequences, and the prefix cache: which blocks hold which tokens of whom.

Plain Python: it knows block ids, never tensors, and its decisions depend on nothing but the calls made on it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shoal.kernels.math_utils import cdiv

from .block_pool import BlockPool
from .prefix_index import PrefixIndex, PrefixNode, hash_block, root_hash
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Eviction:
    """Cached content that was dropped because its block was needed; the block is intact until the next step runs."""

    block_id: int
    content: PrefixNode


class BlockManager:
    """Allocates the `num_blocks` blocks of `block_size` tokens and finds computed prefixes again.

    `fingerprint` names everything besides the tokens that the KV of a token depends on (weights, dtype, kernels).
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool, fingerprint: bytes) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache needs at least one block of one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.fingerprint = fingerprint
        self.pool = BlockPool(num_blocks)
        self.prefixes = PrefixIndex(num_blocks)
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now: the free ones and, by eviction, the cached idle ones."""
        return self.pool.num_available

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that the prefix cache can find, idle or in use."""
        return len(self.prefixes)

    def num_blocks_for(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of `seq`, first to last; references are taken by `allocate` only.

        Never covers the last known token, whose logits are wanted, and is empty while prompt logits are pending.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching or seq.prompt_logits_pending:
            return blocks
        parent: PrefixNode | None = None
        for index in range((seq.num_tokens - 1) // self.block_size):
            block_id = self.prefixes.find(self._describe(seq, index, parent))
            if block_id is None:
                break
            blocks.append(block_id)
            parent = self.prefixes.node(block_id)
        return blocks

    def num_idle(self, block_ids: list[int]) -> int:
        """How many of the blocks have no user: using them takes as much room as new ones."""
        return sum(self.pool.ref_count(block_id) == 0 for block_id in block_ids)

    def allocate(self, seq: Sequence, num_tokens: int, prefix_blocks: list[int] | None = None) -> list[Eviction]:
        """Extend `seq.block_table` to cover positions `[0, num_tokens)`; the caller has checked that there is room.

        `prefix_blocks`, from `match_prefix` in the same step, start an empty table and count as computed.
        Returns what the prefix cache lost for it.
        """
        if prefix_blocks:
            assert not seq.block_table, f"sequence {seq.seq_id} has blocks and cannot start from a cached prefix"
            for block_id in prefix_blocks:
                self.pool.share(block_id)
            seq.block_table.extend(prefix_blocks)
            seq.num_computed_tokens = len(prefix_blocks) * self.block_size
            seq.prefix = self.prefixes.node(prefix_blocks[-1])
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table)
        assert num_new <= self.num_free_blocks, f"{num_new} blocks wanted, {self.num_free_blocks} free"
        evictions = []
        for _ in range(num_new):
            block_id, evicted = self.pool.take()
            if evicted:
                content = self.prefixes.remove(block_id)
                assert content is not None, f"block {block_id} was idle without cached content"
                evictions.append(Eviction(block_id, content))
            seq.block_table.append(block_id)
        assert self._owners.setdefault(seq.seq_id, seq) is seq, f"two sequences have the id {seq.seq_id}"
        return evictions

    def mark_computed(self, seq: Sequence, num_tokens: int) -> None:
        """Record that positions `[0, num_tokens)` are written, and offer the blocks that became full to the cache.

        Call it after the step that computed them, never before, and for known tokens only: what was computed for a
        rejected draft token is not the content of its position.
        """
        assert num_tokens <= seq.num_tokens, f"sequence {seq.seq_id}: position {num_tokens - 1} has no known token"
        first = seq.num_computed_tokens // self.block_size
        seq.num_computed_tokens = num_tokens
        if not self.enable_prefix_caching:
            return
        for index in range(first, num_tokens // self.block_size):
            node = self._describe(seq, index, seq.prefix)
            seq.prefix = self.prefixes.add(seq.block_table[index], node)

    def free(self, seq: Sequence, *, discard: bool = False) -> None:
        """Release all blocks of `seq`, the last one first, so that tails are evicted before what they continue.

        `discard=True` for a sequence with broken results: all that the prefix cache has of its tokens leaves the cache,
        whoever wrote it, since any of it may be the cause; sequences that use those blocks keep them.
        """
        if discard:
            self._discard_prefix(seq)
        for block_id in reversed(seq.block_table):
            self.pool.release(block_id, cached=block_id in self.prefixes)
        seq.block_table.clear()
        seq.num_computed_tokens = 0
        seq.prefix = None
        self._owners.pop(seq.seq_id, None)

    def clear_prefix_cache(self) -> None:
        """Forget all cached content, which must have no users."""
        assert not self._owners, f"sequences {sorted(self._owners)} still use blocks"
        for block_id in self.pool.free_all_idle():
            self.prefixes.remove(block_id)

    def check_integrity(self) -> None:
        """Raise AssertionError, with a sentence, unless every block has one state and all tables agree about it."""
        self.pool.check_integrity()
        in_tables = Counter(block_id for seq in self._owners.values() for block_id in seq.block_table)
        for block_id in range(self.num_blocks):
            count = self.pool.ref_count(block_id)
            assert count == in_tables[block_id], (
                f"block {block_id} has {count} references and is in {in_tables[block_id]} block tables"
            )
            is_idle = self.pool.is_idle(block_id)
            is_cached = block_id in self.prefixes
            assert not is_cached or is_idle or count, f"block {block_id} is free but has cached content"
            assert is_cached or not is_idle, f"block {block_id} is idle without cached content"
        self.prefixes.check_integrity()
        for seq in self._owners.values():
            assert len(set(seq.block_table)) == len(seq.block_table), f"sequence {seq.seq_id} has a block twice"
            assert self.num_blocks_for(seq.num_computed_tokens) <= len(seq.block_table), (
                f"sequence {seq.seq_id} has {seq.num_computed_tokens} computed tokens in {len(seq.block_table)} blocks"
            )

    def _describe(self, seq: Sequence, index: int, parent: PrefixNode | None) -> PrefixNode:
        """Content of the sequence's full block `index`, which follows `parent`."""
        start = index * self.block_size
        token_ids = seq.slice(start, start + self.block_size)
        role = min(max(seq.num_prompt_tokens - start, 0), self.block_size)
        hashes = seq.block_hashes
        if index == len(hashes):
            hashes.append(hash_block(hashes[-1] if hashes else root_hash(self.fingerprint, seq.salt), token_ids, role))
        return PrefixNode(parent, hashes[index], token_ids, role, seq.salt)

    def _discard_prefix(self, seq: Sequence) -> None:
        for digest in seq.block_hashes:
            block_id = self.prefixes.block_with_digest(digest)
            if block_id is None:
                continue
            self.prefixes.remove(block_id)
            if self.pool.is_idle(block_id):
                self.pool.free_idle(block_id)
