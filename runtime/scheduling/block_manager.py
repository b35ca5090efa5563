"""Ownership of cache blocks: free lists, reference counts, generations and the prefix cache.

A block is always exactly one of

    free          nobody refers to it, its content is worthless
    cached idle   nobody refers to it, its content can be found by hash; least recently released first
    in use        ref_count sequences have it in their block table; its content may be cached as well

Plain Python: it knows block ids, never tensors, and its decisions depend on nothing but the calls made on it.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from hashlib import sha256

from .sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class PrefixNode:
    """Content of one full block and, through `parent`, of every block before it.

    A record depends on all tokens up to its own, so two blocks are interchangeable only when their whole chains are.
    """

    parent: PrefixNode | None
    digest: bytes
    token_ids: list[int]
    role: int
    """Offset of the first generated token in the block; the block size where all are prompt tokens."""
    salt: bytes


def root_hash(fingerprint: bytes, salt: bytes) -> bytes:
    """The parent of a sequence's first block: which model computed the records, and for whom. 32 bytes."""
    return sha256(struct.pack("<q", len(fingerprint)) + fingerprint + salt).digest()


def hash_block(parent: bytes, token_ids: list[int], role: int) -> bytes:
    """SHA-256 of a full block after `parent` (32 bytes): role and token ids as little-endian 64-bit integers."""
    return sha256(parent + struct.pack(f"<{len(token_ids) + 1}q", role, *token_ids)).digest()


class BlockManager:
    """Hands out the `num_blocks` blocks of `block_size` tokens and finds computed prefixes again.

    `fingerprint` names everything besides the tokens that a record depends on (weights, dtype, kernels).
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool, fingerprint: bytes) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache needs at least one block of one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.fingerprint = fingerprint
        self._free: deque[int] = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._nodes: list[PrefixNode | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now: the free ones and, by eviction, the cached idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that the prefix cache can find, idle or in use."""
        return len(self._block_of)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def generation(self, block_id: int) -> int:
        """Changes whenever the block loses its last user or its cached content: an older value marks a stale user."""
        return self._generations[block_id]

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of `seq`, first to last; references are taken by `allocate` only.

        Never covers the last known token, whose logits are wanted, and is empty while prompt logits are pending.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching or seq.prompt_logits_pending:
            return blocks
        parent: PrefixNode | None = None
        for index in range((seq.num_tokens - 1) // self.block_size):
            node = self._describe(seq, index, parent)
            block_id = self._block_of.get(node.digest)
            if block_id is None:
                break
            cached = self._nodes[block_id]
            if not _same_prefix(cached, node):
                break
            blocks.append(block_id)
            parent = cached
        return blocks

    def num_idle(self, block_ids: list[int]) -> int:
        """How many of the blocks have no user: using them takes as much room as new ones."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def allocate(self, seq: Sequence, num_tokens: int, prefix_blocks: list[int] | None = None) -> None:
        """Extend `seq.block_table` to cover positions `[0, num_tokens)`; the caller has checked that there is room.

        `prefix_blocks`, from `match_prefix` in the same step, start an empty table and count as computed.
        """
        if prefix_blocks:
            assert not seq.block_table, f"sequence {seq.seq_id} has blocks and cannot start from a cached prefix"
            for block_id in prefix_blocks:
                if self._ref_counts[block_id] == 0:
                    del self._idle[block_id]
                self._ref_counts[block_id] += 1
            seq.block_table.extend(prefix_blocks)
            seq.num_computed_tokens = len(prefix_blocks) * self.block_size
            seq.prefix = self._nodes[prefix_blocks[-1]]
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table)
        assert num_new <= self.num_free_blocks, f"{num_new} blocks wanted, {self.num_free_blocks} free"
        for _ in range(num_new):
            block_id = self._free.popleft() if self._free else self._evict()
            self._ref_counts[block_id] = 1
            seq.block_table.append(block_id)
        assert self._owners.setdefault(seq.seq_id, seq) is seq, f"two sequences have the id {seq.seq_id}"

    def mark_computed(self, seq: Sequence, num_tokens: int) -> None:
        """Record that positions `[0, num_tokens)` are written, and offer the blocks that became full to the cache.

        Call it after the step that computed them, never before. Content that is cached already stays where it is.
        """
        first = seq.num_computed_tokens // self.block_size
        seq.num_computed_tokens = num_tokens
        if not self.enable_prefix_caching:
            return
        for index in range(first, num_tokens // self.block_size):
            node = self._describe(seq, index, seq.prefix)
            known = self._block_of.setdefault(node.digest, seq.block_table[index])
            if known == seq.block_table[index]:
                self._nodes[known] = node
            elif _same_prefix(self._nodes[known], node):
                # One chain object per content keeps later comparisons short.
                seq.prefix = self._nodes[known]
                continue
            seq.prefix = node

    def free(self, seq: Sequence, *, discard: bool = False) -> None:
        """Give all blocks of `seq` back, the last one first, so that tails are evicted before what they continue.

        `discard=True` for a sequence with broken results: all that the prefix cache has of its tokens leaves the cache,
        whoever wrote it, since any of it may be the cause; sequences that use those blocks keep them.
        """
        if discard:
            self._discard_prefix(seq)
        for block_id in reversed(seq.block_table):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._generations[block_id] += 1
                if self._nodes[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._idle[block_id] = None
        seq.block_table.clear()
        seq.num_computed_tokens = 0
        seq.prefix = None
        self._owners.pop(seq.seq_id, None)

    def clear_prefix_cache(self) -> None:
        """Forget all cached content, which must have no users."""
        assert not self._owners, f"sequences {sorted(self._owners)} still use blocks"
        while self._idle:
            self._free.append(self._evict())

    def check_integrity(self) -> None:
        """Raise AssertionError, with a sentence, unless every block has one state and all tables agree about it."""
        in_tables = Counter(block_id for seq in self._owners.values() for block_id in seq.block_table)
        assert len(set(self._free)) == len(self._free), "a block is on the free list twice"
        free = set(self._free)
        for block_id in range(self.num_blocks):
            states = (block_id in free) + (block_id in self._idle) + (self._ref_counts[block_id] > 0)
            assert states == 1, f"block {block_id} is in {states} of the states free, cached idle and in use"
            count = self._ref_counts[block_id]
            assert count == in_tables[block_id], (
                f"block {block_id} has {count} references and is in {in_tables[block_id]} block tables"
            )
            node = self._nodes[block_id]
            assert node is None or self._block_of.get(node.digest) == block_id, (
                f"block {block_id} has cached content that its hash does not find"
            )
            assert node is None or block_id not in free, f"block {block_id} is free but has cached content"
            assert node is not None or block_id not in self._idle, f"block {block_id} is idle without cached content"
        for digest, block_id in self._block_of.items():
            node = self._nodes[block_id]
            assert node is not None, f"a hash finds block {block_id}, which holds nothing"
            assert node.digest == digest, f"a hash finds block {block_id}, which holds something else"
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
            block_id = self._block_of.get(digest)
            if block_id is None:
                continue
            self._uncache(block_id)
            if block_id in self._idle:
                del self._idle[block_id]
                self._generations[block_id] += 1
                self._free.append(block_id)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        self._uncache(block_id)
        self._generations[block_id] += 1
        return block_id

    def _uncache(self, block_id: int) -> None:
        node = self._nodes[block_id]
        if node is not None:
            del self._block_of[node.digest]
            self._nodes[block_id] = None


def _same_prefix(a: PrefixNode | None, b: PrefixNode | None) -> bool:
    """Whether two chains have equal content; hashes are not consulted, so that a collision cannot matter."""
    while a is not b:
        if a is None or b is None or a.token_ids != b.token_ids or a.role != b.role or a.salt != b.salt:
            return False
        a, b = a.parent, b.parent
    return True
