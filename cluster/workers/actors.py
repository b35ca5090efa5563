"""Worker processes as Ray actors: slots, start and end."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..engine_args import EngineArgs
from .assignment import Assignment
from .liveness import Process
from .ray_cluster import BundlePlacement, CoreShare
from .spec import WorkerSpec
from .worker import Worker

ENGINE_THREAD = "engine"
"""Concurrency group, of one thread, of a worker's `start` and `run`."""
INBOX_THREAD = "inbox"
"""Concurrency group, of one thread, that receives commands, so that they keep their order."""

_KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # the engine's thread is not the first, and other arenas are cut into heaps of 64 MB
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""glibc settings: a step frees memory that the next one allocates; returning it costs a page fault for every 4 KB."""

ActorHandle = Any
ObjectRef = Any


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """Reserved resources for one worker."""

    placement: BundlePlacement
    bundle: int
    cores: CoreShare

    @property
    def node_id(self) -> str:
        return self.placement.node_ids[self.bundle]


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Settings that all workers of a run share."""

    args: EngineArgs
    engine_factory: str
    num_cpus_per_worker: int
    num_gpus_per_worker: int
    supervisor: tuple[str, int] | None = None
    supervisor_key: str = field(default="", repr=False)
    faults: str = ""
    """See `shoal.parallel.failpoints`."""


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A started worker."""

    name: str
    label: str
    slot: WorkerSlot
    actor: ActorHandle
    started: ObjectRef
    """Its `StartReport`."""
    ended: ObjectRef | None = None
    """Result of its loop; None before `run`."""

    def run(self) -> WorkerProcess:
        """Start the worker's loop. Call after `started`: Ray does not order calls to a process that is not up."""
        return replace(self, ended=_on_engine_thread(self.actor.run))


def start_worker(launch: LaunchConfig, slot: WorkerSlot, assignment: Assignment | None, *, label: str) -> WorkerProcess:
    """Start a process in a free slot, with a rank or (assignment None) as a spare; returns at once.

    `label`: see `WorkerSpec`.
    """
    spec = WorkerSpec(
        args=launch.args,
        name=f"shoal-{secrets.token_hex(8)}",
        assignment=assignment,
        num_threads=slot.cores.num_threads,
        dedicated_cores=slot.cores.dedicated,
        engine_factory=launch.engine_factory,
        supervisor=launch.supervisor,
        supervisor_key=launch.supervisor_key,
        label=label,
        faults=launch.faults,
    )
    # OpenMP reads its thread count once, when its library is loaded: before the worker's first line of Python.
    env = {"OMP_NUM_THREADS": str(spec.num_threads), "MKL_NUM_THREADS": str(spec.num_threads), **_KEEP_FREED_MEMORY}
    actor: Any = ray.remote(concurrency_groups={ENGINE_THREAD: 1, INBOX_THREAD: 1})(Worker)  # type: ignore[call-overload]
    handle = actor.options(
        name=spec.name,
        num_cpus=launch.num_cpus_per_worker,
        num_gpus=launch.num_gpus_per_worker,
        scheduling_strategy=PlacementGroupSchedulingStrategy(slot.placement.group, slot.bundle),
        runtime_env={"env_vars": env},
        max_concurrency=4,  # a waiting poll must not block commands
        max_restarts=0,
        max_task_retries=0,
    ).remote(spec)
    return WorkerProcess(spec.name, label, slot, handle, _on_engine_thread(handle.start))


def failed_starts(workers: Sequence[WorkerProcess]) -> list[tuple[WorkerProcess, str]]:
    """Workers whose start failed, each with the reason; does not wait for those that are still starting."""
    starts = {worker.started: worker for worker in workers}
    ready, _ = ray.wait(list(starts), num_returns=len(starts), timeout=0) if starts else ([], [])
    failed = []
    for ref in ready:
        try:
            report: Any = ray.get(ref)
        except RayError as error:
            failed.append((starts[ref], f"its process died while it started: {error}"))
            continue
        if report.failure is not None:
            failed.append((starts[ref], f"it did not start: {report.failure.message}"))
    return failed


def end_worker(worker: WorkerProcess, *, process: Process | None = None) -> None:
    """Kill a worker. With its `process` also a frozen one, which cannot obey Ray's request to exit."""
    ray.kill(worker.actor)
    if process is None:
        return
    if process.node_id == ray.get_runtime_context().get_node_id():
        _kill_process(process.pid)
        return
    strategy = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill_process).options(scheduling_strategy=strategy).remote(process.pid)


def _kill_process(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _on_engine_thread(method: Any) -> ObjectRef:
    return method.options(concurrency_group=ENGINE_THREAD).remote()
