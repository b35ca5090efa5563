"""Counting sorts of (token, expert) pairs: by slot on one rank, by rank into send buffers over several.

Each chunk of pairs counts its pairs per slot or rank. The index of a pair is then the number of pairs of lower slots or
ranks, plus those of its own in earlier chunks, plus those of its own before it in its chunk. `permute_by_expert` does
not synchronise; send buffers are split by sizes that the host waits for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..math_utils import round_up
from ..registry import register

CHUNK = 128
"""Pairs per program, which are compared with each other."""


@triton.jit
def _slots_of(topk_idx, slot_of, pairs, num_pairs, num_slots):
    """Slots of pairs; pairs without an expert come last, in an extra slot."""
    expert = tl.load(topk_idx + pairs, mask=pairs < num_pairs, other=-1)
    slot = tl.load(slot_of + expert, mask=expert >= 0, other=num_slots)
    return tl.where(pairs < num_pairs, slot, -1).to(tl.int32)


@triton.jit
def _count_kernel(topk_idx, slot_of, chunk_counts, num_pairs, num_slots, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """chunk_counts[chunk, slot] for num_slots slots and the extra slot of pairs without an expert."""
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    slots = tl.arange(0, SLOTS)
    slot = _slots_of(topk_idx, slot_of, pairs, num_pairs, num_slots)
    count = tl.sum((slot[:, None] == slots[None, :]).to(tl.int32), axis=0)
    tl.store(chunk_counts + tl.program_id(0) * (num_slots + 1) + slots, count, mask=slots <= num_slots)


@triton.jit
def _place_kernel(
    topk_idx,
    slot_of,
    chunk_counts,
    token_of,
    row_of,
    counts,
    num_pairs,
    num_slots,
    num_chunks,
    top_k,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    this = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), dtype=tl.int32)
    before = tl.zeros((SLOTS,), dtype=tl.int32)
    for chunk in range(num_chunks):
        count = tl.load(chunk_counts + chunk * (num_slots + 1) + slots, mask=slots <= num_slots, other=0)
        total += count
        before += tl.where(chunk < this, count, 0)
    if this == 0:
        tl.store(counts + slots, total.to(tl.int64), mask=slots < num_slots)
    start = tl.cumsum(total, 0) - total + before

    own = tl.arange(0, CHUNK)
    pairs = this * CHUNK + own
    slot = _slots_of(topk_idx, slot_of, pairs, num_pairs, num_slots)
    place = tl.sum(tl.where(slot[:, None] == slots[None, :], start[None, :], 0), axis=1)
    other = _slots_of(topk_idx, slot_of, this * CHUNK + tl.arange(0, CHUNK), num_pairs, num_slots)
    earlier = (slot[:, None] == other[None, :]) & (own[None, :] < own[:, None])
    place += tl.sum(earlier.to(tl.int32), axis=1)
    inside = pairs < num_pairs
    tl.store(token_of + place, (pairs // top_k).to(tl.int64), mask=inside)
    tl.store(row_of + pairs, tl.where(slot == num_slots, -1, place).to(tl.int64), mask=inside)


@register("permute_by_expert", "triton")
def _permute_by_expert(topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    topk_idx, slot_of = topk_idx.contiguous(), slot_of.to(topk_idx.device)
    num_pairs, top_k = topk_idx.numel(), topk_idx.shape[1]
    token_of, row_of = topk_idx.new_empty(num_pairs), torch.empty_like(topk_idx)
    if not num_pairs:
        return token_of, topk_idx.new_zeros(num_slots), row_of
    counts = topk_idx.new_empty(num_slots)
    num_chunks = triton.cdiv(num_pairs, CHUNK)
    chunk_counts = torch.empty(num_chunks, num_slots + 1, dtype=torch.int32, device=topk_idx.device)
    blocks = {"CHUNK": CHUNK, "SLOTS": triton.next_power_of_2(num_slots + 1)}
    _count_kernel[(num_chunks,)](topk_idx, slot_of, chunk_counts, num_pairs, num_slots, **blocks, num_warps=4)
    _place_kernel[(num_chunks,)](
        topk_idx,
        slot_of,
        chunk_counts,
        token_of,
        row_of,
        counts,
        num_pairs,
        num_slots,
        num_chunks,
        top_k,
        **blocks,
        num_warps=4,
    )
    return token_of, counts, row_of


@triton.jit
def _ranks_of(topk_idx, rank_of, num_tokens, num_ranks, TOP_K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """Pairs of a chunk, their experts and ranks, and whether each is its token's first for its rank [TOKENS * SLOTS].

    SLOTS is TOP_K or more; pairs that do not exist have rank num_ranks + 1, those without an expert num_ranks.
    """
    lanes = tl.arange(0, TOKENS * SLOTS)
    token = tl.program_id(0) * TOKENS + lanes // SLOTS
    slot = lanes % SLOTS
    exists = (token < num_tokens) & (slot < TOP_K)
    pairs = token * TOP_K + slot
    expert = tl.load(topk_idx + pairs, mask=exists, other=-1)
    rank = tl.load(rank_of + expert, mask=expert >= 0, other=num_ranks).to(tl.int32)
    rank = tl.where(exists, rank, num_ranks + 1)
    first = exists & (expert >= 0)
    for k in tl.static_range(TOP_K):
        other_expert = tl.load(topk_idx + token * TOP_K + k, mask=exists & (k < slot), other=-1)
        other = tl.load(rank_of + other_expert, mask=other_expert >= 0, other=num_ranks + 2).to(tl.int32)
        first = first & (other != rank)
    return pairs, expert, rank, first


@triton.jit
def _count_ranks_kernel(
    topk_idx,
    rank_of,
    chunk_counts,
    num_tokens,
    num_ranks,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """chunk_counts[chunk, 0, rank] pairs and [chunk, 1, rank] rows."""
    _pairs, _expert, rank, first = _ranks_of(topk_idx, rank_of, num_tokens, num_ranks, TOP_K, TOKENS, SLOTS)
    ranks = tl.arange(0, RANKS)
    mine = rank[:, None] == ranks[None, :]
    place = chunk_counts + tl.program_id(0) * 2 * num_ranks + ranks
    tl.store(place, tl.sum(mine.to(tl.int32), axis=0), mask=ranks < num_ranks)
    tl.store(place + num_ranks, tl.sum((mine & first[:, None]).to(tl.int32), axis=0), mask=ranks < num_ranks)


@triton.jit
def _route_kernel(
    topk_idx,
    rank_of,
    slot_of,
    chunk_counts,
    totals,
    integers,
    row_of,
    row_places,
    num_tokens,
    num_ranks,
    num_chunks,
    row_bytes,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Heads and routes of all send buffers, in int32, and the byte offset of each pair's row, -1 for none."""
    this = tl.program_id(0)
    ranks = tl.arange(0, RANKS)
    pairs_all = tl.zeros((RANKS,), dtype=tl.int32)
    pairs_before = tl.zeros((RANKS,), dtype=tl.int32)
    rows_all = tl.zeros((RANKS,), dtype=tl.int32)
    rows_before = tl.zeros((RANKS,), dtype=tl.int32)
    for chunk in range(num_chunks):
        place = chunk_counts + chunk * 2 * num_ranks + ranks
        num_pairs = tl.load(place, mask=ranks < num_ranks, other=0)
        num_rows = tl.load(place + num_ranks, mask=ranks < num_ranks, other=0)
        pairs_all += num_pairs
        rows_all += num_rows
        pairs_before += tl.where(chunk < this, num_pairs, 0)
        rows_before += tl.where(chunk < this, num_rows, 0)
    # send buffer   [ rows, pairs | row of each pair | slot of each pair | rows ], beginning at a multiple of 8 bytes
    size = 8 + 8 * pairs_all.to(tl.int64) + rows_all.to(tl.int64) * row_bytes
    size = tl.where(ranks < num_ranks, (size + 7) // 8 * 8, 0)
    begin = tl.cumsum(size, 0) - size
    first_pair = tl.cumsum(pairs_all, 0) - pairs_all
    if this == 0:
        tl.store(integers + begin // 4, rows_all, mask=ranks < num_ranks)
        tl.store(integers + begin // 4 + 1, pairs_all, mask=ranks < num_ranks)
        tl.store(totals + ranks, pairs_all, mask=ranks < num_ranks)
        tl.store(totals + num_ranks + ranks, rows_all, mask=ranks < num_ranks)

    pairs, expert, rank, first = _ranks_of(topk_idx, rank_of, num_tokens, num_ranks, TOP_K, TOKENS, SLOTS)
    sent = rank < num_ranks
    mine = rank[:, None] == ranks[None, :]
    pair = tl.sum(tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1 + pairs_before[None, :], 0), axis=1)
    rows_here = tl.cumsum((mine & first[:, None]).to(tl.int32), 0) - 1 + rows_before[None, :]
    row = tl.sum(tl.where(mine, rows_here, 0), axis=1)
    num_pairs = tl.sum(tl.where(mine, pairs_all[None, :], 0), axis=1)
    start = tl.sum(tl.where(mine, begin[None, :], 0), axis=1)
    before = tl.sum(tl.where(mine, first_pair[None, :], 0), axis=1)
    tl.store(integers + start // 4 + 2 + pair, row, mask=sent)
    slot = tl.load(slot_of + expert, mask=sent, other=0).to(tl.int32)
    tl.store(integers + start // 4 + 2 + num_pairs + pair, slot, mask=sent)
    exists = rank <= num_ranks
    tl.store(row_of + pairs, tl.where(sent, before + pair, -1).to(tl.int64), mask=exists)
    place = start + 8 + 8 * num_pairs.to(tl.int64) + row.to(tl.int64) * row_bytes
    tl.store(row_places + pairs, tl.where(first, place, -1), mask=exists)


@triton.jit
def _copy_rows_kernel(x, row_places, send_buffers, stride, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Copy x's row of a pair to its place in `send_buffers`, which has x's dtype."""
    pair = tl.program_id(0).to(tl.int64)
    place = tl.load(row_places + pair)
    if place >= 0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + pair // TOP_K * stride + columns, mask=columns < width)
        size: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
        tl.store(send_buffers + place // size + columns, values, mask=columns < width)


@register("pack_send_buffers", "triton")
def _pack_send_buffers(
    x: Tensor, topk_idx: Tensor, rank_of: Tensor, slot_of: Tensor, num_ranks: int
) -> tuple[list[Tensor], list[int], Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    topk_idx, rank_of, slot_of = topk_idx.contiguous(), rank_of.to(x.device), slot_of.to(x.device)
    (num_tokens, width), top_k = x.shape, topk_idx.shape[1]
    row_bytes = width * x.element_size()
    capacity = num_ranks * 16 + 8 * topk_idx.numel() + num_tokens * min(top_k, num_ranks) * row_bytes
    buffer = torch.empty(round_up(capacity, 8), dtype=torch.uint8, device=x.device)
    row_of = torch.empty_like(topk_idx)
    totals = torch.zeros(2, num_ranks, dtype=torch.int32, device=x.device)
    slots = triton.next_power_of_2(top_k)
    tokens = max(1, CHUNK // slots)
    num_chunks = max(1, triton.cdiv(num_tokens, tokens))  # a program writes the heads even without tokens
    chunk_counts = torch.empty(num_chunks, 2, num_ranks, dtype=torch.int32, device=x.device)
    row_places = torch.empty_like(topk_idx)
    blocks = {"TOP_K": top_k, "TOKENS": tokens, "SLOTS": slots, "RANKS": triton.next_power_of_2(num_ranks)}
    _count_ranks_kernel[(num_chunks,)](topk_idx, rank_of, chunk_counts, num_tokens, num_ranks, **blocks, num_warps=4)
    _route_kernel[(num_chunks,)](
        topk_idx,
        rank_of,
        slot_of,
        chunk_counts,
        totals,
        buffer.view(torch.int32),
        row_of,
        row_places,
        num_tokens,
        num_ranks,
        num_chunks,
        row_bytes,
        **blocks,
        num_warps=4,
    )
    if num_tokens:
        grid = (topk_idx.numel(), triton.cdiv(width, 1024))
        typed = buffer.view(x.dtype)
        _copy_rows_kernel[grid](x, row_places, typed, x.stride(0), width, TOP_K=top_k, BLOCK=1024, num_warps=4)
    num_pairs, num_rows = totals.tolist()
    send_buffers, begin = [], 0
    for pairs, rows in zip(num_pairs, num_rows, strict=True):
        size = 8 + 8 * pairs + rows * row_bytes
        send_buffers.append(buffer[begin : begin + size])
        begin += round_up(size, 8)
    return send_buffers, num_pairs, row_of


@register("unpack_recv_buffers", "triton")
def _unpack_recv_buffers(
    recv_buffers: Sequence[Tensor], heads: Sequence[tuple[int, int]], like: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts stay on the device. Pairs with an invalid row or slot are not detected."""
    routes, rows, first_row = [], [], 0
    for buffer, (num_rows, num_pairs) in zip(recv_buffers, heads, strict=True):
        row, slot = buffer[8 : 8 + 8 * num_pairs].view(torch.int32).view(2, num_pairs)
        routes.append(torch.stack([row + first_row, slot]))
        rows.append(buffer[8 + 8 * num_pairs :].view(like.dtype).view(num_rows, like.shape[-1]))
        first_row += num_rows
    row_of_pair, slot_of_pair = torch.cat(routes, dim=1).long()
    identity = torch.arange(num_slots, device=slot_of_pair.device)
    arrival, counts, _ = _permute_by_expert(slot_of_pair.unsqueeze(1), identity, num_slots)
    return torch.cat(rows), row_of_pair[arrival], counts, arrival
