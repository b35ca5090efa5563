"""Attention groups as the router sees them, and rankings that find one without looking at all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from ..replica_spec import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """Role and size of an attention group that takes requests."""

    role: Role
    max_num_seqs: int
    num_kv_tokens: int
    """Tokens that its cache holds."""


@dataclass(slots=True)
class Share:
    """What a group has to do for a request."""

    num_seqs: int
    num_tokens: int
    """Upper bound of the tokens to compute."""
    num_kv_tokens: int
    """Cache for the known tokens of all sequences and one more each, if they share nothing."""
    hands_over: bool = False
    """Another group goes on with the request."""


@dataclass(slots=True)
class GroupState:
    """The requests that are with a group, and the sums of their shares."""

    spec: GroupSpec
    alive: bool = True
    requests: dict[str, Share] = field(default_factory=dict)
    """In order of arrival."""
    num_seqs: int = 0
    num_tokens: int = 0
    num_kv_tokens: int = 0
    num_handovers: int = 0
    """Requests that other groups wait for."""
    reserved_for: str | None = None
    """The only request that may join; None: any may."""
    no_migration_candidate: bool = False
    """None of its present requests is worth moving."""
    max_admitted_seqs: int = field(init=False)
    """Limit for `num_seqs`: those that run, and a few that wait so that every step is full. Others wait in the router,
    where any group can take them."""

    def __post_init__(self) -> None:
        self.max_admitted_seqs = self.spec.max_num_seqs + max(1, self.spec.max_num_seqs // 4)

    def has_room(self, share: Share) -> bool:
        """Whether the known tokens of all its sequences, and the next of each, would fit into the cache at once.

        A request that is alone may need more than there is: an engine lets its samples wait for each other.
        """
        if not self.requests:
            return self.alive
        return (
            self.alive
            and self.num_seqs + share.num_seqs <= self.max_admitted_seqs
            and self.num_kv_tokens + share.num_kv_tokens <= self.spec.num_kv_tokens
        )

    @property
    def accepts_small(self) -> bool:
        """Whether it could still accept a small request."""
        return self.reserved_for is None and (not self.requests or self.num_seqs < self.max_admitted_seqs)

    @property
    def accepts_whole(self) -> bool:
        """Whether it takes whole requests although there are decode groups.

        Mixed groups do, and prefill groups that no other group waits for, up to half of their places: the rest is left
        for prompts to come.
        """
        if self.spec.role == "mixed":
            return True
        return self.spec.role == "prefill" and not self.num_handovers and 2 * self.num_seqs < self.spec.max_num_seqs

    def add(self, request_id: str, share: Share) -> None:
        assert request_id not in self.requests, f"request {request_id!r} is with the group twice"
        self.requests[request_id] = share
        self.num_seqs += share.num_seqs
        self.num_tokens += share.num_tokens
        self.num_kv_tokens += share.num_kv_tokens
        self.num_handovers += share.hands_over
        self.no_migration_candidate = False

    def remove(self, request_id: str) -> None:
        share = self.requests.pop(request_id)
        self.num_seqs -= share.num_seqs
        self.num_tokens -= share.num_tokens
        self.num_kv_tokens -= share.num_kv_tokens
        self.num_handovers -= share.hands_over

    def grow(self, request_id: str, num_kv_tokens: int) -> None:
        """Add to the cache that a request takes."""
        self.requests[request_id].num_kv_tokens += num_kv_tokens
        self.num_kv_tokens += num_kv_tokens


LATER = 1e6
"""Added to a key, ranks a group behind all groups without it."""


def prefill_load(group: GroupState) -> float:
    """Key of the prefill ranking: groups with a place first, then by tokens to compute."""
    return group.num_tokens / group.spec.num_kv_tokens + (0.0 if group.accepts_small else LATER)


def decode_load(group: GroupState) -> float:
    """Key of the decode ranking: groups with a place first, then by the fuller of cache and places."""
    cache = group.num_kv_tokens / group.spec.num_kv_tokens
    places = group.num_seqs / group.spec.max_num_seqs
    return (cache if cache > places else places) + (0.0 if group.accepts_small else LATER)


def migration_load(group: GroupState) -> float:
    """Key of the migration ranking: groups that may give a request away first, then by sequences, most first."""
    return (LATER if group.no_migration_candidate or len(group.requests) < 2 else 0.0) - group.num_seqs


class Ranking:
    """The living group with the smallest key among some roles; of equal ones, the one with the smallest number.

    Every event changes one or two keys, and the router asks for the first group several times per event. A scan would
    cost a microsecond per four groups each time; this tournament tree costs a few comparisons per changed key, which
    keeps a decision in the tens of microseconds with thousands of groups (`benchmarks/router.py`).

    `_winners[i]` has the smaller key of `_winners[2 * i]` and `_winners[2 * i + 1]`; the leaves are the groups.
    """

    def __init__(self, groups: Sequence[GroupState], key: Callable[[GroupState], float], roles: set[Role]) -> None:
        self._groups, self._key = groups, key
        self._members = frozenset(number for number, group in enumerate(groups) if group.spec.role in roles)
        self._changed = set(self._members)
        self._keys = [inf] * len(groups)
        self._winners = [0] * len(groups) + list(range(len(groups)))
        for node in range(len(groups) - 1, 0, -1):
            self._winners[node] = min(self._winners[2 * node], self._winners[2 * node + 1])

    def __contains__(self, group: int) -> bool:
        return group in self._members and self._groups[group].alive

    def update(self, group: int) -> None:
        """Note that a group's key may have changed, or whether it is alive."""
        if group in self._members:
            self._changed.add(group)

    def first(self) -> int | None:
        """The group with the smallest key; None if none is alive."""
        if self._changed:
            for group in self._changed:
                self._play_again(group)
            self._changed.clear()
        winner = self._winners[1]
        return None if self._keys[winner] == inf else winner

    def _play_again(self, group: int) -> None:
        keys, winners = self._keys, self._winners
        state = self._groups[group]
        key = self._key(state) if state.alive else inf
        if key == keys[group]:
            return
        keys[group] = key
        node = (len(keys) + group) // 2
        while node:
            one, other = winners[2 * node], winners[2 * node + 1]
            wins = one if keys[one] < keys[other] or (keys[one] == keys[other] and one < other) else other
            if winners[node] == wins != group:
                return  # as before
            winners[node] = wins
            node //= 2
