"""The next token of rows of logits, greedy or at a temperature, with random numbers that are a function of the row."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import uniforms
from .registry import implementation, register


def sample_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    """-> token ids [N] int64 for logits [N, V] float32; -1 for a row with NaN or +Inf, or with nothing but -Inf.

    temperatures: [N] float32, 0 for the highest logit, of equal ones the lowest id. seeds, positions
    and sample_indices: [N] int64, the arguments of `philox.uniforms`.
    With a temperature: weights exp((logit - highest) / temperature), the difference in fp32, the rest in fp64; the
    token is the first whose cumulative weight, in order of id, exceeds uniform * total. The order of the sums is the
    backend's, and the same for every row.
    """
    num_rows = logits.shape[0]
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.shape[1]:
        raise ValueError(f"sample_tokens needs logits [N, V] in float32, got {list(logits.shape)} in {logits.dtype}")
    wanted = ((temperatures, torch.float32), (seeds, torch.int64), (positions, torch.int64))
    for values, dtype in (*wanted, (sample_indices, torch.int64)):
        if values.shape != (num_rows,) or values.dtype != dtype:
            raise ValueError(f"sample_tokens needs {num_rows} {dtype}, got {list(values.shape)} in {values.dtype}")
    tokens: Tensor = implementation("sample_tokens")(logits, temperatures, seeds, positions, sample_indices)
    return tokens


@register("sample_tokens", "reference")
@register("sample_tokens", "cpu")
def _sample_tokens_reference(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    highest, best = logits.max(dim=1)  # of equal logits some id
    best = (logits == highest.unsqueeze(1)).int().argmax(dim=1)
    draws = torch.from_numpy(uniforms(seeds.tolist(), positions.tolist(), sample_indices.tolist())).to(logits.device)
    weights = torch.exp((logits - highest.unsqueeze(1)).double() / temperatures.double().unsqueeze(1))
    cumulative = weights.cumsum(dim=1)
    drawn = (cumulative <= (draws * cumulative[:, -1]).unsqueeze(1)).sum(dim=1)
    tokens = torch.where(temperatures > 0, drawn, best)
    return torch.where(torch.isfinite(highest), tokens, -1)
