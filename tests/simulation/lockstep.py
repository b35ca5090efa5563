"""The ranks of a replica in one epoch: they join, step together, and leave together when one of them is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.parallel.collectives import CollectiveError
from shoal.parallel.spans import SpanName, Spans
from shoal.runtime.engine.step import StepResult
from shoal.runtime.scheduling.batch import EMPTY_BATCH, Batch

from .model import TakePromptLogits
from .virtual import World

if TYPE_CHECKING:
    from .faults import Strike
    from .process import Process

IDLE_S = 0.01
MAX_IDLE_S = 0.64

BEFORE, DURING, AFTER = range(3)
"""The exchanges of a step: that of what each rank has to do, and those of the model."""
POINTS = {
    "worker.take_in": BEFORE,
    "engine.schedule": BEFORE,
    "kv.fetch": BEFORE,
    "kv.write": DURING,
    "engine.run": DURING,
    "engine.sample": AFTER,
    "kv.publish": AFTER,
    "engine.update": AFTER,
    "worker.hand_out": AFTER,
}


class Killed(Exception):  # noqa: N818  (what happens to a process)
    """A process ends here."""


class Epoch:
    """A replica's ranks, from the first that joins until all have left."""

    def __init__(self, world: World, number: int, size: int) -> None:
        self.world, self.number, self.size = world, number, size
        self.members: dict[int, Process] = {}
        self.is_formed = self.is_broken = False
        self._steps = False
        """A step is planned, or in progress."""
        self._idle_s = IDLE_S
        self._idle_until: float | None = None

    def join(self, rank: int, process: Process) -> None:
        self.members[rank] = process
        process.epoch = self
        if len(self.members) == self.size and not self.is_broken:
            self.world.at(self.world.latency(0.02) if self.size > 1 else 0.0, self._form)

    def _form(self) -> None:
        """With one that is gone or frozen, the others wait: for it, or until they are told to leave."""
        if self.is_broken or self.is_formed or len(self.members) < self.size:
            return
        if not all(p.can_work and p.epoch is self for p in self.members.values()):
            return
        self.is_formed = True
        for process in self.members.values():
            process.on_joined(self.number)
        self._plan(self.world.latency(0.002))

    def kick(self) -> None:
        """There is something to do."""
        self._form()
        self._idle_s, self._idle_until = IDLE_S, None
        self._plan(self.world.latency(0.002))

    def break_up(self) -> None:
        """Somebody is gone: the others notice in their next exchange."""
        if not self.is_broken:
            self.is_broken = True
            if not self._steps:
                self._scatter()

    def _scatter(self) -> None:
        for process in self.members.values():
            if process.alive:
                self.world.at(self.world.latency(), process.break_off, self)

    def _plan(self, delay: float) -> None:
        if self.is_formed and not self.is_broken and not self._steps:
            self._steps = True
            self.world.at(delay, self._step)

    def _step(self) -> None:
        self._steps = False
        if self.is_broken:
            self._scatter()
        if self.is_broken or not all(p.can_work for p in self.members.values()):
            return
        strike = self.members[0].cluster.next_strike(self)
        lockstep = Lockstep(self, strike)
        for process in self.leaders:
            process.take_in()
        results = lockstep.run()
        self._steps = True
        self.world.at(self.world.latency(0.02), self._end_step, results, strike)

    def _end_step(self, results: dict[int, StepResult], strike: Strike | None) -> None:
        if strike is not None and strike.point != "worker.hand_out":
            strike.fault.strike(self.members[strike.rank])
        for rank, result in results.items():
            self.members[rank].hand_out(result)
        if strike is not None and strike.point == "worker.hand_out":
            strike.fault.strike(self.members[strike.rank])
        self._steps = False
        if self.is_broken:
            self._scatter()
        elif any(not r.idle for r in results.values()) or any(p.commands for p in self.leaders):
            self._idle_s = IDLE_S
            self._plan(0.0)
        elif any(p.waits for p in self.leaders):
            self._idle_s = min(2 * self._idle_s, MAX_IDLE_S)
            self._idle_until = self.world.now + self._idle_s
            self.world.at(self._idle_s, self._wake, self._idle_until)

    def _wake(self, idle_until: float) -> None:
        if self._idle_until == idle_until:
            self._plan(0.0)

    @property
    def leaders(self) -> list[Process]:
        return [process for _, process in sorted(self.members.items()) if process.is_leader]


class Lockstep:
    """One step of all ranks. A leader's step begins while the one before it is in the first exchange."""

    def __init__(self, epoch: Epoch, strike: Strike | None) -> None:
        self._epoch, self._strike = epoch, strike
        self._rows: dict[int, list[int]] = {}
        self._ops: set[str] = set()
        self._to_start = list(reversed(epoch.leaders))
        self._results: dict[int, StepResult] = {}
        self._fails_in: dict[int, int] = {}
        """Ranks whose peers do not answer, and in which exchange that is."""
        rng = epoch.world.rng
        if strike is not None and strike.kills and POINTS[strike.point] != AFTER:
            for process in epoch.leaders:
                if process.rank != strike.rank:
                    early = POINTS[strike.point] == BEFORE or rng.random() < 0.2
                    self._fails_in[process.rank] = BEFORE if early else DURING

    @classmethod
    def in_vain(cls, epoch: Epoch, process: Process) -> Lockstep:
        """A step of one rank whose peers are gone."""
        lockstep = cls(epoch, None)
        lockstep._to_start = [process]
        lockstep._fails_in = {process.rank: epoch.world.rng.choice((BEFORE, DURING))}
        return lockstep

    def run(self) -> dict[int, StepResult]:
        """The results of the leaders that did not fail."""
        while self._to_start:
            self._start_next()
        return self._results

    def _start_next(self) -> None:
        process = self._to_start.pop()
        assert process.groups is not None
        process.groups.lockstep = self
        try:
            self._results[process.rank] = process.leading.step()
        except CollectiveError:
            process.has_failed = True
        except Killed:
            pass
        process.groups.lockstep = None

    def gather(self, rank: int, row: list[int], op: str) -> list[list[int]]:
        self._rows[rank] = row
        self._ops.add(op)
        while self._to_start:
            self._start_next()
        if self._fails_in.get(rank) == BEFORE:
            raise CollectiveError("a peer is gone")
        assert len(self._ops) == 1, f"the ranks are in different exchanges: {self._ops}"
        return [self._rows.get(r, [0] * len(row)) for r in range(self._epoch.size)]

    def begin_run(self, rank: int) -> bool:
        """Whether the model will compute: not where a peer is gone."""
        return self._fails_in.get(rank) != DURING

    def reach(self, rank: int, point: str) -> None:
        strike = self._strike
        if strike is not None and strike.kills and (strike.rank, strike.point) == (rank, point):
            raise Killed


class Groups:
    """As much of `ParallelGroups` as an engine uses; it is its own `world`, and listens to its own spans."""

    def __init__(self, process: Process) -> None:
        place = process.place
        assert place is not None
        self.config = place.parallel
        self.rank, self.size = place.rank, place.parallel.world_size
        self.leader_rank = self.config.tp_group(self.rank)[0]
        self.is_leader = self.leader_rank == self.rank
        self.world = self
        self.spans = Spans()
        self.spans.add(self)
        self.tp = TensorGroup(self)
        self.epoch = 0
        self.process = process
        self.lockstep: Lockstep | None = None

    def set_step(self, step: int) -> None:
        pass

    def enter(self, name: SpanName) -> None:
        if self.lockstep is not None:
            self.lockstep.reach(self.rank, name)

    def leave(self, name: SpanName) -> None:
        pass

    def all_gather_ints(self, row: list[int], *, layer: int, op: str) -> list[list[int]]:
        assert self.lockstep is not None
        return self.lockstep.gather(self.rank, row, op)


class TensorGroup:
    """The ranks that follow a leader: they hear of its batch, and hold the same entries."""

    def __init__(self, groups: Groups) -> None:
        self.size = groups.config.tensor_parallel_size
        self._batch = EMPTY_BATCH
        self._payloads: list[bytes] = []

    def take(self) -> tuple[Batch, list[bytes]]:
        """What was told in this step: nothing where the leader has nothing to do."""
        heard = self._batch, self._payloads
        self._batch, self._payloads = EMPTY_BATCH, []
        return heard

    def broadcast_bytes(self, data: bytes, _num_bytes: int, _root: int, *, layer: int, op: str) -> bytes:
        if op == "engine.batch":
            self._batch = Batch.unpack(data)
        else:
            self._payloads.append(data)
        return data


class LeadingRunner:
    """Runs a leader's batches, on its own cache and on those of its followers."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.cache = process.runner.cache

    def run(self, batch: Batch, num_slices: int, take: TakePromptLogits | None) -> Any:
        leader, groups = self.process, self.process.groups
        assert groups is not None
        assert groups.lockstep is not None
        assert leader.epoch is not None
        computes = groups.lockstep.begin_run(groups.rank)
        heard, payloads = groups.tp.take()
        for rank in groups.config.tp_group(groups.rank)[1:]:
            if (follower := leader.epoch.members[rank]).alive:
                follower.follow(heard, payloads, computes=computes)
        if not computes:
            leader.runner.spoil(batch, leader.world.rng)
            raise CollectiveError("a peer is gone")
        return leader.runner.run(batch, num_slices, take)
