"""What a group has room for, held against the real scheduler; rankings and the prefix index against searches."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from shoal.cluster.routing import prefixes as routing_prefixes
from shoal.cluster.routing.groups import GroupSpec, GroupState, Ranking, Share, decode_load
from shoal.cluster.routing.prefixes import PREFIX_TOKENS, PrefixIndex, prefix_hashes
from shoal.cluster.routing.requests import TrackedRequest
from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from shoal.runtime.scheduling.sequence import Sequence
from shoal.runtime.types import GeneratedTokens, Request, SamplingParams

MAX_MODEL_LEN = 64


@st.composite
def some_requests(draw: st.DrawFn) -> Request:
    n = draw(st.sampled_from([1, 1, 2, 3]))
    num_prompt, max_tokens = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    known = [GeneratedTokens((7,) * draw(st.integers(0, max_tokens - 1))) for _ in range(n)]
    return Request(
        request_id=str(draw(st.integers(0, 10**9))),
        prompt_token_ids=(draw(st.integers(0, 3)),) * num_prompt,
        params=SamplingParams(n=n, max_tokens=max_tokens),
        generated=tuple(known),
    )


@given(
    asked=st.lists(some_requests(), max_size=12, unique_by=lambda request: request.request_id),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(4, 30),
    max_num_seqs=st.integers(1, 6),
    caching=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_all_that_a_group_has_room_for_runs_at_once(
    asked: list[Request], block_size: int, num_blocks: int, max_num_seqs: int, caching: bool
) -> None:
    """The scheduler, with tokens enough for one step, starts every sequence that it has a place for, to its end."""
    num_blocks = max(num_blocks, -(-MAX_MODEL_LEN // block_size))
    spec = GroupSpec(role="mixed", max_num_seqs=max_num_seqs, num_kv_tokens=num_blocks * block_size)
    group = GroupState(spec)
    tracked_requests = [
        TrackedRequest.new(request, arrival=0, max_model_len=MAX_MODEL_LEN, block_size=block_size) for request in asked
    ]
    for tracked in tracked_requests:
        share = tracked.whole_share
        if group.has_room(share) and share.num_kv_tokens <= spec.num_kv_tokens:
            group.add(tracked.request.request_id, share)
    assert group.requests or not asked or all(request.params.n > 1 for request in asked)
    manager = BlockManager(num_blocks, block_size, enable_prefix_caching=caching, fingerprint=b"")
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=10**6), manager)
    num_seqs = 0
    for tracked in (t for t in tracked_requests if t.request.request_id in group.requests):
        for known in tracked.response.generated():
            num_seqs += 1
            scheduler.add(
                Sequence(
                    seq_id=num_seqs,
                    prompt_token_ids=list(tracked.request.prompt_token_ids),
                    max_tokens=tracked.max_output_tokens,
                    output_token_ids=list(known.token_ids),
                )
            )
    batch = scheduler.schedule()
    assert len(batch.sequences) == min(num_seqs, max_num_seqs)
    assert all(part.num_logits == 1 for part in batch.sequences)
    assert num_seqs <= group.max_admitted_seqs or len(group.requests) == 1


def test_room_counts_sequences_and_known_tokens_in_whole_blocks() -> None:
    spec = GroupSpec(role="mixed", max_num_seqs=4, num_kv_tokens=64)
    request = Request(
        request_id="a",
        prompt_token_ids=(1,) * 14,
        params=SamplingParams(n=2, max_tokens=8),
        generated=(GeneratedTokens((5, 5)), GeneratedTokens((5,))),
    )
    tracked = TrackedRequest.new(request, arrival=0, max_model_len=20, block_size=16)
    # 14 + 2 and 14 + 1 tokens and the next one of each: two blocks and one. The context ends after 6 tokens each.
    assert tracked.whole_share == Share(num_seqs=2, num_tokens=14 + 2 * 6, num_kv_tokens=48)
    assert tracked.answer_share == Share(num_seqs=2, num_tokens=2 * 6, num_kv_tokens=48)
    # The prefill group begins with the prompt alone.
    assert tracked.prompt_share == Share(num_seqs=2, num_tokens=14, num_kv_tokens=32, hands_over=True)
    group = GroupState(spec)
    group.add("a", tracked.whole_share)
    assert group.has_room(Share(3, 0, 16))
    assert not group.has_room(Share(4, 0, 16)), "of six sequences, five may be there"
    assert not group.has_room(Share(1, 0, 17))
    group.remove("a")
    assert group.has_room(Share(100, 0, 1000)), "alone, it must do with what there is"
    group.alive = False
    assert not group.has_room(Share(1, 0, 1))


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["add", "remove", "lose", "restore", "keep"]), st.integers(1, 5))
    )
)
@settings(max_examples=100, deadline=None)
def test_a_ranking_finds_what_a_search_finds(changes: list[tuple[int, str, int]]) -> None:
    roles = ["decode", "prefill", "mixed", "decode", "mixed"]
    groups = [GroupState(GroupSpec(role=r, max_num_seqs=3, num_kv_tokens=20)) for r in roles]  # type: ignore[arg-type]
    ranking = Ranking(groups, decode_load, {"decode", "mixed"})
    for step, (number, what, size) in enumerate(changes):
        group = groups[number]
        if what == "add":
            group.add(str(step), Share(1, size, size))
        elif what == "remove" and group.requests:
            group.remove(next(iter(group.requests)))
        elif what in ("lose", "restore"):
            group.alive = what == "restore"
        else:
            group.reserved_for = None if group.reserved_for else "x"
        ranking.update(number)
        living = [i for i, g in enumerate(groups) if g.alive and roles[i] != "prefill"]
        assert ranking.first() == min(living, key=lambda i: (decode_load(groups[i]), i), default=None)
        assert [i in ranking for i in range(5)] == [i in living for i in range(5)]


def test_prefixes_are_known_by_their_beginnings() -> None:
    beginning = tuple(range(3 * PREFIX_TOKENS))
    assert prefix_hashes(beginning) == prefix_hashes((*beginning, 1))
    assert len(prefix_hashes(beginning)) == 3
    assert prefix_hashes(beginning[:-1]) == prefix_hashes(beginning)[:2]
    assert prefix_hashes((*beginning[:-1], 5))[:2] == prefix_hashes(beginning)[:2]
    assert prefix_hashes((*beginning[:-1], 5)) != prefix_hashes(beginning)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=5), st.integers(0, 6)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_longest_known_beginning_and_its_last_holders(added: list[tuple[list[int], int]]) -> None:
    """Chains are paths through a tree, as hashes of beginnings are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_prefixes, "MAX_PREFIXES", 24)
        index = PrefixIndex()
        holders: dict[int, list[int]] = {}
        for steps, group in added:
            chain = [hash(tuple(steps[: i + 1])) for i in range(len(steps))]
            index.add(chain, group)
            for prefix in chain:
                holders[prefix] = [g for g in holders.get(prefix, []) if g != group] + [group]
            found = index.find([*chain, -1])
            assert list(found) == (holders[chain[-1]][-len(found) :] if chain else [])
            assert set(found.values()) <= {len(chain) * PREFIX_TOKENS}
            assert len(found) <= 4
            if len(holders) < 12:  # nothing was forgotten yet
                assert list(found) == (holders[chain[-1]][-4:] if chain else [])
            assert len(index) < 24 + 5
        for steps, _ in added:
            chain = [hash(tuple(steps[: i + 1])) for i in range(len(steps))]
            known = [prefix in index for prefix in chain]
            assert known == sorted(known, reverse=True), "a beginning was forgotten before what it begins"
            assert set(index.find(chain).values()) <= {sum(known) * PREFIX_TOKENS}


def test_beginnings_that_were_not_used_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_prefixes, "MAX_PREFIXES", 8)
    index = PrefixIndex()
    index.add([1, 2], 0)
    index.add([1, 3], 1)
    index.add([4], 2)  # half of what may be known: these are old now
    index.add([1], 3)
    assert index.find([1, 2]) == {0: 2 * PREFIX_TOKENS}
    assert index.find([1]) == dict.fromkeys([0, 1, 3], PREFIX_TOKENS)
    index.add([5, 6, 7], 0)
    assert [prefix in index for prefix in range(1, 8)] == [True, False, False, False, True, True, True]
    assert len(index) == 4
