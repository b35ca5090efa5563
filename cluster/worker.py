"""The actor of one rank: one device, one engine, one loop that never leaves it.

`start` and `run` share one thread, which thereby owns every tensor; the other methods are called from other threads and
only take requests in and hand outputs out. Ray carries requests and outputs, never the tokens of a step.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.parallel.collectives import CollectiveError
from shoal.parallel.groups import ParallelGroups, init_groups, single_process_groups
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

from .assignment import Assignment
from .engine_args import EngineArgs
from .liveness import LivenessLink
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
MAX_REASON_CHARS = 2000
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
    def rejoin(self, replaced: Collection[int]) -> None: ...
    def step(self) -> StepResult: ...
    def request_stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a worker process is, whatever rank it has."""

    args: EngineArgs
    name: str
    """Of the actor, under which other workers of this cluster find it."""
    assignment: Assignment | None
    """Its first rank; None: a spare, which waits for one."""
    num_threads: int
    dedicated_cores: bool
    """Whether the node has a core for every thread of every worker on it."""
    engine_factory: str
    """`module:function` with the signature of `build_engine`, resolved inside the worker."""
    supervisor: tuple[str, int] | None = None
    """Where to report; None: nobody replaces ranks, and a failure ends this one."""
    supervisor_key: str = ""


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
    num_kv_blocks: int | None = None
    ranks_on_node: int = 1
    failure: WorkerFailure | None = None


EngineFactory = Callable[[EngineArgs, ParallelGroups, StartReport, KVTransport | None], EngineLike]


def build_engine(
    args: EngineArgs, groups: ParallelGroups, report: StartReport, transport: KVTransport | None
) -> EngineLike:
    """Load this rank's part of the model; reports the seconds."""
    from shoal.runtime.engine import Engine  # here, so that a stub needs no model code

    prepare(args, report)
    start = time.monotonic()
    engine = Engine(args.model, args.to_engine_config(), groups, transport=transport, on_phase=report.notices.append)
    report.phases["weights"] = time.monotonic() - start
    report.num_kv_blocks = engine.block_manager.num_blocks
    report.num_kv_tokens = engine.block_manager.num_blocks * engine.block_manager.block_size
    return engine


def prepare(args: EngineArgs, report: StartReport) -> None:
    """What needs no rank: model code and kernels."""
    import shoal.runtime.engine
    from shoal.kernels.build import load_library

    assert shoal.runtime.engine
    if args.device == "cpu" and args.kernel_backend != "reference":
        start = time.monotonic()
        load_library()  # compiled once per machine
        report.phases["kernels"] = time.monotonic() - start


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
    """One process for one rank at a time. `start`, then `run`, which returns once all ranks agreed to stop, or this one
    failed in a way that a new group does not mend."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._changed = threading.Condition()
        self._commands: deque[Command] = deque()
        self._outbox: deque[bytes] = deque()
        self._num_steps = 0
        self._stop_requested = False
        self._started = self._ended = False
        self._failure: WorkerFailure | None = None
        self._transport: KVTransport | None = None
        self._engine: EngineLike | None = None
        self._groups: ParallelGroups | None = None
        self._link: LivenessLink | None = None
        self._assignment = spec.assignment
        """The newest one."""
        self._epoch = -1
        """The last one that was joined."""
        self._epoch_left = -1
        """In this epoch and before, peers will not answer."""

    def start(self) -> StartReport:
        """Build the engine, or what a spare can; a failure is returned, not raised: it needs no class elsewhere."""
        report = StartReport()
        spec = self._spec
        try:
            torch.set_num_threads(spec.num_threads)
            if spec.args.hands_over:
                self._transport = create_transport(spec)
            if spec.assignment is None:
                prepare(spec.args, report)
            if spec.supervisor is not None:
                self._link = LivenessLink(
                    spec.supervisor, spec.supervisor_key, spec.name, on_message=self._on_supervisor
                )
                self._link.start()
            if spec.assignment is not None:
                self._enter(spec.assignment, report)
                assert self._engine is not None
                report.limits = self._engine.limits
        except Exception as error:
            report.failure = self._failure = failure_of(self._rank, error)
        self._started = True
        return report

    def run(self) -> WorkerFailure | None:
        """The loop: take requests in, step, hand outputs out; from one epoch to the next."""
        assert self._started, "run before start"
        if self._failure is not None:
            return self._failure
        try:
            self._serve()
        except Exception as error:
            return failure_of(self._rank, error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        return None

    @property
    def _rank(self) -> int:
        return -1 if self._assignment is None else self._assignment.rank

    def _serve(self) -> None:
        assignment = self._await_assignment(newer_than=-1)
        while assignment is not None:
            try:
                self._enter(assignment, StartReport())
                assert self._engine is not None
                self._loop(self._engine)
                return
            except CollectiveError as error:
                if self._link is None:
                    raise
                self._link.send(["left", assignment.epoch, str(error)[:MAX_REASON_CHARS]])
                following = self._await_assignment(newer_than=assignment.epoch)
                if following is None:
                    raise
                assignment = following

    def _await_assignment(self, *, newer_than: int) -> Assignment | None:
        """The newest assignment, once it is newer; None when this worker is asked to stop, or nobody assigns it."""

        def is_newer() -> bool:
            return self._assignment is not None and self._assignment.epoch > newer_than

        # A spare waits for as long as its supervisor lives; a rank that left knows that it is being dealt with.
        timeout = None if newer_than < 0 else self._spec.args.startup_timeout_s
        with self._changed:
            self._changed.wait_for(lambda: is_newer() or self._stop_requested, timeout)
            return self._assignment if is_newer() else None

    def _enter(self, assignment: Assignment, report: StartReport) -> None:
        """Take part in an epoch: join the other ranks, with a new engine or the one that is there."""
        if assignment.epoch == self._epoch:
            return
        start = time.monotonic()
        self._join(assignment)
        assert self._groups is not None
        report.phases["groups"] = time.monotonic() - start
        report.ranks_on_node = self._groups.ranks_on_node
        self._epoch = assignment.epoch
        if self._link is not None:
            self._link.send(["joined", assignment.epoch])
        if self._engine is not None:
            self._engine.rejoin(assignment.replaced)
            return
        args = self._spec.args
        if assignment.num_kv_blocks is not None:
            args = replace(args, num_kv_blocks=assignment.num_kv_blocks, max_model_len=assignment.max_model_len)
        self._engine = resolve_factory(self._spec.engine_factory)(args, self._groups, report, self._transport)

    def _join(self, assignment: Assignment) -> None:
        args, epoch = self._spec.args, assignment.epoch

        def in_vain() -> bool:
            return self._epoch_left >= epoch

        if assignment.parallel.world_size == 1 and args.device == "cpu":
            self._groups = self._groups or single_process_groups()
            self._groups.set_epoch(epoch)
            return
        timeout = timedelta(seconds=args.collective_timeout_s)
        host, port = assignment.store_host, assignment.store_port
        store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        if self._groups is not None:
            self._groups.join(store, epoch, stop=in_vain)
        else:
            self._groups = init_groups(
                assignment.parallel,
                assignment.rank,
                store,
                epoch=epoch,
                device=torch.device(args.device),
                timeout_s=args.collective_timeout_s,
                hostname=node_address(),
                busy_wait_s=BUSY_WAIT_S if self._spec.dedicated_cores else 0.0,
                ranks_on_node=assignment.ranks_on_node,
                stop=in_vain,
            )
        if in_vain():  # said after the last time that the groups asked
            self._groups.abort("a rank was lost", epoch=epoch)

    def _on_supervisor(self, message: list[Any]) -> None:
        kind, *values = message
        with self._changed:
            if kind == "leave":
                self._epoch_left = max(self._epoch_left, values[0])
            elif kind == "join":
                self._assignment = Assignment.from_values(values)
            self._changed.notify_all()
        if kind == "leave" and self._groups is not None:
            self._groups.abort("a rank was lost", epoch=values[0])

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
