#!/usr/bin/env python3
"""What a decision of the router costs with the state of 1,000 replicas: median and 99th percentile, in microseconds.

    python benchmarks/router.py --output benchmarks/results/router.json

`submit` takes a prompt of 1,000 tokens. Hashing its beginnings, and remembering who computed them, is work per token:
it is part of what is measured, and given alone as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.cluster.replica_spec import Role
from shoal.cluster.routing.groups import GroupSpec
from shoal.cluster.routing.prefixes import MAX_PREFIXES, PREFIX_TOKENS, PrefixIndex, prefix_hashes
from shoal.cluster.routing.request_router import Effect, RequestRouter, Send
from shoal.cluster.workers.wire import Abort, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import Finished, Prefilled, PromptLoaded, Request, SamplingParams, Tokens

MAX_NUM_SEQS = 32
NUM_QUEUED = 4000
ROOMY, TIGHT = 1 << 20, 30_000
"""Tokens that a group's cache holds: more than its places need, and half of that."""
MIXED: list[Role] = ["mixed"] * 1000
SPLIT: list[Role] = ["prefill"] * 400 + ["decode"] * 600
STATES: dict[str, tuple[list[Role], int, int | None]] = {
    "1000 mixed, all places taken": (MIXED, ROOMY, None),
    "1000 mixed, all caches full": (MIXED, TIGHT, None),
    "1000 mixed, few requests": (MIXED, ROOMY, 2500),
    "400 prefill and 600 decode, all places taken": (SPLIT, ROOMY, None),
    "400 prefill and 600 decode, all caches full": (SPLIT, TIGHT, None),
    "400 prefill and 600 decode, few requests": (SPLIT, ROOMY, 1500),
}
"""Roles, cache, and requests in flight; None: as many as the groups take, and NUM_QUEUED that wait."""


class Bench:
    """A router in use, and what each kind of call to it took."""

    def __init__(self, roles: list[Role], num_kv_tokens: int, num_in_flight: int | None) -> None:
        spec = {"max_num_seqs": MAX_NUM_SEQS, "num_kv_tokens": num_kv_tokens}
        self.router = RequestRouter(
            [GroupSpec(role=role, **spec) for role in roles], max_model_len=1 << 17, block_size=64
        )
        self.rng = random.Random(0)
        self.tokens = [self.rng.randrange(129_280) for _ in range(1 << 20)]
        self.num_asked = 0
        self.prefilling: dict[RequestId, int] = {}
        """The groups of requests that other groups will go on with."""
        self.answering: dict[RequestId, int] = {}
        self.num_known: dict[RequestId, int] = {}
        self.times: dict[str, list[float]] = defaultdict(list)
        prefixes = [self.rng.randrange(1 << 62) for _ in range(MAX_PREFIXES)]
        for number in range(0, MAX_PREFIXES, 4):
            self.router._placement._prefixes.add(prefixes[number : number + 4], number % len(roles))
        while (
            len(self.router._queue) < NUM_QUEUED if num_in_flight is None else self.router.num_in_flight < num_in_flight
        ):
            for _ in range(100):
                self.submit()
            self.prefill(measured=False)

    def ask(self) -> Request:
        """Prompts of 1,000 tokens, every fourth of 2,500; one of ten begins as others do."""
        self.num_asked += 1
        start = 1000 * self.rng.randrange(100) if self.num_asked % 10 == 0 else self.rng.randrange(1 << 19)
        length = 2500 if self.num_asked % 4 == 0 else 1000
        prompt = tuple(self.tokens[start : start + length])
        return Request(request_id=str(self.num_asked), prompt_token_ids=prompt, params=SamplingParams(max_tokens=1000))

    def call(self, what: str | None, function: Callable[..., list[Effect]], *args: Any, count: int = 1) -> None:
        """Note what a call takes, and where it puts the requests."""
        begin = time.perf_counter_ns()
        effects = function(*args)
        if what is not None:
            self.times[what].append((time.perf_counter_ns() - begin) / 1000 / count)
        for effect in effects:
            if not isinstance(effect, Send):
                continue
            command, attempt_id = effect.command, effect.command.id
            if isinstance(command, Request) and not command.do_remote_prefill:
                (self.prefilling if command.do_remote_decode else self.answering)[attempt_id] = effect.group
            elif isinstance(command, Request):
                self.answering[attempt_id] = effect.group
            elif isinstance(command, Abort) and self.answering.get(attempt_id) == effect.group:
                del self.answering[attempt_id]
            elif isinstance(command, Abort) and self.prefilling.get(attempt_id) == effect.group:
                del self.prefilling[attempt_id]

    def submit(self, what: str | None = None) -> None:
        self.call(what, self.router.submit, [self.ask()])

    def handle(self, what: str | None, group: int, event: Event) -> None:
        self.call(what, self.router.handle, group, event)

    def prefill(self, *, measured: bool) -> None:
        """Every prompt that is being computed is handed over."""
        for attempt_id, group in list(self.prefilling.items()):
            for what, start in (("chunk, the first", 0), ("chunk, another", 500)):
                self.handle(what if measured else None, group, chunk(attempt_id, start))
            self.handle("first tokens" if measured else None, group, tokens(attempt_id, 0, 1))
            prefilled = Prefilled(id=attempt_id, num_cached_tokens=0, handed_over=True)
            self.handle("prefilled" if measured else None, group, prefilled)
            del self.prefilling[attempt_id]
            self.num_known[attempt_id] = 1
            self.handle("loaded" if measured else None, self.answering[attempt_id], PromptLoaded(id=attempt_id))

    def run(self, num_calls: int) -> None:
        """Requests come, go on and end, so that there are always as many."""
        for number in range(num_calls):
            if number % 500 == 0:
                some = self.rng.choices(list(self.answering), k=1000)
            for attempt_id in some[number % 500 * 2 :][:2]:
                self.go_on(attempt_id)
            attempt_id, group = next(iter(self.answering.items()))
            del self.answering[attempt_id]
            num_known = self.num_known.get(attempt_id, 0)
            self.handle("tokens, the last", group, tokens(attempt_id, num_known, 1000))
            end = Finished(id=attempt_id, sample_index=0, reason="length", num_tokens=1000)
            self.handle("finished", group, end)
            self.submit("submit")
            if number % 5 == 0:
                self.call("abort", self.router.abort, self.rng.choice(some).request_id)
                self.submit()
            self.prefill(measured=True)

    def go_on(self, attempt_id: RequestId) -> None:
        """A request reports 16 new tokens."""
        if (group := self.answering.get(attempt_id)) is not None:
            start = self.num_known.get(attempt_id, 0)
            self.num_known[attempt_id] = start + 16
            self.handle("tokens", group, tokens(attempt_id, start, start + 16))

    def lose_and_restore(self, num_calls: int) -> None:
        """Per request that is given back, and per request that is sent to the new group."""
        for _ in range(num_calls):
            group = self.rng.randrange(len(self.router._groups))
            count = len(self.router._groups[group].requests)
            if count:
                for known in (self.answering, self.prefilling):
                    for attempt_id in [i for i, g in known.items() if g == group]:
                        del known[attempt_id]
                self.call("lose, per request", self.router.lose, group, count=count)
                begin = time.perf_counter_ns()
                self.call(None, self.router.restore, group)
                count = max(1, len(self.router._groups[group].requests))
                self.times["restore, per request"].append((time.perf_counter_ns() - begin) / 1000 / count)
        self.router.check_integrity()


def chunk(attempt_id: RequestId, start: int) -> KVChunk:
    values = {"fingerprint": b"", "epoch": 0, "generation": 0, "num_bytes": 1, "checksum": 0, "address": b""}
    return KVChunk(id=attempt_id, start=start, end=start + 500, **values)  # type: ignore[arg-type]


def tokens(attempt_id: RequestId, start: int, end: int) -> Tokens:
    return Tokens(id=attempt_id, sample_index=0, start=start, token_ids=(5,) * (end - start))


def per_1000_tokens(rounds: int = 200) -> dict[str, float]:
    """Microseconds of the work that grows with the length of a prompt, at the median."""
    rng = random.Random(0)
    index = PrefixIndex()
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        prompt = tuple(rng.randrange(129_280) for _ in range(100 * PREFIX_TOKENS))
        begin = time.perf_counter()
        hashes = prefix_hashes(prompt)
        hashed = time.perf_counter()
        index.add(hashes, number)
        added = time.perf_counter()
        times["prefix_hashes"].append(hashed - begin)
        times["PrefixIndex.add"].append(added - hashed)
    return {what: round(statistics.median(t) * 1e9 / (100 * PREFIX_TOKENS), 2) for what, t in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    return {
        "calls": len(times),
        "median": round(statistics.median(times), 1),
        "p99": round(statistics.quantiles(times, n=100)[98], 1),
    }


def cpu_model() -> str:
    """As the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5000, help="of each kind and state")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    states = {}
    for name, (roles, num_kv_tokens, num_in_flight) in STATES.items():
        bench = Bench(roles, num_kv_tokens, num_in_flight)
        in_flight = bench.router.num_in_flight
        bench.run(args.calls)
        bench.lose_and_restore(max(1, args.calls // 25))
        moves = bench.router.num_moves
        microseconds = {what: summary(times) for what, times in sorted(bench.times.items())}
        states[name] = {"requests in flight": in_flight, "moves": moves, "microseconds": microseconds}
        print(name, in_flight, {what: (v["median"], v["p99"]) for what, v in microseconds.items()}, flush=True)
    worst = max(v["median"] for state in states.values() for v in state["microseconds"].values())
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "python": sys.version.split()[0],
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "worst_median_microseconds": worst,
        "microseconds_per_1000_prompt_tokens": per_1000_tokens(),
        "states": states,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"worst_median_microseconds": worst}))


if __name__ == "__main__":
    main()
