"""Which attention group does what for which request: the router's decisions, a function of state and event alone.

A request is queued, then with a mixed group until it is finished; or, where prefill and decode are apart, with a
prefill group and the decode group that was reserved for it, then with the decode group alone:

    queued -> whole on a mixed group                                          -> done
    queued -> prefilling (chunks go to the decode group as they are computed) -> decoding -> done

Where that would leave groups with nothing to do, they answer whole requests, too.

A group that is lost gives its requests back to the queue, with the tokens that are known of their answers; a decode
group whose prefill group is lost computes the rest of the prompt itself. The same request under another attempt has
another id, so that what is late from an earlier attempt is recognised and ignored. What comes twice, late or in another
order within an attempt changes no answer: at most, something is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import GeneratedTokens, PromptLoaded, Request, RequestOutput, RequestProgress

from ..workers.engine_factory import error_output
from ..workers.wire import Abort, Command, EndPrefill, Event
from .groups import Group, GroupSpec
from .placement import Place, Placement
from .requests import TrackedRequest, generated_by, tokens_from

MAX_BLOCKED = 3
"""After so many requests that nobody has room for, no other is looked at."""


@dataclass(frozen=True, slots=True)
class Send:
    """Tell a group something."""

    group: int
    command: Command


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tell whoever asked."""

    event: RequestOutput | RequestProgress


Effect = Send | Deliver


class RequestRouter:
    """Requests and groups; every method is one event and returns what to do about it, in order.

    A group is given what `Group.has_room` for, in order of arrival. Fair means: a request that nobody has room for may
    be passed by later ones, but the first such one has the least loaded group of each kind that it lacks kept free of
    them, so that it waits for those to empty at most.

    Once nothing is queued, a group without requests takes some over from the one that has most: those that only wait
    there, and, one at a time, those that are being generated.
    """

    def __init__(self, groups: Sequence[GroupSpec], *, max_model_len: int, block_size: int = 1) -> None:
        """`block_size`: of the caches; a sequence takes whole blocks."""
        self._groups = [Group(spec) for spec in groups]
        self._placement = Placement(self._groups)
        self._max_model_len, self._block_size = max_model_len, block_size
        self._tracked: dict[str, TrackedRequest] = {}
        self._queue: deque[tuple[int, str]] = deque()
        """Requests in order of arrival; an aborted one stays until its turn."""
        self._allowed: frozenset[str] | None = None
        self._held: list[tuple[int, str]] = []
        """Queued requests that are not allowed to be sent, in any order."""
        self._num_submitted = 0
        self.num_failed_transfers = 0
        self.num_replays = 0
        """Requests that were given back by a group that was lost."""
        self.num_moves = 0
        """Requests that another group took over."""

    @property
    def num_in_flight(self) -> int:
        return len(self._tracked)

    def generated_in(self, group: int) -> dict[str, int]:
        """The requests that are with a group, and how many of their generated tokens are known."""
        return {i: self._tracked[i].num_known_tokens for i in self._groups[group].requests}

    def submit(self, requests: Iterable[Request]) -> list[Effect]:
        """New requests, behind all others; ValueError, before any is taken, when an id is in use."""
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
        """Nobody wants the answer; unknown ids are ignored."""
        tracked = self._tracked.get(request_id)
        return [] if tracked is None else [*self._finish(tracked), *self._dispatch()]

    def fail(self, request_id: str, message: str) -> list[Effect]:
        """Answer a request with an error; unknown ids are ignored."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return []
        answer = error_output(request_id, list(tracked.request.prompt_token_ids), message)
        return [Deliver(answer), *self._finish(tracked), *self._dispatch()]

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
        """What a group told; ignored when the request is not with it, or under another attempt."""
        request_id, _, attempt = event.request_id.rpartition("#")
        tracked = self._tracked.get(request_id)
        if tracked is None or attempt != str(tracked.attempt):
            return []
        if group == tracked.decode:
            match event:
                case RequestProgress():
                    return self._progress(tracked, event)
                case PromptLoaded():
                    return self._loaded(tracked, event)
                case RequestOutput():
                    return self._answered(tracked, group, event)
        elif group == tracked.prefill:
            match event:
                case KVChunk():
                    return self._chunk(tracked, event)
                case RequestOutput():
                    return self._prefilled(tracked, group, event)
        return []

    def lose(self, group: int) -> list[Effect]:
        """A group forgot all that it was told; nothing is sent to it before `restore`."""
        self._placement.lose(group)
        effects: list[Effect] = []
        for request_id in list(self._groups[group].requests):
            tracked = self._tracked[request_id]
            if group == tracked.decode or tracked.needs_prefill:
                self.num_replays += 1
                effects += self._give_back(tracked, except_group=group)
            else:
                effects += self._end_prefill(tracked, None)
                self._leave_prefill(tracked)
        return effects + self._dispatch()

    def restore(self, group: int) -> list[Effect]:
        """A lost group takes requests again."""
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
        """Send queued requests on their ways while there is room; with none left, let idle groups take some over."""
        effects: list[Effect] = []
        placement, queue = self._placement, self._queue
        num_blocked = 0
        smallest: TrackedRequest | None = None
        """Smallest of the requests for which no place was found."""
        while num_blocked < min(MAX_BLOCKED, len(queue)):
            if not placement.has_place and (num_blocked > 0 or not placement.keeps):
                break
            arrival, request_id = queue[num_blocked]
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.arrival != arrival:
                del queue[num_blocked]  # aborted
                continue
            if num_blocked == 0:
                placement.yield_to(tracked)
            if smallest is not None and tracked.needs_no_less_than(smallest):
                num_blocked += 1
            elif (place := placement.choose(tracked)) is not None:
                del queue[num_blocked]
                effects.append(self._send(tracked, place))
            else:
                if num_blocked == 0:
                    placement.keep_for(tracked)
                num_blocked += 1
                smallest = tracked
        return effects + self._spread()

    def _send(self, tracked: TrackedRequest, place: Place) -> Send:
        self._placement.join(tracked, place)
        request, engine_id = tracked.request, tracked.engine_id
        prefill, decode = place
        if prefill is None:
            return Send(decode, replace(request, request_id=engine_id, generated=tracked.known, report_progress=True))
        asked = replace(request, request_id=engine_id, generated=(), report_progress=False, do_remote_decode=True)
        return Send(prefill, asked)

    def _spread(self) -> list[Effect]:
        """Let groups that are ready for it take over requests, one each in turn."""
        effects: list[Effect] = []
        if self._allowed is not None:
            return effects
        ready = self._placement.ready
        while ready and not self._queue:
            target = next(iter(ready))
            found = self._placement.find_to_move(target, self._tracked)
            if found is not None:
                effects += self._move(*found, target)
            elif self._groups[target].requests:
                del ready[target]
            else:
                break  # nor is there anything for the others
        return effects

    def _move(self, tracked: TrackedRequest, begun: bool, target: int) -> list[Effect]:
        """To a group that goes on taking what only waits elsewhere, but catches up first with what was begun."""
        effects = self._withdraw(tracked, except_group=None)
        effects.append(self._send(tracked, self._placement.choose_at(target, tracked, begun=begun)))
        tracked.num_moves += 1
        self.num_moves += 1
        if begun:
            tracked.catching_up = True
        else:
            self._placement.ready[target] = None
        return effects

    # -- what groups tell --------------------------------------------------------------------------------------------

    def _progress(self, tracked: TrackedRequest, progress: RequestProgress) -> list[Effect]:
        assert tracked.decode is not None
        before = len(tracked.generated[progress.index].token_ids)
        effects = self._learn(tracked, progress)
        after = len(tracked.generated[progress.index].token_ids)
        if tracked.catching_up and after > before:
            tracked.catching_up = False
            self._placement.ready[tracked.decode] = None
            effects += self._spread()
        elif before.bit_length() < after.bit_length():  # with twice as many tokens, more are expected
            self._placement.unsettle(tracked.decode)
            effects += self._spread()
        return effects

    def _learn(self, tracked: TrackedRequest, progress: RequestProgress) -> list[Effect]:
        """New tokens are those behind the known ones; behind a gap there are none: the answer will have them all."""
        start = len(tracked.generated[progress.index].token_ids)
        new = tokens_from(progress.new, start - progress.start) if progress.start <= start else None
        if new is None or not new.token_ids:
            return []
        self._placement.grow(tracked, tracked.extend(progress.index, new))
        if not tracked.request.report_progress:
            return []
        told = RequestProgress(request_id=tracked.request_id, index=progress.index, start=start, new=new)
        return [Deliver(told)]

    def _chunk(self, tracked: TrackedRequest, chunk: KVChunk) -> list[Effect]:
        assert tracked.decode is not None
        return [*self._announce(tracked), Send(tracked.decode, chunk)]

    def _announce(self, tracked: TrackedRequest) -> list[Effect]:
        """Let the decode group make room for the prompt."""
        if tracked.announced:
            return []
        assert tracked.decode is not None
        tracked.announced = True
        asked = replace(
            tracked.request,
            request_id=tracked.engine_id,
            params=replace(tracked.request.params, prompt_logprobs=None),  # the prefill group has them
            generated=tracked.known,
            report_progress=True,
            do_remote_prefill=True,
        )
        return [Send(tracked.decode, asked)]

    def _prefilled(self, tracked: TrackedRequest, group: int, output: RequestOutput) -> list[Effect]:
        """The first tokens; for a request that ends with them, the answer."""
        if output.finished:
            return self._end(tracked, group, output)
        if tracked.prefilled is not None:
            return []
        assert tracked.decode is not None
        tracked.prefilled = output
        first = generated_by(output)
        effects = [*self._announce(tracked), *self._show(tracked, output)]
        for index, tokens in enumerate(first):
            told = RequestProgress(request_id=output.request_id, index=index, start=0, new=tokens)
            effects += self._learn(tracked, told)
        effects += self._end_prefill(tracked, first)
        self._placement.leave(tracked, group)  # the records are still there
        self._placement.unsettle(tracked.decode)
        return effects + self._dispatch()

    def _end_prefill(self, tracked: TrackedRequest, first: tuple[GeneratedTokens, ...] | None) -> list[Effect]:
        assert tracked.decode is not None
        return [Send(tracked.decode, EndPrefill(tracked.engine_id, first))]

    def _loaded(self, tracked: TrackedRequest, loaded: PromptLoaded) -> list[Effect]:
        """The prefill group may forget the records; it need not even go on if the decode group has given up on it."""
        if tracked.loaded:
            return []
        tracked.loaded = True
        if loaded.error is not None:
            self.num_failed_transfers += 1
        group = tracked.prefill
        if group is None:
            return []
        if tracked.needs_prefill:
            return [*self._give_back(tracked, except_group=None), *self._dispatch()]
        effects: list[Effect] = [Send(group, Abort(tracked.engine_id))] if self._groups[group].alive else []
        self._leave_prefill(tracked)
        return effects + self._dispatch()

    def _leave_prefill(self, tracked: TrackedRequest) -> None:
        assert tracked.prefill is not None
        self._placement.leave(tracked, tracked.prefill)
        tracked.prefill = None

    def _answered(self, tracked: TrackedRequest, group: int, output: RequestOutput) -> list[Effect]:
        if not output.finished:
            return self._show(tracked, output)
        if tracked.prefill is not None and tracked.needs_prefill:
            return [*self._give_back(tracked, except_group=group), *self._dispatch()]
        return self._end(tracked, group, output)

    def _end(self, tracked: TrackedRequest, group: int, output: RequestOutput) -> list[Effect]:
        answer = Deliver(self._complete(tracked, output))
        return [answer, *self._finish(tracked, by=group), *self._dispatch()]

    def _show(self, tracked: TrackedRequest, output: RequestOutput) -> list[Effect]:
        """What a streaming request has so far, if nobody has seen more of it, nor the same."""
        if not tracked.request.stream:
            return []
        lengths = [len(o.token_ids) for o in output.outputs]
        behind = any(new < shown for new, shown in zip(lengths, tracked.num_shown_tokens, strict=True))
        if behind or lengths == tracked.num_shown_tokens:
            return []
        tracked.num_shown_tokens = lengths
        return [Deliver(self._complete(tracked, output))]

    @staticmethod
    def _complete(tracked: TrackedRequest, output: RequestOutput) -> RequestOutput:
        """Under its own name, and with what only the prefill group knew."""
        output = replace(output, request_id=tracked.request_id)
        if tracked.prefilled is not None:
            output.prompt_logprobs = tracked.prefilled.prompt_logprobs
            output.num_cached_tokens = tracked.prefilled.num_cached_tokens
        return output

    # -- ends --------------------------------------------------------------------------------------------------------

    def _finish(self, tracked: TrackedRequest, *, by: int | None = None) -> list[Effect]:
        """Forget a request; groups that still know of it are told to forget it, too."""
        effects = self._withdraw(tracked, except_group=by)
        self._placement.forget(tracked)
        del self._tracked[tracked.request_id]
        return effects

    def _give_back(self, tracked: TrackedRequest, *, except_group: int | None) -> list[Effect]:
        """To the queue, in front of all that arrived later, for another attempt."""
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
        """End an attempt; the groups are told."""
        effects: list[Effect] = []
        for group in (tracked.prefill, tracked.decode):
            if group is not None:
                self._placement.leave(tracked, group)
                if group != except_group and self._groups[group].alive:
                    effects.append(Send(group, Abort(tracked.engine_id)))
        tracked.begin_again()
        return effects
