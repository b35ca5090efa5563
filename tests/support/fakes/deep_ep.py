"""DeepEP's module as far as Shoal calls it, over any group of torch: what it takes, what it gives, how it rounds.

Rows arrive in an order of the fake's own. What the experts of one rank made of a token is added up and rounded there
before it travels, then the ranks' parts are. What is on its way is NaN until its event was waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

TIMEOUTS = {"num_cpu_timeout_secs", "num_gpu_timeout_secs"}


@dataclass
class Event:
    finish: Callable[[], None] = lambda: None

    def current_stream_wait(self) -> None:
        self.finish()


@dataclass
class Handle:
    """Which row came from where, and which experts a token of this rank went to."""

    sources: list[tuple[int, int]]
    topk_idx: Tensor
    num_experts: int


class _Exchange:
    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def _gather(self, value: Any) -> list[Any]:
        everybody = [None] * self.group.size()
        dist.all_gather_object(everybody, value, self.group)
        return everybody

    def _dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Handle]:
        assert x.dim() == 2
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert topk_idx.dim() == 2
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert topk_weights is not None
        assert topk_weights.shape == topk_idx.shape
        assert topk_weights.dtype == torch.float32
        assert len(x) == len(topk_idx)
        assert num_experts % self.group.size() == 0
        assert topk_idx.numel() == 0 or -1 <= int(topk_idx.min()) <= int(topk_idx.max()) < num_experts
        local, rank = num_experts // self.group.size(), self.group.rank()
        rows, slots, weights, sources = [x[:0]], [topk_idx[:0]], [topk_weights[:0]], []
        for source, (their_x, their_idx, their_weights) in enumerate(self._gather((x, topk_idx, topk_weights))):
            here = (their_idx >= 0) & (their_idx // local == rank)
            tokens = here.any(dim=1).nonzero().squeeze(1).flip(0)
            rows.append(their_x[tokens])
            slots.append((their_idx[tokens] - rank * local).masked_fill(~here[tokens], -1))
            weights.append(their_weights[tokens])
            sources += [(source, token) for token in tokens.tolist()]
        slot = torch.cat(slots)
        counts = [int((slot == expert).sum()) for expert in range(local)]
        return torch.cat(rows), slot, torch.cat(weights), counts, Handle(sources, topk_idx, num_experts)

    def _combine(self, y: Tensor, handle: Handle) -> tuple[Tensor, Event]:
        assert y.dim() == 2
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous()
        assert len(y) == len(handle.sources)
        total = torch.zeros(len(handle.topk_idx), y.shape[1])
        for their_y, their_sources in self._gather((y, handle.sources)):
            for row, (source, token) in zip(their_y, their_sources, strict=True):
                if source == self.group.rank():
                    total[token] += row.float()  # one row for each (rank, token), in bf16 already
        combined = torch.full(total.shape, torch.nan, dtype=torch.bfloat16)

        def finish() -> None:
            combined.copy_(total)

        return combined, Event(finish)


class ElasticBuffer(_Exchange):
    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int | None = None,
        *,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        explicitly_destroy: bool = False,
        **options: int,
    ) -> None:
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        assert num_topk > 0
        assert num_bytes is None
        assert explicitly_destroy
        assert options.keys() <= TIMEOUTS
        super().__init__(group)
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        group.barrier()

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Handle, Event]:
        assert topk_idx is not None
        assert num_experts is not None
        assert len(x) <= self.num_max_tokens_per_rank
        assert (x.shape[1], topk_idx.shape[1]) == (self.hidden, self.num_topk)
        arrived, slots, weights, _, handle = self._dispatch(x, topk_idx, topk_weights, num_experts)
        return arrived, slots, weights, handle, Event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, *, async_with_compute_stream: bool = False
    ) -> tuple[Tensor, None, Event]:
        combined, event = self._combine(x, handle)
        if not async_with_compute_stream:
            event.current_stream_wait()
        return combined, None, event


class EPBuffer(ElasticBuffer):
    pass


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer(_Exchange):
    def __init__(
        self, group: ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, *, explicitly_destroy: bool = False
    ) -> None:
        assert num_nvl_bytes > 0
        assert num_rdma_bytes == 0
        assert explicitly_destroy
        super().__init__(group)
        self._gather(group.rank())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, None, Tensor, Tensor, Event]:
        local = num_experts // self.group.size()
        ranks = torch.where(topk_idx < 0, -1, topk_idx // local)
        is_in_rank = torch.stack([(ranks == rank).any(dim=1) for rank in range(self.group.size())], dim=1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return is_in_rank.sum(0).int(), None, per_expert, is_in_rank, Event()

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Handle, Event]:
        assert handle is None
        assert topk_idx is not None
        assert num_tokens_per_expert is not None
        per_rank, _, per_expert, is_in_rank, _ = self.get_dispatch_layout(topk_idx, len(num_tokens_per_expert))
        assert num_tokens_per_rank is not None
        assert torch.equal(num_tokens_per_rank, per_rank)
        assert is_token_in_rank is not None
        assert torch.equal(is_token_in_rank, is_in_rank)
        assert torch.equal(num_tokens_per_expert, per_expert)
        arrived, slots, weights, counts, made = self._dispatch(x, topk_idx, topk_weights, len(per_expert))
        return arrived, slots, weights, counts, made, Event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, *, async_finish: bool = False
    ) -> tuple[Tensor, None, Event]:
        combined, event = self._combine(x, handle)
        if not async_finish:
            event.current_stream_wait()
        return combined, None, event


def module_with(*interfaces: str) -> ModuleType:
    """The module of a version that has these classes."""
    module = ModuleType("deep_ep")
    for name in interfaces:
        setattr(module, name, globals()[name])
    module.topk_idx_t = torch.int64  # type: ignore[attr-defined]
    return module
