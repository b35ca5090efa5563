"""Multi-head latent attention, with the lightning indexer of DeepSeek sparse attention.

T tokens, h heads of this rank, Dn = qk_nope_head_dim, Dr = qk_rope_head_dim, Dl = kv_lora_rank, Dv = v_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout, mha_attention, mla_attention
from shoal.kernels.indexer import index_topk
from shoal.kernels.linear import batched_linear, linear, pack_weight
from shoal.kernels.norm import layer_norm, rms_norm
from shoal.kernels.rope import apply_rope
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import column_parallel, gather_last_dim, shard

from ..kv_cache import KVCache
from .config import ModelConfig
from .forward import AttentionMetadata
from .weights import LayerWeights

LATENT_NORM_EPS = 1e-6
"""Of the q and kv latents' norms and of the indexer's LayerNorm, whatever `rms_norm_eps` says."""


class Indexer:
    """Scores every earlier position for a token and selects `index_topk` of them; replicated on all ranks."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, key_offset: int) -> None:
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.topk = config.index_topk
        self.rope_dim = config.qk_rope_head_dim
        self.interleaved = config.indexer_rope_interleave
        self.key_offset = key_offset
        self.wq_b = pack_weight(weights.read("wq_b.weight"))
        self.wk = pack_weight(weights.read("wk.weight"))
        self.k_norm_weight = weights.read("k_norm.weight", dtype=torch.float32)
        self.k_norm_bias = weights.read("k_norm.bias", dtype=torch.float32)
        self.weights_proj = pack_weight(weights.read("weights_proj.weight", dtype=torch.float32))
        self.weight_scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5

    def key(self, x: Tensor, rope_table: Tensor, positions: Tensor) -> Tensor:
        """x [T, H] (after the input norm) -> index keys [T, D]: rotated part first."""
        k = layer_norm(linear(x, self.wk), self.k_norm_weight, self.k_norm_bias, LATENT_NORM_EPS)
        return self._rotate(k.unsqueeze(1), rope_table, positions).squeeze(1)

    def select(self, x: Tensor, q_latent: Tensor, rope_table: Tensor, records: Tensor, layout: PagedLayout) -> Tensor:
        """For the T tokens of `layout` -> [T, index_topk] int32: selected positions, ascending, padded with -1."""
        q = linear(q_latent, self.wq_b).view(-1, self.num_heads, self.head_dim)
        q = self._rotate(q, rope_table, layout.positions)
        head_weights = linear(x.float(), self.weights_proj) * self.weight_scale
        return index_topk(q, head_weights, records, self.key_offset, layout, self.topk)

    def _rotate(self, x: Tensor, rope_table: Tensor, positions: Tensor) -> Tensor:
        """[T, heads, D] with [rope | rest] -> the same, its first `rope_dim` columns rotated."""
        rotated = apply_rope(x[..., : self.rope_dim], rope_table, positions, interleaved=self.interleaved)
        return torch.cat([rotated, x[..., self.rope_dim :]], dim=-1)


class MLAttention:
    """One layer's attention: project, write the cache, select, attend, project back.

    Heads are split over the tp group; latents, cache and indexer are the same on each of its ranks.
    """

    def __init__(self, config: ModelConfig, weights: LayerWeights, groups: ParallelGroups, *, layer: int) -> None:
        self.layer = layer
        self.tp = groups.tp
        self.latent_dim, self.rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.nope_dim, self.v_dim = config.qk_nope_head_dim, config.v_head_dim
        self.interleaved = config.rope_interleave
        self.scale = config.softmax_scale

        heads = shard(config.num_attention_heads, groups.tp_rank, self.tp.size)
        self.num_heads = heads.stop - heads.start
        self.q_a_proj = pack_weight(weights.read("q_a_proj.weight"))
        self.q_a_norm = weights.read("q_a_layernorm.weight").float()
        self.q_b_proj = pack_weight(weights.read("q_b_proj.weight", rows=_rows_of(heads, config.qk_head_dim)))
        self.kv_a_proj = pack_weight(weights.read("kv_a_proj_with_mqa.weight"))
        self.kv_a_norm = weights.read("kv_a_layernorm.weight").float()
        # Rows of kv_b, per head: Dn that make keys | Dv that make values.
        kv_b = weights.read("kv_b_proj.weight", rows=_rows_of(heads, self.nope_dim + self.v_dim))
        kv_b = kv_b.view(self.num_heads, self.nope_dim + self.v_dim, self.latent_dim)
        self.w_uk = pack_weight(kv_b[:, : self.nope_dim].contiguous())
        self.w_uk_absorbed = pack_weight(kv_b[:, : self.nope_dim].transpose(1, 2).contiguous())
        self.w_uv = pack_weight(kv_b[:, self.nope_dim :].contiguous())
        out = shard(config.hidden_size, groups.tp_rank, self.tp.size)
        self.o_proj = pack_weight(weights.read("o_proj.weight", rows=out))
        key_offset = self.latent_dim + self.rope_dim
        self.indexer = Indexer(config, weights.under("indexer"), key_offset) if config.has_indexer(layer) else None

    def forward(
        self, x: Tensor, rope_table: Tensor, cache: KVCache, metadata: AttentionMetadata, selected: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H] after the input norm -> (attention output [T, H], the selection that the next layer may share)."""
        positions, records = metadata.positions, cache.records[self.layer]
        q_latent = rms_norm(linear(x, self.q_a_proj), self.q_a_norm, LATENT_NORM_EPS)
        q = linear(q_latent, self.q_b_proj).view(-1, self.num_heads, self.nope_dim + self.rope_dim)
        q_rope = apply_rope(q[..., self.nope_dim :], rope_table, positions, interleaved=self.interleaved)
        q[..., self.nope_dim :] = q_rope

        kv_a = linear(x, self.kv_a_proj)  # latent | rope key
        latent = rms_norm(kv_a[:, : self.latent_dim], self.kv_a_norm, LATENT_NORM_EPS)
        k_rope = kv_a[:, None, self.latent_dim :]
        k_rope = apply_rope(k_rope, rope_table, positions, interleaved=self.interleaved).squeeze(1)
        record = [latent, k_rope]
        if self.indexer is not None:
            record.append(self.indexer.key(x, rope_table, positions))
        cache.write(self.layer, metadata.slot_mapping, torch.cat(record, dim=-1))

        first = metadata.per_head.num_tokens
        if self.indexer is not None:
            selected = self.indexer.select(x[first:], q_latent[first:], rope_table, records, metadata.absorbed)
            metadata.emit(self.layer, "indexer.selected", selected)
        heads_out = self._attend(q, records, metadata, selected).flatten(1)
        # heads of rank 0 | heads of rank 1 | ..: the whole input of o_proj, of which each rank computes some outputs
        heads_out = gather_last_dim(heads_out, self.tp, layer=self.layer, op="attention.heads")
        metadata.emit(self.layer, "attention.heads", heads_out)
        return column_parallel(heads_out, self.o_proj, self.tp, layer=self.layer, op="attention.o_proj"), selected

    def _attend(self, q: Tensor, records: Tensor, metadata: AttentionMetadata, selected: Tensor | None) -> Tensor:
        """q [T, h, Dn + Dr] -> [T, h, Dv]."""
        first = metadata.per_head.num_tokens
        out = []
        if first:
            out.append(mha_attention(q[:first], records, metadata.per_head, self.w_uk, self.w_uv, self.scale))
        if first < len(q) or not first:
            q = q[first:]
            q_latent = batched_linear(q[..., : self.nope_dim], self.w_uk_absorbed)
            attended = mla_attention(
                q_latent, q[..., self.nope_dim :], records, metadata.absorbed, self.scale, selected=selected
            )
            out.append(batched_linear(attended, self.w_uv))
        return out[0] if len(out) == 1 else torch.cat(out)


def _rows_of(heads: slice, rows_per_head: int) -> slice:
    return slice(heads.start * rows_per_head, heads.stop * rows_per_head)
