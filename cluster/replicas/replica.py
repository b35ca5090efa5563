"""The driver's side of one replica: its workers, the commands to them and the events from them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import ray
from msgspec.structs import replace
from ray.exceptions import RayError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits

from ..replica_spec import ReplicaSpec
from ..workers.actors import INBOX_THREAD, LaunchConfig, ObjectRef, WorkerProcess, WorkerSlot, end_worker, start_worker
from ..workers.assignment import Assignment
from ..workers.spec import StartReport
from ..workers.wire import COMMANDS, EVENTS, Command, Event
from ..workers.worker import AUDIT_TIMEOUT_S

POLL_WAIT_S = 1.0
"""Longest wait of a worker's poll while there are no events."""
STOP_TIMEOUT_S = 5.0
PROFILE_TIMEOUT_S = 10.0


class EngineFailed(RuntimeError):  # noqa: N818
    """A replica failed: the rank that is the cause, and the reason. Its requests can be submitted elsewhere."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


@dataclass(slots=True)
class _Leader:
    """The worker that receives the requests of an attention group: its TP rank 0."""

    rank: int
    worker: WorkerProcess | None
    """None while the rank is vacant."""
    poll: ObjectRef | None = None
    sends: list[ObjectRef] = field(default_factory=list)
    """Calls of `Worker.send` that may still fail."""
    num_sends: int = 0


def listen(host: str) -> TCPStore:
    """Rendezvous store of a replica on a free port of `host` (a TCPStore by itself listens on all addresses)."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


class Replica:
    """The workers of one replica, for use after `wait_ready`. Not thread-safe.

    Workers that are lost (`lose`) and their replacements (`fill`) are reported by the supervisor.
    """

    def __init__(
        self, spec: ReplicaSpec, launch: LaunchConfig, slots: Sequence[WorkerSlot], *, host: str, first_number: int = 0
    ) -> None:
        """Start a worker in each slot; the workers build their engines.

        `host`: this node's address. `first_number`: number of workers of this role in the replicas before.
        """
        self.role = spec.role
        self._store = listen(host)
        self._limits: RequestLimits | None = None
        self._num_kv_tokens: dict[int, int] = {}
        self._failure: EngineFailed | None = None
        self.unreachable: list[tuple[str, str]] = []
        """Workers that did not answer a call or whose loop failed, with the reason, for the supervisor."""
        self.assignments = [
            Assignment(
                epoch=0,
                rank=rank,
                tensor_parallel_size=spec.tensor_parallel_size,
                data_parallel_size=spec.data_parallel_size,
                store_host=host,
                store_port=self._store.port,
            )
            for rank in range(spec.parallel.world_size)
        ]
        """Assignments by rank; complete once the replica is ready."""
        self.workers = [
            start_worker(launch, slot, assignment, label=f"{spec.role}:{first_number + assignment.rank}")
            for slot, assignment in zip(slots, self.assignments, strict=True)
        ]
        """Initial worker of each rank."""
        tp = spec.tensor_parallel_size
        self._leaders = [_Leader(rank, self.workers[rank]) for rank in range(0, len(self.workers), tp)]
        self._starts: dict[ObjectRef, int] = {w.started: rank for rank, w in enumerate(self.workers)}
        self._running: dict[int, WorkerProcess] = {}
        """Current workers by rank."""

    def wait_ready(self, timeout_s: float) -> list[StartReport]:
        """Wait until all ranks can serve; returns their reports by rank.

        EngineFailed when a rank fails, ValueError when a setting of the user is the cause.
        """
        deadline = time.monotonic() + timeout_s
        reports: dict[int, StartReport] = {}
        while len(reports) < len(self._starts):
            pending = [ref for ref, rank in self._starts.items() if rank not in reports]
            ready, _ = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(self._starts[ref] for ref in pending)
                self._fail(late[0], f"ranks {late} were not ready after {timeout_s:g} s (startup_timeout_s)")
            rank = self._starts[ready[0]]
            try:
                reports[rank] = ray.get(ready[0])
            except RayError as error:
                self._fail(rank, f"its process died during start-up: {error}")
            if (failure := reports[rank].failure) is not None:
                if failure.kind == "value":
                    self.close()
                    raise ValueError(failure.message.removeprefix("ValueError: "))
                self._fail(rank, f"{failure.message}\n{failure.traceback}")
        self._limits = _tightest(reports.values())
        self._num_kv_tokens = {rank: report.num_kv_tokens for rank, report in reports.items()}
        self.workers = [worker.run() for worker in self.workers]
        self._running = dict(enumerate(self.workers))
        self.assignments = [
            replace(
                assignment,
                local_world_size=reports[rank].local_world_size,
                num_kv_blocks=reports[rank].num_kv_blocks,
                max_model_len=self._limits.max_model_len,
            )
            for rank, assignment in enumerate(self.assignments)
        ]
        return [reports[rank] for rank in range(len(reports))]

    @property
    def limits(self) -> RequestLimits:
        """Limits that hold in every attention group."""
        assert self._limits is not None, "limits are known after wait_ready"
        return self._limits

    def leader_of(self, rank: int) -> int:
        """The rank that receives the requests of this rank's attention group."""
        return max(leader for leader in self.leaders if leader <= rank)

    def num_kv_tokens(self, rank: int) -> int:
        """Capacity in tokens of a rank's KV cache."""
        return self._num_kv_tokens[rank]

    @property
    def leaders(self) -> list[int]:
        """The ranks that receive requests."""
        return [leader.rank for leader in self._leaders]

    def send(self, rank: int, commands: Sequence[Command]) -> None:
        """Send commands to a leader, which applies them in this order."""
        self._check_alive()
        leader = next(leader for leader in self._leaders if leader.rank == rank)
        if leader.worker is None:
            return  # the supervisor is about to report the loss, and the requests are sent elsewhere then
        send = leader.worker.actor.send.options(concurrency_group=INBOX_THREAD)
        leader.sends.append(send.remote(leader.num_sends, [COMMANDS.encode(c) for c in commands]))
        leader.num_sends += 1

    def refs(self) -> list[ObjectRef]:
        """Refs to wait for: polls of the leaders, and the end of every rank's loop."""
        self._check_alive()
        for leader in self._leaders:
            if leader.poll is None and leader.worker is not None:
                leader.poll = leader.worker.actor.poll.remote(POLL_WAIT_S)
        polls = [leader.poll for leader in self._leaders if leader.poll is not None]
        return polls + [worker.ended for worker in self._running.values()]

    def lose(self, rank: int) -> bool:
        """Remove the worker of a rank; returns whether it was a leader, whose requests are lost with it."""
        self._running.pop(rank, None)
        for leader in self._leaders:
            if leader.rank == rank:
                self._forget(leader)
                leader.num_sends = 0
                return True
        return False

    def fill(self, rank: int, worker: WorkerProcess) -> bool:
        """Set the new worker of a rank; returns whether it is a leader, which receives requests."""
        self._running[rank] = worker
        for leader in self._leaders:
            if leader.rank == rank:
                leader.worker = worker
                return True
        return False

    def collect(self, ready: set[ObjectRef]) -> list[tuple[int, Event]]:
        """Events of the leaders whose polls are `ready`, each with the leader's rank.

        Failed loops are looked for only when there are no events, so that no event is lost.
        """
        events: list[tuple[int, Event]] = []
        for leader in self._leaders:
            self._check_sends(leader)
            if leader.poll is not None and leader.poll in ready:
                poll = leader.poll
                leader.poll = None
                try:
                    messages = ray.get(poll)
                except RayError as error:
                    self._miss(leader, error)
                    continue
                events += [(leader.rank, EVENTS.decode(message)) for message in messages]
        if not events:
            self._check_ends(ready)
        return events

    def _check_sends(self, leader: _Leader) -> None:
        """Report the leader as unreachable when a command did not arrive: it would be missing from then on."""
        if leader.worker is None or not leader.sends:
            return
        done, leader.sends = ray.wait(leader.sends, num_returns=len(leader.sends), timeout=0)
        try:
            for ref in done:
                ray.get(ref)
        except RayError as error:
            self._miss(leader, error)

    def _miss(self, leader: _Leader, error: RayError) -> None:
        if leader.worker is not None:
            self.unreachable.append((leader.worker.name, f"a call to it failed: {error}"))
        self._forget(leader)

    @staticmethod
    def _forget(leader: _Leader) -> None:
        """Drop the worker of a leader, with all calls to it."""
        leader.worker = None
        leader.poll = None
        leader.sends = []

    def stop(self) -> None:
        """Stop all loops in the same step and wait for their ends, at most STOP_TIMEOUT_S."""
        if self._failure is None and self._running:
            for leader in self._leaders:
                if leader.worker is not None:
                    leader.worker.actor.stop.remote()
            ended = [worker.ended for worker in self._running.values()]
            ray.wait(ended, num_returns=len(ended), timeout=STOP_TIMEOUT_S)

    def audit(self) -> list[str]:
        """Resources that ranks still hold although nothing is in flight; [] when all are free."""
        asked = {worker.label: worker.actor.audit.remote() for worker in self._running.values()}
        return [
            f"{label}: {problem}"
            for label, ref in asked.items()
            for problem in ray.get(ref, timeout=AUDIT_TIMEOUT_S + POLL_WAIT_S)
        ]

    def step_profiles(self) -> list[StepProfile]:
        """Step profiles of every rank; the engines must measure their steps."""
        asked = [self._running[rank].actor.step_profile.remote() for rank in sorted(self._running)]
        profiles: list[StepProfile] = ray.get(asked, timeout=PROFILE_TIMEOUT_S)
        return profiles

    def close(self) -> None:
        """Stop the loops, then end the initial workers. Closing twice is allowed."""
        self.stop()
        self._running = {}
        for worker in self.workers:
            end_worker(worker)
        self.workers = []

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        assert self.workers, "the replica is closed"

    def _fail(self, rank: int, reason: str) -> None:
        self._failure = EngineFailed(rank, reason)
        raise self._failure

    def _check_ends(self, ready: set[ObjectRef]) -> None:
        """Report loops that ended by themselves; dead processes are detected by the supervisor."""
        for rank, worker in list(self._running.items()):
            if worker.ended not in ready:
                continue
            del self._running[rank]
            try:
                ended: Any = worker.ended
                failure: Any = ray.get(ended)
            except RayError:
                continue
            reason = "it ended without being stopped" if failure is None else failure.message
            self.unreachable.append((worker.name, f"its loop failed: {reason}"))


def _tightest(reports: Iterable[StartReport]) -> RequestLimits:
    limits = [report.limits for report in reports if report.limits is not None]
    return RequestLimits(
        vocab_size=min(x.vocab_size for x in limits),
        max_model_len=min(x.max_model_len for x in limits),
    )
