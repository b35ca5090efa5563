"""Groups of a worker's rank: created with all other ranks at the first start, or alone to join running peers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.parallel.groups import ParallelGroups, create_groups, init_groups, single_process_groups
from shoal.parallel.spans import Spans

from ..engine_args import EngineArgs
from .assignment import Assignment
from .ray_cluster import node_address
from .spec import WorkerSpec

BUSY_WAIT_S = 0.02
"""How long a rank with its own cores watches for a message before it sleeps: most ranks of a step are less apart."""


def start_groups(spec: WorkerSpec, assignment: Assignment, spans: Spans) -> ParallelGroups:
    """Create the groups of the first epoch, together with all other ranks."""
    args = spec.args
    if _is_alone(assignment, args):
        return single_process_groups(spans=spans)
    return init_groups(
        assignment.parallel,
        assignment.rank,
        _rendezvous(assignment, args),
        epoch=assignment.epoch,
        device=torch.device(args.device),
        timeout_s=args.collective_timeout_s,
        hostname=node_address(),
        busy_wait_s=_busy_wait_s(spec),
        spans=spans,
        secret=spec.supervisor_key.encode(),
    )


def replacement_groups(spec: WorkerSpec, assignment: Assignment, spans: Spans) -> ParallelGroups:
    """Create the groups of a rank that will join running peers with `join_groups`."""
    args = spec.args
    if _is_alone(assignment, args):
        return single_process_groups(spans=spans)
    assert assignment.local_world_size is not None
    return create_groups(
        assignment.parallel,
        assignment.rank,
        device=torch.device(args.device),
        timeout_s=args.collective_timeout_s,
        hostname=node_address(),
        busy_wait_s=_busy_wait_s(spec),
        spans=spans,
        local_world_size=assignment.local_world_size,
        secret=spec.supervisor_key.encode(),
    )


def join_groups(
    spec: WorkerSpec, assignment: Assignment, groups: ParallelGroups, is_obsolete: Callable[[], bool]
) -> None:
    """Join the other ranks in the assignment's epoch; gives up once `is_obsolete`: peers will not answer in it."""
    epoch = assignment.epoch
    if _is_alone(assignment, spec.args):
        groups.set_epoch(epoch)
        return
    groups.join(_rendezvous(assignment, spec.args), epoch, stop=is_obsolete)
    if is_obsolete():  # since the groups last asked
        groups.abort("a rank was lost", epoch=epoch)


def _is_alone(assignment: Assignment, args: EngineArgs) -> bool:
    """Whether the rank has no peers, nor a device that needs groups."""
    return assignment.parallel.world_size == 1 and args.device == "cpu"


def _rendezvous(assignment: Assignment, args: EngineArgs) -> TCPStore:
    timeout = timedelta(seconds=args.collective_timeout_s)
    host, port = assignment.store_host, assignment.store_port
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _busy_wait_s(spec: WorkerSpec) -> float:
    return BUSY_WAIT_S if spec.dedicated_cores else 0.0
