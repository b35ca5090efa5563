"""The DeepSeek-V3 family: V3, R1, V3.1, V3.2, Kimi-K2 and GLM-5 are one decoder with different numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.fused import StepArgs, attention_block, step_args
from shoal.kernels.kv_format import latent_width
from shoal.kernels.ops import Ops
from shoal.kernels.rope import cos_sin_table, inv_freq
from shoal.parallel.dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher, TokenDispatcher
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import gather_last_dim, shard
from shoal.parallel.lm_head import ParallelLMHead, vocab_shard
from shoal.parallel.placement import ExpertPlacement

from ..checkpoint.checkpoint import Checkpoint
from ..kv_cache.cache import KVCache, RecordSpec
from .attention import MLAttention
from .config import ModelConfig
from .forward import AttentionMetadata
from .moe import DenseMLP, MoE
from .weights import LayerWeights


class DecoderLayer:
    """h += attention(norm(h)); h += feed_forward(norm(h))."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        groups: ParallelGroups,
        dispatcher: TokenDispatcher,
        placement: ExpertPlacement,
        rope_table: Tensor,
        *,
        layer: int,
    ) -> None:
        self.layer = layer
        self.ops = weights.ops
        self.eps = config.rms_norm_eps
        self.input_norm = weights.read("input_layernorm.weight").float()
        self.post_attention_norm = weights.read("post_attention_layernorm.weight").float()
        self.attention = MLAttention(config, weights.under("self_attn"), groups, rope_table, layer=layer)
        self.mlp: DenseMLP | MoE
        if config.is_moe_layer(layer):
            local_experts = placement.local_experts(groups.rank)
            self.mlp = MoE(config, weights.under("mlp"), groups, dispatcher, layer=layer, local_experts=local_experts)
        else:
            self.mlp = DenseMLP(config, weights.under("mlp"), groups, layer=layer)
        self.attention_block = self.attention.block(self.input_norm, self.eps)
        self.moe_block = self.mlp.block(self.post_attention_norm, self.eps) if isinstance(self.mlp, MoE) else None

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        cache: KVCache,
        metadata: AttentionMetadata,
        step: StepArgs | None,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what the last block added [T, H], residual stream before it) -> the same after this layer; its selection.

        With `step`, blocks of operations run as one call where they can.
        """
        attended, residual, selected = self.attend(hidden, residual, cache, metadata, step, selected)
        out, residual = self.feed_forward(attended, residual, metadata, step)
        return out, residual, selected

    def attend(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        cache: KVCache,
        metadata: AttentionMetadata,
        step: StepArgs | None,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first half: (attention output, hidden + residual, selection)."""
        if step is not None and self.attention_block is not None:
            records, index_keys = cache.records[self.layer], cache.index_keys[self.layer]
            return attention_block(self.attention_block, step, hidden, residual, records, index_keys, selected)
        if residual is None:
            x, residual = self.ops.rms_norm(hidden, self.input_norm, self.eps), hidden
        else:
            x, residual = self.ops.add_rms_norm(hidden, residual, self.input_norm, self.eps)
        metadata.emit(self.layer, "residual", residual)
        attended, selected = self.attention.forward(x, cache, metadata, selected)
        metadata.emit(self.layer, "attention", attended)
        return attended, residual, selected

    def feed_forward(
        self, attended: Tensor, residual: Tensor, metadata: AttentionMetadata, step: StepArgs | None
    ) -> tuple[Tensor, Tensor]:
        """The second half: (output of the MLP or the experts, attended + residual)."""
        if step is not None and self.moe_block is not None:
            assert isinstance(self.mlp, MoE)
            return self.mlp.forward_block(self.moe_block, step, attended, residual)
        x, residual = self.ops.add_rms_norm(attended, residual, self.post_attention_norm, self.eps)
        out = self.mlp.forward(x, metadata)
        metadata.emit(self.layer, "mlp", out)
        return out, residual


class DeepseekModel:
    """One rank's part of the model: its attention heads, its experts, its slice of the vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        groups: ParallelGroups,
        ops: Ops,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        placement: ExpertPlacement | None = None,
        dispatcher: TokenDispatcher | None = None,
    ) -> None:
        """`dispatcher` brings tokens to experts where `placement` put them; None: as `default_dispatcher` says."""
        self.config = config
        self.dtype = dtype
        self.ops = ops
        self.tp = groups.tp
        placement = placement or default_placement(config, groups)
        dispatcher = dispatcher or default_dispatcher(placement, groups, ops)
        frequencies = inv_freq(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        rope_table = cos_sin_table(frequencies, max_model_len, config.rope_cos_sin_scale).to(groups.device)

        weights = LayerWeights(checkpoint, "model", dtype, groups.device, ops, config.ue8m0_scales)
        hidden = shard(config.hidden_size, groups.tp_rank, self.tp.size)
        self.embed_tokens = checkpoint.read("model.embed_tokens.weight", cols=hidden, dtype=dtype).to(groups.device)
        self.layers = [
            DecoderLayer(config, weights.under(f"layers.{i}"), groups, dispatcher, placement, rope_table, layer=i)
            for i in range(config.num_hidden_layers)
        ]
        self.final_norm = weights.read("norm.weight").float()
        head = self.tp if several_nodes(groups) else groups.world
        vocab = vocab_shard(config.vocab_size, head.rank, head.size)
        weight = ops.pack_weight(checkpoint.read(_lm_head_name(config), rows=vocab, dtype=dtype).to(groups.device))
        self.lm_head = ParallelLMHead(weight, config.vocab_size, head, self.tp.size, ops)

    def forward(self, input_ids: Tensor, cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        """input_ids [T] int64 -> hidden states after the final norm [T, H].

        T may be 0: a rank without tokens still takes part in the exchange of the others' tokens.
        """
        embedded = self.embed_tokens[input_ids]
        hidden = gather_last_dim(embedded, self.tp, layer=-1, op="embed_tokens")
        residual: Tensor | None = None
        selected: Tensor | None = None
        step: StepArgs | None = None
        if metadata.tap is None:  # it sees every operation
            step = step_args(metadata.per_head, metadata.absorbed, metadata.positions, metadata.slot_mapping)
        for layer in self.layers:
            hidden, residual, selected = layer.forward(hidden, residual, cache, metadata, step, selected)
        assert residual is not None
        out, _ = self.ops.add_rms_norm(hidden, residual, self.final_norm, self.config.rms_norm_eps)
        metadata.emit(-1, "final_norm", out)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, vocab_size] fp32 where they are sampled, as `ParallelLMHead` says.

        Every rank of the replica calls it equally often, if need be with N = 0.
        """
        return self.lm_head(hidden)


def default_placement(config: ModelConfig, groups: ParallelGroups) -> ExpertPlacement:
    """On one node spread the routing groups, whose loads differ; over several keep them, so tokens reach few nodes."""
    place = ExpertPlacement.contiguous if several_nodes(groups) else ExpertPlacement.round_robin
    return place(config.n_routed_experts, groups.world.size)


def default_dispatcher(placement: ExpertPlacement, groups: ParallelGroups, ops: Ops) -> TokenDispatcher:
    """In place where one rank holds all experts, otherwise with the collectives of the replica's ranks."""
    if groups.world.size == 1:
        return LocalTokenDispatcher(placement, ops, groups.device)
    return AllToAllTokenDispatcher(placement, groups.world, ops, groups.device)


def several_nodes(groups: ParallelGroups) -> bool:
    """Whether the replica spans more than one node, so that what its ranks share costs a network."""
    return groups.ranks_on_node < groups.world.size


def record_specs(config: ModelConfig, dtype: torch.dtype) -> list[RecordSpec]:
    """What every layer keeps in a dtype of records; layers that share a selection keep no index keys."""
    width = latent_width(dtype, config.kv_lora_rank, config.qk_rope_head_dim)
    return [
        RecordSpec(width, config.index_head_dim if config.has_indexer(layer) else 0, dtype)
        for layer in range(config.num_hidden_layers)
    ]


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must have."""
    c = config
    hidden, heads = c.hidden_size, c.num_attention_heads
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    out[_lm_head_name(c)] = (c.vocab_size, hidden)

    def mlp(prefix: str, inner: int) -> None:
        out[f"{prefix}.gate_proj.weight"] = out[f"{prefix}.up_proj.weight"] = (inner, hidden)
        out[f"{prefix}.down_proj.weight"] = (hidden, inner)

    for i in range(c.num_hidden_layers):
        prefix = f"model.layers.{i}"
        attn = f"{prefix}.self_attn"
        out[f"{prefix}.input_layernorm.weight"] = out[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        out[f"{attn}.q_a_proj.weight"] = (c.q_lora_rank, hidden)
        out[f"{attn}.q_a_layernorm.weight"] = (c.q_lora_rank,)
        out[f"{attn}.q_b_proj.weight"] = (heads * c.qk_head_dim, c.q_lora_rank)
        out[f"{attn}.kv_a_proj_with_mqa.weight"] = (c.kv_lora_rank + c.qk_rope_head_dim, hidden)
        out[f"{attn}.kv_a_layernorm.weight"] = (c.kv_lora_rank,)
        out[f"{attn}.kv_b_proj.weight"] = (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        out[f"{attn}.o_proj.weight"] = (hidden, heads * c.v_head_dim)
        if c.has_indexer(i):
            index = f"{attn}.indexer"
            out[f"{index}.wq_b.weight"] = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            out[f"{index}.wk.weight"] = (c.index_head_dim, hidden)
            out[f"{index}.k_norm.weight"] = out[f"{index}.k_norm.bias"] = (c.index_head_dim,)
            out[f"{index}.weights_proj.weight"] = (c.index_n_heads, hidden)
        if not c.is_moe_layer(i):
            mlp(f"{prefix}.mlp", c.intermediate_size)
            continue
        out[f"{prefix}.mlp.gate.weight"] = (c.n_routed_experts, hidden)
        out[f"{prefix}.mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        for expert in range(c.n_routed_experts):
            mlp(f"{prefix}.mlp.experts.{expert}", c.moe_intermediate_size)
        if c.n_shared_experts:
            mlp(f"{prefix}.mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
    return out


def _lm_head_name(config: ModelConfig) -> str:
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
