"""Reading the weights of one module: names relative to a prefix, in the compute dtype unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..loader import Checkpoint


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A view of a checkpoint below a prefix such as `model.layers.3.self_attn`."""

    checkpoint: Checkpoint
    prefix: str
    dtype: torch.dtype

    def under(self, name: str) -> LayerWeights:
        """The view one level down."""
        return replace(self, prefix=f"{self.prefix}.{name}" if self.prefix else name)

    def read(self, name: str, *, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, or only the given rows of it."""
        return self.checkpoint.read(f"{self.prefix}.{name}", rows=rows, dtype=dtype or self.dtype)
