"""Any requests, in any order of events, repeated, late and lost with their groups: every one is answered once."""

from __future__ import annotations

import itertools
from typing import Literal

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from shoal.cluster.replica_spec import Role
from shoal.cluster.routing.groups import GroupSpec
from shoal.cluster.routing.request_router import Deliver, Effect, RequestRouter
from shoal.cluster.workers.wire import Event
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import EngineOutput, GeneratedTokens, Request, RequestOutput, SamplingParams, Tokens
from tests.support.model_engine import ModelEngine, answer_of, letters, scores_of

pytestmark = pytest.mark.slow

LAYOUTS: list[tuple[Role, ...]] = [
    ("mixed",),
    ("mixed", "mixed", "mixed"),
    ("prefill", "decode"),
    ("prefill", "decode", "decode"),
    ("prefill", "prefill", "decode", "decode"),
    ("prefill", "decode", "mixed"),
]
NUM_KV_TOKENS, BLOCK_SIZE, MAX_NUM_SEQS = 40, 2, 3


class RouterMachine(RuleBasedStateMachine):
    """Engines that do any possible next thing at any time; what they tell waits until it is handed to the router."""

    @initialize(roles=st.sampled_from(LAYOUTS), times=st.integers(1, 2))
    def start(self, roles: tuple[Role, ...], times: int) -> None:
        specs = [GroupSpec(role=role, max_num_seqs=MAX_NUM_SEQS, num_kv_tokens=NUM_KV_TOKENS) for role in roles]
        self.router = RequestRouter(specs, max_model_len=NUM_KV_TOKENS, block_size=BLOCK_SIZE)
        self.times = times
        """Number of times that every command arrives."""
        self.engines: list[ModelEngine | None] = [ModelEngine() for _ in roles]
        self.known_dead = [False] * len(roles)
        self.told: list[tuple[int, Event]] = []
        self.past: list[tuple[int, Event]] = []
        self.asked: dict[str, Request] = {}
        self.ended: set[str] = set()
        self.known: dict[str, list[list[int]]] = {}

    # -- what the router wants ---------------------------------------------------------------------------------------

    def carry_out(self, effects: list[Effect]) -> None:
        joined = set[int]()
        for effect in effects:
            if isinstance(effect, Deliver):
                self.deliver(effect.output)
                continue
            assert not self.known_dead[effect.group], "sent to a group that is lost"
            if isinstance(effect.command, Request) and not effect.command.do_remote_prefill:
                tracked = self.router._tracked[effect.command.request_id]
                joined |= {group for group in (tracked.prefill, tracked.decode) if group is not None}
            engine = self.engines[effect.group]
            if engine is not None:
                for _ in range(self.times):
                    engine.apply(effect.command)
        for number in joined:
            self.check_room(number)

    def check_room(self, number: int) -> None:
        group = self.router._groups[number]
        if len(group.requests) == 1:
            return
        sizes = [
            len(self.asked[i].prompt_token_ids) + len(tokens) + 1
            for i in group.requests
            for tokens in ([[]] * self.asked[i].params.n if self.prefills(i, number) else self.known[i])
        ]
        assert sum(-(-size // BLOCK_SIZE) for size in sizes) <= NUM_KV_TOKENS // BLOCK_SIZE, "too much for the cache"
        assert len(sizes) <= MAX_NUM_SEQS + 1, "too many sequences"

    def prefills(self, request_id: str, number: int) -> bool:
        return self.router._tracked[request_id].prefill == number

    def deliver(self, output: EngineOutput | RequestOutput) -> None:
        name = output.request_id
        request, answer = self.asked[name], answer_of(self.asked[name])
        assert name not in self.ended, "an output of a request that is over"
        if isinstance(output, Tokens):
            known = self.known[name][output.sample_index]
            assert output.start == len(known)
            known.extend(output.token_ids)
            assert known == answer[output.sample_index][: len(known)]
        elif isinstance(output, RequestOutput):
            assert output.finished
            assert [completion.token_ids for completion in output.outputs] == answer
            assert [completion.text for completion in output.outputs] == [letters(tokens) for tokens in answer]
            assert output.prompt_logprobs == scores_of(request)
            self.ended.add(name)

    # -- what can happen ---------------------------------------------------------------------------------------------

    @rule(
        num_prompt=st.sampled_from([1, 1, 2, 7, 12]),
        max_tokens=st.sampled_from([1, 2, 5, 20, 20]),
        n=st.sampled_from([1, 1, 1, 2]),
        report=st.sampled_from(["interval", "step"]),
        scores=st.sampled_from([None, None, 0]),
        num_before=st.integers(0, 2),
    )
    def submit(
        self,
        num_prompt: int,
        max_tokens: int,
        n: int,
        report: Literal["interval", "step"],
        scores: int | None,
        num_before: int,
    ) -> None:
        """`num_before` tokens are known from an earlier run."""
        name = str(len(self.asked))
        params = SamplingParams(max_tokens=max_tokens, n=n, prompt_logprobs=scores)
        request = Request(
            request_id=name,
            prompt_token_ids=(len(self.asked),) * num_prompt,
            params=params,
            report=report,
        )
        before = [answer[: min(num_before, len(answer) - 1)] for answer in answer_of(request)]
        generated = tuple(GeneratedTokens(tuple(tokens)) for tokens in before) if num_before else ()
        self.asked[name] = request
        self.known[name] = before
        self.carry_out(self.router.submit([replace(request, generated=generated)]))

    @precondition(lambda self: self.runnable())
    @rule(data=st.data(), budget=st.sampled_from([1, 4, 12]))
    def work(self, data: st.DataObject, budget: int) -> None:
        self.advance(*data.draw(st.sampled_from(self.runnable())), budget)

    def runnable(self) -> list[tuple[int, RequestId]]:
        return [(g, i) for g, engine in enumerate(self.engines) if engine for i, r in engine.rows.items() if r.runnable]

    def advance(self, group: int, attempt_id: RequestId, budget: int) -> None:
        engine = self.engines[group]
        assert engine is not None
        events = engine.work(attempt_id, budget)
        if budget < 12 and attempt_id in engine.rows:
            events += engine.take_outputs(attempt_id)
        self.told += [(group, event) for event in events]

    @precondition(lambda self: self.told)
    @rule(data=st.data(), in_order=st.booleans(), again=st.booleans())
    def tell(self, data: st.DataObject, in_order: bool, again: bool) -> None:
        place = 0 if in_order else data.draw(st.integers(0, len(self.told) - 1))
        self.hand_over(place, again=again)

    def hand_over(self, place: int, *, again: bool = False) -> None:
        group, event = self.told[place]
        if not again:
            self.past.append(self.told.pop(place))
        self.carry_out(self.router.handle(group, event))

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Something arrives long after it was handled."""
        group, event = data.draw(st.sampled_from(self.past))
        self.carry_out(self.router.handle(group, event))

    @rule(data=st.data())
    def break_or_mend(self, data: st.DataObject) -> None:
        """A group dies; some time later, the router learns of it; then there is another in its place."""
        group = data.draw(st.integers(0, len(self.engines) - 1))
        if self.engines[group] is not None:
            self.engines[group] = None
        elif not self.known_dead[group]:
            self.notice(group)
        else:
            self.restore(group)

    def notice(self, group: int) -> None:
        self.known_dead[group] = True
        self.carry_out(self.router.lose(group))

    def restore(self, group: int) -> None:
        self.known_dead[group] = False
        self.engines[group] = ModelEngine()
        self.carry_out(self.router.restore(group))

    @precondition(lambda self: self.asked.keys() - self.ended)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked.keys() - self.ended)))
        self.ended.add(name)
        self.carry_out(self.router.abort(name))
        assert not self.whereabouts(name)

    def whereabouts(self, name: str) -> list[tuple[int, RequestId]]:
        ids = [(g, i) for g, engine in enumerate(self.engines) if engine is not None for i in engine.rows]
        return [(g, i) for g, i in ids if i.request_id == name]

    # -- what is always true -----------------------------------------------------------------------------------------

    @invariant()
    def the_tables_are_right(self) -> None:
        if not hasattr(self, "router"):
            return
        router = self.router
        router.check_integrity()
        assert router.num_in_flight == len(self.asked) - len(self.ended)
        for name, tracked in router._tracked.items():
            assert [list(g.token_ids) for g in tracked.response.generated()] == self.known[name]
        attempts = {tracked.attempt_id for tracked in router._tracked.values()}
        for engine in self.engines:
            assert engine is None or engine.rows.keys() <= attempts, "an earlier attempt goes on"
        waiting = [name for name, tracked in router._tracked.items() if tracked.decode is None]
        idle = [group for group in router._groups if group.alive and not group.requests]
        assert not waiting or not idle, "somebody waits although a group is idle"

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        for group, engine in enumerate(self.engines):
            if engine is None and not self.known_dead[group]:
                self.notice(group)
            if self.known_dead[group]:
                self.restore(group)
        for _ in itertools.takewhile(lambda _: self.told or self.runnable(), range(10_000)):
            if self.told:
                self.hand_over(0)
            else:
                self.advance(*self.runnable()[0], 5)
            self.the_tables_are_right()
        assert self.ended == self.asked.keys(), "a request was never answered"
        assert not any(engine.rows for engine in self.engines if engine), "an engine still holds something"
        assert not self.router._queue


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
