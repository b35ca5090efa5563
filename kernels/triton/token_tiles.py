"""Tiles of consecutive tokens of one sequence, computed without synchronising with the device."""

from __future__ import annotations

import torch
from torch import Tensor


def token_tiles(cu_seqlens_q: Tensor, num_tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Tiles of up to `size` tokens of one sequence -> sequence ids and first tokens of the tiles, both int32.

    Unused tiles carry num_sequences as their sequence id.
    """
    num_sequences = cu_seqlens_q.shape[0] - 1
    ends = (cu_seqlens_q.diff() + (size - 1)).div(size, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(num_tokens // size + num_sequences, device=cu_seqlens_q.device)
    sequences = torch.searchsorted(ends, tiles, right=True)
    begins = torch.nn.functional.pad(ends, (1, 0))
    return sequences.int(), (cu_seqlens_q[sequences] + (tiles - begins[sequences]) * size).int()
