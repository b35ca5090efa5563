"""Keeps every rank of every replica filled: finds out who is lost, and gives the rank to a process that waits.

Spares and restarts are one mechanism. A worker that is lost leaves its seat (reserved resources), in which a new
process starts at once and then waits for a rank; with spares, others were waiting before, and take the rank at once.
Detection and the new group are ours; Ray only starts processes.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .actors import Launch, Seat, WorkerProcess, end_worker, start_worker
from .assignment import Assignment
from .liveness import Liveness, Message
from .membership import Action, Formed, Join, Leave, Membership, Need

LEFT_GRACE_S = 0.5
"""How long ranks that left may have a dead peer whose end is not known yet, before all are told to join again."""
FORM_TIMEOUT_S = 20.0
"""A worker that has not joined after this long is treated as lost."""


@dataclass(frozen=True, slots=True)
class RankLost:
    """A rank has no worker; what it was told is forgotten."""

    replica: int
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class RankFilled:
    """A rank has another worker, which takes commands and acts on them when its group is formed."""

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
class Fault:
    """One loss and how it was mended; times are seconds after it was noticed."""

    replica: int
    rank: int
    worker: str
    reason: str
    noticed_at: float
    """By the clock of the supervisor."""
    filled_s: float | None = None
    formed_s: float | None = None
    """Until all ranks of the replica were in one group again."""
    first_output_s: float | None = None
    """Until the replica told something new of a request."""


@dataclass(slots=True)
class ReplicaPlan:
    """One replica, as the supervisor takes it over."""

    workers: list[WorkerProcess]
    """By rank."""
    assignments: list[Assignment]
    """By rank, with what the first epoch found out."""


@dataclass(slots=True)
class _Replica:
    members: Membership
    assignments: list[Assignment]
    forming_since: float | None = None
    left_at: float | None = None
    left_epoch: int = -1


@dataclass(slots=True)
class _Wanted:
    replica: int
    rank: int
    since: float


class Supervisor:
    """Watches workers on a thread of its own; `events` is read by the thread that uses the replicas."""

    def __init__(
        self,
        host: str,
        *,
        heartbeat_timeout_s: float,
        replace_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.events: queue.SimpleQueue[SupervisorEvent] = queue.SimpleQueue()
        self.faults: list[Fault] = []
        self._liveness = Liveness(host, timeout_s=heartbeat_timeout_s)
        self._replace_timeout_s, self._clock = replace_timeout_s, clock
        self._replicas: list[_Replica] = []
        self._processes: dict[str, WorkerProcess] = {}
        self._pids: dict[str, int] = {}
        self._waiting: list[str] = []
        """Connected workers without a rank, the longest waiting first."""
        self._wanted: list[_Wanted] = []
        self._launch: Launch | None = None
        self._taken_over: tuple[list[ReplicaPlan], list[WorkerProcess]] | None = None
        """Until the thread that watches finds it."""
        self._lost_early: dict[str, str] = {}
        """Before it was taken over."""

    def launch(self, launch: Launch) -> Launch:
        """The same, for workers that report here."""
        return replace(launch, supervisor=self._liveness.address, supervisor_key=self._liveness.key)

    def start(self, launch: Launch) -> None:
        """Listen; nothing is replaced before `take_over`."""
        self._launch = launch
        self._liveness.start(self)

    def take_over(self, replicas: Sequence[ReplicaPlan], spares: Sequence[WorkerProcess]) -> None:
        """From now on, keep these replicas filled; `spares` have no rank."""
        self._taken_over = (list(replicas), list(spares))

    def close(self) -> None:
        """Stop watching, and end every process that was taken over or started. Closing twice is allowed."""
        self._liveness.close()
        self._adopt()
        for worker in self._processes.values():
            end_worker(worker, pid=self._pids.get(worker.name))
        self._processes = {}

    # -- on the thread that watches ----------------------------------------------------------------------------------

    def on_hello(self, name: str) -> None:
        self._pids[name] = self._liveness.pid(name)
        if name in self._processes and not any(name in r.members.workers for r in self._replicas):
            self._wait(name)
            self._fill()

    def on_message(self, name: str, message: Message) -> None:
        kind, *values = message
        for number, replica in enumerate(self._replicas):
            if name in replica.members.workers:
                if kind == "joined":
                    self._act(number, replica.members.join(name, values[0]))
                elif kind == "left" and values[0] > replica.left_epoch:
                    replica.left_epoch, replica.left_at = values[0], self._clock()

    def on_lost(self, name: str, how: str) -> None:
        worker = self._processes.pop(name, None)
        if worker is None:
            self._lost_early[name] = how
            return
        end_worker(worker, pid=self._pids.pop(name, None))
        if name in self._waiting:
            self._waiting.remove(name)
        for number, replica in enumerate(self._replicas):
            if name in replica.members.workers:
                rank = replica.members.workers.index(name)
                self.faults.append(Fault(number, rank, name, how, self._clock()))
                self.events.put(RankLost(number, rank, how))
                self._act(number, replica.members.lose(name))
        self._start_in(worker.seat)

    def on_tick(self) -> None:
        self._adopt()
        now = self._clock()
        for number, replica in enumerate(self._replicas):
            if replica.left_at is not None and now - replica.left_at >= LEFT_GRACE_S:
                replica.left_at = None
                self._act(number, replica.members.reform(replica.left_epoch))
            if replica.forming_since is not None and now - replica.forming_since >= FORM_TIMEOUT_S:
                for name in replica.members.missing:
                    self.on_lost(name, f"did not join its group in {FORM_TIMEOUT_S:g} s")
        for wanted in [w for w in self._wanted if now - w.since >= self._replace_timeout_s]:
            self._wanted.remove(wanted)
            reason = f"no process took its place in {self._replace_timeout_s:g} s"
            self.events.put(GaveUp(wanted.replica, wanted.rank, reason))

    def _adopt(self) -> None:
        if self._taken_over is None:
            return
        replicas, spares = self._taken_over
        self._taken_over = None
        processes = [worker for replica in replicas for worker in replica.workers]
        self._processes |= {worker.name: worker for worker in [*processes, *spares]}
        self._replicas = [
            _Replica(Membership([w.name for w in plan.workers]), list(plan.assignments)) for plan in replicas
        ]
        for worker in spares:
            if worker.name in self._pids:
                self._wait(worker.name)
        for name in [n for n in self._lost_early if n in self._processes]:
            self.on_lost(name, self._lost_early.pop(name))

    def _wait(self, name: str) -> None:
        """A process is up and has no rank."""
        self._processes[name] = self._processes[name].run()
        self._waiting.append(name)

    def _act(self, number: int, actions: Sequence[Action]) -> None:
        replica = self._replicas[number]
        for action in actions:
            if isinstance(action, Leave):
                self._liveness.send(action.worker, ["leave", action.epoch])
            elif isinstance(action, Need):
                self._wanted.append(_Wanted(number, action.rank, self._clock()))
                replica.forming_since = None
            elif isinstance(action, Join):
                replica.forming_since, replica.left_at = self._clock(), None
                first = replica.assignments[action.rank]
                assignment = replace(first, epoch=action.epoch, replaced=action.replaced)
                self._liveness.send(action.worker, ["join", *assignment.to_values()])
            elif isinstance(action, Formed):
                replica.forming_since = None
                self._note(number, "formed_s")
        self._fill()

    def _fill(self) -> None:
        """Give ranks that have no worker to workers that have no rank."""
        while self._wanted and self._waiting:
            wanted, name = self._wanted.pop(0), self._waiting.pop(0)
            self.events.put(RankFilled(wanted.replica, wanted.rank, self._processes[name]))
            for fault in self.faults:
                if (fault.replica, fault.rank, fault.filled_s) == (wanted.replica, wanted.rank, None):
                    fault.filled_s = self._clock() - fault.noticed_at
            self._act(wanted.replica, self._replicas[wanted.replica].members.fill(wanted.rank, name))

    def _start_in(self, seat: Seat) -> None:
        assert self._launch is not None
        worker = start_worker(self._launch, seat, None)
        self._processes[worker.name] = worker

    def _note(self, number: int, what: str) -> None:
        for fault in self.faults:
            if fault.replica == number and getattr(fault, what) is None:
                setattr(fault, what, self._clock() - fault.noticed_at)

    def note_output(self, replica: int) -> None:
        """A replica told something new of a request. On the thread that uses the replicas."""
        for fault in self.faults:
            if fault.replica == replica and fault.first_output_s is None and fault.formed_s is not None:
                fault.first_output_s = self._clock() - fault.noticed_at
