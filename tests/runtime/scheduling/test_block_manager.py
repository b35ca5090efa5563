from __future__ import annotations

import hashlib
import struct

import pytest

from shoal.runtime.scheduling import block_manager as block_manager_module
from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.prefix_index import hash_block, root_hash
from shoal.runtime.scheduling.sequence import Sequence


def make_manager(num_blocks: int = 8, block_size: int = 4, *, fingerprint: bytes = b"model") -> BlockManager:
    return BlockManager(num_blocks, block_size, enable_prefix_caching=True, fingerprint=fingerprint)


def make_seq(seq_id: int, prompt: list[int], output: list[int] | None = None, *, salt: bytes = b"") -> Sequence:
    return Sequence(seq_id=seq_id, prompt_token_ids=prompt, max_tokens=100, output_token_ids=output or [], salt=salt)


def compute(manager: BlockManager, seq: Sequence) -> list[int]:
    """Allocate and compute all known tokens, with prefix hits; returns the blocks that were hits."""
    hits = manager.match_prefix(seq)
    manager.allocate(seq, seq.num_tokens, hits)
    manager.mark_computed(seq, seq.num_tokens)
    manager.check_integrity()
    return hits


def test_allocate_covers_exactly_the_tokens_and_counts_up_from_block_zero() -> None:
    manager = make_manager()
    seq = make_seq(0, [1] * 9)
    manager.allocate(seq, 4)
    assert seq.block_table == [0]
    manager.allocate(seq, 5)
    assert seq.block_table == [0, 1]
    manager.allocate(seq, 8)
    assert seq.block_table == [0, 1]
    manager.allocate(seq, 9)
    assert seq.block_table == [0, 1, 2]
    assert manager.num_free_blocks == 5
    assert [manager.pool.ref_count(b) for b in range(4)] == [1, 1, 1, 0]
    manager.check_integrity()


@pytest.mark.parametrize(
    ("prompt_length", "num_hit_blocks"),
    [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (14, 3)],
)
def test_a_hit_leaves_at_least_the_last_token_to_compute(prompt_length: int, num_hit_blocks: int) -> None:
    manager = make_manager()
    compute(manager, make_seq(0, list(range(14))))
    assert manager.match_prefix(make_seq(1, list(range(prompt_length)))) == [0, 1, 2][:num_hit_blocks]


def test_a_hit_stops_at_the_first_different_block_and_shares_what_is_before() -> None:
    manager = make_manager()
    first = make_seq(0, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 9])
    second = make_seq(1, [1, 1, 1, 1, 7, 2, 2, 2, 3, 3, 3, 3, 9])
    compute(manager, first)
    assert compute(manager, second) == [0]
    assert second.block_table == [0, 4, 5, 6]
    assert manager.pool.ref_count(0) == 2
    manager.free(first)
    assert manager.pool.ref_count(0) == 1
    manager.check_integrity()


def test_blocks_are_found_only_once_they_are_computed() -> None:
    manager = make_manager()
    seq, twin = make_seq(0, [5] * 9), make_seq(1, [5] * 9)
    manager.allocate(seq, 9)
    assert manager.match_prefix(twin) == []
    manager.mark_computed(seq, 7)
    assert manager.match_prefix(twin) == [0]
    manager.mark_computed(seq, 8)
    assert manager.match_prefix(twin) == [0, 1]


def test_content_computed_twice_is_cached_once() -> None:
    manager = make_manager()
    first, second = make_seq(0, [5] * 9), make_seq(1, [5] * 9)
    manager.allocate(first, 9)
    manager.allocate(second, 9)
    manager.mark_computed(first, 9)
    manager.mark_computed(second, 9)
    assert manager.num_cached_blocks == 2
    assert manager.match_prefix(make_seq(2, [5] * 9)) == [0, 1]
    manager.free(second)
    manager.check_integrity()
    assert manager.num_free_blocks == 5
    # The second sequence's copies went to the free list: everything else is handed out before they are looked at again.
    third = make_seq(3, [6] * 20)
    manager.allocate(third, 20)
    assert third.block_table == [6, 7, 5, 4, 3]


def test_uncached_blocks_are_taken_first_then_the_least_recently_released_from_its_tail() -> None:
    manager = make_manager(num_blocks=6)
    old, new = make_seq(0, [1] * 8), make_seq(1, [2] * 9)
    compute(manager, old)
    compute(manager, new)
    assert (old.block_table, new.block_table) == ([0, 1], [2, 3, 4])
    manager.free(old)
    manager.free(new)
    assert manager.num_free_blocks == 6
    filler = make_seq(2, [3] * 24)
    manager.allocate(filler, 24)
    # 5 was never used, 4 is the partial (uncached) tail of `new`; then cached ones: `old` before `new`, tails first.
    assert filler.block_table == [5, 4, 1, 0, 3, 2]
    assert manager.num_cached_blocks == 0
    manager.check_integrity()


def test_a_hit_makes_a_block_recently_used() -> None:
    manager = make_manager(num_blocks=4)
    for seq_id, token in enumerate([1, 2, 3]):
        seq = make_seq(seq_id, [token] * 4)
        compute(manager, seq)
        manager.free(seq)
    again = make_seq(3, [1] * 5)
    assert compute(manager, again) == [0]
    manager.free(again)
    filler = make_seq(4, [9] * 12)
    manager.allocate(filler, 12)
    assert filler.block_table == [3, 1, 2]
    assert manager.match_prefix(make_seq(5, [1] * 5)) == [0]


def test_hits_on_idle_blocks_take_room() -> None:
    manager = make_manager(num_blocks=3)
    seq = make_seq(0, [1] * 9)
    compute(manager, seq)
    assert manager.num_idle(manager.match_prefix(make_seq(1, [1] * 9))) == 0
    manager.free(seq)
    assert manager.num_idle(manager.match_prefix(make_seq(1, [1] * 9))) == 2
    other = make_seq(2, [1] * 9)
    assert compute(manager, other) == [0, 1]
    assert manager.num_free_blocks == 0
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free"):
        manager.allocate(other, 13)


def test_a_prompt_does_not_reuse_blocks_of_generated_tokens() -> None:
    manager = make_manager()
    # Block 0 is all prompt, block 1 two prompt and two generated tokens, block 2 all generated.
    compute(manager, make_seq(0, [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]))
    all_prompt = make_seq(1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert manager.match_prefix(all_prompt) == [0]
    other_split = make_seq(2, [1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13])
    assert manager.match_prefix(other_split) == [0]
    same_split = make_seq(3, [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13])
    assert manager.match_prefix(same_split) == [0, 1, 2]


def test_salt_and_fingerprint_separate() -> None:
    manager = make_manager()
    compute(manager, make_seq(0, [1] * 5, salt=b"a"))
    assert manager.match_prefix(make_seq(1, [1] * 5, salt=b"a")) == [0]
    assert manager.match_prefix(make_seq(2, [1] * 5, salt=b"b")) == []
    assert manager.match_prefix(make_seq(3, [1] * 5)) == []
    assert root_hash(b"model", b"") != root_hash(b"other", b"")
    assert root_hash(b"model", b"a") != root_hash(b"model", b"b")
    assert root_hash(b"ab", b"c") != root_hash(b"a", b"bc")


def test_the_hash_is_the_documented_chain() -> None:
    manager = make_manager(block_size=2, fingerprint=b"fp")
    seq = make_seq(0, [1, 2, 3], [2**40])
    compute(manager, seq)
    root = hashlib.sha256(b"\x02" + bytes(7) + b"fp").digest()
    first = hashlib.sha256(root + struct.pack("<qqq", 2, 1, 2)).digest()
    second = hashlib.sha256(first + struct.pack("<qqq", 1, 3, 2**40)).digest()
    assert seq.block_hashes == [first, second]
    assert hash_block(root, [1, 2], 2) == first


def test_prompt_logits_take_no_hits_until_they_are_delivered() -> None:
    manager = make_manager()
    compute(manager, make_seq(0, [1] * 9))
    seq = Sequence(seq_id=1, prompt_token_ids=[1] * 9, max_tokens=1, needs_prompt_logits=True)
    assert manager.match_prefix(seq) == []
    seq.num_delivered_prompt_logits = 8
    assert manager.match_prefix(seq) == []
    seq.num_delivered_prompt_logits = 9
    assert manager.match_prefix(seq) == [0, 1]


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = BlockManager(4, 4, enable_prefix_caching=False, fingerprint=b"")
    seq = make_seq(0, [1] * 9)
    assert compute(manager, seq) == []
    manager.free(seq)
    assert manager.num_cached_blocks == 0
    assert seq.block_hashes == []
    assert manager.match_prefix(make_seq(1, [1] * 9)) == []
    manager.check_integrity()


def constant_hash(parent: bytes, token_ids: list[int], role: int) -> bytes:
    return bytes(32)


def test_a_hash_collision_never_serves_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager_module, "hash_block", constant_hash)
    manager = make_manager()
    compute(manager, make_seq(0, [1] * 4 + [2] * 4 + [3] * 4))
    assert manager.num_cached_blocks == 1
    assert manager.match_prefix(make_seq(1, [1] * 9)) == [0]
    assert manager.match_prefix(make_seq(2, [2] * 9)) == []
    assert manager.match_prefix(make_seq(3, [1] * 9, salt=b"x")) == []
    assert manager.match_prefix(make_seq(4, [1] * 3, [1] * 6)) == []
    manager.check_integrity()


def test_a_hash_collision_never_serves_the_right_tokens_after_another_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefixes_collide(parent: bytes, token_ids: list[int], role: int) -> bytes:
        return bytes(32) if token_ids[0] in (1, 2) else hash_block(parent, token_ids, role)

    monkeypatch.setattr(block_manager_module, "hash_block", prefixes_collide)
    manager = make_manager(num_blocks=4)
    victim = make_seq(0, [1] * 4 + [3] * 4)
    compute(manager, victim)
    sharer = make_seq(1, [1] * 4 + [3] * 4 + [4])
    assert compute(manager, sharer) == [0, 1]
    # The colliding prefix takes the hash over, while block 1 ([3]*4 after [1]*4) is still cached.
    manager.free(make_seq_with_hashes(victim.block_hashes[:1]), discard=True)
    usurper = make_seq(2, [2] * 4)
    compute(manager, usurper)
    asker = make_seq(3, [2] * 4 + [3] * 4 + [4])
    assert asker.block_hashes == []
    assert manager.match_prefix(asker) == usurper.block_table
    assert asker.block_hashes == victim.block_hashes
    # Its true continuation is found, through a chain of other objects, once the true prefix is back.
    manager.free(usurper, discard=True)
    back = make_seq(4, [1] * 4)
    compute(manager, back)
    assert manager.match_prefix(make_seq(5, [1] * 4 + [3] * 4 + [4])) == [back.block_table[0], 1]


def make_seq_with_hashes(block_hashes: list[bytes]) -> Sequence:
    seq = make_seq(99, [1])
    seq.block_hashes = list(block_hashes)
    return seq


def test_evicted_content_is_returned() -> None:
    manager = make_manager(num_blocks=3)
    seq = make_seq(0, [1] * 8)
    compute(manager, seq)
    manager.free(seq)
    other = make_seq(1, [7] * 9)
    assert manager.allocate(make_seq(2, [3]), 1) == [], "a block that holds nothing comes first"
    assert [(e.block_id, e.content.token_ids) for e in manager.allocate(other, 8)] == [(1, [1] * 4), (0, [1] * 4)]
    assert other.block_table == [1, 0]


def test_discard_takes_the_tokens_out_of_the_cache_but_not_from_those_who_share_them() -> None:
    manager = make_manager()
    sharer, broken = make_seq(0, [1] * 9), make_seq(1, [1] * 8 + [2] * 5)
    compute(manager, sharer)
    assert compute(manager, broken) == [0, 1]
    manager.free(broken, discard=True)
    manager.check_integrity()
    assert manager.num_cached_blocks == 0
    assert manager.match_prefix(make_seq(2, [1] * 9)) == []
    assert sharer.block_table == [0, 1, 2]
    manager.free(sharer)
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_discard_reaches_idle_copies_of_the_sequence() -> None:
    manager = make_manager()
    seq = make_seq(0, [1] * 8)
    compute(manager, seq)
    manager.free(seq)
    # The last block is recomputed into a new one, so its first copy is cached outside of the block table.
    assert compute(manager, seq) == [0]
    assert seq.block_table == [0, 2]
    assert manager.num_cached_blocks == 2
    manager.free(seq, discard=True)
    assert manager.num_cached_blocks == 0
    manager.check_integrity()


def test_what_is_computed_again_after_its_eviction_is_found_again() -> None:
    manager = make_manager(num_blocks=3)
    seq, filler = make_seq(0, [1] * 9), make_seq(1, [2] * 12)
    compute(manager, seq)
    manager.free(seq)
    manager.allocate(filler, 12)
    manager.free(filler)
    assert compute(manager, seq) == []
    assert manager.match_prefix(make_seq(2, [1] * 9)) == seq.block_table[:2]


def test_check_integrity_names_the_broken_block() -> None:
    manager = make_manager()
    seq = make_seq(0, [1] * 9)
    compute(manager, seq)
    seq.block_table.append(0)
    with pytest.raises(AssertionError, match="block 0 has 1 references and is in 2 block tables"):
        manager.check_integrity()
    seq.block_table.pop()
    manager.pool._free.append(2)
    with pytest.raises(AssertionError, match="block 2 is in 2 of the states free, cached idle and in use"):
        manager.check_integrity()
    manager.pool._free.pop()
    manager.pool._free.popleft()
    with pytest.raises(AssertionError, match="block 3 is in 0 of the states"):
        manager.check_integrity()
    manager.pool._free.appendleft(3)
    manager.check_integrity()
    manager.prefixes._nodes[1] = None
    with pytest.raises(AssertionError, match="a hash finds block 1, which holds nothing"):
        manager.check_integrity()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_an_empty_cache_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_blocks} blocks of {block_size}"):
        make_manager(num_blocks, block_size)
