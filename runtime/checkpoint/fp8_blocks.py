"""FP8 matrices with one scale per block of 128 x 128, as DeepSeek stores them.

<name>             float8_e4m3fn [rows, cols]
<name>_scale_inv   float32 [ceil(rows / 128), ceil(cols / 128)]
"""

from __future__ import annotations

import math

import torch

from shoal.kernels.quant import BlockFP8Weight

from .safetensors_file import TensorEntry
from .tensor_reader import TensorReader

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128


def check_scales(weight: TensorEntry, scales: TensorEntry | None) -> TensorEntry:
    """Return `scales`; ValueError unless they are one float per block of the FP8 matrix, edge blocks included."""
    scale_name = weight.name + SCALE_SUFFIX
    if len(weight.shape) != 2:
        raise ValueError(
            f"{weight.path}: {weight.name} is FP8 with shape {list(weight.shape)}; only matrices have block scales"
        )
    if scales is None:
        raise ValueError(f"{weight.path}: {weight.name} is FP8 but its scales, {scale_name}, are not in the checkpoint")
    blocks = tuple(math.ceil(size / BLOCK) for size in weight.shape)
    if scales.shape != blocks or scales.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{scales.path}: {scale_name} is {scales.dtype} {list(scales.shape)}, expected float32 {list(blocks)} for "
            f"{weight.name} {list(weight.shape)}"
        )
    return scales


def read_block_fp8(
    reader: TensorReader, weight: TensorEntry, scales: TensorEntry, rows: slice, cols: slice
) -> BlockFP8Weight:
    """Copy `weight[rows, cols]` and the scales of its blocks; `cols` starts at a block boundary.

    ValueError when a value is NaN, which no weight is.
    """
    assert cols.start % BLOCK == 0
    first_block = rows.start // BLOCK
    row_blocks = slice(first_block, math.ceil(rows.stop / BLOCK))
    col_blocks = slice(cols.start // BLOCK, math.ceil(cols.stop / BLOCK))
    scale_inv = reader.read(scales, row_blocks, col_blocks, torch.float32)
    values = reader.read(weight, rows, cols, torch.float8_e4m3fn)
    if bool((values.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError(f"{weight.path}: {weight.name} contains NaN; download the file again")
    return BlockFP8Weight.of_rows(values, scale_inv, row_offset=rows.start - first_block * BLOCK)
