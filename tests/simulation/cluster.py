"""A cluster in a world: the product's replicas, supervisor and router, over processes that are not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replica_spec import ReplicaSpec
from shoal.cluster.replicas import replica as replica_module
from shoal.cluster.replicas import replica_pool as replica_pool_module
from shoal.cluster.replicas.replica import Replica
from shoal.cluster.replicas.replica_pool import ReplicaPool
from shoal.cluster.routing import prefixes as prefixes_module
from shoal.cluster.supervision import supervisor as supervisor_module
from shoal.cluster.supervision.supervisor import ReplicaPlan, Supervisor
from shoal.cluster.workers import liveness as liveness_module
from shoal.cluster.workers.actors import LaunchConfig, WorkerProcess, WorkerSlot
from shoal.cluster.workers.assignment import Assignment
from shoal.cluster.workers.wire import Event, SupervisorOrder, WorkerReport

from .engine import EngineSettings
from .faults import Plan, Strike
from .lockstep import Epoch
from .model import Row
from .process import Process
from .transport import Weather
from .virtual import Ray, World

LAUNCH = LaunchConfig(EngineArgs(model="none"), "none", 1, 0)
MAX_NUM_SEQS = 4
REPLACE_TIMEOUT_S = 30.0
TICK_S = 0.1


class Liveness:
    """The supervisor's connections."""

    def __init__(self, world: World) -> None:
        self.key, self.address, self.failure = "", ("", 0), None
        self._world = world
        self._observer: Any = None
        self._peers: dict[str, Process] = {}
        self._closed = False

    def start(self, observer: Any) -> None:
        self._observer = observer
        self._tick()

    def _tick(self) -> None:
        if not self._closed:
            self._observer.on_tick()
            self._world.at(TICK_S, self._tick)

    def send(self, name: str, order: SupervisorOrder) -> None:
        if name in self._peers:
            process = self._peers[name]
            process.supervised_at = max(process.supervised_at, self._world.now + self._world.latency())
            self._world.at(process.supervised_at - self._world.now, process.on_order, order)

    def process(self, name: str) -> liveness_module.Process:
        return liveness_module.Process("", 0)

    def drop(self, name: str) -> None:
        if name in self._peers:
            self._peers.pop(name).cut_off()

    def close(self) -> None:
        self._closed = True

    def greet(self, process: Process) -> None:
        if not self._closed:
            self._peers[process.name] = process
            self._observer.on_hello(process.name)

    def on_report(self, process: Process, report: WorkerReport) -> None:
        if process.name in self._peers and not self._closed:
            self._observer.on_report(process.name, report)

    def on_end(self, name: str) -> None:
        if self._peers.pop(name, None) is not None and not self._closed:
            self._observer.on_lost(name, "its connection ended", 0.0)

    def on_silence(self, process: Process) -> None:
        if process.frozen and process.name in self._peers and not self._closed:
            self.drop(process.name)
            self._observer.on_lost(process.name, "silent", 0.0)


@dataclass
class Layout:
    """What a cluster is made of."""

    replicas: list[tuple[ReplicaSpec, EngineSettings]]
    num_spares: int
    weather: Weather = field(default_factory=Weather)
    progress_rate: float = 0.3


class Cluster:
    """Processes, and who they are for each other."""

    def __init__(self, world: World, layout: Layout, rows: Mapping[str, Row], plan: Plan) -> None:
        self.world, self.layout, self.rows, self.plan = world, layout, rows, plan
        self.weather, self.progress_rate = layout.weather, layout.progress_rate
        self.heartbeat_timeout_s = 1.0
        self.processes: dict[str, Process] = {}
        self.liveness = Liveness(world)
        self._told: dict[tuple[int, int], list[Event]] = {}
        """Events by replica and rank."""
        self._epochs: dict[tuple[int, int], Epoch] = {}
        self._num_stores = 0
        self._num_steps = self._num_calls = 0

    def start(self) -> ReplicaPool:
        """As `start_engines` does."""
        supervisor = Supervisor(
            "",
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            step_timeout_s=60.0,
            replace_timeout_s=REPLACE_TIMEOUT_S,
            clock=self.world.monotonic,
        )
        launch = supervisor.launch(LAUNCH)
        supervisor.start(launch)
        replicas = []
        for spec, _ in self.layout.replicas:
            slots = [_slot() for _ in range(spec.parallel.world_size)]
            replicas.append(Replica(spec, launch, slots, host=""))
        spares = [self.start_worker(launch, _slot(), None, label="spare") for _ in range(self.layout.num_spares)]
        for replica in replicas:
            replica.wait_ready(1.0)
        supervisor.watch([ReplicaPlan(r.workers, r.assignments) for r in replicas], spares)
        supervisor.on_tick()
        self.plan.begin(self)
        return ReplicaPool(replicas, supervisor, lambda: None, max_num_seqs=MAX_NUM_SEQS, block_size=1)

    @property
    def members(self) -> list[Process]:
        """Processes that have a rank, or are about to."""
        return [p for p in self.processes.values() if p.alive and p.place is not None and p.is_connected]

    def settings_of(self, place: Assignment) -> EngineSettings:
        """Stores, which are numbered, stand for replicas."""
        return self.layout.replicas[place.store_port][1]

    def start_worker(
        self, launch: LaunchConfig, slot: WorkerSlot, assignment: Assignment | None, *, label: str
    ) -> WorkerProcess:
        name = f"worker-{len(self.processes)}"
        process = self.processes[name] = Process(self, name, assignment)
        if assignment is None:
            self.world.at(self.world.latency(2.0), process.connect)
        else:
            process.build(assignment)
            process.connect()
            process.enter()
        return WorkerProcess(name, label, slot, process, process.start.remote())

    def end_worker(self, worker: WorkerProcess, *, process: Any = None) -> None:
        """Out of reach, now and then, it goes on until it finds that it was left."""
        ended = self.processes[worker.name]
        if not self.plan.is_out_of_reach(self.world.rng):
            self.world.at(self.world.latency(0.05), ended.die)

    def failed_starts(self, workers: Sequence[WorkerProcess]) -> list[tuple[WorkerProcess, str]]:
        return [(worker, "dead") for worker in workers if not self.processes[worker.name].alive]

    def listen(self, _host: str) -> Any:
        self._num_stores += 1
        return _Store(self._num_stores - 1)

    def epoch_of(self, assignment: Assignment) -> Epoch:
        key = (assignment.store_port, assignment.epoch)
        return self._epochs.setdefault(key, Epoch(self.world, assignment.epoch, assignment.parallel.world_size))

    def note_told(self, process: Process, event: Event) -> None:
        assert process.place is not None
        if self.weather.stale:
            self._told.setdefault((process.place.store_port, process.rank), []).append(event)

    def late_events(self, place: Assignment) -> list[Event]:
        """What the process told that had this rank before, once more or only now: as if from the one that takes it."""
        told = self._told.pop((place.store_port, place.rank), [])
        return told[-4:] if self.world.rng.random() < self.weather.stale else []

    def next_strike(self, epoch: Epoch) -> Strike | None:
        self._num_steps += 1
        return self.plan.strike(self, self._num_steps, epoch)

    def count_call(self) -> None:
        self._num_calls += 1
        if self._num_calls == self.plan.killed_at_call:
            self.world.kill_driver()


@dataclass
class _Store:
    port: int


def _slot() -> WorkerSlot:
    return cast(WorkerSlot, _NoSlot())


class _NoSlot:
    node_id = ""


@contextmanager
def installed(cluster: Cluster) -> Iterator[None]:
    """The product's modules use this cluster in place of Ray, sockets and the time of day."""
    ray = Ray(cluster.world)
    processes = {"start_worker": cluster.start_worker, "end_worker": cluster.end_worker}
    wire = {"COMMANDS": _AsItIs(), "EVENTS": _AsItIs()}
    with (
        replaced(replica_pool_module, ray=ray, time=cluster.world),
        replaced(prefixes_module, PREFIX_TOKENS=2),
        replaced(replica_module, ray=ray, time=cluster.world, listen=cluster.listen, **processes, **wire),
        replaced(
            supervisor_module,
            Liveness=lambda _, timeout_s: cluster.liveness,
            failed_starts=cluster.failed_starts,
            **processes,
        ),
    ):
        yield


class _AsItIs:
    """Stands for a codec, where nothing must become bytes."""

    def encode(self, message: Any) -> Any:
        return message

    def decode(self, message: Any) -> Any:
        return message


@contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """As `unittest.mock.patch.object`, which takes longer than a simulated step."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)
