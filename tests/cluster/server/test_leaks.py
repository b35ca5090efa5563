"""Thousands of requests leave nothing behind, however they end."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import Callable
from typing import Any

from shoal.cluster.openai.requests import RequestDefaults
from shoal.cluster.replicas.async_engines import Generation
from shoal.cluster.server.generation import Answer
from tests.support.served import DEADLINE_S, Engines, Served, bundled_defaults, make_served, paced_stub, stub_engines

NUM_REQUESTS = 3000
COMPLETION: dict[str, Any] = {"prompt": [21, 22], "max_tokens": 3}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "2 + 3"}], "max_tokens": 3, "n": 2}
ENDLESS: dict[str, Any] = {"prompt": [21, 22], "max_tokens": 4000}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"stream": True}),
    ("/v1/completions", COMPLETION | {"prompt": ["a", "b"], "stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", ENDLESS),
    ("/v1/completions", ENDLESS | {"stream": True}),
    ("/v1/completions", COMPLETION | {"n": 1000}),
    ("/v1/completions", COMPLETION | {"max_tokens": -1}),
    ("/v1/completions", COMPLETION | {"unknown": 1}),
    ("/v1/completions", COMPLETION | {"model": "gpt"}),
    ("/tokenize", {"prompt": "a b"}),
    ("/v1/models/gpt", {}),
]


async def ask(app: Any, path: str, body: dict[str, Any], *, leaves_after: int | None) -> int:
    """The status of the answer. leaves_after: messages that the client sends and gets; None: it waits for the end."""
    data = json.dumps(body).encode()
    left = asyncio.Event()
    num_messages = 0
    statuses = []

    def count() -> None:
        nonlocal num_messages
        num_messages += 1
        if num_messages == leaves_after:
            left.set()

    async def receive() -> dict[str, Any]:
        if left.is_set() or num_messages >= 2:
            await left.wait()
            return {"type": "http.disconnect"}
        half = len(data) // 2
        part, is_last = (data[half:], True) if num_messages else (data[:half], False)
        count()
        return {"type": "http.request", "body": part, "more_body": not is_last}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        count()

    headers = [(b"host", b"a"), (b"content-length", b"%d" % len(data))]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "state": {}}
    await app(scope, receive, send)
    return statuses[0] if statuses else 0


def state_of(served: Served) -> dict[str, int]:
    """Everything that could grow."""
    gc.collect()
    kept = [one for one in gc.get_objects() if type(one) in (Generation, Answer)]
    return {
        "generations": len(served.client._generations),
        "sequences": served.client.num_sequences,
        "delivered to": len(served.engines._deliver),
        "waiting": len(served.engines._waiting),
        "commands": served.engines._commands.qsize(),
        "metered": len(served.meter._open),
        "bytes of bodies": served.api._bodies._num_pending_bytes,
        "series": len(served.instruments._series),
        "tasks": len(asyncio.all_tasks()),
        "objects": len(kept),
    }


async def settled(served: Served, is_settled: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    deadline = time.monotonic() + DEADLINE_S
    while not is_settled(state := state_of(served)):
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.05)
    return state


async def send_many(served: Served, rng: random.Random, count: int) -> set[int]:
    """Send requests of all kinds, 20 at a time; clients leave at any moment, and those of endless answers always."""

    async def one() -> int:
        path, body = rng.choice(KINDS)
        leaves = body.get("max_tokens") == ENDLESS["max_tokens"] or rng.random() < 0.3
        last = 5 if "stream" in body else 2  # an endless whole answer never sends anything
        return await ask(served.app, path, body, leaves_after=rng.randint(1, last) if leaves else None)

    async def ask_in_turn() -> list[int]:
        return [await one() for _ in range(count // 20)]

    found = await asyncio.gather(*[ask_in_turn() for _ in range(20)])
    return {status for statuses in found for status in statuses}


def test_nothing_grows_with_the_number_of_requests() -> None:
    async def run(engines: Engines, defaults: RequestDefaults) -> None:
        served = make_served(*engines, defaults, limit=500, has_log=False)
        rng = random.Random(0)
        own = {"series", "tasks"}

        def is_empty(state: dict[str, int]) -> bool:
            return not any(count for name, count in state.items() if name not in own)

        await send_many(served, rng, 400)
        before = await settled(served, is_empty)
        statuses = await send_many(served, rng, NUM_REQUESTS)
        assert await settled(served, is_empty) == before
        assert statuses >= {200, 400, 404, 405, 429, 499}

    defaults = bundled_defaults()
    with stub_engines(defaults, paced_stub) as engines:
        asyncio.run(run(engines, defaults))
