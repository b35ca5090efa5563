"""The life of a server: listen, start the engines, answer, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..engine_args import EngineArgs
from ..exit_codes import ExitCode
from ..metrics.export import make_meter
from ..metrics.meter import RequestMeter
from ..metrics.prometheus import PrometheusInstruments
from ..prompts import request_defaults
from ..replicas.async_engines import AsyncEngines
from ..replicas.engine_thread import EngineThread
from ..replicas.open_engines import choose_executor, open_engines
from ..report import engine_errors, line_printer
from ..workers.engine_factory import BUILD_ENGINE
from .app import Api, ServedModel, make_app
from .http_server import HttpServer, freeze_objects, http_config
from .request_log import RequestLog
from .settings import ServeArgs
from .state import ServerState

STALL_GRACE_S = 10.0
LOOK_S = 0.2


def serve(
    args: ServeArgs, engine: EngineArgs, *, stdout: TextIO, stderr: TextIO, engine_factory: str = BUILD_ENGINE
) -> int:
    """Serve until a signal comes or the engines fail. ValueError for a setting, a model or an address that is wrong."""
    keys = args.read_keys()
    args.check_exposure(has_keys=bool(keys), insecure=engine.insecure)
    name = args.served_model_name or Path(engine.model).resolve().name
    model = ServedModel(
        names=[name],
        root=engine.model,
        created=int(time.time()),
        defaults=request_defaults(engine, {}, thinking=None),
    )
    state = ServerState(stall_timeout_s=engine.collective_timeout_s + STALL_GRACE_S)
    metrics = PrometheusInstruments(engine.metrics_prefix)
    log = RequestLog(line_printer(stdout) if args.log_requests else None)
    api = Api(model, state, max_num_queued_reqs=args.max_num_queued_reqs, metrics=metrics, log=log)
    app = make_app(api, keys=keys)
    config = http_config(app, ssl_certfile=args.ssl_certfile, ssl_keyfile=args.ssl_keyfile)
    with _listener(args) as listener:
        host, port = listener.getsockname()[:2]
        scheme = "http" if args.ssl_certfile is None else "https"
        print(f"listening on {scheme}://{host}:{port}, starting the engines", file=stderr, flush=True)

        def meter(on_ray: bool) -> RequestMeter:
            return make_meter(engine, on_ray=on_ray, model_name=name, instruments=[metrics])

        life = _Life(args, engine, state, HttpServer(config), stderr, engine_factory, meter)
        status = asyncio.run(life.run(listener))
    if life.is_starting:
        # The thread that starts the engines would go on while the interpreter and Ray shut down, which can end the
        # process with an error; Ray's processes end with this one.
        os._exit(status)
    return status


class _Life:
    """From the start of the engines to the end of the process."""

    def __init__(
        self,
        args: ServeArgs,
        engine: EngineArgs,
        state: ServerState,
        server: HttpServer,
        stderr: TextIO,
        engine_factory: str,
        make_meter: Callable[[bool], RequestMeter],
    ) -> None:
        """make_meter: called with whether the engines run on Ray."""
        self._args = args
        self._engine = engine
        self._state = state
        self._server = server
        self._stderr = stderr
        self._engine_factory = engine_factory
        self._make_meter = make_meter
        self._num_signals = 0
        self._signalled = asyncio.Event()
        self.is_starting = False
        """Whether a thread is starting the engines, which nothing can interrupt."""

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        self._take_signals()
        serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        try:
            engines = await self._start_engines()
            if engines is None:
                return ExitCode.OK
            try:
                return await self._serve_until_the_end(engines, serving)
            finally:
                await loop.run_in_executor(None, engines.close)
        finally:
            self._server.should_exit = True
            await serving

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._signalled.set()

    async def _start_engines(self) -> EngineThread | None:
        """The engines once they are ready; None when a signal comes first."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[EngineThread] = loop.create_future()

        def on_phase(line: object) -> None:
            on_loop(announce, line)

        def announce(line: object) -> None:
            self._take_signals()  # Ray has installed handlers of its own
            self._say(line)

        def on_loop(function: Callable[..., object], *args: Any) -> None:
            with contextlib.suppress(RuntimeError):  # a signal has ended the loop
                loop.call_soon_threadsafe(function, *args)

        def start() -> None:
            try:
                engines = EngineThread(
                    lambda: open_engines(
                        self._engine, "auto", on_phase=on_phase, on_wait=on_phase, engine_factory=self._engine_factory
                    ),
                    lambda: self._make_meter(choose_executor(self._engine) == "ray"),
                )
            except BaseException as error:
                on_loop(started.set_exception, error)
            else:
                on_loop(started.set_result, engines)

        # A daemon: a signal must end the process while the engines start.
        self.is_starting = True
        threading.Thread(target=start, name="shoal-start", daemon=True).start()
        signalled = asyncio.ensure_future(self._signalled.wait())
        waiting: set[asyncio.Future[Any]] = {started, signalled}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if not started.done():
            return None
        self.is_starting = False
        with engine_errors():
            engines = await started
        freeze_objects()
        self._state.set_ready(AsyncEngines(engines))
        self._say("ready")
        return engines

    async def _serve_until_the_end(self, engines: EngineThread, serving: asyncio.Future[None]) -> int:
        while not self._signalled.is_set():
            if serving.done():
                serving.result()
                raise RuntimeError("the HTTP server has ended")
            if engines.failure is not None:
                self._state.fail(f"{type(engines.failure).__name__}: {engines.failure}")
                self._say(self._state.reason)
                return ExitCode.ENGINE
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._signalled.wait(), LOOK_S)
        await self._drain()
        return ExitCode.OK

    async def _drain(self) -> None:
        """Let running requests finish, until the time is over or a second signal comes."""
        self._state.drain()
        client = self._state.engines
        assert client is not None
        self._say(f"stopping: waiting up to {self._args.shutdown_timeout_s:g} s for {client.num_requests} requests")
        deadline = time.monotonic() + self._args.shutdown_timeout_s
        while client.num_requests and time.monotonic() < deadline and self._num_signals < 2:
            await asyncio.sleep(LOOK_S / 4)

    def _say(self, line: object) -> None:
        print(line, file=self._stderr, flush=True)


@contextlib.contextmanager
def _listener(args: ServeArgs) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"cannot listen on {args.host}:{args.port}: {reason}; choose another host or port") from error
    with listener:
        yield listener
