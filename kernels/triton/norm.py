"""Normalisation: one program per row, the row in registers.

The sums are trees whose shape depends on the width of the row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register
from .launch import round_to


@triton.jit
def _rms_norm_kernel(x, weight, y, stride_x, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    wide = tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / dim + eps)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * dim + columns, round_to(wide * scale * w, y.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm_kernel(x, residual, weight, normed, total, stride_x, stride_r, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    wide = tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    wide += tl.load(residual + row * stride_r + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = round_to(wide, total.dtype.element_ty)
    tl.store(total + row * dim + columns, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / dim + eps)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * dim + columns, round_to(wide * scale * w, normed.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_kernel(x, weight, bias, y, stride_x, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    wide = tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide) / dim, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / dim + eps)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * dim + columns, round_to(centred * scale * w + b, y.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> rows [R, D] with contiguous elements."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(dim: int) -> dict[str, int]:
    """Block size and warps for rows of `dim`: 32 elements per thread at most."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 1024))}


@register("rms_norm", "triton")
def rms_norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        rows = _rows(x)
        dim = rows.shape[1]
        _rms_norm_kernel[(rows.shape[0],)](rows, weight.contiguous(), out, rows.stride(0), dim, eps, **_launch(dim))
    return out


@register("add_rms_norm", "triton")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(residual, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    if normed.numel():
        added, kept = _rows(x), _rows(residual)
        dim = added.shape[1]
        _add_rms_norm_kernel[(added.shape[0],)](
            added, kept, weight.contiguous(), normed, total, added.stride(0), kept.stride(0), dim, eps, **_launch(dim)
        )
    return normed, total


@register("layer_norm", "triton")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        rows = _rows(x)
        dim = rows.shape[1]
        _layer_norm_kernel[(rows.shape[0],)](
            rows, weight.contiguous(), bias.contiguous(), out, rows.stride(0), dim, eps, **_launch(dim)
        )
    return out
