"""The router's decisions, event by event; and any order of events, losses included, answers every request once."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.cluster.replica_spec import Role
from shoal.cluster.routing import (
    PREFIX_TOKENS,
    Deliver,
    Effect,
    GroupSpec,
    RequestRouter,
    Send,
    num_tokens_at_most,
    prefix_hashes,
)
from shoal.cluster.wire import Abort, EndPrefill, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import (
    CompletionOutput,
    GeneratedTokens,
    Logprob,
    PromptLoaded,
    Request,
    RequestOutput,
    RequestProgress,
    SamplingParams,
)


def spec(role: Role, max_num_seqs: int = 4, num_kv_tokens: int = 1000) -> GroupSpec:
    return GroupSpec(role=role, max_num_seqs=max_num_seqs, num_kv_tokens=num_kv_tokens)


def router(*groups: GroupSpec, max_model_len: int = 100) -> RequestRouter:
    return RequestRouter(groups, max_model_len=max_model_len)


def ask(request_id: str, num_prompt: int = 4, max_tokens: int | None = 6, **fields: Any) -> Request:
    params = fields.pop("params", {})
    prompt = fields.pop("prompt", (1,) * num_prompt)
    return Request(
        request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens, **params), **fields
    )


def chunk(engine_id: str, start: int = 0, end: int = 4) -> KVChunk:
    return KVChunk(
        request_id=engine_id,
        start=start,
        end=end,
        fingerprint=b"",
        epoch=0,
        generation=0,
        num_bytes=1,
        checksum=0,
        address=b"",
    )


def output(engine_id: str, *token_ids: int, finished: bool, **fields: Any) -> RequestOutput:
    completion = CompletionOutput(index=0, text="", token_ids=list(token_ids))
    if finished:
        completion.finish_reason = "length"
    return RequestOutput(request_id=engine_id, prompt_token_ids=[1], outputs=[completion], finished=finished, **fields)


def progress(engine_id: str, start: int, *token_ids: int) -> RequestProgress:
    return RequestProgress(request_id=engine_id, index=0, start=start, new=GeneratedTokens(token_ids))


def sent(effects: list[Effect]) -> list[tuple[int, str]]:
    """Where each command goes, and what it is."""
    found = []
    for effect in effects:
        if isinstance(effect, Send):
            command = effect.command
            kind = type(command).__name__
            if isinstance(command, Request):
                kind = "prefill" if command.do_remote_decode else "decode" if command.do_remote_prefill else "whole"
            found.append((effect.group, f"{kind} {command.request_id}"))
    return found


def delivered(effects: list[Effect]) -> list[RequestOutput | RequestProgress]:
    return [effect.event for effect in effects if isinstance(effect, Deliver)]


def test_mixed_groups_share_by_outstanding_tokens() -> None:
    r = router(spec("mixed"), spec("mixed"), max_model_len=80)
    effects = r.submit(
        [
            ask("a", 1, 4),  # 5, 0
            ask("b", 2, 9, params={"n": 2}),  # 5, 20
            ask("c", 1, 4),  # 10, 20
            ask("d", 10, None),  # to the end of the context, 70 more: 90, 20
            ask("e", 1, 1),
        ]
    )
    assert sent(effects) == [(0, "whole a#0"), (1, "whole b#0"), (0, "whole c#0"), (0, "whole d#0"), (1, "whole e#0")]
    (answer,) = delivered(r.handle(1, output("e#0", 7, finished=True)))
    assert answer == output("e", 7, finished=True)
    assert r.num_in_flight == 4
    assert r.handle(1, output("e#0", 7, finished=True)) == []


def test_the_way_of_a_request_through_both_roles() -> None:
    r = router(spec("prefill"), spec("decode"), spec("decode"))
    assert sent(r.submit([ask("a", params={"prompt_logprobs": 1}, report_progress=True)])) == [(0, "prefill a#0")]
    (first, second) = r.handle(0, chunk("a#0", 0, 2))
    assert sent([first, second]) == [(1, "decode a#0"), (1, "KVChunk a#0")]
    assert isinstance(first, Send)
    assert isinstance(first.command, Request)
    assert first.command.params.prompt_logprobs is None, "the prefill group has them"
    assert sent(r.handle(0, chunk("a#0", 2, 4))) == [(1, "KVChunk a#0")]
    scores: list[dict[int, Logprob] | None] = [None, {1: Logprob(-0.5, 1)}]
    effects = r.handle(0, output("a#0", 9, finished=False, prompt_logprobs=scores, num_cached_tokens=3))
    assert delivered(effects) == [progress("a", 0, 9)]
    assert [e.command for e in effects if isinstance(e, Send)] == [EndPrefill("a#0", (GeneratedTokens((9,)),))]
    assert sent(r.handle(1, PromptLoaded(request_id="a#0"))) == [(0, "Abort a#0")], (
        "its records are not needed any more"
    )
    assert delivered(r.handle(1, progress("a#0", 1, 8, 7))) == [progress("a", 1, 8, 7)]
    effects = r.handle(1, output("a#0", 9, 8, 7, 6, finished=True))
    assert delivered(effects) == [output("a", 9, 8, 7, 6, finished=True, prompt_logprobs=scores, num_cached_tokens=3)]
    assert (r.num_in_flight, r.num_failed_transfers) == (0, 0)


def test_an_answer_of_one_token_needs_no_decode() -> None:
    r = router(spec("prefill"), spec("decode"))
    r.submit([ask("a")])
    r.handle(0, chunk("a#0"))
    effects = r.handle(0, output("a#0", 9, finished=True))
    assert delivered(effects) == [output("a", 9, finished=True)]
    assert (1, "Abort a#0") in sent(effects)


def test_a_known_beginning_is_worth_its_tokens() -> None:
    r = router(spec("mixed", num_kv_tokens=10**6), spec("mixed", num_kv_tokens=10**6), max_model_len=10**6)
    beginning = tuple(range(3 * PREFIX_TOKENS))
    r.submit([ask("a", prompt=(*beginning, 1), max_tokens=1)])  # to group 0
    assert sent(r.submit([ask("b", prompt=(*beginning, 2), max_tokens=1)])) == [(1, "whole b#0")], (
        "0 is busy for longer"
    )
    r.handle(0, output("a#0", 1, finished=True))
    r.handle(1, output("b#0", 1, finished=True))
    r.submit([ask("c", 100, max_tokens=None, params={"min_tokens": 1})])
    r.abort("c")
    r.submit([ask("busy", 500, max_tokens=1)])  # to group 0, the first of two idle ones
    # 501 tokens before 768 that need not be computed; group 1 is idle and computed the same beginning: less still.
    assert sent(r.submit([ask("d", prompt=(*beginning, 3), max_tokens=1)])) == [(1, "whole d#0")]
    assert prefix_hashes(beginning) == prefix_hashes((*beginning, 1))
    assert len(prefix_hashes(beginning)) == 3
    assert prefix_hashes(beginning[:-1]) == prefix_hashes(beginning)[:2]


def test_more_than_a_group_can_hold_waits_where_any_group_can_take_it() -> None:
    r = router(spec("mixed", 4), spec("mixed", 4))
    assert len(sent(r.submit([ask(str(i)) for i in range(14)]))) == 2 * 5
    assert sent(r.handle(1, output("1#0", 5, finished=True))) == [(1, "whole 10#0")]
    assert r.num_in_flight == 13


def test_what_no_decode_group_has_room_for_waits_for_an_idle_group() -> None:
    r = router(spec("prefill", 8), spec("decode", 8, num_kv_tokens=20))
    assert sent(r.submit([ask("a", 12), ask("b", 9), ask("c", 2)])) == [(0, "prefill a#0")], "c must not overtake b"
    r.handle(0, chunk("a#0"))
    effects = r.handle(1, PromptLoaded(request_id="a#0"))
    assert sent(effects) == [(0, "Abort a#0"), (0, "whole b#0"), (0, "prefill c#0")], "an idle group helps"


def test_a_lost_decode_group_gives_back_what_it_had_with_what_is_known() -> None:
    r = router(spec("prefill"), spec("decode"), spec("decode"))
    r.submit([ask("a")])
    r.handle(0, chunk("a#0"))
    r.handle(0, output("a#0", 9, finished=False))
    r.handle(1, PromptLoaded(request_id="a#0"))
    r.handle(1, progress("a#0", 1, 8, 7))
    assert sent(r.lose(1)) == [(0, "prefill a#1")]
    assert r.handle(1, output("a#0", 9, 8, 7, 6, finished=True)) == [], "late, from before"
    (request, _) = r.handle(0, chunk("a#1"))
    assert isinstance(request, Send)
    assert isinstance(request.command, Request)
    assert request.group == 2
    assert request.command.generated == (GeneratedTokens((9, 8, 7)),)
    assert r.num_replays == 1


def test_a_lost_prefill_group_leaves_the_rest_to_the_decode_group_or_to_another() -> None:
    r = router(spec("prefill"), spec("prefill"), spec("decode"))
    r.submit([ask("begun"), ask("other"), ask("not begun")])
    r.handle(0, chunk("begun#0", 0, 2))
    effects = r.lose(0)
    assert next(e.command for e in effects if isinstance(e, Send)) == EndPrefill("begun#0", None)
    assert sent(effects)[1:] == [(2, "Abort not begun#0"), (1, "prefill not begun#1")]
    assert r.handle(0, chunk("begun#0", 2, 4)) == []
    assert delivered(r.handle(2, output("begun#0", 1, finished=True))) == [output("begun", 1, finished=True)]
    r.lose(1)
    assert r.num_in_flight == 2
    assert sent(r.restore(0)) == [(0, "prefill other#1"), (0, "prefill not begun#2")], "in order of arrival"


def test_an_abort_reaches_everyone_who_knows_of_the_request() -> None:
    r = router(spec("prefill", 1), spec("decode", 8))
    assert sent(r.submit([ask(i) for i in "abcd"])) == [(0, "prefill a#0"), (0, "prefill b#0")]
    r.handle(0, chunk("a#0"))
    assert sent(r.abort("c")) == []
    assert sent(r.abort("a")) == [(0, "Abort a#0"), (1, "Abort a#0"), (0, "prefill d#0")]
    assert r.abort("a") == []
    assert r.num_in_flight == 2


def test_an_id_in_use_is_refused_and_nothing_taken() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a")])
    with pytest.raises(ValueError, match="'a' is already in flight"):
        r.submit([ask("b"), ask("a")])
    assert r.num_in_flight == 1


def answer_of(request: Request) -> list[int]:
    """What any engine answers."""
    total = sum(request.prompt_token_ids)
    assert request.params.max_tokens is not None
    return [total * 7 % 11 + i for i in range(request.params.max_tokens)]


class RouterMachine(RuleBasedStateMachine):
    """Engines that do any possible next thing at any time, and die; messages of one engine keep their order."""

    @initialize(
        roles=st.sampled_from(
            [
                ("mixed",),
                ("mixed", "mixed"),
                ("prefill", "decode"),
                ("prefill", "prefill", "decode", "decode"),
                ("prefill", "decode", "mixed"),
            ]
        )
    )
    def start(self, roles: tuple[Role, ...]) -> None:
        self.router = router(*(spec(role, 2, 30) for role in roles))
        self.alive = [True] * len(roles)
        self.engines: list[dict[str, Any]] = [{} for _ in roles]
        self.asked: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.known: dict[str, list[int]] = {}

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Deliver):
                self.deliver(effect.event)
                continue
            assert self.alive[effect.group], "told a group that is lost"
            self.obey(self.engines[effect.group], effect.command)

    def obey(self, engine: dict[str, Any], command: Any) -> None:
        if isinstance(command, Request):
            assert command.request_id not in engine
            tokens = list(command.generated[0].token_ids) if command.generated else []
            engine[command.request_id] = {
                "request": command,
                "tokens": tokens,
                "sent": 0,
                "ready": not command.do_remote_prefill,
            }
        elif isinstance(command, Abort):
            engine.pop(command.request_id, None)
        elif isinstance(command, EndPrefill):
            state = engine[command.request_id]
            if command.generated is not None and not state["tokens"]:
                state["tokens"] = list(command.generated[0].token_ids)
            state["ended"] = True
        else:
            assert command.start == engine[command.request_id].get("loaded", 0), "chunks come in order"
            engine[command.request_id]["loaded"] = command.end

    def deliver(self, event: RequestOutput | RequestProgress) -> None:
        whole = answer_of(self.asked[event.request_id])
        if isinstance(event, RequestProgress):
            known = self.known[event.request_id]
            assert event.start == len(known)
            known.extend(event.new.token_ids)
            assert known == whole[: len(known)]
        elif event.finished:
            assert event.request_id not in self.answers, "answered twice"
            assert event.outputs[0].token_ids == whole
            self.answers[event.request_id] = whole

    @rule(num_prompt=st.integers(1, 12), max_tokens=st.integers(1, 4))
    def submit(self, num_prompt: int, max_tokens: int) -> None:
        request = ask(str(len(self.asked)), num_prompt, max_tokens, report_progress=True)
        self.asked[request.request_id] = request
        self.known[request.request_id] = []
        self.carry_out(self.router.submit([request]))

    @precondition(lambda self: any(self.engines))
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        busy = [(g, i) for g, engine in enumerate(self.engines) for i in engine if self.can_work(engine[i])]
        if busy:
            self.advance(*data.draw(st.sampled_from(busy)))

    @staticmethod
    def can_work(state: dict[str, Any]) -> bool:
        return bool(state["ready"] or state.get("ended")) and not state.get("handed over")

    def advance(self, group: int, engine_id: str) -> None:
        """One step of one request: publish, load, generate, tell."""
        engine = self.engines[group]
        state = engine[engine_id]
        request = state["request"]
        whole, num_prompt = answer_of(request), len(request.prompt_token_ids)

        def tell(event: Event) -> None:
            self.carry_out(self.router.handle(group, event))

        if not state["ready"]:
            state["ready"] = True
            state["told"] = len(state["tokens"])
            tell(PromptLoaded(request_id=engine_id))
        elif request.do_remote_decode and state["sent"] < num_prompt:
            start, state["sent"] = state["sent"], min(num_prompt, state["sent"] + 5)
            tell(chunk(engine_id, start, state["sent"]))
        elif request.do_remote_decode:
            finished = len(whole) == 1
            state["handed over"] = True
            if finished:
                del engine[engine_id]
            tell(output(engine_id, whole[0], finished=finished))
        else:
            state["tokens"].append(whole[len(state["tokens"])])
            told = state.get("told", sum(len(g.token_ids) for g in request.generated))
            if len(state["tokens"]) == len(whole):
                del engine[engine_id]
                tell(output(engine_id, *whole, finished=True))
            elif len(state["tokens"]) % 2:
                state["told"] = len(state["tokens"])
                tell(progress(engine_id, told, *state["tokens"][told:]))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        group = data.draw(st.integers(0, len(self.alive) - 1))
        if self.alive[group]:
            self.alive[group] = False
            self.engines[group].clear()
            self.carry_out(self.router.lose(group))
        else:
            self.alive[group] = True
            self.carry_out(self.router.restore(group))

    @precondition(lambda self: self.asked.keys() - self.answers.keys())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.asked.keys() - self.answers.keys())))
        self.carry_out(self.router.abort(request_id))
        self.answers[request_id] = []
        assert not any(i.startswith(f"{request_id}#") for engine in self.engines for i in engine)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "router"):
            assert self.router.num_in_flight == len(self.asked) - len(self.answers)
            for group, engine in zip(self.router._groups, self.engines, strict=True):
                assert group.num_tokens == sum(self.router._tracked[i].num_tokens for i in group.requests)
                unfinished = {i.split("#")[0] for i, s in engine.items() if not s.get("handed over")}
                assert unfinished <= set(group.requests)

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        for group, alive in enumerate(self.alive):
            if not alive:
                self.alive[group] = True
                self.carry_out(self.router.restore(group))
        for _ in range(10_000):
            busy = [(g, i) for g, engine in enumerate(self.engines) for i in engine if self.can_work(engine[i])]
            if not busy:
                break
            self.advance(*busy[0])
        assert self.answers.keys() == self.asked.keys(), "a request was never answered"
        assert not any(self.engines), "an engine still holds something"


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_tokens_at_most() -> None:
    assert num_tokens_at_most(ask("a", 10, None), 80) == 80
    assert num_tokens_at_most(ask("a", 10, 5, params={"n": 3}), 80) == 25
