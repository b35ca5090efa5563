"""Sampling on the device: the highest logit of a row, sums of its weights per chunk of ids, then the drawn id.

Truncation searches for thresholds two bits at a time, one program per row, in integers, so it is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register

CHUNK = 1024
"""Ids per chunk, whose weights are summed before the chunks are; part of the numeric contract."""


@triton.jit
def _highest_kernel(logits, highest, tokens, stride, vocab_size, BLOCK: tl.constexpr):
    """Highest logit of the row and its first id; id -1 and a non-finite logit if the row cannot be sampled."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    values = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    ids = lanes
    bad = lanes < 0
    for start in tl.range(0, vocab_size, BLOCK):
        columns = start + lanes
        x = tl.load(logits + row * stride + columns, mask=columns < vocab_size, other=-float("inf"))
        bad = bad | (x != x)
        ids = tl.where(x > values, columns, ids)
        values = tl.maximum(values, x)
    best = tl.max(values)
    token = tl.min(tl.where(values == best, ids, vocab_size))
    failed = (tl.max(bad.to(tl.int32)) > 0) | (best == float("inf")) | (best == -float("inf"))
    tl.store(highest + row, tl.where(failed, float("nan"), best))
    tl.store(tokens + row, tl.where(failed, -1, token).to(tl.int64))


@triton.jit
def _weights(logits, best, temperature, columns, vocab_size):
    x = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf"))
    return tl.exp((x - best).to(tl.float64) / temperature.to(tl.float64))


@triton.jit
def _chunk_sums_kernel(logits, highest, temperatures, sums, stride, vocab_size, num_chunks, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature, best = tl.load(temperatures + row), tl.load(highest + row)
    if (temperature > 0) & (best == best):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        weights = _weights(logits + row * stride, best, temperature, columns, vocab_size)
        tl.store(sums + row * num_chunks + chunk, tl.sum(weights))


@triton.jit
def _draw_kernel(
    logits,
    highest,
    temperatures,
    sums,
    seeds,
    positions,
    sample_indices,
    tokens,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, best = tl.load(temperatures + row), tl.load(highest + row)
    if (temperature > 0) & (best == best):
        position = tl.load(positions + row).to(tl.uint64)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
        sample = tl.load(sample_indices + row).to(tl.uint32)
        word0, word1, _, _ = tl.philox(tl.load(seeds + row), low, high, sample, sample * 0)
        bits = ((word0 >> 5).to(tl.int64) << 26) | (word1 >> 6).to(tl.int64)
        uniform = bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53

        chunks = tl.arange(0, CHUNKS)
        cumulative = tl.cumsum(tl.load(sums + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0), 0)
        total = tl.sum(tl.where(chunks == num_chunks - 1, cumulative, 0.0))
        target = uniform * total
        chunk = tl.sum((cumulative <= target).to(tl.int32))
        base = tl.sum(tl.where(chunks == chunk - 1, cumulative, 0.0))

        lanes = tl.arange(0, CHUNK)
        weights = _weights(logits + row * stride, best, temperature, chunk * CHUNK + lanes, vocab_size)
        within = base + tl.cumsum(weights, 0)
        chosen = tl.sum((within <= target).to(tl.int32))
        # A chunk's sum and the sums within it round differently: if none exceeds, take the last token with a weight.
        chosen = tl.minimum(chosen, tl.max(tl.where(weights > 0, lanes, 0)))
        tl.store(tokens + row, (chunk * CHUNK + chosen).to(tl.int64))


@triton.jit
def _rank(x):
    """fp32 -> uint32 of the same order; -0 equals 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _exact_weights(x, best, temperature, min_p):
    """Weights as multiples of 2^-40; 0 below min_p."""
    weights = tl.exp((x - best) / temperature)
    return tl.where(weights >= min_p, (weights * 1099511627776.0).to(tl.int64), 0)


@triton.jit
def _reached(logits, best, temperature, min_p, low, step, vocab_size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Number (with COUNT) or weight of the ranks of at least low + step, low + 2 step and low + 3 step."""
    lanes = tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK,), dtype=tl.int64)
    second = tl.zeros((BLOCK,), dtype=tl.int64)
    third = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in tl.range(0, vocab_size, BLOCK):
        inside = start + lanes < vocab_size
        x = tl.load(logits + start + lanes, mask=inside, other=-float("inf"))
        rank = _rank(x)
        if COUNT:
            amount = inside.to(tl.int64)
        else:
            amount = _exact_weights(x, best, temperature, min_p)
        first += tl.where(rank >= low + step, amount, 0)
        second += tl.where(rank >= low + 2 * step, amount, 0)
        third += tl.where(rank >= low + 3 * step, amount, 0)
    return tl.sum(first), tl.sum(second), tl.sum(third)


@triton.jit
def _above(logits, best, temperature, min_p, threshold, vocab_size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Number (with COUNT) or weight of the ranks above the threshold."""
    above, _second, _third = _reached(
        logits, best, temperature, min_p, threshold, tl.full([], 1, tl.uint32), vocab_size, COUNT, BLOCK
    )
    return above


@triton.jit
def _threshold(logits, best, temperature, min_p, wanted, vocab_size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest rank that reaches `wanted`."""
    threshold = tl.full([], 0, tl.uint32)
    step = tl.full([], 0x40000000, tl.uint32)
    for _ in range(16):
        first, second, third = _reached(logits, best, temperature, min_p, threshold, step, vocab_size, COUNT, BLOCK)
        threshold += tl.where(first >= wanted, step, 0).to(tl.uint32)
        threshold += tl.where(second >= wanted, step, 0).to(tl.uint32)
        threshold += tl.where(third >= wanted, step, 0).to(tl.uint32)
        step = step >> 2
    return threshold


@triton.jit
def _weight_of_rank(rank, best, temperature, min_p):
    bits = tl.where((rank >> 31) != 0, rank & 0x7FFFFFFF, rank ^ 0xFFFFFFFF)
    return _exact_weights(bits.to(tl.float32, bitcast=True), best, temperature, min_p)


@triton.jit
def _truncate_kernel(logits, out, highest, temperatures, top_k, top_p, min_p, stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * vocab_size
    temperature, best = tl.load(temperatures + row), tl.load(highest + row)
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    drawn = (temperature > 0) & (best == best)
    least = tl.where(drawn, least, 0.0)
    temperature = tl.where(drawn, temperature, 1.0)

    # Keep all above the rank, and the first `ties` of those equal to it.
    rank = tl.full([], 0, tl.uint32)
    ties = tl.full([], 0, tl.int64)
    if drawn & (k > 0) & (k < vocab_size):
        rank = _threshold(logits, best, temperature, least, k, vocab_size, True, BLOCK)
        ties = k - _above(logits, best, temperature, least, rank, vocab_size, True, BLOCK)
    if drawn & (p < 1.0):
        above = _above(logits, best, temperature, least, rank, vocab_size, False, BLOCK)
        total = above + ties * _weight_of_rank(rank, best, temperature, least)
        wanted = tl.maximum(tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
        rank = _threshold(logits, best, temperature, least, wanted, vocab_size, False, BLOCK)
        above = _above(logits, best, temperature, least, rank, vocab_size, False, BLOCK)
        weight = tl.maximum(_weight_of_rank(rank, best, temperature, least), 1)
        ties = (wanted - above + weight - 1) // weight

    lanes = tl.arange(0, BLOCK)
    seen = tl.full([], 0, tl.int64)
    for start in tl.range(0, vocab_size, BLOCK):
        inside = start + lanes < vocab_size
        x = tl.load(logits + start + lanes, mask=inside, other=-float("inf"))
        here = _rank(x)
        equal = (here == rank) & inside
        place = seen + tl.cumsum(equal.to(tl.int64), 0)
        stays = (here > rank) | (equal & (place <= ties))
        stays = (stays & (tl.exp((x - best) / temperature) >= least)) | (drawn == 0)
        tl.store(out + start + lanes, tl.where(stays, x, -float("inf")), mask=inside)
        seen += tl.sum(equal.to(tl.int64))


@triton.jit
def _mask_kernel(logits, bitmask, out, stride, mask_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    words = tl.load(bitmask + row * mask_stride + columns // 32, mask=inside, other=0)
    x = tl.load(logits + row * stride + columns, mask=inside, other=0.0)
    allowed = ((words >> (columns % 32)) & 1) != 0
    removed = (x < float("inf")) & (allowed == 0)  # a row that cannot be sampled stays one
    tl.store(out + row * vocab_size + columns, tl.where(removed, -float("inf"), x), mask=inside)


@triton.jit
def _logprob_parts_kernel(
    logits, token_ids, highest, sums, earlier, stride, vocab_size, num_chunks, num_tokens, CHUNK: tl.constexpr
):
    """Sum of exp(logit - highest) over a chunk of a row, and how many of its tokens rank before the first token."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = tl.load(token_ids + row * num_tokens)
    if token >= 0:
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * stride + columns, mask=columns < vocab_size, other=-float("inf"))
        chosen = tl.load(logits + row * stride + token)
        before = (x > chosen) | ((x == chosen) & (columns < token))
        place = row * num_chunks + chunk
        tl.store(sums + place, tl.sum(tl.exp(x - tl.load(highest + row)).to(tl.float64)))
        tl.store(earlier + place, tl.sum(before.to(tl.int32)))


@triton.jit
def _logprob_kernel(
    logits,
    token_ids,
    highest,
    sums,
    earlier,
    logprobs,
    ranks,
    stride,
    num_chunks,
    num_tokens,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(token_ids + row * num_tokens)
    places = row * num_tokens + tl.arange(0, TOKENS)
    here = tl.arange(0, TOKENS) < num_tokens
    logprob = tl.full([TOKENS], float("nan"), tl.float32)
    rank = tl.full([], 0, tl.int64)
    if first >= 0:
        chunks = tl.arange(0, CHUNKS)
        total = tl.sum(tl.load(sums + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0))
        count = tl.sum(tl.load(earlier + row * num_chunks + chunks, mask=chunks < num_chunks, other=0))
        tokens = tl.load(token_ids + places, mask=here, other=0)
        shifted = tl.load(logits + row * stride + tokens, mask=here, other=0.0) - tl.load(highest + row)
        logprob = shifted - tl.log(total).to(tl.float32)
        rank = 1 + count.to(tl.int64)
    tl.store(logprobs + places, logprob, mask=here)
    tl.store(ranks + row, rank)


@register("sample_tokens", "triton")
def _sample_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    logits = _rows(logits)
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    highest, tokens = _highest(logits)
    if not num_rows:
        return tokens
    temperatures, seeds, positions, sample_indices = (
        values.contiguous() for values in (temperatures, seeds, positions, sample_indices)
    )
    sums = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=logits.device)
    stride = logits.stride(0)
    _chunk_sums_kernel[(num_rows, num_chunks)](
        logits, highest, temperatures, sums, stride, vocab_size, num_chunks, CHUNK=CHUNK, num_warps=4
    )
    _draw_kernel[(num_rows,)](
        logits,
        highest,
        temperatures,
        sums,
        seeds,
        positions,
        sample_indices,
        tokens,
        stride,
        vocab_size,
        num_chunks,
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=4,
    )
    return tokens


@register("mask_logits", "triton")
def _mask_logits(logits: Tensor, bitmask: Tensor) -> Tensor:
    logits, bitmask = _rows(logits), bitmask.contiguous()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if out.numel():
        num_rows, vocab_size = logits.shape
        _mask_kernel[(num_rows, triton.cdiv(vocab_size, CHUNK))](
            logits, bitmask, out, logits.stride(0), bitmask.stride(0), vocab_size, BLOCK=CHUNK, num_warps=4
        )
    return out


@register("truncate_logits", "triton")
def _truncate_logits(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    logits = _rows(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if out.numel():
        highest, _ = _highest(logits)
        limits = (temperatures.contiguous(), top_k.contiguous(), top_p.contiguous(), min_p.contiguous())
        block = min(8192, triton.next_power_of_2(logits.shape[1]))
        _truncate_kernel[(len(logits),)](
            logits, out, highest, *limits, logits.stride(0), logits.shape[1], BLOCK=block, num_warps=16
        )
    return out


@register("token_logprobs", "triton")
def _token_logprobs(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    logits, token_ids = _rows(logits), token_ids.contiguous()
    num_rows, vocab_size = logits.shape
    num_chunks, num_tokens = triton.cdiv(vocab_size, CHUNK), token_ids.shape[1]
    logprobs, ranks = logits.new_empty(token_ids.shape), token_ids.new_empty(num_rows)
    if num_rows:
        highest, _ = _highest(logits)
        sums = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=logits.device)
        earlier = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
        rows = (logits, token_ids, highest, sums, earlier)
        stride = logits.stride(0)
        _logprob_parts_kernel[(num_rows, num_chunks)](
            *rows, stride, vocab_size, num_chunks, num_tokens, CHUNK=CHUNK, num_warps=4
        )
        _logprob_kernel[(num_rows,)](
            *rows,
            logprobs,
            ranks,
            stride,
            num_chunks,
            num_tokens,
            CHUNKS=triton.next_power_of_2(num_chunks),
            TOKENS=triton.next_power_of_2(num_tokens),
            num_warps=4,
        )
    return logprobs, ranks


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Highest logit of each row and its first token; NaN and -1 if the row cannot be sampled."""
    highest, tokens = logits.new_empty(len(logits)), torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _highest_kernel[(len(logits),)](
            logits, highest, tokens, logits.stride(0), logits.shape[1], BLOCK=4096, num_warps=8
        )
    return highest, tokens


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
