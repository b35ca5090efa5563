"""Brings tokens to the ranks that hold their experts, and the experts' outputs back.

Dispatchers have no parameters and keep no state between calls: what `combine` needs is in the handle.
T tokens of this rank, K experts per token, H hidden, P (token, top-k slot) pairs sent, R pairs received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.experts import combine_topk

from .collectives import Communicator
from .placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """The input of this rank's experts.

    x: rows grouped by local expert slot, ascending, [R, H], the dtype of the dispatched tokens
    num_tokens_per_expert: rows of each local expert slot, [num_local_experts] int64 in host memory, sums to R
    """

    x: Tensor
    num_tokens_per_expert: Tensor


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """How to bring expert outputs back to their tokens; valid for one `combine`.

    topk_weights: the weight of each top-k slot, [T, K] fp32; weights never leave the token's rank
    row_of: the returned row that holds the output of (token, slot), [T, K] int64, -1 where topk_idx is -1.
        Over several ranks, returned rows are grouped by the rank that computed them; in a group, (token, slot) order
    arrival: the position at which each of the R expert-major rows arrived, [R] int64, a permutation.
        Over several ranks, arrivals are grouped by the rank they came from; in a group, (token, slot) order
    num_sent: pairs sent to each rank, [num_ranks], sums to P, the number of rows that come back
    num_received: pairs received from each rank, [num_ranks], sums to R
    """

    topk_weights: Tensor
    row_of: Tensor
    arrival: Tensor
    num_sent: list[int]
    num_received: list[int]


class TokenDispatcher(Protocol):
    """Moves tokens to experts and outputs back. Every rank calls both methods in every layer, also with no tokens."""

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """x [T, H], topk_idx [T, K] int64 logical experts (-1: none), topk_weights [T, K] fp32."""
        ...

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> Tensor:
        """y [R, H], row i the expert's output for row i of the dispatched x; returns [T, H] fp32.

        Row t is the sum of topk_weights[t, k] * output(t, k) in slot order k = 0..K-1 (kernels.experts.combine_topk).
        """
        ...


class LocalTokenDispatcher:
    """All experts are on this rank: pairs "arrive" in expert-major order already, and outputs are read in place."""

    def __init__(self, placement: ExpertPlacement) -> None:
        assert placement.num_ranks == 1, f"{placement.num_ranks} ranks hold experts, tokens cannot stay on one"
        self._num_local_experts = len(placement.slots[0])
        self._lookup = placement.lookup(source_rank=0)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        pairs = (topk_idx.flatten() >= 0).nonzero().squeeze(1)
        slot_of = self._lookup[1].to(x.device)
        order, num_tokens_per_expert = _expert_major(slot_of[topk_idx.flatten()[pairs]], self._num_local_experts)
        pairs = pairs[order]
        arrival = torch.arange(len(pairs), device=x.device)
        row_of = torch.full_like(topk_idx, -1).flatten()
        row_of[pairs] = arrival
        handle = DispatchHandle(topk_weights, row_of.view_as(topk_idx), arrival, [len(pairs)], [len(pairs)])
        return DispatchedTokens(x[pairs // topk_idx.shape[1]], num_tokens_per_expert), handle

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> Tensor:
        return combine_topk(y, handle.row_of, handle.topk_weights)


class AllToAllTokenDispatcher:
    """Experts are spread over the ranks of `comm`; one exchange to dispatch, one to combine.

    A token goes once to each rank that holds any of its experts, with the list of local expert slots to apply there.
    """

    def __init__(self, placement: ExpertPlacement, comm: Communicator) -> None:
        assert placement.num_ranks == comm.size, (
            f"experts are on {placement.num_ranks} ranks, the group has {comm.size}"
        )
        self._comm = comm
        self._num_local_experts = len(placement.slots[comm.rank])
        self._lookup = placement.lookup(source_rank=comm.rank)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layer: int
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        rank_of, slot_of = (table.to(x.device) for table in self._lookup)
        num_ranks, top_k, flat_idx = self._comm.size, topk_idx.shape[1], topk_idx.flatten()

        # Pairs, (token, slot)-major -> grouped by destination rank:   t0k0 t0k1 t1k0 t1k1
        # to ranks 1 0 1 1:                                          | t0k1 | t0k0 t1k0 t1k1 |
        pairs = (flat_idx >= 0).nonzero().squeeze(1)
        ranks, by_rank = rank_of[flat_idx[pairs]].sort(stable=True)
        pairs = pairs[by_rank]
        tokens = pairs // top_k
        row_of = torch.full_like(flat_idx, -1)
        row_of[pairs] = torch.arange(len(pairs), device=x.device)

        # One row for each (destination rank, token):   | t0 | t0 t1 |   pairs point at rows:   | 0 | 0 1 1 |
        is_new = torch.ones_like(tokens, dtype=torch.bool)
        is_new[1:] = (tokens[1:] != tokens[:-1]) | (ranks[1:] != ranks[:-1])
        num_pairs = torch.bincount(ranks, minlength=num_ranks)
        num_rows = torch.bincount(ranks[is_new], minlength=num_ranks)
        row_of_pair = is_new.cumsum(0) - 1 - (num_rows.cumsum(0) - num_rows)[ranks]

        num_sent, num_rows_sent = num_pairs.tolist(), num_rows.tolist()
        routes = torch.split(torch.stack([row_of_pair, slot_of[flat_idx[pairs]]]).to(torch.int32), num_sent, dim=1)
        rows = torch.split(x[tokens[is_new]], num_rows_sent)
        sizes = torch.stack([num_rows, num_pairs], dim=1).to(torch.int32)
        segments = [_pack(sizes[r], routes[r], rows[r]) for r in range(num_ranks)]
        received = self._comm.all_to_all_bytes(segments, layer=layer, op="moe.dispatch")
        rows_in, routes_in = zip(*[_unpack(segment, x) for segment in received], strict=True)

        # Arrivals, source-major -> expert-major:   (r0,e0) (r0,e1) | (r1,e0) (r1,e1)
        #                                           (r0,e0) (r1,e0) | (r0,e1) (r1,e1)
        first_rows = torch.tensor([0] + [len(part) for part in rows_in[:-1]], device=x.device).cumsum(0)
        arrived_rows = torch.cat([route[0] + first for route, first in zip(routes_in, first_rows, strict=True)])
        arrived_slots = torch.cat([route[1] for route in routes_in])
        arrival, num_tokens_per_expert = _expert_major(arrived_slots, self._num_local_experts)
        handle = DispatchHandle(
            topk_weights=topk_weights,
            row_of=row_of.view_as(topk_idx),
            arrival=arrival,
            num_sent=num_sent,
            num_received=[route.shape[1] for route in routes_in],
        )
        return DispatchedTokens(torch.cat(rows_in)[arrived_rows[arrival]], num_tokens_per_expert), handle

    def combine(self, y: Tensor, handle: DispatchHandle, *, layer: int) -> Tensor:
        arrived = torch.empty_like(y)
        arrived[handle.arrival] = y
        returned = self._comm.all_to_all(arrived, handle.num_received, handle.num_sent, layer=layer, op="moe.combine")
        return combine_topk(returned, handle.row_of, handle.topk_weights)


def _expert_major(slots: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """The order that groups arrivals by local expert slot (stable), and the rows of each slot in host memory."""
    return slots.argsort(stable=True), torch.bincount(slots, minlength=num_local_experts).cpu()


def _pack(sizes: Tensor, routes: Tensor, rows: Tensor) -> Tensor:
    """[num_rows, num_pairs | row of each pair | local slot of each pair] int32, then the rows: one uint8 segment."""
    head = torch.cat([sizes, routes.flatten()])
    return torch.cat([head.view(torch.uint8), rows.flatten().view(torch.uint8)])


def _unpack(segment: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack`: (rows [num_rows, H] of `like`'s dtype and width, routes [2, num_pairs])."""
    num_rows, num_pairs = segment[:8].view(torch.int32).tolist()
    head, rows = segment[: 8 + 8 * num_pairs].view(torch.int32), segment[8 + 8 * num_pairs :].view(like.dtype)
    assert rows.numel() == num_rows * like.shape[1], (
        f"a rank sent {rows.numel()} values for {num_rows} rows of {like.shape[1]}"
    )
    return rows.view(num_rows, like.shape[1]), head[2:].view(2, num_pairs)
