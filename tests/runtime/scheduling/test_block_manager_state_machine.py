"""Random sequences come, grow and go; blocks and cached prefixes are those of a model that keeps whole prefixes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.prefix_index import PrefixNode
from shoal.runtime.scheduling.sequence import Sequence

pytestmark = pytest.mark.slow

Prefix = tuple[bytes, tuple[int, ...], int]
"""Salt, tokens up to the end of a block, and how many of them are prompt tokens."""


class BlockMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 8), block_size=st.integers(1, 3), caching=st.sampled_from([True, True, False])
    )
    def start(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching=caching, fingerprint=b"machine")
        self.sequences: list[Sequence] = []
        self.users = [0] * num_blocks
        self.cached: dict[Prefix, int] = {}
        self.released: list[int] = []
        """Cached blocks without a user, the one that was released first in front."""
        self.num_sequences = 0

    @rule(
        prompt=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=7),
        num_generated=st.sampled_from([0, 2]),
        salt=st.sampled_from([b"", b"", b"salt"]),
    )
    def come(self, prompt: list[int], num_generated: int, salt: bytes) -> None:
        seq = Sequence(
            seq_id=self.num_sequences,
            prompt_token_ids=prompt,
            max_tokens=100,
            output_token_ids=[0] * num_generated,
            salt=salt,
        )
        self.num_sequences += 1
        found = self.manager.match_prefix(seq)
        assert found == self.expected_match(seq)
        idle = [block for block in found if not self.users[block]]
        if self.manager.num_blocks_for(seq.num_tokens) - len(found) <= self.num_unused - len(idle):
            for block in found:
                self.users[block] += 1
            self.released = [block for block in self.released if block not in found]
            self.allocate(seq, seq.num_tokens, found)
            self.sequences.append(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 4))
    def grow(self, data: st.DataObject, count: int) -> None:
        """Compute all that is known, and get tokens that are not computed yet."""
        seq = data.draw(st.sampled_from(self.sequences))
        self.compute(seq, seq.num_tokens)
        if self.manager.num_blocks_for(seq.num_tokens + count) - len(seq.block_table) <= self.num_unused:
            seq.output_token_ids.extend([0] * count)
            self.allocate(seq, seq.num_tokens, None)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compute_a_part(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.sequences))
        self.compute(seq, data.draw(st.integers(seq.num_computed_tokens, seq.num_tokens)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), discard=st.sampled_from([False, False, True]))
    def go(self, data: st.DataObject, discard: bool) -> None:
        seq = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(seq)
        if discard:
            for index in range(len(seq.block_hashes)):
                block = self.cached.pop(self.prefix(seq, index), None)
                if block in self.released:
                    self.released.remove(block)
        for block in reversed(seq.block_table):
            self.users[block] -= 1
            if not self.users[block] and block in self.cached.values():
                self.released.append(block)
        self.manager.free(seq, discard=discard)

    @precondition(lambda self: not self.sequences)
    @rule()
    def clear(self) -> None:
        self.manager.clear_prefix_cache()
        self.cached, self.released = {}, []

    def allocate(self, seq: Sequence, num_tokens: int, found: list[int] | None) -> None:
        before = len(found) if found else len(seq.block_table)
        evictions = {e.block_id: e.content for e in self.manager.allocate(seq, num_tokens, found)}
        assert list(evictions) == [b for b in seq.block_table[before:] if b in self.cached.values()]
        for block in seq.block_table[before:]:
            assert not self.users[block], "it has a user"
            self.users[block] = 1
            if block in self.cached.values():
                assert block == self.released.pop(0), "another one was released earlier"
                assert self.num_unused == len(self.released), "there were blocks that hold nothing"
                (lost,) = [prefix for prefix, b in self.cached.items() if b == block]
                assert lost == content_of(evictions[block])
                del self.cached[lost]

    def compute(self, seq: Sequence, num_tokens: int) -> None:
        first = seq.num_computed_tokens // self.manager.block_size
        self.manager.mark_computed(seq, num_tokens)
        if self.manager.enable_prefix_caching:
            for index in range(first, num_tokens // self.manager.block_size):
                self.cached.setdefault(self.prefix(seq, index), seq.block_table[index])

    def expected_match(self, seq: Sequence) -> list[int]:
        blocks: list[int] = []
        for index in range((seq.num_tokens - 1) // self.manager.block_size):
            block = self.cached.get(self.prefix(seq, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def prefix(self, seq: Sequence, index: int) -> Prefix:
        end = (index + 1) * self.manager.block_size
        return seq.salt, tuple(seq.token_ids[:end]), min(end, seq.num_prompt_tokens)

    @property
    def num_unused(self) -> int:
        return self.users.count(0)

    @invariant()
    def it_is_as_in_the_model(self) -> None:
        self.manager.check_integrity()
        assert [self.manager.pool.ref_count(block) for block in range(self.manager.num_blocks)] == self.users
        assert self.manager.num_free_blocks == self.num_unused
        assert self.manager.num_cached_blocks == len(self.cached)
        for seq in self.sequences:
            assert self.manager.match_prefix(seq) == self.expected_match(seq)


def content_of(node: PrefixNode) -> Prefix:
    """What a chain of blocks holds, as the model writes it."""
    tokens: tuple[int, ...] = ()
    num_prompt_tokens = 0
    block: PrefixNode | None = node
    while block is not None:
        tokens = (*block.token_ids, *tokens)
        num_prompt_tokens += block.role
        block = block.parent
    return node.salt, tokens, num_prompt_tokens


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
