"""The interface between a model and the engine that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..kv_cache.cache import KVCacheSpec
from .config import ModelConfig
from .forward import StepContext
from .weights import Weight, WeightSource


class Model(Protocol):
    """One rank's part of a model. Construction declares weights and reads nothing; `load` fills them."""

    config: ModelConfig

    def forward(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """input_ids [T] int64 -> hidden states after the final norm [T, H]; T may be 0."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, vocab_size] fp32; every rank of the replica calls it equally often."""
        ...

    def cache_specs(self, dtype: torch.dtype) -> list[KVCacheSpec]:
        """KV cache entries of a token, per layer, stored in `dtype`."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Weight]]:
        """(path, weight) of every weight, in the order of declaration."""
        ...

    def load(self, source: WeightSource) -> None:
        """Fill every weight; in place when the model was loaded before."""
        ...
