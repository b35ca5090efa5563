"""Decoder layers on CPUs: each half of a layer is one call of the compiled kernels, with the bits of `DecoderLayer`.

The calls read weights through pointers, which stay valid because weights that are loaded again keep their memory.
"""

from __future__ import annotations

from torch import Tensor

from shoal.kernels.cpu_library import DTYPE_CODES
from shoal.kernels.fused import (
    FusedAttention,
    FusedMoE,
    PackedWeightArgs,
    StepArgs,
    fused_attention,
    fused_moe,
    fused_moe_route,
    step_args,
)
from shoal.kernels.ops import Ops
from shoal.parallel.dispatcher import LocalTokenDispatcher
from shoal.parallel.groups import ParallelGroups

from .attention import LATENT_NORM_EPS, Indexer, MLAttention
from .deepseek import DecoderLayer
from .forward import Hidden, StepContext
from .moe import DenseMLP, MoE
from .weights import WeightSource


def decoder_layer_class(ops: Ops, groups: ParallelGroups) -> type[DecoderLayer]:
    """`FusedDecoderLayer` where it applies: kernels of the CPU, and no tensor parallelism."""
    return FusedDecoderLayer if ops.backend == "cpu" and groups.tp.size == 1 else DecoderLayer


class FusedDecoderLayer(DecoderLayer):
    """A decoder layer that runs operation by operation only for a tap, which sees every intermediate result."""

    def load(self, source: WeightSource) -> None:
        super().load(source)
        self._fused_attention = _fuse_attention(self)
        self._fused_moe = _fuse_moe(self, self.mlp) if isinstance(self.mlp, MoE) else None

    def forward(self, h: Hidden, ctx: StepContext) -> Hidden:
        if ctx.tap is not None:
            return super().forward(h, ctx)
        with ctx.spans("model.attention"):
            attended, residual, topk_indices = self.attend(h, ctx)
        with ctx.spans(self.mlp.span):
            delta, residual = self.feed_forward(attended, residual, ctx)
        return Hidden(delta, residual, topk_indices)

    def attend(self, h: Hidden, ctx: StepContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """(attention output [T, H], residual stream before it, selection)."""
        return fused_attention(
            self._fused_attention,
            ctx.once(_step_args),
            h.delta,
            h.residual,
            ctx.cache.latents[self.layer],
            ctx.cache.index_keys[self.layer],
            h.topk_indices,
        )

    def feed_forward(self, attended: Tensor, residual: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(output of the MLP or the experts [T, H], residual stream before it)."""
        if isinstance(self.mlp, DenseMLP):
            x, residual = self.ops.add_rms_norm(attended, residual, self.post_attention_norm.data, self.eps)
            return self.mlp.forward(x, ctx), residual
        assert self._fused_moe is not None
        step = ctx.once(_step_args)
        if isinstance(self.mlp.dispatcher, LocalTokenDispatcher):
            return fused_moe(self._fused_moe, step, attended, residual)
        x, residual, topk_idx, topk_weights = fused_moe_route(self._fused_moe, step, attended, residual)
        return self.mlp.experts(x, topk_idx, topk_weights, ctx), residual


def _step_args(ctx: StepContext) -> StepArgs:
    metadata = ctx.metadata
    return step_args(metadata.mha, metadata.mqa, metadata.positions, metadata.slot_mapping)


def _fuse_attention(layer: DecoderLayer) -> FusedAttention:
    """The input norm and attention of a layer whose weights are loaded."""
    attention: MLAttention = layer.attention
    args = FusedAttention(
        dtype=DTYPE_CODES[attention.a_proj.dtype],
        hidden_size=attention.a_proj.data.in_features,
        num_heads=attention.num_heads,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.latent_dim,
        qk_nope_head_dim=attention.nope_dim,
        qk_rope_head_dim=attention.rope_dim,
        v_head_dim=attention.v_dim,
        rope_interleave=attention.interleaved,
        rope_rows=attention.rope_table.shape[0],
        input_norm=layer.input_norm.data.data_ptr(),
        kv_a_norm=attention.kv_a_norm.data.data_ptr(),
        rope_table=attention.rope_table.data_ptr(),
        w_a=PackedWeightArgs.of(attention.a_proj.data),
        w_q=PackedWeightArgs.of(attention.q_proj.data),
        w_uk=PackedWeightArgs.of(attention.kv_b_proj.w_uk),
        w_uk_absorbed=PackedWeightArgs.of(attention.kv_b_proj.w_uk_absorbed),
        w_uv=PackedWeightArgs.of(attention.kv_b_proj.w_uv),
        w_o=PackedWeightArgs.of(attention.o_proj.data),
        index_topk=attention.index_topk,
        rms_norm_eps=layer.eps,
        latent_norm_eps=LATENT_NORM_EPS,
        scale=attention.scale,
    )
    if attention.q_lora_rank:
        args.q_a_norm = attention.q_a_norm.data.data_ptr()
    if attention.indexer is not None:
        _add_indexer(args, attention.indexer)
    return args


def _add_indexer(args: FusedAttention, indexer: Indexer) -> None:
    args.index_n_heads = indexer.num_heads
    args.index_head_dim = indexer.head_dim
    args.index_rope_interleave = indexer.interleaved
    args.index_wq_b = PackedWeightArgs.of(indexer.wq_b.data)
    args.index_wk = PackedWeightArgs.of(indexer.wk.data)
    args.index_k_norm = indexer.k_norm_weight.data.data_ptr()
    args.index_k_norm_bias = indexer.k_norm_bias.data.data_ptr()
    args.index_weights_proj = indexer.weights_proj.data.data.data_ptr()
    args.index_weight_scale = indexer.weight_scale


def _fuse_moe(layer: DecoderLayer, moe: MoE) -> FusedMoE:
    """The norm before the experts, and the experts, of a layer whose weights are loaded."""
    config = moe.config
    args = FusedMoE(
        dtype=DTYPE_CODES[moe.gate_up.data.dtype],
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.n_routed_experts,
        num_slots=moe.gate_up.data.num_matrices,
        n_group=config.n_group,
        topk_group=config.topk_group,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        post_attention_norm=layer.post_attention_norm.data.data_ptr(),
        gate=moe.gate.data.data.data_ptr(),
        bias=moe.bias.data.data_ptr(),
        gate_up=PackedWeightArgs.of(moe.gate_up.data),
        down=PackedWeightArgs.of(moe.down.data),
        rms_norm_eps=layer.eps,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    if moe.shared is not None:
        args.shared_intermediate_size = moe.shared.down.data.in_features
        args.shared_gate_up = PackedWeightArgs.of(moe.shared.gate_up.data)
        args.shared_down = PackedWeightArgs.of(moe.shared.down.data)
    if isinstance(moe.dispatcher, LocalTokenDispatcher):
        args.slot_of = moe.dispatcher.slot_of.data_ptr()
    return args
