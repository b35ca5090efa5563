"""The sparse indexer: scores against float64, selection against a full sort, bits against a token on its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.backends import Backend
from shoal.kernels.kv_format import FP8_CACHE, index_key_width, scatter_index_keys
from shoal.kernels.ops import Ops
from tests.support.ops import CPU_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)
CACHE_DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8_CACHE)]
"""Dtypes of the computation and of entries."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "num_keys"), [(1, 2, 1), (3, 16, 15), (16, 32, 16), (5, 8, 40), (64, 128, 33)]
)
def test_scores_match_float64(backend: Backend, dtype: torch.dtype, heads: int, dim: int, num_keys: int) -> None:
    torch.manual_seed(heads)
    q, keys = torch.randn(4, heads, dim).to(dtype), torch.randn(num_keys, dim).to(dtype)
    weights = torch.randn(4, heads)
    assert heads == 1 or (weights < 0).any()
    ops = Ops(backend)
    scores = ops.index_scores(q, weights, keys)
    dots = torch.einsum("thd,sd->ths", q.double(), keys.double()).relu()
    expected = torch.einsum("th,ths->ts", weights.double(), dots)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_by_hand(backend: Backend) -> None:
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    keys = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-1.0, -1.0]])
    ops = Ops(backend)
    assert ops.index_scores(q, torch.tensor([[0.5, -1.0]]), keys).tolist() == [[-0.5, -2.0, 1.5, 0.0]]


def _sorted_oracle(scores: list[float], topk: int) -> list[int]:
    def order(position: int) -> tuple[bool, float, int]:
        score = scores[position]
        return (True, 0.0, position) if math.isnan(score) else (False, -score, position)

    best = sorted(sorted(range(len(scores)), key=order)[:topk])
    return best + [-1] * (topk - len(best))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [1, 2, 8, 31, 200])
def test_topk_matches_a_full_sort(backend: Backend, topk: int) -> None:
    torch.manual_seed(topk)
    scores = torch.randn(30, 150)
    scores[10:20] = scores[10:20].mul(2).round()  # many ties
    scores[15:20] = scores[15:20].abs().neg()  # with -0.0 among them
    scores[20:] *= torch.tensor(10.0) ** torch.randint(-30, 30, (10, 150))
    scores[5, 3:140:2] = math.nan
    scores[6, :50] = -math.inf
    scores[7, 100:] = math.inf
    lengths = torch.randint(0, 151, (30,))
    lengths[:2] = torch.tensor([0, 150])
    ops = Ops(backend)
    selected = ops.topk_positions(scores, lengths, topk)
    assert selected.dtype == torch.int32
    for row, length, chosen in zip(scores.tolist(), lengths.tolist(), selected.tolist(), strict=True):
        assert chosen == _sorted_oracle(row[:length], topk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_positions_and_zeros_are_equal(backend: Backend) -> None:
    ops = Ops(backend)
    equal = ops.topk_positions(torch.full((1, 100), 0.25), torch.tensor([100]), 5)
    zeros = ops.topk_positions(torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]]), torch.tensor([5]), 2)
    nan = ops.topk_positions(torch.tensor([[math.nan, -math.inf, math.nan, -5.0]]), torch.tensor([4]), 3)
    assert equal.tolist() == [[0, 1, 2, 3, 4]]
    assert zeros.tolist() == [[1, 2]]
    assert nan.tolist() == [[0, 1, 3]]


def _keys(lengths: tuple[int, ...], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Random ones that FP8 holds exactly."""
    return [CPU_OPS.dequantize_rows_fp8(*CPU_OPS.quantize_rows_fp8(torch.randn(n, dim)), dtype) for n in lengths]


def _paged(
    keys: list[Tensor],
    spans: list[tuple[int, int]],
    block_size: int,
    seed: int,
    cache_dtype: torch.dtype | None = None,
) -> tuple[Tensor, PagedLayout]:
    """Pages of the keys of some sequences, NaN where nothing is, and the layout."""
    dim = keys[0].shape[1]
    if cache_dtype == FP8_CACHE:
        keys = [torch.cat([x.view(FP8_CACHE) for x in CPU_OPS.quantize_rows_fp8(k)], dim=1) for k in keys]
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(-(-len(k) // block_size) for k in keys)
    num_blocks = len(keys) * max_blocks + 2
    tables = torch.randperm(num_blocks, generator=generator)[: len(keys) * max_blocks].view(-1, max_blocks).int()
    nothing = 255 if cache_dtype == FP8_CACHE else math.nan
    pages = torch.full((num_blocks, block_size * index_key_width(keys[0].dtype, dim)), nothing, dtype=keys[0].dtype)
    for b, k in enumerate(keys):
        positions = torch.arange(len(k))
        slots = tables[b].long()[positions // block_size] * block_size + positions % block_size
        scatter_index_keys(pages, slots, k, dim)
    bounds = torch.tensor([0] + [stop - start for start, stop in spans]).cumsum(0).int()
    positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
    return pages, PagedLayout(tables, bounds, positions, block_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "cache_dtype"), [*CACHE_DTYPES, (torch.float32, FP8_CACHE)])
@pytest.mark.parametrize("dim", [16, 130])
def test_topk_of_paged_keys_matches_scores_and_sort(
    backend: Backend, dtype: torch.dtype, cache_dtype: torch.dtype, dim: int
) -> None:
    torch.manual_seed(0)
    keys = _keys((90, 5, 40), dim, dtype)
    spans = [(0, 90), (5, 5), (38, 40)]
    pages, layout = _paged(keys, spans, 16, 0, cache_dtype)
    q, weights = torch.randn(92, 5, dim).to(dtype), torch.randn(92, 5)
    ops = Ops(backend)
    selected = ops.index_topk(q, weights, pages, layout, 12).tolist()
    for t in range(92):
        b, position = (0, t) if t < 90 else (2, t - 52)
        if position < 12:
            assert selected[t] == [p if p <= position else -1 for p in range(12)]
        else:
            scores = ops.index_scores(q[t : t + 1], weights[t : t + 1], keys[b][: position + 1])
            assert selected[t] == _sorted_oracle(scores[0].tolist(), 12)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHE_DTYPES)
def test_a_token_selects_the_same_in_any_company_block_size_and_thread_count(
    dtype: torch.dtype, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.kernels.cpu_library.MIN_PARALLEL_WORK", 0)
    torch.manual_seed(1)
    keys = _keys((150, 33), 8, dtype)
    spans = [(60, 150), (32, 33)]
    q, weights = torch.randn(91, 3, 8).to(dtype), torch.randn(91, 3)
    threads = torch.get_num_threads()
    results = []
    for block_size in (1, 4, 16, 64):
        pages, layout = _paged(keys, spans, block_size, block_size, cache_dtype)
        try:
            torch.set_num_threads(1 + block_size % 3)
            results.append(CPU_OPS.index_topk(q, weights, pages, layout, 20))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)
    for t in range(0, 90, 9):
        pages, layout = _paged(keys[:1], [(60 + t, 61 + t)], 16, t, cache_dtype)
        alone = CPU_OPS.index_topk(q[t : t + 1], weights[t : t + 1], pages, layout, 20)
        assert torch.equal(alone[0], results[0][t])


def test_scores_keep_their_bits_in_any_company() -> None:
    torch.manual_seed(2)
    q, weights, keys = torch.randn(7, 20, 24), torch.randn(7, 20), torch.randn(50, 24)
    together = CPU_OPS.index_scores(q, weights, keys)
    for t in range(7):
        assert torch.equal(CPU_OPS.index_scores(q[t : t + 1], weights[t : t + 1], keys[11:29])[0], together[t, 11:29])


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend: Backend) -> None:
    pages, layout = _paged([torch.zeros(6, 4)], [(0, 6)], 4, 0)
    none = PagedLayout(layout.block_tables, torch.zeros(2).int(), torch.empty(0, dtype=torch.int64), 4)
    ops = Ops(backend)
    assert ops.index_topk(torch.empty(0, 2, 4), torch.empty(0, 2), pages, none, 3).shape == (0, 3)
    equal = ops.index_topk(torch.ones(6, 2, 4), torch.ones(6, 2), pages, layout, 3)
    assert equal.tolist() == [[0, -1, -1], [0, 1, -1], *[[0, 1, 2]] * 4]
    wide = ops.index_topk(torch.ones(6, 2, 4), torch.ones(6, 2), pages, layout, 8)
    assert wide[5].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    far = PagedLayout(layout.block_tables, torch.tensor([0, 1]).int(), torch.tensor([8]), 4)
    with pytest.raises(ValueError, match="no slot"):
        ops.index_topk(torch.ones(1, 2, 4), torch.ones(1, 2), pages, far, 3)
    layout.block_tables[0, 1] = len(pages)
    with pytest.raises(ValueError, match="the slot is outside the cache"):
        ops.index_topk(torch.ones(6, 2, 4), torch.ones(6, 2), pages, layout, 3)


def test_refuses_what_does_not_fit() -> None:
    pages, layout = _paged([torch.zeros(6, 4)], [(0, 6)], 4, 0)
    with pytest.raises(ValueError, match=r"needs contiguous index keys \[num_blocks, block_size \* 5\]"):
        CPU_OPS.index_topk(torch.ones(6, 2, 5), torch.ones(6, 2), pages, layout, 3)
    with pytest.raises(ValueError, match=r"in torch\.bfloat16 or in torch\.uint8"):
        CPU_OPS.index_topk(torch.ones(6, 2, 4).bfloat16(), torch.ones(6, 2), pages, layout, 3)
    with pytest.raises(ValueError, match="a page holds 8 index keys, but a block of the layout 4"):
        CPU_OPS.index_topk(torch.ones(6, 2, 4), torch.ones(6, 2), pages.view(2, 32), layout, 3)
    with pytest.raises(ValueError, match="weights"):
        CPU_OPS.index_topk(torch.ones(6, 2, 4), torch.ones(6, 3), pages, layout, 3)
    with pytest.raises(ValueError, match="topk >= 1"):
        CPU_OPS.index_topk(torch.ones(6, 2, 4), torch.ones(6, 2), pages, layout, 0)
    with pytest.raises(ValueError, match="lengths"):
        CPU_OPS.topk_positions(torch.zeros(1, 3), torch.tensor([4]), 1)
