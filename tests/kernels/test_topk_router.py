"""Routing: hand-computed selections, a sorting oracle, ties, NaN and bits in company."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.kernels.backends import Backend
from shoal.kernels.ops import Ops
from tests.support.ops import CPU_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")


def _logit(p: list[float]) -> Tensor:
    return torch.tensor([[math.log(v / (1 - v)) for v in p]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_groups_stay_out_although_all_scores_are_negative(backend: Backend) -> None:
    # s = p - 1 is negative everywhere. Groups (0,1) (2,3) (4,5) score -0.5, -1.5, -1.2; the first stays. Its experts
    # win with s = -0.1 and -0.4; a mask of 0 would prefer experts of the masked groups.
    logits = _logit([0.9, 0.6, 0.3, 0.2, 0.7, 0.1])
    ops = Ops(backend)
    idx, weights = ops.route(
        logits,
        torch.full((6,), -1.0),
        n_group=3,
        topk_group=1,
        top_k=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
    )
    assert idx.tolist() == [[0, 1]]
    assert weights[0].tolist() == pytest.approx([2 * 0.9 / 1.5, 2 * 0.6 / 1.5], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_selects_but_does_not_weigh(backend: Backend) -> None:
    # s = 0.5, 0.3, 0.45, 0.1 + 0.5: experts 3, 0 are selected, in this order, and weigh by p = 0.1, 0.5
    logits, bias = _logit([0.5, 0.3, 0.45, 0.1]), torch.tensor([0.0, 0.0, 0.0, 0.5])
    ops = Ops(backend)
    idx, weights = ops.route(
        logits, bias, n_group=1, topk_group=1, top_k=2, norm_topk_prob=False, routed_scaling_factor=1.5
    )
    assert idx.tolist() == [[3, 0]]
    assert weights[0].tolist() == pytest.approx([0.15, 0.75], rel=1e-6)
    assert idx.dtype == torch.int64
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_counts_its_two_best_only(backend: Backend) -> None:
    # sums of two: 0.9 + 0.1, 0.5 + 0.4 (of 0.5 0.4 0.4), so the first group wins; by sums of three it would lose
    logits = _logit([0.9, 0.1, 0.05, 0.5, 0.4, 0.4])
    ops = Ops(backend)
    idx, _ = ops.route(
        logits, torch.zeros(6), n_group=2, topk_group=1, top_k=3, norm_topk_prob=True, routed_scaling_factor=1.0
    )
    assert idx.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_group_and_expert(backend: Backend) -> None:
    ops = Ops(backend)
    idx, weights = ops.route(
        torch.zeros(3, 12),
        torch.zeros(12),
        n_group=4,
        topk_group=2,
        top_k=5,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert weights.flatten().tolist() == pytest.approx([0.2] * 15)


def _oracle(logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int) -> list[list[int]]:
    chosen = []
    for row in (torch.sigmoid(logits.double()) + bias.double()).tolist():
        size = len(row) // n_group
        two_best = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: (-two_best[g], g))[:topk_group]
        experts = [e for e in range(len(row)) if e // size in kept]
        chosen.append(sorted(experts, key=lambda e: (-row[e], e))[:top_k])
    return chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "top_k"),
    [(256, 8, 4, 8), (384, 1, 1, 8), (8, 8, 3, 3), (6, 2, 2, 6), (1, 1, 1, 1)],
)
def test_matches_sorting(backend: Backend, experts: int, n_group: int, topk_group: int, top_k: int) -> None:
    torch.manual_seed(experts)
    logits, bias = torch.randn(20, experts), torch.randn(experts) * 0.1
    ops = Ops(backend)
    idx, weights = ops.route(
        logits,
        bias,
        n_group=n_group,
        topk_group=topk_group,
        top_k=top_k,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    assert idx.tolist() == _oracle(logits, bias, n_group, topk_group, top_k)
    p = torch.sigmoid(logits.double()).gather(1, idx)
    torch.testing.assert_close(weights.double(), p / p.sum(1, keepdim=True) * 2.5, rtol=1e-6, atol=0)


def test_a_token_keeps_its_bits_in_any_company_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.kernels.cpu_library.MIN_PARALLEL_WORK", 0)
    torch.manual_seed(3)
    logits, bias = torch.randn(300, 64) * 4, torch.randn(64)

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        return CPU_OPS.route(
            rows, bias, n_group=8, topk_group=4, top_k=6, norm_topk_prob=True, routed_scaling_factor=2.5
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        idx, weights = run(logits)
    finally:
        torch.set_num_threads(threads)
    for t in range(0, 300, 7):
        alone_idx, alone_weights = run(logits[t : t + 1])
        assert torch.equal(alone_idx[0], idx[t])
        assert torch.equal(alone_weights[0], weights[t])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinite_logits_select_distinct_experts(backend: Backend) -> None:
    logits = torch.tensor([[math.nan] * 8, [math.nan, 1.0, math.inf, -math.inf, 0.0, math.nan, 2.0, 3.0]])
    ops = Ops(backend)
    idx, weights = ops.route(
        logits, torch.zeros(8), n_group=1, topk_group=1, top_k=6, norm_topk_prob=False, routed_scaling_factor=1.0
    )
    assert idx.tolist() == [[0, 1, 2, 3, 4, 5], [2, 7, 6, 1, 4, 3]]
    assert weights[1, 0] == 1.0
    assert weights[1, 5] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: Backend) -> None:
    ops = Ops(backend)
    idx, weights = ops.route(
        torch.empty(0, 8),
        torch.zeros(8),
        n_group=2,
        topk_group=1,
        top_k=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    assert idx.shape == weights.shape == (0, 2)


def test_refuses_impossible_groups() -> None:
    for n_group, topk_group, top_k in ((3, 1, 1), (4, 5, 1), (4, 1, 3), (4, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match=r"experts"):
            CPU_OPS.route(
                torch.zeros(1, 8),
                torch.zeros(8),
                n_group=n_group,
                topk_group=topk_group,
                top_k=top_k,
                norm_topk_prob=True,
                routed_scaling_factor=1.0,
            )
