"""Rows under a constraint, on the host and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shoal.runtime.sampling.device_sampler import DeviceSampler
from shoal.runtime.sampling.sampler import SampledToken, Sampler, SamplingRow
from shoal.runtime.structured.constraint import ConstraintError
from shoal.runtime.structured.token_mask import TokenMask, mask_of
from shoal.runtime.types import SamplingParams
from tests.support.ops import CPU_OPS

VOCAB = 40
EOS = 1


class Only:
    """Allows some tokens, whatever came before; fails without any."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        if not self.token_ids:
            raise ConstraintError("the grammar is too large")
        return mask_of(self.token_ids, VOCAB)


def row(
    *allowed: int, constrained: bool = True, output: Sequence[int] = (), seed: int = 0, **params: Any
) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(**params),
        prompt_token_ids=(5,),
        output_token_ids=output,
        seed=seed,
        eos_token_ids=(EOS,),
        constraint=Only(*allowed) if constrained else None,
    )


def sample(rows: list[SamplingRow], logits: torch.Tensor, on_device: bool) -> list[SampledToken]:
    if not on_device:
        return Sampler(VOCAB).sample(logits, rows)
    return DeviceSampler(VOCAB, torch.device("cpu"), CPU_OPS).begin(logits, rows).finish()


@pytest.mark.parametrize("on_device", [False, True])
def test_only_allowed_tokens_are_chosen_and_logprobs_are_the_models(on_device: bool) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 3], logits[:, 7], logits[:, 39] = 5.0, 2.0, 1.0
    rows = [
        row(7, 20, temperature=0.0, logprobs=1),
        row(20, 39, temperature=0.0),
        row(20, 39, 8, temperature=0.5, top_k=1),
        row(constrained=False, temperature=0.0, logprobs=0),
    ]
    sampled = sample(rows, logits, on_device)
    assert [s.token_id for s in sampled] == [7, 39, 39, 3]
    assert [s.error for s in sampled] == [None] * 4
    free = Sampler(VOCAB).sample(logits[:1], [row(constrained=False, temperature=0.0, logprobs=2)])[0]
    assert sampled[0].rank == 2, "of the model's own distribution"
    assert free.logprobs is not None
    assert sampled[0].logprobs is not None
    assert sampled[0].logprob == pytest.approx(free.logprobs[7].logprob, abs=1e-6)
    assert list(sampled[0].logprobs) == [7, 3]


@pytest.mark.parametrize("on_device", [False, True])
def test_draws_cover_what_is_allowed_and_nothing_else(on_device: bool) -> None:
    rows = [row(2, 11, 33, seed=i, temperature=1.0) for i in range(200)]
    assert {s.token_id for s in sample(rows, torch.zeros(200, VOCAB), on_device)} == {2, 11, 33}


@pytest.mark.parametrize("on_device", [False, True])
def test_a_failure_is_that_rows_error_only(on_device: bool) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[2, 9], logits[3, 4], logits[4, 6] = -torch.inf, torch.nan, torch.inf
    rows = [row(), row(8), row(9), row(8), row(8)]
    sampled = sample(rows, logits, on_device)
    assert sampled[0] == SampledToken(-1, error="the grammar is too large")
    assert sampled[1] == SampledToken(8)
    assert sampled[2].error is not None
    assert "structured_outputs" in sampled[2].error
    for broken in sampled[3:]:
        assert broken.error is not None
        assert "the model's logits contain" in broken.error


@pytest.mark.parametrize("on_device", [False, True])
def test_penalties_and_bias_choose_among_what_is_allowed(on_device: bool) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 7], logits[:, 8] = 1.0, 0.5
    rows = [
        row(7, 8, temperature=0.0, output=[7, 7], frequency_penalty=0.5),
        row(7, 8, temperature=0.0, output=[7], repetition_penalty=10.0),
        row(7, 8, temperature=0.0, logit_bias={8: 1.0, 30: 100.0}),
        row(7, EOS, temperature=0.0, min_tokens=5, logit_bias={EOS: 9.0}),
    ]
    chosen = [s.token_id for s in sample(rows, logits, on_device)]
    assert chosen == [8, 8, 8, EOS], "min_tokens are the constraint's"


def test_a_constrained_row_has_the_bits_that_it_has_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, VOCAB, generator=generator)
    rows = [row(*range(i, VOCAB, 3), constrained=i % 2 == 0, seed=i, temperature=0.9, logprobs=2) for i in range(24)]
    for on_device in (False, True):
        together = sample(rows, logits, on_device)
        for i in range(24):
            assert sample([rows[i]], logits[i : i + 1], on_device) == [together[i]]


def test_a_step_with_a_constrained_row_gives_no_tokens_ahead() -> None:
    sampler = DeviceSampler(VOCAB, torch.device("cpu"), CPU_OPS)
    free = row(constrained=False)
    assert sampler.begin(torch.zeros(2, VOCAB), [free, free]).token_ids is not None
    assert sampler.begin(torch.zeros(2, VOCAB), [free, row(3)]).token_ids is None
