"""Permutation of token rows by expert, on one rank or over several.

T tokens, K experts per token, H hidden size, P (token, k) pairs with an expert. `rank_of` and `slot_of`, both
[num_experts] int64, hold an expert's rank and its slot there; topk_idx is [T, K] int64, -1 for no expert.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import CFunction, num_threads
from .math_utils import round_up
from .registry import Kernel, register

shoal_permute_by_expert = CFunction(
    "shoal_permute_by_expert", c_void_p, c_int64, c_int64, c_void_p, c_int64, *[c_void_p] * 3
)
shoal_pack_send_buffers = CFunction(
    "shoal_pack_send_buffers", *[c_void_p, c_int64, c_int64] * 2, *[c_void_p] * 2, c_int64, *[c_void_p] * 4, c_int64
)
shoal_unpack_recv_buffers = CFunction("shoal_unpack_recv_buffers", c_void_p, *[c_int64] * 3, *[c_void_p] * 5)
_HEAD = struct.Struct("=ii")  # number of rows, number of pairs
_ALIGNMENT = 8
"""Alignment of send buffers, in bytes."""


def permute_by_expert(
    kernel: Kernel, topk_idx: Tensor, slot_of: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pairs by expert slot where all experts are on this rank.

    -> (token of every pair, slots ascending, in (token, k) order within a slot [P] int64;
        number of pairs per slot [num_slots] int64 in host memory;
        index of each pair in that order [T, K] int64, -1 where topk_idx is -1).

    On a GPU there are [T * K] tokens, undefined after the first P, and the counts are in GPU memory.
    """
    token_of: Tensor
    counts: Tensor
    row_of: Tensor
    token_of, counts, row_of = kernel.run(topk_idx, slot_of, num_slots)
    return token_of, counts, row_of


def pack_send_buffers(
    kernel: Kernel, x: Tensor, topk_idx: Tensor, rank_of: Tensor, slot_of: Tensor, num_ranks: int
) -> tuple[list[Tensor], list[int], Tensor]:
    """Pack one send buffer per rank: the rows and routes that its experts need; a token is sent once per rank.

    -> (one uint8 send buffer per rank;
        number of pairs per rank;
        index of each pair when pairs are sorted by rank, in (token, k) order within a rank [T, K] int64, or -1).

    send buffer   [ int32 number of rows, number of pairs | int32 row of each pair | int32 slot of each pair | rows ]
    """
    send_buffers: list[Tensor]
    num_pairs: list[int]
    row_of: Tensor
    send_buffers, num_pairs, row_of = kernel.run(x, topk_idx, rank_of, slot_of, num_ranks)
    return send_buffers, num_pairs, row_of


def unpack_recv_buffers(
    kernel: Kernel, recv_buffers: Sequence[Tensor], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Unpack the buffers received from every rank into expert inputs; rows have the dtype and width of `like` [.., H].

    -> (rows of all buffers [N, H];
        row of every pair in it, slots ascending, in arrival order within a slot [R] int64;
        number of pairs per slot [num_slots] int64, in host memory or, on a GPU, in GPU memory;
        arrival index of each of those pairs [R] int64, a permutation;
        number of pairs per buffer).
    """
    row_bytes = like.shape[-1] * like.element_size()
    heads = _heads(recv_buffers)
    for source, (buffer, (num_rows, num_pairs)) in enumerate(zip(recv_buffers, heads, strict=True)):
        expected = _HEAD.size + 8 * num_pairs + num_rows * row_bytes
        assert buffer.numel() == expected, f"rank {source} sent {buffer.numel()} bytes, its head says {expected}"
    rows: Tensor
    x_row: Tensor
    counts: Tensor
    arrival: Tensor
    rows, x_row, counts, arrival = kernel.run(recv_buffers, heads, like, num_slots)
    return rows, x_row, counts, arrival, [num_pairs for _, num_pairs in heads]


def _heads(recv_buffers: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(number of rows, number of pairs) of each buffer; on a GPU this synchronises once."""
    parts = [buffer[: _HEAD.size] for buffer in recv_buffers]
    if not parts[0].is_cpu:
        parts = list(torch.stack(parts).cpu())
    return [_HEAD.unpack(part.numpy().data) for part in parts]


@register("permute_by_expert", "cpu")
def _permute_by_expert_cpu(topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    topk_idx = topk_idx.contiguous()
    tokens, top_k = topk_idx.shape
    token_of = topk_idx.new_empty(topk_idx.numel())
    counts, row_of = topk_idx.new_empty(num_slots), torch.empty_like(topk_idx)
    shoal_permute_by_expert(
        topk_idx.data_ptr(),
        tokens,
        top_k,
        slot_of.data_ptr(),
        num_slots,
        counts.data_ptr(),
        row_of.data_ptr(),
        token_of.data_ptr(),
    )
    return token_of[: sum(counts.tolist())], counts, row_of


@register("pack_send_buffers", "cpu")
def _pack_send_buffers_cpu(
    x: Tensor, topk_idx: Tensor, rank_of: Tensor, slot_of: Tensor, num_ranks: int
) -> tuple[list[Tensor], list[int], Tensor]:
    x, topk_idx = _rows(x), topk_idx.contiguous()
    tokens, top_k = topk_idx.shape
    row_bytes = x.shape[1] * x.element_size()
    most_rows = tokens * min(top_k, num_ranks)
    capacity = num_ranks * (_HEAD.size + _ALIGNMENT) + 8 * topk_idx.numel() + most_rows * row_bytes
    buffer = torch.empty(capacity, dtype=torch.uint8)
    sizes, row_of = torch.empty(2, num_ranks, dtype=torch.int64), torch.empty_like(topk_idx)
    shoal_pack_send_buffers(
        x.data_ptr(),
        x.stride(0) * x.element_size(),
        row_bytes,
        topk_idx.data_ptr(),
        tokens,
        top_k,
        rank_of.data_ptr(),
        slot_of.data_ptr(),
        num_ranks,
        buffer.data_ptr(),
        sizes.data_ptr(),
        sizes[1].data_ptr(),
        row_of.data_ptr(),
        num_threads(most_rows * x.shape[1]),
    )
    buffer_bytes, num_pairs = sizes.tolist()
    send_buffers, begin = [], 0
    for size in buffer_bytes:
        send_buffers.append(buffer[begin : begin + size])
        begin += round_up(size, _ALIGNMENT)
    return send_buffers, num_pairs, row_of


@register("unpack_recv_buffers", "cpu")
def _unpack_recv_buffers_cpu(
    recv_buffers: Sequence[Tensor], heads: Sequence[tuple[int, int]], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_pairs = (sum(numbers) for numbers in zip(*heads, strict=True))
    rows = like.new_empty(num_rows, like.shape[-1])
    counts, x_row, arrival = (torch.empty(n, dtype=torch.int64) for n in (num_slots, num_pairs, num_pairs))
    pointers = (c_void_p * len(recv_buffers))(*(buffer.data_ptr() for buffer in recv_buffers))
    status = c_int64()
    shoal_unpack_recv_buffers(
        pointers,
        len(recv_buffers),
        rows.shape[1] * rows.element_size(),
        num_slots,
        rows.data_ptr(),
        counts.data_ptr(),
        x_row.data_ptr(),
        arrival.data_ptr(),
        byref(status),
    )
    assert status.value == 0, f"a pair names a row that was not sent, or none of the {num_slots} slots"
    return rows, x_row, counts, arrival


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@register("permute_by_expert", "reference")
def _permute_by_expert_reference(topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    flat_idx = topk_idx.flatten()
    pairs = (flat_idx >= 0).nonzero().squeeze(1)
    slots = slot_of.to(topk_idx.device)[flat_idx[pairs]]
    pairs = pairs[slots.argsort(stable=True)]
    row_of = torch.full_like(flat_idx, -1)
    row_of[pairs] = torch.arange(len(pairs), device=topk_idx.device)
    counts = torch.bincount(slots, minlength=num_slots).cpu()
    return pairs // topk_idx.shape[1], counts, row_of.view_as(topk_idx)


@register("pack_send_buffers", "reference")
def _pack_send_buffers_reference(
    x: Tensor, topk_idx: Tensor, rank_of: Tensor, slot_of: Tensor, num_ranks: int
) -> tuple[list[Tensor], list[int], Tensor]:
    rank_of, slot_of = rank_of.to(x.device), slot_of.to(x.device)
    flat_idx, top_k = topk_idx.flatten(), topk_idx.shape[1]
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

    routes = torch.split(
        torch.stack([row_of_pair, slot_of[flat_idx[pairs]]]).to(torch.int32), num_pairs.tolist(), dim=1
    )
    rows = torch.split(x[tokens[is_new]], num_rows.tolist())
    heads = torch.stack([num_rows, num_pairs], dim=1).to(torch.int32)
    send_buffers = []
    for head, route, part in zip(heads, routes, rows, strict=True):
        integers = torch.cat([head, route.flatten()])
        send_buffers.append(torch.cat([integers.view(torch.uint8), part.flatten().view(torch.uint8)]))
    return send_buffers, num_pairs.tolist(), row_of.view_as(topk_idx)


@register("unpack_recv_buffers", "reference")
def _unpack_recv_buffers_reference(
    recv_buffers: Sequence[Tensor], heads: Sequence[tuple[int, int]], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows: list[Tensor] = []
    row_of_pair: list[Tensor] = []
    slots: list[Tensor] = []
    for buffer, (_, pairs) in zip(recv_buffers, heads, strict=True):
        row, slot = buffer[_HEAD.size : _HEAD.size + 8 * pairs].view(torch.int32).view(2, pairs)
        row_of_pair.append(row + sum(map(len, rows)))
        slots.append(slot)
        rows.append(buffer[_HEAD.size + 8 * pairs :].view(like.dtype).view(-1, like.shape[-1]))
    # Arrivals, source-major -> slot-major:   (r0,e0) (r0,e1) | (r1,e0) (r1,e1)
    #                                         (r0,e0) (r1,e0) | (r0,e1) (r1,e1)
    slot_of_pair = torch.cat(slots)
    arrival = slot_of_pair.argsort(stable=True)
    counts = torch.bincount(slot_of_pair, minlength=num_slots).cpu()
    return torch.cat(rows), torch.cat(row_of_pair)[arrival].to(torch.int64), counts, arrival
