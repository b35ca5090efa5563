"""`index_scores` and `index_topk`, over pages of keys in the queries' dtype or in FP8.

A score is a GEMM with keys as rows and heads as columns, and a sum over the heads in fp32. For many tokens of a
sequence a program keeps a tile of keys and loops over tokens, for a single token it loops over keys; both compute a
score in the same way, with the same bits. A position without a slot scores NaN, which is selected last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import PagedLayout
from ..kv_format import FP8_CACHE
from ..registry import register
from .attention import find_blocks, find_sequence
from .launch import decode_e4m3, dot, has_fp8, round_to
from .token_tiles import token_tiles
from .topk import select_best

CHUNK_KEYS = 2048
"""Keys per program for a single token."""
TILE_TOKENS = 64
"""Tokens per program for a tile of keys."""
MAX_SCORE_BYTES = 256 << 20


@triton.jit
def _load_keys(
    keys,
    scales,
    positions,
    inside,
    table,
    max_blocks,
    block_size,
    num_blocks,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """-> keys [n, BLOCK_DIM] in DTYPE, exact for FP8, and their scales [n], NaN for a key without block.

    If block_size is a multiple of 16, so are the addresses of FP8 keys, which the compiler sees in the factors.
    """
    block = find_blocks(positions, inside, table, max_blocks, block_size)
    found = (block >= 0) & (block < num_blocks)
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    first = block.to(tl.int64) * block_size
    slot = first + positions % block_size
    unit = tl.where(found, 1.0, float("nan"))
    mask = found[:, None] & (columns < DIM)
    if FP8:  # a page is codes | scales, 4 bytes per key; `scales` is the same memory
        codes = tl.load(keys + first[:, None] * 4 + slot[:, None] * DIM + columns, mask=mask, other=0)
        scale = tl.load(scales + (first + block_size) * (DIM // 4) + slot, mask=found, other=0.0) * unit
        key = codes.to(tl.float8e4nv, bitcast=True) if NATIVE_FP8 else decode_e4m3(codes)
        return round_to(key.to(tl.float32), DTYPE), scale
    else:
        return tl.load(keys + slot[:, None] * DIM + columns, mask=mask, other=0.0), unit


@triton.jit
def _load_queries(
    q,
    q_head_stride,
    weights,
    num_heads,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """-> one token's queries [BLOCK_HEADS, BLOCK_DIM] and weights [BLOCK_HEADS]."""
    heads = tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (heads < num_heads)[:, None] & (columns < DIM)
    weight = tl.load(weights + heads, mask=heads < num_heads, other=0.0)
    return tl.load(q + heads[:, None] * q_head_stride + columns, mask=mask, other=0.0), weight


@triton.jit
def _score(key, query, weight):
    """Sum over heads of weight * relu(query . key), for a tile of keys."""
    dots = dot(key, tl.trans(query), tl.zeros([key.shape[0], query.shape[0]], tl.float32))
    return tl.sum(weight[None, :] * tl.where(dots < 0.0, 0.0, dots), axis=1)  # propagates NaN


@triton.jit
def token_scores_kernel(
    q,
    q_token_stride,
    q_head_stride,
    weights,
    keys,
    scales,
    block_tables,
    cu_seqlens_q,
    positions,
    scores,
    scores_stride,
    num_heads,
    num_sequences,
    unscored,
    max_blocks,
    block_size,
    num_blocks,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of one token for a chunk of its context; none when the context has at most `unscored` positions."""
    token = tl.program_id(0).to(tl.int64)
    length = tl.load(positions + token).to(tl.int32) + 1
    begin = tl.program_id(1) * CHUNK_KEYS
    end = tl.minimum(begin + CHUNK_KEYS, length)
    if length <= unscored or begin >= end:
        return
    query, weight = _load_queries(
        q + token * q_token_stride,
        q_head_stride,
        weights + token * num_heads,
        num_heads,
        DIM,
        BLOCK_DIM,
        BLOCK_HEADS,
    )
    sequence = find_sequence(cu_seqlens_q, num_sequences, token, BLOCK_SEQUENCES)
    table = block_tables + sequence.to(tl.int64) * max_blocks
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        entries = start + tl.arange(0, BLOCK_KEYS)
        key, scale = _load_keys(
            keys,
            scales,
            entries,
            entries < end,
            table,
            max_blocks,
            block_size,
            num_blocks,
            query.dtype,
            DIM,
            BLOCK_DIM,
            FP8,
            NATIVE_FP8,
        )
        score = _score(key, query, weight) * scale
        tl.store(scores + token * scores_stride + entries, score, mask=entries < end)


@triton.jit
def tile_scores_kernel(
    q,
    q_token_stride,
    q_head_stride,
    weights,
    keys,
    scales,
    block_tables,
    tile_sequences,
    tile_tokens,
    cu_seqlens_q,
    positions,
    scores,
    scores_stride,
    num_heads,
    num_sequences,
    unscored,
    max_blocks,
    block_size,
    num_blocks,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of up to TILE_TOKENS tokens of one sequence for one tile of its keys."""
    sequence = tl.load(tile_sequences + tl.program_id(1)).to(tl.int64)
    if sequence >= num_sequences:
        return
    first = tl.load(tile_tokens + tl.program_id(1))
    last = tl.minimum(first + TILE_TOKENS, tl.load(cu_seqlens_q + sequence + 1))
    tokens = first + tl.arange(0, TILE_TOKENS)
    longest = tl.max(tl.load(positions + tokens, mask=tokens < last, other=-1), axis=0).to(tl.int32) + 1
    begin = tl.program_id(0) * BLOCK_KEYS
    if longest <= unscored or begin >= longest:
        return
    entries = begin + tl.arange(0, BLOCK_KEYS)
    table = block_tables + sequence * max_blocks
    key, scale = _load_keys(
        keys,
        scales,
        entries,
        entries < longest,
        table,
        max_blocks,
        block_size,
        num_blocks,
        q.dtype.element_ty,
        DIM,
        BLOCK_DIM,
        FP8,
        NATIVE_FP8,
    )
    for index in tl.range(first, last, num_stages=STAGES):
        token = tl.cast(index, tl.int64)
        query, weight = _load_queries(
            q + token * q_token_stride,
            q_head_stride,
            weights + token * num_heads,
            num_heads,
            DIM,
            BLOCK_DIM,
            BLOCK_HEADS,
        )
        length = tl.load(positions + token).to(tl.int32) + 1
        score = _score(key, query, weight) * scale
        tl.store(scores + token * scores_stride + entries, score, mask=entries < length)


def score_options(dtype: torch.dtype) -> dict[str, int]:
    """Launch options of the two kernels."""
    if dtype == torch.float32:
        return {"BLOCK_KEYS": 32, "STAGES": 1, "num_warps": 4}
    return {"BLOCK_KEYS": 128, "STAGES": 2, "num_warps": 4}


def paged_scores(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    layout: PagedLayout,
    *,
    unscored: int,
) -> Tensor:
    """Scores of each token for its context -> [T, positions in the table] fp32, undefined beyond positions[t].

    keys: as for `index_topk`. Contexts of at most `unscored` positions are left out.
    """
    fp8 = keys.dtype == FP8_CACHE
    num_tokens, num_heads, dim = q.shape
    num_sequences, max_blocks = layout.block_tables.shape
    device = q.device
    scores = torch.empty(num_tokens, max_blocks * layout.block_size, dtype=torch.float32, device=device)
    if scores.numel() == 0:
        return scores
    if fp8 and dim not in (32, 64, 128):  # a single scale, and a width that the kernel supports
        raise ValueError(f"FP8 index keys have 32, 64 or 128 columns on a GPU, not {dim}")
    pages = (keys, keys.view(torch.float32) if fp8 else weights, layout.block_tables)
    sizes = (max_blocks, layout.block_size, len(keys))
    options = score_options(q.dtype) | {
        "DIM": dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
        "BLOCK_HEADS": max(16, triton.next_power_of_2(num_heads)),
        "FP8": fp8,
        "NATIVE_FP8": has_fp8(device),
    }
    queries = (q, q.stride(0), q.stride(1), weights)
    if num_tokens >= 4 * num_sequences:
        tile_sequences, tile_tokens = token_tiles(layout.cu_seqlens_q, num_tokens, TILE_TOKENS)
        tile_scores_kernel[(triton.cdiv(scores.shape[1], options["BLOCK_KEYS"]), tile_sequences.shape[0])](
            *queries,
            *pages,
            tile_sequences,
            tile_tokens,
            layout.cu_seqlens_q,
            layout.positions,
            scores,
            scores.stride(0),
            num_heads,
            num_sequences,
            unscored,
            *sizes,
            TILE_TOKENS=TILE_TOKENS,
            **options,
        )
    else:
        token_scores_kernel[(num_tokens, triton.cdiv(scores.shape[1], CHUNK_KEYS))](
            *queries,
            *pages,
            layout.cu_seqlens_q,
            layout.positions,
            scores,
            scores.stride(0),
            num_heads,
            num_sequences,
            unscored,
            *sizes,
            CHUNK_KEYS=CHUNK_KEYS,
            BLOCK_SEQUENCES=triton.next_power_of_2(num_sequences),
            **options,
        )
    return scores


@register("index_topk", "triton")
def index_topk_triton(q: Tensor, weights: Tensor, keys: Tensor, layout: PagedLayout, topk: int) -> Tensor:
    """Score and select, for a bounded number of tokens at a time."""
    q, weights = q if q.stride(-1) == 1 else q.contiguous(), weights.contiguous()
    num_tokens = q.shape[0]
    positions_per_row = max(1, layout.block_tables.shape[1] * layout.block_size)
    step = max(1, MAX_SCORE_BYTES // (4 * positions_per_row))
    parts = []
    for first in range(0, max(num_tokens, 1), step):
        last = min(first + step, num_tokens)
        part = layout
        if last - first < num_tokens:
            bounds = layout.cu_seqlens_q.clamp(first, last) - first
            part = PagedLayout(layout.block_tables, bounds, layout.positions[first:last], layout.block_size)
        scores = paged_scores(q[first:last], weights[first:last], keys, part, unscored=topk)
        parts.append(select_best(scores, part.positions, topk, extra=1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@register("index_scores", "triton")
def index_scores_triton(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    q = q.contiguous()
    weights = weights.contiguous()
    keys = keys.contiguous()
    num_tokens, num_keys = q.shape[0], keys.shape[0]
    if num_keys == 0:
        return q.new_empty(num_tokens, 0, dtype=torch.float32)
    layout = PagedLayout(  # every token sees all keys, in one block
        torch.zeros(num_tokens, 1, dtype=torch.int32, device=q.device),
        torch.arange(num_tokens + 1, dtype=torch.int32, device=q.device),
        torch.full((num_tokens,), num_keys - 1, device=q.device),
        num_keys,
    )
    return paged_scores(q, weights, keys.view(1, -1), layout, unscored=0)
