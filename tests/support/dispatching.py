"""Experts whose outputs tell who they are, and random tokens for them, for the tests of the dispatchers."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.parallel.dispatcher import DispatchedTokens, TokenDispatcher

NUM_EXPERTS = 6
HIDDEN = 5


def affine_experts(tokens: DispatchedTokens, local_experts: list[int]) -> Tensor:
    """Expert e computes x * (e + 1) + e / 4 in the dtype of x."""
    assert int(tokens.num_tokens_per_expert.sum()) == len(tokens.x_row)
    assert len(local_experts) == len(tokens.num_tokens_per_expert)
    expert = torch.tensor(local_experts, dtype=torch.int64).repeat_interleave(tokens.num_tokens_per_expert)
    scale, shift = (expert + 1).to(tokens.x.dtype)[:, None], (expert / 4).to(tokens.x.dtype)[:, None]
    return in_out_rows(tokens, tokens.x[tokens.x_row] * scale + shift)


def in_out_rows(tokens: DispatchedTokens, y: Tensor) -> Tensor:
    return y if tokens.out_row is None else torch.empty_like(y).index_copy_(0, tokens.out_row, y)


def through(
    dispatcher: TokenDispatcher, local_experts: list[int], inputs: tuple[Tensor, Tensor, Tensor], layer: int = 0
) -> Tensor:
    tokens, handle = dispatcher.dispatch(*inputs, layer=layer)
    return dispatcher.combine(affine_experts(tokens, local_experts), handle, layer=layer)(inputs[0])


def random_inputs(
    num_tokens: int, top_k: int, dtype: torch.dtype, seed: int, hidden: int = HIDDEN
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    idx = idx.masked_fill(torch.rand(num_tokens, top_k, generator=generator) < 0.2, -1)
    return x, idx, torch.rand(num_tokens, top_k, generator=generator)
