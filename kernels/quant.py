"""FP8 (e4m3) quantisation as in DeepSeek-V3.

weights           one scale per 128 x 128 block                    BlockFP8Weight, quantize_block_fp8
GEMM inputs       one scale per token and 128 channels             quantize_token_groups
KV cache          one power of two per row and 128 columns         quantize_rows_fp8, dequantize_rows_fp8
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .math_utils import cdiv, round_up
from .registry import Kernel, register

BLOCK = 128
FP8_MAX = 448.0
MIN_AMAX = 1e-4
"""A smaller largest magnitude of a group counts as this."""

shoal_quantize_rows = CFunction("shoal_quantize_rows", c_int64, c_void_p, *[c_int64] * 3, *[c_void_p] * 2, c_int64)
shoal_dequantize_rows = CFunction("shoal_dequantize_rows", c_int64, *[c_void_p] * 2, *[c_int64] * 2, c_void_p, c_int64)


@dataclass(frozen=True)
class BlockFP8Weight:
    """W[n, k] = values[n, k] * scales[n, k // 128].

    Each row has its own copy of its blocks' scales, so rows can be sliced and concatenated anywhere.
    """

    values: Tensor
    """[N, K] float8_e4m3fn without NaN."""
    scales: Tensor
    """[N, ceil(K / 128)] float32."""
    is_block_aligned: bool
    """Rows [128 i, 128 i + 128) share their scales for every i (false after an unaligned slice or concatenation)."""

    @classmethod
    def of_rows(cls, values: Tensor, scale_inv: Tensor, *, row_offset: int = 0) -> BlockFP8Weight:
        """Rows row_offset .. row_offset + N of a matrix of N' rows whose scales are scale_inv.

        values: [N, K] float8_e4m3fn. scale_inv: [ceil(N' / 128), ceil(K / 128)] float32; neither dimension need be a
        multiple of 128.
        """
        if values.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32:
            raise ValueError(
                f"an FP8 weight is float8_e4m3fn with float32 scales, got {values.dtype}, {scale_inv.dtype}"
            )
        if values.dim() != 2 or scale_inv.dim() != 2:
            raise ValueError("an FP8 weight and its scales are both 2-D")
        rows, columns = values.shape
        needed = (cdiv(row_offset + rows, BLOCK), cdiv(columns, BLOCK))
        if row_offset < 0 or scale_inv.shape[0] < needed[0] or scale_inv.shape[1] != needed[1]:
            raise ValueError(
                f"rows {row_offset}..{row_offset + rows} x {columns} columns of an FP8 weight need scales of at least "
                f"{list(needed)}, got {list(scale_inv.shape)}: is the block size 128 x 128?"
            )
        blocks = torch.arange(row_offset, row_offset + rows, device=scale_inv.device) // BLOCK
        return cls(values, scale_inv[blocks], is_block_aligned=row_offset % BLOCK == 0)

    @classmethod
    def cat(cls, parts: Sequence[BlockFP8Weight]) -> BlockFP8Weight:
        """Concatenate rows."""
        # as bytes: not every version of torch concatenates FP8 tensors
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        is_block_aligned = all(p.is_block_aligned for p in parts) and all(
            len(p.values) % BLOCK == 0 for p in parts[:-1]
        )
        return cls(values, torch.cat([part.scales for part in parts]), is_block_aligned)

    def to(self, device: torch.device) -> BlockFP8Weight:
        return replace(self, values=self.values.to(device), scales=self.scales.to(device))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`: value * scale in fp32 (one rounding), then one rounding to `dtype`."""
        rows, columns = self.values.shape
        out = torch.empty(rows, columns, dtype=dtype, device=self.values.device)
        for begin in range(0, rows, BLOCK):  # bounds the memory of the fp32 copy
            part = slice(begin, begin + BLOCK)
            scales = self.scales[part].repeat_interleave(BLOCK, dim=1)[:, :columns]
            out[part] = (self.values[part].float() * scales).to(dtype)
        return out


def quantize_block_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise w [N, K] per block -> float8_e4m3fn [N, K], scale_inv [ceil(N/128), ceil(K/128)] float32.

    A block's scale is its largest magnitude / 448, which maps that magnitude to the largest FP8 number.
    """
    if w.dim() != 2 or not bool(torch.isfinite(w).all()):
        raise ValueError(f"only a finite [N, K] weight can be quantized, got {list(w.shape)}")
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    # [N, K] -> [N / 128, 128, K / 128, 128]
    blocks = padded.view(cdiv(rows, BLOCK), BLOCK, cdiv(columns, BLOCK), BLOCK)
    scale_inv = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (blocks / scale_inv[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view(padded.shape)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn), scale_inv


def quantize_token_groups(kernel: Kernel, x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, K] float32 or bfloat16 -> (q [T, K] float8_e4m3fn, scales [T, ceil(K / 128)] float32), x ~ q * scale.

    Per token and 128 neighbouring channels, in fp32: s = max(largest magnitude, 1e-4) / 448, rounded up to a power of
    two with `ue8m0`; q = x / s, clamped to +-448 and rounded to nearest, ties to even. NaN makes its group NaN.
    Scales of one group are contiguous in memory (`scale_columns`), as FP8 GEMMs read them.
    """
    if x.dim() != 2 or x.dtype not in DTYPE_CODES:
        raise ValueError(
            f"quantize_token_groups needs x [T, K] in float32 or bfloat16, got {list(x.shape)} in {x.dtype}"
        )
    q: Tensor
    scales: Tensor
    q, scales = kernel.run(x, ue8m0)
    return q, scales


def scale_columns(num_rows: int, num_channels: int, device: torch.device) -> Tensor:
    """Uninitialised scales [T, ceil(K / 128)] float32 with strides (1, T rounded up to 4)."""
    groups = cdiv(num_channels, BLOCK)
    return torch.empty(groups, round_up(num_rows, 4), dtype=torch.float32, device=device)[:, :num_rows].T


@register("quantize_token_groups", "reference")
@register("quantize_token_groups", "cpu")
def quantize_token_groups_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    rows, channels = x.shape
    scales = scale_columns(rows, channels, x.device)
    # [T, K] -> [T, K / 128, 128]
    groups = torch.nn.functional.pad(x.float(), (0, -channels % BLOCK)).view(rows, scales.shape[1], BLOCK)
    # A divisor on the device: torch multiplies by the reciprocal of a Python number there, which rounds differently.
    scale = groups.abs().amax(dim=2).clamp_min(MIN_AMAX) / torch.tensor(FP8_MAX, device=x.device)
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int()).where(~scale.isnan(), scale)
    scales.copy_(scale)
    q = (groups / scale.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX).flatten(1)[:, :channels]
    return q.to(torch.float8_e4m3fn), scales


def fp8_row_bytes(columns: int) -> int:
    """Bytes of a row of the FP8 KV cache: values, then scales."""
    return columns + 4 * cdiv(columns, BLOCK)


def quantize_rows_fp8(kernel: Kernel, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D], fp32 or bf16 -> (float8_e4m3fn [T, D], scales [T, G] fp32), G = ceil(D / 128), the last group shorter.

    Per row and group, in fp32: amax = max(largest magnitude without NaN, 1e-4); scale = smallest power of two >= amax /
    448; q = x / scale, clamped to [-448, 448], rounded to nearest, ties to even. NaN stays NaN. FlashMLA's own writer
    has a lower bound of 2^-13 on the scale instead of 2^-22: both can be read.
    """
    if x.dim() != 2 or x.dtype not in DTYPE_CODES:
        raise ValueError(f"quantize_rows_fp8 needs x [T, D] in float32 or bfloat16, got {list(x.shape)} in {x.dtype}")
    quantized: tuple[Tensor, Tensor] = kernel.run(x)
    return quantized


def dequantize_rows_fp8(kernel: Kernel, q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q [T, D] * scales [T, G], in fp32 and then rounded to `dtype` (float32 or bfloat16) -> [T, D].

    Both steps are exact for power-of-two scales, unless the result leaves the range of normal numbers.
    """
    groups = cdiv(q.shape[-1], BLOCK)
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
    scales = torch.empty(x.shape[0], cdiv(x.shape[1], BLOCK))
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
