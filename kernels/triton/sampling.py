"""Sampling on the device: the highest logit of a row, sums of its weights per chunk of ids, then the chosen id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register

CHUNK = 1024
"""Ids whose weights are added up before chunks are; part of what decides the bits."""


@triton.jit
def _highest_kernel(logits, highest, tokens, stride, vocab_size, BLOCK: tl.constexpr):
    """The row's highest logit and its first id; -1 and a logit that is not finite if the row cannot be sampled."""
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
        # Sums of a chunk and sums within it round differently: then the chunk's last token that has a weight.
        chosen = tl.minimum(chosen, tl.max(tl.where(weights > 0, lanes, 0)))
        tl.store(tokens + row, (chunk * CHUNK + chosen).to(tl.int64))


@register("sample_tokens", "triton")
def _sample_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    temperatures, seeds, positions, sample_indices = (
        values.contiguous() for values in (temperatures, seeds, positions, sample_indices)
    )
    highest = logits.new_empty(num_rows)
    sums = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=logits.device)
    stride = logits.stride(0)
    _highest_kernel[(num_rows,)](logits, highest, tokens, stride, vocab_size, BLOCK=4096, num_warps=8)
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
