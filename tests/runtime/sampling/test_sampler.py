"""The sampler against hand-computed distributions, and its independence of company."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.philox import uniform
from shoal.runtime.sampling.sampler import SampledToken, Sampler, SamplingRow, _draw, resolve_seed
from shoal.runtime.types import SamplingParams


def row(
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    *,
    seed: int = 0,
    index: int = 0,
    eos: Sequence[int] = (),
    **params: Any,
) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(**params),
        prompt_token_ids=prompt,
        output_token_ids=output,
        seed=seed,
        sample_index=index,
        eos_token_ids=eos,
    )


def sample_one(logits: Sequence[float], r: SamplingRow) -> SampledToken:
    return Sampler(len(logits)).sample(torch.tensor([list(logits)], dtype=torch.float32), [r])[0]


def support(logits: Sequence[float], num_seeds: int = 400, **params: Any) -> set[int]:
    """The tokens that come out over many seeds."""
    matrix = torch.tensor([list(logits)] * num_seeds, dtype=torch.float32)
    return {t.token_id for t in Sampler(len(logits)).sample(matrix, [row(seed=s, **params) for s in range(num_seeds)])}


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.full((3, 1001), -1.0)
    logits[0, [700, 3, 999]] = 2.5
    logits[1, 1000] = 2.5
    logits[2] = 0.0
    logits[2, 0] = -0.0
    assert [t.token_id for t in Sampler(1001).sample(logits, [row(temperature=0.0)] * 3)] == [3, 1000, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({5: math.nan}, "NaN"),
        ({5: math.nan, 6: math.inf}, "NaN"),
        ({6: math.inf}, "+Inf"),
        (dict.fromkeys(range(16), -math.inf), "all -Inf"),
    ],
)
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.9, "logprobs": 2}])
def test_a_bad_row_is_that_rows_error_only(bad: dict[int, float], message: str, params: dict[str, Any]) -> None:
    logits = torch.randn((3, 16), generator=torch.Generator().manual_seed(0))
    rows = [row(seed=i, **params) for i in range(3)]
    good = Sampler(16).sample(logits, rows)
    broken = logits.clone()
    for i, value in bad.items():
        broken[1, i] = value
    out = Sampler(16).sample(broken, rows)
    assert [out[0], out[2]] == [good[0], good[2]]
    assert out[1].token_id == -1
    assert out[1].logprobs is None
    assert message in (out[1].error or "")


def test_some_minus_infinities_are_fine() -> None:
    out = sample_one([-math.inf, 1.0, -math.inf], row(logprobs=3))
    assert out.token_id == 1
    assert out.logprobs is not None
    assert [(i, v.logprob, v.rank) for i, v in out.logprobs.items()] == [
        (1, 0.0, 1),
        (0, -math.inf, 2),
        (2, -math.inf, 3),
    ]


def test_min_tokens_that_mask_everything_are_an_error() -> None:
    out = sample_one([0.0, -math.inf], row(temperature=0.0, min_tokens=1, eos=[0]))
    assert out.token_id == -1
    assert "min_tokens" in (out.error or "")


def test_a_bias_outside_the_vocabulary_is_an_error() -> None:
    out = sample_one([0.0, 1.0], row(logit_bias={2: 1.0}))
    assert "token 2" in (out.error or "")


def test_an_overflow_from_a_penalty_is_an_error() -> None:
    out = sample_one([3e38, 0.0], row([0], temperature=0.0, repetition_penalty=0.5))
    assert "penalties" in (out.error or "")


def test_logprobs_and_ranks_of_the_raw_distribution() -> None:
    logits = logs(0.1, 0.4, 0.3, 0.2)
    out = sample_one(logits, row(temperature=0.0, logprobs=2, logit_bias={3: 50.0}))
    assert out.token_id == 3
    assert out.logprobs is not None
    assert list(out.logprobs) == [3, 1, 2]  # the sampled token first, then the best
    assert [v.rank for v in out.logprobs.values()] == [3, 1, 2]
    for token_id, value in out.logprobs.items():
        assert value.logprob == pytest.approx(logits[token_id], abs=1e-6)
    assert (out.logprob, out.rank) == (out.logprobs[3].logprob, 3)


def test_the_sampled_token_is_not_repeated_and_ties_rank_by_id() -> None:
    out = sample_one([1.0, 2.0, 1.0, 2.0, 1.0], row(temperature=0.0, logprobs=4))
    assert out.logprobs is not None
    assert [(i, v.rank) for i, v in out.logprobs.items()] == [(1, 1), (3, 2), (0, 3), (2, 4)]
    out = sample_one([1.0, 2.0, 1.0, 2.0, 1.0], row(temperature=0.0, logprobs=0, logit_bias={4: 9.0}))
    assert out.logprobs is not None
    assert [(i, v.rank) for i, v in out.logprobs.items()] == [(4, 5)]


def test_many_equal_logits_rank_by_id() -> None:
    out = sample_one([0.0, 1.0] * 2000, row(temperature=0.0, logprobs=900))
    assert out.logprobs is not None
    assert [(i, v.rank) for i, v in out.logprobs.items()] == [(2 * i + 1, i + 1) for i in range(900)]


def test_no_logprobs_unless_asked() -> None:
    out = sample_one([1.0, 2.0], row(temperature=0.0))
    assert (out.logprobs, out.logprob, out.rank) == (None, None, None)


def test_logprobs_match_a_float64_log_softmax_and_more_than_the_vocabulary_gives_all() -> None:
    logits = torch.randn((2, 500), generator=torch.Generator().manual_seed(1)) * 4
    expected = torch.log_softmax(logits.double(), dim=-1)
    for i, out in enumerate(Sampler(500).sample(logits, [row(temperature=0.0, logprobs=1000)] * 2)):
        assert out.logprobs is not None
        assert len(out.logprobs) == 500
        assert sorted(v.rank for v in out.logprobs.values()) == list(range(1, 501))
        for token_id, value in out.logprobs.items():
            assert value.logprob == pytest.approx(float(expected[i, token_id]), abs=2e-6)


def test_repetition_penalty_covers_prompt_and_output() -> None:
    # 2.0 / 2 = 1.0 and -0.5 * 2 = -1.0; token 2 keeps 1.5 and wins.
    assert sample_one([2.0, -0.5, 1.5], row([0, 0], [1], temperature=0.0, repetition_penalty=2.0)).token_id == 2
    # A negative logit is multiplied: -1.0 * 2 = -2.0.
    assert sample_one([-1.0, -1.5], row([0], [], temperature=0.0, repetition_penalty=2.0)).token_id == 1
    # A penalty below 1 helps what was seen: 1.0 / 0.5 = 2.0.
    assert sample_one([1.0, 1.5], row([0], temperature=0.0, repetition_penalty=0.5)).token_id == 0


def test_frequency_penalty_counts_the_output_only() -> None:
    # Generated three times: 2.0 - 3 * 0.5 = 0.5; once: 1.5 - 0.5 = 1.0; only in the prompt: still 0.9.
    logits = [2.0, 1.5, 0.9]
    assert sample_one(logits, row([2, 2, 2], [0, 1, 0, 0], temperature=0.0, frequency_penalty=0.5)).token_id == 1
    assert sample_one(logits, row([2, 2, 2], [0, 1, 0, 0, 1], temperature=0.0, frequency_penalty=0.5)).token_id == 2


def test_presence_penalty_does_not_count() -> None:
    # 2.0 - 0.75 = 1.25 however often token 0 appeared.
    assert sample_one([2.0, 1.2], row([], [0] * 9, temperature=0.0, presence_penalty=0.75)).token_id == 0
    assert sample_one([2.0, 1.3], row([], [0], temperature=0.0, presence_penalty=0.75)).token_id == 1
    assert sample_one([2.0, 1.3], row([0], [], temperature=0.0, presence_penalty=0.75)).token_id == 0


def test_penalties_add_up_in_order() -> None:
    # ((4.0 + 2.0 bias) / 1.5) - 2 * 0.5 - 0.25 = 2.75
    params: dict[str, Any] = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    params["logit_bias"] = {0: 2.0}
    assert sample_one([4.0, 2.74], row([], [0, 0], temperature=0.0, **params)).token_id == 0
    assert sample_one([4.0, 2.76], row([], [0, 0], temperature=0.0, **params)).token_id == 1


def test_min_tokens_masks_what_would_end_the_row() -> None:
    logits = [5.0, 4.0, 3.0]
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [1, 99]}
    assert sample_one(logits, row([], [7], eos=[0], **params)).token_id == 2
    assert sample_one(logits, row([], [7, 7], eos=[0], **params)).token_id == 0
    assert sample_one(logits, row([], [7], eos=[0], ignore_eos=True, **params)).token_id == 0


def test_sampled_tokens_follow_the_softmax() -> None:
    n = 20000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    for temperature in (1.0, 0.5):
        out = Sampler(12).sample(logits.expand(n, 12), [row(seed=s, temperature=temperature) for s in range(n)])
        counts = np.bincount([t.token_id for t in out], minlength=12)
        expected = torch.softmax(logits.double() / temperature, -1).numpy() * n
        assert expected.min() > 5
        assert ((counts - expected) ** 2 / expected).sum() < 31.26  # 11 degrees of freedom, p = 0.001


def test_the_truncated_distribution_is_renormalised() -> None:
    n = 5000
    logits = torch.tensor(logs(0.1, 0.4, 0.3, 0.2)).expand(n, 4)
    out = Sampler(4).sample(logits, [row([], range(s), seed=1, top_k=2) for s in range(n)])
    share = sum(t.token_id == 1 for t in out) / n
    assert {t.token_id for t in out} == {1, 2}
    assert abs(share - 4 / 7) < 4 * (4 / 7 * 3 / 7 / n) ** 0.5


def test_inversion_runs_in_order_of_token_id() -> None:
    edges = [0.2, 0.5, 0.6, 1.0]  # cumulative distribution of the probabilities below
    for seed in range(200):
        u = uniform(seed, 3, 1)
        expected = next(i for i, edge in enumerate(edges) if u < edge)
        assert sample_one(logs(0.2, 0.3, 0.1, 0.4), row([], [9, 9, 9], seed=seed, index=1)).token_id == expected


def test_a_draw_on_an_edge_belongs_to_the_next_token_with_a_weight() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf, 0.0], dtype=np.float32)
    drawn = [_draw(logits, np.float32(0.0), SamplingParams(), draw) for draw in (0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53)]
    assert drawn == [1, 1, 3, 3]


def test_top_p_includes_the_token_that_crosses() -> None:
    logits = logs(0.1, 0.5, 0.15, 0.25)
    assert support(logits, top_p=0.4) == {1}
    assert support(logits, top_p=0.6) == {1, 3}
    assert support(logits, top_p=0.8) == {1, 2, 3}
    assert support(logits, top_p=0.95) == {0, 1, 2, 3}
    assert support(logits, top_p=1e-9) == {1}


def test_top_p_takes_ties_by_id() -> None:
    assert support([0.0] * 8, top_p=0.5) == {0, 1, 2, 3}  # 4 of 8 equal ones reach 0.5 exactly
    assert support([0.0] * 8, top_p=0.51) == {0, 1, 2, 3, 4}
    assert support([0.0, 0.0, 3.0, 0.0], top_p=0.9) == {0, 2}  # 0.87, then the first of the three equal ones


def test_top_p_applies_to_what_top_k_left() -> None:
    # Of 0.4 and 0.3, renormalised 0.57 and 0.43: the first alone reaches 0.55, but not 0.6.
    logits = logs(0.4, 0.3, 0.2, 0.1)
    assert support(logits, top_k=2, top_p=0.55) == {0}
    assert support(logits, top_k=2, top_p=0.6) == {0, 1}


def test_top_k_takes_ties_by_id() -> None:
    logits = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    assert support(logits, top_k=1) == {1}
    assert support(logits, top_k=2) == {1, 3}
    assert support(logits, top_k=4) == {0, 1, 3, 5}
    for everything in (0, -1, 6, 100):
        assert support(logits, top_k=everything) == set(range(6))


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = [math.log(8.0), 0.0, math.log(4.0), math.log(2.0)]
    assert support(logits, min_p=0.45) == {0, 2}
    assert support(logits, min_p=0.2) == {0, 2, 3}
    assert support(logits, min_p=1.0) == {0}
    # At temperature 2 the ratios are square roots: 1, 0.35, 0.71, 0.5.
    assert support(logits, min_p=0.45, temperature=2.0) == {0, 2, 3}


def test_a_tiny_temperature_is_greedy_and_never_overflows() -> None:
    assert support([3e38, -3e38, 2.9e38, 0.0], 20, temperature=5e-324) == {0}
    assert support([1.0, 1.0, 0.5], 50, temperature=1e-300) == {0, 1}


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999999, 1 - 2**-53])
def test_top_p_against_a_full_sort(top_p: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for scale in (0.1, 2.0, 30.0):
        logits = (torch.randn(300, generator=generator) * scale).round(decimals=1)
        weights = torch.exp(logits.double() - logits.max().double())
        order = sorted(range(300), key=lambda i: (-float(weights[i]), i))
        kept: list[int] = []
        for i in order:
            kept.append(i)
            if sum(float(weights[k]) for k in kept) >= top_p * float(weights.sum()):
                break
        cumulative = np.cumsum([float(weights[k]) for k in sorted(kept)])
        for seed in range(100):
            target = uniform(seed, 0, 0) * cumulative[-1]
            expected = sorted(kept)[int((cumulative <= target).sum())]
            assert sample_one(logits.tolist(), row(seed=seed, top_p=top_p)).token_id == expected


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3, "repetition_penalty": 1.2},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 0},
    {"top_k": 20, "min_p": 0.01, "logprobs": 5},
    {"temperature": 1.3, "frequency_penalty": 0.3, "logit_bias": {4: 1.5}, "logprobs": 1},
]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 9), st.sampled_from([17, 1001, 4099]))
def test_a_row_does_not_depend_on_its_company(data: st.DataObject, num_rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn((num_rows, vocab_size), generator=generator) * 3
    rows = [row([1, 2, 3], [4, 4, 5], seed=i, **data.draw(st.sampled_from(PARAMS))) for i in range(num_rows)]
    sampler = Sampler(vocab_size)
    together = sampler.sample(logits, rows)
    order = data.draw(st.permutations(range(num_rows)))
    shuffled = sampler.sample(logits[order], [rows[i] for i in order])
    assert [together[i] for i in order] == shuffled
    for i in range(num_rows):
        padded = torch.empty(vocab_size + 1)  # another alignment in memory
        padded[1:] = logits[i]
        assert sampler.sample(logits[i : i + 1], [rows[i]]) == [together[i]]
        assert sampler.sample(padded[1:].unsqueeze(0), [rows[i]]) == [together[i]]


def test_position_and_index_change_the_draw_and_the_prompt_does_not() -> None:
    logits = torch.zeros((64, 50))
    sampler = Sampler(50)

    def tokens(rows: list[SamplingRow]) -> list[int]:
        return [t.token_id for t in sampler.sample(logits, rows)]

    base = tokens([row([], [0] * p, seed=7) for p in range(64)])
    assert base == tokens([row([3, 4], [1] * p, seed=7) for p in range(64)])
    assert base != tokens([row([], [0] * p, seed=7, index=1) for p in range(64)])
    assert base != tokens([row([], [0] * p, seed=8) for p in range(64)])
    assert len(set(base)) > 20


def test_prompt_logprobs_score_the_given_tokens() -> None:
    logits = torch.tensor([logs(0.5, 0.25, 0.25), logs(0.1, 0.2, 0.7), [math.nan, 0.0, 0.0]])
    first, second, third = Sampler(3).prompt_logprobs(logits, [2, 2, 0], 2)
    assert first.logprobs is not None
    assert [(i, v.rank) for i, v in first.logprobs.items()] == [(2, 3), (0, 1), (1, 2)]
    assert first.logprob == pytest.approx(math.log(0.25), abs=1e-6)
    assert second.logprobs is not None
    assert [(i, v.rank) for i, v in second.logprobs.items()] == [(2, 1), (1, 2)]
    assert third.token_id == -1
    assert "NaN" in (third.error or "")


def test_prompt_and_sampled_logprobs_are_the_same_bits() -> None:
    logits = torch.randn((4, 777), generator=torch.Generator().manual_seed(2))
    sampled = Sampler(777).sample(logits, [row(seed=i, logprobs=4) for i in range(4)])
    assert Sampler(777).prompt_logprobs(logits, [t.token_id for t in sampled], 4) == sampled


def test_resolve_seed() -> None:
    assert resolve_seed(0, 5, 1) == 0
    assert resolve_seed(-3, 5, 1) == -3
    derived = {resolve_seed(None, run, index) for run in range(20) for index in range(20)}
    assert len(derived) == 400
    assert all(0 <= s < 2**63 for s in derived)
    assert resolve_seed(None, 1, 23) != resolve_seed(None, 12, 3)
    # sha256sum of "shoal seed 0 0" begins 85472945f31fb944.
    assert resolve_seed(None, 0, 0) == 0x85472945F31FB944 >> 1
