"""Rotary position embedding with YaRN (https://arxiv.org/abs/2309.00071), with interleaved or half-split pairs."""

from __future__ import annotations

import math
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .registry import Kernel, register

shoal_apply_rope = CFunction(
    "shoal_apply_rope",
    c_int64,
    c_void_p,
    *[c_int64] * 5,
    c_void_p,
    c_int64,
    c_void_p,
    c_int64,
    c_void_p,
    *[c_int64] * 3,
    c_void_p,
)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """`rope_scaling` of a checkpoint, with its names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


def yarn_mscale(factor: float, m: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(factor) + 1; 1 for a factor of at most 1.

    The softmax scale of MLA includes yarn_mscale(factor, mscale_all_dim) ** 2.
    """
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def inv_freq(dim: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Radians per position of each pair: theta^(-2i / dim), i < dim / 2 -> [dim / 2] fp32.

    YaRN divides frequencies of less than `beta_slow` turns over the original context by `factor`, keeps those of more
    than `beta_fast` turns, and interpolates in between. Each operation rounds to fp32, as in the published
    implementations.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"rotary dimensions come in pairs, got {dim}")
    powers = np.float64(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    freq = np.float32(1.0) / powers.astype(np.float32)
    if yarn is None:
        return torch.from_numpy(freq)

    def pair_turning(times: float) -> float:
        """Fractional index of the pair that makes this many turns over the original context."""
        positions_per_turn = yarn.original_max_position_embeddings / times
        return dim * math.log(positions_per_turn / (2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0.0, 1.0)
    stretched = freq / np.float32(yarn.factor)
    return torch.from_numpy(stretched * ramp + freq * (np.float32(1.0) - ramp))


def cos_sin_table(inv_freq: Tensor, max_positions: int, scale: float = 1.0) -> Tensor:
    """[max_positions, dim] fp32 = [cos | sin] of position * inv_freq, times `scale`; inv_freq is [dim / 2] fp32.

    The angle is rounded to fp32; its cosine and sine are computed in double precision and rounded once, so a row does
    not depend on max_positions.
    """
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * inv_freq.numpy()[None, :]
    wide = angles.astype(np.float64)
    return torch.from_numpy((np.concatenate([np.cos(wide), np.sin(wide)], axis=1) * scale).astype(np.float32))


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotation of each token's pairs of columns: (a, b) -> (a cos - b sin, b cos + a sin)."""

    table: Tensor
    """[P, d] fp32, from `cos_sin_table`."""
    positions: Tensor
    """[T] int64, rows of the table."""
    interleaved: bool
    """Pairs are (x[2i], x[2i + 1]); otherwise (x[i], x[i + d / 2])."""

    @property
    def dim(self) -> int:
        """Number of rotated columns."""
        return self.table.shape[1]


def apply_rope(kernel: Kernel, x: Tensor, rope: RopeTable) -> Tensor:
    """Rotate the pairs of x [T, h, d] by the angles of the tokens' positions -> [T, h, d] in x's dtype.

    In fp32, each operation rounded, then one rounding to x's dtype. ValueError for a position outside the table; on a
    GPU NaN instead, as a check would synchronise.
    """
    table, positions = rope.table, rope.positions
    if x.dim() != 3 or x.dtype not in DTYPE_CODES or table.dim() != 2 or table.shape[1] != x.shape[2]:
        raise ValueError(
            f"apply_rope needs x [T, h, d] in float32 or bfloat16 and a table [P, d], got {list(x.shape)} in {x.dtype} "
            f"and {list(table.shape)}"
        )
    if positions.shape != x.shape[:1] or positions.dtype != torch.int64 or table.dtype != torch.float32:
        raise ValueError(
            f"apply_rope needs {x.shape[0]} int64 positions and a float32 table, got {list(positions.shape)}"
        )
    y: Tensor = kernel.run(x, rope)
    return y


def _outside(table: Tensor) -> ValueError:
    return ValueError(f"a position lies outside the rotary table of {table.shape[0]} positions: raise max_positions")


@register("apply_rope", "cpu")
def _apply_rope_cpu(x: Tensor, rope: RopeTable) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    table, positions = rope.table.contiguous(), rope.positions.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    status = torch.zeros(1, dtype=torch.int64)
    shoal_apply_rope(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        *x.shape,
        table.data_ptr(),
        table.shape[0],
        positions.data_ptr(),
        int(rope.interleaved),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        num_threads(x.numel()),
        status.data_ptr(),
    )
    if status.item():
        raise _outside(table)
    return out


@register("apply_rope", "reference")
def apply_rope_reference(x: Tensor, rope: RopeTable) -> Tensor:
    table, positions = rope.table, rope.positions
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < table.shape[0]:
        raise _outside(table)
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    if rope.interleaved:
        a, b = x.float().reshape(*x.shape[:2], x.shape[2] // 2, 2).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
