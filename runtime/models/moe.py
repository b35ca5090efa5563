"""Feed-forward layers: the dense MLP and the mixture of experts.

T tokens, H = hidden_size, I = intermediate size of one expert (or of this rank's part of a dense MLP), K experts of
a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.parallel.dispatcher import TokenDispatcher
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.linear import column_parallel, gather_last_dim, gather_tokens, shard, split_tokens
from shoal.parallel.spans import SpanName

from .config import ModelConfig
from .forward import StepContext
from .weights import Layer, WeightFactory


class DenseMLP(Layer):
    """down(silu(gate(x)) * up(x)); both GEMMs are split over their outputs in the tp group."""

    span: SpanName = "model.mlp"

    def __init__(self, config: ModelConfig, weights: WeightFactory, groups: ParallelGroups, *, layer: int) -> None:
        self.ops = weights.ops
        self.tp = groups.tp
        self.layer = layer
        hidden, inner = config.hidden_size, config.intermediate_size
        # gate over up: [2I, H]
        self.gate_up = weights.matrix(
            {"gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden)},
            rows=shard(inner, groups.tp_rank, self.tp.size),
        )
        self.down = weights.matrix(
            {"down_proj.weight": (hidden, inner)}, rows=shard(hidden, groups.tp_rank, self.tp.size)
        )

    def forward(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, H] -> [T, H]."""
        if self.tp.size == 1:
            return self.ops.mlp(x, self.gate_up.data, self.down.data)  # the same bits, in one call
        inner = self.ops.swiglu(self.ops.linear(x, self.gate_up.data))
        inner = gather_last_dim(inner, self.tp, layer=self.layer, op="mlp.inner")
        return column_parallel(self.ops, inner, self.down.data, self.tp, layer=self.layer, op="mlp.down")


class SharedExpert(Layer):
    """An MLP that sees every token; replicated on all ranks."""

    def __init__(self, config: ModelConfig, weights: WeightFactory) -> None:
        self.ops = weights.ops
        hidden, inner = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.gate_up = weights.matrix({"gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden)})
        self.down = weights.matrix({"down_proj.weight": (hidden, inner)})

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        return self.ops.mlp(x, self.gate_up.data, self.down.data)


class MoE(Layer):
    """Route, dispatch, experts, combine; the shared expert sees every token.

    The ranks of a tp group hold the same tokens, so each takes its share of them through the experts.
    """

    span: SpanName = "model.moe"

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightFactory,
        groups: ParallelGroups,
        dispatcher: TokenDispatcher,
        *,
        layer: int,
        local_experts: Sequence[int],
    ) -> None:
        """local_experts: the logical expert in each slot of this rank, as in the dispatcher's placement."""
        self.ops = weights.ops
        self.tp = groups.tp
        self.layer = layer
        self.config = config
        self.dispatcher = dispatcher
        hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.gate = weights.matrix({"gate.weight": (num_experts, hidden)}, dtype=torch.float32)
        self.bias = weights.vector("gate.e_score_correction_bias", num_experts, dtype=torch.float32)
        self.gate_up = weights.experts(
            {"gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden)},
            num_experts=num_experts,
            local=local_experts,
        )
        self.down = weights.experts({"down_proj.weight": (hidden, inner)}, num_experts=num_experts, local=local_experts)
        self.shared = SharedExpert(config, weights.under("shared_experts")) if config.n_shared_experts else None

    def forward(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, H] -> [T, H]: the routed experts in slot order plus the shared expert, summed in fp32, rounded once."""
        mine = split_tokens(x, self.tp)
        topk_idx, topk_weights = self.route(mine)
        ctx.emit(self.layer, "moe.topk_idx", topk_idx)
        out = self.experts(mine, topk_idx, topk_weights, ctx)
        return gather_tokens(out, x.shape[0], self.tp, layer=self.layer, op="moe.gather")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> (logical experts [T, K] int64, their weights [T, K] fp32)."""
        config = self.config
        return self.ops.route(
            self.ops.linear(x.float(), self.gate.data),
            self.bias.data,
            n_group=config.n_group,
            topk_group=config.topk_group,
            top_k=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def experts(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, ctx: StepContext) -> Tensor:
        """Send x [T, H] through its experts, wherever they are; the shared expert works while outputs travel."""
        with ctx.spans("model.dispatch"):
            tokens, handle = self.dispatcher.dispatch(x, topk_idx, topk_weights, layer=self.layer)
        y = self.ops.experts_mlp(
            tokens.x, tokens.num_tokens_per_expert, self.gate_up.data, self.down.data, tokens.x_row, tokens.out_row
        )
        with ctx.spans("model.combine"):
            receive = self.dispatcher.combine(y, handle, layer=self.layer)
        shared = None if self.shared is None else self.shared.forward(x)
        with ctx.spans("model.combine"):
            return receive(shared)
