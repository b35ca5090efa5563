"""Block-wise FP8 weights as DeepSeek-V3 publishes them: float8_e4m3fn with one fp32 scale per 128 x 128 block."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0


def dequantize_block_fp8(w: Tensor, scale_inv: Tensor, dtype: torch.dtype, *, row_offset: int = 0) -> Tensor:
    """w[n, k] * scale_inv[(row_offset + n) // 128, k // 128] in fp32 (one rounding), then one rounding to `dtype`.

    w: [N, K] float8_e4m3fn, rows row_offset .. row_offset + N of the full matrix. scale_inv: [ceil(N' / 128),
    ceil(K / 128)] float32 of the full matrix of N' rows; neither dimension need be a multiple of 128.
    """
    if w.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32 or w.dim() != 2 or scale_inv.dim() != 2:
        raise ValueError(
            f"an FP8 weight is float8_e4m3fn with float32 scales, both 2-D; got {w.dtype}, {scale_inv.dtype}"
        )
    rows, columns = w.shape
    needed = (-(-(row_offset + rows) // BLOCK), -(-columns // BLOCK))
    if row_offset < 0 or scale_inv.shape[0] < needed[0] or scale_inv.shape[1] != needed[1]:
        raise ValueError(
            f"rows {row_offset}..{row_offset + rows} x {columns} columns of an FP8 weight need scales of at least "
            f"{list(needed)}, got {list(scale_inv.shape)}: is the block size 128 x 128?"
        )
    out = torch.empty(rows, columns, dtype=dtype, device=w.device)
    begin = 0
    while begin < rows:
        block = (row_offset + begin) // BLOCK
        end = min(rows, (block + 1) * BLOCK - row_offset)
        scale = scale_inv[block].repeat_interleave(BLOCK)[:columns]
        out[begin:end] = (w[begin:end].float() * scale).to(dtype)
        begin = end
    return out


def quantize_block_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest block-wise FP8 form of w [N, K]: float8_e4m3fn [N, K] and scale_inv [ceil(N/128), ceil(K/128)].

    A block's scale is its largest magnitude / 448, so that this magnitude becomes the largest FP8 number.
    """
    if w.dim() != 2 or not bool(torch.isfinite(w).all()):
        raise ValueError(f"only a finite [N, K] weight can be quantized, got {list(w.shape)}")
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    # [N, K] -> [N / 128, 128, K / 128, 128]
    blocks = padded.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
    scale_inv = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (blocks / scale_inv[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view(padded.shape)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn), scale_inv
