"""The experts' feed-forward over rows grouped by expert, and the weighted sum of their outputs.

Each of the two grouped GEMMs is one launch for all experts. No row tile spans two experts; a table holds the expert of
each tile. It is computed on the device for the largest possible number of tiles, so the host need not know the counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear import PackedWeight
from ..registry import register
from .gemm import NATIVE_FP8, gemm_and_store, gemm_tile_pair, store_tile, tile_of
from .gemm_config import GemmConfig, tiles_for
from .launch import round_to, shared_memory
from .linear import Operands


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _swiglu_kernel(gate_up, y, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, round_to(silu_times(gate, up), y.dtype.element_ty), mask=mask)


@triton.jit
def _tile_table_kernel(counts, table, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """table[t] = (expert, first row, end of the expert's rows) of row tile t; the end is 0 for unused tiles."""
    tile = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    rows_of = tl.load(counts + experts, mask=experts < num_experts, other=0).to(tl.int32)
    tiles_of = tl.cdiv(rows_of, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles_of, 0) <= tile).to(tl.int32))
    before = experts < expert
    first_row = tl.sum(tl.where(before, rows_of, 0))
    m0 = first_row + (tile - tl.sum(tl.where(before, tiles_of, 0))) * BLOCK_M
    row_end = first_row + tl.sum(tl.where(experts == expert, rows_of, 0))
    exists = tile < tl.sum(tiles_of)
    tl.store(table + tile * 3, tl.where(exists, expert, 0))
    tl.store(table + tile * 3 + 1, tl.where(exists, m0, 0))
    tl.store(table + tile * 3 + 2, tl.where(exists, row_end, 0))


@triton.jit
def _experts_kernel(
    x_desc,
    w_desc,
    x_scale,
    w_scale,
    y,
    table,
    num_tiles,
    N,
    K,
    stride_xs,
    stride_y,
    stride_ws,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """y = x w[e]^T for each expert's rows; GATED: w has N gate rows, then N up rows, and y = silu(gate) * up."""
    width = 2 * BLOCK_N if PAIRED and not GATED else BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), num_tiles, tl.cdiv(N, width), GROUP_M)
    expert = tl.load(table + tile_m * 3)
    m0 = tl.load(table + tile_m * 3 + 1)
    row_end = tl.load(table + tile_m * 3 + 2)
    K = tl.where(row_end > 0, K, 0)  # unused tiles cost nothing
    if KIND >= NATIVE_FP8:
        w_scale += expert * stride_ws
    if GATED:
        n0 = tile_n * BLOCK_N
        gate, up = gemm_tile_pair(
            x_desc,
            w_desc,
            x_scale,
            w_scale,
            0,
            expert,
            m0,
            n0,
            N + n0,
            row_end,
            K,
            stride_xs,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            KIND,
            ROW_SCALES,
            False,
        )
        # as if gate and up had been stored in y's dtype
        gate = round_to(gate, y.dtype.element_ty).to(tl.float32)
        acc = silu_times(gate, round_to(up, y.dtype.element_ty).to(tl.float32))
        store_tile(y, stride_y, acc, m0, n0, row_end, N, BLOCK_M, BLOCK_N)
    else:
        gemm_and_store(
            x_desc,
            w_desc,
            x_scale,
            w_scale,
            y,
            0,
            expert,
            m0,
            tile_n,
            row_end,
            N,
            0,
            K,
            stride_xs,
            stride_y,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            KIND,
            PAIRED,
            ROW_SCALES,
            NUM_STAGES,
        )


@triton.jit
def _combine_kernel(
    y,
    row_of,
    weights,
    shared,
    out,
    stride_y,
    hidden,
    TOP_K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + k)
        weight = tl.load(weights + token * TOP_K + k)
        value = tl.load(y + row * stride_y + columns, mask=mask & (row >= 0), other=0.0).to(tl.float32)
        acc = tl.where(row >= 0, acc + weight * value, acc)
    if HAS_SHARED:
        acc += tl.load(shared + token * hidden + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + columns, round_to(acc, out.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@register("swiglu", "triton")
def swiglu_triton(gate_up: Tensor) -> Tensor:
    gate_up = _rows(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    if y.numel():
        grid = (rows, triton.cdiv(width, 1024))
        _swiglu_kernel[grid](gate_up, y, gate_up.stride(0), width, BLOCK=1024, num_warps=4)
    return y


@register("experts_mlp", "triton")
def _experts_mlp(
    x: Tensor,
    counts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    x_row: Tensor | None,
    out_row: Tensor | None,
) -> Tensor:
    num_rows = len(x if x_row is None else x_row)
    y = x.new_empty(num_rows, x.shape[1])
    if y.numel():
        num_experts, inner_dim = down.num_matrices, down.in_features
        rows_each = num_rows // num_experts
        counts = counts.to(x.device, non_blocking=True)
        tiles = tiles_for(down.data.dtype, rows_each, inner_dim * num_experts, x.device, gated=True)
        inner = x.new_empty(num_rows, inner_dim)
        operands = Operands.of(x.unsqueeze(0), gate_up, tiles, x_row)
        grouped_gemm(operands, tile_table(counts, num_rows, tiles.block_m), inner, tiles, gated=True)
        tiles = tiles_for(down.data.dtype, rows_each, x.shape[1] * num_experts, x.device)
        operands = Operands.of(inner.unsqueeze(0), down, tiles)
        grouped_gemm(operands, tile_table(counts, num_rows, tiles.block_m), y, tiles)
    return y if out_row is None else torch.empty_like(y).index_copy_(0, out_row, y)


def tile_table(counts: Tensor, num_rows: int, block_m: int) -> Tensor:
    """(expert, first row, end of the expert's rows) of every row tile [T, 3] int32, for counts [E] on the device."""
    num_experts = counts.shape[0]
    # Each expert may end with a partial tile.
    most_tiles = min(num_rows, triton.cdiv(num_rows, block_m) + num_experts - 1)
    table = torch.empty(most_tiles, 3, dtype=torch.int32, device=counts.device)
    _tile_table_kernel[(most_tiles,)](
        counts, table, num_experts, EXPERTS=triton.next_power_of_2(num_experts), BLOCK_M=block_m, num_warps=1
    )
    return table


def grouped_gemm(operands: Operands, table: Tensor, y: Tensor, tiles: GemmConfig, *, gated: bool = False) -> None:
    """y = x w[e]^T for the rows of each expert e, or with `gated` the swiglu of that; y is not empty."""
    num_tiles, n = table.shape[0], y.shape[1]
    num_stages = tiles.stages(operands.itemsize, shared_memory(y.device), gated=gated)
    _experts_kernel[(tiles.num_programs(num_tiles * tiles.block_m, n, gated=gated),)](
        operands.x,
        operands.w,
        operands.x_scale,
        operands.w_scale,
        y,
        table,
        num_tiles,
        n,
        operands.num_channels,
        operands.stride_xs,
        y.stride(0),
        0 if operands.w_scale is None else operands.w_scale.stride(0),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP_M=8,
        KIND=operands.kind,
        PAIRED=tiles.paired,
        ROW_SCALES=operands.row_scales,
        GATED=gated,
        NUM_STAGES=num_stages,
        num_warps=tiles.num_warps,
        maxnreg=tiles.maxnreg,
        num_stages=num_stages,
    )


@register("combine_topk", "triton")
def _combine_topk(y: Tensor, row_of: Tensor, topk_weights: Tensor, shared: Tensor | None) -> Tensor:
    y = _rows(y)
    tokens, top_k = row_of.shape
    out = y.new_empty(tokens, y.shape[1])
    if out.numel():
        grid = (tokens, triton.cdiv(y.shape[1], 1024))
        _combine_kernel[grid](
            y,
            row_of.contiguous(),
            topk_weights.contiguous(),
            y if shared is None else shared.contiguous(),
            out,
            y.stride(0),
            y.shape[1],
            TOP_K=top_k,
            HAS_SHARED=shared is not None,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=False,  # product and sum round each
        )
    return out
