"""The DeepSeek-V3 decoder, which is also that of V3.2, Kimi-K2, Kimi-K2.5, GLM-5, GLM-4.7-Flash and Moonlight."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.kv_format import latent_width
from shoal.kernels.ops import Ops
from shoal.kernels.rope import cos_sin_table, inv_freq
from shoal.parallel.dispatcher import TokenDispatcher
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import gather_last_dim, shard
from shoal.parallel.lm_head import ParallelLMHead, vocab_shard
from shoal.parallel.placement import ExpertPlacement, spans_nodes

from ..kv_cache.cache import KVCacheSpec
from .attention import MLAttention
from .config import ModelConfig
from .forward import Hidden, StepContext
from .moe import DenseMLP, MoE
from .weights import Layer, WeightFactory


class DecoderLayer(Layer):
    """h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightFactory,
        groups: ParallelGroups,
        dispatcher: TokenDispatcher,
        placement: ExpertPlacement,
        rope_table: Tensor,
        *,
        layer: int,
    ) -> None:
        self.ops = weights.ops
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.input_norm = weights.vector("input_layernorm.weight", config.hidden_size)
        self.attention = MLAttention(config, weights.under("self_attn"), groups, rope_table, layer=layer)
        self.post_attention_norm = weights.vector("post_attention_layernorm.weight", config.hidden_size)
        self.mlp: DenseMLP | MoE
        if config.is_moe_layer(layer):
            local_experts = placement.local_experts(groups.rank)
            self.mlp = MoE(config, weights.under("mlp"), groups, dispatcher, layer=layer, local_experts=local_experts)
        else:
            self.mlp = DenseMLP(config, weights.under("mlp"), groups, layer=layer)

    def forward(self, h: Hidden, ctx: StepContext) -> Hidden:
        """Hidden states before this layer -> after it; the output of `mlp` is not yet added to the residual."""
        if h.residual is None:
            x, residual = self.ops.rms_norm(h.delta, self.input_norm.data, self.eps), h.delta
        else:
            x, residual = self.ops.add_rms_norm(h.delta, h.residual, self.input_norm.data, self.eps)
        ctx.emit(self.layer, "residual", residual)
        with ctx.spans("model.attention"):
            attended, topk_indices = self.attention.forward(x, ctx, h.topk_indices)
        ctx.emit(self.layer, "attention", attended)
        x, residual = self.ops.add_rms_norm(attended, residual, self.post_attention_norm.data, self.eps)
        with ctx.spans(self.mlp.span):
            delta = self.mlp.forward(x, ctx)
        ctx.emit(self.layer, "mlp", delta)
        return Hidden(delta, residual, topk_indices)


class DeepseekModel(Layer):
    """This rank's part of the model: its attention heads, its experts, its slice of the vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        groups: ParallelGroups,
        *,
        placement: ExpertPlacement,
        dispatcher: TokenDispatcher,
        dtype: torch.dtype,
        max_model_len: int,
        layer_class: type[DecoderLayer] = DecoderLayer,
    ) -> None:
        """Declare the weights; `load` fills them.

        placement: the expert in each slot of each rank, the same that `dispatcher` sends tokens by.
        """
        self.config = config
        self.ops = ops
        self.dtype = dtype
        self.tp = groups.tp
        frequencies = inv_freq(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        rope_table = cos_sin_table(frequencies, max_model_len, config.rope_cos_sin_scale).to(groups.device)
        root = WeightFactory(config.tensor_prefix.removesuffix("."), ops, dtype, groups.device, config.ue8m0_scales)
        weights = root.under("model")
        vocab_shape = (config.vocab_size, config.hidden_size)
        hidden = shard(config.hidden_size, groups.tp_rank, self.tp.size)
        self.embed_tokens = weights.table("embed_tokens.weight", vocab_shape, cols=hidden)
        self.layers = [
            layer_class(config, weights.under(f"layers.{i}"), groups, dispatcher, placement, rope_table, layer=i)
            for i in range(config.num_hidden_layers)
        ]
        self.final_norm = weights.vector("norm.weight", config.hidden_size)
        head = self.tp if spans_nodes(groups) else groups.world
        vocab = vocab_shard(config.vocab_size, head.rank, head.size)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.lm_head_weight = root.matrix({name: vocab_shape}, rows=vocab, keep_fp8=False)
        self.lm_head = ParallelLMHead(ops, config.vocab_size, head, self.tp.size)

    def forward(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """input_ids [T] int64 -> hidden states after the final norm [T, H].

        T may be 0: a rank without tokens still takes part in the exchange of the others' tokens.
        """
        embedded = self.embed_tokens.data[input_ids]
        h = Hidden(gather_last_dim(embedded, self.tp, layer=-1, op="embed_tokens"), None, None)
        for layer in self.layers:
            h = layer.forward(h, ctx)
        assert h.residual is not None
        out, _ = self.ops.add_rms_norm(h.delta, h.residual, self.final_norm.data, self.config.rms_norm_eps)
        ctx.emit(-1, "final_norm", out)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, vocab_size] fp32 where they are sampled, as `ParallelLMHead` says.

        Every rank of the replica calls it equally often, if need be with N = 0.
        """
        return self.lm_head(hidden, self.lm_head_weight.data)

    def cache_specs(self, dtype: torch.dtype) -> list[KVCacheSpec]:
        """KV cache entries of a token, per layer, stored in `dtype`."""
        return cache_specs(self.config, dtype)


def cache_specs(config: ModelConfig, dtype: torch.dtype) -> list[KVCacheSpec]:
    """KV cache entries of a token, per layer, stored in `dtype`; layers that share a selection keep no index keys."""
    width = latent_width(dtype, config.kv_lora_rank, config.qk_rope_head_dim)
    return [
        KVCacheSpec(width, config.index_head_dim if config.has_indexer(layer) else 0, dtype)
        for layer in range(config.num_hidden_layers)
    ]
