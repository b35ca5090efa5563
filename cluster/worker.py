"""The actor of one rank: one device, one engine, one loop that never leaves it.

`start` and `run` share one thread, which thereby owns every tensor; the other methods are called from other threads and
only take requests in and hand outputs out. Ray carries requests and outputs, never the tokens of a step.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.parallel.collectives import CollectiveError
from shoal.parallel.config import ParallelConfig
from shoal.parallel.kv_transport import KVChunk, KVTransport
from shoal.runtime.types import (
    CompletionOutput,
    GeneratedTokens,
    PromptLoaded,
    Request,
    RequestOutput,
    RequestProgress,
)
from shoal.runtime.validation import RequestLimits

from .engine_args import EngineArgs
from .ray_cluster import node_address
from .ray_transport import RayTransport
from .wire import Abort, Command, EndPrefill, Event, WireError, pack_event, unpack_command

BUILD_ENGINE = "shoal.cluster.worker:build_engine"
IDLE_WAIT_S = 0.01
"""How long an idle rank waits for a request before it asks the others again; bounds the delay of a first token."""
GATHER_S = 0.005
"""How long ranks that were idle collect requests before they start together: those of one job come within it."""
BUSY_WAIT_S = 0.02
"""How long a rank with its own cores watches for a message before it sleeps: most ranks of a step are less apart."""
PROGRESS_INTERVAL_S = 0.5
"""How much of an answer a crash can cost, in time; the requests that ask for it tell what they have so often."""
MAX_POLL_BYTES = 32 << 20
"""A poll returns at most this much, and at least one output."""


class StepResult(Protocol):
    """What a step says to the loop around it."""

    @property
    def outputs(self) -> list[RequestOutput]: ...
    @property
    def idle(self) -> bool: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def woke(self) -> bool: ...
    @property
    def chunks(self) -> list[KVChunk]: ...
    @property
    def loaded(self) -> list[PromptLoaded]: ...


class EngineLike(Protocol):
    """The engine as its loop sees it. All ranks of a replica call `step` together and see `stopped` in the same one."""

    @property
    def limits(self) -> RequestLimits: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def add_chunk(self, chunk: KVChunk) -> None: ...
    def end_prefill(self, request_id: str, generated: tuple[GeneratedTokens, ...] | None) -> None: ...
    def take_progress(self) -> list[RequestProgress]: ...
    def step(self) -> StepResult: ...
    def request_stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """All that a rank needs to build its engine."""

    args: EngineArgs
    parallel: ParallelConfig
    """Of this replica."""
    rank: int
    store_host: str
    store_port: int
    num_threads: int
    dedicated_cores: bool
    """Whether the node has a core for every thread of every worker on it."""
    engine_factory: str
    """`module:function` with the signature of `build_engine`, resolved inside the worker."""
    name: str = ""
    """Of the actor, under which other workers of this cluster find it."""


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why a rank cannot go on."""

    rank: int
    kind: Literal["value", "collective", "error"]
    """value: what the user asked for cannot work; collective: another rank did not answer, the likelier cause."""
    message: str
    traceback: str


@dataclass(slots=True)
class StartReport:
    """How a rank started; filled while it does."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds, in order."""
    notices: list[str] = field(default_factory=list)
    """What a user should know although nothing is wrong."""
    limits: RequestLimits | None = None
    num_kv_tokens: int = 1 << 20
    """Tokens that the cache of this rank's attention group holds."""
    failure: WorkerFailure | None = None


EngineFactory = Callable[[WorkerSpec, StartReport, KVTransport | None], EngineLike]


def build_engine(spec: WorkerSpec, report: StartReport, transport: KVTransport | None) -> EngineLike:
    """Join the other ranks, then load this rank's part of the model; reports the seconds of both."""
    from shoal.kernels.build import load_library
    from shoal.parallel.groups import init_groups, single_process_groups
    from shoal.runtime.engine import Engine  # here, so that a stub needs no model code

    args, parallel = spec.args, spec.parallel
    start = time.monotonic()
    if parallel.world_size == 1 and args.device == "cpu":
        groups = single_process_groups()
    else:
        timeout = timedelta(seconds=args.collective_timeout_s)
        store = TCPStore(spec.store_host, spec.store_port, is_master=False, timeout=timeout, wait_for_workers=False)
        device = torch.device(args.device)
        groups = init_groups(
            parallel,
            spec.rank,
            store,
            device=device,
            timeout_s=args.collective_timeout_s,
            hostname=node_address(),
            busy_wait_s=BUSY_WAIT_S if spec.dedicated_cores else 0.0,
        )
    report.phases["groups"] = time.monotonic() - start
    if args.device == "cpu" and args.kernel_backend != "reference":
        start = time.monotonic()
        load_library()  # compiled once per machine
        report.phases["kernels"] = time.monotonic() - start
    start = time.monotonic()
    engine = Engine(args.model, args.to_engine_config(), groups, transport=transport, on_phase=report.notices.append)
    report.phases["weights"] = time.monotonic() - start
    report.num_kv_tokens = engine.block_manager.num_blocks * engine.block_manager.block_size
    return engine


def resolve_factory(path: str) -> EngineFactory:
    """The function that `module:function` names."""
    module, _, name = path.partition(":")
    factory: EngineFactory = getattr(import_module(module), name)
    return factory


def create_transport(spec: WorkerSpec) -> KVTransport:
    """This rank's end of the transport that the arguments name."""
    if choose_transport(spec.args) == "ray":
        return RayTransport(spec.name)
    raise NotImplementedError


def choose_transport(args: EngineArgs) -> Literal["nixl", "ray"]:
    """What `kv_transport` stands for on this machine."""
    if args.kv_transport == "auto":
        return "ray"
    return args.kv_transport


def obey(engine: EngineLike, command: Command) -> RequestOutput | None:
    """Do what a command says; a request that the engine refuses is answered at once."""
    match command:
        case Request():
            return admit(engine, command)
        case KVChunk():
            engine.add_chunk(command)
        case EndPrefill(request_id, generated):
            engine.end_prefill(request_id, generated)
        case Abort(request_id):
            engine.abort(request_id)
    return None


def admit(engine: EngineLike, request: Request) -> RequestOutput | None:
    """Add a request; one that the engine refuses is answered at once, with finish reason "error"."""
    try:
        engine.add_request(request)
    except ValueError as error:
        return error_output(request.request_id, list(request.prompt_token_ids), str(error))
    return None


def error_output(request_id: str, prompt_token_ids: list[int], message: str) -> RequestOutput:
    """The finished output of a request that cannot be answered."""
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error", error=message)
    return RequestOutput(request_id=request_id, prompt_token_ids=prompt_token_ids, outputs=[completion], finished=True)


class Worker:
    """One rank. `start`, then `run`, which returns once all ranks agreed to stop or this one failed."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._changed = threading.Condition()
        self._commands: deque[Command] = deque()
        self._transport: KVTransport | None = None
        self._outbox: deque[bytes] = deque()
        self._num_steps = 0
        self._stop_requested = False
        self._ended = False
        self._engine: EngineLike | None = None

    def start(self) -> StartReport:
        """Build the engine; a failure is returned, not raised, so that it needs no class on the other side."""
        report = StartReport()
        try:
            torch.set_num_threads(self._spec.num_threads)
            if self._spec.args.hands_over:
                self._transport = create_transport(self._spec)
            self._engine = resolve_factory(self._spec.engine_factory)(self._spec, report, self._transport)
            report.limits = self._engine.limits
        except Exception as error:
            report.failure = failure_of(self._spec.rank, error)
        return report

    def run(self) -> WorkerFailure | None:
        """The loop: take requests in, step, hand outputs out."""
        assert self._engine is not None, "run before start"
        try:
            self._loop(self._engine)
        except Exception as error:
            return failure_of(self._spec.rank, error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        return None

    def _loop(self, engine: EngineLike) -> None:
        told_at = time.monotonic()
        while True:
            self._take_in(engine)
            result = engine.step()
            self._hand_out([*result.chunks, *result.loaded, *result.outputs])
            if time.monotonic() - told_at >= PROGRESS_INTERVAL_S:
                told_at = time.monotonic()
                self._tell(engine.take_progress())
            if result.stopped:
                return
            if result.woke:
                time.sleep(GATHER_S)
            if result.idle:
                with self._changed:
                    self._changed.wait_for(self._has_news, timeout=IDLE_WAIT_S)

    def _has_news(self) -> bool:
        return bool(self._commands or self._stop_requested)

    def _take_in(self, engine: EngineLike) -> None:
        with self._changed:
            commands, stop = list(self._commands), self._stop_requested
            self._commands.clear()
        self._tell([refused for c in commands if (refused := obey(engine, c)) is not None])
        if stop:
            engine.request_stop()

    def _hand_out(self, events: Sequence[Event]) -> None:
        self._tell(events)
        with self._changed:
            self._num_steps += 1

    def _tell(self, events: Sequence[Event]) -> None:
        if events:
            messages = [_message(event) for event in events]  # a snapshot of what the engine may still change
            with self._changed:
                self._outbox.extend(messages)
                self._changed.notify_all()

    def tell(self, messages: list[bytes]) -> None:
        """Queue packed commands."""
        commands = [unpack_command(message) for message in messages]
        with self._changed:
            self._commands.extend(commands)
            self._changed.notify_all()

    def read_chunk(self, generation: int) -> NDArray[np.uint8] | None:
        """What this worker published for others to read; None when it was released."""
        assert isinstance(self._transport, RayTransport)
        return self._transport.read(generation)

    def poll(self, max_wait_s: float) -> tuple[int, list[bytes]]:
        """Packed events, in the order in which they came about, at once or within `max_wait_s`; before them, a number
        that grows while the loop lives."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._ended, timeout=max_wait_s)
            messages: list[bytes] = []
            num_bytes = 0
            while self._outbox and (not messages or num_bytes + len(self._outbox[0]) <= MAX_POLL_BYTES):
                num_bytes += len(self._outbox[0])
                messages.append(self._outbox.popleft())
            return self._num_steps, messages

    def stop(self) -> None:
        """Ask all ranks to leave their loops after the same step; unfinished requests are dropped."""
        with self._changed:
            self._stop_requested = True
            self._changed.notify_all()


def failure_of(rank: int, error: Exception) -> WorkerFailure:
    """The exception as plain data; call it while the exception is being handled."""
    kind: Literal["value", "collective", "error"] = "error"
    if isinstance(error, CollectiveError):
        kind = "collective"
    elif isinstance(error, ValueError):
        kind = "value"
    return WorkerFailure(rank, kind, f"{type(error).__name__}: {error}", traceback.format_exc())


def _message(event: Event) -> bytes:
    try:
        return pack_event(event)
    except WireError as error:
        if not isinstance(event, RequestOutput):
            raise
        return pack_event(error_output(event.request_id, event.prompt_token_ids, str(error)))
