"""How a set of replicas starts: connect, check, place, build."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shoal.runtime.models.config import ModelConfig

from .engine_args import EngineArgs, read_model_config
from .ray_cluster import (
    Layout,
    Placement,
    check_fits,
    connect,
    core_shares,
    node_address,
    nodes,
    place,
)
from .replica import OnPhase, Phase, Replica
from .router import Router
from .worker import BUILD_ENGINE, StartReport, choose_transport


def start_engines(args: EngineArgs, *, on_phase: OnPhase | None = None, engine_factory: str = BUILD_ENGINE) -> Router:
    """Start all replicas in parallel and wait until they can serve.

    ValueError for a model or setting that cannot work, LayoutDoesNotFit for a cluster that is too small (both before
    any weight is read), EngineFailed when a worker fails. `on_phase` is told of every part of the start-up as it ends.
    """
    tell = on_phase or (lambda phase: None)
    config = read_model_config(args)
    if args.hands_over:
        args = replace(args, kv_transport=choose_transport(args))  # chosen once, for all workers
    begin = time.monotonic()
    cluster = connect(
        args.ray_address, num_cpus=args.num_workers * (args.num_threads_per_worker or 1), insecure=args.insecure
    )
    tell(Phase("ray", time.monotonic() - begin))
    placements: list[Placement] = []
    replicas: list[Replica] = []
    try:
        start = time.monotonic()
        available = nodes()
        layout = _layout(args, config)
        check_fits(layout, available)
        placements = place(layout, available, timeout_s=args.startup_timeout_s)
        tell(Phase("placement", time.monotonic() - start))
        start = time.monotonic()
        replicas = _create_replicas(args, layout, placements, embedded=cluster.embedded, engine_factory=engine_factory)
        deadline = start + args.startup_timeout_s
        reports = [r for replica in replicas for r in replica.wait_ready(deadline - time.monotonic())]
        for phase in _phases(reports, time.monotonic() - start, layout.weight_bytes):
            tell(phase)
    except BaseException:
        for replica in replicas:
            replica.close()
        for placement in placements[len(replicas) :]:
            placement.remove()
        cluster.close()
        raise
    notices = {notice for report in reports for notice in report.notices}
    if args.hands_over:
        notices.add(f"cache records travel through {args.kv_transport}")
    tell(Phase("ready", time.monotonic() - begin, "; ".join(sorted(notices))))
    roles = [spec.role for spec in args.replica_specs]
    return Router(replicas, roles, cluster, max_num_seqs=args.max_num_seqs)


def _create_replicas(
    args: EngineArgs, layout: Layout, placements: Sequence[Placement], *, embedded: bool, engine_factory: str
) -> list[Replica]:
    shares = core_shares(placements, nodes(), embedded=embedded, num_threads=args.num_threads_per_worker)
    host = node_address()
    return [
        Replica(args, spec.parallel, layout, placement, cores=cores, host=host, engine_factory=engine_factory)
        for spec, placement, cores in zip(args.replica_specs, placements, shares, strict=True)
    ]


def _layout(args: EngineArgs, config: ModelConfig) -> Layout:
    return Layout(
        replicas=tuple(spec.parallel for spec in args.replica_specs),
        num_cpus_per_worker=args.num_threads_per_worker or 1,
        num_gpus_per_worker=1 if args.device == "cuda" else 0,
        weight_bytes=_weight_bytes(args, config),
    )


def _weight_bytes(args: EngineArgs, config: ModelConfig) -> int:
    """Memory that one copy of the weights takes: their size on disk, from the stored to the computing dtype."""
    on_disk = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
    stored = 1 if config.weight_block_size is not None else config.torch_dtype.itemsize
    computing: torch.dtype = config.torch_dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    return on_disk * computing.itemsize // stored


def _phases(reports: Sequence[StartReport], seconds: float, weight_bytes: int) -> list[Phase]:
    """The slowest rank of each phase; what the ranks did not account for is their processes' own start."""
    slowest = {name: max(r.phases.get(name, 0.0) for r in reports) for name in reports[0].phases}
    phases = [Phase("workers", max(0.0, seconds - sum(slowest.values())))]
    for name, took in slowest.items():
        rate = f"{weight_bytes / took / 1e9:.2g} GB/s" if name == "weights" and took > 0 else ""
        phases.append(Phase(name, took, rate))
    return phases
