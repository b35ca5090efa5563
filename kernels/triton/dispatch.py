"""`group_pairs`: a stable counting sort of (token, expert) pairs, which asks the device nothing.

Chunks of pairs count how many there are of each slot; then each pair finds its place: behind the pairs of lower slots,
behind those of its slot in earlier chunks, behind those of its slot in its own chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register

CHUNK = 128
"""Pairs of one program, which are compared with each other."""


@triton.jit
def _slots_of(topk_idx, slot_of, pairs, num_pairs, num_slots):
    """Slots of pairs; those without an expert come last, in a slot of their own."""
    expert = tl.load(topk_idx + pairs, mask=pairs < num_pairs, other=-1)
    slot = tl.load(slot_of + expert, mask=expert >= 0, other=num_slots)
    return tl.where(pairs < num_pairs, slot, -1).to(tl.int32)


@triton.jit
def _count_kernel(topk_idx, slot_of, chunk_counts, num_pairs, num_slots, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """chunk_counts[chunk, slot], for num_slots slots and the one of pairs without an expert."""
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


@register("group_pairs", "triton")
def _group_pairs(topk_idx: Tensor, slot_of: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
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
