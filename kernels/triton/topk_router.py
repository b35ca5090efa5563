"""Expert selection: one program per token, the scores of all experts in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import register


@triton.jit
def _first_best(scores, index, NONE: tl.constexpr):
    """Index of the largest value in `scores`; of equal ones the lowest `index`."""
    return tl.min(tl.where(scores == tl.max(scores), index, NONE))


@triton.jit
def _route_kernel(
    logits,
    bias,
    topk_idx,
    topk_weights,
    num_experts,
    num_groups,
    group_size,
    scale,
    topk_group,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, GROUP_SIZE)
    expert = group[:, None] * group_size + member[None, :]
    inside = (group[:, None] < num_groups) & (member[None, :] < group_size)
    x = tl.load(logits + token * num_experts + expert, mask=inside, other=0.0)
    probs = 1.0 / (1.0 + tl.exp(-x))
    scores = probs + tl.load(bias + expert, mask=inside, other=0.0)
    scores = tl.where(scores == scores, scores, -3.4028234663852886e38)  # NaN is below everything
    scores = tl.where(inside, scores, -float("inf"))
    expert = tl.where(inside, expert, num_experts)  # not the index of an expert

    if GROUPS > 1:
        best = tl.max(scores, axis=1)
        first = tl.min(tl.where(scores == best[:, None], member[None, :], GROUP_SIZE), axis=1)
        second = tl.max(tl.where(member[None, :] == first[:, None], -float("inf"), scores), axis=1)
        group_scores = tl.where(group_size > 1, best + second, best)
        group_scores = tl.where(group < num_groups, group_scores, -float("inf"))
        kept = group < 0
        for _ in range(topk_group):
            chosen = _first_best(tl.where(kept, -float("inf"), group_scores), tl.where(kept, GROUPS, group), GROUPS)
            kept = kept | (group == chosen)
        scores = tl.where(kept[:, None], scores, -float("inf"))

    slots = tl.arange(0, TOP_K_BLOCK)
    chosen_experts = tl.zeros((TOP_K_BLOCK,), dtype=tl.int32)
    weights = tl.zeros((TOP_K_BLOCK,), dtype=tl.float32)
    total = 0.0
    for k in tl.static_range(TOP_K):
        best = _first_best(scores, expert, num_experts)
        weight = tl.sum(tl.where(expert == best, probs, 0.0))
        total += weight
        chosen_experts = tl.where(slots == k, best, chosen_experts)
        weights = tl.where(slots == k, weight, weights)
        scores = tl.where(expert == best, -float("inf"), scores)
        expert = tl.where(expert == best, num_experts, expert)
    if NORMALIZE:
        weights = tl.div_rn(weights, tl.zeros_like(weights) + (total + 1e-20))
    tl.store(topk_idx + token * TOP_K + slots, chosen_experts.to(tl.int64), mask=slots < TOP_K)
    tl.store(topk_weights + token * TOP_K + slots, weights * scale, mask=slots < TOP_K)


@register("route", "triton")
def _route(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, norm_topk_prob: bool, scale: float
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    topk_idx = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        group_size = num_experts // n_group
        _route_kernel[(num_tokens,)](
            logits.contiguous(),
            bias.contiguous(),
            topk_idx,
            topk_weights,
            num_experts,
            n_group,
            group_size,
            scale,
            topk_group,
            GROUPS=triton.next_power_of_2(n_group),
            GROUP_SIZE=triton.next_power_of_2(group_size),
            TOP_K=top_k,
            TOP_K_BLOCK=triton.next_power_of_2(top_k),
            NORMALIZE=norm_topk_prob,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return topk_idx, topk_weights
