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
import ray
import torch
from numpy.typing import NDArray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.parallel.collectives import CollectiveError
from shoal.parallel.failpoints import Failpoints
from shoal.parallel.groups import ParallelGroups, create_groups, init_groups, single_process_groups
from shoal.parallel.kv_transport import KVChunk, KVTransport
from shoal.parallel.nixl_transport import INSTALL, NixlTransport
from shoal.parallel.nixl_transport import is_installed as nixl_is_installed
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
from .ray_cluster import node_address, nodes
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
AUDIT_TIMEOUT_S = 10.0
FAULT_NOTICE_S = 0.02
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
    def audit(self) -> list[str]: ...


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
    supervisor_key: str = field(default="", repr=False)
    """Known to the processes of this run alone."""
    title: str = ""
    """What people and failpoints call it: decode:0 for the first worker of that role, spare:1 for the second spare."""
    faults: str = ""
    """See `Failpoints`."""


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
    host = "127.0.0.1" if len(nodes()) == 1 else node_address()  # nobody outside need reach a port that trusts all
    return NixlTransport(spec.name, host=host, buffer_bytes=spec.args.kv_buffer_size)


def choose_transport(args: EngineArgs) -> Literal["nixl", "ray"]:
    """What `kv_transport` stands for on this machine; ValueError when it is not installed."""
    if args.kv_transport == "ray":
        return "ray"
    if nixl_is_installed():
        return "nixl"
    if args.kv_transport == "nixl":
        raise ValueError(f"kv_transport nixl needs the package nixl-cu13; {INSTALL}")
    return "ray"


def _is_alone(assignment: Assignment, args: EngineArgs) -> bool:
    """Whether the rank has no peers, nor a device that needs groups."""
    return assignment.parallel.world_size == 1 and args.device == "cpu"


def _rendezvous(assignment: Assignment, args: EngineArgs) -> TCPStore:
    timeout = timedelta(seconds=args.collective_timeout_s)
    host, port = assignment.store_host, assignment.store_port
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


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
        self._in_loop = False
        self._stop_requested = False
        self._audit: list[str] | None = None
        self._audit_wanted = False
        self._failpoints = Failpoints(spec.faults, spec.title, on_fault=self._on_fault)
        self._started = self._ended = False
        self._failure: WorkerFailure | None = None
        self._transport: KVTransport | None = None
        self._engine: EngineLike | None = None
        self._groups: ParallelGroups | None = None
        self._link: LivenessLink | None = None
        self._place: Assignment | None = None
        """Of a spare: the rank that it takes, in an epoch to come."""
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
                    spec.supervisor,
                    spec.supervisor_key,
                    spec.name,
                    node_id=ray.get_runtime_context().get_node_id(),
                    on_message=self._on_supervisor,
                    num_steps=lambda: self._num_steps if self._in_loop else -1,
                )
                self._link.start()
            if spec.assignment is not None:
                self._start_first(spec.assignment, report)
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
            self._in_loop = False
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        return None

    @property
    def _rank(self) -> int:
        return -1 if self._assignment is None else self._assignment.rank

    def _serve(self) -> None:
        if self._engine is None and not self._take_place():
            return
        assignment = self._await_assignment(newer_than=-1)
        while assignment is not None:
            try:
                self._enter(assignment)
                assert self._engine is not None
                self._in_loop = True
                self._loop(self._engine)
                return
            except CollectiveError as error:
                self._in_loop = False
                if self._link is None:
                    raise
                self._link.send(["left", assignment.epoch, str(error)[:MAX_REASON_CHARS]])
                following = self._await_assignment(newer_than=assignment.epoch)
                if following is None:
                    raise
                assignment = following

    def _take_place(self) -> bool:
        """Of a spare: wait for a rank, for as long as the supervisor lives, and load its weights; False to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._place is not None or self._stop_requested)
        if self._place is None:
            return False
        self._failpoints.reach("worker.build")
        self._groups = self._create_groups(self._place)
        self._engine = self._build(self._place, self._groups, StartReport())
        assert self._link is not None
        self._link.send(["loaded"])
        return True

    def _await_assignment(self, *, newer_than: int) -> Assignment | None:
        """The newest assignment, once it is newer; None when this worker is asked to stop, or nobody assigns it."""

        def is_newer() -> bool:
            return self._assignment is not None and self._assignment.epoch > newer_than

        with self._changed:
            self._changed.wait_for(lambda: is_newer() or self._stop_requested, self._spec.args.startup_timeout_s)
            return self._assignment if is_newer() else None

    def _start_first(self, assignment: Assignment, report: StartReport) -> None:
        """In the first epoch, all ranks start together."""
        args, parallel = self._spec.args, assignment.parallel
        start = time.monotonic()
        if _is_alone(assignment, args):
            self._groups = single_process_groups(failpoints=self._failpoints)
        else:
            self._groups = init_groups(
                parallel,
                assignment.rank,
                _rendezvous(assignment, args),
                epoch=assignment.epoch,
                device=torch.device(args.device),
                timeout_s=args.collective_timeout_s,
                hostname=node_address(),
                busy_wait_s=BUSY_WAIT_S if self._spec.dedicated_cores else 0.0,
                failpoints=self._failpoints,
                secret=self._spec.supervisor_key.encode(),
            )
        report.phases["groups"] = time.monotonic() - start
        report.ranks_on_node = self._groups.ranks_on_node
        self._engine = self._build(assignment, self._groups, report)
        self._epoch = assignment.epoch

    def _create_groups(self, place: Assignment) -> ParallelGroups:
        """Of a rank that joins those that are there."""
        args = self._spec.args
        if _is_alone(place, args):
            return single_process_groups(failpoints=self._failpoints)
        assert place.ranks_on_node is not None
        return create_groups(
            place.parallel,
            place.rank,
            device=torch.device(args.device),
            timeout_s=args.collective_timeout_s,
            hostname=node_address(),
            busy_wait_s=BUSY_WAIT_S if self._spec.dedicated_cores else 0.0,
            failpoints=self._failpoints,
            ranks_on_node=place.ranks_on_node,
            secret=self._spec.supervisor_key.encode(),
        )

    def _build(self, place: Assignment, groups: ParallelGroups, report: StartReport) -> EngineLike:
        args = self._spec.args
        if place.num_kv_blocks is not None:
            args = replace(args, num_kv_blocks=place.num_kv_blocks, max_model_len=place.max_model_len)
        return resolve_factory(self._spec.engine_factory)(args, groups, report, self._transport)

    def _enter(self, assignment: Assignment) -> None:
        """Join the other ranks of an epoch."""
        if assignment.epoch == self._epoch:
            return
        assert self._engine is not None
        self._failpoints.reach("worker.join")
        self._join(assignment)
        self._epoch = assignment.epoch
        if self._link is not None:
            self._link.send(["joined", assignment.epoch])
        self._engine.rejoin(assignment.replaced)

    def _join(self, assignment: Assignment) -> None:
        epoch, groups = assignment.epoch, self._groups
        assert groups is not None

        def in_vain() -> bool:
            return self._epoch_left >= epoch

        if _is_alone(assignment, self._spec.args):
            groups.set_epoch(epoch)
            return
        groups.join(_rendezvous(assignment, self._spec.args), epoch, stop=in_vain)
        if in_vain():  # said after the last time that the groups asked
            groups.abort("a rank was lost", epoch=epoch)

    def _on_fault(self, point: str) -> None:
        """Tell of a fault before it happens: the last words of a killed process can be lost."""
        if self._link is not None:
            self._link.send(["fault", point, time.monotonic() + FAULT_NOTICE_S])
            time.sleep(FAULT_NOTICE_S)

    def _on_supervisor(self, message: list[Any]) -> None:
        kind, *values = message
        with self._changed:
            if kind == "leave":
                self._epoch_left = max(self._epoch_left, values[0])
            elif kind == "load":
                self._place = Assignment.from_values(values)
            elif kind == "join":
                self._assignment = Assignment.from_values(values)
            self._changed.notify_all()
        if kind == "leave" and self._groups is not None:
            self._groups.abort("a rank was lost", epoch=values[0])

    def _loop(self, engine: EngineLike) -> None:
        told_at = 0.0  # the first tokens are told at once: after a loss, somebody waits for them
        while True:
            self._failpoints.reach("worker.take_in")
            self._take_in(engine)
            result = engine.step()
            self._num_steps += 1
            self._tell([*result.chunks, *result.loaded, *result.outputs])
            self._failpoints.reach("worker.hand_out")
            if time.monotonic() - told_at >= PROGRESS_INTERVAL_S and (progress := engine.take_progress()):
                told_at = time.monotonic()
                self._tell(progress)
            if result.stopped:
                return
            if result.woke:
                time.sleep(GATHER_S)
            if result.idle:
                with self._changed:
                    self._changed.wait_for(self._has_news, timeout=IDLE_WAIT_S)

    def _has_news(self) -> bool:
        return bool(self._commands or self._stop_requested or self._audit_wanted)

    def _take_in(self, engine: EngineLike) -> None:
        with self._changed:
            commands, stop, audit = list(self._commands), self._stop_requested, self._audit_wanted
            self._commands.clear()
        self._tell([refused for c in commands if (refused := obey(engine, c)) is not None])
        if stop:
            engine.request_stop()
        if audit:
            with self._changed:
                self._audit, self._audit_wanted = engine.audit(), False
                self._changed.notify_all()

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

    def poll(self, max_wait_s: float) -> list[bytes]:
        """Packed events, in the order in which they came about, at once or within `max_wait_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._ended, timeout=max_wait_s)
            messages: list[bytes] = []
            num_bytes = 0
            while self._outbox and (not messages or num_bytes + len(self._outbox[0]) <= MAX_POLL_BYTES):
                num_bytes += len(self._outbox[0])
                messages.append(self._outbox.popleft())
            return messages

    def audit(self) -> list[str]:
        """`Engine.audit` between two steps, once the commands that were told before are done."""
        with self._changed:
            self._audit, self._audit_wanted = None, True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._audit is not None, timeout=AUDIT_TIMEOUT_S)
            return self._audit if done and self._audit is not None else ["no step ended in time to ask"]

    def arm(self, faults: str) -> None:
        """See `Failpoints.arm`."""
        self._failpoints.arm(faults)

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
