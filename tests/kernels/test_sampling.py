"""Truncation and log-probabilities of sampled tokens against distributions that are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.ops import CPU_OPS


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([[math.log(p) for p in probabilities]])


def kept(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[int]:
    """The tokens that stay."""
    floats = [torch.tensor([value]) for value in (temperature, top_p, min_p)]
    out = CPU_OPS.truncate_logits(logits, floats[0], torch.tensor([top_k]), floats[1], floats[2])
    stays: list[int] = (~out[0].isneginf()).nonzero().flatten().tolist()
    assert torch.equal(out[0, stays], logits[0, stays])
    return stays


DESCENDING = logs(0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.65}, [0, 1]),
        ({"top_p": 0.75}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.45}, [0, 1, 2]),  # of 0.4: 0.18
        ({"top_k": 3, "top_p": 0.76}, [0, 1]),  # of 0.9: 0.684
        ({"top_k": 3, "top_p": 0.79}, [0, 1, 2]),  # of 0.9: 0.711
        ({"min_p": 0.45, "top_p": 0.79}, [0, 1, 2]),
        ({"temperature": 0.5, "top_p": 0.8}, [0, 1]),  # squares: 16 9 4 1 of 30
        ({"temperature": 0.0, "top_k": 1, "top_p": 0.1}, [0, 1, 2, 3]),
    ],
)
def test_what_truncation_leaves(limits: dict[str, float], expected: list[int]) -> None:
    assert kept(DESCENDING, **limits) == expected  # type: ignore[arg-type]
    assert kept(DESCENDING.flip(1), **limits) == [3 - i for i in reversed(expected)]  # type: ignore[arg-type]


def test_of_equal_logits_the_first_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0, 1.0]])
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_k=4) == [0, 1, 3, 4]
    assert kept(torch.zeros(1, 10), top_p=0.35) == [0, 1, 2, 3]
    assert kept(torch.zeros(1, 10), top_k=4, top_p=0.5) == [0, 1]


def test_rows_that_cannot_be_sampled_stay_as_they_are() -> None:
    for bad in (math.nan, math.inf):
        logits = torch.tensor([[0.0, bad, 1.0]])
        ones = torch.ones(1)
        out = CPU_OPS.truncate_logits(logits, ones, torch.tensor([1]), ones * 0.1, ones * 0.0)
        assert torch.equal(out.nan_to_num(7.0), logits.nan_to_num(7.0))
        zero = torch.zeros(1, dtype=torch.int64)
        assert CPU_OPS.sample_tokens(out, ones, zero, zero, zero).tolist() == [-1]


def test_logprobs_and_ranks() -> None:
    logits = torch.cat([DESCENDING + 5, torch.tensor([[2.0, 2.0, 2.0, -math.inf]])])
    logprobs, ranks = CPU_OPS.token_logprobs(logits, torch.tensor([[2, 0, 3], [1, 0, 3]]))
    assert logprobs[0].tolist() == pytest.approx([math.log(p) for p in (0.2, 0.4, 0.1)], abs=1e-6)
    assert logprobs[1].tolist() == pytest.approx([-math.log(3), -math.log(3), -math.inf])
    assert ranks.tolist() == [3, 2]
    logprobs, ranks = CPU_OPS.token_logprobs(logits, torch.tensor([[-1], [3]]))
    assert logprobs[0].isnan().all()
    assert ranks.tolist() == [0, 4]


def test_a_mask_removes_the_tokens_without_a_bit() -> None:
    logits = torch.arange(2.0 * 70).view(2, 70)
    bits = torch.tensor([[1 << 30 | 1, -(2**31), 1 << 5], [-1, -1, -1]], dtype=torch.int32)
    masked = CPU_OPS.mask_logits(logits, bits)
    assert (~masked[0].isneginf()).nonzero().flatten().tolist() == [0, 30, 63, 69]
    assert masked[0, [0, 30, 63, 69]].tolist() == [0.0, 30.0, 63.0, 69.0]
    assert torch.equal(masked[1], logits[1])
    assert torch.equal(logits, torch.arange(2.0 * 70).view(2, 70)), "the logits stay"


def test_a_mask_hides_no_broken_logits() -> None:
    none = torch.zeros(3, 1, dtype=torch.int32)
    logits = torch.tensor([[0.0, math.nan], [math.inf, 0.0], [-math.inf, 0.0]])
    masked = CPU_OPS.mask_logits(logits, none)
    assert (
        masked.nan_to_num(7.0).tolist()
        == logits.new_tensor([[-math.inf, 7.0], [math.inf, -math.inf], [-math.inf] * 2]).nan_to_num(7.0).tolist()
    )
    zero = torch.zeros(3, dtype=torch.int64)
    assert CPU_OPS.sample_tokens(masked, torch.ones(3), zero, zero, zero).tolist() == [-1, -1, -1]


def test_what_does_not_fit_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"mask_logits needs a bitmask \[1, 1\] in torch\.int32, got \[1, 2\]"):
        CPU_OPS.mask_logits(DESCENDING, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"mask_logits needs a bitmask .*, got \[1, 1\] in torch\.int64"):
        CPU_OPS.mask_logits(DESCENDING, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"truncate_logits needs 1 torch\.int64"):
        CPU_OPS.truncate_logits(DESCENDING, one, one, one, one)
    with pytest.raises(ValueError, match=r"token_logprobs needs logits \[N, V\] in float32"):
        CPU_OPS.token_logprobs(DESCENDING.double(), torch.zeros(1, 1, dtype=torch.int64))
