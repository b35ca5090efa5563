"""Ray cluster: connection, check that a layout fits, and placement of workers."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from shoal.parallel.config import ParallelConfig

from ..environment import default_num_threads, num_cores
from .own_actor import group_name
from .ray_environment import (
    check_answers,
    choose_temp_dir,
    cluster_address,
    ensure_token,
    job_config,
    no_cluster,
)

GPU_MEMORY_BYTES = {
    "A100": 40 << 30,
    "A100-40G": 40 << 30,
    "A100-80G": 80 << 30,
    "H100": 80 << 30,
    "H200": 141 << 30,
    "H20": 96 << 30,
    "B200": 180 << 30,
    "L4": 24 << 30,
    "L40S": 48 << 30,
}
"""Memory in bytes by Ray's accelerator type; GPUs of other types are not checked for memory."""


class LayoutDoesNotFit(ValueError):  # noqa: N818
    """The cluster cannot hold the layout; the message has the missing resources and the layouts that would fit."""


class InsecureCluster(ValueError):  # noqa: N818
    """A cluster of several nodes runs with Ray's authentication disabled."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The Ray cluster that this process is connected to."""

    embedded: bool
    """Whether `connect` started it on this machine, as opposed to joining a running cluster."""
    owned: bool
    """Whether `connect` opened the connection, which `close` then ends."""

    def close(self) -> None:
        """Disconnect; an embedded Ray is shut down with all its processes."""
        if self.owned:
            ray.shutdown()


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """An alive node and its total resources."""

    node_id: str
    address: str
    num_cpus: float
    num_gpus: float
    memory_bytes: int
    gpu_memory_bytes: int | None
    """Memory of one GPU; None if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Workers and resources that a set of replicas needs."""

    replicas: tuple[ParallelConfig, ...]
    spares: int
    num_cpus_per_worker: int
    num_gpus_per_worker: int

    @property
    def num_workers(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Workers of every replica, then 1 for every spare."""
        return [parallel.world_size for parallel in self.replicas] + [1] * self.spares

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one worker."""
        gpus: dict[str, float] = {"GPU": self.num_gpus_per_worker} if self.num_gpus_per_worker else {}
        return {"CPU": self.num_cpus_per_worker, **gpus}

    def workers_on(self, node: Node) -> int:
        """Number of workers that fit on the node."""
        by_cpu = int(node.num_cpus // self.num_cpus_per_worker)
        return min(by_cpu, int(node.num_gpus // self.num_gpus_per_worker)) if self.num_gpus_per_worker else by_cpu


def connect(address: str | None, *, num_cpus: int, insecure: bool = False) -> RayCluster:
    """Connect to Ray: an existing connection, else `address`, else the cluster of this Ray job, else an embedded Ray.

    The embedded Ray offers `num_cpus` CPUs where the machine has fewer cores: its workers then share cores, so that any
    layout runs on a laptop. InsecureCluster when several nodes run without authentication and `insecure` is not set.
    """
    wanted = cluster_address(address, os.environ)
    if ray.is_initialized():
        cluster = RayCluster(embedded=False, owned=False)
    elif wanted is None:
        with signals_deferred():
            cluster = _start_embedded(num_cpus)
    else:
        check_answers(wanted)
        with signals_deferred():
            cluster = _join(wanted)
    if not insecure and not authentication_enabled() and len(nodes()) > 1:
        cluster.close()
        raise InsecureCluster(
            "this Ray cluster has several nodes and its authentication is disabled: anyone who reaches a port can run "
            "code on it; start it with RAY_AUTH_MODE=token (the default since Ray 2.60), or pass insecure"
        )
    return cluster


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM while Ray connects, as an exception in the middle would crash it; then deliver them.

    Only the main thread receives signals; on another thread this does nothing. Ray's own handlers are removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = {
        number: signal.signal(number, lambda signum, _frame: arrived.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


def _start_embedded(num_cpus: int) -> RayCluster:
    # Ray reads these variables when it starts its processes. The embedded one sends no usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers on a node that does other work too
    ensure_token(os.environ)
    ray.init(
        address="local",
        num_cpus=max(num_cpus, num_cores()),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        job_config=job_config(),
        _temp_dir=os.path.join(os.path.abspath(choose_temp_dir(os.environ)), "ray"),
    )
    return RayCluster(embedded=True, owned=True)


def _join(address: str) -> RayCluster:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, job_config=job_config())
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(no_cluster(address, str(error))) from error
    return RayCluster(embedded=False, owned=True)


def node_address() -> str:
    """Address at which other nodes reach this process's node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def authentication_enabled() -> bool:
    """Whether Ray checks a token on every connection; False for versions without tokens."""
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:
        return False
    return bool(is_token_auth_enabled())


def nodes() -> list[Node]:
    """Alive nodes in the order of their ids."""
    alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    return sorted((_node(n) for n in alive), key=lambda n: n.node_id)


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    known = [GPU_MEMORY_BYTES[kind] for kind in kinds if kind in GPU_MEMORY_BYTES]
    return Node(
        node_id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        gpu_memory_bytes=known[0] if known else None,
    )


def check_fits(layout: Layout, available: Sequence[Node]) -> None:
    """LayoutDoesNotFit when the nodes, even if idle, have too few CPUs or GPUs for the layout."""
    room = sum(layout.workers_on(node) for node in available)
    if room < layout.num_workers:
        need = {name: amount * layout.num_workers for name, amount in layout.bundle.items()}
        have = {"CPU": sum(n.num_cpus for n in available), "GPU": sum(n.num_gpus for n in available)}
        missing = [f"{amount - have[name]:g} {name}s" for name, amount in need.items() if amount > have[name]]
        fragmented = "the remaining resources are too fragmented for another worker"
        lack = f"{' and '.join(missing)} missing" if missing else fragmented
        per_worker = _resources(layout.bundle)
        total = _resources(need)
        raise LayoutDoesNotFit(
            f"the layout needs {layout.num_workers} workers with {per_worker} each = {total}; the cluster has "
            f"{_resources({name: have[name] for name in need})} on {len(available)} node(s), room for {room} workers "
            f"({lack}). {_options(layout, room)}"
        )


def _options(layout: Layout, room: int) -> str:
    """Hint with the largest layouts of at most `room` workers whose parallel sizes the requested layout allows."""
    asked = layout.replicas[0]
    if any(parallel != asked for parallel in layout.replicas):
        return "Ask for fewer or smaller replicas"
    sizes = [
        (tp, dp, replicas)
        for tp in range(1, asked.tensor_parallel_size + 1)
        if asked.tensor_parallel_size % tp == 0
        for dp in range(1, asked.data_parallel_size + 1)
        for replicas in range(1, len(layout.replicas) + 1)
        if tp * dp * replicas <= room
    ]
    if not sizes:
        return "No layout of this model fits, not even a single worker"
    sizes.sort(key=lambda s: (-s[0] * s[1] * s[2], -s[2], -s[0]))
    shown = [f"tensor_parallel_size={tp} data_parallel_size={dp} replicas={replicas}" for tp, dp, replicas in sizes[:3]]
    return f"Layouts that fit: {'; '.join(shown)}"


def _resources(amounts: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def placement_strategies(layout: Layout, available: Sequence[Node]) -> list[Literal["STRICT_PACK", "PACK"]]:
    """Per replica and spare: STRICT_PACK while a whole one fits on a node, afterwards PACK (few nodes)."""
    free = sorted((layout.workers_on(node) for node in available), reverse=True)
    strategies: list[Literal["STRICT_PACK", "PACK"]] = []
    for left in layout.sizes:
        free.sort(reverse=True)
        strategies.append("STRICT_PACK" if free[0] >= left else "PACK")
        for i, room in enumerate(free):
            taken = min(room, left)
            free[i] -= taken
            left -= taken
    return strategies


@dataclass(frozen=True, slots=True)
class BundlePlacement:
    """Reserved resources of one replica, a bundle per rank."""

    group: PlacementGroup
    node_ids: tuple[str, ...]
    """Node per rank."""

    def remove(self) -> None:
        """Release the resources; workers that still run in them are killed."""
        remove_placement_group(self.group)


def place(layout: Layout, available: Sequence[Node], *, timeout_s: float) -> list[BundlePlacement]:
    """Reserve the resources of every replica, then of every spare.

    LayoutDoesNotFit when they are in use for longer than `timeout_s`.
    """
    strategies = placement_strategies(layout, available)
    groups = [
        placement_group([layout.bundle] * size, strategy=strategy, name=group_name())
        for size, strategy in zip(layout.sizes, strategies, strict=True)
    ]
    _, waiting = ray.wait([g.ready() for g in groups], num_returns=len(groups), timeout=timeout_s)
    if waiting:
        for group in groups:
            remove_placement_group(group)
        raise LayoutDoesNotFit(
            f"{len(waiting)} of {len(groups)} replicas got no place in {timeout_s:g} s: the cluster is large enough "
            f"for {layout.num_workers} workers with {_resources(layout.bundle)} each, but other work holds a part of "
            "it; try again later or ask for fewer workers"
        )
    return [_placement(group) for group in groups]


def _placement(group: PlacementGroup) -> BundlePlacement:
    by_rank = placement_group_table(group)["bundles_to_node_id"]
    return BundlePlacement(group, tuple(by_rank[rank] for rank in range(len(by_rank))))


@dataclass(frozen=True, slots=True)
class CoreShare:
    """A worker's share of its node's cores."""

    num_threads: int
    dedicated: bool
    """Whether the node has a core for every thread of every worker on it."""


def core_shares(
    placements: Sequence[BundlePlacement], available: Sequence[Node], *, embedded: bool, num_threads: int | None = None
) -> list[list[CoreShare]]:
    """Core shares per replica and rank.

    A worker gets `num_threads`; None: the node's cores divided by its workers, at least 1 and at most OMP_NUM_THREADS
    where that is set.
    """
    everyone = [node_id for placement in placements for node_id in placement.node_ids]
    cores = {node.node_id: num_cores() if embedded else int(node.num_cpus) for node in available}

    def share(node_id: str) -> CoreShare:
        workers = everyone.count(node_id)
        threads = num_threads or default_num_threads(cores[node_id], workers)
        return CoreShare(threads, dedicated=workers * threads <= cores[node_id])

    return [[share(node_id) for node_id in placement.node_ids] for placement in placements]
