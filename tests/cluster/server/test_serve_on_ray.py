"""`shoal serve` on workers, one of which is killed while it streams."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import Any

import httpx
import pytest

from tests.cluster.server.test_serve import DEADLINE_S, Server, serving
from tests.support.processes import actor_pids, descendants, is_alive

pytestmark = pytest.mark.ray
NUM_STREAMS = 64


def question(number: int) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"What is {4821 + 37 * number} + {7790 + 11 * number}?"}],
        "chat_template_kwargs": {"thinking": True},
        "temperature": 0.7,
        "seed": number,
        "max_tokens": 120,
        "stream": True,
    }
    if number % 4 == 0:
        # A form of the answer, which another engine goes on with in the middle.
        return {**asked, "chat_template_kwargs": {"thinking": False}, "guided_regex": "([0-9]{3} ){25}[a-z]{20}"}
    return {**asked, "ignore_eos": True}


async def texts(server: Server, kill: int | None) -> list[tuple[str, str]]:
    """Reasoning and content of every stream; the worker `kill` is killed once some tokens have come."""
    num_events = 0

    async def one(client: httpx.AsyncClient, number: int) -> tuple[str, str]:
        nonlocal num_events
        deltas: list[dict[str, str]] = []
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=question(number)) as response:
            async for line in response.aiter_lines():
                if line in ("", "data: [DONE]"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                deltas += [choice["delta"] for choice in event["choices"]]  # an event with an error has none
                num_events += 1
        return tuple("".join(delta.get(name, "") for delta in deltas) for name in ("reasoning_content", "content"))  # type: ignore[return-value]

    async with httpx.AsyncClient(timeout=DEADLINE_S, limits=httpx.Limits(max_connections=NUM_STREAMS)) as client:
        asked = [asyncio.ensure_future(one(client, number)) for number in range(NUM_STREAMS)]
        if kill is not None:
            while num_events < 5 * NUM_STREAMS:
                await asyncio.sleep(0.01)
            os.kill(kill, signal.SIGKILL)
            assert not any(task.done() for task in asked), "all of them are interrupted"
        return await asyncio.gather(*asked)


def test_a_signal_ends_the_start_of_the_engines() -> None:
    with serving("--data-parallel-size", "2") as server:
        deadline = time.monotonic() + DEADLINE_S
        while not any(line.startswith("ray ") for line in server.lines):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes = descendants(server.process.pid)
        assert processes
        assert server.stop() == 0
        assert "Traceback" not in "".join(server.lines)
        while any(map(is_alive, processes)):
            assert time.monotonic() < deadline, "Ray's processes end with the server"
            time.sleep(0.05)


def test_a_killed_worker_interrupts_no_stream() -> None:
    with serving("--replicas", "prefill:1", "--replicas", "decode:1") as server:
        server.wait_ready()
        expected = asyncio.run(texts(server, None))
        assert len(set(expected)) == NUM_STREAMS
        workers = actor_pids("Worker", server.process.pid)
        assert len(workers) == 2
        for pid in workers:
            assert asyncio.run(texts(server, pid)) == expected
        assert server.stop() == 0
