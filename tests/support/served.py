"""The server on engines without a model, in this process: through a loopback socket or through ASGI."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.metrics.meter import RequestMeter
from shoal.cluster.metrics.prometheus import PrometheusInstruments
from shoal.cluster.openai.requests import RequestDefaults
from shoal.cluster.prompts import request_defaults
from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.server.app import Api, ServedModel, make_app
from shoal.cluster.server.bodies import MAX_PENDING_BYTES
from shoal.cluster.server.http_server import HttpServer, http_config
from shoal.cluster.server.request_log import RequestLog
from shoal.cluster.server.state import ServerState

from .stub_client import StubClient

DEADLINE_S = 600.0
NAME = "shoal-tiny"
Engines = tuple[EngineThread, RequestMeter, PrometheusInstruments]
"""Engines on their thread, and who counts their requests."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """An app and what it stands on. Everything but the engines belongs to its event loop."""

    app: ASGIApp
    api: Api
    client: AsyncEngines
    meter: RequestMeter
    instruments: PrometheusInstruments
    engines: EngineThread
    lines: list[str]
    """The log of requests."""
    port: int = 0


def bundled_defaults() -> RequestDefaults:
    """What requests to shoal-tiny are checked against."""
    return request_defaults(EngineArgs(model=str(BUNDLED_MODEL)), {}, thinking=None)


def make_served(
    engines: EngineThread,
    meter: RequestMeter,
    instruments: PrometheusInstruments,
    defaults: RequestDefaults,
    *,
    port: int = 0,
    limit: int = 10_000,
    max_pending_bytes: int = MAX_PENDING_BYTES,
    has_log: bool = True,
) -> Served:
    """Call on the event loop."""
    client = AsyncEngines(engines)
    state = ServerState(stall_timeout_s=DEADLINE_S)
    state.set_ready(client)
    model = ServedModel(names=[NAME], root=str(BUNDLED_MODEL), created=1, defaults=defaults)
    lines: list[str] = []
    api = Api(
        model,
        state,
        max_num_queued_reqs=limit,
        metrics=instruments,
        log=RequestLog(lines.append if has_log else None),
        max_pending_bytes=max_pending_bytes,
    )
    return Served(
        app=make_app(api),
        api=api,
        client=client,
        meter=meter,
        instruments=instruments,
        engines=engines,
        port=port,
        lines=lines,
    )


@contextmanager
def stub_engines(defaults: RequestDefaults, make_client: Callable[[RequestDefaults], StubClient]) -> Iterator[Engines]:
    """Engines on their thread, and who counts their requests."""
    instruments = PrometheusInstruments("shoal_")
    meter = RequestMeter([instruments], model_name=NAME)
    engines = EngineThread(lambda: make_client(defaults), lambda: meter)
    try:
        yield engines, meter, instruments
    finally:
        engines.close()


def plain_stub(defaults: RequestDefaults) -> StubClient:
    """As fast as it can."""
    return StubClient(defaults.limits)


def paced_stub(defaults: RequestDefaults) -> StubClient:
    """A few milliseconds a token."""
    return StubClient(defaults.limits, interval_s=0.003)


@contextmanager
def serving(
    make_client: Callable[[RequestDefaults], StubClient] = plain_stub,
    *,
    max_pending_bytes: int = MAX_PENDING_BYTES,
    send_buffer: int | None = None,
) -> Iterator[tuple[Served, HttpServer]]:
    """A server that listens on a port of loopback, on a thread of its own.

    send_buffer: bytes that the kernel takes from the server for a client that does not read.
    """
    defaults = bundled_defaults()
    with stub_engines(defaults, make_client) as engines, socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        started: list[Served] = []
        servers: list[HttpServer] = []
        is_up = threading.Event()

        async def run() -> None:
            port = listener.getsockname()[1]
            started.append(make_served(*engines, defaults, port=port, max_pending_bytes=max_pending_bytes))
            servers.append(HttpServer(http_config(started[0].app)))
            is_up.set()
            await servers[0].serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(run()), name="server")
        thread.start()
        try:
            assert is_up.wait(DEADLINE_S)
            yield started[0], servers[0]
        finally:
            servers[0].should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
