"""Weights of one module on its device: names relative to a prefix, in the compute dtype unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops
from shoal.kernels.quant import BlockFP8Weight

from ..checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A view of a checkpoint below a prefix such as `model.layers.3.self_attn`."""

    checkpoint: Checkpoint
    prefix: str
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    ue8m0: bool = False
    """Whether inputs of FP8 products are quantised with scales that are powers of two, as the weights' makers did."""

    def under(self, name: str) -> LayerWeights:
        """The view one level down."""
        return replace(self, prefix=f"{self.prefix}.{name}" if self.prefix else name)

    def read(self, name: str, *, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, or only the given rows of it."""
        return self.checkpoint.read(f"{self.prefix}.{name}", rows=rows, dtype=dtype or self.dtype).to(self.device)

    def pack(self, *names: str, rows: slice | None = None) -> PackedWeight:
        """The given rows of each matrix, one matrix over the other, for products: in 8 bits where all are stored so."""
        paths = [f"{self.prefix}.{name}" for name in names]
        if all(self.checkpoint.dtype(path) is torch.float8_e4m3fn for path in paths):
            stored = [self.checkpoint.read_fp8(path, rows=rows) for path in paths]
            return self.ops.pack_weight(BlockFP8Weight.cat(stored).to(self.device), dtype=self.dtype, ue8m0=self.ue8m0)
        return self.ops.pack_weight(torch.cat([self.read(name, rows=rows) for name in names]))
