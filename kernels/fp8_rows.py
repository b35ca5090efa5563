"""Rows of FP8 numbers with one power-of-two scale for every 128 of them: what the FP8 cache format is made of.

T rows of D columns in G = ceil(D / 128) groups, the last of which may be smaller.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import CFunction, num_threads
from .linear import DTYPE_CODES
from .quant import BLOCK, FP8_MAX
from .registry import Kernel, register

MIN_AMAX = 1e-4
"""A group's largest magnitude counts as at least that."""

shoal_quantize_rows = CFunction("shoal_quantize_rows", c_int64, c_void_p, *[c_int64] * 3, *[c_void_p] * 2, c_int64)
shoal_dequantize_rows = CFunction("shoal_dequantize_rows", c_int64, *[c_void_p] * 2, *[c_int64] * 2, c_void_p, c_int64)


def fp8_row_bytes(columns: int) -> int:
    """Bytes of a stored row: the values, then their scales."""
    return columns + 4 * -(-columns // BLOCK)


def quantize_rows_fp8(kernel: Kernel, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D], fp32 or bf16 -> (float8_e4m3fn [T, D], scales [T, G] fp32): DeepSeek's activation quantisation.

    Per row and group, in fp32: amax = the largest magnitude (a NaN does not count), at least 1e-4; scale = the least
    power of two that is not below amax / 448; q = x / scale, held within [-448, 448], to nearest, ties to even. NaN
    stays NaN. FlashMLA's own writer bounds the scale from below instead (2^-13 rather than 2^-22): both can be read.
    """
    if x.dim() != 2 or x.dtype not in DTYPE_CODES:
        raise ValueError(f"quantize_rows_fp8 needs x [T, D] in float32 or bfloat16, got {list(x.shape)} in {x.dtype}")
    quantized: tuple[Tensor, Tensor] = kernel.run(x)
    return quantized


def dequantize_rows_fp8(kernel: Kernel, q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q [T, D] * scales [T, G], in fp32 and then rounded to `dtype` (float32 or bfloat16) -> [T, D].

    Both steps are exact for power-of-two scales, unless the result leaves the range of normal numbers.
    """
    groups = -(-q.shape[-1] // BLOCK)
    fits = q.dim() == 2 and scales.shape == (q.shape[0], groups)
    if not fits or q.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32 or dtype not in DTYPE_CODES:
        raise ValueError(
            f"dequantize_rows_fp8 needs q [T, D] in float8_e4m3fn with scales [T, ceil(D / {BLOCK})] in float32, got "
            f"{list(q.shape)} in {q.dtype}, {list(scales.shape)} in {scales.dtype}, for {dtype}"
        )
    x: Tensor = kernel.run(q, scales, dtype)
    return x


@register("quantize_rows_fp8", "cpu")
def _quantize_rows_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(x.shape[0], -(-x.shape[1] // BLOCK))
    threads = num_threads(x.numel())
    shoal_quantize_rows(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *x.shape, q.data_ptr(), scales.data_ptr(), threads
    )
    return q, scales


@register("dequantize_rows_fp8", "cpu")
def _dequantize_rows_cpu(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    q, scales = q.contiguous(), scales.contiguous()
    out = torch.empty(q.shape, dtype=dtype)
    threads = num_threads(q.numel())
    shoal_dequantize_rows(DTYPE_CODES[dtype], q.data_ptr(), scales.data_ptr(), *q.shape, out.data_ptr(), threads)
    return out


@register("quantize_rows_fp8", "reference")
@register("quantize_rows_fp8", "triton")
def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK))
    groups = padded.view(rows, padded.shape[1] // BLOCK, BLOCK)
    amax = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=2).clamp_min(MIN_AMAX)
    bits = (amax / FP8_MAX).view(torch.int32)
    # one exponent more where there is a fraction; infinity becomes the largest power of two
    scales = ((bits + 0x7FFFFF).clamp_max(254 << 23) & 0x7F800000).view(torch.float32)
    scaled = (groups / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).view(padded.shape)[:, :columns]
    return scaled.to(torch.float8_e4m3fn), scales


@register("dequantize_rows_fp8", "reference")
@register("dequantize_rows_fp8", "triton")
def dequantize_rows_reference(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (q.float() * scales.repeat_interleave(BLOCK, dim=1)[:, : q.shape[1]]).to(dtype)
