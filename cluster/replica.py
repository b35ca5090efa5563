"""One copy of the model on a cluster, seen from the driver: its workers, their requests and their end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import ray
from ray.exceptions import RayError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.runtime.validation import RequestLimits

from .actors import INBOX_THREAD, ActorHandle, Launch, ObjectRef, Seat, WorkerProcess, end_worker, start_worker
from .assignment import Assignment
from .replica_spec import ReplicaSpec
from .wire import Command, Event, pack_command, unpack_event
from .worker import StartReport, WorkerFailure

POLL_WAIT_S = 1.0
"""How long a worker holds a poll that has nothing to say."""
STOP_TIMEOUT_S = 5.0
BLAME_WAIT_S = 0.5
"""How long a failure waits for those of other ranks, so that the cause is named and not the rank that missed it."""


class EngineFailed(RuntimeError):  # noqa: N818
    """A replica cannot go on: which rank is the cause, and why. What was in flight can be submitted elsewhere."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Phase:
    """A finished part of the start-up."""

    name: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.seconds:.1f} s" + (f" ({self.detail})" if self.detail else "")


OnPhase = Callable[[Phase], None]


@dataclass(slots=True)
class _Leader:
    """A worker that takes requests: tp rank 0 of an attention group."""

    rank: int
    worker: ActorHandle | None
    """None: lost, and not replaced yet."""
    poll: ObjectRef | None = None
    num_steps: int = -1
    progress_at: float = 0.0


def listen(host: str) -> TCPStore:
    """The rendezvous of a replica's ranks, on a free port of one address (by itself, a store takes all of them)."""
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
    """Workers of one copy. Built at once, in use after `wait_ready`; one thread at a time may use it.

    Where workers report to a supervisor, one that dies is `lose`d and its rank `fill`ed; else it ends the replica.
    """

    def __init__(self, spec: ReplicaSpec, launch: Launch, seats: Sequence[Seat], *, host: str) -> None:
        """Starts a worker in each seat and lets them build their engines; `host` is this node's own address."""
        self._supervised = launch.supervisor is not None
        self._stall_s = POLL_WAIT_S + launch.args.collective_timeout_s
        self._store = listen(host)
        self._failure: EngineFailed | None = None
        self._limits: RequestLimits | None = None
        self._num_kv_tokens: dict[int, int] = {}
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
        """By rank; once it is ready, with what the ranks found out."""
        self.workers = [start_worker(launch, s, a) for s, a in zip(seats, self.assignments, strict=True)]
        """By rank, the first ones."""
        tp = spec.tensor_parallel_size
        self._leaders = [_Leader(rank, self.workers[rank].actor) for rank in range(0, len(self.workers), tp)]
        self._starts: dict[ObjectRef, int] = {w.started: rank for rank, w in enumerate(self.workers)}
        self._runs: dict[ObjectRef, int] = {}

    def wait_ready(self, timeout_s: float) -> list[StartReport]:
        """Per rank, once all can serve. EngineFailed, or ValueError for what a user can mend, when one cannot."""
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
        self._runs = {w.ended: rank for rank, w in enumerate(self.workers)}
        self.assignments = [
            replace(
                assignment,
                ranks_on_node=reports[rank].ranks_on_node,
                num_kv_blocks=reports[rank].num_kv_blocks,
                max_model_len=self._limits.max_model_len,
            )
            for rank, assignment in enumerate(self.assignments)
        ]
        return [reports[rank] for rank in range(len(reports))]

    @property
    def limits(self) -> RequestLimits:
        """What every attention group can take."""
        assert self._limits is not None, "limits are known after wait_ready"
        return self._limits

    def num_kv_tokens(self, rank: int) -> int:
        """Tokens that the cache of a rank holds."""
        return self._num_kv_tokens[rank]

    @property
    def leaders(self) -> list[int]:
        """The ranks that take requests."""
        return [leader.rank for leader in self._leaders]

    def tell(self, rank: int, commands: Sequence[Command]) -> None:
        """Commands for a leader, which acts on them in this order."""
        self._check_alive()
        leader = next(leader for leader in self._leaders if leader.rank == rank)
        assert leader.worker is not None, f"rank {rank} is lost and was told something"
        leader.worker.tell.options(concurrency_group=INBOX_THREAD).remote([pack_command(c) for c in commands])

    def refs(self) -> list[ObjectRef]:
        """What to wait for: news of the leaders, and the end of any rank's loop."""
        self._check_alive()
        for leader in self._leaders:
            if leader.poll is None and leader.worker is not None:
                leader.progress_at = time.monotonic()
                leader.poll = leader.worker.poll.remote(POLL_WAIT_S)
        return [leader.poll for leader in self._leaders if leader.poll is not None] + list(self._runs)

    def lose(self, rank: int) -> bool:
        """The worker of a rank is dead; whether it was a leader, whose requests are lost with it."""
        self._runs = {ref: r for ref, r in self._runs.items() if r != rank}
        for leader in self._leaders:
            if leader.rank == rank:
                leader.worker = leader.poll = None
                return True
        return False

    def fill(self, rank: int, worker: WorkerProcess) -> bool:
        """A lost rank has another worker; whether it is a leader, which takes requests."""
        self._runs[worker.ended] = rank
        for leader in self._leaders:
            if leader.rank == rank:
                leader.worker, leader.num_steps = worker.actor, -1
                return True
        return False

    def collect(self, ready: set[ObjectRef]) -> list[tuple[int, Event]]:
        """What the leaders told in the polls that are `ready`, each with the leader's rank.

        EngineFailed when a worker died or failed, or finished no step for `collective_timeout_s`; only when the leaders
        told nothing, so that nothing gets lost.
        """
        events: list[tuple[int, Event]] = []
        died: dict[int, str] = {}
        for leader in self._leaders:
            if leader.poll is not None and leader.poll in ready:
                poll, leader.poll = leader.poll, None
                try:
                    num_steps, messages = ray.get(poll)
                except RayError as error:
                    leader.worker = None
                    died[leader.rank] = str(error)
                    continue
                if num_steps != leader.num_steps:
                    leader.num_steps, leader.progress_at = num_steps, time.monotonic()
                events += [(leader.rank, unpack_event(message)) for message in messages]
        if events:
            return events
        if self._supervised:
            self._check_ends(ready)
        elif died or any(ref in ready for ref in self._runs):
            self._fail_with_cause(died)
        for leader in self._leaders:
            if leader.poll is not None and time.monotonic() - leader.progress_at > self._stall_s:
                self._fail(leader.rank, f"no step ended in {self._stall_s:g} s (collective_timeout_s): frozen or stuck")
        return []

    def stop(self) -> None:
        """Let the loops end in the same step, and wait for that a little."""
        if self._failure is None and self._runs:
            for leader in self._leaders:
                if leader.worker is not None:
                    leader.worker.stop.remote()
            ray.wait(list(self._runs), num_returns=len(self._runs), timeout=STOP_TIMEOUT_S)
            self._runs = {}

    def close(self) -> None:
        """Stop, then end the first processes. Closing twice is allowed."""
        self.stop()
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
        """A loop that ended by itself ends the replica; of a process that died the supervisor knows."""
        for ref in [ref for ref in self._runs if ref in ready]:
            try:
                failure = ray.get(ref)
            except RayError:
                del self._runs[ref]
                continue
            self._fail_with_cause({}) if failure is not None else self._runs.pop(ref)

    def _fail_with_cause(self, died: dict[int, str]) -> None:
        ended, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=BLAME_WAIT_S)
        failures: list[WorkerFailure] = []
        for ref in ended:
            rank = self._runs[ref]
            try:
                failure = ray.get(ref)
            except RayError as error:
                died[rank] = str(error)
            else:
                failures.append(failure or WorkerFailure(rank, "error", "its loop ended although nobody asked", ""))
        self._fail(*cause_of_end(died, failures))


def cause_of_end(died: Mapping[int, str], failures: Sequence[WorkerFailure]) -> tuple[int, str]:
    """Rank and reason to blame: one rank's end makes others fail in collectives, so a death counts before an error,
    and an error before a collective; among equals the lowest rank.
    """
    if died:
        rank = min(died)
        return rank, f"its process died: {died[rank]}"
    cause = min(failures, key=lambda f: (f.kind == "collective", f.rank))
    return cause.rank, f"{cause.message}\n{cause.traceback}".rstrip()


def _tightest(reports: Iterable[StartReport]) -> RequestLimits:
    limits = [report.limits for report in reports if report.limits is not None]
    return RequestLimits(
        vocab_size=min(x.vocab_size for x in limits),
        max_model_len=min(x.max_model_len for x in limits),
    )
