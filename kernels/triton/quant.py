"""FP8 quantisation per token and group of 128 channels: one program per token and eight groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant import BLOCK, scale_columns
from ..registry import register
from .launch import encode_e4m3, has_fp8

GROUPS_PER_PROGRAM = 8


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_maximum(groups):
    """Largest magnitude of each row; NaN if the row has one."""
    return tl.reduce(tl.abs(groups), 1, _maximum)


@triton.jit
def group_scale(amax, UE8M0: tl.constexpr):
    """Scale of a group from its largest magnitude; UE8M0 rounds it up to a power of two."""
    scale = tl.div_rn(tl.maximum(amax, 1e-4, propagate_nan=tl.PropagateNan.ALL), 448.0)
    if UE8M0:
        bits = (scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)
    return scale


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """fp32 clamped to +-448 -> float8_e4m3fn, or its uint8 code on devices without FP8 conversion."""
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if NATIVE:
        return x.to(tl.float8e4nv)
    else:
        return encode_e4m3(x)


@triton.jit
def _quantize_kernel(
    x, q, scales, stride_x, stride_s, dim, GROUPS: tl.constexpr, UE8M0: tl.constexpr, NATIVE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    wide = tl.load(x + row * stride_x + columns, mask=columns < dim, other=0.0).to(tl.float32)
    scale = group_scale(group_maximum(wide), UE8M0)
    tl.store(scales + groups * stride_s + row, scale, mask=groups * 128 < dim)
    if UE8M0:  # the reciprocal of a power of two is exact
        scaled = wide * (1.0 / scale)[:, None]
    else:
        scaled = tl.div_rn(wide, tl.broadcast_to(scale[:, None], wide.shape))
    tl.store(q + row * dim + columns, to_e4m3(scaled, NATIVE), mask=columns < dim)


@register("quantize_token_groups", "triton")
def quantize_token_groups_triton(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    rows = x if x.stride(1) == 1 else x.contiguous()
    num_rows, dim = rows.shape
    q = torch.empty(num_rows, dim, dtype=torch.float8_e4m3fn, device=x.device)
    scales = scale_columns(num_rows, dim, x.device)
    native = has_fp8(x.device)
    if q.numel():
        grid = (num_rows, triton.cdiv(dim, BLOCK * GROUPS_PER_PROGRAM))
        _quantize_kernel[grid](
            rows,
            q if native else q.view(torch.uint8),
            scales,
            rows.stride(0),
            scales.stride(1),
            dim,
            GROUPS=GROUPS_PER_PROGRAM,
            UE8M0=ue8m0,
            NATIVE=native,
            num_warps=4,
        )
    return q, scales
