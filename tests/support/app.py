"""`shoal serve`'s routes on shoal-tiny in this process, through ASGI without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.metrics.meter import RequestMeter
from shoal.cluster.metrics.prometheus import PrometheusInstruments
from shoal.cluster.prompts import request_defaults
from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.cluster.server.app import Api, ServedModel, make_app
from shoal.cluster.server.request_log import RequestLog
from shoal.cluster.server.state import ServerState

ARGS = EngineArgs(model=str(BUNDLED_MODEL), num_threads_per_worker=1, max_num_seqs=8)
QUESTION = [{"role": "user", "content": "What is 4821 + 7790?"}]
CHAT = {"model": "shoal-tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 100}
THINKING = {**CHAT, "chat_template_kwargs": {"thinking": True}}
INSTRUMENTS = PrometheusInstruments("shoal_")
Use = Callable[[httpx.AsyncClient, AsyncEngines, ServerState], Awaitable[None]]


def start_engines() -> EngineThread:
    """Engines whose metrics are those of `INSTRUMENTS`."""
    return EngineThread(lambda: InProcessEngine(ARGS), lambda: RequestMeter([INSTRUMENTS], model_name="shoal-tiny"))


def serve(
    engines: EngineThread,
    use: Use,
    *,
    keys: tuple[str, ...] = (),
    limit: int = 100,
    ready: bool = True,
    lines: list[str] | None = None,
) -> None:
    """Run `use` with a client of an app on these engines."""

    async def run() -> None:
        state = ServerState(stall_timeout_s=60.0)
        client = AsyncEngines(engines)
        if ready:
            state.set_ready(client)
        model = ServedModel(
            names=["shoal-tiny"], root=str(BUNDLED_MODEL), created=1, defaults=request_defaults(ARGS, {}, thinking=None)
        )
        log = RequestLog(None if lines is None else lines.append)
        api = Api(model, state, max_num_queued_reqs=limit, metrics=INSTRUMENTS, log=log)
        app = make_app(api, keys=keys)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal", timeout=600) as http:
            await use(http, client, state)

    asyncio.run(run())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which ends with [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]
