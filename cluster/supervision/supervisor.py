"""Supervisor of all replicas: detects lost workers and assigns their ranks to waiting processes.

Spares and restarts are one mechanism. A lost worker leaves its slot (reserved resources), in which a new process starts
and then waits for a rank. A spare is a process that is waiting already, and gets the rank at once. Detection and the
forming of new groups are Shoal's; Ray only starts processes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import msgspec

from shoal.runtime.engine.stats import EngineStats

from ..workers.actors import LaunchConfig, WorkerProcess, WorkerSlot, end_worker, failed_starts, start_worker
from ..workers.assignment import Assignment
from ..workers.liveness import Liveness, Process
from ..workers.wire import (
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
    LogMessage,
    WorkerReport,
)
from .fault import Fault
from .membership import Action, Formed, Join, Leave, Load, Membership, Need

LEFT_GRACE_S = 0.5
"""Delay between a rank leaving and the order to join again, in which the loss of a peer may still be detected."""
START_CHECK_S = 0.5
"""Interval of checks on processes that have not connected yet."""
MAX_FAILED_STARTS = 6
"""Failed starts in a row after which a slot is abandoned; the pause doubles with each."""
FORM_TIMEOUT_S = 20.0
"""Time limit of joining; a worker that exceeds it counts as lost."""
STALL_GRACE_S = 10.0
"""A step that takes longer than a collective's timeout and this is stuck: ranks that wait for it have left by then."""


@dataclass(frozen=True, slots=True)
class RankLost:
    """A rank has lost its worker, with the commands sent to it."""

    replica: int
    rank: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class RankFilled:
    """A rank has a new worker, which queues commands until its group is formed."""

    replica: int
    rank: int
    worker: WorkerProcess


@dataclass(frozen=True, slots=True)
class GaveUp:
    """A rank cannot be filled."""

    replica: int
    rank: int
    reason: str


SupervisorEvent = RankLost | RankFilled | GaveUp


@dataclass(slots=True)
class ReplicaPlan:
    """Initial state of a replica to watch."""

    workers: list[WorkerProcess]
    """Workers by rank."""
    assignments: list[Assignment]
    """Assignments by rank, complete after the first epoch."""


@dataclass(slots=True)
class _Replica:
    members: Membership
    assignments: list[Assignment]
    lost_totals: dict[int, EngineStats] = field(default_factory=dict)
    """Counters of the lost workers, by rank."""
    forming_since: float | None = None
    loading_since: dict[str, float] = field(default_factory=dict)
    """Start time by worker that loads weights."""
    left_at: float | None = None
    left_epoch: int = -1


@dataclass(slots=True)
class _Vacancy:
    """A rank that needs a worker."""

    replica: int
    rank: int
    since: float


@dataclass(slots=True)
class _WorkerStatus:
    """State of a connected worker, from its messages."""

    process: Process
    num_steps: int = -1
    stepped_at: float = 0.0
    stats: EngineStats = field(default_factory=EngineStats)
    """Counters of its engine, at the last heartbeat."""
    fault: tuple[str, float] | None = None
    """Failpoint that the worker announced before it strikes, and the time."""


class Supervisor:
    """Watches workers on its own thread; the thread that uses the replicas reads `events`."""

    def __init__(
        self,
        host: str,
        *,
        heartbeat_timeout_s: float,
        step_timeout_s: float,
        replace_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A worker counts as lost when its process exits, it misses heartbeats for `heartbeat_timeout_s`, or a step
        takes longer than `step_timeout_s` and STALL_GRACE_S. A rank is given up when no worker fills it within
        `replace_timeout_s`."""
        self.events: queue.SimpleQueue[SupervisorEvent] = queue.SimpleQueue()
        self.faults: list[Fault] = []
        self._liveness = Liveness(host, timeout_s=heartbeat_timeout_s)
        self._step_timeout_s = step_timeout_s
        self._replace_timeout_s = replace_timeout_s
        self._clock = clock
        self._replicas: list[_Replica] = []
        self._processes: dict[str, WorkerProcess] = {}
        self._statuses: dict[str, _WorkerStatus] = {}
        """Connected workers by name."""
        self._counting = threading.Lock()
        """Held while counters move from a worker that is lost to its rank."""
        self._num_spares = 0
        """Number of spares started so far, for their labels."""
        self._waiting: list[str] = []
        """Connected workers without a rank, longest waiting first."""
        self._vacancies: list[_Vacancy] = []
        self._starts_checked_at = 0.0
        self._failed_starts: Counter[WorkerSlot] = Counter()
        """Failed starts by slot since a process last connected from it."""
        self._restarts: list[tuple[float, WorkerSlot]] = []
        """Due time and slot of processes to start."""
        self._launch: LaunchConfig | None = None
        self._to_watch: tuple[list[ReplicaPlan], list[WorkerProcess]] | None = None
        """Arguments of `watch` for the watching thread, until it has read them."""
        self._suspects: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._lost_early: dict[str, tuple[str, float]] = {}
        """Workers lost before `watch`: the reason and seconds of silence."""

    def launch(self, launch: LaunchConfig) -> LaunchConfig:
        """The configuration with this supervisor's address and key, for workers that report to it."""
        return replace(launch, supervisor=self._liveness.address, supervisor_key=self._liveness.key)

    def start(self, launch: LaunchConfig) -> None:
        """Listen for workers; none is replaced before `watch`."""
        self._launch = launch
        self._liveness.start(self)

    def watch(self, replicas: Sequence[ReplicaPlan], spares: Sequence[WorkerProcess]) -> None:
        """Keep the ranks of these replicas filled from now on; `spares` are processes without a rank."""
        self._to_watch = (list(replicas), list(spares))

    def close(self) -> None:
        """Stop watching and end all watched and started processes. Closing twice is allowed."""
        self._liveness.close()
        self._start_watching()
        for worker in self._processes.values():
            end_worker(worker, process=self._process(worker.name))
        self._processes = {}

    def worker(self, replica: int, rank: int) -> WorkerProcess | None:
        """Current worker of a rank; None while it is vacant."""
        name = self._replicas[replica].members.workers[rank]
        return None if name is None else self._processes[name]

    def stats(self, replica: int, rank: int) -> EngineStats:
        """Counters of a rank's engine, at most two heartbeats old; they include those of its lost workers."""
        with self._counting:
            if not self._replicas:
                return EngineStats()  # `watch` has been called and is not carried out yet
            name = self._replicas[replica].members.workers[rank]
            status = self._statuses.get(name) if name is not None else None
            lost = self._replicas[replica].lost_totals.get(rank, EngineStats())
            return lost if status is None else lost + status.stats

    def process(self, worker: WorkerProcess) -> Process | None:
        """Node and pid of a worker; None before it has connected."""
        return self._process(worker.name)

    def is_whole(self, num_spares: int) -> bool:
        """Whether all ranks of all replicas have joined their groups and at least `num_spares` processes wait."""
        formed = bool(self._replicas) and all(r.members.formed for r in self._replicas)
        return formed and len(self._waiting) >= num_spares

    def _process(self, name: str) -> Process | None:
        return self._statuses[name].process if name in self._statuses else None

    def check(self) -> None:
        """RuntimeError when the watching thread has failed. Any thread may call."""
        if self._liveness.failure is not None:
            raise RuntimeError("the thread that watches the workers failed") from self._liveness.failure

    def suspect(self, name: str, reason: str) -> None:
        """Report a worker that did not answer a call or whose loop failed; it is replaced. Any thread may call."""
        self._suspects.put((name, reason))

    # -- on the watching thread --------------------------------------------------------------------------------------

    def on_hello(self, name: str) -> None:
        self._statuses[name] = _WorkerStatus(self._liveness.process(name))
        if name in self._processes:
            self._failed_starts.pop(self._processes[name].slot, None)
        if name in self._processes and not any(name in r.members.workers for r in self._replicas):
            self._wait(name)
            self._fill()

    def on_report(self, name: str, report: WorkerReport) -> None:
        status = self._statuses[name]
        if isinstance(report, Heartbeat):
            status.stats = report.stats or status.stats
            if report.num_steps != status.num_steps:
                status.num_steps = report.num_steps
                status.stepped_at = self._clock()
            return
        if isinstance(report, LogMessage):
            logging.getLogger(report.logger).log(report.level, "%s", report.text)
            return
        if isinstance(report, FaultNotice):
            status.fault = (report.point, self._clock())
            self._liveness.send(name, FaultNoted())
            return
        for number, replica in enumerate(self._replicas):
            if name in replica.members.workers:
                if isinstance(report, Joining):
                    replica.members.joining(name, report.epoch)
                elif isinstance(report, Joined):
                    self._act(number, replica.members.join(name, report.epoch))
                elif isinstance(report, Loaded):
                    replica.loading_since.pop(name, None)
                    self._note(number, "loaded_s", replica.members.workers.index(name))
                    self._act(number, replica.members.loaded(name))
                elif isinstance(report, Left) and report.epoch > replica.left_epoch:
                    replica.left_epoch = report.epoch
                    replica.left_at = self._clock()

    def on_lost(self, name: str, how: str, silent_s: float) -> None:
        worker = self._processes.pop(name, None)
        if worker is None:
            self._lost_early[name] = (how, silent_s)
            return
        status = self._take_status(name)
        fault = self._fault(worker, status, how, silent_s)
        self.faults.append(fault)
        if name in self._waiting:
            self._waiting.remove(name)
        for number, replica in enumerate(self._replicas):
            if name in replica.members.workers:
                replica.loading_since.pop(name, None)
                fault.replica = number
                fault.rank = replica.members.workers.index(name)
                self.events.put(RankLost(number, fault.rank, fault))
                self._act(number, replica.members.lose(name))
        # Last, because calls of Ray are slow and the other ranks must leave their collectives first.
        end_worker(worker, process=None if status is None else status.process)
        if not (num_failed := self._failed_starts[worker.slot]):
            self._start_in(worker.slot)
        elif num_failed < MAX_FAILED_STARTS:
            self._restarts.append((self._clock() + START_CHECK_S * 2**num_failed, worker.slot))

    def _take_status(self, name: str) -> _WorkerStatus | None:
        """Remove the state of a lost worker; what it counted stays with its rank."""
        with self._counting:
            status = self._statuses.pop(name, None)
            if status is None:
                return None
            for replica in self._replicas:
                if name in replica.members.workers:
                    rank = replica.members.workers.index(name)
                    totals = replica.lost_totals.get(rank, EngineStats())
                    replica.lost_totals[rank] = totals + status.stats.totals
            return status

    def _fault(self, worker: WorkerProcess, status: _WorkerStatus | None, how: str, silent_s: float) -> Fault:
        now = self._clock()
        fault = Fault(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            worker=worker.label,
            node_id=worker.slot.node_id if status is None else status.process.node_id,
            replica=None,
            rank=None,
            reason=how,
            noticed_at=now,
            silent_s=silent_s,
        )
        if status is not None and status.fault is not None:
            fault.point, struck_at = status.fault
            fault.detection_s = now - struck_at
        return fault

    def on_tick(self) -> None:
        self._start_watching()
        while not self._suspects.empty():
            name, reason = self._suspects.get()
            if name in self._statuses:
                self._give_up_on(name, reason)
        now = self._clock()
        for number, replica in enumerate(self._replicas):
            if replica.left_at is not None and now - replica.left_at >= LEFT_GRACE_S:
                replica.left_at = None
                self._act(number, replica.members.reform(replica.left_epoch))
            if replica.forming_since is not None and now - replica.forming_since >= FORM_TIMEOUT_S:
                for name in replica.members.missing:
                    self._give_up_on(name, f"did not join its group in {FORM_TIMEOUT_S:g} s")
            for name in [n for n, t in replica.loading_since.items() if now - t >= self._replace_timeout_s]:
                self._give_up_on(name, f"did not load its weights in {self._replace_timeout_s:g} s")
        if now - self._starts_checked_at >= START_CHECK_S:
            self._starts_checked_at = now
            self._check_starts()
        limit = self._step_timeout_s + STALL_GRACE_S
        for name in [n for n, h in self._statuses.items() if h.num_steps >= 0 and now - h.stepped_at >= limit]:
            self._give_up_on(name, f"no step ended in {limit:g} s: stuck")
        for vacancy in [w for w in self._vacancies if now - w.since >= self._replace_timeout_s]:
            self._vacancies.remove(vacancy)
            reason = f"no replacement worker became available within {self._replace_timeout_s:g} s"
            self.events.put(GaveUp(vacancy.replica, vacancy.rank, reason))

    def _check_starts(self) -> None:
        """Detect processes that ended before they connected, and start those that are due."""
        silent = [worker for name, worker in self._processes.items() if name not in self._statuses]
        for worker, reason in failed_starts(silent):
            self._failed_starts[worker.slot] += 1
            self.on_lost(worker.name, reason, 0.0)
        now = self._clock()
        for due, slot in [entry for entry in self._restarts if entry[0] <= now]:
            self._restarts.remove((due, slot))
            self._start_in(slot)

    def _give_up_on(self, name: str, reason: str) -> None:
        """Treat a connected worker as lost; the end of its connection is not reported again."""
        self._liveness.drop(name)
        self.on_lost(name, reason, 0.0)

    def _start_watching(self) -> None:
        if self._to_watch is None:
            return
        replicas, spares = self._to_watch
        self._to_watch = None
        processes = [worker for replica in replicas for worker in replica.workers]
        self._processes |= {worker.name: worker for worker in [*processes, *spares]}
        self._num_spares += len(spares)
        self._replicas = [
            _Replica(Membership([w.name for w in plan.workers]), list(plan.assignments)) for plan in replicas
        ]
        for worker in spares:
            if worker.name in self._statuses:
                self._wait(worker.name)
        for name in [n for n in self._lost_early if n in self._processes]:
            self.on_lost(name, *self._lost_early.pop(name))

    def _wait(self, name: str) -> None:
        """Let a process without a rank run and wait for one."""
        self._processes[name] = self._processes[name].run()
        self._waiting.append(name)

    def _act(self, number: int, actions: Sequence[Action]) -> None:
        replica = self._replicas[number]
        for action in actions:
            if isinstance(action, Leave):
                self._liveness.send(action.worker, LeaveEpoch(action.epoch))
            elif isinstance(action, Need):
                self._vacancies.append(_Vacancy(number, action.rank, self._clock()))
                replica.forming_since = None
            elif isinstance(action, Load):
                replica.loading_since[action.worker] = self._clock()
                self._liveness.send(action.worker, LoadRank(replica.assignments[action.rank]))
            elif isinstance(action, Join):
                replica.forming_since = self._clock()
                replica.left_at = None
                first = replica.assignments[action.rank]
                assignment = msgspec.structs.replace(first, epoch=action.epoch, replaced=action.replaced)
                self._liveness.send(action.worker, JoinEpoch(assignment))
            elif isinstance(action, Formed):
                replica.forming_since = None
                self._note(number, "formed_s")
        self._fill()

    def _fill(self) -> None:
        """Assign vacant ranks to waiting workers."""
        while self._vacancies and self._waiting:
            vacancy = self._vacancies.pop(0)
            name = self._waiting.pop(0)
            self.events.put(RankFilled(vacancy.replica, vacancy.rank, self._processes[name]))
            self._note(vacancy.replica, "filled_s", vacancy.rank)
            self._act(vacancy.replica, self._replicas[vacancy.replica].members.fill(vacancy.rank, name))

    def _start_in(self, slot: WorkerSlot) -> None:
        assert self._launch is not None
        worker = start_worker(self._launch, slot, None, label=f"spare:{self._num_spares}")
        self._num_spares += 1
        self._processes[worker.name] = worker

    def _note(self, number: int, what: str, rank: int | None = None) -> None:
        """Record the time of a recovery step, `what`, in the faults of a replica or of one of its ranks."""
        for fault in self.faults:
            if fault.replica == number and rank in (None, fault.rank) and getattr(fault, what) is None:
                setattr(fault, what, self._clock() - fault.noticed_at)

    def note_first_token(self, fault: Fault) -> None:
        """Record the first new token of an interrupted request. Call on the thread that uses the replicas."""
        fault.first_token_s = self._clock() - fault.noticed_at
