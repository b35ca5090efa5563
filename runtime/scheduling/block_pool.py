"""Cache block ids: which are free, which are in use and by how many sequences."""

from __future__ import annotations

from collections import OrderedDict, deque


class BlockPool:
    """Reference counts and free lists of the blocks `[0, num_blocks)`. A block is always exactly one of

    free          no references, content worthless
    cached idle   no references, content worth keeping; evicted in order of release
    in use        referenced by `ref_count` block tables
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: the free ones and, by eviction, the cached idle ones."""
        return len(self._free) + len(self._idle)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._idle

    def take(self) -> tuple[int, bool]:
        """A block with one reference, and whether it was evicted: then its cached content is lost."""
        evicted = not self._free
        block_id = self._idle.popitem(last=False)[0] if evicted else self._free.popleft()
        self._ref_counts[block_id] = 1
        return block_id, evicted

    def share(self, block_id: int) -> None:
        """One more reference to a block that is in use or cached idle."""
        if self._ref_counts[block_id] == 0:
            del self._idle[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, *, cached: bool) -> None:
        """One reference less; the last one makes the block idle if its content is `cached`, else free."""
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id] > 0:
            return
        if cached:
            self._idle[block_id] = None
        else:
            self._free.append(block_id)

    def free_idle(self, block_id: int) -> None:
        """Make a cached idle block free: its content is worth nothing any more."""
        del self._idle[block_id]
        self._free.append(block_id)

    def free_all_idle(self) -> list[int]:
        """Make every cached idle block free, in order of release; returns them."""
        block_ids = list(self._idle)
        for block_id in block_ids:
            self.free_idle(block_id)
        return block_ids

    def check_integrity(self) -> None:
        """Raise AssertionError, with a sentence, unless every block is in exactly one state."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        for block_id in range(self.num_blocks):
            states = (block_id in free) + (block_id in self._idle) + (self._ref_counts[block_id] > 0)
            assert states == 1, f"block {block_id} is in {states} of the states free, cached idle and in use"
