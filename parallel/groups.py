"""The process groups of one rank: all ranks of the replica, and the ranks that share its requests."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from .collectives import HEADER_BYTES, CollectiveError, Communicator, NcclBackend
from .config import ParallelConfig
from .transport import SocketMesh, connect_mesh

MIN_CREATION_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """Where one rank stands in its replica, and whom it talks to. Passed as an argument, never a global."""

    config: ParallelConfig
    rank: int
    device: torch.device
    world: Communicator
    """All ranks of the replica; experts are split over them."""
    tp: Communicator
    """The ranks that share this rank's requests; rank in it is `tp_rank`."""
    ranks_on_node: int = 1
    """Ranks of the replica, this one included, that listen on the same address and so share a node's memory."""

    @property
    def dp_rank(self) -> int:
        return self.config.dp_rank(self.rank)

    @property
    def tp_rank(self) -> int:
        return self.config.tp_rank(self.rank)

    @property
    def leader_rank(self) -> int:
        """The rank, in the replica, that schedules for this rank's tensor-parallel group."""
        return self.config.tp_group(self.rank)[0]

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0

    def set_step(self, step: int) -> None:
        """Mark the collectives that follow, in both groups, as belonging to `step`."""
        self.world.step = self.tp.step = step

    def abort(self, reason: str) -> None:
        """Leave both groups: a collective in flight fails here and on its peers. Any thread may call."""
        self.world.abort(reason)
        self.tp.abort(reason)


def single_process_groups(device: torch.device | None = None) -> ParallelGroups:
    """The groups of a replica of one rank; no torch.distributed."""
    world, tp = Communicator(name="world"), Communicator(name="tp0")
    return ParallelGroups(ParallelConfig(), 0, device or torch.device("cpu"), world, tp)


def init_groups(
    config: ParallelConfig,
    rank: int,
    store: Store,
    *,
    epoch: int = 0,
    device: torch.device | None = None,
    timeout_s: float = 60.0,
    hostname: str | None = None,
    busy_wait_s: float = 0.0,
) -> ParallelGroups:
    """Connect this rank to its peers; every rank of the replica calls it with the same `config` and `epoch`.

    `store` must outlive the ranks; keys are kept under the epoch and the group's name, so an epoch is used once.
    `hostname` is the address that this rank listens on and that its peers reach, 127.0.0.1 by default.
    `busy_wait_s` is for ranks that have their cores to themselves: how long to watch for a message before sleeping.
    `timeout_s` bounds one collective, and forming a group where it is above MIN_CREATION_TIMEOUT_S.
    Raises CollectiveError when the peers do not come.
    """
    if not 0 <= rank < config.world_size:
        raise ValueError(
            f"rank {rank} is not in a layout of {config.world_size} ranks; use 0 to {config.world_size - 1}"
        )
    device = device or torch.device("cpu")
    hostname = hostname or "127.0.0.1"
    epoch_store = PrefixStore(f"e{epoch}", store)

    def connect(name: str, ranks: Sequence[int]) -> Communicator:
        own = ranks.index(rank)
        if len(ranks) == 1:
            return Communicator(name=name, epoch=epoch, timeout_s=timeout_s)
        try:
            mesh, nccl = _create_backends(
                PrefixStore(name, epoch_store), own, len(ranks), device, hostname, timeout_s, busy_wait_s
            )
        except (RuntimeError, OSError) as error:
            raise CollectiveError(
                f"rank {rank} could not form group '{name}' of ranks {ranks} in epoch {epoch}: {error}"
            ) from error
        return Communicator(
            own,
            len(ranks),
            name=name,
            epoch=epoch,
            timeout_s=timeout_s,
            mesh=mesh,
            nccl=nccl,
            store=epoch_store,
            store_ranks=ranks,
        )

    world = connect("world", list(range(config.world_size)))
    if config.tensor_parallel_size == config.world_size:
        tp = world
    else:
        tp = connect(f"tp{config.dp_rank(rank)}", config.tp_group(rank))
    address = zlib.crc32(hostname.encode())
    addresses = world.all_gather_ints([address], layer=-1, op="groups.addresses")
    return ParallelGroups(config, rank, device, world, tp, ranks_on_node=addresses.count([address]))


def _create_backends(
    store: Store, rank: int, size: int, device: torch.device, hostname: str, timeout_s: float, busy_wait_s: float
) -> tuple[SocketMesh, NcclBackend | None]:
    """The one place that chooses backends: sockets for headers and host memory, with NCCL for tensors on a GPU."""
    timeout_s = max(MIN_CREATION_TIMEOUT_S, timeout_s)
    store.set_timeout(timedelta(seconds=timeout_s))
    mesh = connect_mesh(
        PrefixStore("mesh", store),
        rank,
        size,
        hostname=hostname,
        header_bytes=HEADER_BYTES,
        deadline=time.monotonic() + timeout_s,
        busy_wait_s=busy_wait_s,
    )
    if device.type != "cuda":
        return mesh, None
    from torch.distributed import ProcessGroupNCCL  # absent from builds of torch without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with torch.cuda.device(device):
        nccl: Any = ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
    return mesh, nccl
