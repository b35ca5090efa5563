"""Into which tiles products are cut: a choice of speed alone, which changes no bit (see multiply.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .launch import has_fp8, num_sms


@dataclass(frozen=True)
class Tiles:
    """How a product is cut into programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    """As many as fit the device's shared memory, at most."""
    paired: bool = False
    """A program computes two tiles of the same rows, as those of experts that multiply gate and up always do."""
    maxnreg: int | None = None
    """Registers per thread, where fewer let a second program share the multiprocessor."""
    many_rows: bool = False
    """For more than 64 rows only."""

    def num_programs(self, num_rows: int, num_columns: int, *, gated: bool = False) -> int:
        """Programs that compute [num_rows, num_columns], or with `gated` as many columns of silu(gate) * up."""
        width = self.block_n * (2 if self.paired and not gated else 1)
        return int(triton.cdiv(num_rows, self.block_m) * triton.cdiv(num_columns, width))

    def stages(self, itemsize: int, shared_bytes: int, *, gated: bool = False) -> int:
        """`num_stages`, or fewer where shared memory is smaller."""
        stage = (self.block_m + self.block_n * (2 if self.paired or gated else 1)) * self.block_k * itemsize
        stage += 8 * self.block_m  # two scales of a row
        return max(1, min(self.num_stages, (shared_bytes - 2048) // stage))


TILES = {
    torch.float32: (Tiles(64, 64, 32, 4, 3),),
    torch.bfloat16: (
        Tiles(128, 128, 64, 8, 4, paired=True, many_rows=True),
        Tiles(128, 128, 64, 8, 4, many_rows=True),
        Tiles(64, 64, 128, 4, 4),
        Tiles(64, 32, 128, 4, 6),
    ),
    torch.float8_e4m3fn: (
        Tiles(128, 64, 128, 8, 3, paired=True, maxnreg=128, many_rows=True),
        Tiles(64, 64, 128, 4, 3, paired=True, many_rows=True),
        Tiles(64, 64, 128, 4, 6),
        Tiles(64, 32, 128, 4, 8),
    ),
    torch.uint8: (Tiles(64, 32, 128, 4, 4),),  # FP8 that is decoded in registers, of which that takes many
}
"""Large tiles use often what they load; small ones spread a small product over the device."""


def tiles_for(
    dtype: torch.dtype, num_rows: int, num_columns: int, device: torch.device, *, gated: bool = False
) -> Tiles:
    """The largest tiles for operands of `dtype` that occupy half of the device, or else the smallest."""
    if dtype == torch.float8_e4m3fn and not has_fp8(device):
        dtype = torch.uint8
    for tiles in TILES[dtype]:
        if num_rows <= 64 and tiles.many_rows:
            continue
        if 2 * tiles.num_programs(num_rows, num_columns, gated=gated) >= num_sms(device):
            return tiles
    return TILES[dtype][-1]
