"""Products with weights [N, K]: a program computes one tile of outputs, or two side by side, over K ascending.

bf16: the tensor cores add to one fp32 accumulator per output.
fp32: operands are sums of three bf16, of whose nine products the six that reach the last bit of an fp32 product are
added up; accumulators of 512 columns each are added up in fp32, ascending, be it in one program or in several.
FP8: the sum of each 128 columns is multiplied by the two scales and added to the accumulator in fp32.
So an output's bits depend neither on the rows and columns of the tile nor on where in it the output sits; on its depth,
`block_k`, only in fp32. Tests on a device compare all of `TILES`.
"""

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
from .launch import INTERPRET, decode_e4m3, dot, has_fp8, num_sms, round_to
from .quant import quantize_token_groups
from .tiles import Tiles, tiles_for

ALIGNMENT = 16
"""Of rows, in bytes, for tensor descriptors."""
CHUNK = tl.constexpr(512)
"""Columns of an fp32 product whose sum is one accumulator."""

# What the operands are.
BF16 = tl.constexpr(0)
FP32 = tl.constexpr(1)
NATIVE_FP8 = tl.constexpr(2)
DECODED_FP8 = tl.constexpr(3)


@triton.jit
def _dot(x, w, acc, KIND: tl.constexpr):
    """acc + x w^T in fp32."""
    if KIND == FP32 and not INTERPRET:
        return tl.dot(x, w.T, acc, input_precision="bf16x6")
    else:
        return dot(x, w.T, acc)


@triton.jit
def _load(desc, batch, row, column, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile of a [B, rows, K] descriptor, zero beyond its edges."""
    tile = desc.load([batch, row, column]).reshape(ROWS, BLOCK_K)
    if KIND == DECODED_FP8:
        tile = decode_e4m3(tile)
    return tile


@triton.jit
def _scales_of(w_scale, n0, num_blocks, BLOCK_N: tl.constexpr, ROW_SCALES: tl.constexpr):
    """Where the scales of weight rows n0 .. n0 + BLOCK_N begin: one for all, or each its own."""
    if ROW_SCALES:
        return w_scale + (n0 + tl.arange(0, BLOCK_N)) * num_blocks
    else:
        return w_scale + (n0 // 128) * num_blocks


@triton.jit
def _times(xs, w_scale, ROW_SCALES: tl.constexpr):
    """Scale of a row times that of a weight row, [M, N] or, if they have one, [M, 1]: the same product."""
    if ROW_SCALES:
        return xs[:, None] * tl.load(w_scale)[None, :]
    else:
        return (xs * tl.load(w_scale))[:, None]


@triton.jit
def multiply_tile(
    x_desc,
    w_desc,
    x_scale,
    w_scale,
    x_batch,
    w_batch,
    m0,
    n0,
    num_rows,
    k_begin,
    k_end,
    stride_xs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """x[m0 : m0 + BLOCK_M] w[n0 : n0 + BLOCK_N]^T over columns k_begin .. k_end, in fp32.

    w_scale is that of the matrix `w_batch`; FP8 products begin at column 0.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if KIND == BF16:
        for k in tl.range(k_begin, k_end, BLOCK_K):
            x = _load(x_desc, x_batch, m0, k, KIND, BLOCK_M, BLOCK_K)
            w = _load(w_desc, w_batch, n0, k, KIND, BLOCK_N, BLOCK_K)
            acc = _dot(x, w, acc, KIND)
    elif KIND == FP32:
        for begin in tl.range(k_begin, k_end, CHUNK):
            chunk = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in tl.range(begin, tl.minimum(begin + CHUNK, k_end), BLOCK_K):
                x = _load(x_desc, x_batch, m0, k, KIND, BLOCK_M, BLOCK_K)
                w = _load(w_desc, w_batch, n0, k, KIND, BLOCK_N, BLOCK_K)
                chunk = _dot(x, w, chunk, KIND)
            acc += chunk
    else:
        num_blocks = tl.cdiv(k_end, BLOCK_K)
        rows = m0 + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        w_scale = _scales_of(w_scale, n0, num_blocks, BLOCK_N, ROW_SCALES)
        for block in tl.range(num_blocks, num_stages=NUM_STAGES):  # said here, it covers the scales as well
            x = _load(x_desc, x_batch, m0, block * BLOCK_K, KIND, BLOCK_M, BLOCK_K)
            w = _load(w_desc, w_batch, n0, block * BLOCK_K, KIND, BLOCK_N, BLOCK_K)
            xs = tl.load(x_scale + block * stride_xs + rows, mask=inside, other=0.0)
            if ROW_SCALES:
                scale = _times(xs, w_scale + block, ROW_SCALES)
            else:  # one scale, as a tensor: a number would be waited for
                scale = (xs * tl.load(w_scale + block + rows * 0))[:, None]
            acc += _dot(x, w, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), KIND) * scale
    return acc


@triton.jit
def multiply_tile_pair(
    x_desc,
    w_desc,
    x_scale,
    w_scale,
    x_batch,
    w_batch,
    m0,
    n0,
    n1,
    num_rows,
    K,
    stride_xs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    ONE_SCALE: tl.constexpr,
):
    """`multiply_tile` of all columns at n0 and at n1, with the bits of two calls but one pass over x.

    ONE_SCALE: n0 and n1 lie in one block of 128 weight rows.
    """
    acc0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if KIND == BF16:
        for k in tl.range(0, K, BLOCK_K):
            x = _load(x_desc, x_batch, m0, k, KIND, BLOCK_M, BLOCK_K)
            acc0 = _dot(x, _load(w_desc, w_batch, n0, k, KIND, BLOCK_N, BLOCK_K), acc0, KIND)
            acc1 = _dot(x, _load(w_desc, w_batch, n1, k, KIND, BLOCK_N, BLOCK_K), acc1, KIND)
    elif KIND == FP32:
        for begin in tl.range(0, K, CHUNK):
            chunk0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            chunk1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in tl.range(begin, tl.minimum(begin + CHUNK, K), BLOCK_K):
                x = _load(x_desc, x_batch, m0, k, KIND, BLOCK_M, BLOCK_K)
                chunk0 = _dot(x, _load(w_desc, w_batch, n0, k, KIND, BLOCK_N, BLOCK_K), chunk0, KIND)
                chunk1 = _dot(x, _load(w_desc, w_batch, n1, k, KIND, BLOCK_N, BLOCK_K), chunk1, KIND)
            acc0 += chunk0
            acc1 += chunk1
    else:
        num_blocks = tl.cdiv(K, BLOCK_K)
        rows = m0 + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        w_scale0 = _scales_of(w_scale, n0, num_blocks, BLOCK_N, ROW_SCALES)
        w_scale1 = _scales_of(w_scale, n1, num_blocks, BLOCK_N, ROW_SCALES)
        xs = tl.load(x_scale + rows, mask=inside, other=0.0)
        scale0 = _times(xs, w_scale0, ROW_SCALES)
        scale1 = scale0 if ONE_SCALE else _times(xs, w_scale1, ROW_SCALES)
        for block in tl.range(num_blocks):
            x = _load(x_desc, x_batch, m0, block * BLOCK_K, KIND, BLOCK_M, BLOCK_K)
            w0 = _load(w_desc, w_batch, n0, block * BLOCK_K, KIND, BLOCK_N, BLOCK_K)
            w1 = _load(w_desc, w_batch, n1, block * BLOCK_K, KIND, BLOCK_N, BLOCK_K)
            following = tl.minimum(block + 1, num_blocks - 1)  # its scales arrive while the tensor cores work
            xs = tl.load(x_scale + following * stride_xs + rows, mask=inside, other=0.0)
            next0 = _times(xs, w_scale0 + following, ROW_SCALES)
            next1 = next0 if ONE_SCALE else _times(xs, w_scale1 + following, ROW_SCALES)
            acc0 += _dot(x, w0, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), KIND) * scale0
            acc1 += _dot(x, w1, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), KIND) * scale1
            scale0, scale1 = next0, next1
    return acc0, acc1


@triton.jit
def tile_of(program, num_m, num_n, GROUP_M: tl.constexpr):
    """(row tile, column tile): GROUP_M row tiles go through all columns together, so that both operands stay in L2."""
    per_group = GROUP_M * num_n
    first = program // per_group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    within = program % per_group
    return first + within % size, within // size


@triton.jit
def store_tile(y, stride_y, acc, m0, n0, row_end, column_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Round acc and store its part above row_end and left of column_end."""
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    columns = n0 + tl.arange(0, BLOCK_N)[None, :]
    place = y + rows.to(tl.int64) * stride_y + columns
    tl.store(place, round_to(acc, y.dtype.element_ty), mask=(rows < row_end) & (columns < column_end))


@triton.jit
def multiply_and_store(
    x_desc,
    w_desc,
    x_scale,
    w_scale,
    y,
    x_batch,
    w_batch,
    m0,
    tile_n,
    row_end,
    N,
    k_begin,
    k_end,
    stride_xs,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Rows m0 .. row_end of y, in one tile of columns or in a pair of them."""
    if PAIRED:
        n0 = tile_n * (2 * BLOCK_N)
        n1 = n0 + BLOCK_N
        acc, acc1 = multiply_tile_pair(
            x_desc,
            w_desc,
            x_scale,
            w_scale,
            x_batch,
            w_batch,
            m0,
            n0,
            n1,
            row_end,
            k_end,
            stride_xs,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            KIND,
            ROW_SCALES,
            2 * BLOCK_N <= 128 and not ROW_SCALES,
        )
        store_tile(y, stride_y, acc1, m0, n1, row_end, N, BLOCK_M, BLOCK_N)
    else:
        n0 = tile_n * BLOCK_N
        acc = multiply_tile(
            x_desc,
            w_desc,
            x_scale,
            w_scale,
            x_batch,
            w_batch,
            m0,
            n0,
            row_end,
            k_begin,
            k_end,
            stride_xs,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            KIND,
            ROW_SCALES,
            NUM_STAGES,
        )
    store_tile(y, stride_y, acc, m0, n0, row_end, N, BLOCK_M, BLOCK_N)


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
    """y = x w^T; with SPLIT, y[s] is the product of the s-th chunk of columns."""
    batch = tl.program_id(1)
    width = 2 * BLOCK_N if PAIRED else BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, width), GROUP_M)
    k_begin, k_end = 0, K
    y += batch * stride_yb
    if SPLIT:
        k_begin = tl.program_id(2) * CHUNK
        k_end = tl.minimum(k_begin + CHUNK, K)
        y += tl.program_id(2).to(tl.int64) * stride_ys
    multiply_and_store(
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
    """y = the sum of contiguous chunks [S, B, M, N], in order."""
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
        multiply(Operands.of(rows, w, tiles), y.view(1, -1, w.out_features), tiles)
    return y


@register("batched_linear", "triton")
def _batched_linear(x: Tensor, w: PackedWeight) -> Tensor:
    y = x.new_empty(x.shape[0], w.num_matrices, w.out_features)
    if y.numel():
        tiles = tiles_for(w.data.dtype, x.shape[0], w.out_features * w.num_matrices, x.device)
        multiply(Operands.of(x.transpose(0, 1), w, tiles), y.transpose(0, 1), tiles)
    return y


def multiply(operands: Operands, y: Tensor, tiles: Tiles) -> None:
    """y[b] = x[b] w[b]^T for y [B, M, N], which is not empty."""
    batch, num_rows, n = y.shape
    num_programs = tiles.num_programs(num_rows, n)
    num_chunks = triton.cdiv(operands.num_channels, CHUNK.value)
    # Chunks side by side where there are too few programs to fill the device; the sum is the same.
    split = operands.kind == FP32.value and num_chunks > 1 and num_programs * batch < num_sms(y.device)
    target = torch.empty(num_chunks, *y.shape, dtype=torch.float32, device=y.device) if split else y.unsqueeze(0)
    strides = target.stride()
    num_stages = tiles.stages(operands.itemsize, y.device)
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
    """x [B, M, K] and weights as the kernels take them; x is quantised if the weights are FP8."""

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
    def of(cls, x: Tensor, w: PackedWeight, tiles: Tiles, rows: Tensor | None = None) -> Operands:
        """`rows` [M] int64: of x [1, ..], which are the operand; quantised before they are taken, perhaps often."""
        data, x_scale, kind = w.data, None, (FP32 if w.dtype == torch.float32 else BF16).value
        if w.scale_inv is not None:
            assert x.shape[0] == 1, "FP8 weights come one at a time or grouped by rows"
            q, x_scale = quantize_token_groups(x[0], w.ue8m0)
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
    """x [B, M, K] as a tensor descriptor wants it, padded with zeros to `num_channels`."""
    if x.shape[2] < num_channels:
        return torch.nn.functional.pad(x, (0, num_channels - x.shape[2]))
    size = x.element_size()
    fits = x.stride(2) == 1 and x.data_ptr() % ALIGNMENT == 0
    fits = fits and all(stride * size % ALIGNMENT == 0 for stride in x.stride()[:2])
    # Not `contiguous`, which leaves the strides of dimensions of size 1 as they are.
    return x if fits else x.clone(memory_format=torch.contiguous_format)
