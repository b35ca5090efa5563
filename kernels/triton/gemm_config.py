"""GEMM tile configurations: they affect speed only, never results (see gemm.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .launch import has_fp8, num_sms


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and launch options of a GEMM."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    """Pipeline stages; fewer where the device has less shared memory."""
    paired: bool = False
    """A program computes two tiles of the same rows; gated GEMMs (gate and up) always do."""
    maxnreg: int | None = None
    """Registers per thread, limited where that lets two programs share a multiprocessor."""
    many_rows: bool = False
    """Use for more than 64 rows only."""

    def num_programs(self, num_rows: int, num_columns: int, *, gated: bool = False) -> int:
        """Number of programs for outputs [num_rows, num_columns]; `gated`: for those of silu(gate) * up."""
        width = self.block_n * (2 if self.paired and not gated else 1)
        return int(triton.cdiv(num_rows, self.block_m) * triton.cdiv(num_columns, width))

    def stages(self, itemsize: int, shared_bytes: int, *, gated: bool = False) -> int:
        """`num_stages`, or as many as fit into `shared_bytes`."""
        stage = (self.block_m + self.block_n * (2 if self.paired or gated else 1)) * self.block_k * itemsize
        stage += 8 * self.block_m  # two scales of a row
        return max(1, min(self.num_stages, (shared_bytes - 2048) // stage))


TILES = {
    torch.float32: (GemmConfig(64, 64, 32, 4, 3),),
    torch.bfloat16: (
        GemmConfig(128, 128, 64, 8, 4, paired=True, many_rows=True),
        GemmConfig(128, 128, 64, 8, 4, many_rows=True),
        GemmConfig(64, 64, 128, 4, 4),
        GemmConfig(64, 32, 128, 4, 6),
    ),
    torch.float8_e4m3fn: (
        GemmConfig(128, 64, 128, 8, 3, paired=True, maxnreg=128, many_rows=True),
        GemmConfig(64, 64, 128, 4, 3, paired=True, many_rows=True),
        GemmConfig(64, 64, 128, 4, 6),
        GemmConfig(64, 32, 128, 4, 8),
    ),
    torch.uint8: (GemmConfig(64, 32, 128, 4, 4),),  # FP8 decoded in registers, which takes many of them
}
"""Large tiles reuse more of what they load; small tiles spread a small GEMM over the device."""


def tiles_for(
    dtype: torch.dtype, num_rows: int, num_columns: int, device: torch.device, *, gated: bool = False
) -> GemmConfig:
    """The largest tiles for operands of `dtype` that occupy at least half of the device, or else the smallest."""
    if dtype == torch.float8_e4m3fn and not has_fp8(device):
        dtype = torch.uint8
    for tiles in TILES[dtype]:
        if num_rows <= 64 and tiles.many_rows:
            continue
        if 2 * tiles.num_programs(num_rows, num_columns, gated=gated) >= num_sms(device):
            return tiles
    return TILES[dtype][-1]
