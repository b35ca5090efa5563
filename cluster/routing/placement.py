"""Where a request goes: which groups have room for it, and which of them is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from .groups import GroupState, Ranking, Share, decode_load, migration_load, prefill_load
from .prefixes import PrefixIndex
from .requests import TrackedRequest, pick_to_move

Place = tuple[int | None, int]
"""The prefill group, or None where one group does it all, and the group that finishes the request."""

MAX_SEARCHED = 2
"""Groups that are searched for a request to move, per call."""


class Placement:
    """Which requests are with which groups, and which groups are best for a new one."""

    def __init__(self, groups: Sequence[GroupState]) -> None:
        self._groups = groups
        self._prefill_loads = Ranking(groups, prefill_load, {"prefill", "mixed"})
        self._decode_loads = Ranking(groups, decode_load, {"decode", "mixed"})
        self._migration_loads = Ranking(groups, migration_load, {"prefill", "decode", "mixed"})
        self._prefixes = PrefixIndex()
        self._reserved_for: str | None = None
        """The first request of the queue, if no group has room for it."""
        self._reserved: list[int] = []
        """The groups that are reserved for it."""
        self.ready: dict[int, None] = dict.fromkeys(range(len(groups)))
        """Groups that may take a request over: idle ones, and those whose last running one caught up."""

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def join(self, tracked: TrackedRequest, place: Place) -> None:
        """Note that a request is with its groups."""
        tracked.prefill, tracked.decode = prefill, decode = place
        if prefill is None:
            self._add(tracked, decode, tracked.whole_share)
        else:
            self._add(tracked, prefill, tracked.prompt_share)
            self._add(tracked, decode, tracked.answer_share)
        self._prefixes.add(tracked.prefixes, decode if prefill is None else prefill)
        self.forget(tracked)

    def leave(self, tracked: TrackedRequest, group: int) -> None:
        """Note that a group has nothing more to do for a request; may be called again."""
        state = self._groups[group]
        if tracked.request_id in state.requests:
            state.remove(tracked.request_id)
            if state.alive and (not state.requests or tracked.recomputing):
                self.ready[group] = None
            self._touch(group)

    def grow(self, tracked: TrackedRequest, num_kv_tokens: int) -> None:
        """Note that a request takes more of the cache of its decode group."""
        assert tracked.decode is not None
        if num_kv_tokens:
            self._groups[tracked.decode].grow(tracked.request_id, num_kv_tokens)
            self._touch(tracked.decode)

    def reconsider_migration(self, group: int) -> None:
        """Let the group's requests be considered for moving again."""
        self._groups[group].no_migration_candidate = False
        self._touch(group)

    def lose(self, group: int) -> None:
        """Take a group out of service."""
        self._groups[group].alive = False
        self.ready.pop(group, None)
        if group in self._reserved:
            self._release_reservation()
        self._touch(group)

    def restore(self, group: int) -> None:
        """Take a group into service again."""
        self._groups[group].alive = True
        if not self._groups[group].requests:
            self.ready[group] = None
        self._touch(group)

    def forget(self, tracked: TrackedRequest) -> None:
        """Release what is reserved for a request that no longer waits."""
        if self._reserved_for == tracked.request_id:
            self._release_reservation()

    def check_integrity(self, requests: Mapping[str, TrackedRequest]) -> None:
        """Raise AssertionError, with a sentence, unless every group has its requests' shares and the right sums."""
        for number, state in enumerate(self._groups):
            assert state.alive or not state.requests, f"group {number} is lost and has {list(state.requests)}"
            for request_id, share in state.requests.items():
                tracked = requests[request_id]
                assert number in (tracked.prefill, tracked.decode), f"{request_id} is not with group {number}"
                wanted = tracked.share_of(number)
                assert share == wanted, f"{request_id} has {share} of group {number}, not {wanted}"
            sums = [sum(getattr(s, f.name) for s in state.requests.values()) for f in fields(Share)]
            counted = [state.num_seqs, state.num_tokens, state.num_kv_tokens, state.num_handovers]
            assert counted == sums, f"group {number} counts {counted}, its requests have {sums}"
            assert state.requests or not state.alive or number in self.ready, f"group {number} is idle and not ready"
            reserved_for = self._reserved_for if number in self._reserved else None
            assert state.reserved_for == reserved_for, (
                f"group {number} is reserved for {state.reserved_for}, not {reserved_for}"
            )
        assert all(self._groups[number].alive for number in (*self.ready, *self._reserved)), (
            "a lost group is counted on"
        )
        assert len(self._reserved) <= 2, f"groups {self._reserved} are reserved for one request"
        assert self._reserved_for is None or requests[self._reserved_for].decode is None, (
            f"{self._reserved_for} waits no longer"
        )

    # -- choices --------------------------------------------------------------------------------------------------

    @property
    def has_reservation(self) -> bool:
        """Whether a group is reserved for some request."""
        return bool(self._reserved)

    @property
    def has_place(self) -> bool:
        """Whether any group could accept a small request."""
        partner = self._decode_loads.first()
        if partner is not None and self._groups[partner].accepts_small:
            return True
        first = self._prefill_loads.first()
        return first is not None and self._groups[first].accepts_small and self._groups[first].accepts_whole

    def choose(self, tracked: TrackedRequest) -> Place | None:
        """The groups for a request; None if none has room."""
        decode = self._pick_decode(tracked)
        prefill = None if decode is None else self._pick_prefill(tracked)
        if decode is None or prefill is None:
            return self._pick_whole(tracked)
        if self._groups[prefill].spec.role == "mixed" or not tracked.can_split:
            return None, prefill
        return prefill, decode

    def release_reservation_unless(self, tracked: TrackedRequest) -> None:
        """Release the groups that are reserved for any other request than the first of the queue."""
        if self._reserved_for != tracked.request_id:
            self._release_reservation()

    def reserve_for(self, tracked: TrackedRequest) -> None:
        """Reserve the least loaded group for the first request of the queue, as none has room for it."""
        self._reserved_for = tracked.request_id
        for reserved in self._reserved:
            if not self._groups[reserved].has_room(self._part_for(reserved, tracked)):
                return  # a reserved group is still emptying
        loads = self._prefill_loads if self._pick_prefill(tracked) is None else self._decode_loads
        group = loads.first()
        if group is not None:
            self._reserved.append(group)
            self._groups[group].reserved_for = self._reserved_for
            self._touch(group)

    def pick_migration(self, target: int, requests: Mapping[str, TrackedRequest]) -> tuple[TrackedRequest, bool] | None:
        """The request that `target` should take over from the busiest group, and whether it is running there."""
        room = self._groups[target]
        for _ in range(MAX_SEARCHED):
            if (group := self._migration_loads.first()) is None:
                return None
            crowded = self._groups[group]
            if crowded.no_migration_candidate or len(crowded.requests) < 2 or crowded.num_seqs < room.num_seqs + 2:
                return None
            found = pick_to_move(group, crowded, requests)
            if found is not None:
                tracked, _ = found
                uneven = crowded.num_seqs - room.num_seqs >= 2 * tracked.n
                return found if uneven and self._fits(tracked, target, tracked.whole_share) else None
            crowded.no_migration_candidate = True
            self._touch(group)
        return None

    def place_at(self, target: int, tracked: TrackedRequest, *, is_running: bool) -> Place:
        """The groups of a request that moves to `target`, which has room for it."""
        if not is_running and self._groups[target].spec.role == "prefill" and tracked.can_split:
            partner = self._pick_decode(tracked)
            if partner is not None:
                return target, partner
        return None, target

    def _pick_prefill(self, tracked: TrackedRequest) -> int | None:
        """The group that has this prompt computed soonest: fewest tokens to compute, less those its cache holds."""
        cached = self._prefixes.find(tracked.prefixes)
        best: tuple[int, int] | None = None
        for group in {*cached, *self._least_loaded(self._prefill_loads, tracked)}:
            state = self._groups[group]
            if state.spec.role != "decode" and self._fits(tracked, group, self._part_for(group, tracked)):
                found = state.num_tokens - cached.get(group, 0), group
                best = found if best is None else min(best, found)
        return None if best is None else best[1]

    def _part_for(self, group: int, tracked: TrackedRequest) -> Share:
        """The share that a group would have of a request in the normal case."""
        role = self._groups[group].spec.role
        if role == "mixed" or not tracked.can_split:
            return tracked.whole_share
        return tracked.prompt_share if role == "prefill" else tracked.answer_share

    def _pick_decode(self, tracked: TrackedRequest) -> int | None:
        """The decode group with the most room."""
        share = tracked.answer_share
        for group in self._least_loaded(self._decode_loads, tracked):
            if self._fits(tracked, group, share):
                return group
        return None

    def _pick_whole(self, tracked: TrackedRequest) -> Place | None:
        """A group that has time for a whole request, where no two have room to share it."""
        least_loaded = self._least_loaded(self._prefill_loads, tracked)
        no_prefill_groups = not least_loaded
        for group in (*least_loaded, *self._least_loaded(self._decode_loads, tracked)):
            state = self._groups[group]
            has_time = not state.requests or state.accepts_whole or no_prefill_groups
            if has_time and self._fits(tracked, group, tracked.whole_share):
                return None, group
        return None

    def _least_loaded(self, loads: Ranking, tracked: TrackedRequest) -> tuple[int, ...]:
        """The first group of a ranking, and those that are reserved for this request."""
        first = loads.first()
        found = () if first is None else (first,)
        if self._reserved_for != tracked.request_id:
            return found
        return *found, *[group for group in self._reserved if group in loads]

    def _fits(self, tracked: TrackedRequest, group: int, share: Share) -> bool:
        state = self._groups[group]
        return state.reserved_for in (None, tracked.request_id) and state.has_room(share)

    def _add(self, tracked: TrackedRequest, group: int, share: Share) -> None:
        state = self._groups[group]
        state.add(tracked.request_id, share)
        self.ready.pop(group, None)
        self._touch(group)

    def _release_reservation(self) -> None:
        reserved = self._reserved
        self._reserved = []
        self._reserved_for = None
        for group in reserved:
            self._groups[group].reserved_for = None
            self._touch(group)

    def _touch(self, group: int) -> None:
        self._prefill_loads.update(group)
        self._decode_loads.update(group)
        self._migration_loads.update(group)
