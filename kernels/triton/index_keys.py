"""`write_index_keys`: norm, rotary embedding, quantisation and store of index keys in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kv_format import FP8_CACHE, index_page_size
from ..quant import BLOCK
from ..registry import register
from ..rope import RopeTable
from .launch import has_fp8, round_to
from .quant import group_maximum, group_scale, to_e4m3

TOKENS_PER_PROGRAM = 4


@triton.jit
def _normed(row, columns, mask, mean, scale, weight, bias, DTYPE: tl.constexpr):
    """Columns [TOKENS, n] of the normed rows, rounded to DTYPE and widened again."""
    wide = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=mask, other=0.0)
    b = tl.load(bias + columns, mask=mask, other=0.0)
    return round_to((wide - mean) * scale * w + b, DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])  # a single token must run the same code, with the same sums, as many
def _write_index_keys_kernel(
    k,
    weight,
    bias,
    table,
    positions,
    slots,
    keys,
    codes,
    scales,
    stride_k,
    num_positions,
    num_tokens,
    dim,
    block_size,
    eps,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """`keys` in k's dtype, or in FP8 `codes` and `scales`, which are the same memory."""
    dtype: tl.constexpr = k.dtype.element_ty
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    columns = tl.arange(0, DIM)[None, :]
    mask = (tokens < num_tokens) & (columns < dim)
    row = k + tokens * stride_k
    wide = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(wide, axis=1, keep_dims=True) / dim
    centred = tl.where(mask, wide - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / dim + eps)

    # pairs of the first 2 HALF columns rotate: adjacent columns, or column i and column i + HALF
    turns = columns < 2 * HALF
    if INTERLEAVED:
        partner = tl.where(turns, columns ^ 1, columns)
        is_first = columns % 2 == 0
        angle = columns // 2
    else:
        partner = tl.where(turns, columns ^ HALF, columns)
        is_first = columns < HALF
        angle = columns % HALF
    own = _normed(row, columns, mask, mean, scale, weight, bias, dtype)
    other = _normed(row, partner, mask, mean, scale, weight, bias, dtype)
    position = tl.load(positions + tokens, mask=tokens < num_tokens, other=0)
    inside = turns & (position >= 0) & (position < num_positions)
    place = table + position * (2 * HALF) + angle
    cos = tl.load(place, mask=inside, other=float("nan"))
    sin = tl.load(place + HALF, mask=inside, other=float("nan"))
    turned = own * cos + tl.where(is_first, -other, other) * sin
    key = round_to(tl.where(turns, turned, own), dtype)

    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=0)
    if FP8:  # a page is codes | scales, 4 bytes per key
        first = slot // block_size * block_size
        value = key.to(tl.float32)
        group = group_scale(group_maximum(value), True)[:, None]
        tl.store(codes + first * 4 + slot * dim + columns, to_e4m3(value * (1.0 / group), NATIVE), mask=mask)
        tl.store(scales + (first + block_size) * (dim // 4) + slot, group, mask=tokens < num_tokens)
    else:
        tl.store(keys + slot * dim + columns, key, mask=mask)


@register("write_index_keys", "triton")
def _write_index_keys(
    keys: Tensor,
    slots: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeTable,
) -> None:
    """NaN for a position outside the table; slots are not checked."""
    num_tokens, dim = k.shape
    if rope.dim & (rope.dim - 1) or (keys.dtype == FP8_CACHE and (dim > BLOCK or dim % 4)):
        raise ValueError(
            f"the Triton kernels turn vectors whose width is a power of two, and have FP8 index keys of up to {BLOCK} "
            f"columns, a multiple of 4: got {rope.dim} of {dim} columns"
        )
    if not num_tokens:
        return
    k = k if k.stride(1) == 1 else k.contiguous()
    fp8, native = keys.dtype == FP8_CACHE, has_fp8(k.device)
    _write_index_keys_kernel[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM),)](
        k,
        norm[0].contiguous(),
        norm[1].contiguous(),
        rope.table.contiguous(),
        rope.positions.contiguous(),
        slots.contiguous(),
        keys,
        keys.view(torch.float8_e4m3fn) if fp8 and native else keys,
        keys.view(torch.float32) if fp8 else rope.table,
        k.stride(0),
        rope.table.shape[0],
        num_tokens,
        dim,
        index_page_size("write_index_keys", keys, dim, k.dtype),
        eps,
        TOKENS=TOKENS_PER_PROGRAM,
        DIM=triton.next_power_of_2(dim),
        HALF=rope.dim // 2,
        INTERLEAVED=rope.interleaved,
        FP8=fp8,
        NATIVE=native,
        num_warps=4,
        enable_fp_fusion=False,  # each operation rounds
    )
