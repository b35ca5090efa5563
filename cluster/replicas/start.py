"""Start of a pool of replicas: connect to Ray, check the layout, reserve resources, build engines."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from shoal.parallel.failpoints import VARIABLE, Failpoints

from ..engine_args import EngineArgs, read_model_config
from ..supervision.supervisor import ReplicaPlan, Supervisor
from ..workers.actors import LaunchConfig, WorkerProcess, WorkerSlot, end_worker, start_worker
from ..workers.engine_factory import BUILD_ENGINE
from ..workers.kv_transports import choose_transport
from ..workers.ray_cluster import (
    BundlePlacement,
    Layout,
    check_fits,
    connect,
    core_shares,
    node_address,
    nodes,
    place,
)
from ..workers.spec import OnPhase, Phase, StartReport
from .memory_check import check_memory
from .replica import EngineFailed, Replica
from .replica_pool import ReplicaPool

LONG_WAIT_S = 5.0
"""Waits longer than this are announced."""


@contextmanager
def announced(what: str, say: Callable[[str], None], *, after_s: float = LONG_WAIT_S) -> Iterator[None]:
    """Call `say` on another thread if the block takes longer than `after_s`; `what` names what it waits for."""
    timer = threading.Timer(after_s, say, [f"waiting for {what}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def start_engines(
    args: EngineArgs,
    *,
    on_phase: OnPhase | None = None,
    on_wait: Callable[[str], None] | None = None,
    engine_factory: str = BUILD_ENGINE,
    faults: str | None = None,
) -> ReplicaPool:
    """Start all replicas in parallel and wait until they can serve.

    ValueError for a model or setting that cannot work, LayoutDoesNotFit for a cluster that is too small (both before
    any weight is read), EngineFailed when a worker fails. `on_phase` is called with every completed phase, `on_wait`,
    on another thread, with a description of every long wait.
    `faults`: see `shoal.parallel.failpoints`; None: read from the environment.
    """
    report_phase = on_phase or (lambda phase: None)
    say = on_wait or (lambda what: None)
    config = read_model_config(args)
    faults = os.environ.get(VARIABLE, "") if faults is None else faults
    _ = Failpoints(faults)  # raises ValueError before anything is started
    begin = time.monotonic()
    num_workers = args.num_workers + args.spares
    num_cpus = num_workers * (args.num_threads_per_worker or 1)
    with announced("Ray to start or to answer", say):
        cluster = connect(args.ray_address, num_cpus=num_cpus, insecure=args.insecure)
    report_phase(Phase("ray", time.monotonic() - begin))
    with ExitStack() as undo:
        undo.callback(cluster.close)
        transport = choose_transport(args, len(nodes())) if args.hands_over else None
        if transport is not None:
            args = replace(args, kv_transport=transport.name)  # once, for all workers
        start = time.monotonic()
        layout = _layout(args)
        check_fits(layout, nodes())
        memory = check_memory(args, config, nodes())
        limit = f"(at most {args.startup_timeout_s:g} s, startup_timeout_s)"
        with announced(f"room for {layout.num_workers} workers on the Ray cluster {limit}", say):
            placements = place(layout, nodes(), timeout_s=args.startup_timeout_s)
        for placement in placements:
            undo.callback(placement.remove)
        report_phase(Phase("placement", time.monotonic() - start, str(memory)))
        start = time.monotonic()
        supervisor = Supervisor(
            node_address(),
            heartbeat_timeout_s=args.heartbeat_timeout_s,
            step_timeout_s=args.collective_timeout_s,
            replace_timeout_s=args.startup_timeout_s,
        )
        undo.callback(supervisor.close)
        launch = supervisor.launch(
            LaunchConfig(
                args,
                engine_factory,
                layout.num_cpus_per_worker,
                layout.num_gpus_per_worker,
                faults=faults,
            )
        )
        supervisor.start(launch)
        slots = _worker_slots(args, placements, embedded=cluster.embedded)
        replicas: list[Replica] = []
        for spec, own in zip(args.replica_specs, slots, strict=False):
            number = sum(len(r.workers) for r in replicas if r.role == spec.role)
            replicas.append(Replica(spec, launch, own, host=node_address(), first_number=number))
            undo.callback(replicas[-1].close)
        spares = [
            start_worker(launch, slot, None, label=f"spare:{number}")
            for number, (slot,) in enumerate(slots[len(replicas) :])
        ]
        for worker in spares:
            undo.callback(end_worker, worker)
        deadline = start + args.startup_timeout_s
        with announced(f"{num_workers} workers to start and to load the model {limit}", say):
            reports = [r for replica in replicas for r in replica.wait_ready(deadline - time.monotonic())]
            reports += [_spare_report(worker, deadline - time.monotonic()) for worker in spares]
        supervisor.watch([ReplicaPlan(r.workers, r.assignments) for r in replicas], spares)
        weight_bytes = memory.weight_bytes[0] * args.replica_specs[0].parallel.world_size
        for phase in _phases(reports, time.monotonic() - start, weight_bytes):
            report_phase(phase)
        notices = {notice for report in reports for notice in report.notices}
        if transport is not None:
            notices.add(str(transport))
        report_phase(Phase("ready", time.monotonic() - begin, "; ".join(sorted(notices))))
        undo.pop_all()

    def close() -> None:
        for placement in placements:
            placement.remove()
        cluster.close()

    return ReplicaPool(replicas, supervisor, close, max_num_seqs=args.max_num_seqs, block_size=args.block_size)


def _worker_slots(args: EngineArgs, placements: Sequence[BundlePlacement], *, embedded: bool) -> list[list[WorkerSlot]]:
    """The slots of all workers, per replica and then per spare."""
    num_replicas = len(args.replica_specs)
    placed = placements[:num_replicas]
    shares = core_shares(placed, nodes(), embedded=embedded, num_threads=args.num_threads_per_worker)
    shares += [[shares[0][0]]] * (len(placements) - num_replicas)  # a spare runs on the cores of the worker it replaces
    return [
        [WorkerSlot(placement, bundle, share) for bundle, share in enumerate(own)]
        for placement, own in zip(placements, shares, strict=True)
    ]


def _spare_report(worker: WorkerProcess, timeout_s: float) -> StartReport:
    try:
        report: Any = ray.get(worker.started, timeout=max(0.0, timeout_s))
    except RayError as error:
        raise EngineFailed(-1, f"a spare did not start: {error}") from error
    assert isinstance(report, StartReport)
    if report.failure is not None:
        raise EngineFailed(-1, f"a spare did not start: {report.failure.message}\n{report.failure.traceback}")
    return report


def _layout(args: EngineArgs) -> Layout:
    return Layout(
        replicas=tuple(spec.parallel for spec in args.replica_specs),
        spares=args.spares,
        num_cpus_per_worker=args.num_threads_per_worker or 1,
        num_gpus_per_worker=1 if args.device == "cuda" else 0,
    )


def _phases(reports: Sequence[StartReport], seconds: float, weight_bytes: int) -> list[Phase]:
    """Time of the slowest rank per phase; the time outside all phases is that of starting the processes."""
    slowest = {name: max(r.phases.get(name, 0.0) for r in reports) for name in reports[0].phases}
    phases = [Phase("workers", max(0.0, seconds - sum(slowest.values())))]
    for name, took in slowest.items():
        rate = f"{weight_bytes / took / 1e9:.2g} GB/s" if name == "weights" and took > 0 else ""
        phases.append(Phase(name, took, rate))
    return phases
