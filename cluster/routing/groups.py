"""Attention groups as the router sees them, and rankings that find one without looking at all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from ..replica_spec import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """An attention group that takes requests."""

    role: Role
    max_num_seqs: int
    num_kv_tokens: int
    """Tokens that its cache holds."""


@dataclass(slots=True)
class Share:
    """What a group has of a request."""

    num_seqs: int
    num_tokens: int
    """To compute, at most."""
    num_kv_tokens: int
    """Cache for the tokens that are known, and one more each, of sequences that share none."""
    hands_over: bool = False
    """Another group goes on with it."""


@dataclass(slots=True)
class Group:
    """The requests that are with a group, and their shares in sum."""

    spec: GroupSpec
    alive: bool = True
    requests: dict[str, Share] = field(default_factory=dict)
    """In the order in which they came."""
    num_seqs: int = 0
    num_tokens: int = 0
    num_kv_tokens: int = 0
    num_handovers: int = 0
    """Requests that other groups wait for."""
    kept_for: str | None = None
    """The only request that may join."""
    settled: bool = False
    """None of its requests is worth moving; another one may be."""
    max_admitted_seqs: int = field(init=False)
    """Running ones, and a few that wait so that no step is short of them; the others wait in the router, where any
    group can take them."""

    def __post_init__(self) -> None:
        self.max_admitted_seqs = self.spec.max_num_seqs + max(1, self.spec.max_num_seqs // 4)

    def has_room(self, share: Share) -> bool:
        """Whether the known tokens of all its sequences, and the next of each, would fit into the cache at once.

        A request that is alone may need more than there is: an engine lets its continuations wait for each other.
        """
        if not self.requests:
            return self.alive
        return (
            self.alive
            and self.num_seqs + share.num_seqs <= self.max_admitted_seqs
            and self.num_kv_tokens + share.num_kv_tokens <= self.spec.num_kv_tokens
        )

    @property
    def is_open(self) -> bool:
        """Whether it has a place for a request that may be small."""
        return self.kept_for is None and (not self.requests or self.num_seqs < self.max_admitted_seqs)

    @property
    def may_answer(self) -> bool:
        """Whether it takes whole requests although there are groups for both halves: as mixed groups do, and a prefill
        group that nobody waits for, but for half of its places, which are left for prompts to come."""
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
        self.settled = False

    def remove(self, request_id: str) -> None:
        share = self.requests.pop(request_id)
        self.num_seqs -= share.num_seqs
        self.num_tokens -= share.num_tokens
        self.num_kv_tokens -= share.num_kv_tokens
        self.num_handovers -= share.hands_over

    def grow(self, request_id: str, num_kv_tokens: int) -> None:
        """A request takes more of the cache."""
        self.requests[request_id].num_kv_tokens += num_kv_tokens
        self.num_kv_tokens += num_kv_tokens


LATER = 1e6
"""Puts a group behind all that do not have this in their keys."""


def prefill_load(group: Group) -> float:
    """Those with a place first, then by tokens to compute."""
    return group.num_tokens / group.spec.num_kv_tokens + (0.0 if group.is_open else LATER)


def decode_load(group: Group) -> float:
    """Those with a place first, then by what is used, of the cache or of the places."""
    cache = group.num_kv_tokens / group.spec.num_kv_tokens
    places = group.num_seqs / group.spec.max_num_seqs
    return (cache if cache > places else places) + (0.0 if group.is_open else LATER)


def crowd(group: Group) -> float:
    """Those with something to give away first, then by sequences, most first."""
    return (LATER if group.settled or len(group.requests) < 2 else 0.0) - group.num_seqs


class Ranking:
    """The living groups of some roles by a key, found without looking at all of them; equal ones by number, so that the
    same events always lead to the same decisions.

    A tournament: `_winners[i]` has the smaller key of `_winners[2 * i]` and `_winners[2 * i + 1]`; the last of them are
    the groups themselves.
    """

    def __init__(self, groups: Sequence[Group], key: Callable[[Group], float], roles: set[Role]) -> None:
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
        """The key of a group may have changed, or whether it lives."""
        if group in self._members:
            self._changed.add(group)

    def first(self) -> int | None:
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
