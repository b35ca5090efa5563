"""Multi-head latent attention, with the lightning indexer of DeepSeek sparse attention.

T tokens, h heads of this rank, Dn = qk_nope_head_dim, Dr = qk_rope_head_dim, Dl = kv_lora_rank, Dv = v_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.fused import AttentionBlock, Weight
from shoal.kernels.linear import DTYPE_CODES
from shoal.kernels.rope import Rotation
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import column_parallel, gather_last_dim, shard

from ..kv_cache.cache import KVCache
from .config import ModelConfig
from .forward import AttentionMetadata
from .weights import LayerWeights

LATENT_NORM_EPS = 1e-6
"""Of the q and kv latents' norms and of the indexer's LayerNorm, whatever `rms_norm_eps` says."""


class Indexer:
    """Scores every earlier position for a token and selects `index_topk` of them; replicated on all ranks."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, rope_table: Tensor) -> None:
        self.ops = weights.ops
        self.rope_table = rope_table
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.topk = config.index_topk
        self.rope_dim = config.qk_rope_head_dim
        self.interleaved = config.indexer_rope_interleave
        self.wq_b = weights.pack("wq_b.weight")
        self.wk = weights.pack("wk.weight")
        self.k_norm_weight = weights.read("k_norm.weight", dtype=torch.float32)
        self.k_norm_bias = weights.read("k_norm.bias", dtype=torch.float32)
        self.weights_proj = self.ops.pack_weight(weights.read("weights_proj.weight", dtype=torch.float32))
        self.weight_scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5

    def write_keys(self, x: Tensor, index_keys: Tensor, metadata: AttentionMetadata) -> None:
        """Index keys of x [T, H] (after the input norm) into the tokens' slots."""
        self.ops.write_index_keys(
            index_keys,
            metadata.slot_mapping,
            self.ops.linear(x, self.wk),
            (self.k_norm_weight, self.k_norm_bias),
            LATENT_NORM_EPS,
            Rotation(self.rope_table, metadata.positions, self.interleaved),
        )

    def select(self, x: Tensor, q_latent: Tensor, index_keys: Tensor, layout: PagedLayout) -> Tensor:
        """For the T tokens of `layout` -> [T, index_topk] int32: selected positions, ascending, padded with -1."""
        q = self.ops.linear(q_latent, self.wq_b).view(-1, self.num_heads, self.head_dim)
        rotary = q[..., : self.rope_dim]
        rotary.copy_(self.ops.apply_rope(rotary, Rotation(self.rope_table, layout.positions, self.interleaved)))
        head_weights = self.ops.linear(x.float(), self.weights_proj) * self.weight_scale
        return self.ops.index_topk(q, head_weights, index_keys, layout, self.topk)


class MLAttention:
    """One layer's attention: project, write the cache, select, attend, project back.

    Heads are split over the tp group; latents, cache and indexer are the same on each of its ranks.
    """

    def __init__(
        self, config: ModelConfig, weights: LayerWeights, groups: ParallelGroups, rope_table: Tensor, *, layer: int
    ) -> None:
        self.config, self.layer, self.rope_table = config, layer, rope_table
        self.tp = groups.tp
        self.ops = weights.ops
        self.latent_dim, self.rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.nope_dim, self.v_dim = config.qk_nope_head_dim, config.v_head_dim
        self.interleaved = config.rope_interleave
        self.scale = config.softmax_scale

        heads = shard(config.num_attention_heads, groups.tp_rank, self.tp.size)
        self.num_heads = heads.stop - heads.start
        # One product for both: q_a | kv_a, which is latent | rope key.
        self.q_lora_rank = config.q_lora_rank
        self.a_proj = weights.pack("q_a_proj.weight", "kv_a_proj_with_mqa.weight")
        self.q_a_norm = weights.read("q_a_layernorm.weight").float()
        self.q_b_proj = weights.pack("q_b_proj.weight", rows=_rows_of(heads, config.qk_head_dim))
        self.kv_a_norm = weights.read("kv_a_layernorm.weight").float()
        # Rows of kv_b, per head: Dn that make keys | Dv that make values.
        kv_b = weights.read("kv_b_proj.weight", rows=_rows_of(heads, self.nope_dim + self.v_dim))
        kv_b = kv_b.view(self.num_heads, self.nope_dim + self.v_dim, self.latent_dim)
        self.w_uk = self.ops.pack_weight(kv_b[:, : self.nope_dim].contiguous())
        self.w_uk_absorbed = self.ops.pack_weight(kv_b[:, : self.nope_dim].transpose(1, 2).contiguous())
        self.w_uv = self.ops.pack_weight(kv_b[:, self.nope_dim :].contiguous())
        out = shard(config.hidden_size, groups.tp_rank, self.tp.size)
        self.o_proj = weights.pack("o_proj.weight", rows=out)
        self.indexer: Indexer | None = None
        if config.has_indexer(layer):
            self.indexer = Indexer(config, weights.under("indexer"), rope_table)

    def block(self, input_norm: Tensor, eps: float) -> AttentionBlock | None:
        """This layer with the norm before it as one call, where that exists: without a tensor-parallel group."""
        if self.tp.size > 1 or self.a_proj.backend != "cpu":
            return None
        indexer, config = self.indexer, self.config
        block = AttentionBlock(
            dtype=DTYPE_CODES[self.a_proj.dtype],
            hidden_size=config.hidden_size,
            num_heads=self.num_heads,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.latent_dim,
            qk_nope_head_dim=self.nope_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=self.v_dim,
            rope_interleave=self.interleaved,
            rope_rows=self.rope_table.shape[0],
            input_norm=input_norm.data_ptr(),
            q_a_norm=self.q_a_norm.data_ptr(),
            kv_a_norm=self.kv_a_norm.data_ptr(),
            rope_table=self.rope_table.data_ptr(),
            w_a=Weight.of(self.a_proj),
            w_q_b=Weight.of(self.q_b_proj),
            w_uk=Weight.of(self.w_uk),
            w_uk_absorbed=Weight.of(self.w_uk_absorbed),
            w_uv=Weight.of(self.w_uv),
            w_o=Weight.of(self.o_proj),
            index_topk=config.index_topk if config.has_index else 0,
            rms_norm_eps=eps,
            latent_norm_eps=LATENT_NORM_EPS,
            scale=self.scale,
        )
        if indexer is not None:
            block.index_n_heads, block.index_head_dim = indexer.num_heads, indexer.head_dim
            block.index_rope_interleave = indexer.interleaved
            block.index_wq_b, block.index_wk = Weight.of(indexer.wq_b), Weight.of(indexer.wk)
            block.index_k_norm = indexer.k_norm_weight.data_ptr()
            block.index_k_norm_bias = indexer.k_norm_bias.data_ptr()
            block.index_weights_proj = indexer.weights_proj.data.data_ptr()
            block.index_weight_scale = indexer.weight_scale
        return block

    def forward(
        self, x: Tensor, cache: KVCache, metadata: AttentionMetadata, selected: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H] after the input norm -> (attention output [T, H], the selection that the next layer may share)."""
        records, index_keys = cache.records[self.layer], cache.index_keys[self.layer]
        rotation = Rotation(self.rope_table, metadata.positions, self.interleaved)
        a = self.ops.linear(x, self.a_proj)
        q_latent = self.ops.rms_norm(a[:, : self.q_lora_rank], self.q_a_norm, LATENT_NORM_EPS)
        kv = a[:, self.q_lora_rank :]
        self.ops.write_latents(records, metadata.slot_mapping, kv, self.kv_a_norm, LATENT_NORM_EPS, rotation)
        if self.indexer is not None:
            assert index_keys is not None
            self.indexer.write_keys(x, index_keys, metadata)
        q = self.ops.linear(q_latent, self.q_b_proj).view(-1, self.num_heads, self.nope_dim + self.rope_dim)
        rotary = q[..., self.nope_dim :]
        rotary.copy_(self.ops.apply_rope(rotary, rotation))

        first = metadata.per_head.num_tokens
        if self.indexer is not None:
            assert index_keys is not None
            selected = self.indexer.select(x[first:], q_latent[first:], index_keys, metadata.absorbed)
            metadata.emit(self.layer, "indexer.selected", selected)
        heads_out = self._attend(q, records, metadata, selected).flatten(1)
        # heads of rank 0 | heads of rank 1 | ..: the whole input of o_proj, of which each rank computes some outputs
        heads_out = gather_last_dim(heads_out, self.tp, layer=self.layer, op="attention.heads")
        metadata.emit(self.layer, "attention.heads", heads_out)
        return column_parallel(
            self.ops, heads_out, self.o_proj, self.tp, layer=self.layer, op="attention.o_proj"
        ), selected

    def _attend(self, q: Tensor, records: Tensor, metadata: AttentionMetadata, selected: Tensor | None) -> Tensor:
        """q [T, h, Dn + Dr] -> [T, h, Dv]."""
        first = metadata.per_head.num_tokens
        out = []
        if first:
            out.append(self.ops.mha_attention(q[:first], records, metadata.per_head, self.w_uk, self.w_uv, self.scale))
        if first < len(q) or not first:
            q = q[first:]
            q_latent = self.ops.batched_linear(q[..., : self.nope_dim], self.w_uk_absorbed)
            attended = self.ops.mla_attention(
                q_latent, q[..., self.nope_dim :], records, metadata.absorbed, self.scale, selected=selected
            )
            out.append(self.ops.batched_linear(attended, self.w_uv))
        return out[0] if len(out) == 1 else torch.cat(out)


def _rows_of(heads: slice, rows_per_head: int) -> slice:
    return slice(heads.start * rows_per_head, heads.stop * rows_per_head)
