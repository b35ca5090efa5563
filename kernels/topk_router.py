"""Top-k routing of tokens to experts: sigmoid scores, selection by biased score, optionally within the best groups."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import CFunction, num_threads
from .registry import Kernel, register

shoal_route = CFunction(
    "shoal_route",
    c_void_p,
    *[c_int64] * 2,
    c_void_p,
    *[c_int64] * 4,
    c_float,
    c_void_p,
    c_void_p,
    c_int64,
)


def route(
    kernel: Kernel,
    logits: Tensor,
    bias: Tensor,
    *,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """-> (topk_idx [T, K] int64, topk_weights [T, K] fp32) for logits [T, E] fp32 and bias [E] fp32, K = top_k.

    p = sigmoid(logits) and s = p + bias in fp32; s selects, p weighs.
    1. The E experts form n_group contiguous groups; a group scores the sum of its two largest s. The topk_group best
       groups stay (ties: lower group); experts of the others are never selected, whatever the sign of s.
    2. The top_k best experts by (s descending, index ascending), in that order. NaN is below everything.
    3. weight = p / (sum of the K p in that order + 1e-20) if norm_topk_prob, else p; times routed_scaling_factor.
    ValueError when the groups do not divide the experts or cannot hold top_k of them.
    """
    num_experts = logits.shape[-1]
    if (
        logits.dim() != 2
        or logits.dtype != torch.float32
        or bias.dtype != torch.float32
        or bias.shape != (num_experts,)
    ):
        raise ValueError(
            f"route needs logits [T, E] and bias [E] in float32, got {list(logits.shape)} in {logits.dtype} "
            f"and {list(bias.shape)} in {bias.dtype}"
        )
    if n_group < 1 or num_experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"{num_experts} experts do not form n_group={n_group} equal groups with topk_group={topk_group}"
        )
    if not 1 <= top_k <= topk_group * (num_experts // n_group):
        raise ValueError(f"top_k={top_k} experts do not fit {topk_group} groups of {num_experts // n_group}")
    topk_idx: Tensor
    topk_weights: Tensor
    topk_idx, topk_weights = kernel.run(logits, bias, n_group, topk_group, top_k, norm_topk_prob, routed_scaling_factor)
    return topk_idx, topk_weights


@register("route", "cpu")
def _route_cpu(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, norm_topk_prob: bool, scale: float
) -> tuple[Tensor, Tensor]:
    logits, bias = logits.contiguous(), bias.contiguous()
    num_tokens, num_experts = logits.shape
    topk_idx = torch.empty(num_tokens, top_k, dtype=torch.int64)
    topk_weights = torch.empty(num_tokens, top_k)
    shoal_route(
        logits.data_ptr(),
        num_tokens,
        num_experts,
        bias.data_ptr(),
        n_group,
        topk_group,
        top_k,
        int(norm_topk_prob),
        scale,
        topk_idx.data_ptr(),
        topk_weights.data_ptr(),
        num_threads(logits.numel() * (top_k + 16)),
    )
    return topk_idx, topk_weights


@register("route", "reference")
def _route_reference(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, norm_topk_prob: bool, scale: float
) -> tuple[Tensor, Tensor]:
    probs = torch.sigmoid(logits)
    scores = probs + bias
    scores = scores.where(~scores.isnan(), torch.finfo(torch.float32).min)
    if n_group > 1:
        groups = scores.reshape(scores.shape[0], n_group, logits.shape[1] // n_group)
        group_scores = groups.sort(dim=2, descending=True).values[..., :2].sum(dim=2)
        kept = group_scores.sort(dim=1, descending=True, stable=True).indices[:, :topk_group]
        in_group = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
        scores = groups.masked_fill(~in_group.unsqueeze(2), -torch.inf).flatten(1)
    topk_idx = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = probs.gather(1, topk_idx)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return topk_idx, weights * scale
