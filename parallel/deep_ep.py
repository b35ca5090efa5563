"""DeepEP as a `TokenDispatcher`: rows are sent to their experts and back over NVLink and RDMA.

DeepEP sums and rounds the outputs of one rank's experts for a token before sending them, so results would depend on
which experts share a rank. Here each (token, slot) pair is a separate token to DeepEP, with one expert and no weight:
every output is returned unchanged, and `combine_topk` weights and adds them as for the other dispatchers. The cost is
one row per pair when dispatching, where a token could be sent once to each rank.

Three interfaces exist: `Buffer` (NVSHMEM), `ElasticBuffer` (NCCL) and its successor `EPBuffer`. Freeing a buffer needs
all peers, so after a failure the old one is not freed. DeepEP waits for peers on the GPU and stops after a timeout, and
the process cannot use its GPU any more: the loss of a rank during an exchange can end the whole replica; a rank that is
lost between exchanges is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from shoal.kernels.ops import Ops
from shoal.kernels.optional import import_optional

from .collectives import CollectiveError, Communicator
from .dispatcher import DispatchedTokens, DispatchHandle, RecvHook
from .groups import ParallelGroups
from .placement import ExpertPlacement

INTERFACES = ("EPBuffer", "ElasticBuffer", "Buffer")
"""Classes of the module in order of preference."""


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """Capacity of a buffer."""

    hidden_size: int
    max_rows: int
    """Maximum number of pairs that one rank sends at a time."""
    num_experts: int
    """Number of expert slots of all ranks together."""
    timeout_s: float


class DeepEPAdapter(Protocol):
    """One interface of DeepEP, for rows [P, H] in bf16 with one expert each."""

    def dispatch(self, rows: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """experts: [P, 1] physical experts, -1 for a row that is not sent.

        -> (received rows, in any order [R, H]; local slot of each [R, 1]; handle for `combine`).
        """
        ...

    def combine(self, y: Tensor, handle: Any) -> Callable[[], Tensor]:
        """y: [R, H] in the order of the received rows -> function that waits for the returned rows [P, H]."""
        ...


class DeepEPTokenDispatcher:
    """Dispatcher over the ranks of `comm`, with the same number of expert slots on each; tokens are bf16 on a GPU."""

    def __init__(
        self,
        placement: ExpertPlacement,
        comm: Communicator,
        ops: Ops,
        open_adapter: Callable[[], DeepEPAdapter],
        device: torch.device | None = None,
    ) -> None:
        """`open_adapter` is called by all ranks together, at the first dispatch of an epoch."""
        self._comm = comm
        self._ops = ops
        self._open_adapter = open_adapter
        self._adapter: DeepEPAdapter | None = None
        self._epoch = -1
        self._num_local_experts = slots_per_rank(placement)
        rank_of, slot_of = placement.lookup(source_rank=comm.rank, device=device)
        self._physical = rank_of * self._num_local_experts + slot_of
        self._own_slots = torch.arange(self._num_local_experts, device=device)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        top_k = topk_idx.shape[1]
        absent = topk_idx < 0
        experts = self._physical[topk_idx.clamp_min(0)].masked_fill(absent, -1)
        pairs = x.repeat_interleave(top_k, dim=0)
        with self._diagnosing("moe.dispatch", layer):
            rows, slots, received = self._connected().dispatch(pairs, experts.view(-1, 1))
        x_row, num_tokens_per_expert, _ = self._ops.permute_by_expert(slots, self._own_slots, self._num_local_experts)
        row_of = torch.arange(topk_idx.numel(), device=x.device).view_as(topk_idx).masked_fill(absent, -1)
        tokens = DispatchedTokens(rows, x_row, num_tokens_per_expert, out_row=x_row)
        return tokens, DispatchHandle(topk_weights, row_of, received=received)

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> RecvHook:
        with self._diagnosing("moe.combine", layer):
            receive = self._connected().combine(y, handle.received)
        return lambda shared: self._ops.combine_topk(receive(), handle.row_of, handle.topk_weights, shared)

    @contextmanager
    def _diagnosing(self, op: str, layer: int) -> Iterator[None]:
        """Turn DeepEP's errors into CollectiveError, which ends the epoch as errors of other collectives do."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CollectiveError):
                raise
            who = f"rank {self._comm.rank} of {self._comm.size}"
            raise CollectiveError(f"{who} failed in '{op}' (epoch {self._epoch}, layer {layer}): {error}") from error

    def _connected(self) -> DeepEPAdapter:
        """This epoch's adapter: after a failure the peers may be other processes."""
        if self._adapter is None or self._epoch != self._comm.epoch:
            self._adapter = self._open_adapter()
            self._epoch = self._comm.epoch
        return self._adapter


def deep_ep_dispatcher(
    placement: ExpertPlacement, groups: ParallelGroups, ops: Ops, hidden_size: int, *, max_rows: int
) -> DeepEPTokenDispatcher:
    """Dispatcher over all ranks of a replica, each of which sends at most `max_rows` (token, slot) pairs at a time.

    ValueError when DeepEP is not available or does not support the placement.
    """
    module = import_deep_ep()
    world = groups.world
    num_experts = placement.num_ranks * slots_per_rank(placement)
    sizes = BufferSizes(hidden_size, max_rows, num_experts, world.timeout_s)
    return DeepEPTokenDispatcher(
        placement, world, ops, lambda: open_adapter(module, world.process_group(), sizes), groups.device
    )


def slots_per_rank(placement: ExpertPlacement) -> int:
    """Number of expert slots of every rank; ValueError if they differ, as DeepEP numbers experts by rank."""
    counts = [len(slots) for slots in placement.slots]
    if len(set(counts)) > 1:
        raise ValueError(
            f"all2all_backend deepep needs the same number of experts on every rank, {placement.num_experts} experts "
            f"on {placement.num_ranks} ranks are {counts}: choose a number of ranks that divides the experts"
        )
    return counts[0]


def import_deep_ep() -> ModuleType:
    """Import DeepEP; ValueError when it is missing, cannot be imported or has none of the known interfaces."""
    module = import_optional(
        "deep_ep",
        setting="all2all_backend deepep",
        install="build it from https://github.com/deepseek-ai/DeepEP (deep-ep on the package index is something else)",
    )
    if interface_of(module) is None:
        raise ValueError(f"the installed deep_ep has none of the interfaces {', '.join(INTERFACES)}")
    return module


def interface_of(module: ModuleType) -> str | None:
    """Name of the class of the module that is used; None if it has none of them."""
    return next((name for name in INTERFACES if hasattr(module, name)), None)


def open_adapter(module: ModuleType, group: ProcessGroup, sizes: BufferSizes) -> DeepEPAdapter:
    """Open the newest interface of the module; every rank of the group calls it.

    ValueError, with DeepEP's own message, for an unsupported number of ranks or GPUs; CollectiveError when the ranks
    could not connect.
    """
    name = interface_of(module)
    make = _BufferAdapter if name == "Buffer" else _ElasticAdapter
    what = f"deep_ep.{name} cannot connect {group.size()} ranks"
    try:
        return make(module, group, sizes)
    except AssertionError as error:
        raise ValueError(f"{what}: {error}; set all2all_backend to default") from error
    except RuntimeError as error:
        raise CollectiveError(f"{what}: {error}") from error


class _ElasticAdapter:
    """Adapter of `EPBuffer` and `ElasticBuffer`, whose calls are equal."""

    def __init__(self, module: ModuleType, group: ProcessGroup, sizes: BufferSizes) -> None:
        buffer_class = getattr(module, interface_of(module) or "")
        self._num_experts = sizes.num_experts
        self._max_rows = sizes.max_rows
        self._index_dtype = _index_dtype(module)
        self._buffer = buffer_class(
            group,
            num_max_tokens_per_rank=sizes.max_rows,
            hidden=sizes.hidden_size,
            num_topk=1,
            num_cpu_timeout_secs=max(1, int(sizes.timeout_s)),
            num_gpu_timeout_secs=max(1, int(sizes.timeout_s)),
            explicitly_destroy=True,
        )

    def dispatch(self, rows: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Any]:
        assert len(rows) <= self._max_rows, f"{len(rows)} rows, the buffer was made for {self._max_rows}"
        arrived, slots, _, handle, _ = self._buffer.dispatch(
            rows,
            topk_idx=experts.to(self._index_dtype),
            topk_weights=_unit_weights(experts),
            num_experts=self._num_experts,
        )
        return arrived, slots.long(), handle

    def combine(self, y: Tensor, handle: Any) -> Callable[[], Tensor]:
        combined, _, event = self._buffer.combine(y, handle, async_with_compute_stream=True)
        return _Arriving(event, combined, y)


class _BufferAdapter:
    """Adapter of `Buffer` in its "normal" mode, which sends through buffers of a fixed size chunk by chunk."""

    def __init__(self, module: ModuleType, group: ProcessGroup, sizes: BufferSizes) -> None:
        self._num_experts = sizes.num_experts
        self._index_dtype = _index_dtype(module)
        ranks = group.size()
        row_bytes = 2 * sizes.hidden_size
        configs = (module.Buffer.get_dispatch_config(ranks), module.Buffer.get_combine_config(ranks))
        self._buffer = module.Buffer(
            group,
            num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
            num_rdma_bytes=max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs),
            explicitly_destroy=True,
        )

    def dispatch(self, rows: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Any]:
        experts = experts.to(self._index_dtype)
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(
            experts, self._num_experts
        )
        arrived, slots, _, _, handle, _ = self._buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=experts,
            topk_weights=_unit_weights(experts),
        )
        return arrived, slots.long(), handle

    def combine(self, y: Tensor, handle: Any) -> Callable[[], Tensor]:
        combined, _, event = self._buffer.combine(y, handle, async_finish=True)
        return _Arriving(event, combined, y)


def _index_dtype(module: ModuleType) -> torch.dtype:
    dtype: torch.dtype = getattr(module, "topk_idx_t", torch.int64)
    return dtype


def _unit_weights(experts: Tensor) -> Tensor:
    """Weights that DeepEP requires beside the experts; they are not read."""
    return torch.ones(experts.shape, dtype=torch.float32, device=experts.device)


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Waits for returned rows when called."""

    event: Any
    rows: Tensor
    sent: Tensor
    """Kept alive because DeepEP's stream reads it until then."""

    def __call__(self) -> Tensor:
        self.event.current_stream_wait()
        return self.rows
