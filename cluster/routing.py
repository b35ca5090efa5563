"""Which attention group does what for which request: the router's decisions, a function of state and event alone.

A request is queued, then with a mixed group until it is finished; or, where prefill and decode are apart, with a
prefill group and the decode group that was reserved for it, then with the decode group alone:

    queued -> whole on a mixed group                                          -> done
    queued -> prefilling (chunks go to the decode group as they are computed) -> decoding -> done

A group that is lost gives its requests back to the queue, with the tokens that are known of their answers; a decode
group whose prefill group is lost computes the rest of the prompt itself. The same request under another attempt has
another id, so that what is late from an earlier attempt is recognised and ignored.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import GeneratedTokens, PromptLoaded, Request, RequestOutput, RequestProgress
from shoal.runtime.validation import max_output_tokens

from .replica_spec import Role
from .wire import Abort, Command, EndPrefill, Event

PREFIX_TOKENS = 256
"""Prompts are known by their beginnings, in steps of so many tokens."""
MAX_PREFIXES = 200_000
MAX_HOLDERS = 4
"""Groups that are remembered for one beginning, the latest ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """An attention group that takes requests."""

    role: Role
    max_num_seqs: int
    num_kv_tokens: int
    """Tokens that its cache holds."""

    @property
    def max_requests(self) -> int:
        """Running ones, and a few that wait so that no step is short of them; the others wait in the router, where
        any group can take them."""
        return self.max_num_seqs + max(1, self.max_num_seqs // 4)


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


@dataclass(slots=True)
class _Group:
    """What the router knows of a group."""

    spec: GroupSpec
    alive: bool = True
    num_tokens: int = 0
    """Prompt and output tokens, at most, of the requests that are with it."""
    num_prompt_tokens: int = 0
    """Those of them that its cache must hold to begin with."""
    requests: dict[str, None] = field(default_factory=dict)

    def has_room(self, num_prompt_tokens: int) -> bool:
        if not self.alive or len(self.requests) >= self.spec.max_requests:
            return False
        return not self.requests or self.num_prompt_tokens + num_prompt_tokens <= self.spec.num_kv_tokens

    @property
    def outstanding_tokens(self) -> int:
        """What it has to compute before it has nothing to do."""
        return self.num_prompt_tokens if self.spec.role == "prefill" else self.num_tokens

    @property
    def load(self) -> tuple[bool, float]:
        return len(self.requests) >= self.spec.max_requests, self.outstanding_tokens / self.spec.num_kv_tokens


@dataclass(slots=True)
class _Tracked:
    """A request that is not finished."""

    request: Request
    arrival: int
    num_tokens: int
    prefixes: list[int]
    generated: list[GeneratedTokens]
    attempt: int = 0
    prefill: int | None = None
    """The group that computes the prompt, or holds its records until they were read."""
    decode: int | None = None
    announced: bool = False
    """The decode group knows of the request."""
    prefilled: RequestOutput | None = None

    @property
    def engine_id(self) -> str:
        return f"{self.request.request_id}#{self.attempt}"

    @property
    def known(self) -> tuple[GeneratedTokens, ...]:
        return tuple(self.generated) if any(g.token_ids for g in self.generated) else ()


class RequestRouter:
    """Requests and groups; every method is one event and returns what to do about it, in order."""

    def __init__(self, groups: Sequence[GroupSpec], *, max_model_len: int) -> None:
        self._groups = [_Group(spec) for spec in groups]
        self._max_model_len = max_model_len
        self._prefill_loads = _Loads(self._groups, {"prefill", "mixed"})
        self._decode_loads = _Loads(self._groups, {"decode", "mixed"})
        self._tracked: dict[str, _Tracked] = {}
        self._queue: list[tuple[int, str]] = []
        self._prefixes = _PrefixIndex()
        self._num_submitted = 0
        self.num_failed_transfers = 0
        self.num_replays = 0
        """Requests that were given back by a group that was lost."""

    @property
    def num_in_flight(self) -> int:
        return len(self._tracked)

    def generated_in(self, group: int) -> dict[str, int]:
        """The requests that are with a group, and how many of their generated tokens are known."""
        requests = self._groups[group].requests
        return {i: sum(len(g.token_ids) for g in self._tracked[i].generated) for i in requests}

    def submit(self, requests: Iterable[Request]) -> list[Effect]:
        """New requests, behind all others; ValueError, before any is taken, when an id is in use."""
        requests = list(requests)
        for request in requests:
            if request.request_id in self._tracked:
                raise ValueError(f"request id {request.request_id!r} is already in flight")
        for request in requests:
            missing = request.params.n - len(request.generated)
            self._tracked[request.request_id] = tracked = _Tracked(
                request,
                self._num_submitted,
                num_tokens_at_most(request, self._max_model_len),
                prefix_hashes(request.prompt_token_ids),
                [*request.generated, *[GeneratedTokens()] * missing],
            )
            self._num_submitted += 1
            heapq.heappush(self._queue, (tracked.arrival, request.request_id))
        return self._dispatch()

    def abort(self, request_id: str) -> list[Effect]:
        """Nobody wants the answer; unknown ids are ignored."""
        tracked = self._tracked.get(request_id)
        return [] if tracked is None else [*self._finish(tracked), *self._dispatch()]

    def handle(self, group: int, event: Event) -> list[Effect]:
        """What a group told."""
        request_id, _, attempt = event.request_id.rpartition("#")
        tracked = self._tracked.get(request_id)
        if tracked is None or attempt != str(tracked.attempt) or group not in (tracked.prefill, tracked.decode):
            return []
        match event:
            case RequestProgress():
                return self._progress(tracked, event)
            case KVChunk():
                return self._chunk(tracked, event)
            case PromptLoaded():
                return self._loaded(tracked, event)
            case RequestOutput() if group == tracked.decode:
                return self._answered(tracked, group, event)
            case RequestOutput():
                return self._prefilled(tracked, event)

    def lose(self, group: int) -> list[Effect]:
        """A group forgot all that it was told; nothing is sent to it before `restore`."""
        lost = self._groups[group]
        lost.alive = False
        effects: list[Effect] = []
        for request_id in list(lost.requests):
            tracked = self._tracked[request_id]
            if tracked.decode == group or not tracked.announced:
                effects += self._requeue(tracked, lost=group)
            elif tracked.decode is not None:
                self._leave_prefill(tracked)
                effects.append(Send(tracked.decode, EndPrefill(tracked.engine_id, None)))
        self._touch(group)
        return effects + self._dispatch()

    def restore(self, group: int) -> list[Effect]:
        """A lost group takes requests again."""
        self._groups[group].alive = True
        self._touch(group)
        return self._dispatch()

    # -- where a request goes --------------------------------------------------------------------------------------

    def _dispatch(self) -> list[Effect]:
        """Send queued requests on their ways, strictly in order of arrival, while there is room."""
        effects: list[Effect] = []
        while self._queue:
            tracked = self._tracked.get(self._queue[0][1])
            if tracked is None:  # aborted
                heapq.heappop(self._queue)
                continue
            sent = self._place(tracked)
            if sent is None:
                break
            heapq.heappop(self._queue)
            effects.append(sent)
        return effects

    def _place(self, tracked: _Tracked) -> Send | None:
        request = tracked.request
        num_prompt = len(request.prompt_token_ids)
        first = self._choose_prefill(tracked)
        if first is None:
            return None
        if self._groups[first].spec.role == "prefill":
            partner = self._decode_loads.least()
            if partner is not None and self._groups[partner].has_room(num_prompt):
                self._join(tracked, first, partner)
                asked = replace(
                    request, request_id=tracked.engine_id, generated=(), report_progress=False, do_remote_decode=True
                )
                return Send(first, asked)
            if self._groups[first].requests:
                return None
            # Nobody has room to go on with it, and this group has nothing to do: it answers the request itself.
        self._join(tracked, None, first)
        return Send(first, replace(self._asked_again(tracked), request_id=tracked.engine_id))

    def _choose_prefill(self, tracked: _Tracked) -> int | None:
        """The group with the fewest tokens to compute before this prompt is done, what it has of it not counted."""
        num_prompt = len(tracked.request.prompt_token_ids)
        least = self._prefill_loads.least()
        cached = self._prefixes.find(tracked.prefixes)
        candidates = [
            g for g in {*cached, *(() if least is None else (least,))} if self._groups[g].has_room(num_prompt)
        ]
        return min(
            candidates,
            key=lambda g: (self._groups[g].outstanding_tokens - cached.get(g, 0), g),
            default=None,
        )

    @staticmethod
    def _asked_again(tracked: _Tracked) -> Request:
        return replace(tracked.request, generated=tracked.known, report_progress=True)

    def _join(self, tracked: _Tracked, prefill: int | None, decode: int) -> None:
        tracked.prefill, tracked.decode = prefill, decode
        for group in {g for g in (prefill, decode) if g is not None}:
            state = self._groups[group]
            state.requests[tracked.request.request_id] = None
            state.num_tokens += tracked.num_tokens
            state.num_prompt_tokens += len(tracked.request.prompt_token_ids)
            self._touch(group)
        self._prefixes.add(tracked.prefixes, decode if prefill is None else prefill)

    def _leave(self, tracked: _Tracked, group: int) -> None:
        state = self._groups[group]
        if tracked.request.request_id in state.requests:
            del state.requests[tracked.request.request_id]
            state.num_tokens -= tracked.num_tokens
            state.num_prompt_tokens -= len(tracked.request.prompt_token_ids)
            self._touch(group)

    def _leave_prefill(self, tracked: _Tracked) -> None:
        assert tracked.prefill is not None
        self._leave(tracked, tracked.prefill)
        tracked.prefill = None

    def _touch(self, group: int) -> None:
        self._prefill_loads.update(group)
        self._decode_loads.update(group)

    # -- what groups tell --------------------------------------------------------------------------------------------

    def _progress(self, tracked: _Tracked, progress: RequestProgress) -> list[Effect]:
        known = tracked.generated[progress.index]
        assert progress.start == len(known.token_ids), "progress is told in order"
        tracked.generated[progress.index] = known.extended(progress.new)
        if not tracked.request.report_progress:
            return []
        return [Deliver(replace(progress, request_id=tracked.request.request_id))]

    def _chunk(self, tracked: _Tracked, chunk: KVChunk) -> list[Effect]:
        assert tracked.decode is not None
        return [*self._announce(tracked), Send(tracked.decode, chunk)]

    def _announce(self, tracked: _Tracked) -> list[Effect]:
        """Let the decode group make room for the prompt."""
        if tracked.announced:
            return []
        assert tracked.decode is not None
        tracked.announced = True
        asked = self._asked_again(tracked)
        params = replace(asked.params, prompt_logprobs=None)  # the prefill group has them
        request = replace(asked, request_id=tracked.engine_id, params=params, do_remote_prefill=True)
        return [Send(tracked.decode, request)]

    def _prefilled(self, tracked: _Tracked, output: RequestOutput) -> list[Effect]:
        """The first tokens; for a request that ends with them, the answer."""
        if output.finished:
            assert tracked.prefill is not None
            return self._answered(tracked, tracked.prefill, output)
        assert tracked.prefill is not None
        assert tracked.decode is not None
        tracked.prefilled = output
        effects = self._announce(tracked)
        first = generated_by(output)
        if tracked.request.stream and not tracked.known:
            effects.append(Deliver(replace(output, request_id=tracked.request.request_id)))
        for index, tokens in enumerate(first):
            if not tracked.generated[index].token_ids:
                told = RequestProgress(request_id=output.request_id, index=index, start=0, new=tokens)
                effects += self._progress(tracked, told)
        self._leave(tracked, tracked.prefill)
        effects.append(Send(tracked.decode, EndPrefill(tracked.engine_id, first)))
        return effects + self._dispatch()

    def _loaded(self, tracked: _Tracked, loaded: PromptLoaded) -> list[Effect]:
        if loaded.error is not None:
            self.num_failed_transfers += 1
        if tracked.prefill is None:
            return []
        alive = self._groups[tracked.prefill].alive
        effects: list[Effect] = [Send(tracked.prefill, Abort(tracked.engine_id))] if alive else []
        self._leave_prefill(tracked)
        return effects + self._dispatch()

    def _answered(self, tracked: _Tracked, group: int, output: RequestOutput) -> list[Effect]:
        if tracked.prefilled is not None:
            output = replace(
                output,
                prompt_logprobs=tracked.prefilled.prompt_logprobs,
                num_cached_tokens=tracked.prefilled.num_cached_tokens,
            )
        effects: list[Effect] = [Deliver(replace(output, request_id=tracked.request.request_id))]
        if output.finished:
            effects += self._finish(tracked, by=group)
            effects += self._dispatch()
        return effects

    # -- ends --------------------------------------------------------------------------------------------------------

    def _finish(self, tracked: _Tracked, *, by: int | None = None) -> list[Effect]:
        """Forget a request; groups that still know of it are told to forget it, too."""
        effects = self._withdraw(tracked, except_group=by)
        del self._tracked[tracked.request.request_id]
        return effects

    def _requeue(self, tracked: _Tracked, *, lost: int) -> list[Effect]:
        effects = self._withdraw(tracked, except_group=lost)
        tracked.attempt += 1
        tracked.announced, tracked.prefilled = False, None
        self.num_replays += 1
        heapq.heappush(self._queue, (tracked.arrival, tracked.request.request_id))
        return effects

    def _withdraw(self, tracked: _Tracked, *, except_group: int | None) -> list[Effect]:
        groups = {g for g in (tracked.prefill, tracked.decode) if g is not None}
        for group in groups:
            self._leave(tracked, group)
        tracked.prefill = tracked.decode = None
        told = [g for g in sorted(groups) if g != except_group and self._groups[g].alive]
        return [Send(g, Abort(tracked.engine_id)) for g in told]


class _Loads:
    """The least loaded of the groups with one of some roles, found without looking at all of them."""

    def __init__(self, groups: list[_Group], roles: set[Role]) -> None:
        self._groups = groups
        self._versions = {i: 0 for i, g in enumerate(groups) if g.spec.role in roles}
        self._heap = [(*groups[i].load, i, 0) for i in self._versions]
        heapq.heapify(self._heap)

    def update(self, group: int) -> None:
        """The load of a group changed, or whether it is alive."""
        if group not in self._versions:
            return
        self._versions[group] += 1
        if self._groups[group].alive:
            heapq.heappush(self._heap, (*self._groups[group].load, group, self._versions[group]))
        if len(self._heap) > 4 * len(self._versions) + 64:
            self._heap = [entry for entry in self._heap if entry[3] == self._versions[entry[2]]]
            heapq.heapify(self._heap)

    def least(self) -> int | None:
        """Ties go to the first group, so that the same submissions always take the same ways."""
        while self._heap and self._heap[0][3] != self._versions[self._heap[0][2]]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None


class _PrefixIndex:
    """Which groups computed which beginnings of prompts lately: a guess at what their caches hold."""

    def __init__(self) -> None:
        self._holders: OrderedDict[int, list[int]] = OrderedDict()

    def add(self, prefixes: list[int], group: int) -> None:
        for prefix in prefixes:
            holders = self._holders.setdefault(prefix, [])
            if group in holders:
                holders.remove(group)
            holders.append(group)
            del holders[:-MAX_HOLDERS]
            self._holders.move_to_end(prefix)
        while len(self._holders) > MAX_PREFIXES:
            self._holders.popitem(last=False)

    def find(self, prefixes: list[int]) -> dict[int, int]:
        """Groups with the longest known beginning, and its length in tokens."""
        for number in range(len(prefixes) - 1, -1, -1):
            if prefixes[number] in self._holders:
                return dict.fromkeys(self._holders[prefixes[number]], (number + 1) * PREFIX_TOKENS)
        return {}


def prefix_hashes(token_ids: tuple[int, ...]) -> list[int]:
    """One number for every beginning of PREFIX_TOKENS, 2 x PREFIX_TOKENS, .. tokens; equal numbers are a good guess."""
    hashes = []
    chained = 0
    for start in range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        chained = hash((chained, token_ids[start : start + PREFIX_TOKENS]))
        hashes.append(chained)
    return hashes


def num_tokens_at_most(request: Request, max_model_len: int) -> int:
    """What a request can cost: its prompt and all the tokens it may generate."""
    return len(request.prompt_token_ids) + request.params.n * max(0, max_output_tokens(request, max_model_len))


def generated_by(output: RequestOutput) -> tuple[GeneratedTokens, ...]:
    """What an output says of each continuation, in the form in which another engine takes it."""
    return tuple(
        GeneratedTokens(tuple(o.token_ids), None if o.logprobs is None else tuple(o.logprobs)) for o in output.outputs
    )
