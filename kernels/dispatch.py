"""Bringing token rows into the order in which experts read them, on one rank or over several.

T tokens, K experts per token, H hidden, P (token, top-k slot) pairs with an expert. `rank_of` and `slot_of`, both
[num_experts] int64, say which rank holds an expert and in which of its slots; topk_idx is [T, K] int64, -1 where there
is no expert.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import CFunction, num_threads
from .registry import Kernel, register

shoal_group_pairs = CFunction("shoal_group_pairs", c_void_p, c_int64, c_int64, c_void_p, c_int64, *[c_void_p] * 3)
shoal_pack_segments = CFunction(
    "shoal_pack_segments", *[c_void_p, c_int64, c_int64] * 2, *[c_void_p] * 2, c_int64, *[c_void_p] * 4, c_int64
)
shoal_unpack_segments = CFunction("shoal_unpack_segments", c_void_p, *[c_int64] * 3, *[c_void_p] * 5)
_HEAD = struct.Struct("=ii")  # number of rows, number of pairs
_ALIGNMENT = 8
"""Alignment of a send buffer's segments, in bytes."""


def group_pairs(kernel: Kernel, topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which experts that are all on this rank read their tokens.

    -> (the token of every pair, grouped by slot, ascending, in (token, k) order within a slot [P] int64;
        pairs of each slot [num_slots] int64 in host memory;
        the place of each pair in that order [T, K] int64, -1 where topk_idx is -1).

    On a GPU: [T * K] tokens, where those after the first P mean nothing, and counts are in the memory of the GPU.
    """
    token_of: Tensor
    counts: Tensor
    row_of: Tensor
    token_of, counts, row_of = kernel.run(topk_idx, slot_of, num_slots)
    return token_of, counts, row_of


def pack_segments(
    kernel: Kernel, x: Tensor, topk_idx: Tensor, rank_of: Tensor, slot_of: Tensor, num_ranks: int
) -> tuple[list[Tensor], list[int], Tensor]:
    """What each rank needs to apply its experts to this rank's tokens: a token goes once to a rank.

    -> (one uint8 segment for each rank;
        pairs for each rank;
        the place of each pair when pairs are grouped by rank, in (token, k) order within a rank [T, K] int64, or -1).

    segment   [ int32 number of rows, number of pairs | int32 row of each pair | int32 slot of each pair | rows ]
    """
    segments: list[Tensor]
    num_pairs: list[int]
    row_of: Tensor
    segments, num_pairs, row_of = kernel.run(x, topk_idx, rank_of, slot_of, num_ranks)
    return segments, num_pairs, row_of


def unpack_segments(
    kernel: Kernel, segments: Sequence[Tensor], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """What this rank's experts read, from the segments that every rank sent; `like` [.., H] says dtype and width.

    -> (the rows of all segments [N, H];
        the row there of every pair, grouped by slot, ascending, in arrival order within a slot [R] int64;
        pairs of each slot [num_slots] int64, in host memory or, on a GPU, in its own;
        the place of each of those pairs among the arrivals [R] int64, a permutation;
        pairs in each segment).
    """
    row_bytes = like.shape[-1] * like.element_size()
    heads = _heads(segments)
    for source, (segment, (num_rows, num_pairs)) in enumerate(zip(segments, heads, strict=True)):
        expected = _HEAD.size + 8 * num_pairs + num_rows * row_bytes
        assert segment.numel() == expected, f"rank {source} sent {segment.numel()} bytes, its head says {expected}"
    rows: Tensor
    x_row: Tensor
    counts: Tensor
    arrival: Tensor
    rows, x_row, counts, arrival = kernel.run(segments, heads, like, num_slots)
    return rows, x_row, counts, arrival, [num_pairs for _, num_pairs in heads]


def _heads(segments: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(number of rows, number of pairs) of each, for which a device is waited for once."""
    parts = [segment[: _HEAD.size] for segment in segments]
    if not parts[0].is_cpu:
        parts = list(torch.stack(parts).cpu())
    return [_HEAD.unpack(part.numpy().data) for part in parts]


@register("group_pairs", "cpu")
def _group_pairs_cpu(topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    topk_idx = topk_idx.contiguous()
    tokens, top_k = topk_idx.shape
    token_of = topk_idx.new_empty(topk_idx.numel())
    counts, row_of = topk_idx.new_empty(num_slots), torch.empty_like(topk_idx)
    shoal_group_pairs(
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


@register("pack_segments", "cpu")
def _pack_segments_cpu(
    x: Tensor, topk_idx: Tensor, rank_of: Tensor, slot_of: Tensor, num_ranks: int
) -> tuple[list[Tensor], list[int], Tensor]:
    x, topk_idx = _rows(x), topk_idx.contiguous()
    tokens, top_k = topk_idx.shape
    row_bytes = x.shape[1] * x.element_size()
    most_rows = tokens * min(top_k, num_ranks)
    capacity = num_ranks * (_HEAD.size + _ALIGNMENT) + 8 * topk_idx.numel() + most_rows * row_bytes
    buffer = torch.empty(capacity, dtype=torch.uint8)
    sizes, row_of = torch.empty(2, num_ranks, dtype=torch.int64), torch.empty_like(topk_idx)
    shoal_pack_segments(
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
    segment_bytes, num_pairs = sizes.tolist()
    segments, begin = [], 0
    for size in segment_bytes:
        segments.append(buffer[begin : begin + size])
        begin += -(-size // _ALIGNMENT) * _ALIGNMENT
    return segments, num_pairs, row_of


@register("unpack_segments", "cpu")
def _unpack_segments_cpu(
    segments: Sequence[Tensor], heads: Sequence[tuple[int, int]], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_pairs = (sum(numbers) for numbers in zip(*heads, strict=True))
    rows = like.new_empty(num_rows, like.shape[-1])
    counts, x_row, arrival = (torch.empty(n, dtype=torch.int64) for n in (num_slots, num_pairs, num_pairs))
    pointers = (c_void_p * len(segments))(*(segment.data_ptr() for segment in segments))
    status = c_int64()
    shoal_unpack_segments(
        pointers,
        len(segments),
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


@register("group_pairs", "reference")
def _group_pairs_reference(topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    flat_idx = topk_idx.flatten()
    pairs = (flat_idx >= 0).nonzero().squeeze(1)
    slots = slot_of.to(topk_idx.device)[flat_idx[pairs]]
    pairs = pairs[slots.argsort(stable=True)]
    row_of = torch.full_like(flat_idx, -1)
    row_of[pairs] = torch.arange(len(pairs), device=topk_idx.device)
    counts = torch.bincount(slots, minlength=num_slots).cpu()
    return pairs // topk_idx.shape[1], counts, row_of.view_as(topk_idx)


@register("pack_segments", "reference")
def _pack_segments_reference(
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
    segments = []
    for head, route, part in zip(heads, routes, rows, strict=True):
        integers = torch.cat([head, route.flatten()])
        segments.append(torch.cat([integers.view(torch.uint8), part.flatten().view(torch.uint8)]))
    return segments, num_pairs.tolist(), row_of.view_as(topk_idx)


@register("unpack_segments", "reference")
def _unpack_segments_reference(
    segments: Sequence[Tensor], heads: Sequence[tuple[int, int]], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows: list[Tensor] = []
    row_of_pair: list[Tensor] = []
    slots: list[Tensor] = []
    for segment, (_, pairs) in zip(segments, heads, strict=True):
        row, slot = segment[_HEAD.size : _HEAD.size + 8 * pairs].view(torch.int32).view(2, pairs)
        row_of_pair.append(row + sum(map(len, rows)))
        slots.append(slot)
        rows.append(segment[_HEAD.size + 8 * pairs :].view(like.dtype).view(-1, like.shape[-1]))
    # Arrivals, source-major -> slot-major:   (r0,e0) (r0,e1) | (r1,e0) (r1,e1)
    #                                         (r0,e0) (r1,e0) | (r0,e1) (r1,e1)
    slot_of_pair = torch.cat(slots)
    arrival = slot_of_pair.argsort(stable=True)
    counts = torch.bincount(slot_of_pair, minlength=num_slots).cpu()
    return torch.cat(rows), torch.cat(row_of_pair)[arrival].to(torch.int64), counts, arrival
