"""Process groups of a rank: all ranks of the replica, and the ranks that share its requests."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from .collectives import CollectiveError, Communicator, NcclBackend
from .config import ParallelConfig
from .diagnosis import HEADER_BYTES
from .spans import Spans
from .transport import Deadline, SocketMesh, connect_mesh

MIN_CREATION_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """Position of a rank in its replica, and its communicators. Passed as an argument, never a global."""

    config: ParallelConfig
    rank: int
    device: torch.device
    world: Communicator
    """All ranks of the replica; experts are split over them."""
    tp: Communicator
    """The ranks that share this rank's requests; this rank's number in it is `tp_rank`."""
    local_world_size: int = 1
    """Number of this replica's ranks on this node (this one included), fixed when the replica first forms: the expert
    placement depends on it and must not change when a rank is replaced."""
    hostname: str = "127.0.0.1"
    """Address that this rank listens on and that its peers connect to."""
    timeout_s: float = 60.0
    """Timeout of a collective, and of forming the groups where it is above MIN_CREATION_TIMEOUT_S."""
    busy_wait_s: float = 0.0
    """Seconds of busy polling for a message before sleeping, for ranks with dedicated cores."""
    spans: Spans = field(default_factory=Spans)
    secret: bytes = field(default=b"", repr=False)
    """Shared secret that authenticates connections between the ranks."""

    @property
    def dp_rank(self) -> int:
        return self.config.dp_rank(self.rank)

    @property
    def tp_rank(self) -> int:
        return self.config.tp_rank(self.rank)

    @property
    def leader_rank(self) -> int:
        """Rank in the replica that schedules for this rank's tensor-parallel group."""
        return self.config.tp_group(self.rank)[0]

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0

    def set_step(self, step: int) -> None:
        """Label the following collectives of both groups with `step`."""
        self.world.step = self.tp.step = step

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch of a replica of one rank, which has no peers to join."""
        self.world.connect(epoch)
        self.tp.connect(epoch)

    def abort(self, reason: str, *, epoch: int | None = None) -> None:
        """Leave both groups: collectives in flight fail here and on the peers. Any thread may call.

        With an `epoch`, only groups of that epoch or an earlier one are left.
        """
        self.world.abort(reason, epoch=epoch)
        self.tp.abort(reason, epoch=epoch)

    def join(self, store: Store, epoch: int, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Connect this rank to its peers for one epoch; every rank of the replica calls it with the same `epoch`.

        `store` must outlive the ranks; keys contain the epoch and the group's name, so an epoch can be used once.
        CollectiveError when peers do not connect in time, or when `stop`, called repeatedly, returns True.
        """
        epoch_store = PrefixStore(f"e{epoch}", store)
        everyone = list(range(self.config.world_size))
        members = {self.world: everyone, self.tp: self.config.tp_group(self.rank)}
        for group, ranks in members.items():
            if group.size == 1:
                group.connect(epoch)
                continue
            try:
                mesh, nccl = _create_backends(PrefixStore(group.name, epoch_store), self, group, stop)
            except (RuntimeError, OSError) as error:
                raise CollectiveError(
                    f"rank {self.rank} could not form group '{group.name}' of ranks {ranks} in epoch {epoch}: {error}"
                ) from error
            group.connect(epoch, mesh, nccl, epoch_store)


def single_process_groups(device: torch.device | None = None, *, spans: Spans | None = None) -> ParallelGroups:
    """Groups of a replica of one rank, without torch.distributed."""
    world = Communicator(name="world")
    tp = Communicator(name="tp0")
    device = device or torch.device("cpu")
    spans = spans or Spans()
    groups = ParallelGroups(ParallelConfig(), 0, device, world, tp, spans=spans)
    world.connect(0)
    tp.connect(0)
    return groups


def create_groups(
    config: ParallelConfig,
    rank: int,
    *,
    device: torch.device | None = None,
    timeout_s: float = 60.0,
    hostname: str = "127.0.0.1",
    busy_wait_s: float = 0.0,
    spans: Spans | None = None,
    local_world_size: int = 1,
    secret: bytes = b"",
) -> ParallelGroups:
    """Groups of one rank, for use after `join`; a model can be loaded before, which needs no other rank."""
    if not 0 <= rank < config.world_size:
        raise ValueError(
            f"rank {rank} is not in a layout of {config.world_size} ranks; use 0 to {config.world_size - 1}"
        )
    spans = spans or Spans()
    world = Communicator(rank, config.world_size, timeout_s=timeout_s, spans=spans)
    tp = world
    ranks = config.tp_group(rank)
    if len(ranks) < config.world_size:
        name = f"tp{config.dp_rank(rank)}"
        tp = Communicator(ranks.index(rank), len(ranks), name=name, timeout_s=timeout_s, spans=spans, store_ranks=ranks)
    return ParallelGroups(
        config=config,
        rank=rank,
        device=device or torch.device("cpu"),
        world=world,
        tp=tp,
        local_world_size=local_world_size,
        hostname=hostname,
        timeout_s=timeout_s,
        busy_wait_s=busy_wait_s,
        spans=spans,
        secret=secret,
    )


def init_groups(
    config: ParallelConfig,
    rank: int,
    store: Store,
    *,
    epoch: int = 0,
    device: torch.device | None = None,
    timeout_s: float = 60.0,
    hostname: str = "127.0.0.1",
    busy_wait_s: float = 0.0,
    spans: Spans | None = None,
    secret: bytes = b"",
    stop: Callable[[], bool] = lambda: False,
) -> ParallelGroups:
    """Groups of one rank after `ParallelGroups.join`, with `local_world_size` from the ranks' addresses."""
    groups = create_groups(
        config,
        rank,
        device=device,
        timeout_s=timeout_s,
        hostname=hostname,
        busy_wait_s=busy_wait_s,
        spans=spans,
        secret=secret,
    )
    groups.join(store, epoch, stop=stop)
    address = zlib.crc32(hostname.encode())
    addresses = groups.world.all_gather_ints([address], layer=-1, op="groups.addresses")
    return replace(groups, local_world_size=addresses.count([address]))


def _create_backends(
    store: Store, groups: ParallelGroups, group: Communicator, stop: Callable[[], bool]
) -> tuple[SocketMesh, NcclBackend | None]:
    """Choose and connect the backends: sockets for headers and host memory, NCCL for tensors on a GPU."""
    timeout_s = max(MIN_CREATION_TIMEOUT_S, groups.timeout_s)
    store.set_timeout(timedelta(seconds=timeout_s))
    mesh = connect_mesh(
        PrefixStore("mesh", store),
        group.rank,
        group.size,
        hostname=groups.hostname,
        header_bytes=HEADER_BYTES,
        deadline=Deadline(timeout_s, stop),
        busy_wait_s=groups.busy_wait_s,
        secret=groups.secret,
    )
    if groups.device.type != "cuda":
        return mesh, None
    from torch.distributed import ProcessGroupNCCL  # absent from builds of torch without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with torch.cuda.device(groups.device):
        nccl: Any = ProcessGroupNCCL(PrefixStore("nccl", store), group.rank, group.size, options)
    return mesh, nccl
