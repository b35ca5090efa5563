"""Sampling of the next token, greedy or at a temperature, with random numbers that are a function of the row.

N rows, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import uniforms
from .registry import Kernel, register


def sample_tokens(
    kernel: Kernel, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    """-> token ids [N] int64 for logits [N, V] float32; -1 for a row with NaN or +Inf, or with nothing but -Inf.

    temperatures: [N] float32, 0 for greedy: the highest logit, of equal ones the lowest id. seeds, positions
    and sample_indices: [N] int64, the arguments of `philox.uniforms`.
    With a temperature: weights exp((logit - highest) / temperature), the difference in fp32, the rest in fp64; the
    token is the first whose cumulative weight, in order of id, exceeds uniform * total. The order of the sums depends
    on the backend, and is the same for every row.
    """
    integers = (seeds, positions, sample_indices)
    _check("sample_tokens", logits, (temperatures,), integers)
    tokens: Tensor = kernel.run(logits, temperatures, *integers)
    return tokens


def mask_logits(kernel: Kernel, logits: Tensor, bitmask: Tensor) -> Tensor:
    """-> [N, V] float32: the logits of the tokens whose bit is set, -Inf for the others. NaN and +Inf always stay.

    bitmask: [N, ceil(V / 32)] int32; token i is bit i % 32, the lowest being 0, of word i // 32.
    """
    _check("mask_logits", logits, (), ())
    shape = (logits.shape[0], (logits.shape[1] + 31) // 32)
    if bitmask.shape != shape or bitmask.dtype != torch.int32:
        raise ValueError(
            f"mask_logits needs a bitmask {list(shape)} in torch.int32, got {list(bitmask.shape)} in {bitmask.dtype}"
        )
    masked: Tensor = kernel.run(logits, bitmask)
    return masked


def truncate_logits(
    kernel: Kernel, logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """-> [N, V] float32: the logits of the tokens that may be drawn, -Inf for the others.

    temperatures, top_p and min_p: [N] float32; top_k: [N] int64, 0 for all. Applied in this order:
    top_k   the first k by (logit descending, id ascending)
    min_p   weights of at least min_p, the highest weight being 1
    top_p   of the rest, the shortest prefix by (logit descending, id ascending) that reaches top_p of its weight
    Weights are exp((logit - highest) / temperature) in fp32, and are summed as integers of 2^-40, so in any order.
    Rows at temperature 0 and rows without a finite highest logit stay as they are.
    """
    _check("truncate_logits", logits, (temperatures, top_p, min_p), (top_k,))
    truncated: Tensor = kernel.run(logits, temperatures, top_k, top_p, min_p)
    return truncated


def token_logprobs(kernel: Kernel, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log_softmax of the logits at some tokens of each row [N, M] float32, the rank of the first of them [N] int64).

    token_ids: [N, M] int64; rows whose first one is -1 give NaN and rank 0. The most likely token has rank 1; order is
    by (logit descending, id ascending). log_softmax is (logit - highest) - log(sum of exp(logit - highest)): fp32, with
    the sum in fp64 in an order that depends on the backend.
    """
    _check("token_logprobs", logits, (), tuple(token_ids.unbind(1)))
    logprobs: Tensor
    ranks: Tensor
    logprobs, ranks = kernel.run(logits, token_ids)
    return logprobs, ranks


def _check(op: str, logits: Tensor, floats: tuple[Tensor, ...], integers: tuple[Tensor, ...]) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.shape[1]:
        raise ValueError(f"{op} needs logits [N, V] in float32, got {list(logits.shape)} in {logits.dtype}")
    for group, dtype in ((floats, torch.float32), (integers, torch.int64)):
        for values in group:
            if values.shape != logits.shape[:1] or values.dtype != dtype:
                raise ValueError(f"{op} needs {len(logits)} {dtype}, got {list(values.shape)} in {values.dtype}")


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


@register("mask_logits", "reference")
@register("mask_logits", "cpu")
def _mask_logits_reference(logits: Tensor, bitmask: Tensor) -> Tensor:
    ids = torch.arange(logits.shape[1], device=logits.device)
    allowed = (bitmask[:, ids >> 5] >> (ids & 31).int()) & 1
    return torch.where(allowed.bool() | ~(logits < torch.inf), logits, -torch.inf)


@register("truncate_logits", "reference")
@register("truncate_logits", "cpu")
def _truncate_logits_reference(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    ordered, ids = logits.sort(dim=1, descending=True, stable=True)
    weights = torch.exp((ordered - ordered[:, :1]) / temperatures.unsqueeze(1))
    exact = (weights * 2.0**40).long()
    k = torch.where(top_k > 0, top_k, logits.shape[1]).unsqueeze(1)
    kept = (torch.arange(logits.shape[1], device=logits.device) < k) & (weights >= min_p.unsqueeze(1))
    mass = torch.where(kept, exact, 0)
    wanted = (top_p.double() * mass.sum(dim=1).double()).ceil().long().clamp_min(1).unsqueeze(1)
    kept &= (top_p >= 1.0).unsqueeze(1) | (mass.cumsum(dim=1) - mass < wanted)
    kept |= ~((temperatures > 0) & torch.isfinite(logits.max(dim=1).values)).unsqueeze(1)
    stays = torch.zeros_like(kept).scatter_(1, ids, kept)
    return torch.where(stays, logits, -torch.inf)


@register("token_logprobs", "reference")
@register("token_logprobs", "cpu")
def _token_logprobs_reference(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    highest = logits.max(dim=1, keepdim=True).values
    log_sum = torch.exp(logits - highest).double().sum(dim=1).log().float()
    chosen, first = logits.gather(1, token_ids.clamp_min(0)), token_ids[:, :1]
    earlier = torch.arange(logits.shape[1], device=logits.device) < first
    ranks = 1 + ((logits > chosen[:, :1]) | ((logits == chosen[:, :1]) & earlier)).sum(dim=1)
    logprobs = chosen - highest - log_sum.unsqueeze(1)
    return torch.where(first >= 0, logprobs, torch.nan), torch.where(first.squeeze(1) >= 0, ranks, 0)
