"""Requests of an event loop to engines on a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.async_engines import MAX_OUTPUTS, AsyncEngines, Generation, Outputs
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.runtime.random_checkpoint import tiny_config
from shoal.runtime.types import Request, RequestOutput, SamplingParams, Tokens
from tests.support.stub_engine import RAISES, STUB


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[EngineThread]:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("deepseek_v3")))
    args = EngineArgs(model=str(tmp_path), max_num_seqs=4, num_threads_per_worker=1)
    thread = EngineThread(lambda: InProcessEngine(args, engine_factory=STUB))
    yield thread
    thread.close()


def request(first: int, max_tokens: int = 5) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(request_id="", prompt_token_ids=(first, 1), params=params, report="step")


async def pieces_of(generation: Generation) -> AsyncIterator[Outputs]:
    """What every wait returns, to the end."""
    while True:
        outputs = await generation.next()
        yield outputs
        if isinstance(outputs[-1], RequestOutput):
            return


def test_every_request_gets_its_own_tokens_in_order(engines: EngineThread) -> None:
    async def ask(client: AsyncEngines, first: int) -> tuple[list[int], list[int]]:
        streamed: list[int] = []
        async for outputs in pieces_of(client.generate(request(first, max_tokens=3 + first))):
            for output in outputs:
                if isinstance(output, Tokens):
                    assert output.start == len(streamed)
                    streamed += output.token_ids
        assert isinstance(output, RequestOutput)
        return streamed, output.outputs[0].token_ids

    async def run() -> None:
        client = AsyncEngines(engines)
        answers = await asyncio.gather(*[ask(client, first) for first in range(1, 9)])
        for first, (streamed, whole) in enumerate(answers, start=1):
            assert streamed == whole == [first + 1 + i for i in range(3 + first)]
        assert client.num_requests == 0
        assert (await client.generate(request(3)).whole()).outputs[0].token_ids == [4, 5, 6, 7, 8]

    asyncio.run(run())


def test_an_aborted_request_is_dropped(engines: EngineThread) -> None:
    async def run() -> None:
        client = AsyncEngines(engines)
        left = client.generate(request(2, max_tokens=100))
        async for _ in pieces_of(left):
            break
        client.abort(left)
        client.abort(left)
        assert client.num_requests == 0
        assert (await client.generate(request(3)).whole()).outputs[0].token_ids == [4, 5, 6, 7, 8]

    asyncio.run(run())


def test_engines_that_fail_end_every_request_with_their_error(engines: EngineThread) -> None:
    async def run() -> None:
        client = AsyncEngines(engines)
        asked = [client.generate(request(first, max_tokens=100)) for first in (2, RAISES, 3)]
        found = await asyncio.gather(*[one.whole() for one in asked], return_exceptions=True)
        assert [str(error) for error in found] == ["the stub broke"] * 3
        with pytest.raises(RuntimeError, match="the stub broke"):
            client.generate(request(4))
        assert client.num_requests == 0

    asyncio.run(run())


def test_one_that_is_behind_gets_its_outputs_in_pieces(engines: EngineThread) -> None:
    async def run() -> None:
        client = AsyncEngines(engines)
        behind = client.generate(request(1, max_tokens=100))
        assert (client.num_requests, client.num_sequences) == (1, 1)
        while client.num_requests:
            await asyncio.sleep(0.01)
        assert client.num_sequences == 0
        pieces = [outputs async for outputs in pieces_of(behind)]
        assert [len(piece) for piece in pieces] == [MAX_OUTPUTS, 102 - MAX_OUTPUTS], "100 tokens, end and whole answer"

    asyncio.run(run())


def test_a_look_that_is_given_up_leaves_the_engines_alone(engines: EngineThread) -> None:
    """A scrape gives up while the engines are in a long step."""
    begin = threading.Event()
    first = engines._call(lambda: begin.wait(600))
    given_up = engines.look()
    assert given_up.cancel()
    begin.set()
    assert first.result(600)
    assert engines.look().result(600) is None
    assert engines.failure is None


def test_the_outputs_of_a_step_come_at_once(engines: EngineThread) -> None:
    async def run() -> None:
        deliveries: list[set[str]] = []
        client = AsyncEngines(engines)
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def count(function: Any, item: Any = None, *others: Any) -> asyncio.Handle:
            if function == client._hand_out:
                deliveries.append({output.request_id for output in item})
            return call(function, item, *others)

        loop.call_soon_threadsafe = count  # type: ignore[assignment,method-assign]
        await asyncio.gather(*[client.generate(request(first, max_tokens=50)).whole() for first in (1, 2)])
        assert {"s-0", "s-1"} in deliveries

    asyncio.run(run())
