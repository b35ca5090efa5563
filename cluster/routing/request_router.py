"""Which attention group does what for which request: the router's decisions, a function of state and event alone.

A request is queued, then with a mixed group until it is finished; with disaggregated prefill and decode, it is with a
prefill group and the decode group that was reserved for it, then with the decode group alone:

    queued -> whole on a mixed group                                             -> finished
    queued -> prefilling (KV chunks go to the decode group as they are computed) -> decoding -> finished

Where that would leave groups with nothing to do, they answer whole requests, too.

The requests of a lost group return to the queue with the tokens that are known of their answers; a decode group whose
prefill group is lost computes the rest of the prompt itself. Every attempt at a request has an id of its own, so that
late events of an earlier attempt are recognised and ignored. Events that come twice, late or in another order within an
attempt change no answer: at most, something is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.response import refusal
from shoal.runtime.types import (
    EngineOutput,
    Finished,
    GeneratedTokens,
    Prefilled,
    PromptLoaded,
    Request,
    RequestOutput,
    Tokens,
)

from ..workers.wire import Abort, Command, EndPrefill, Event
from .groups import GroupSpec, GroupState
from .placement import Place, Placement
from .requests import TrackedRequest

MAX_BLOCKED = 3
"""Stop scanning the queue after this many requests that fit nowhere."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a command to a group."""

    group: int
    command: Command


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand something to whoever asked: what is new of an answer, and the whole answer once it is finished."""

    output: EngineOutput | RequestOutput


Effect = Send | Deliver


class RequestRouter:
    """Requests and groups; every method is one event and returns what to do about it, in order.

    Groups are given requests that they have room for (`GroupState.has_room`), in order of arrival. No request starves:
    one that fits nowhere may be passed by later ones, but for the first such request the least loaded group of each
    kind that it lacks is reserved, so that it waits at most for those to empty.

    Once the queue is empty, an idle group takes requests over from the busiest one: those that only wait there and, one
    at a time, those that are running. This shortens the end of a batch, when some groups have long answers left and
    others nothing.
    """

    def __init__(self, groups: Sequence[GroupSpec], *, max_model_len: int, block_size: int = 1) -> None:
        """`block_size`: block size of the caches; a sequence takes whole blocks."""
        self._groups = [GroupState(spec) for spec in groups]
        self._placement = Placement(self._groups)
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._tracked: dict[str, TrackedRequest] = {}
        self._queue: deque[tuple[int, str]] = deque()
        """Arrival and name of requests, in order of arrival; an aborted one stays until its turn."""
        self._allowed: frozenset[str] | None = None
        self._held: list[tuple[int, str]] = []
        """Queued requests that are not allowed to be sent, in any order."""
        self._num_submitted = 0
        self.num_failed_transfers = 0
        self.num_replays = 0
        """Requests that returned to the queue because their group was lost."""
        self.num_moves = 0
        """Requests that were moved to another group."""

    @property
    def num_in_flight(self) -> int:
        return len(self._tracked)

    def generated_in(self, group: int) -> dict[str, int]:
        """The requests that are with a group, and the number of their generated tokens that are known."""
        return {i: self._tracked[i].num_known_tokens for i in self._groups[group].requests}

    def submit(self, requests: Iterable[Request]) -> list[Effect]:
        """Queue requests; ValueError, before any is taken, when an id is in use."""
        new: dict[str, TrackedRequest] = {}
        for arrival, request in enumerate(requests, self._num_submitted):
            if request.request_id in self._tracked or request.request_id in new:
                raise ValueError(f"request id {request.request_id!r} is already in flight")
            new[request.request_id] = TrackedRequest.new(
                request, arrival=arrival, max_model_len=self._max_model_len, block_size=self._block_size
            )
        self._num_submitted += len(new)
        self._tracked |= new
        for request_id, tracked in new.items():
            (self._queue if self._may_send(request_id) else self._held).append((tracked.arrival, request_id))
        return self._dispatch()

    def abort(self, request_id: str) -> list[Effect]:
        """Drop a request; unknown ids are ignored."""
        tracked = self._tracked.get(request_id)
        return [] if tracked is None else [*self._remove(tracked), *self._dispatch()]

    def fail(self, request_id: str, message: str) -> list[Effect]:
        """Answer a request with an error; unknown ids are ignored."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return []
        for end in refusal(tracked.request, message):
            tracked.response.add(end)
        return [Deliver(tracked.response.output()), *self._remove(tracked), *self._dispatch()]

    def restrict(self, allowed: frozenset[str] | None) -> list[Effect]:
        """Send only these requests to groups from now on, and move none between groups; None: send all."""
        self._allowed = allowed
        waiting = sorted([*self._queue, *self._held])
        self._queue = deque(entry for entry in waiting if self._may_send(entry[1]))
        self._held = [entry for entry in waiting if not self._may_send(entry[1]) and entry[1] in self._tracked]
        return self._dispatch()

    def _may_send(self, request_id: str) -> bool:
        return self._allowed is None or request_id in self._allowed

    def handle(self, group: int, event: Event) -> list[Effect]:
        """Take an event of a group; ignored when the request is not with it, or in another attempt."""
        tracked = self._tracked.get(event.request_id)
        if tracked is None or event.id.attempt != tracked.attempt or group not in (tracked.prefill, tracked.decode):
            return []
        is_prefill_group = group == tracked.prefill
        match event:
            case Tokens():
                return self._tokens(tracked, group, event)
            case Prefilled():
                return self._prefilled(tracked, group, event)
            case Finished():
                return self._sample_finished(tracked, group, event)
            case KVChunk() if is_prefill_group:
                return self._chunk(tracked, event)
            case PromptLoaded() if not is_prefill_group:
                return self._loaded(tracked, event)
        return []

    def lose(self, group: int) -> list[Effect]:
        """A group is lost with all its requests; nothing is sent to it before `restore`."""
        self._placement.lose(group)
        effects: list[Effect] = []
        for request_id in list(self._groups[group].requests):
            tracked = self._tracked[request_id]
            if group == tracked.decode or tracked.needs_prefill:
                self.num_replays += 1
                effects += self._requeue(tracked, except_group=group)
            else:
                effects += self._end_prefill(tracked, None)
                self._leave_prefill(tracked)
        return effects + self._dispatch()

    def restore(self, group: int) -> list[Effect]:
        """A lost group has a new worker and takes requests again."""
        self._placement.restore(group)
        return self._dispatch()

    def check_integrity(self) -> None:
        """Raise AssertionError, with a sentence, unless every request is where the tables say, and nowhere else."""
        self._placement.check_integrity(self._tracked)
        queued = {*self._queue, *self._held}
        for request_id, tracked in self._tracked.items():
            is_queued = (tracked.arrival, request_id) in queued
            assert is_queued == (tracked.decode is None), f"{request_id} is queued and with a group, or neither"
            for group in (tracked.decode, None if tracked.prefilled else tracked.prefill):
                assert group is None or request_id in self._groups[group].requests, f"group {group} lacks {request_id}"

    # -- where requests go -------------------------------------------------------------------------------------------

    def _dispatch(self) -> list[Effect]:
        """Send queued requests to groups that have room; with an empty queue, let idle groups take requests over."""
        effects: list[Effect] = []
        placement, queue = self._placement, self._queue
        num_blocked = 0
        smallest: TrackedRequest | None = None
        """The smallest request that fitted nowhere."""
        while num_blocked < min(MAX_BLOCKED, len(queue)):
            if not placement.has_place and (num_blocked > 0 or not placement.has_reservation):
                break
            arrival, request_id = queue[num_blocked]
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.arrival != arrival:
                del queue[num_blocked]  # aborted
                continue
            if num_blocked == 0:
                placement.release_reservation_unless(tracked)
            if smallest is not None and tracked.needs_no_less_than(smallest):
                num_blocked += 1
            elif (place := placement.choose(tracked)) is not None:
                del queue[num_blocked]
                effects.append(self._send(tracked, place))
            else:
                if num_blocked == 0:
                    placement.reserve_for(tracked)
                num_blocked += 1
                smallest = tracked
        return effects + self._spread()

    def _send(self, tracked: TrackedRequest, place: Place) -> Send:
        self._placement.join(tracked, place)
        request, attempt = tracked.request, tracked.attempt
        prefill, decode = place
        if prefill is None:
            return Send(decode, replace(request, attempt=attempt, generated=tracked.known))
        return Send(prefill, replace(request, attempt=attempt, generated=(), do_remote_decode=True))

    def _spread(self) -> list[Effect]:
        """Let groups with nothing to do take requests over, one each in turn."""
        effects: list[Effect] = []
        if self._allowed is not None:
            return effects
        ready = self._placement.ready
        while ready and not self._queue:
            target = next(iter(ready))
            found = self._placement.pick_migration(target, self._tracked)
            if found is not None:
                effects += self._move(*found, target)
            elif self._groups[target].requests:
                del ready[target]
            else:
                break  # the others find nothing either
        return effects

    def _move(self, tracked: TrackedRequest, is_running: bool, target: int) -> list[Effect]:
        """Move a request to another group, which takes no further ones before a running request has caught up."""
        effects = self._withdraw(tracked, except_group=None)
        effects.append(self._send(tracked, self._placement.place_at(target, tracked, is_running=is_running)))
        tracked.num_moves += 1
        self.num_moves += 1
        if is_running:
            tracked.recomputing = True
        else:
            self._placement.ready[target] = None
        return effects

    # -- what groups report ------------------------------------------------------------------------------------------

    def _tokens(self, tracked: TrackedRequest, group: int, tokens: Tokens) -> list[Effect]:
        """Tokens that are known are skipped; those behind a gap are ignored and missed at the end."""
        assert tracked.decode is not None
        num_before = tracked.response.num_known_tokens(tokens.sample_index)
        new = tracked.response.add(tokens)
        num_after = tracked.response.num_known_tokens(tokens.sample_index)
        self._placement.grow(tracked, tracked.grow(num_before, num_after))
        effects: list[Effect] = [] if new is None else [Deliver(new)]
        if group != tracked.decode:
            return effects
        if tracked.recomputing and num_after > num_before:
            tracked.recomputing = False
            self._placement.ready[tracked.decode] = None
            effects += self._spread()
        elif num_before.bit_length() < num_after.bit_length():  # with twice as many tokens, more are expected
            self._placement.reconsider_migration(tracked.decode)
            effects += self._spread()
        return effects

    def _chunk(self, tracked: TrackedRequest, chunk: KVChunk) -> list[Effect]:
        assert tracked.decode is not None
        return [*self._announce(tracked), Send(tracked.decode, chunk)]

    def _announce(self, tracked: TrackedRequest) -> list[Effect]:
        """Let the decode group make room for the prompt."""
        if tracked.announced:
            return []
        assert tracked.decode is not None
        tracked.announced = True
        params = replace(tracked.request.params, prompt_logprobs=None)  # the prefill group has them
        asked = replace(
            tracked.request,
            attempt=tracked.attempt,
            params=params,
            generated=tracked.known,
            do_remote_prefill=True,
        )
        return [Send(tracked.decode, asked)]

    def _prefilled(self, tracked: TrackedRequest, group: int, prefilled: Prefilled) -> list[Effect]:
        """The prompt is computed; a prefill group is done then, unless the request ends there."""
        new = tracked.response.add(prefilled)
        effects: list[Effect] = [] if new is None else [Deliver(new)]
        if tracked.response.finished:
            return effects + self._end(tracked, group)
        if group != tracked.prefill or not prefilled.handed_over or tracked.prefilled:
            return effects
        assert tracked.decode is not None
        tracked.prefilled = True
        effects += self._announce(tracked)
        is_complete = all(tracked.response.has_tokens(i) for i in range(tracked.n))
        effects += self._end_prefill(tracked, tracked.response.generated(limit=1) if is_complete else None)
        self._placement.leave(tracked, group)  # the published KV cache is still there
        self._placement.reconsider_migration(tracked.decode)
        return effects + self._dispatch()

    def _end_prefill(self, tracked: TrackedRequest, first: tuple[GeneratedTokens, ...] | None) -> list[Effect]:
        assert tracked.decode is not None
        return [Send(tracked.decode, EndPrefill(tracked.attempt_id, first))]

    def _loaded(self, tracked: TrackedRequest, loaded: PromptLoaded) -> list[Effect]:
        """The prefill group can release the KV cache, or stop if the decode group no longer waits for it."""
        if tracked.loaded:
            return []
        tracked.loaded = True
        if loaded.error is not None:
            self.num_failed_transfers += 1
        group = tracked.prefill
        if group is None:
            return []
        if tracked.needs_prefill:
            return [*self._requeue(tracked, except_group=None), *self._dispatch()]
        effects: list[Effect] = [Send(group, Abort(tracked.attempt_id))] if self._groups[group].alive else []
        self._leave_prefill(tracked)
        return effects + self._dispatch()

    def _leave_prefill(self, tracked: TrackedRequest) -> None:
        assert tracked.prefill is not None
        self._placement.leave(tracked, tracked.prefill)
        tracked.prefill = None

    def _sample_finished(self, tracked: TrackedRequest, group: int, end: Finished) -> list[Effect]:
        """One sample is finished; with all of them, so is the request, unless something of the answer is missing."""
        response = tracked.response
        if response.lacks_tokens(end):
            return [*self._requeue(tracked, except_group=None), *self._dispatch()]
        new = response.add(end)
        effects: list[Effect] = [] if new is None else [Deliver(new)]
        if response.finished:
            return effects + self._end(tracked, group)
        is_split = group == tracked.decode and tracked.prefill is not None
        if response.all_samples_finished and is_split and tracked.needs_prefill:  # logprobs of the prompt are missing
            return [*effects, *self._requeue(tracked, except_group=group), *self._dispatch()]
        return effects

    def _end(self, tracked: TrackedRequest, group: int) -> list[Effect]:
        answer = Deliver(tracked.response.output())
        return [answer, *self._remove(tracked, by=group), *self._dispatch()]

    # -- ends --------------------------------------------------------------------------------------------------------

    def _remove(self, tracked: TrackedRequest, *, by: int | None = None) -> list[Effect]:
        """Forget a request, and abort it in the other groups that know of it."""
        effects = self._withdraw(tracked, except_group=by)
        self._placement.forget(tracked)
        del self._tracked[tracked.request_id]
        return effects

    def _requeue(self, tracked: TrackedRequest, *, except_group: int | None) -> list[Effect]:
        """Return a request to the queue, before all that arrived later, for another attempt."""
        effects = self._withdraw(tracked, except_group=except_group)
        if not self._may_send(tracked.request_id):
            self._held.append((tracked.arrival, tracked.request_id))
            return effects
        place = 0
        while place < len(self._queue) and self._queue[place][0] < tracked.arrival:
            place += 1
        self._queue.insert(place, (tracked.arrival, tracked.request_id))
        return effects

    def _withdraw(self, tracked: TrackedRequest, *, except_group: int | None) -> list[Effect]:
        """End an attempt, and abort it in its groups."""
        effects: list[Effect] = []
        for group in (tracked.prefill, tracked.decode):
            if group is not None:
                self._placement.leave(tracked, group)
                if group != except_group and self._groups[group].alive:
                    effects.append(Send(group, Abort(tracked.attempt_id)))
        tracked.begin_again()
        return effects
