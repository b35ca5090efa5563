"""Where two runs of the same row part: the first intermediate tensor that differs, in the order of computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """The first tensor in which two traces differ."""

    layer: int
    op: str
    index: tuple[int, ...]
    """Index of the first differing element; its first entry is the token's position."""
    max_difference: float
    """Over the whole tensor; infinity where the shapes differ."""

    def __str__(self) -> str:
        where = "outside the layers" if self.layer < 0 else f"layer {self.layer}"
        return f"{where}, {self.op}, index {list(self.index)}: differs by up to {self.max_difference:g}"


class Trace:
    """A tap that keeps every intermediate tensor of one sequence, chunks put together.

    Replay the row alone, with the layout and chunk sizes of the run that is examined: `runner.tap = trace.tap`.
    """

    def __init__(self) -> None:
        self._chunks: dict[tuple[int, str], list[Tensor]] = {}

    def tap(self, layer: int, op: str, tensor: Tensor) -> None:
        """Keep a copy; rows are the tokens of the step."""
        self._chunks.setdefault((layer, op), []).append(tensor.detach().clone().cpu())

    def tensors(self) -> dict[tuple[int, str], Tensor]:
        """(layer, op) -> [positions, ..], in the order in which the first step computed them."""
        return {key: torch.cat(chunks) for key, chunks in self._chunks.items()}


def first_difference(a: Trace, b: Trace) -> Difference | None:
    """The first tensor of `a` that is not the same bits in `b`; None when all are."""
    others = b.tensors()
    for (layer, op), ours in a.tensors().items():
        theirs = others.get((layer, op))
        if theirs is None or theirs.shape != ours.shape:
            return Difference(layer, op, (), float("inf"))
        if not torch.equal(ours, theirs):
            index = (ours != theirs).nonzero()[0].tolist()
            spread = (ours.double() - theirs.double()).abs().max().item()
            return Difference(layer, op, tuple(index), spread)
    return None
