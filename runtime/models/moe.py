"""Feed-forward layers: the dense MLP and the mixture of experts.

T tokens, H = hidden_size, I = intermediate size of one expert (or of this rank's part of a dense MLP), K experts of
a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels import fused as blocks
from shoal.kernels.linear import DTYPE_CODES, PackedWeight
from shoal.parallel.dispatcher import LocalTokenDispatcher, TokenDispatcher
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import column_parallel, gather_last_dim, gather_tokens, shard, split_tokens

from .config import ModelConfig
from .forward import AttentionMetadata
from .weights import LayerWeights

_GATE_UP = ("gate_proj.weight", "up_proj.weight")
"""gate over up: [2I, H]."""


class DenseMLP:
    """down(silu(gate(x)) * up(x)), split over the outputs of each product in the tp group."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, groups: ParallelGroups, *, layer: int) -> None:
        self.layer = layer
        self.tp = groups.tp
        self.ops = weights.ops
        inner = shard(config.intermediate_size, groups.tp_rank, self.tp.size)
        self.gate_up = weights.pack(*_GATE_UP, rows=inner)
        self.down = weights.pack("down_proj.weight", rows=shard(config.hidden_size, groups.tp_rank, self.tp.size))

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """x [T, H] -> [T, H]."""
        if self.tp.size == 1:
            return self.ops.mlp(x, self.gate_up, self.down)  # the same bits, in one call
        inner = self.ops.swiglu(self.ops.linear(x, self.gate_up))
        inner = gather_last_dim(inner, self.tp, layer=self.layer, op="mlp.inner")
        return column_parallel(self.ops, inner, self.down, self.tp, layer=self.layer, op="mlp.down")


class MoE:
    """Route, dispatch, experts, combine; the shared expert sees every token.

    The ranks of a tp group hold the same tokens, so each takes its share of them through the experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        groups: ParallelGroups,
        dispatcher: TokenDispatcher,
        *,
        layer: int,
        local_experts: list[int],
    ) -> None:
        self.layer = layer
        self.tp = groups.tp
        self.ops = weights.ops
        self.dispatcher = dispatcher
        self.config = config
        self.gate = self.ops.pack_weight(weights.read("gate.weight", dtype=torch.float32))
        self.bias = weights.read("gate.e_score_correction_bias", dtype=torch.float32)
        self.gate_up, self.down = _load_experts(config, weights, local_experts)
        self.shared: tuple[PackedWeight, PackedWeight] | None = None
        if config.n_shared_experts:
            shared = weights.under("shared_experts")
            self.shared = (shared.pack(*_GATE_UP), shared.pack("down_proj.weight"))

    def block(self, post_attention_norm: Tensor, eps: float) -> blocks.MoeBlock | None:
        """This layer with the norm before it for calls of `blocks`, where they exist: without tensor parallelism."""
        if self.tp.size > 1 or self.gate.backend != "cpu":
            return None
        config = self.config
        block = blocks.MoeBlock(
            dtype=DTYPE_CODES[self.gate_up.dtype],
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            n_routed_experts=config.n_routed_experts,
            num_slots=self.gate_up.num_matrices,
            n_group=config.n_group,
            topk_group=config.topk_group,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            post_attention_norm=post_attention_norm.data_ptr(),
            gate=self.gate.data.data_ptr(),
            bias=self.bias.data_ptr(),
            gate_up=blocks.Weight.of(self.gate_up),
            down=blocks.Weight.of(self.down),
            rms_norm_eps=eps,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        if self.shared is not None:
            gate_up, down = self.shared
            block.shared_intermediate_size = down.in_features
            block.shared_gate_up, block.shared_down = blocks.Weight.of(gate_up), blocks.Weight.of(down)
        if isinstance(self.dispatcher, LocalTokenDispatcher):
            block.slot_of = self.dispatcher.slot_of.data_ptr()
        return block

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """x [T, H] -> [T, H]: the routed experts in slot order plus the shared expert, summed in fp32, rounded once."""
        mine = split_tokens(x, self.tp)
        topk_idx, topk_weights = self._route(mine)
        metadata.emit(self.layer, "moe.topk_idx", topk_idx)
        out = self._experts(mine, topk_idx, topk_weights)
        return gather_tokens(out, x.shape[0], self.tp, layer=self.layer, op="moe.gather")

    def forward_block(
        self, block: blocks.MoeBlock, step: blocks.StepArgs, attended: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(attention output, residual) [T, H] -> (what the experts add, residual), with the bits of `forward`."""
        if isinstance(self.dispatcher, LocalTokenDispatcher):
            return blocks.moe_block(block, step, attended, residual)
        x, residual, topk_idx, topk_weights = blocks.moe_route(block, step, attended, residual)
        return self._experts(x, topk_idx, topk_weights), residual

    def _experts(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Tokens of this rank through their experts, wherever these are; the shared one works while outputs travel."""
        tokens, handle = self.dispatcher.dispatch(x, topk_idx, topk_weights, layer=self.layer)
        y = self.ops.experts_mlp(
            tokens.x, tokens.num_tokens_per_expert, self.gate_up, self.down, tokens.x_row, tokens.out_row
        )
        receive = self.dispatcher.combine(y, handle, layer=self.layer)
        return receive(None if self.shared is None else self.ops.mlp(x, *self.shared))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return self.ops.route(
            self.ops.linear(x.float(), self.gate),
            self.bias,
            n_group=config.n_group,
            topk_group=config.topk_group,
            top_k=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )


def _load_experts(config: ModelConfig, weights: LayerWeights, local: list[int]) -> tuple[PackedWeight, PackedWeight]:
    """This rank's experts, read and packed one at a time."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    experts = [weights.under(f"experts.{expert}") for expert in local]
    gate_up = weights.ops.pack_each(
        (e.pack(*_GATE_UP) for e in experts), len(local), (2 * inner, hidden), weights.dtype
    )
    down = weights.ops.pack_each(
        (e.pack("down_proj.weight") for e in experts), len(local), (hidden, inner), weights.dtype
    )
    return gate_up, down
