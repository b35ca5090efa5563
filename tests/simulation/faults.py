"""What goes wrong in one life of a driver."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from .lockstep import POINTS, Epoch

if TYPE_CHECKING:
    from .cluster import Cluster
    from .process import Process


Kind = Literal["kill", "freeze", "cut", "preempt"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a process."""

    kind: Kind
    """cut: its peers do not hear it any more, although it is there; preempt: a sequence of its engine."""
    seconds: float
    """Seconds for which a process is frozen."""

    def strike(self, process: Process) -> None:
        if self.kind == "kill":
            process.die()
        elif self.kind == "freeze":
            process.freeze(self.seconds)
        elif self.kind == "preempt":
            process.preempt()
        elif process.epoch is not None and process.epoch.size > 1:
            process.epoch.break_up()


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault of a rank that is to come at a point of a step."""

    rank: int
    point: str
    fault: Fault

    @property
    def kills(self) -> bool:
        return self.fault.kind == "kill"


class Plan:
    """Drawn at the beginning; who is hit is drawn when the time has come."""

    def __init__(self, rng: Random, *, num_faults: int, kill_driver: bool) -> None:
        self.is_empty = num_faults == 0
        self.kills_newcomers = num_faults > 0 and rng.random() < 0.2
        """Also those that are not up yet."""
        self.killed_at_call = -1
        self._strikes: dict[int, tuple[str, Fault]] = {}
        self._hits: list[tuple[float, Fault]] = []
        self._killed_at_s: float | None = None
        self._out_of_reach = 0.3 * rng.random()
        time = 0.0
        for _ in range(num_faults):
            fault = _random_fault(rng)
            if rng.random() < 0.6:
                self._strikes[rng.randint(1, 12)] = rng.choice(list(POINTS)), fault
            else:
                # At once, soon (while the one before is being mended), or later.
                time += rng.choice([0.0, 0.02, 0.3, 1.0]) * rng.random()
                self._hits.append((time, fault))
        if kill_driver and rng.random() < 0.5:
            self.killed_at_call = rng.randint(1, 15)
        elif kill_driver:
            self._killed_at_s = rng.random() ** 2

    def begin(self, cluster: Cluster) -> None:
        for time, fault in self._hits:
            cluster.world.at(time, self._hit, cluster, fault)
        if self._killed_at_s is not None:
            cluster.world.at(self._killed_at_s, cluster.world.kill_driver)

    def strike(self, cluster: Cluster, num_steps: int, epoch: Epoch) -> Strike | None:
        if num_steps not in self._strikes:
            return None
        return Strike(cluster.world.rng.randrange(epoch.size), *self._strikes.pop(num_steps))

    def is_out_of_reach(self, rng: Random) -> bool:
        """Whether a process cannot be ended when it should be."""
        return rng.random() < self._out_of_reach

    def _hit(self, cluster: Cluster, fault: Fault) -> None:
        living = [p for p in cluster.processes.values() if p.can_work and (p.is_connected or self.kills_newcomers)]
        if living:
            fault.strike(cluster.world.rng.choice(living))


def _random_fault(rng: Random) -> Fault:
    kind: Kind = rng.choices(("kill", "freeze", "cut", "preempt"), (6, 2, 1, 2))[0]
    return Fault(kind, rng.choice([0.2, 1.2, 3.0]))
