"""Token dispatchers: send tokens to the ranks that hold their experts, and return the experts' outputs.

Dispatchers have no parameters and keep no state between calls: the handle holds what `combine` needs.
T tokens of this rank, K experts per token, H hidden, P (token, top-k slot) pairs sent, R pairs received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.kernels.ops import Ops

from .collectives import Communicator
from .placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """Input of this rank's experts.

    x: the tokens, once each, [N, H] in their dtype
    x_row: row of x of each pair, grouped by local expert slot, ascending, [R] int64
    num_tokens_per_expert: number of pairs of each local expert slot, [num_local_experts] int64, in host memory or on
        x's device; sums to R, or less where R is an upper bound and the rest of x_row is undefined
    out_row: row of `combine`'s input that holds the output of each pair, [R] int64; None: in their order.
        Over several ranks: the position at which the pair arrived. Arrivals are grouped by source rank; in a group,
        (token, slot) order
    """

    x: Tensor
    x_row: Tensor
    num_tokens_per_expert: Tensor
    out_row: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """State for returning expert outputs to their tokens; valid for one `combine`.

    topk_weights: weight of each top-k slot, [T, K] fp32; weights never leave the token's rank
    row_of: returned row that holds the output of (token, slot), [T, K] int64, -1 where topk_idx is -1.
        Over several ranks, returned rows are grouped by the rank that computed them; in a group, (token, slot) order
    Over several ranks:
    num_sent: number of pairs sent to each rank, [num_ranks], sums to P, the number of returned rows
    num_received: number of pairs received from each rank, [num_ranks], sums to R
    received: handle of the library that moves the rows
    """

    topk_weights: Tensor
    row_of: Tensor
    num_sent: Sequence[int] = ()
    num_received: Sequence[int] = ()
    received: Any = None


RecvHook = Callable[[Tensor | None], Tensor]
"""(output of the shared expert [T, H] or None) -> output of the layer."""


class TokenDispatcher(Protocol):
    """Moves tokens to experts and outputs back. Every rank calls both methods in every layer, also without tokens."""

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """x [T, H], topk_idx [T, K] int64 logical experts (-1: none), topk_weights [T, K] fp32."""
        ...

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> RecvHook:
        """Begin to return y [R, H], the outputs of the experts in the rows given by `tokens.out_row`.

        The transfer may go on after this returns (not with NCCL, where it is complete). The hook waits for this rank's
        outputs and returns [T, H] in y's dtype. Row t is the sum of topk_weights[t, k] * output(t, k) in slot order
        k = 0..K-1, then + shared[t] (kernels.experts.combine_topk).
        """
        ...


class LocalTokenDispatcher:
    """Dispatcher for experts that are all on this rank: outputs are read in place."""

    def __init__(self, placement: ExpertPlacement, ops: Ops, device: torch.device | None = None) -> None:
        assert placement.num_ranks == 1, f"{placement.num_ranks} ranks hold experts, tokens cannot stay on one"
        self._ops = ops
        self._num_local_experts = len(placement.slots[0])
        _, self.slot_of = placement.lookup(source_rank=0, device=device)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        x_row, num_tokens_per_expert, row_of = self._ops.permute_by_expert(
            topk_idx, self.slot_of, self._num_local_experts
        )
        return DispatchedTokens(x, x_row, num_tokens_per_expert), DispatchHandle(topk_weights, row_of)

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> RecvHook:
        return partial(self._ops.combine_topk, y, handle.row_of, handle.topk_weights)


class AllToAllTokenDispatcher:
    """Dispatcher over the ranks of `comm`: one all-to-all to dispatch, one to combine.

    A token is sent once to each rank that holds any of its experts, with the list of its local expert slots.
    """

    def __init__(
        self, placement: ExpertPlacement, comm: Communicator, ops: Ops, device: torch.device | None = None
    ) -> None:
        assert placement.num_ranks == comm.size, (
            f"experts are on {placement.num_ranks} ranks, the group has {comm.size}"
        )
        self._comm = comm
        self._ops = ops
        self._num_local_experts = len(placement.slots[comm.rank])
        self._rank_of, self._slot_of = placement.lookup(source_rank=comm.rank, device=device)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        send_buffers, num_sent, row_of = self._ops.pack_send_buffers(
            x, topk_idx, self._rank_of, self._slot_of, self._comm.size
        )
        received = self._comm.all_to_all_bytes(send_buffers, layer=layer, op="moe.dispatch")
        rows, x_row, num_tokens_per_expert, arrival, num_received = self._ops.unpack_recv_buffers(
            received, x, self._num_local_experts
        )
        handle = DispatchHandle(topk_weights, row_of, num_sent, num_received)
        return DispatchedTokens(rows, x_row, num_tokens_per_expert, arrival), handle

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> RecvHook:
        receive = self._comm.all_to_all(y, handle.num_received, handle.num_sent, layer=layer, op="moe.combine")
        return lambda shared: self._ops.combine_topk(receive(), handle.row_of, handle.topk_weights, shared)
