"""`linear` and `batched_linear`: kernel, operands and launch; gemm.py computes the tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..linear import PackedWeight
from ..quant import scale_columns
from ..registry import register
from .gemm import BF16, CHUNK, DECODED_FP8, FP32, NATIVE_FP8, gemm_and_store, tile_of
from .gemm_config import GemmConfig, tiles_for
from .launch import has_fp8, num_sms, round_to, shared_memory
from .quant import quantize_token_groups_triton

ALIGNMENT = 16
"""Alignment of rows in bytes, for tensor descriptors."""


@triton.jit
def _linear_kernel(
    x_desc,
    w_desc,
    x_scale,
    w_scale,
    y,
    M,
    N,
    K,
    stride_xs,
    stride_ys,
    stride_yb,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """y = x w^T; with SPLIT, y[s] = x w^T over the s-th chunk of columns."""
    batch = tl.program_id(1)
    width = 2 * BLOCK_N if PAIRED else BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, width), GROUP_M)
    k_begin, k_end = 0, K
    y += batch * stride_yb
    if SPLIT:
        k_begin = tl.program_id(2) * CHUNK
        k_end = tl.minimum(k_begin + CHUNK, K)
        y += tl.program_id(2).to(tl.int64) * stride_ys
    gemm_and_store(
        x_desc,
        w_desc,
        x_scale,
        w_scale,
        y,
        batch,
        batch,
        tile_m * BLOCK_M,
        tile_n,
        M,
        N,
        k_begin,
        k_end,
        stride_xs,
        stride_ym,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        KIND,
        PAIRED,
        ROW_SCALES,
        NUM_STAGES,
    )


@triton.jit
def _sum_chunks_kernel(chunks, y, num_chunks, M, N, stride_ys, stride_yb, stride_ym, BLOCK: tl.constexpr):
    """y = sum of contiguous chunks [S, B, M, N], in order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    place = chunks + row * N + columns
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.range(num_chunks):
        acc += tl.load(place, mask=mask, other=0.0)
        place += stride_ys
    place = y + row // M * stride_yb + row % M * stride_ym + columns
    tl.store(place, round_to(acc, y.dtype.element_ty), mask=mask)


@register("pack_weight", "triton")
def _pack_weight(w: Tensor) -> Tensor:
    padding = -w.shape[2] % (ALIGNMENT // w.element_size())
    return _aligned(w.contiguous(), w.shape[2] + padding)


@register("linear", "triton")
def _linear(x: Tensor, w: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    y = x.new_empty(*x.shape[:-1], w.out_features, dtype=out_dtype)
    if y.numel():
        rows = x.reshape(1, -1, w.in_features)
        tiles = tiles_for(w.data.dtype, rows.shape[1], w.out_features, x.device)
        gemm(Operands.of(rows, w, tiles), y.view(1, -1, w.out_features), tiles)
    return y


@register("batched_linear", "triton")
def batched_linear_triton(x: Tensor, w: PackedWeight) -> Tensor:
    y = x.new_empty(x.shape[0], w.num_matrices, w.out_features)
    if y.numel():
        tiles = tiles_for(w.data.dtype, x.shape[0], w.out_features * w.num_matrices, x.device)
        gemm(Operands.of(x.transpose(0, 1), w, tiles), y.transpose(0, 1), tiles)
    return y


def gemm(operands: Operands, y: Tensor, tiles: GemmConfig) -> None:
    """y[b] = x[b] w[b]^T for non-empty y [B, M, N]."""
    batch, num_rows, n = y.shape
    num_programs = tiles.num_programs(num_rows, n)
    num_chunks = triton.cdiv(operands.num_channels, CHUNK.value)
    # Split K where there are too few programs to fill the device; the sum is the same.
    split = operands.kind == FP32.value and num_chunks > 1 and num_programs * batch < num_sms(y.device)
    target = torch.empty(num_chunks, *y.shape, dtype=torch.float32, device=y.device) if split else y.unsqueeze(0)
    strides = target.stride()
    num_stages = tiles.stages(operands.itemsize, shared_memory(y.device))
    _linear_kernel[(num_programs, batch, num_chunks if split else 1)](
        operands.x,
        operands.w,
        operands.x_scale,
        operands.w_scale,
        target,
        num_rows,
        n,
        operands.num_channels,
        operands.stride_xs,
        *strides[:3],
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP_M=8,
        KIND=operands.kind,
        PAIRED=tiles.paired,
        ROW_SCALES=operands.row_scales,
        SPLIT=split,
        NUM_STAGES=num_stages,
        num_warps=tiles.num_warps,
        num_stages=num_stages,
        maxnreg=tiles.maxnreg,
    )
    if split:
        _sum_chunks_kernel[(batch * num_rows, triton.cdiv(n, 256))](
            target, y, num_chunks, num_rows, n, strides[0], y.stride(0), y.stride(1), BLOCK=256, num_warps=2
        )


@dataclass(frozen=True)
class Operands:
    """Kernel arguments for x [B, M, K] and weights; x is quantised if the weights are FP8."""

    x: TensorDescriptor
    w: TensorDescriptor
    x_scale: Tensor | None
    w_scale: Tensor | None
    num_channels: int
    stride_xs: int
    kind: int
    itemsize: int
    row_scales: bool

    @classmethod
    def of(cls, x: Tensor, w: PackedWeight, tiles: GemmConfig, rows: Tensor | None = None) -> Operands:
        """`rows` [M] int64: rows of x [1, ..] to use, with repeats; x is quantised before they are gathered."""
        data, x_scale, kind = w.data, None, (FP32 if w.dtype == torch.float32 else BF16).value
        if w.scale_inv is not None:
            assert x.shape[0] == 1, "FP8 weights come one at a time or grouped by rows"
            q, x_scale = quantize_token_groups_triton(x[0], w.ue8m0)
            if rows is not None:
                x_scale = scale_columns(len(rows), q.shape[1], q.device).copy_(x_scale[rows])
                q = q.view(torch.uint8)[rows].view(q.dtype)
            x = q.unsqueeze(0)
            kind = NATIVE_FP8.value
            if not has_fp8(x.device):
                x, data, kind = x.view(torch.uint8), data.view(torch.uint8), DECODED_FP8.value
        elif rows is not None:
            x = x[:, rows]
        return cls(
            x=TensorDescriptor.from_tensor(_aligned(x, data.shape[2]), [1, tiles.block_m, tiles.block_k]),
            w=TensorDescriptor.from_tensor(data, [1, tiles.block_n, tiles.block_k]),
            x_scale=x_scale,
            w_scale=w.scale_inv,
            num_channels=data.shape[2],
            stride_xs=0 if x_scale is None else x_scale.stride(1),
            kind=kind,
            itemsize=data.element_size(),
            row_scales=w.has_row_scales,
        )


def _aligned(x: Tensor, num_channels: int) -> Tensor:
    """x [B, M, K] aligned for a tensor descriptor, padded with zeros to `num_channels`."""
    if x.shape[2] < num_channels:
        return torch.nn.functional.pad(x, (0, num_channels - x.shape[2]))
    size = x.element_size()
    fits = x.stride(2) == 1 and x.data_ptr() % ALIGNMENT == 0
    fits = fits and all(stride * size % ALIGNMENT == 0 for stride in x.stride()[:2])
    # Not `contiguous`, which leaves the strides of dimensions of size 1 as they are.
    return x if fits else x.clone(memory_format=torch.contiguous_format)
