"""The values that travel through a forward pass: the step that is computed, and the hidden states between layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.parallel.spans import Spans

from ..kv_cache.cache import KVCache

Tap = Callable[[int, str, Tensor], None]
"""Called with (layer, op, tensor) for named intermediate results; operations outside the layers have layer -1."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """Positions and cache locations of the T tokens of one step.

    tokens of the step:   tokens of `mha` | tokens of `mqa`      each in the order of their sequences

    The form of attention that a token takes depends on its row only: see `ModelConfig.num_mha_tokens`.
    """

    mha: PagedLayout
    """Tokens that attend per head: keys and values are expanded from the latents."""
    mqa: PagedLayout
    """Tokens that attend to the latents themselves, with W_UK absorbed into the queries."""
    positions: Tensor
    """[T] int64: position of each token in its sequence."""
    slot_mapping: Tensor
    """[T] int64: cache slot that each token is written to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """Everything that layers need in a step besides the hidden states; passed down the model, never a global."""

    cache: KVCache
    metadata: AttentionMetadata
    spans: Spans = field(default_factory=Spans)
    """Spans of the layers, for those who measure."""
    tap: Tap | None = None
    """Receives intermediate results; used by the mismatch reporter and by tests of the selection."""
    _shared: dict[Callable[[StepContext], Any], Any] = field(default_factory=dict)

    def emit(self, layer: int, op: str, tensor: Tensor) -> None:
        """Pass an intermediate result to the tap, if there is one."""
        if self.tap is not None:
            self.tap(layer, op, tensor)

    def once(self, compute: Callable[[StepContext], T]) -> T:
        """`compute(self)`, computed by the first layer of the step that asks for it."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        value: T = self._shared[compute]
        return value


class Hidden(NamedTuple):
    """Hidden states between two layers."""

    delta: Tensor
    """[T, H]: output of the last block, not yet added to the residual stream."""
    residual: Tensor | None
    """[T, H]: the residual stream; None before the first layer."""
    topk_indices: Tensor | None
    """[tokens of `mqa`, index_topk] int32: last selection of an indexer, which later layers may share."""
