"""`mha_attention`: attention of prompt chunks in the MHA form, with keys and values per head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import PagedLayout
from ..kv_format import read_latents
from ..linear import PackedWeight
from ..registry import register
from .launch import dot, round_to, shared_memory
from .linear import batched_linear_triton
from .token_tiles import token_tiles

BLOCK_TOKENS = 128
"""Tokens per tile, fixed so that the matrix instructions do not depend on the length of a chunk."""
BLOCK_KEYS = 64
MAX_KEY_BYTES = 512 << 20
"""Maximum bytes of keys and values computed at a time; the grouping of heads does not change results."""
_LOG2_E = 1.4426950408889634


@triton.jit
def prefill_kernel(
    q_nope,
    q_nope_token_stride,
    q_nope_head_stride,
    q_rope,
    q_rope_token_stride,
    q_rope_head_stride,
    k_nope,
    k_nope_token_stride,
    k_nope_head_stride,
    k_rope,
    k_rope_token_stride,
    v,
    v_token_stride,
    v_head_stride,
    tile_sequences,
    tile_tokens,
    cu_seqlens_q,
    cu_seqlens_k,
    positions,
    out,
    num_heads,
    num_sequences,
    scale,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of a tile of tokens of one sequence. `scale` includes log2(e)."""
    sequence = tl.load(tile_sequences + tl.program_id(0)).to(tl.int64)
    if sequence >= num_sequences:
        return
    first = tl.load(tile_tokens + tl.program_id(0))
    last = tl.minimum(first + BLOCK_TOKENS, tl.load(cu_seqlens_q + sequence + 1))
    head = tl.program_id(1).to(tl.int64)
    tokens = first + tl.arange(0, BLOCK_TOKENS)
    here = tokens < last
    position = tl.load(positions + tokens, mask=here, other=-1).to(tl.int32)
    num_keys = tl.max(position, axis=0) + 1
    nopes, ropes, values = tl.arange(0, BLOCK_NOPE), tl.arange(0, BLOCK_ROPE), tl.arange(0, BLOCK_VALUE)
    rows = tokens.to(tl.int64)[:, None]
    q_nope += rows * q_nope_token_stride + head * q_nope_head_stride
    q_rope += rows * q_rope_token_stride + head * q_rope_head_stride
    query = tl.load(q_nope + nopes[None, :], mask=here[:, None] & (nopes < NOPE)[None, :], other=0.0)
    query_rope = tl.load(q_rope + ropes[None, :], mask=here[:, None] & (ropes < ROPE)[None, :], other=0.0)
    begin = tl.load(cu_seqlens_k + sequence).to(tl.int64)
    k_nope += begin * k_nope_token_stride + head * k_nope_head_stride
    k_rope += begin * k_rope_token_stride
    v += begin * v_token_stride + head * v_head_stride

    maximum = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    output = tl.zeros([BLOCK_TOKENS, BLOCK_VALUE], tl.float32)
    for start in tl.range(0, num_keys, BLOCK_KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_KEYS)
        row, exists = keys.to(tl.int64)[:, None], (keys < num_keys)[:, None]
        key = tl.load(k_nope + row * k_nope_token_stride + nopes[None, :], mask=exists & (nopes < NOPE), other=0.0)
        key_rope = tl.load(k_rope + row * k_rope_token_stride + ropes[None, :], mask=exists & (ropes < ROPE), other=0.0)
        value = tl.load(v + row * v_token_stride + values[None, :], mask=exists & (values < VALUE), other=0.0)
        scores = tl.zeros([BLOCK_TOKENS, BLOCK_KEYS], tl.float32)
        scores = dot(query, tl.trans(key), scores)
        scores = dot(query_rope, tl.trans(key_rope), scores) * scale
        scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
        # a tile without keys of a row leaves the row's bits unchanged
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(maximum - base)
        total = total * rescale + tl.sum(weights, axis=1)
        output = dot(round_to(weights, value.dtype), value, output * rescale[:, None])
        maximum = new_maximum

    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    out += (rows * num_heads + head) * VALUE
    stored = here[:, None] & (values < VALUE)[None, :]
    tl.store(out + values[None, :], round_to(output, out.dtype.element_ty), mask=stored)


def prefill_options(dtype: torch.dtype, shared_bytes: int) -> dict[str, int]:
    """Launch options of `prefill_kernel` by shared memory; BLOCK_KEYS is part of the numeric contract."""
    if dtype == torch.float32:
        return {"BLOCK_TOKENS": 32, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4}
    return {
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "BLOCK_KEYS": BLOCK_KEYS,
        "STAGES": 3 if shared_bytes >= 140 << 10 else 2,
        "num_warps": 8,
    }


def prefill_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """softmax(scale * q . key) . value per token and head -> [T, h, Dv] in the queries' dtype.

    q_nope: [T, h, Dn], q_rope: [T, h, Dr], k_nope: [S, h, Dn], k_rope: [S, Dr] shared by the heads, v: [S, h, Dv], last
    dimensions contiguous. Tokens [cu_seqlens_q[b], cu_seqlens_q[b + 1]) belong to sequence b, whose keys begin at row
    cu_seqlens_k[b], the first of them at position 0; a token attends to positions 0..positions[t]. A chunk of a
    prompt is passed with the keys of the chunks before it.

    Tiles of keys begin at fixed positions, so a row's bits depend on its own context only.
    """
    num_tokens, num_heads, nope_dim = q_nope.shape
    if q_rope.shape[:2] != q_nope.shape[:2] or k_nope.shape[1:] != q_nope.shape[1:]:
        raise ValueError(
            f"prefill_attention needs q_nope [T, h, Dn], q_rope [T, h, Dr] and k_nope [S, h, Dn], got "
            f"{list(q_nope.shape)}, {list(q_rope.shape)}, {list(k_nope.shape)}"
        )
    if k_rope.shape != (k_nope.shape[0], q_rope.shape[2]) or v.shape[:2] != k_nope.shape[:2]:
        raise ValueError(
            f"prefill_attention needs k_rope [S, Dr] and v [S, h, Dv], got {list(k_rope.shape)}, {list(v.shape)}"
        )
    out = torch.empty(num_tokens, num_heads, v.shape[2], dtype=q_nope.dtype, device=q_nope.device)
    if out.numel() == 0:
        return out
    options = prefill_options(q_nope.dtype, shared_memory(q_nope.device))
    sequences, tokens = token_tiles(cu_seqlens_q, num_tokens, options["BLOCK_TOKENS"])
    dims = {"NOPE": nope_dim, "ROPE": q_rope.shape[2], "VALUE": v.shape[2]}
    prefill_kernel[(sequences.shape[0], num_heads)](
        q_nope,
        q_nope.stride(0),
        q_nope.stride(1),
        q_rope,
        q_rope.stride(0),
        q_rope.stride(1),
        k_nope,
        k_nope.stride(0),
        k_nope.stride(1),
        k_rope,
        k_rope.stride(0),
        v,
        v.stride(0),
        v.stride(1),
        sequences,
        tokens,
        cu_seqlens_q,
        cu_seqlens_k,
        positions,
        out,
        num_heads,
        cu_seqlens_q.shape[0] - 1,
        scale * _LOG2_E,
        **dims,
        **{f"BLOCK_{name}": max(16, triton.next_power_of_2(dim)) for name, dim in dims.items()},
        **options,
    )
    return out


@register("mha_attention", "triton")
def _mha_attention(
    q: Tensor, kv_cache: Tensor, layout: PagedLayout, w_uk: PackedWeight, w_uv: PackedWeight, scale: float
) -> Tensor:
    """Compute keys and values of all contexts first, for as many heads at a time as fit into MAX_KEY_BYTES."""
    num_heads, key_dim = q.shape[1:]
    latent_dim, nope_dim = w_uk.in_features, w_uk.out_features
    slots, cu_seqlens_k = layout.contexts
    gathered = read_latents(kv_cache[slots], latent_dim, key_dim - nope_dim, q.dtype)
    bytes_per_head = max(1, len(slots) * (nope_dim + w_uv.out_features) * q.element_size())
    at_once = max(1, min(num_heads, MAX_KEY_BYTES // bytes_per_head))
    out = []
    for first in range(0, num_heads, at_once):
        heads = slice(first, min(first + at_once, num_heads))
        latents = gathered[:, None, :latent_dim].expand(-1, heads.stop - first, -1)
        part = prefill_attention(
            q[:, heads, :nope_dim],
            q[:, heads, nope_dim:],
            batched_linear_triton(latents, w_uk.matrices(heads)),
            gathered[:, latent_dim:],
            batched_linear_triton(latents, w_uv.matrices(heads)),
            layout.cu_seqlens_q,
            cu_seqlens_k,
            layout.positions,
            scale,
        )
        out.append(part)
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)
