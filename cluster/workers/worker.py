"""The actor of one rank: one device, one engine, one loop that never leaves it.

`start` and `run` share one thread, which thereby owns every tensor; the other methods are called from other threads and
only queue commands and return events. Ray carries commands and events, never the tensors of a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from shoal.parallel.collectives import CollectiveError
from shoal.parallel.failpoints import SPAN_POINTS, Failpoints
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.kv_transport import KVChunk, KVTransport
from shoal.parallel.spans import Spans
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.types import REPORT_INTERVAL_S, Finished, Request, Tokens

from .assignment import Assignment
from .engine_factory import EngineLike, admit, prepare, resolve_factory, step_profile
from .kv_transports import create_transport
from .liveness import BEAT_S, LivenessLink
from .ray_transport import RayTransport
from .spec import StartReport, WorkerFailure, WorkerSpec, failure_of
from .wire import (
    COMMANDS,
    EVENTS,
    Abort,
    Command,
    EndPrefill,
    Event,
    FaultNoted,
    FaultNotice,
    Heartbeat,
    Joined,
    JoinEpoch,
    Joining,
    LeaveEpoch,
    Left,
    Loaded,
    LoadRank,
    SupervisorOrder,
    WireError,
)
from .worker_groups import join_groups, replacement_groups, start_groups
from .worker_log import start_worker_log

logger = logging.getLogger("shoal.worker")

IDLE_WAIT_S = 0.01
"""How long an idle rank waits for a request before it asks the others again; bounds the delay of a first token."""
GATHER_S = 0.005
"""How long ranks that were idle collect requests before they start together: those of one job come within it."""
AUDIT_TIMEOUT_S = 10.0
FAULT_NOTICE_TIMEOUT_S = 10.0
"""Longest wait of a failpoint for the supervisor to know of it; without an answer it strikes all the same."""
MAX_REASON_CHARS = 2000
MAX_POLL_BYTES = 32 << 20
"""A poll returns at most this much, and at least one output."""


def apply_command(engine: EngineLike, command: Command) -> list[Finished]:
    """Apply a command to the engine; returns the end of a request that the engine refuses."""
    match command:
        case Request():
            return [] if engine.has_request(command.id) else admit(engine, command)
        case KVChunk():
            engine.add_chunk(command)
        case EndPrefill():
            engine.end_prefill(command.id, command.generated)
        case Abort():
            engine.abort(command.id)
    return []


class Worker:
    """One process for one rank at a time.

    Call `start`, then `run`, which returns once all ranks agreed to stop, or this one failed in a way that a new group
    does not mend.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._changed = threading.Condition()
        self._commands: deque[Command] = deque()
        self._out_of_order: dict[int, list[Command]] = {}
        """Calls that arrived before an earlier one, which they wait for."""
        self._num_sends = 0
        """Calls of `send` that are in order."""
        self._outbox: deque[bytes] = deque()
        self._num_steps = 0
        self._stats: EngineStats | None = None
        """Counters of the engine, at most a heartbeat old."""
        self._in_loop = False
        self._stop_requested = False
        self._audit: list[str] | None = None
        self._audit_wanted = False
        self._fault_noted = threading.Event()
        self._failpoints = Failpoints(spec.faults, spec.label, on_fault=self._on_fault)
        self._spans = Spans()
        self._spans.add(self._failpoints, SPAN_POINTS)
        self._started = self._ended = False
        self._failure: WorkerFailure | None = None
        self._transport: KVTransport | None = None
        self._engine: EngineLike | None = None
        self._groups: ParallelGroups | None = None
        self._link: LivenessLink | None = None
        self._place: Assignment | None = None
        """Rank that a spare takes in a coming epoch."""
        self._assignment = spec.assignment
        """The newest assignment."""
        self._epoch = -1
        """The last epoch that was joined."""
        self._epoch_left = -1
        """Peers do not answer in this epoch or an earlier one."""

    def start(self) -> StartReport:
        """Build the engine, or load what a spare can; a failure is returned, not raised, so that no class travels."""
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
                    on_order=self._on_order,
                    heartbeat=self._heartbeat,
                )
                self._link.start()
                start_worker_log(self._describe, self._link.send)
            if spec.assignment is not None:
                self._start_first(spec.assignment, report)
                assert self._engine is not None
                report.limits = self._engine.limits
        except Exception as error:
            logger.info("the start failed", exc_info=True)  # the driver shows it
            report.failure = self._failure = failure_of(self._rank, error)
        else:
            logger.info("ready; seconds: %s", {name: round(seconds, 2) for name, seconds in report.phases.items()})
        self._started = True
        return report

    def run(self) -> WorkerFailure | None:
        """Apply commands, step and emit events, from one epoch to the next."""
        assert self._started, "run before start"
        if self._failure is not None:
            return self._failure
        try:
            self._serve()
        except Exception as error:
            logger.info("the loop failed", exc_info=True)
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

    def _describe(self) -> str:
        """Which worker this is, for its log."""
        return f"{self._spec.label}, rank {self._rank}, epoch {self._epoch}"

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
                logger.info("left the epoch: %s", error)
                self._link.send(Left(assignment.epoch, str(error)[:MAX_REASON_CHARS]))
                following = self._await_assignment(newer_than=assignment.epoch)
                if following is None:
                    raise
                assignment = following

    def _take_place(self) -> bool:
        """As a spare, wait for a rank while the supervisor lives, and load its weights; False to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._place is not None or self._stop_requested)
        if self._place is None:
            return False
        self._failpoints.reach("worker.build")
        self._groups = replacement_groups(self._spec, self._place, self._spans)
        self._engine = self._build(self._place, self._groups, StartReport())
        assert self._link is not None
        logger.info("loaded the weights of rank %d", self._place.rank)
        self._link.send(Loaded())
        return True

    def _await_assignment(self, *, newer_than: int) -> Assignment | None:
        """The newest assignment, once it is newer; None when this worker is asked to stop, or nobody assigns it."""

        def is_newer() -> bool:
            return self._assignment is not None and self._assignment.epoch > newer_than

        with self._changed:
            self._changed.wait_for(lambda: is_newer() or self._stop_requested, self._spec.args.startup_timeout_s)
            return self._assignment if is_newer() else None

    def _start_first(self, assignment: Assignment, report: StartReport) -> None:
        """Start in the first epoch, together with all other ranks."""
        start = time.monotonic()
        self._groups = start_groups(self._spec, assignment, self._spans)
        report.phases["groups"] = time.monotonic() - start
        report.local_world_size = self._groups.local_world_size
        self._engine = self._build(assignment, self._groups, report)
        self._epoch = assignment.epoch

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
        assert self._link is not None
        self._failpoints.reach("worker.join")
        self._link.send(Joining(assignment.epoch))
        assert self._groups is not None
        join_groups(self._spec, assignment, self._groups, lambda: self._epoch_left >= assignment.epoch)
        self._epoch = assignment.epoch
        logger.info("joined the epoch; new workers in ranks %s", list(assignment.replaced))
        self._link.send(Joined(assignment.epoch))
        self._engine.rejoin(assignment.replaced)

    def _on_fault(self, point: str) -> None:
        """Report a fault before it strikes, and wait until the supervisor knows: last messages can be lost."""
        if self._link is not None:
            self._fault_noted.clear()
            self._link.send(FaultNotice(point))
            self._fault_noted.wait(FAULT_NOTICE_TIMEOUT_S)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._num_steps if self._in_loop else -1, self._stats)

    def _on_order(self, order: SupervisorOrder) -> None:
        if isinstance(order, FaultNoted):
            self._fault_noted.set()
            return
        with self._changed:
            match order:
                case LeaveEpoch():
                    self._epoch_left = max(self._epoch_left, order.epoch)
                case LoadRank():
                    self._place = order.assignment
                case JoinEpoch():
                    self._assignment = order.assignment
            self._changed.notify_all()
        if isinstance(order, LeaveEpoch) and self._groups is not None:
            self._groups.abort("a rank was lost", epoch=order.epoch)

    def _loop(self, engine: EngineLike) -> None:
        reported_at = 0.0  # the first tokens are reported at once: after a loss, somebody waits for them
        counted_at = 0.0
        while True:
            self._failpoints.reach("worker.take_in")
            self._drain_inbox(engine)
            result = engine.step()
            self._num_steps += 1
            self._emit([*result.chunks, *result.loaded, *result.outputs])
            self._failpoints.reach("worker.hand_out")
            now = time.monotonic()
            if now - reported_at >= REPORT_INTERVAL_S and (outputs := engine.take_outputs()):
                reported_at = now
                self._emit(outputs)
            if now - counted_at >= BEAT_S:
                counted_at = now
                self._stats = engine.stats()
            if result.stopped:
                return
            if result.woke:
                time.sleep(GATHER_S)
            if result.idle:
                with self._changed:
                    self._changed.wait_for(self._has_input, timeout=IDLE_WAIT_S)

    def _has_input(self) -> bool:
        return bool(self._commands or self._stop_requested or self._audit_wanted)

    def _drain_inbox(self, engine: EngineLike) -> None:
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
            stop = self._stop_requested
            audit = self._audit_wanted
        self._emit([end for command in commands for end in apply_command(engine, command)])
        if stop:
            engine.request_stop()
        if audit:
            with self._changed:
                self._audit = engine.audit()
                self._audit_wanted = False
                self._changed.notify_all()

    def _emit(self, events: Sequence[Event]) -> None:
        if events:
            messages = [_encoded(event) for event in events]
            with self._changed:
                self._outbox.extend(messages)
                self._changed.notify_all()

    def send(self, number: int, messages: list[bytes]) -> None:
        """Queue encoded commands. Calls are numbered from 0 on, as Ray may let one overtake another."""
        commands = [COMMANDS.decode(message) for message in messages]
        with self._changed:
            self._out_of_order[number] = commands
            while (following := self._out_of_order.pop(self._num_sends, None)) is not None:
                self._num_sends += 1
                self._commands.extend(following)
            self._changed.notify_all()

    def read_chunk(self, generation: int) -> NDArray[np.uint8] | None:
        """Payload of a KV chunk that this worker published; None when it was released."""
        assert isinstance(self._transport, RayTransport)
        return self._transport.read(generation)

    def poll(self, max_wait_s: float) -> list[bytes]:
        """Encoded events, in the order in which they came about, at once or within `max_wait_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._ended, timeout=max_wait_s)
            messages: list[bytes] = []
            num_bytes = 0
            while self._outbox and (not messages or num_bytes + len(self._outbox[0]) <= MAX_POLL_BYTES):
                num_bytes += len(self._outbox[0])
                messages.append(self._outbox.popleft())
            return messages

    def audit(self) -> list[str]:
        """`Engine.audit` between two steps, after the commands that were sent before."""
        with self._changed:
            self._audit, self._audit_wanted = None, True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._audit is not None, timeout=AUDIT_TIMEOUT_S)
            return self._audit if done and self._audit is not None else ["no step ended in time to ask"]

    def step_profile(self) -> StepProfile:
        """Step profile of an engine that measures its steps."""
        assert self._engine is not None
        return step_profile(self._engine)

    def arm(self, faults: str) -> None:
        """See `Failpoints.arm`."""
        self._failpoints.arm(faults)

    def stop(self) -> None:
        """Ask all ranks to leave their loops after the same step; unfinished requests are dropped."""
        with self._changed:
            self._stop_requested = True
            self._changed.notify_all()


def _encoded(event: Event) -> bytes:
    """An event as a message; one that no message can hold ends its sample with an error."""
    try:
        return EVENTS.encode(event)
    except WireError as error:
        sample_index = event.sample_index if isinstance(event, Tokens | Finished) else 0
        end = Finished(id=event.id, sample_index=sample_index, reason="error", num_tokens=0, error=str(error))
        return EVENTS.encode(end)
