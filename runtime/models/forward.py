"""What every layer of a forward pass is given besides the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shoal.kernels.attention import PagedLayout

Tap = Callable[[int, str, Tensor], None]
"""Called with (layer, op, tensor) for the named intermediate results; -1 is the layer of what is outside the layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """The tensors of one step that attention needs; passed down the model, never a global. T tokens.

    tokens of the step:   those of `per_head` | those of `absorbed`      each in the order of their sequences

    Which form of attention a token takes depends on its row only: see `ModelConfig.num_per_head_tokens`.
    """

    per_head: PagedLayout
    absorbed: PagedLayout
    positions: Tensor
    """[T] int64: position of each token in its sequence."""
    slot_mapping: Tensor
    """[T] int64: where each token's record is written."""
    tap: Tap | None = None
    """Sees intermediate results; the mismatch reporter and the tests of selection use it."""

    def emit(self, layer: int, op: str, tensor: Tensor) -> None:
        """Show an intermediate result to the tap, where there is one."""
        if self.tap is not None:
            self.tap(layer, op, tensor)
