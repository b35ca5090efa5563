"""Muon: momentum whose update of a matrix is replaced by the nearest semi-orthogonal matrix (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, from the Muon publication."""
ITERATIONS = 5


class Muon:
    """For matrices [.., R, C] of hidden layers, stacks of them included; anything else goes to AdamW.

    Gradients are the same on every rank. The ranks share the work: each updates every world-th matrix and sends it to
    the others.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, momentum: float, weight_decay: float, rank: int, world: int
    ) -> None:
        self.parameters = sorted(parameters, key=lambda p: p.numel(), reverse=True)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.rank, self.world = rank, world
        self.buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Parameters without a gradient keep their values and their momentum."""
        updated = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        for i in (i for i in updated if i % self.world == self.rank):
            p, buffer = self.parameters[i], self.buffers[i]
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalise(p.grad.lerp(buffer, self.momentum))
            p.mul_(1 - lr * self.weight_decay)
            p.add_(update, alpha=-lr * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
        self._share(self.parameters, updated)

    def gathered_state(self) -> list[Tensor]:
        """All momentum buffers; a collective."""
        self._share(self.buffers, list(range(len(self.buffers))))
        return self.buffers

    def load_state(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers

    def _share(self, tensors: Sequence[Tensor], indices: list[int]) -> None:
        for owner in range(self.world):
            owned = [tensors[i].detach() for i in indices if i % self.world == owner]
            flat = torch.cat([t.flatten() for t in owned])
            dist.broadcast(flat, owner)
            if owner != self.rank:
                for t, part in zip(owned, flat.split([t.numel() for t in owned]), strict=True):
                    t.copy_(part.view_as(t))


def orthogonalise(g: Tensor) -> Tensor:
    """[.., R, C] -> about U V^T of its singular value decomposition; singular values end up between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x
