"""The indexer in Triton: scores against the reference, selection against a full sort, bits against a token alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.kernels.kv_format import FP8_CACHE, index_key_width, read_index_keys
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable, cos_sin_table, inv_freq
from shoal.kernels.triton.indexer import paged_scores
from tests.kernels.triton.interpreter import DEVICE, TRITON_OPS
from tests.kernels.triton.paging import Sequences, index_pages, to_device
from tests.support.ops import REFERENCE_OPS

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "num_keys"), [(1, 2, 1), (5, 24, 40), (64, 128, 150)])
def test_scores_match_the_reference(dtype: torch.dtype, heads: int, dim: int, num_keys: int) -> None:
    torch.manual_seed(heads)
    q, keys, weights = torch.randn(4, heads, dim).to(dtype), torch.randn(num_keys, dim).to(dtype), torch.randn(4, heads)
    scores = TRITON_OPS.index_scores(q.to(DEVICE), weights.to(DEVICE), keys.to(DEVICE)).cpu()
    torch.testing.assert_close(scores, REFERENCE_OPS.index_scores(q, weights, keys), rtol=1e-3, atol=1e-3)


def test_score_by_hand() -> None:
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], device=DEVICE)
    keys = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-1.0, -1.0], [math.nan, 0.0]], device=DEVICE)
    scores = TRITON_OPS.index_scores(q, torch.tensor([[0.5, -1.0]], device=DEVICE), keys)
    assert scores[0, :4].tolist() == [-0.5, -2.0, 1.5, 0.0]
    assert scores[0, 4].isnan()


def _sorted_oracle(scores: list[float], topk: int) -> list[int]:
    def order(position: int) -> tuple[bool, float, int]:
        score = scores[position]
        return (True, 0.0, position) if math.isnan(score) else (False, -score, position)

    best = sorted(sorted(range(len(scores)), key=order)[:topk])
    return best + [-1] * (topk - len(best))


def _hard_scores(width: int) -> Tensor:
    scores = torch.randn(16, width)
    scores[4:8] = scores[4:8].mul(2).round()  # many ties
    scores[6:8] = scores[6:8].abs().neg()  # with -0.0 among them,
    scores[7, 1::2] += 0.0  # and 0.0
    scores[8:12] *= torch.tensor(10.0) ** torch.randint(-30, 30, (4, width))
    scores[12, 3:140:2] = math.nan
    scores[13, : width - 10] = math.nan
    scores[14, :50] = -math.inf
    scores[15, 100:] = math.inf
    return scores


@pytest.mark.parametrize("width", [150, 2600])
@pytest.mark.parametrize("topk", [1, 31, 200])
def test_topk_matches_a_full_sort(topk: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.kernels.triton.topk.CHUNK", 1024)  # the wider rows have chunks
    torch.manual_seed(topk)
    scores = _hard_scores(width)
    lengths = torch.randint(0, width + 1, (16,))
    lengths[[0, 1, 13]] = torch.tensor([0, width, width])
    selected = TRITON_OPS.topk_positions(scores.to(DEVICE), lengths.to(DEVICE), topk)
    assert selected.dtype == torch.int32
    for row, length, chosen in zip(scores.tolist(), lengths.tolist(), selected.tolist(), strict=True):
        assert chosen == _sorted_oracle(row[:length], topk)


def test_topk_refuses_what_does_not_fit_a_program() -> None:
    with pytest.raises(ValueError, match="at most 8192"):
        TRITON_OPS.topk_positions(
            torch.zeros(1, 3, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE), 8193
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", [[(60, 90), (0, 1), (40, 44)], [(89, 90), (0, 1), (43, 44)]])
def test_selection_matches_the_reference(dtype: torch.dtype, spans: list[tuple[int, int]]) -> None:
    sequences = Sequences([90, 1, 44], dtype, heads=4, latent=24, rope=8)
    queries, weights, kv_cache, layout = sequences.span(spans)
    pages = index_pages(kv_cache, 24)
    device_layout = to_device(layout, DEVICE)
    selected = TRITON_OPS.index_topk(
        queries[..., :24].to(DEVICE), weights.to(DEVICE), pages.to(DEVICE), device_layout, 12
    )
    expected = REFERENCE_OPS.index_topk(queries[..., :24], weights, pages, layout, 12)
    kept = (selected.cpu()[:, :, None] == expected[:, None, :]) & (expected >= 0)[:, None, :]
    assert kept.sum() >= 0.99 * (expected >= 0).sum()  # a near tie may fall the other way
    assert torch.equal(selected.cpu() >= 0, expected >= 0)


def _scores(sequences: Sequences, spans: list[tuple[int, int]], *, block_size: int = 16, seed: int = 0) -> list[Tensor]:
    """Each token's scores of its context."""
    queries, weights, kv_cache, layout = sequences.span(spans, block_size=block_size, seed=seed)
    scores = paged_scores(
        queries.to(DEVICE),
        weights.to(DEVICE),
        index_pages(kv_cache, sequences.width, block_size).to(DEVICE),
        to_device(layout, DEVICE),
        unscored=0,
    )
    return [row[: position + 1] for row, position in zip(scores.cpu(), layout.positions.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_scores_the_same_in_any_company_tile_and_block_size(dtype: torch.dtype) -> None:
    sequences = Sequences([150, 1, 33], dtype, heads=6, latent=112, rope=16)
    together = _scores(sequences, [(70, 150), (0, 1), (30, 33)])  # by tiles of tokens
    for t in (0, 57, 79):
        alone = _scores(sequences, [(70 + t, 71 + t), (0, 0), (0, 0)], block_size=4, seed=t)  # on its own
        assert torch.equal(alone[0], together[t])
    few = _scores(sequences, [(149, 150), (0, 1), (30, 33)], block_size=64)
    assert all(torch.equal(a, b) for a, b in zip(few, together[79:], strict=True))


def test_selection_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = Sequences([90, 1, 44], torch.bfloat16, heads=4, latent=24, rope=8)
    queries, weights, kv_cache, layout = sequences.span([(60, 90), (0, 1), (40, 44)])
    pages = index_pages(kv_cache, sequences.width)
    arguments = (queries.to(DEVICE), weights.to(DEVICE), pages.to(DEVICE), to_device(layout, DEVICE), 12)
    whole = TRITON_OPS.index_topk(*arguments)
    monkeypatch.setattr("shoal.kernels.triton.indexer.MAX_SCORE_BYTES", 4 * 112 * 7)
    assert torch.equal(TRITON_OPS.index_topk(*arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", [[(140, 150), (0, 1)], [(149, 150), (0, 1)]])
@pytest.mark.parametrize(("dim", "block_size"), [(128, 16), (64, 64), (32, 5)])
def test_fp8_keys_count_as_what_they_hold(
    dtype: torch.dtype, spans: list[tuple[int, int]], dim: int, block_size: int
) -> None:
    sequences = Sequences([150, 1], dtype, heads=4, latent=dim - 16, rope=16)
    queries, weights, kv_cache, layout = sequences.span(spans, block_size=block_size)
    codes, scales = TRITON_OPS.quantize_rows_fp8(kv_cache[:, :dim].contiguous())
    held = index_pages(TRITON_OPS.dequantize_rows_fp8(codes, scales, dtype), dim, block_size)
    parts = (x.view(torch.uint8).view(len(held), -1) for x in (codes, scales))
    fp8 = torch.cat(list(parts), dim=1)  # codes of a block | its scales
    arguments = (queries.to(DEVICE), weights.to(DEVICE))
    found = paged_scores(*arguments, fp8.to(DEVICE), to_device(layout, DEVICE), unscored=0).cpu()
    expected = paged_scores(*arguments, held.to(DEVICE), to_device(layout, DEVICE), unscored=0).cpu()
    selected = TRITON_OPS.index_topk(*arguments, fp8.to(DEVICE), to_device(layout, DEVICE), 20).cpu()
    for t, context in enumerate((layout.positions + 1).tolist()):
        assert torch.equal(found[t, :context], expected[t, :context])  # powers of two multiply without rounding
        best = REFERENCE_OPS.topk_positions(found[t : t + 1, :context].contiguous(), torch.tensor([context]), 20)
        assert torch.equal(selected[t : t + 1], best)


def test_a_position_without_a_slot_is_chosen_last() -> None:
    sequences = Sequences([40], torch.float32, heads=4, latent=24, rope=8)
    queries, weights, kv_cache, layout = sequences.span([(39, 40)])
    pages = index_pages(kv_cache, 32)
    layout.block_tables[0, 1] = len(pages)
    selected = TRITON_OPS.index_topk(
        queries.to(DEVICE), weights.to(DEVICE), pages.to(DEVICE), to_device(layout, DEVICE), 24
    )
    assert selected[0].tolist() == [*range(16), *range(32, 40)]


def test_refuses_what_does_not_fit() -> None:
    queries, weights, _, layout = Sequences([9], torch.float32, latent=40, rope=8).span([(8, 9)])
    with pytest.raises(ValueError, match="32, 64 or 128 columns on a GPU, not 48"):
        TRITON_OPS.index_topk(queries, weights, torch.zeros(2, 16 * 52, dtype=torch.uint8), layout, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, FP8_CACHE])
@pytest.mark.parametrize(("dim", "rope_dim", "interleaved"), [(64, 32, False), (64, 64, True), (128, 64, False)])
def test_keys_are_written_like_those_of_the_reference(
    dtype: torch.dtype, dim: int, rope_dim: int, interleaved: bool
) -> None:
    torch.manual_seed(0)
    computed = torch.bfloat16 if dtype == FP8_CACHE else dtype
    k, norm = torch.randn(5, dim + 3).to(computed)[:, :dim], (torch.randn(dim), torch.randn(dim))
    slots, positions = torch.tensor([11, 0, 6, 5, 9]), torch.tensor([0, 39, 7, 7, 12])
    table = cos_sin_table(inv_freq(rope_dim, 1e4), 40)

    def written(ops: Ops, device: str) -> Tensor:
        pages = torch.zeros(2, 6 * index_key_width(dtype, dim), dtype=dtype, device=device)
        weight, bias = (x.to(device) for x in norm)
        rope = RopeTable(table.to(device), positions.to(device), interleaved)
        ops.write_index_keys(pages, slots.to(device), k.to(device), (weight, bias), 1e-6, rope)
        return read_index_keys(pages.cpu(), torch.arange(12), dim, computed)

    found = written(TRITON_OPS, DEVICE)
    expected = written(REFERENCE_OPS, "cpu")
    # a norm's last bit may tip a rounding
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, FP8_CACHE: 2**-3}[dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=2**-9)
    assert [s for s in range(12) if expected[s].any()] == [0, 5, 6, 9, 11]


def test_a_key_at_a_position_outside_the_table_is_nan() -> None:
    k, norm = torch.randn(2, 8), (torch.ones(8), torch.zeros(8))
    pages = torch.zeros(1, 4 * 8, device=DEVICE)
    table, positions, slots = torch.ones(3, 4), torch.tensor([3, 2]), torch.tensor([1, 2])
    weight, bias, table, positions, slots, k = (x.to(DEVICE) for x in (*norm, table, positions, slots, k))
    TRITON_OPS.write_index_keys(pages, slots, k, (weight, bias), 1e-6, RopeTable(table, positions, False))
    written = pages.view(4, 8).cpu()
    assert written[1].isnan().tolist() == [True] * 4 + [False] * 4
    assert not written[[0, 2, 3]].isnan().any()


def test_keys_that_it_does_not_write() -> None:
    norm, one = (torch.ones(256), torch.zeros(256)), torch.zeros(1, dtype=torch.int64)
    pages = torch.zeros(1, index_key_width(FP8_CACHE, 256), dtype=FP8_CACHE)
    with pytest.raises(ValueError, match=r"up to 128 columns, .* got 64 of 256 columns"):
        TRITON_OPS.write_index_keys(
            pages, one, torch.ones(1, 256).bfloat16(), norm, 1e-6, RopeTable(torch.ones(1, 64), one, True)
        )
