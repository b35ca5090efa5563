"""Where a request goes: which groups have room for it, and which of them is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from .groups import Group, Ranking, Share, crowd, decode_load, prefill_load
from .prefixes import PrefixIndex
from .requests import TrackedRequest, choose_to_move

Place = tuple[int | None, int]
"""The prefill group, unless one group answers the whole request, and the group that answers."""

MAX_SEARCHED = 2
"""Groups in which something to move is looked for at a time."""


class Placement:
    """Requests with their groups."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._prefill_loads = Ranking(groups, prefill_load, {"prefill", "mixed"})
        self._decode_loads = Ranking(groups, decode_load, {"decode", "mixed"})
        self._crowds = Ranking(groups, crowd, {"prefill", "decode", "mixed"})
        self._prefixes = PrefixIndex()
        self._kept_for: str | None = None
        """The request that nobody has room for, although others may."""
        self._kept: list[int] = []
        """The groups that it waits for, and nobody else may join."""
        self.ready: dict[int, None] = dict.fromkeys(range(len(groups)))
        """Groups that may take something over: those without requests, and those whose last one caught up."""

    # -- who is where ------------------------------------------------------------------------------------------------

    def join(self, tracked: TrackedRequest, place: Place) -> None:
        """A request is given to its groups."""
        tracked.prefill, tracked.decode = prefill, decode = place
        if prefill is None:
            self._add(tracked, decode, tracked.whole_share)
        else:
            self._add(tracked, prefill, tracked.prompt_share)
            self._add(tracked, decode, tracked.answer_share)
        self._prefixes.add(tracked.prefixes, decode if prefill is None else prefill)
        self.forget(tracked)

    def leave(self, tracked: TrackedRequest, group: int) -> None:
        """A group has nothing to do for a request any more; it may have left before."""
        state = self._groups[group]
        if tracked.request_id in state.requests:
            state.remove(tracked.request_id)
            if state.alive and (not state.requests or tracked.catching_up):
                self.ready[group] = None
            self._touch(group)

    def grow(self, tracked: TrackedRequest, num_kv_tokens: int) -> None:
        """A request takes more of the cache of the group that answers it."""
        assert tracked.decode is not None
        if num_kv_tokens:
            self._groups[tracked.decode].grow(tracked.request_id, num_kv_tokens)
            self._touch(tracked.decode)

    def unsettle(self, group: int) -> None:
        """Something of the group may be worth moving again."""
        self._groups[group].settled = False
        self._touch(group)

    def lose(self, group: int) -> None:
        """A group takes nothing any more."""
        self._groups[group].alive = False
        self.ready.pop(group, None)
        if group in self._kept:
            self._keep_none()
        self._touch(group)

    def restore(self, group: int) -> None:
        """A group is there again."""
        self._groups[group].alive = True
        if not self._groups[group].requests:
            self.ready[group] = None
        self._touch(group)

    def forget(self, tracked: TrackedRequest) -> None:
        """A request waits no longer."""
        if self._kept_for == tracked.request_id:
            self._keep_none()

    def check_integrity(self, requests: Mapping[str, TrackedRequest]) -> None:
        """Raise AssertionError, with a sentence, unless every group has what its requests say, and counts it right."""
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
            kept_for = self._kept_for if number in self._kept else None
            assert state.kept_for == kept_for, f"group {number} is kept for {state.kept_for}, not {kept_for}"
        assert all(self._groups[number].alive for number in (*self.ready, *self._kept)), "a lost group is counted on"
        assert len(self._kept) <= 2, f"groups {self._kept} are kept for one request"
        assert self._kept_for is None or requests[self._kept_for].decode is None, f"{self._kept_for} waits no longer"

    # -- where to --------------------------------------------------------------------------------------------------

    @property
    def keeps(self) -> bool:
        """Whether a group is kept for some request."""
        return bool(self._kept)

    @property
    def has_place(self) -> bool:
        """Whether a request could go anywhere if only it was small."""
        partner = self._decode_loads.first()
        if partner is not None and self._groups[partner].is_open:
            return True
        first = self._prefill_loads.first()
        return first is not None and self._groups[first].is_open and self._groups[first].may_answer

    def choose(self, tracked: TrackedRequest) -> Place | None:
        """None: nobody has room."""
        partner = self._choose_partner(tracked)
        first = None if partner is None else self._choose_first(tracked)
        if partner is None or first is None:
            return self._choose_alone(tracked)
        if self._groups[first].spec.role == "mixed" or not tracked.splittable:
            return None, first
        return first, partner

    def yield_to(self, tracked: TrackedRequest) -> None:
        """A request is the first in the queue: groups are kept for no other."""
        if self._kept_for != tracked.request_id:
            self._keep_none()

    def keep_for(self, tracked: TrackedRequest) -> None:
        """Let the least loaded group become empty for the first request, as nobody has room for it."""
        self._kept_for = tracked.request_id
        for kept in self._kept:
            if not self._groups[kept].has_room(self._part_for(kept, tracked)):
                return  # it is not empty enough yet
        loads = self._prefill_loads if self._choose_first(tracked) is None else self._decode_loads
        group = loads.first()
        if group is not None:
            self._kept.append(group)
            self._groups[group].kept_for = self._kept_for
            self._touch(group)

    def find_to_move(self, target: int, requests: Mapping[str, TrackedRequest]) -> tuple[TrackedRequest, bool] | None:
        """What `target` should take over from the most crowded group, and whether it was begun there."""
        room = self._groups[target]
        for _ in range(MAX_SEARCHED):
            if (group := self._crowds.first()) is None:
                return None
            crowded = self._groups[group]
            if crowded.settled or len(crowded.requests) < 2 or crowded.num_seqs < room.num_seqs + 2:
                return None
            found = choose_to_move(group, crowded, requests)
            if found is not None:
                tracked, _ = found
                uneven = crowded.num_seqs - room.num_seqs >= 2 * tracked.n
                return found if uneven and self._fits(tracked, target, tracked.whole_share) else None
            crowded.settled = True
            self._touch(group)
        return None

    def choose_at(self, target: int, tracked: TrackedRequest, *, begun: bool) -> Place:
        """The place of a request that `target`, where it fits, takes over."""
        if not begun and self._groups[target].spec.role == "prefill" and tracked.splittable:
            partner = self._choose_partner(tracked)
            if partner is not None:
                return target, partner
        return None, target

    def _choose_first(self, tracked: TrackedRequest) -> int | None:
        """The group with the fewest tokens to compute before this prompt is done, what it has of it not counted."""
        cached = self._prefixes.find(tracked.prefixes)
        best: tuple[int, int] | None = None
        for group in {*cached, *self._least_loaded(self._prefill_loads, tracked)}:
            state = self._groups[group]
            if state.spec.role != "decode" and self._fits(tracked, group, self._part_for(group, tracked)):
                found = state.num_tokens - cached.get(group, 0), group
                best = found if best is None else min(best, found)
        return None if best is None else best[1]

    def _part_for(self, group: int, tracked: TrackedRequest) -> Share:
        """What a group would have of a request, if it is not for want of others."""
        role = self._groups[group].spec.role
        if role == "mixed" or not tracked.splittable:
            return tracked.whole_share
        return tracked.prompt_share if role == "prefill" else tracked.answer_share

    def _choose_partner(self, tracked: TrackedRequest) -> int | None:
        """The decode group with the most room."""
        share = tracked.answer_share
        for group in self._least_loaded(self._decode_loads, tracked):
            if self._fits(tracked, group, share):
                return group
        return None

    def _choose_alone(self, tracked: TrackedRequest) -> Place | None:
        """A group that has time to answer a request alone, for want of two that have room to share it."""
        least_loaded = self._least_loaded(self._prefill_loads, tracked)
        nobody = not least_loaded
        for group in (*least_loaded, *self._least_loaded(self._decode_loads, tracked)):
            state = self._groups[group]
            has_time = not state.requests or state.may_answer or nobody
            if has_time and self._fits(tracked, group, tracked.whole_share):
                return None, group
        return None

    def _least_loaded(self, loads: Ranking, tracked: TrackedRequest) -> tuple[int, ...]:
        """The one of those that anyone may join, and what is kept for this request."""
        first = loads.first()
        found = () if first is None else (first,)
        if self._kept_for != tracked.request_id:
            return found
        return *found, *[group for group in self._kept if group in loads]

    def _fits(self, tracked: TrackedRequest, group: int, share: Share) -> bool:
        state = self._groups[group]
        return state.kept_for in (None, tracked.request_id) and state.has_room(share)

    def _add(self, tracked: TrackedRequest, group: int, share: Share) -> None:
        state = self._groups[group]
        state.add(tracked.request_id, share)
        self.ready.pop(group, None)
        self._touch(group)

    def _keep_none(self) -> None:
        kept, self._kept, self._kept_for = self._kept, [], None
        for group in kept:
            self._groups[group].kept_for = None
            self._touch(group)

    def _touch(self, group: int) -> None:
        self._prefill_loads.update(group)
        self._decode_loads.update(group)
        self._crowds.update(group)
