"""Triton's kernels that go row by row, interpreted, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.kv_format import FP8_CACHE, read_latents
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable, cos_sin_table, inv_freq
from tests.kernels.triton.interpreter import DEVICE, TRITON_OPS
from tests.support.ops import REFERENCE_OPS

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="interpreted here; tests/gpu is for devices")

R = TypeVar("R")
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_both(call: Callable[[Ops], R]) -> tuple[R, R]:
    """Results of a call on Triton's kernels and on the reference."""
    return call(TRITON_OPS), call(REFERENCE_OPS)


def assert_rows_alone(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each row alone has the bits that it has in company."""
    together = op(x)
    for i in range(len(x)):
        assert torch.equal(op(x[i : i + 1])[0], together[i])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), dim=st.integers(1, 1100), dtype=st.sampled_from(DTYPES), wide=st.booleans())
def test_norms(rows: int, dim: int, dtype: torch.dtype, wide: bool) -> None:
    x, residual = randn(rows, dim + 1, dtype=dtype)[:, 1:], randn(rows, dim, dtype=dtype, seed=1)
    weight, bias = randn(dim, seed=2), randn(dim, seed=3)
    added = x.float() if wide else x
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 1e-6)
    torch.testing.assert_close(*on_both(lambda ops: ops.rms_norm(x, weight, 1e-6)), rtol=rtol, atol=atol)
    torch.testing.assert_close(*on_both(lambda ops: ops.layer_norm(x, weight, bias, 1e-6)), rtol=rtol, atol=1e-4 + atol)
    (normed, total), (expected_normed, expected_total) = on_both(
        lambda ops: ops.add_rms_norm(added, residual, weight, 1e-6)
    )
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected_normed, rtol=rtol, atol=atol)


def test_norms_take_every_row_on_its_own() -> None:
    x, weight = randn(5, 300), randn(300, seed=1)
    assert_rows_alone(lambda rows: TRITON_OPS.rms_norm(rows, weight, 1e-6), x)
    assert_rows_alone(lambda rows: TRITON_OPS.layer_norm(rows, weight, weight, 1e-6), x)
    assert_rows_alone(lambda rows: TRITON_OPS.add_rms_norm(rows, rows, weight, 1e-6)[0], x)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    channels=st.integers(1, 1300),
    dtype=st.sampled_from(DTYPES),
    ue8m0=st.booleans(),
    magnitude=st.sampled_from([0.0, 1e-9, 1.0, 448.0, 3e4, 1e37]),
)
def test_quantisation_is_the_reference_bit_for_bit(
    rows: int, channels: int, dtype: torch.dtype, ue8m0: bool, magnitude: float
) -> None:
    x = (randn(rows, channels) * magnitude).to(dtype)
    (q, scales), (expected_q, expected_scales) = on_both(lambda ops: ops.quantize_token_groups(x, ue8m0=ue8m0))
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    assert scales.stride()[0] == 1


@pytest.mark.parametrize(
    ("amax", "scale", "power_of_two"),
    [(1e-6, 2.2321e-7, 2.0**-22), (1.0, 0.00223214, 2.0**-8), (448.0, 1.0, 1.0), (449.0, 1.0022322, 2.0)],
)
def test_scales(amax: float, scale: float, power_of_two: float) -> None:
    x = torch.zeros(1, 128)
    x[0, 77] = -amax
    for found in on_both(lambda ops: ops.quantize_token_groups(x)):
        assert found[1].item() == pytest.approx(scale, rel=1e-4)
    for found in on_both(lambda ops: ops.quantize_token_groups(x, ue8m0=True)):
        assert found[1].item() == power_of_two
        assert found[0][0, 77].item() == pytest.approx(-max(amax, 1e-6) / power_of_two, rel=2**-4)


def test_nan_makes_its_group_nan() -> None:
    x = torch.ones(2, 256)
    x[1, 130] = torch.nan
    for ue8m0 in (False, True):
        for q, scales in on_both(lambda ops: ops.quantize_token_groups(x, ue8m0=ue8m0)):  # noqa: B023
            assert scales.isnan().tolist() == [[False, False], [False, True]]
            assert q.float().isnan().sum(1).tolist() == [0, 128]


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 70), top_k=st.integers(1, 6), num_slots=st.integers(1, 9), seed=st.integers(0, 99))
def test_pairs_are_grouped(tokens: int, top_k: int, num_slots: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slot_of = torch.randperm(num_slots, generator=generator)
    topk_idx = torch.randint(-1, num_slots, (tokens, top_k), generator=generator)
    (token_of, *found), (expected_token_of, *expected) = on_both(
        lambda ops: ops.permute_by_expert(topk_idx, slot_of, num_slots)
    )
    assert torch.equal(token_of[: len(expected_token_of)], expected_token_of)
    assert token_of.sort().values.tolist() == [t for t in range(tokens) for _ in range(top_k)]
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 5),
    num_ranks=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_send_buffers(tokens: int, top_k: int, num_ranks: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = 2 * num_ranks + 1
    place = torch.randperm(experts, generator=generator)
    rank_of, slot_of = place % num_ranks, place // num_ranks
    x = randn(tokens, 12, dtype=dtype, seed=seed)[:, 1:8]
    topk_idx = torch.randint(-1, experts, (tokens, top_k), generator=generator)

    def exchanged(ops: Ops) -> tuple[Any, ...]:
        send_buffers, num_pairs, row_of = ops.pack_send_buffers(x, topk_idx, rank_of, slot_of, num_ranks)
        return (
            send_buffers,
            num_pairs,
            row_of,
            *ops.unpack_recv_buffers([send_buffers[0], send_buffers[-1], send_buffers[0]], x, 3),
        )

    def plain(value: Any) -> Any:
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value.tolist()

    found, expected = on_both(exchanged)
    send_buffers, num_pairs, row_of, rows, x_row, counts, arrival, received = found
    assert (num_pairs, received) == (expected[1], expected[7])
    assert plain([*send_buffers, row_of, rows, x_row, counts, arrival]) == plain(
        [*expected[0], expected[2], *expected[3:7]]
    )


def test_absent_pairs_come_last() -> None:
    slot_of = torch.tensor([2, 0, 1, 3])
    topk_idx = torch.tensor([[0, 3], [-1, 1], [2, -1], [-1, -1], [1, 0], [3, 1]])
    (token_of, counts, row_of), (expected_token_of, expected_counts, expected_row_of) = on_both(
        lambda ops: ops.permute_by_expert(topk_idx, slot_of, 4)
    )
    assert token_of.shape == (12,)
    assert torch.equal(token_of[:8], expected_token_of)
    assert counts.tolist() == expected_counts.tolist() == [3, 1, 2, 2]
    assert torch.equal(row_of, expected_row_of)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 4),
    heads=st.integers(1, 5),
    dim=st.sampled_from([2, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
)
def test_rope_is_the_reference_bit_for_bit(
    tokens: int, heads: int, dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    table = cos_sin_table(inv_freq(dim, 1e4), 50)
    x = randn(tokens, heads, dim + 7, dtype=dtype)[..., 7:]
    positions = torch.arange(tokens) * 16 + 1
    turned, expected = on_both(lambda ops: ops.apply_rope(x, RopeTable(table, positions, interleaved)))
    assert torch.equal(turned, expected)


def test_rope_outside_the_table_is_nan() -> None:
    table = cos_sin_table(inv_freq(8, 1e4), 5)
    turned = TRITON_OPS.apply_rope(torch.ones(4, 2, 8), RopeTable(table, torch.tensor([4, 5, -1, 0]), True))
    assert turned.isnan().all(dim=(1, 2)).tolist() == [False, True, True, False]
    assert not turned[[0, 3]].isnan().any()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, FP8_CACHE])
@pytest.mark.parametrize("latent_dim", [384, 512])
def test_cache_entries(cache_dtype: torch.dtype, latent_dim: int, interleaved: bool) -> None:
    dtype = torch.bfloat16 if cache_dtype == FP8_CACHE else cache_dtype
    table = cos_sin_table(inv_freq(64, 1e4), 50)
    kv, norm = randn(4, latent_dim + 64, dtype=dtype), randn(latent_dim, seed=1)
    positions, slots = torch.tensor([3, 0, 49, 7]), torch.tensor([5, 0, 3, 8])
    kv_cache = torch.full((9, 660), 7, dtype=cache_dtype)
    TRITON_OPS.write_latents(kv_cache, slots, kv, norm, 1e-6, RopeTable(table, positions, interleaved))
    latent = TRITON_OPS.rms_norm(kv[:, :latent_dim], norm, 1e-6)
    rope_key = TRITON_OPS.apply_rope(kv[:, None, latent_dim:], RopeTable(table, positions, interleaved)).squeeze(1)
    if cache_dtype == FP8_CACHE:
        latent = TRITON_OPS.dequantize_rows_fp8(*TRITON_OPS.quantize_rows_fp8(latent), dtype)
    assert torch.equal(read_latents(kv_cache[slots], latent_dim, 64, dtype), torch.cat([latent, rope_key], dim=1))
    assert bool((kv_cache[[1, 2, 4, 6, 7]] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    y, expected = on_both(lambda ops: ops.swiglu(randn(3, 2 * 1030, dtype=dtype) * 8))
    torch.testing.assert_close(y, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_is_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    y, weights = randn(20, 1030, dtype=dtype), randn(7, 5, seed=1)
    row_of = torch.randint(-1, 20, (7, 5), generator=torch.Generator().manual_seed(2))
    row_of[3] = -1
    shared = randn(7, 1030, dtype=dtype, seed=3)
    for added in (None, shared):
        out, expected = on_both(lambda ops: ops.combine_topk(y, row_of, weights, added))  # noqa: B023
        assert torch.equal(out, expected)
        assert torch.equal(out[3], torch.zeros(1030, dtype=dtype) if added is None else shared[3])


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(256, 8, 4, 8), (384, 1, 1, 8), (12, 3, 2, 5), (6, 6, 3, 3), (7, 1, 1, 7)]),
    ties=st.booleans(),
    bad=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 100),
)
def test_routing(shape: tuple[int, int, int, int], ties: bool, bad: bool, normalize: bool, seed: int) -> None:
    num_experts, n_group, topk_group, top_k = shape
    logits, bias = randn(4, num_experts, seed=seed), randn(num_experts, seed=seed + 1) - 1
    if ties:
        logits, bias = logits.round(), bias.round()
    if bad:
        logits[1, : num_experts // 2], logits[2], logits[3] = torch.nan, torch.nan, -torch.inf

    def routed(ops: Ops) -> tuple[Tensor, Tensor]:
        return ops.route(
            logits,
            bias,
            n_group=n_group,
            topk_group=topk_group,
            top_k=top_k,
            norm_topk_prob=normalize,
            routed_scaling_factor=2.5,
        )

    (idx, weights), (expected_idx, expected_weights) = on_both(routed)
    assert torch.equal(idx, expected_idx)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("vocab_size", [1, 1000, 3000])
def test_sampling(vocab_size: int) -> None:
    rows = 24
    logits = randn(rows, vocab_size) * 3
    logits[1, 0], logits[2, -1], logits[3], logits[4] = torch.nan, torch.inf, -torch.inf, 0.0
    logits[5, vocab_size // 2 + 1 :] = -torch.inf
    temperatures = torch.tensor([0.0, 0.7, 1.0] * 8)
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 2**40, (rows,), generator=generator)
    indices = torch.arange(rows) % 3
    tokens, expected = on_both(lambda ops: ops.sample_tokens(logits, temperatures, seeds, positions, indices))
    assert tokens.tolist() == expected.tolist()
    assert tokens[1:4].tolist() == [-1, -1, -1]
    assert tokens[0] == logits[0].argmax()


def test_equal_logits_are_drawn_evenly_and_greedily_the_first() -> None:
    rows, vocab_size = 160, 8
    positions = torch.arange(rows)
    zeros, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    drawn = TRITON_OPS.sample_tokens(torch.zeros(rows, vocab_size), ones, zeros, positions, zeros)
    greedy = TRITON_OPS.sample_tokens(torch.zeros(2, vocab_size), torch.zeros(2), zeros[:2], zeros[:2], zeros[:2])
    counts = torch.bincount(drawn, minlength=vocab_size).double()
    assert ((counts - 20) ** 2 / 20).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001
    assert greedy.tolist() == [0, 0]


@pytest.mark.parametrize("vocab_size", [1, 1000, 9000])
def test_truncation(vocab_size: int) -> None:
    rows = 32
    logits = (randn(rows, vocab_size) * 8).round() / 4  # many are equal
    logits[3], logits[4] = 0.0, -torch.inf
    logits[5, 0], logits[6, -1] = torch.nan, torch.inf
    temperatures = torch.tensor([0.7, 1.0, 1.3, 0.0] * 8)
    top_k = torch.tensor([0, 5, 40, 1, 0, 2 * vocab_size, 300, 7]).repeat(4)
    top_p = torch.tensor([0.9, 1.0, 0.5, 0.99, 0.3, 0.001, 1.0, 0.7] * 2).repeat_interleave(2)
    min_p = torch.tensor([0.0, 0.0, 0.05, 0.2]).repeat_interleave(8)
    kept, expected = on_both(lambda ops: ops.truncate_logits(logits, temperatures, top_k, top_p, min_p))
    assert torch.equal(kept.isneginf(), expected.isneginf())
    assert torch.equal(kept[~kept.isneginf()].nan_to_num(99.0), logits[~kept.isneginf()].nan_to_num(99.0))
    untouched = (temperatures == 0) | ~torch.isfinite(logits.max(dim=1).values)
    assert torch.equal(kept[untouched].nan_to_num(99.0), logits[untouched].nan_to_num(99.0))


@pytest.mark.parametrize("vocab_size", [1, 31, 1000, 3000])
def test_masks(vocab_size: int) -> None:
    logits = randn(6, vocab_size + 1)[:, 1:]
    logits[1, 0], logits[2, -1], logits[3] = torch.nan, torch.inf, -torch.inf
    words = torch.randint(-(2**31), 2**31, (6, (vocab_size + 31) // 32), generator=torch.Generator().manual_seed(3))
    words[4], words[5] = -1, 0
    masked, expected = on_both(lambda ops: ops.mask_logits(logits, words.int()))
    assert masked.is_contiguous()
    assert torch.equal(masked.nan_to_num(99.0, 98.0, 97.0), expected.nan_to_num(99.0, 98.0, 97.0))
    assert torch.equal(masked[4], logits[4])
    assert masked[5].isneginf().all()


@pytest.mark.parametrize("vocab_size", [1, 1000, 3000])
def test_logprobs_of_tokens(vocab_size: int) -> None:
    logits = (randn(9, vocab_size) * 8).round() / 4
    token_ids = torch.randint(0, vocab_size, (9, 3), generator=torch.Generator().manual_seed(2))
    token_ids[2, 0] = -1
    logits[4, 0] = -torch.inf
    (logprobs, ranks), (expected, expected_ranks) = on_both(lambda ops: ops.token_logprobs(logits, token_ids))
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ranks.tolist() == expected_ranks.tolist()
    assert ranks[2] == 0
