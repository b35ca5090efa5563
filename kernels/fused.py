"""Halves of a decoder layer in one call of the compiled kernels, so that Python does little between the GEMMs.

Each is bit-identical to the composition of public operations in runtime/models/deepseek.py, on the "cpu" backend only.
The structures hold pointers: the caller must keep the tensors alive and unmoved.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .attention import LayoutArgs, PagedLayout, slot_error
from .cpu_library import MIN_PARALLEL_WORK, CFunction
from .kv_format import IndexKeys, KVCacheArgs, index_keys_args, kv_cache_args
from .linear import PackedWeight


class Threads(ctypes.Structure):
    """shoal::Threads: number of threads of an operation, by its size."""

    _fields_ = (("count", c_int64), ("min_parallel_work", c_int64))


class PackedWeightArgs(ctypes.Structure):
    """shoal::PackedWeightArgs."""

    _fields_ = (("data", c_void_p), ("format", c_int64))

    @classmethod
    def of(cls, weight: PackedWeight) -> PackedWeightArgs:
        return cls(weight.data.data_ptr(), weight.format)


class FusedAttention(ctypes.Structure):
    """shoal::FusedAttention: sizes and weights of one layer's attention, including the norm before it."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank")),
        *((name, c_int64) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
        *((name, c_int64) for name in ("rope_interleave", "rope_rows")),
        *((name, c_void_p) for name in ("input_norm", "q_a_norm", "kv_a_norm", "rope_table")),
        *((name, PackedWeightArgs) for name in ("w_a", "w_q", "w_uk", "w_uk_absorbed", "w_uv", "w_o")),
        *((name, c_int64) for name in ("index_n_heads", "index_head_dim", "index_topk", "index_rope_interleave")),
        *((name, PackedWeightArgs) for name in ("index_wq_b", "index_wk")),
        *((name, c_void_p) for name in ("index_k_norm", "index_k_norm_bias", "index_weights_proj")),
        *((name, c_float) for name in ("index_weight_scale", "rms_norm_eps", "latent_norm_eps", "scale")),
    )


class FusedMoE(ctypes.Structure):
    """shoal::FusedMoE: router, experts and shared expert of one layer, including the norm before them."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in ("dtype", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_slots")
        ),
        *((name, c_int64) for name in ("n_group", "topk_group", "num_experts_per_tok", "norm_topk_prob")),
        ("shared_intermediate_size", c_int64),
        *((name, c_void_p) for name in ("post_attention_norm", "gate", "bias", "slot_of")),
        *((name, PackedWeightArgs) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *((name, c_float) for name in ("rms_norm_eps", "routed_scaling_factor")),
    )


class StepArgs(ctypes.Structure):
    """shoal::StepArgs: arguments that change per step, shared by all layers."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_mha_tokens")),
        *((name, c_void_p) for name in ("positions", "slots")),
        *((name, LayoutArgs) for name in ("mha", "mqa")),
        ("threads", Threads),
    )


shoal_fused_attention = CFunction(
    "shoal_fused_attention",
    POINTER(FusedAttention),
    POINTER(StepArgs),
    *[c_void_p] * 2,
    POINTER(KVCacheArgs),
    POINTER(IndexKeys),
    *[c_void_p] * 3,
    POINTER(c_int64),
)
shoal_fused_moe_route = CFunction(
    "shoal_fused_moe_route", POINTER(FusedMoE), POINTER(Threads), c_int64, *[c_void_p] * 6
)
shoal_fused_moe = CFunction("shoal_fused_moe", POINTER(FusedMoE), POINTER(Threads), c_int64, *[c_void_p] * 4)


def step_args(mha: PagedLayout, mqa: PagedLayout, positions: Tensor, slots: Tensor) -> StepArgs:
    """positions and slots: [T] int64, tokens of `mha` first; the arguments must outlive the result."""
    threads = Threads(torch.get_num_threads(), MIN_PARALLEL_WORK)
    return StepArgs(
        positions.shape[0],
        mha.num_tokens,
        positions.data_ptr(),
        slots.data_ptr(),
        mha.args(),
        mqa.args(),
        threads,
    )


def fused_attention(
    args: FusedAttention,
    step: StepArgs,
    hidden: Tensor,
    residual: Tensor | None,
    kv_cache: Tensor,
    index_keys: Tensor | None,
    topk_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden [T, H], residual) -> (attention output [T, H], hidden + residual, topk_indices of this layer).

    kv_cache, index_keys: this layer's part of the cache; only layers with an indexer have index_keys.
    The results are in the memory of hidden and residual.
    """
    total = torch.empty_like(hidden) if residual is None else residual
    if args.index_n_heads:
        num_mqa_tokens = step.num_tokens - step.num_mha_tokens
        topk_indices = torch.empty(num_mqa_tokens, args.index_topk, dtype=torch.int32)
    status = c_int64()
    shoal_fused_attention(
        byref(args),
        byref(step),
        hidden.data_ptr(),
        None if residual is None else residual.data_ptr(),
        byref(kv_cache_args(kv_cache)),
        None if index_keys is None else byref(index_keys_args(index_keys, args.index_head_dim)),
        total.data_ptr(),
        None if topk_indices is None else topk_indices.data_ptr(),
        hidden.data_ptr(),
        byref(status),
    )
    if status.value:
        raise slot_error("fused_attention")
    return hidden, total, topk_indices


def fused_moe_route(args: FusedMoE, step: StepArgs, attended: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """(attended, residual) [T, H] -> (normalised sum, sum, topk_idx [T, K] int64, topk_weights [T, K] fp32).

    The sums are in the memory of attended and residual.
    """
    top_k = args.num_experts_per_tok
    topk_idx = torch.empty(step.num_tokens, top_k, dtype=torch.int64)
    topk_weights = torch.empty(step.num_tokens, top_k)
    shoal_fused_moe_route(
        byref(args),
        byref(step.threads),
        step.num_tokens,
        attended.data_ptr(),
        residual.data_ptr(),
        residual.data_ptr(),
        attended.data_ptr(),
        topk_idx.data_ptr(),
        topk_weights.data_ptr(),
    )
    return attended, residual, topk_idx, topk_weights


def fused_moe(args: FusedMoE, step: StepArgs, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(attended, residual) [T, H] -> (MoE output, attended + residual), in their memory.

    All experts are on this rank.
    """
    shoal_fused_moe(
        byref(args),
        byref(step.threads),
        step.num_tokens,
        attended.data_ptr(),
        residual.data_ptr(),
        residual.data_ptr(),
        attended.data_ptr(),
    )
    return attended, residual
