"""The last requests of a batch: which of them move to groups with nothing to do, and what that is worth."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from shoal.cluster.replica_spec import Role
from shoal.cluster.routing import requests as routing_requests
from shoal.cluster.routing.groups import GroupSpec
from shoal.cluster.routing.request_router import Effect, RequestRouter, Send
from shoal.cluster.workers.wire import Event
from shoal.runtime.types import GeneratedTokens, Request, RequestOutput
from tests.support.model_engine import ModelEngine

from .test_request_router import ask, chunk, end, router, sent, spec, tokens


def finish(r: RequestRouter, group: int, *names: str) -> list[tuple[int, str]]:
    """Some requests end with another token; what is sent after the last one."""
    effects: list[Effect] = []
    for name in names:
        tracked = r._tracked[name]
        attempt, num_known = f"{name}#{tracked.attempt}", tracked.num_known_tokens
        effects = r.handle(group, tokens(attempt, num_known, 1))
        effects += r.handle(group, end(attempt, num_known + 1))
    r.check_integrity()
    return sent(effects)


def test_what_only_waits_moves_to_an_idle_group() -> None:
    r = router(spec("mixed"), spec("mixed"))
    r.submit([ask(i) for i in "aAbBcCdDeE"])  # one after the other to 0 and 1: four run on each, one waits
    assert finish(r, 1, "A", "B", "C", "D") == []
    assert finish(r, 1, "E") == [(0, "Abort e#0"), (1, "whole e#1")]
    assert finish(r, 1, "e") == [], "the others were begun"
    assert (r.num_moves, r.num_replays) == (1, 0)


def test_prompts_that_nobody_began_move_to_an_idle_prefill_group() -> None:
    r = router(spec("prefill"), spec("prefill"), spec("decode", 16))
    r.submit([ask("a", 9), ask("A", 9), ask("b"), ask("B"), ask("c"), ask("C")])
    r.handle(0, chunk("a#0", 0, 4))
    assert finish(r, 1, "A", "B") == [(2, "Abort B#0")]
    assert finish(r, 1, "C") == [(2, "Abort C#0"), (0, "Abort c#0"), (2, "Abort c#0"), (1, "prefill c#1")]
    assert finish(r, 1, "c") == [(2, "Abort c#1"), (0, "Abort b#0"), (2, "Abort b#0"), (1, "prefill b#1")]
    assert finish(r, 1, "b") == [(2, "Abort b#1")], "the last one was begun"
    r.handle(0, chunk("a#0", 4, 9))
    r.check_integrity()


def begun(*rows: tuple[str, int], max_tokens: int = 100, **fields: Any) -> RequestRouter:
    """Group 0 generates these requests, whose prompts have two tokens, and told so many; group 1 has one request."""
    r = router(spec("mixed", 8), spec("mixed", 8), max_model_len=1000)
    r.submit([ask("x", 1, 999), *(ask(name, 2, max_tokens, **fields) for name, _ in rows)])
    assert r._tracked["x"].decode == 0
    for name, _ in rows:
        assert r._tracked[name].decode == 1
    for name, num_known in rows:
        r.handle(1, tokens(f"{name}#0", 0, *range(num_known)))
    return r


def test_what_is_generated_moves_one_at_a_time() -> None:
    r = begun(("a", 30), ("b", 20), ("c", 40), ("d", 50))
    # With b go 22 tokens, less than half of the 30 + 40 + 50 that the others expect to generate.
    assert finish(r, 0, "x") == [(1, "Abort b#0"), (0, "whole b#1")]
    assert r._tracked["b"].known == (GeneratedTokens(tuple(range(20))),)
    assert sent(r.handle(1, tokens("c#0", 40, 1))) == []
    # b has caught up, and a would be computed again with 32 tokens, less than half of 41 + 50.
    assert sent(r.handle(0, tokens("b#1", 20, 1))) == [(1, "Abort a#0"), (0, "whole a#1")]
    assert sent(r.handle(0, tokens("a#1", 30, 1))) == [], "two here, two there"
    assert r.num_moves == 2
    r.check_integrity()


def test_what_caught_up_only_with_its_answer_makes_room_for_the_next() -> None:
    r = begun(("a", 30), ("b", 20), ("c", 40), ("d", 50), ("e", 50))
    assert finish(r, 0, "x") == [(1, "Abort b#0"), (0, "whole b#1")]
    r.submit([ask("y", 2, 500)])
    assert r._tracked["y"].decode == 0
    assert finish(r, 0, "b") == [(1, "Abort a#0"), (0, "whole a#1")]


def test_nothing_moves_while_something_is_queued() -> None:
    r = begun(("a", 30), ("b", 20), ("c", 40), ("d", 50), ("e", 50))
    finish(r, 0, "x")
    r.submit([ask(str(i), 1, 1) for i in range(20)])
    assert r._queue
    assert sent(r.handle(0, tokens("b#1", 20, 1))) == []


def test_a_move_becomes_worthwhile_with_what_is_generated() -> None:
    r = begun(("a", 1), ("b", 2), ("c", 2))
    assert finish(r, 0, "x") == [], "3 tokens again, and 4 expected"
    assert sent(r.handle(1, tokens("b#0", 2, 7))) == []
    assert sent(r.handle(1, tokens("b#0", 3, 7))) == [], "3, and 6: 4 of b and 2 of c"
    assert sent(r.handle(1, tokens("c#0", 2, 7, 7))) == [(1, "Abort a#0"), (0, "whole a#1")]


def test_many_continuations_do_not_swap_sides() -> None:
    r = router(spec("mixed"), spec("mixed"))
    r.submit([ask("a"), ask("x"), ask("b", params={"n": 4})])
    assert r._tracked["a"].decode == r._tracked["b"].decode == 0
    assert finish(r, 1, "x") == [], "b waits, but its four would be as crowded there"


def test_a_prompt_that_was_begun_stays() -> None:
    r = router(spec("prefill"), spec("prefill"), spec("decode", 16))
    r.submit([ask("a"), ask("A"), ask("b")])
    r.handle(0, chunk("a#0"))
    r.handle(0, chunk("b#0"))
    assert finish(r, 1, "A") == [(2, "Abort A#0")]


@pytest.mark.parametrize(
    ("rows", "max_tokens", "report"),
    [
        ([("a", 30), ("b", 30), ("c", 30), ("d", 30)], 60, "interval"),  # 30 are left, and 32 computed again
        ([("a", 30), ("b", 30), ("c", 30), ("d", 30)], 100, "step"),
        ([("a", 30), ("b", 30)], 100, "interval"),  # the others expect 30
        ([("a", 90)], 100, "interval"),
        ([("a", 0), ("b", 0), ("c", 0)], 100, "interval"),  # nothing is known of them yet
    ],
)
def test_what_stays(rows: list[tuple[str, int]], max_tokens: int, report: str) -> None:
    r = begun(*rows, max_tokens=max_tokens, report=report)
    assert finish(r, 0, "x") == []
    assert r.num_moves == 0


def test_a_request_moves_once() -> None:
    r = begun(("a", 10), ("b", 20), ("c", 30), ("d", 30))
    assert finish(r, 0, "x") == [(1, "Abort a#0"), (0, "whole a#1")]
    r.lose(0)
    assert r._tracked["a"].decode == 1
    r.handle(1, tokens("a#2", 10, *range(3)))
    assert sent(r.restore(0)) == [(1, "Abort b#0"), (0, "whole b#1")], "a is cheaper, but was moved before"
    r.check_integrity()


# -- what it is worth ------------------------------------------------------------------------------------------------

PROGRESS_S = 0.5
STEP_TOKENS = 512
COSTS = {"accelerator": (0.02, 0.00002), "between": (0.01, 0.0005), "processor": (0.001, 0.002)}
"""Seconds of a step, and of each token in it."""


MIXED: tuple[Role, ...] = ("mixed",) * 4
SPLIT: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode")


class Batch:
    """Rows with the lengths of their answers, run in virtual time."""

    def __init__(self, roles: Sequence[Role], rows: Sequence[tuple[Request, int]], cost: tuple[float, float]) -> None:
        self.specs = [GroupSpec(role=role, max_num_seqs=16, num_kv_tokens=200_000) for role in roles]
        self.router = RequestRouter(self.specs, max_model_len=8192)
        lengths = {request.request_id: length for request, length in rows}
        self.engines = [ModelEngine(lambda r: [[0] * lengths[r.request_id]]) for _ in roles]
        self.todo = [request for request, _ in rows][::-1]
        self.cost = cost
        self.answered: set[str] = set()

    def run(self) -> float:
        """Seconds until everything is answered."""
        num_rows, now = len(self.todo), 0.0
        steps: dict[int, tuple[float, list[Event]]] = {}
        """Per group, the time at which its step ends and the events it emits then."""
        told_at = [0.0] * len(self.engines)
        while len(self.answered) < num_rows:
            while self.todo and self.router.num_in_flight < 32 * len(self.engines):
                self.carry_out(self.router.submit([self.todo.pop()]))
            for group, engine in enumerate(self.engines):
                if group not in steps and any(row.runnable for row in engine.rows.values()):
                    seconds, events = self.step(engine)
                    steps[group] = now + seconds, events
            group = min(steps, key=lambda g: (steps[g][0], g))
            now, events = steps.pop(group)
            if now - told_at[group] >= PROGRESS_S:
                told_at[group] = now
                events += [e for i in self.engines[group].rows for e in self.engines[group].take_outputs(i)]
            for event in events:
                self.carry_out(self.router.handle(group, event))
        self.router.check_integrity()
        return now

    def step(self, engine: ModelEngine) -> tuple[float, list[Event]]:
        budget, events = STEP_TOKENS, list[Event]()
        for attempt_id in list(engine.rows)[: self.specs[0].max_num_seqs]:
            row = engine.rows[attempt_id]
            if budget and row.runnable:
                num_tokens = min(budget, max(1, row.num_pending))
                events += engine.work(attempt_id, num_tokens)
                budget -= num_tokens
        base, per_token = self.cost
        return base + (STEP_TOKENS - budget) * per_token, events

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.engines[effect.group].apply(effect.command)
            elif isinstance(effect.output, RequestOutput):
                assert effect.output.request_id not in self.answered
                self.answered.add(effect.output.request_id)


def uneven(rng: random.Random, number: int) -> int:
    """Every fourth row is long, and those go to the same group, as nobody knows."""
    return rng.randint(300, 600) if number % 4 == 0 else rng.randint(20, 40)


def even(rng: random.Random, number: int) -> int:
    return rng.randint(50, 200)


@pytest.mark.parametrize(
    ("cost", "lengths", "roles", "known", "at_most"),
    [
        ("processor", uneven, MIXED, False, 0.65),
        ("between", uneven, MIXED, False, 0.95),
        ("accelerator", uneven, MIXED, False, 1.05),  # fewer rows are no faster there, and the last half second is lost
        ("processor", uneven, SPLIT, False, 0.8),
        ("processor", even, MIXED, True, 1.02),
        ("accelerator", even, MIXED, False, 1.02),
        ("processor", even, SPLIT, False, 1.02),
        ("accelerator", even, SPLIT, True, 1.02),
    ],
)
def test_a_batch_ends_sooner_where_work_is_uneven_and_hardly_later_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    cost: str,
    lengths: Callable[[random.Random, int], int],
    roles: Sequence[Role],
    known: bool,
    at_most: float,
) -> None:
    """Known: a row says how long its answer gets, and not only that it is below 2000."""
    seconds = []
    for max_moves in (0, 1):
        monkeypatch.setattr(routing_requests, "MAX_MOVES", max_moves)
        rng = random.Random(1)
        sizes = [(rng.randint(20, 60), lengths(rng, i)) for i in range(16 * len(roles))]
        rows = [(ask(str(i), num_prompt, n if known else 2000), n) for i, (num_prompt, n) in enumerate(sizes)]
        seconds.append(Batch(roles, rows, COSTS[cost]).run())
    without, with_moves = seconds
    assert with_moves <= at_most * without
