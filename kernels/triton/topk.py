"""`topk_positions`: exact selection in integers alone, a chunk of a row in the registers of one program.

The best of a row are among the best of its chunks, so longer rows take two passes. Positions stay ascending throughout,
which keeps ties in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register

CHUNK = 16384
"""Scores per program; a count of them fits into 16 bits."""


@triton.jit
def topk_kernel(
    scores, row_stride, lengths, extra, listed, width, out, topk, LISTED: tl.constexpr, BLOCK: tl.constexpr
):
    """The best `topk` of a chunk of a row's positions, or of the chunk's positions in `listed`; then -1."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if LISTED:
        positions = tl.load(listed + row * width + entries, mask=entries < width, other=-1)
    else:
        positions = tl.where(entries < tl.load(lengths + row).to(tl.int32) + extra, entries, -1)
    present = positions >= 0
    score = tl.load(scores + row * row_stride + positions, mask=present, other=0.0)

    # Scores as unsigned integers of the same order: -0 equals 0; NaN and missing scores are below -infinity.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    rank = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    rank = tl.where(present & (score == score), rank, 0)

    # The largest threshold that at least `topk` ranks reach, bit by bit; 0 for fewer ranks.
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    num_present = tl.sum(present.to(tl.int32), axis=0)
    if num_present > topk:
        for _ in range(32):
            higher = threshold | bit
            reached = tl.sum((rank >= higher).to(tl.int32), axis=0) >= topk
            threshold = tl.where(reached, higher, threshold)
            bit = bit >> 1

    # Keep all above the threshold, and the first of those equal to it.
    above = rank > threshold
    equal = present & (rank == threshold)
    wanted = topk - tl.sum(above.to(tl.int32), axis=0)
    running = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), axis=0)
    num_equal = running & 0xFFFF
    out += (row * tl.num_programs(1) + tl.program_id(1)) * topk
    chosen = above | (equal & (num_equal <= wanted))
    tl.store(out + (running >> 16) + tl.minimum(num_equal, wanted) - 1, positions, mask=chosen)
    rest = tl.arange(0, BLOCK)
    tl.store(out + rest, -1, mask=(rest >= num_present) & (rest < topk))


@register("topk_positions", "triton")
def topk_positions_triton(scores: Tensor, lengths: Tensor, topk: int) -> Tensor:
    return select_best(scores, lengths.contiguous(), topk, extra=0)


def select_best(scores: Tensor, lengths: Tensor, topk: int, *, extra: int) -> Tensor:
    """`topk_positions` of the first lengths[t] + extra scores of each row."""
    if topk > CHUNK // 2:
        raise ValueError(f"topk_positions selects at most {CHUNK // 2} positions on this backend, got topk={topk}")
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, width = scores.shape
    selected = lengths  # not read in the first pass
    while True:
        block = min(CHUNK, max(1024, triton.next_power_of_2(max(width, topk))))
        chunks = max(1, triton.cdiv(width, block))
        listed, selected = selected, torch.empty(rows, chunks * topk, dtype=torch.int32, device=scores.device)
        if rows:
            topk_kernel[(rows, chunks)](
                scores,
                scores.stride(0),
                lengths,
                extra,
                listed,
                width,
                selected,
                topk,
                LISTED=listed is not lengths,
                BLOCK=block,
                num_warps=block // 1024,
            )
        if chunks == 1:
            return selected
        width = chunks * topk
