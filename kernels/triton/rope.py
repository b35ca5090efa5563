"""Rotary position embedding, all heads of a token at once, and writes to the KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register
from ..rope import RopeTable
from .launch import has_fp8, round_to
from .norm import rms_norm_rows
from .quant import group_maximum, group_scale, to_e4m3

TOKENS_PER_PROGRAM = 4
"""Tokens per program of the kernels that write the KV cache."""


@triton.jit
def _rotate(x, y, mask, cos, sin, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotate the pairs of rows starting at x [ROWS, 1] into rows starting at y; mask is [ROWS, 1]."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)[None, :]
        wide = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(wide, (ROWS, HALF, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * HALF))
        tl.store(y + columns, round_to(turned, y.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, HALF)[None, :]
        a = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + columns, round_to(a * cos - b * sin, y.dtype.element_ty), mask=mask)
        tl.store(y + HALF + columns, round_to(b * cos + a * sin, y.dtype.element_ty), mask=mask)


@triton.jit
def _angles(table, positions, tokens, mask, num_positions, HALF: tl.constexpr):
    """(cos, sin) [ROWS, HALF] of the positions of tokens [ROWS, 1]; NaN for a position outside the table."""
    position = tl.load(positions + tokens, mask=mask, other=0)
    inside = (position >= 0) & (position < num_positions)
    place = table + position * (2 * HALF) + tl.arange(0, HALF)[None, :]
    return tl.load(place, mask=inside, other=float("nan")), tl.load(place + HALF, mask=inside, other=float("nan"))


@triton.jit
def _rope_kernel(
    x,
    table,
    positions,
    y,
    stride_t,
    stride_h,
    num_heads,
    num_positions,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    cos, sin = _angles(table, positions, token + heads * 0, heads >= 0, num_positions, HALF)
    source = x + token * stride_t + heads * stride_h
    target = y + (token * num_heads + heads) * (2 * HALF)
    _rotate(source, target, heads < num_heads, cos, sin, HEADS, HALF, INTERLEAVED)


@register("apply_rope", "triton")
def _apply_rope(x: Tensor, rope: RopeTable) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_tokens, num_heads, dim = x.shape
    _check_width(dim)
    if out.numel():
        x = x if x.stride(2) == 1 else x.contiguous()
        heads = min(triton.next_power_of_2(num_heads), max(1, 8192 // dim))
        _rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            x,
            rope.table.contiguous(),
            rope.positions.contiguous(),
            out,
            x.stride(0),
            x.stride(1),
            num_heads,
            rope.table.shape[0],
            HEADS=heads,
            HALF=dim // 2,
            INTERLEAVED=rope.interleaved,
            num_warps=min(8, max(1, heads * dim // 1024)),
            enable_fp_fusion=False,  # each operation rounds
        )
    return out


@triton.jit
def _write_latents_kernel(
    latent,
    rope_key,
    table,
    positions,
    slots,
    kv_cache,
    stride_l,
    stride_r,
    stride_s,
    num_positions,
    num_tokens,
    latent_dim,
    TOKENS: tl.constexpr,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = tokens < num_tokens
    entry = kv_cache + tl.load(slots + tokens, mask=inside, other=0) * stride_s
    columns = tl.arange(0, LATENT)[None, :]
    mask = inside & (columns < latent_dim)
    tl.store(entry + columns, tl.load(latent + tokens * stride_l + columns, mask=mask), mask=mask)
    cos, sin = _angles(table, positions, tokens, inside, num_positions, HALF)
    _rotate(rope_key + tokens * stride_r, entry + latent_dim, inside, cos, sin, TOKENS, HALF, INTERLEAVED)


@triton.jit
def _write_fp8_latents_kernel(
    latent,
    rope_key,
    table,
    positions,
    slots,
    codes,
    scales,
    rope_keys,
    stride_l,
    stride_r,
    stride_s,
    num_positions,
    num_tokens,
    num_groups,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """codes, scales and rope_keys are the cache viewed as FP8, fp32 and bf16; stride_s is in bytes."""
    rows = tl.program_id(0).to(tl.int64) * (TOKENS * GROUPS) + tl.arange(0, TOKENS * GROUPS)
    token, group = rows // GROUPS, rows % GROUPS
    inside = (token < num_tokens) & (group < num_groups)
    start = tl.load(slots + token, mask=inside, other=0) * stride_s
    place = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    wide = tl.load(latent + token[:, None] * stride_l + place, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = group_scale(group_maximum(wide), True)
    tl.store(codes + start[:, None] + place, to_e4m3(wide * (1.0 / scale)[:, None], NATIVE), mask=inside[:, None])
    tl.store(scales + start // 4 + num_groups * 32 + group, scale, mask=inside)

    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = tokens < num_tokens
    target = rope_keys + tl.load(slots + tokens, mask=inside, other=0) * (stride_s // 2) + num_groups * 66
    cos, sin = _angles(table, positions, tokens, inside, num_positions, HALF)
    _rotate(rope_key + tokens * stride_r, target, inside, cos, sin, TOKENS, HALF, INTERLEAVED)


@register("write_latents", "triton")
def _write_latents(
    kv_cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope: RopeTable,
) -> None:
    latent = rms_norm_rows(kv[:, : norm.shape[0]], norm, eps)
    _write_entries(latent, kv[:, norm.shape[0] :], rope, slots, kv_cache)


def _write_entries(latent: Tensor, rope_key: Tensor, rope: RopeTable, slots: Tensor, kv_cache: Tensor) -> None:
    """Write normed latents and rotated rope keys; NaN for a position outside the table, slots are not checked."""
    num_tokens, latent_dim = latent.shape
    if not num_tokens:
        return
    _check_width(rope_key.shape[1])
    latent = latent if latent.stride(1) == 1 else latent.contiguous()
    rope_key = rope_key if rope_key.stride(1) == 1 else rope_key.contiguous()
    inputs = (latent, rope_key, rope.table.contiguous(), rope.positions.contiguous(), slots.contiguous())
    strides = (latent.stride(0), rope_key.stride(0), kv_cache.stride(0), rope.table.shape[0], num_tokens)
    grid = (triton.cdiv(num_tokens, TOKENS_PER_PROGRAM),)
    half = rope_key.shape[1] // 2
    if kv_cache.dtype == torch.uint8:
        native, groups = has_fp8(latent.device), latent_dim // 128
        _write_fp8_latents_kernel[grid](
            *inputs,
            kv_cache.view(torch.float8_e4m3fn) if native else kv_cache,
            kv_cache.view(torch.float32),
            kv_cache.view(torch.bfloat16),
            *strides,
            groups,
            TOKENS=TOKENS_PER_PROGRAM,
            GROUPS=triton.next_power_of_2(groups),
            HALF=half,
            INTERLEAVED=rope.interleaved,
            NATIVE=native,
            num_warps=4,
            enable_fp_fusion=False,
        )
    else:
        _write_latents_kernel[grid](
            *inputs,
            kv_cache,
            *strides,
            latent_dim,
            TOKENS=TOKENS_PER_PROGRAM,
            LATENT=triton.next_power_of_2(latent_dim),
            HALF=half,
            INTERLEAVED=rope.interleaved,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _check_width(dim: int) -> None:
    if dim & (dim - 1):
        raise ValueError(f"the Triton kernels rotate vectors whose width is a power of two, got {dim}")
