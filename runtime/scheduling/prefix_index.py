"""Finds the cache block that holds a given prefix: a map from content to block ids."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True, slots=True, eq=False)
class PrefixNode:
    """Content of one full block and, through `parent`, of every block before it.

    The KV of a token depends on all tokens up to it, so two blocks are interchangeable only if their whole chains are.
    """

    parent: PrefixNode | None
    digest: bytes
    token_ids: list[int]
    role: int
    """Offset of the first generated token in the block; the block size if all are prompt tokens."""
    salt: bytes


def root_hash(fingerprint: bytes, salt: bytes) -> bytes:
    """The parent hash of a sequence's first block (32 bytes): which model computed the KV, and for which salt."""
    return sha256(struct.pack("<q", len(fingerprint)) + fingerprint + salt).digest()


def hash_block(parent: bytes, token_ids: list[int], role: int) -> bytes:
    """SHA-256 of a full block after `parent` (32 bytes): role and token ids as little-endian 64-bit integers."""
    return sha256(parent + struct.pack(f"<{len(token_ids) + 1}q", role, *token_ids)).digest()


class PrefixIndex:
    """The content of each block whose content can be found, and where each content is. Each content has one block."""

    def __init__(self, num_blocks: int) -> None:
        self._nodes: list[PrefixNode | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block_id: int) -> bool:
        return self._nodes[block_id] is not None

    def node(self, block_id: int) -> PrefixNode | None:
        """The indexed content of a block."""
        return self._nodes[block_id]

    def block_with_digest(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def find(self, node: PrefixNode) -> int | None:
        """The block that holds this content. Tokens are compared, so a hash collision finds nothing."""
        block_id = self._block_of.get(node.digest)
        return block_id if block_id is not None and _same_prefix(self._nodes[block_id], node) else None

    def add(self, block_id: int, node: PrefixNode) -> PrefixNode:
        """Index the content of a block, unless its digest is taken; returns the node to chain the next block to.

        If the same content is indexed already, that is the node which is there: one chain object per content keeps
        later comparisons short.
        """
        known = self._block_of.setdefault(node.digest, block_id)
        if known == block_id:
            self._nodes[block_id] = node
            return node
        other = self._nodes[known]
        return other if other is not None and _same_prefix(other, node) else node

    def remove(self, block_id: int) -> PrefixNode | None:
        """Forget the content of a block; returns it."""
        node = self._nodes[block_id]
        if node is not None:
            del self._block_of[node.digest]
            self._nodes[block_id] = None
        return node

    def check_integrity(self) -> None:
        """Raise AssertionError, with a sentence, unless hashes and contents agree."""
        for digest, block_id in self._block_of.items():
            node = self._nodes[block_id]
            assert node is not None, f"a hash finds block {block_id}, which holds nothing"
            assert node.digest == digest, f"a hash finds block {block_id}, which holds something else"
        for block_id, node in enumerate(self._nodes):
            assert node is None or self._block_of.get(node.digest) == block_id, (
                f"block {block_id} has cached content that its hash does not find"
            )


def _same_prefix(a: PrefixNode | None, b: PrefixNode | None) -> bool:
    """Whether two chains have equal content; hashes are not consulted, so that a collision cannot matter."""
    while a is not b:
        if a is None or b is None or a.token_ids != b.token_ids or a.role != b.role or a.salt != b.salt:
            return False
        a, b = a.parent, b.parent
    return True
