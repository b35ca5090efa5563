"""Paged latent attention in both forms: float64 oracles, and bits that depend on a row's own context only."""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.backends import Backend
from shoal.kernels.kv_format import FP8_CACHE, read_latents
from shoal.kernels.ops import Ops
from tests.support.ops import CPU_OPS, REFERENCE_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)
CACHE_DTYPES = (*DTYPES, FP8_CACHE)
"""Dtypes of caches; FP8 with bf16 queries."""
Form = Literal["absorbed", "per head"]
FORMS: tuple[Form, ...] = get_args(Form)
NOPE, VALUE = 14, 21
"""Columns of a key that is made from a latent, and of a value; neither a multiple of what a vector holds."""


class Sequences:
    """Latents and rotary keys of whole sequences, with queries of a form of attention for all their positions."""

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype,
        form: Form = "absorbed",
        *,
        heads: int = 3,
        latent: int = 40,
        rope: int = 8,
        seed: int = 0,
    ) -> None:
        self.cache_dtype, dtype = dtype, torch.bfloat16 if dtype == FP8_CACHE else dtype
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.form, self.latent, self.rope, self.heads = lengths, form, latent, rope, heads
        self.dtype = dtype
        self.w_uk = (torch.randn(heads, NOPE, latent, generator=generator) / latent**0.5).to(dtype)
        self.w_uv = (torch.randn(heads, VALUE, latent, generator=generator) / latent**0.5).to(dtype)
        columns = (latent if form == "absorbed" else NOPE) + rope
        self.keys = [torch.randn(n, latent + rope, generator=generator).to(dtype) for n in lengths]
        self.queries = [torch.randn(n, heads, columns, generator=generator).to(dtype) for n in lengths]
        if self.cache_dtype == FP8_CACHE:
            self.keys = [read_latents(self._packed(keys), latent, rope, dtype) for keys in self.keys]

    def _packed(self, keys: Tensor) -> Tensor:
        """Entries of keys; in FP8 those that it can hold stay as they are."""
        if self.cache_dtype != FP8_CACHE:
            return keys
        rope = keys[:, self.latent :].bfloat16().contiguous()
        return torch.cat([x.view(FP8_CACHE) for x in (*CPU_OPS.quantize_rows_fp8(keys[:, : self.latent]), rope)], dim=1)

    def run(
        self,
        spans: list[tuple[int, int]],
        *,
        block_size: int = 16,
        seed: int = 0,
        selected: Tensor | None = None,
        ops: Ops = CPU_OPS,
    ) -> Tensor:
        """Attention of positions [start, stop) of each sequence, in one call; the cache is laid out by `seed`."""
        generator = torch.Generator().manual_seed(seed)
        max_blocks = max(-(-n // block_size) for n in self.lengths) + 1
        num_blocks = len(self.lengths) * max_blocks
        tables = torch.randperm(num_blocks, generator=generator).view(-1, max_blocks).int()
        packed = [self._packed(keys) for keys in self.keys]
        width = packed[0].shape[1]
        # other fields, a wider row, and NaN wherever nothing was written
        nothing = 255 if self.cache_dtype == FP8_CACHE else math.nan
        kv_cache = torch.full((num_blocks * block_size, width + 7), nothing, dtype=self.cache_dtype)[:, : width + 3]
        for b, keys in enumerate(packed):
            written = torch.arange(spans[b][1])
            blocks = tables[b].long()[written // block_size]
            kv_cache[blocks * block_size + written % block_size, :width] = keys[: spans[b][1]]
        q = torch.cat([x[start:stop] for x, (start, stop) in zip(self.queries, spans, strict=True)])
        bounds = torch.tensor([0] + [stop - start for start, stop in spans]).cumsum(0).int()
        positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
        layout = PagedLayout(tables, bounds, positions, block_size)
        if self.form == "per head":
            w_uk, w_uv = ops.pack_weight(self.w_uk), ops.pack_weight(self.w_uv)
            return ops.mha_attention(q, kv_cache, layout, w_uk, w_uv, 0.17)
        return ops.mla_attention(
            q[..., : self.latent], q[..., self.latent :], kv_cache, layout, 0.17, selected=selected
        )

    def oracle(self, b: int) -> Tensor:
        """Attention of all positions of a sequence in float64 (made keys and values rounded as they are stored)."""
        latents, rope = self.keys[b][:, : self.latent].double(), self.keys[b][:, self.latent :].double()
        if self.form == "absorbed":
            keys = values = latents[:, None].expand(-1, self.heads, -1)
        else:
            keys = torch.einsum("hnl,sl->shn", self.w_uk.double(), latents).to(self.dtype).double()
            values = torch.einsum("hvl,sl->shv", self.w_uv.double(), latents).to(self.dtype).double()
        keys = torch.cat([keys, rope[:, None].expand(-1, self.heads, -1)], dim=-1)
        return _full_matrix_attention(self.queries[b].double(), keys, values, 0.17)

    def whole(self, b: int) -> Tensor:
        """All positions of one sequence in one call, with nobody else."""
        return self.only(b).run([(0, self.lengths[b])])

    def only(self, b: int) -> Sequences:
        alone = Sequences([], self.cache_dtype, self.form, heads=self.heads, latent=self.latent, rope=self.rope)
        alone.w_uk, alone.w_uv = self.w_uk, self.w_uv
        alone.lengths, alone.keys, alone.queries = [self.lengths[b]], [self.keys[b]], [self.queries[b]]
        return alone


def _full_matrix_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Plain multi-head attention in float64: queries and keys [n, h, d], values [n, h, dv], causal."""
    scores = torch.einsum("thd,shd->hts", queries, keys) * scale
    scores.masked_fill_(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return torch.einsum("hts,shv->thv", scores.softmax(-1), values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 3, 5, 16])
def test_absorbed_equals_unabsorbed_attention(backend: Backend, heads: int) -> None:
    torch.manual_seed(heads)
    n, nope, rope, latent, v_dim, scale = 90, 12, 8, 32, 6, 0.2
    q_nope, q_rope = torch.randn(n, heads, nope).double(), torch.randn(n, heads, rope).double()
    c, k_rope = torch.randn(n, latent).double(), torch.randn(n, rope).double()
    w_uk, w_uv = torch.randn(heads, nope, latent).double(), torch.randn(heads, v_dim, latent).double()
    keys = torch.cat([torch.einsum("hdl,sl->shd", w_uk, c), k_rope[:, None].expand(n, heads, rope)], dim=-1)
    values = torch.einsum("hvl,sl->shv", w_uv, c)
    expected = _full_matrix_attention(torch.cat([q_nope, q_rope], dim=-1), keys, values, scale)

    absorbed = torch.einsum("thd,hdl->thl", q_nope, w_uk).float()
    layout = PagedLayout(torch.arange(6)[None].int(), torch.tensor([0, n]).int(), torch.arange(n), 16)
    kv_cache = torch.zeros(96, latent + rope)
    kv_cache[:n] = torch.cat([c, k_rope], dim=-1).float()
    ops = Ops(backend)
    out = ops.mla_attention(absorbed, q_rope.float(), kv_cache, layout, scale)
    torch.testing.assert_close(torch.einsum("thl,hvl->thv", out.double(), w_uv), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 17])
def test_several_sequences_match_float64_and_the_reference(form: Form, dtype: torch.dtype, heads: int) -> None:
    sequences = Sequences([70, 1, 1100, 9], dtype, form, heads=heads)
    spans = [(69, 70), (0, 1), (1000, 1100), (4, 4)]
    out = sequences.run(spans)
    reference = sequences.run(spans, ops=REFERENCE_OPS)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    expected = [sequences.oracle(b)[start:stop] for b, (start, stop) in enumerate(spans)]
    assert out.dtype == sequences.dtype
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rope"), [(40, 8), (512, 64), (200, 7), (1, 1)])
def test_fp8_entries_give_the_bits_of_what_they_hold(form: Form, dtype: torch.dtype, latent: int, rope: int) -> None:
    spans = [(69, 70), (0, 1), (590, 600), (0, 130)]
    packed = Sequences([70, 1, 600, 130], FP8_CACHE, form, latent=latent, rope=rope)
    plain = Sequences(packed.lengths, dtype, form, latent=latent, rope=rope)
    plain.keys = [keys.to(dtype) for keys in packed.keys]
    packed.dtype, packed.keys, packed.queries = dtype, plain.keys, plain.queries
    packed.w_uk, packed.w_uv = plain.w_uk, plain.w_uv
    selected = None
    if form == "absorbed":
        selected = torch.arange(90).expand(142, 90).int()
        selected = selected.where(selected <= torch.cat([torch.arange(*span) for span in spans])[:, None], -1)
    for chosen in (None, selected):
        expected = plain.run(spans, selected=chosen)
        assert not expected.isnan().any()
        assert torch.equal(packed.run(spans, selected=chosen), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("heads", "length"), [(1, 203), (3, 203), (16, 203), (17, 1100)])
def test_any_chunking_gives_the_same_bits(
    form: Form, dtype: torch.dtype, heads: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = Sequences([length], dtype, form, heads=heads)
    whole = sequences.run([(0, length)])
    assert not whole.isnan().any()
    monkeypatch.setattr("shoal.kernels.cpu_library.MIN_PARALLEL_WORK", 2**60)  # many small calls: one thread each
    for step in (1, 7, 64, 100) if length < 1000 else (500, 513):
        chunks = [sequences.run([(start, min(start + step, length))]) for start in range(0, length, step)]
        assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [65, 130])
def test_many_heads_are_independent(dtype: torch.dtype, heads: int) -> None:
    sequences = Sequences([67], dtype, heads=heads, latent=16, rope=2)
    whole = sequences.run([(64, 67)])
    one_head = Sequences([67], dtype, heads=1, latent=16, rope=2)
    one_head.keys = sequences.keys
    for head in (0, 17, heads - 1):
        one_head.queries = [sequences.queries[0][:, head : head + 1].clone()]
        assert torch.equal(one_head.run([(64, 67)])[:, 0], whole[:, head])


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_attention_is_invariant_to_batch_block_size_and_threads(
    dtype: torch.dtype, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.kernels.cpu_library.MIN_PARALLEL_WORK", 0)
    sequences = Sequences([70, 1, 130, 9, 64, 65], dtype, form)
    expected = [sequences.whole(b) for b in range(6)]
    spans = [(69, 70), (0, 1), (0, 130), (9, 9), (60, 64), (3, 65)]
    threads = torch.get_num_threads()
    for block_size in (1, 4, 16, 64):
        try:
            torch.set_num_threads(1 + block_size % 3)
            out = sequences.run(spans, block_size=block_size, seed=block_size)
        finally:
            torch.set_num_threads(threads)
        parts = torch.split(out, [stop - start for start, stop in spans])
        for part, whole, (start, stop) in zip(parts, expected, spans, strict=True):
            assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [76, 77])
def test_a_later_nan_key_stays_invisible(dtype: torch.dtype, form: Form, first: int) -> None:
    sequences = Sequences([80], dtype, form)
    whole = sequences.run([(0, 80)])
    sequences.keys[0][first:] = math.nan
    poisoned = sequences.run([(0, 80)])
    assert torch.equal(poisoned[:first], whole[:first])
    assert poisoned[first:].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_splits_and_blocks_begin_at_fixed_positions(form: Form) -> None:
    """A row that sees 513 keys, of which the last outweighs the others, has their sum rescaled once: by hand."""
    sequences = Sequences([513], torch.float32, form, heads=1, latent=1, rope=1)
    sequences.w_uk, sequences.w_uv = torch.zeros(1, NOPE, 1), torch.ones(1, VALUE, 1)
    sequences.keys[0][:, 0] = 1.0
    sequences.keys[0][:, 1] = 0.0
    sequences.keys[0][512] = torch.tensor([3.0, 10.0])
    sequences.queries[0][:] = 0.0
    sequences.queries[0][..., -1] = 1.0
    weight = math.exp(-1.7)
    expected = (512 * weight + 3.0) / (512 * weight + 1.0)
    out = sequences.run([(512, 513)])
    torch.testing.assert_close(out, torch.full_like(out, expected), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selecting_everything_is_dense_attention(dtype: torch.dtype) -> None:
    sequences = Sequences([140], dtype)
    every = torch.arange(150).expand(140, 150).int()
    selected = every.where(every <= torch.arange(140)[:, None], -1)
    assert torch.equal(sequences.run([(0, 140)], selected=selected), sequences.run([(0, 140)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_selected_positions_alone_are_attended(backend: Backend) -> None:
    sequences = Sequences([100], torch.float32)
    kept = torch.arange(1, 100, 3)
    selected = torch.full((1, 40), -1, dtype=torch.int32)
    selected[0, : len(kept)] = kept.int()
    ops = Ops(backend)
    sparse = sequences.run([(99, 100)], selected=selected, ops=ops)
    short = Sequences([len(kept)], torch.float32)
    short.keys = [sequences.keys[0][kept]]
    short.queries = [sequences.queries[0][kept]]
    short.queries[0][-1] = sequences.queries[0][99]
    dense = short.run([(len(kept) - 1, len(kept))], ops=ops)
    assert torch.equal(sparse, dense)
    if backend == "cpu":
        assert torch.equal(sequences.run([(99, 100)], block_size=4, seed=5, selected=selected), sparse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_returns_its_latent_and_an_empty_list_zero(backend: Backend) -> None:
    sequences = Sequences([5], torch.bfloat16)
    selected = torch.tensor([[3, -1], [-1, -1]], dtype=torch.int32)
    ops = Ops(backend)
    first = sequences.run([(0, 1)], ops=ops)
    sparse = sequences.run([(3, 5)], selected=selected, ops=ops)
    assert torch.equal(first[0], sequences.keys[0][0, :40].expand(3, 40))
    assert torch.equal(sparse[0], sequences.keys[0][3, :40].expand(3, 40))
    assert torch.equal(sparse[1], torch.zeros(3, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "columns"), [("absorbed", 40), ("per head", VALUE)])
def test_no_tokens(backend: Backend, form: Form, columns: int) -> None:
    out = Sequences([5, 6], torch.float32, form).run([(0, 0), (6, 6)], ops=Ops(backend))
    assert out.shape == (0, 3, columns)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores_do_not_overflow(backend: Backend) -> None:
    sequences = Sequences([130], torch.float32)
    sequences.queries[0] *= 1e4
    ops = Ops(backend)
    out = sequences.run([(129, 130)], ops=ops)
    scores = torch.einsum("hd,sd->hs", sequences.queries[0][129].double(), sequences.keys[0].double())
    winner = sequences.keys[0][scores.argmax(1), :40]
    torch.testing.assert_close(out[0], winner, rtol=1e-5, atol=1e-5)


def _one_token(ops: Ops, block_table: list[int], position: int, num_slots: int) -> Tensor:
    layout = PagedLayout(torch.tensor([block_table]).int(), torch.tensor([0, 1]).int(), torch.tensor([position]), 4)
    return ops.mla_attention(torch.ones(1, 1, 8), torch.ones(1, 1, 2), torch.ones(num_slots, 10), layout, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_context_outside_the_cache_is_an_error(backend: Backend) -> None:
    ops = Ops(backend)
    with pytest.raises(ValueError, match="no slot"):
        _one_token(ops, [0], 4, 8)
    with pytest.raises(ValueError, match="no slot"):
        _one_token(ops, [0, 2], 5, 8)
    assert _one_token(ops, [1, 0], 7, 8).shape == (1, 1, 8)


def test_refuses_what_does_not_fit() -> None:
    layout = PagedLayout(torch.tensor([[0]]).int(), torch.tensor([0, 1]).int(), torch.tensor([0]), 4)
    q, r, kv_cache = torch.ones(1, 1, 8), torch.ones(1, 1, 2), torch.ones(4, 10)
    with pytest.raises(ValueError, match="kv_cache"):
        CPU_OPS.mla_attention(q, r, torch.ones(4, 9), layout, 1.0)
    with pytest.raises(ValueError, match="kv_cache"):
        CPU_OPS.mla_attention(
            q, r, torch.zeros(4, 15, dtype=FP8_CACHE), layout, 1.0
        )  # 8 numbers, a scale and 2 x 2 bytes
    with pytest.raises(ValueError, match="of one dtype, float32 or bfloat16"):
        CPU_OPS.mla_attention(q, r, kv_cache.bfloat16(), layout, 1.0)
    with pytest.raises(ValueError, match="selected must be"):
        CPU_OPS.mla_attention(q, r, kv_cache, layout, 1.0, selected=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 query tokens, but the layout has 1"):
        CPU_OPS.mla_attention(q.expand(2, 1, 8), r.expand(2, 1, 2), kv_cache, layout, 1.0)
    w_uk, w_uv = CPU_OPS.pack_weight(torch.ones(1, 6, 8)), CPU_OPS.pack_weight(torch.ones(1, 5, 8))
    with pytest.raises(ValueError, match="kv_cache"):
        CPU_OPS.mha_attention(torch.ones(1, 1, 8), torch.ones(4, 9), layout, w_uk, w_uv, 1.0)
    with pytest.raises(ValueError, match="of one dtype"):
        CPU_OPS.mha_attention(torch.ones(1, 1, 8), kv_cache.bfloat16(), layout, w_uk, w_uv, 1.0)
    with pytest.raises(ValueError, match="h weights"):
        CPU_OPS.mha_attention(torch.ones(1, 2, 8), kv_cache, layout, w_uk, w_uv, 1.0)


def test_a_layout_refuses_what_does_not_fit() -> None:
    tables, bounds, positions = torch.zeros(2, 1).int(), torch.tensor([0, 1, 3]).int(), torch.tensor([0, 1, 2])
    assert PagedLayout(tables, bounds, positions, 4).num_tokens == 3
    with pytest.raises(ValueError, match="block_tables must be"):
        PagedLayout(tables.long(), bounds, positions, 4)
    with pytest.raises(ValueError, match="one entry more"):
        PagedLayout(tables, bounds[:2], positions, 4)
    with pytest.raises(ValueError, match="ascend from 0 to the 3 tokens"):
        PagedLayout(tables, torch.tensor([0, 2, 1]).int(), positions, 4)
    with pytest.raises(ValueError, match="positions must ascend"):
        PagedLayout(tables, bounds, torch.tensor([0, 2, 2]), 4)
