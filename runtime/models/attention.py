"""Multi-head latent attention, with the lightning indexer of DeepSeek sparse attention.

T tokens, h heads of this rank, Dn = qk_nope_head_dim, Dr = qk_rope_head_dim, Dl = kv_lora_rank, Dv = v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.backends import Backend
from shoal.kernels.linear import PackedWeight, packed_num_bytes
from shoal.kernels.rope import RopeTable
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import column_parallel, gather_last_dim, shard

from .config import ModelConfig
from .forward import AttentionMetadata, StepContext
from .weights import IsFP8, Layer, Shape, Weight, WeightFactory, WeightSource, store

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms of q and kv latents and of the indexer's LayerNorm, whatever `rms_norm_eps` is: as transformers
and DeepSeek's published code have it."""


class Indexer(Layer):
    """Scores every earlier position for a token and selects `index_topk` of them; replicated on all ranks."""

    def __init__(self, config: ModelConfig, weights: WeightFactory, rope_table: Tensor) -> None:
        assert config.q_lora_rank is not None, "the indexer's queries are made from the query latent"
        self.ops = weights.ops
        self.rope_table = rope_table
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.topk = config.index_topk
        self.rope_dim = config.qk_rope_head_dim
        self.interleaved = config.indexer_rope_interleave
        self.weight_scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
        hidden = config.hidden_size
        self.wq_b = weights.matrix({"wq_b.weight": (self.num_heads * self.head_dim, config.q_lora_rank)})
        self.wk = weights.matrix({"wk.weight": (self.head_dim, hidden)})
        self.k_norm_weight = weights.vector("k_norm.weight", self.head_dim, dtype=torch.float32)
        self.k_norm_bias = weights.vector("k_norm.bias", self.head_dim, dtype=torch.float32)
        self.weights_proj = weights.matrix({"weights_proj.weight": (self.num_heads, hidden)}, dtype=torch.float32)

    def write_keys(self, x: Tensor, index_keys: Tensor, metadata: AttentionMetadata) -> None:
        """Write the index keys of x [T, H], the output of the input norm, to the tokens' cache slots."""
        self.ops.write_index_keys(
            index_keys,
            metadata.slot_mapping,
            self.ops.linear(x, self.wk.data),
            (self.k_norm_weight.data, self.k_norm_bias.data),
            LATENT_NORM_EPS,
            RopeTable(self.rope_table, metadata.positions, self.interleaved),
        )

    def select(self, x: Tensor, q_latent: Tensor, index_keys: Tensor, layout: PagedLayout) -> Tensor:
        """Positions that the T tokens of `layout` attend to: [T, index_topk] int32, ascending, padded with -1."""
        q = self.ops.linear(q_latent, self.wq_b.data).view(-1, self.num_heads, self.head_dim)
        rotary = q[..., : self.rope_dim]
        rotary.copy_(self.ops.apply_rope(rotary, RopeTable(self.rope_table, layout.positions, self.interleaved)))
        head_weights = self.ops.linear(x.float(), self.weights_proj.data) * self.weight_scale
        return self.ops.index_topk(q, head_weights, index_keys, layout, self.topk)


class MLAttention(Layer):
    """Attention of one layer: project, write the cache, select, attend, project back.

    Heads are split over the tp group; latents, cache and indexer are the same on each of its ranks.
    """

    def __init__(
        self, config: ModelConfig, weights: WeightFactory, groups: ParallelGroups, rope_table: Tensor, *, layer: int
    ) -> None:
        self.ops = weights.ops
        self.tp = groups.tp
        self.layer = layer
        self.rope_table = rope_table
        self.q_lora_rank = config.q_lora_rank or 0
        self.latent_dim = config.kv_lora_rank
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.interleaved = config.rope_interleave
        self.scale = config.softmax_scale
        self.index_topk = config.index_topk
        heads = shard(config.num_attention_heads, groups.tp_rank, self.tp.size)
        self.num_heads = heads.stop - heads.start

        hidden, all_heads = config.hidden_size, config.num_attention_heads
        kv_a = {"kv_a_proj_with_mqa.weight": (self.latent_dim + self.rope_dim, hidden)}
        if self.q_lora_rank:
            # One GEMM: q_a | kv_a, that is, q latent | kv latent | rotary key.
            self.a_proj = weights.matrix({"q_a_proj.weight": (self.q_lora_rank, hidden)} | kv_a)
            self.q_a_norm = weights.vector("q_a_layernorm.weight", self.q_lora_rank)
            q_tensors = {"q_b_proj.weight": (all_heads * config.qk_head_dim, self.q_lora_rank)}
        else:
            self.a_proj = weights.matrix(kv_a)
            q_tensors = {"q_proj.weight": (all_heads * config.qk_head_dim, hidden)}
        self.q_proj = weights.matrix(q_tensors, rows=_rows_of(heads, config.qk_head_dim))
        self.kv_a_norm = weights.vector("kv_a_layernorm.weight", self.latent_dim)
        self.kv_b_proj = KVUpProjection(config, weights, heads)
        out = shard(hidden, groups.tp_rank, self.tp.size)
        self.o_proj = weights.matrix({"o_proj.weight": (hidden, all_heads * self.v_dim)}, rows=out)
        self.indexer = Indexer(config, weights.under("indexer"), rope_table) if config.has_indexer(layer) else None

    def forward(self, x: Tensor, ctx: StepContext, topk_indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [T, H] after the input norm -> (attention output [T, H], selection that the next layer may share)."""
        ops, metadata = self.ops, ctx.metadata
        kv_cache, index_keys = ctx.cache.latents[self.layer], ctx.cache.index_keys[self.layer]
        rope = RopeTable(self.rope_table, metadata.positions, self.interleaved)
        a = ops.linear(x, self.a_proj.data)
        q_latent = x
        if self.q_lora_rank:
            q_latent = ops.rms_norm(a[:, : self.q_lora_rank], self.q_a_norm.data, LATENT_NORM_EPS)
        kv = a[:, self.q_lora_rank :]
        ops.write_latents(kv_cache, metadata.slot_mapping, kv, self.kv_a_norm.data, LATENT_NORM_EPS, rope)
        q = ops.linear(q_latent, self.q_proj.data).view(-1, self.num_heads, self.nope_dim + self.rope_dim)
        rotary = q[..., self.nope_dim :]
        rotary.copy_(ops.apply_rope(rotary, rope))

        if self.indexer is not None:
            assert index_keys is not None
            first = metadata.mha.num_tokens
            with ctx.spans("model.indexer"):
                self.indexer.write_keys(x, index_keys, metadata)
                topk_indices = self.indexer.select(x[first:], q_latent[first:], index_keys, metadata.mqa)
            ctx.emit(self.layer, "indexer.topk_indices", topk_indices)
        heads_out = self._attend(q, kv_cache, metadata, topk_indices).flatten(1)
        # heads of rank 0 | heads of rank 1 | ..: the whole input of o_proj, of which each rank computes some outputs
        heads_out = gather_last_dim(heads_out, self.tp, layer=self.layer, op="attention.heads")
        ctx.emit(self.layer, "attention.heads", heads_out)
        out = column_parallel(ops, heads_out, self.o_proj.data, self.tp, layer=self.layer, op="attention.o_proj")
        return out, topk_indices

    def _attend(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata, topk_indices: Tensor | None) -> Tensor:
        """q [T, h, Dn + Dr] -> [T, h, Dv]."""
        ops, kv_b = self.ops, self.kv_b_proj
        first = metadata.mha.num_tokens
        out = []
        if first:
            out.append(ops.mha_attention(q[:first], kv_cache, metadata.mha, kv_b.w_uk, kv_b.w_uv, self.scale))
        if first < len(q) or not first:
            q = q[first:]
            q_latent = ops.batched_linear(q[..., : self.nope_dim], kv_b.w_uk_absorbed)
            attended = ops.mla_attention(
                q_latent, q[..., self.nope_dim :], kv_cache, metadata.mqa, self.scale, selected=topk_indices
            )
            out.append(ops.batched_linear(attended, kv_b.w_uv))
        return out[0] if len(out) == 1 else torch.cat(out)


class KVUpProjection(Weight):
    """kv_b_proj of this rank's heads, in the three layouts that attention multiplies by, in the compute dtype.

    rows of kv_b_proj, per head:   Dn that make keys | Dv that make values
    """

    w_uk: PackedWeight
    """[h, Dn, Dl]: latents to keys. Exists once loaded, as the next two."""
    w_uk_absorbed: PackedWeight
    """[h, Dl, Dn]: its transpose, which maps queries to latents."""
    w_uv: PackedWeight
    """[h, Dv, Dl]: latents to values."""

    def __init__(self, config: ModelConfig, weights: WeightFactory, heads: slice) -> None:
        self._weights = weights.under("kv_b_proj.weight")
        self._num_heads = heads.stop - heads.start
        self._nope_dim = config.qk_nope_head_dim
        self._v_dim = config.v_head_dim
        self._latent_dim = config.kv_lora_rank
        rows_per_head = self._nope_dim + self._v_dim
        self._rows = _rows_of(heads, rows_per_head)
        self._num_rows = config.num_attention_heads * rows_per_head

    @property
    def tensors(self) -> Mapping[str, Shape]:
        return {self._weights.prefix: (self._num_rows, self._latent_dim)}

    def load(self, source: WeightSource) -> None:
        weights = self._weights
        kv_b = source.read(weights.prefix, rows=self._rows, dtype=weights.dtype).to(weights.device)
        kv_b = kv_b.view(self._num_heads, self._nope_dim + self._v_dim, self._latent_dim)
        w_uk = kv_b[:, : self._nope_dim]
        w_uv = kv_b[:, self._nope_dim :]
        layouts = {"w_uk": w_uk, "w_uk_absorbed": w_uk.transpose(1, 2), "w_uv": w_uv}
        for name, layout in layouts.items():
            packed = weights.ops.pack_weight(layout.contiguous())
            if not hasattr(self, name):
                setattr(self, name, packed)
                continue
            for head in range(self._num_heads):
                store(packed.matrices(slice(head, head + 1)), getattr(self, name), head)

    def num_bytes(self, backend: Backend, is_fp8: IsFP8) -> int:
        nope, values, latent = self._nope_dim, self._v_dim, self._latent_dim
        shapes = ((nope, latent), (latent, nope), (values, latent))
        return sum(self._num_heads * packed_num_bytes(shape, self._weights.dtype, backend) for shape in shapes)


def _rows_of(heads: slice, rows_per_head: int) -> slice:
    return slice(heads.start * rows_per_head, heads.stop * rows_per_head)
