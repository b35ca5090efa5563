"""Sizes of models for `shoal bench kernels`, and inputs of those sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.linear import PackedWeight
from shoal.kernels.math_utils import cdiv
from shoal.kernels.ops import Ops

BLOCK_SIZE = 64
ShapesName = Literal["tiny", "v3-test", "v3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes of one rank's part of a model, with the names of config.json, and of its batches."""

    hidden_size: int
    q_lora_rank: int
    kv_lora_rank: int
    num_attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_local_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    vocab_size: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rows: tuple[int, ...]
    """Tokens of a step, from one stream to a prompt."""
    decode_batch: int
    context: int
    """Tokens of a sequence whose attention is dense."""
    long_context: int
    """Tokens of a sequence whose attention is sparse."""


_V3 = Shapes(
    hidden_size=7168,
    q_lora_rank=1536,
    kv_lora_rank=512,
    num_attention_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_local_experts=8,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    vocab_size=129280,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
    rows=(1, 16, 256),
    decode_batch=16,
    context=1024,
    long_context=8192,
)
_V3_TEST = Shapes(
    hidden_size=1024,
    q_lora_rank=384,
    kv_lora_rank=512,
    num_attention_heads=16,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=512,
    n_routed_experts=32,
    num_local_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    vocab_size=32000,
    index_n_heads=16,
    index_head_dim=128,
    index_topk=256,
    rows=(1, 16, 64, 2048),
    decode_batch=16,
    context=2048,
    long_context=8192,
)
_TINY = Shapes(
    hidden_size=96,
    q_lora_rank=48,
    kv_lora_rank=32,
    num_attention_heads=4,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=24,
    moe_intermediate_size=48,
    n_routed_experts=16,
    num_local_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    vocab_size=320,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=8,
    rows=(1, 9),
    decode_batch=3,
    context=80,
    long_context=100,
)
SHAPES: dict[ShapesName, Shapes] = {"tiny": _TINY, "v3-test": _V3_TEST, "v3": _V3}
"""A small model; the model that other engines are compared on; one rank of 32 of DeepSeek-V3."""


class Inputs:
    """Random inputs of kernels; every new object draws the same ones."""

    def __init__(self, ops: Ops, device: torch.device | None = None) -> None:
        """`ops` packs weights; large tensors are drawn on `device`."""
        self.ops = ops
        self._device = device or torch.device("cpu")
        self._generator = torch.Generator(self._device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device).to(dtype)

    def weight(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
        """[.., N, K], packed by `ops`, scaled so that a GEMM's output is about as large as its input."""
        values = torch.randn(shape, generator=self._generator, device=self._device).div_(math.sqrt(shape[-1]))
        return self.ops.pack_weight(values.to(dtype))

    def positions(self, count: int, limit: int) -> Tensor:
        return torch.randint(limit, (count,), generator=self._generator, device=self._device)

    def experts(self, tokens: int, num_experts: int, top_k: int) -> Tensor:
        """[T, K] int64, distinct experts for each token."""
        draws = torch.rand(tokens, num_experts, generator=self._generator, device=self._device)
        return draws.topk(top_k, dim=1).indices

    def layout(self, sequences: int, length: int, context: int) -> PagedLayout:
        """The last `length` tokens of contexts whose blocks are scattered over `num_slots` slots."""
        blocks = cdiv(context, BLOCK_SIZE)
        order = torch.randperm(sequences * blocks, generator=self._generator, device=self._device)
        return PagedLayout(
            block_tables=order.to("cpu", torch.int32).view(sequences, blocks),
            cu_seqlens_q=torch.arange(0, sequences * length + 1, length, dtype=torch.int32),
            positions=torch.arange(context - length, context).repeat(sequences),
            block_size=BLOCK_SIZE,
        )

    def selected(self, tokens: int, context: int, topk: int) -> Tensor:
        """[T, topk] int32, ascending positions of the context."""
        return self.experts(tokens, context, topk).sort(dim=1).values.to(torch.int32)
