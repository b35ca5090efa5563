"""Per-head attention of prompt chunks: a float64 oracle, and bits that depend on a row's own context only."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.backends import Backend
from shoal.kernels.ops import Ops
from shoal.kernels.triton.prefill import prefill_attention
from shoal.kernels.triton.token_tiles import token_tiles
from tests.kernels.triton.interpreter import DEVICE, TRITON_OPS

BACKENDS: tuple[Backend, ...] = ("triton", "reference")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


class Prompts:
    """Queries, keys and values of whole prompts."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, *, heads: int, nope: int, rope: int, value: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.q = [normal(n, heads, nope + rope) for n in lengths]
        self.k = [normal(n, heads, nope) for n in lengths]
        self.k_rope, self.v = [normal(n, rope) for n in lengths], [normal(n, heads, value) for n in lengths]
        self.nope = nope

    def run(self, spans: list[tuple[int, int]]) -> Tensor:
        """Attention of positions [start, stop) of each prompt; keys end where the span does."""
        keys = [
            torch.cat([x[:stop] for x, (_, stop) in zip(t, spans, strict=True)]) for t in (self.k, self.k_rope, self.v)
        ]
        q = torch.cat([x[start:stop] for x, (start, stop) in zip(self.q, spans, strict=True)]).to(DEVICE)
        bounds_q = torch.tensor([0, *accumulate(stop - start for start, stop in spans)]).int()
        bounds_k = torch.tensor([0, *accumulate(stop for _, stop in spans)]).int()
        positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
        k_nope, k_rope, v = (x.to(DEVICE) for x in keys)
        q_nope, q_rope = q[..., : self.nope], q[..., self.nope :]
        bounds = (bounds_q.to(DEVICE), bounds_k.to(DEVICE), positions.to(DEVICE))
        return prefill_attention(q_nope, q_rope, k_nope, k_rope, v, *bounds, 0.2).cpu()

    def expected(self, b: int, start: int, stop: int) -> Tensor:
        k_rope = self.k_rope[b][:, None].expand(-1, self.k[b].shape[1], -1)
        keys = torch.cat([self.k[b], k_rope], dim=-1)[:stop].double()
        scores = torch.einsum("thd,shd->hts", self.q[b][start:stop].double(), keys) * 0.2
        later = torch.arange(stop) > torch.arange(start, stop)[:, None]
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        return torch.einsum("hts,shv->thv", weights, self.v[b][:stop].double())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "nope", "rope", "value"), [(2, 24, 8, 20), (1, 128, 64, 128)])
def test_matches_float64(dtype: torch.dtype, heads: int, nope: int, rope: int, value: int) -> None:
    prompts = Prompts([150, 1, 70], dtype, heads=heads, nope=nope, rope=rope, value=value)
    spans = [(10, 150), (0, 1), (40, 70)]
    expected = torch.cat([prompts.expected(b, *span) for b, span in enumerate(spans)])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(prompts.run(spans).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_and_company_change_no_bit(dtype: torch.dtype) -> None:
    prompts = Prompts([150, 3, 70], dtype, heads=2, nope=128, rope=64, value=128)
    together = prompts.run([(0, 150), (1, 3), (69, 70)])
    # interpreted, products are numpy's, in which a row's bits depend on its place in the tile
    bounds, start = ((0, 1, 64, 65, 130, 150), 60) if DEVICE == "cuda" else ((0, 128, 150), 69)
    chunks = [prompts.run([span, (3, 3), (70, 70)]) for span in pairwise(bounds)]
    assert torch.equal(torch.cat(chunks), together[:150])
    assert torch.equal(prompts.run([(150, 150), (3, 3), (start, 70)])[-1], together[-1])


def test_tiles_do_not_cross_sequences() -> None:
    sequences, tokens = token_tiles(torch.tensor([0, 5, 5, 9, 10]).int(), 10, 4)
    tiles = [(b, t) for b, t in zip(sequences.tolist(), tokens.tolist(), strict=True) if b < 4]
    assert tiles == [(0, 0), (0, 4), (2, 5), (3, 9)]


def test_refuses_what_does_not_fit() -> None:
    q, k, bounds = torch.zeros(2, 3, 8), torch.zeros(4, 3, 8), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="k_nope"):
        prefill_attention(q, q, k[:, :2], k[:, 0], k, bounds, bounds, bounds, 1.0)
    with pytest.raises(ValueError, match="k_rope"):
        prefill_attention(q, q, k, k[:, 0, :3], k, bounds, bounds, bounds, 1.0)


def paged(heads: int) -> tuple[Tensor, Tensor, PagedLayout, Tensor, Tensor]:
    """Queries, entries, layout and weights of two sequences, and of one between them that has no token."""
    generator = torch.Generator().manual_seed(3)
    layout = PagedLayout(
        block_tables=torch.tensor([[2, 0], [9, 9], [1, 3]]).int().to(DEVICE),
        cu_seqlens_q=torch.tensor([0, 3, 3, 8]).int().to(DEVICE),
        positions=torch.tensor([4, 5, 6, 0, 1, 2, 3, 4]).to(DEVICE),
        block_size=4,
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return normal(8, heads, 20), normal(16, 30), layout, normal(heads, 12, 20), normal(heads, 10, 20)


def test_mha_attention_of_paged_entries_agrees_with_the_reference() -> None:
    q, kv_cache, layout, w_uk, w_uv = paged(2)
    outputs = []
    for backend in BACKENDS:
        ops = Ops(backend)
        outputs.append(ops.mha_attention(q, kv_cache, layout, ops.pack_weight(w_uk), ops.pack_weight(w_uv), 0.2))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 2])
def test_making_keys_for_some_heads_at_a_time_changes_no_bit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv_cache, layout, w_uk, w_uv = paged(5)
    weights = TRITON_OPS.pack_weight(w_uk), TRITON_OPS.pack_weight(w_uv)
    together = TRITON_OPS.mha_attention(q, kv_cache, layout, *weights, 0.2)
    monkeypatch.setattr("shoal.kernels.triton.prefill.MAX_KEY_BYTES", at_once * (7 + 5) * (12 + 10) * 4)
    assert torch.equal(TRITON_OPS.mha_attention(q, kv_cache, layout, *weights, 0.2), together)


def test_contexts_lie_one_behind_the_other() -> None:
    layout = paged(1)[2]
    slots, begins = layout.contexts
    assert slots.tolist() == [8, 9, 10, 11, 0, 1, 2, 4, 5, 6, 7, 12]
    assert begins.tolist() == [0, 7, 7, 12]
    assert layout.contexts is layout.contexts


def test_no_prompt_tokens() -> None:
    q, kv_cache, layout, w_uk, w_uv = paged(2)
    none = PagedLayout(layout.block_tables, layout.cu_seqlens_q * 0, layout.positions[:0], 4)
    assert TRITON_OPS.mha_attention(
        q[:0], kv_cache, none, TRITON_OPS.pack_weight(w_uk), TRITON_OPS.pack_weight(w_uv), 0.2
    ).shape == (0, 2, 10)
