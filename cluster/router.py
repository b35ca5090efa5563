"""Several replicas as one set of engines, and how they start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from shoal.runtime.models.config import ModelConfig
from shoal.runtime.types import Request, RequestOutput, RequestProgress
from shoal.runtime.validation import RequestLimits

from .engine_args import EngineArgs, read_model_config
from .ray_cluster import (
    Layout,
    Placement,
    RayCluster,
    check_fits,
    connect,
    core_shares,
    node_address,
    nodes,
    place,
)
from .replica import OnPhase, Phase, Replica, num_tokens_at_most, poll_replicas
from .worker import BUILD_ENGINE, StartReport


class Router:
    """Sends every request to the replica with the fewest outstanding tokens; one thread at a time may use it."""

    def __init__(self, replicas: Sequence[Replica], cluster: RayCluster) -> None:
        """Takes over the replicas and the connection: `close` ends both."""
        self._replicas = list(replicas)
        self._cluster = cluster

    @property
    def limits(self) -> RequestLimits:
        """What every replica can take."""
        limits = [replica.limits for replica in self._replicas]
        return min(limits, key=lambda x: x.max_model_len)

    @property
    def num_in_flight(self) -> int:
        return sum(replica.num_in_flight for replica in self._replicas)

    @property
    def capacity(self) -> int:
        """Requests in flight that keep every replica busy."""
        return sum(replica.capacity for replica in self._replicas)

    def submit(self, requests: Sequence[Request]) -> None:
        """Ties go to the first replica, so that the same submissions always take the same ways."""
        loads = [replica.outstanding_tokens for replica in self._replicas]
        chosen: list[list[Request]] = [[] for _ in self._replicas]
        for request in requests:
            position = min(range(len(loads)), key=lambda i: (loads[i], i))
            loads[position] += num_tokens_at_most(request, self.limits)
            chosen[position].append(request)
        for replica, mine in zip(self._replicas, chosen, strict=True):
            if mine:
                replica.submit(mine)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; no output of theirs is returned after this. Unknown ids are ignored."""
        for replica in self._replicas:
            replica.abort(request_ids)

    def poll(self, timeout_s: float) -> list[RequestOutput]:
        """See `poll_replicas`."""
        return poll_replicas(self._replicas, timeout_s)

    def take_progress(self) -> list[RequestProgress]:
        """What requests that report their progress have generated, as far as `poll` has seen it."""
        return [progress for replica in self._replicas for progress in replica.take_progress()]

    def close(self) -> None:
        """End all workers, and Ray where it was started for them. Closing twice is allowed."""
        for replica in self._replicas:
            replica.close()
        self._replicas = []
        self._cluster.close()


def start_engines(args: EngineArgs, *, on_phase: OnPhase | None = None, engine_factory: str = BUILD_ENGINE) -> Router:
    """Start all replicas in parallel and wait until they can serve.

    ValueError for a model or setting that cannot work, LayoutDoesNotFit for a cluster that is too small (both before
    any weight is read), EngineFailed when a worker fails. `on_phase` is told of every part of the start-up as it ends.
    """
    tell = on_phase or (lambda phase: None)
    config = read_model_config(args)
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
    tell(Phase("ready", time.monotonic() - begin, "; ".join(sorted({n for r in reports for n in r.notices}))))
    return Router(replicas, cluster)


def _create_replicas(
    args: EngineArgs, layout: Layout, placements: Sequence[Placement], *, embedded: bool, engine_factory: str
) -> list[Replica]:
    shares = core_shares(placements, nodes(), embedded=embedded, num_threads=args.num_threads_per_worker)
    host = node_address()
    return [
        Replica(args, layout, placement, cores=cores, host=host, engine_factory=engine_factory)
        for placement, cores in zip(placements, shares, strict=True)
    ]


def _layout(args: EngineArgs, config: ModelConfig) -> Layout:
    return Layout(
        parallel=args.parallel_config,
        replicas=args.replicas,
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
