"""GEMM with weights [N, K]: a program computes one output tile, or two adjacent ones, over K ascending.

bf16: tensor cores accumulate in one fp32 accumulator per output.
fp32: each operand is split into three bf16, and the six of nine cross terms that reach the last bit of fp32 are summed;
the accumulators of every 512 columns are summed in fp32, ascending, in one program or in several.
FP8: the sum over each 128 columns is multiplied by the two scales and added to the accumulator in fp32.
So the bits of an output depend neither on the tile's rows and columns nor on the output's position in it; on its depth,
`block_k`, in fp32 only. Tests on a device compare all of `TILES`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRET, decode_e4m3, dot, round_to

CHUNK = tl.constexpr(512)
"""Columns of an fp32 GEMM that share an accumulator."""

# Kinds of operands.
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
    """Pointers to the scales of weight rows [n0, n0 + BLOCK_N): one for all rows, or one per row."""
    if ROW_SCALES:
        return w_scale + (n0 + tl.arange(0, BLOCK_N)) * num_blocks
    else:
        return w_scale + (n0 // 128) * num_blocks


@triton.jit
def _times(xs, w_scale, ROW_SCALES: tl.constexpr):
    """Scale of each row times that of each weight row, [M, N], or [M, 1] with equal bits if weight rows share one."""
    if ROW_SCALES:
        return xs[:, None] * tl.load(w_scale)[None, :]
    else:
        return (xs * tl.load(w_scale))[:, None]


@triton.jit
def gemm_tile(
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

    w_scale belongs to the matrix `w_batch`; FP8 GEMMs start at column 0.
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
def gemm_tile_pair(
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
    """`gemm_tile` over all columns at n0 and at n1, with the bits of two calls but one pass over x.

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
def gemm_and_store(
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
    """Rows [m0, row_end) of y, in one tile of columns or in a pair of tiles."""
    if PAIRED:
        n0 = tile_n * (2 * BLOCK_N)
        n1 = n0 + BLOCK_N
        acc, acc1 = gemm_tile_pair(
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
        acc = gemm_tile(
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
