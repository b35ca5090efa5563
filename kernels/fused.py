"""Halves of a decoder layer in one call of the compiled kernels, so that Python does little between the products.

Each block is the composition of public operations that runtime/models writes out, with exactly its bits; it exists for
the "cpu" backend only. A block holds pointers: whoever builds one keeps the tensors alive.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from . import build
from .attention import LayoutArgs, PagedLayout, slot_error
from .kv_format import IndexKeys, Records, index_keys_args, records_args
from .linear import PackedWeight


class Threads(ctypes.Structure):
    """shoal::Threads: how many threads an operation gets, by its size."""

    _fields_ = (("count", c_int64), ("min_parallel_work", c_int64))


class Weight(ctypes.Structure):
    """shoal::Weight."""

    _fields_ = (("data", c_void_p), ("format", c_int64))

    @classmethod
    def of(cls, weight: PackedWeight) -> Weight:
        return cls(weight.data.data_ptr(), weight.format)


class AttentionBlock(ctypes.Structure):
    """shoal::AttentionBlock: the sizes and weights of one layer's attention, norm before it included."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank")),
        *((name, c_int64) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
        *((name, c_int64) for name in ("rope_interleave", "rope_rows")),
        *((name, c_void_p) for name in ("input_norm", "q_a_norm", "kv_a_norm", "rope_table")),
        *((name, Weight) for name in ("w_a", "w_q_b", "w_uk", "w_uk_absorbed", "w_uv", "w_o")),
        *((name, c_int64) for name in ("index_n_heads", "index_head_dim", "index_topk", "index_rope_interleave")),
        *((name, Weight) for name in ("index_wq_b", "index_wk")),
        *((name, c_void_p) for name in ("index_k_norm", "index_k_norm_bias", "index_weights_proj")),
        *((name, c_float) for name in ("index_weight_scale", "rms_norm_eps", "latent_norm_eps", "scale")),
    )


class MoeBlock(ctypes.Structure):
    """shoal::MoeBlock: router, experts and shared expert of one layer, norm before them included."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in ("dtype", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_slots")
        ),
        *((name, c_int64) for name in ("n_group", "topk_group", "num_experts_per_tok", "norm_topk_prob")),
        ("shared_intermediate_size", c_int64),
        *((name, c_void_p) for name in ("post_attention_norm", "gate", "bias", "slot_of")),
        *((name, Weight) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *((name, c_float) for name in ("rms_norm_eps", "routed_scaling_factor")),
    )


class StepArgs(ctypes.Structure):
    """shoal::StepArgs: what a step brings; the same for all layers."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_per_head_tokens")),
        *((name, c_void_p) for name in ("positions", "slots")),
        *((name, LayoutArgs) for name in ("per_head", "absorbed")),
        ("threads", Threads),
    )


_ATTENTION_BLOCK = (
    "shoal_attention_block",
    POINTER(AttentionBlock),
    POINTER(StepArgs),
    *[c_void_p] * 2,
    POINTER(Records),
    POINTER(IndexKeys),
    *[c_void_p] * 3,
    POINTER(c_int64),
)
_MOE_ROUTE = ("shoal_moe_route", POINTER(MoeBlock), POINTER(Threads), c_int64, *[c_void_p] * 6)
_MOE_BLOCK = ("shoal_moe_block", POINTER(MoeBlock), POINTER(Threads), c_int64, *[c_void_p] * 4)


def step_args(per_head: PagedLayout, absorbed: PagedLayout, positions: Tensor, slots: Tensor) -> StepArgs:
    """positions and slots: [T] int64, tokens of `per_head` first; the arguments must outlive the result."""
    threads = Threads(torch.get_num_threads(), build.MIN_PARALLEL_WORK)
    return StepArgs(
        positions.shape[0],
        per_head.num_tokens,
        positions.data_ptr(),
        slots.data_ptr(),
        per_head.args(),
        absorbed.args(),
        threads,
    )


def attention_block(
    block: AttentionBlock,
    step: StepArgs,
    hidden: Tensor,
    residual: Tensor | None,
    records: Tensor,
    index_keys: Tensor | None,
    selected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden [T, H], residual) -> (attention output [T, H], hidden + residual, the selection this layer used).

    index_keys: of a layer with an indexer. The results are in the memory of hidden and residual.
    """
    total = torch.empty_like(hidden) if residual is None else residual
    if block.index_n_heads:
        absorbed = step.num_tokens - step.num_per_head_tokens
        selected = torch.empty(absorbed, block.index_topk, dtype=torch.int32)
    status = c_int64()
    build.c_function(*_ATTENTION_BLOCK)(
        byref(block),
        byref(step),
        hidden.data_ptr(),
        None if residual is None else residual.data_ptr(),
        byref(records_args(records)),
        None if index_keys is None else byref(index_keys_args(index_keys, block.index_head_dim)),
        total.data_ptr(),
        None if selected is None else selected.data_ptr(),
        hidden.data_ptr(),
        byref(status),
    )
    if status.value:
        raise slot_error("attention_block")
    return hidden, total, selected


def moe_route(block: MoeBlock, step: StepArgs, attended: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """(attended, residual) [T, H] -> (normalised sum, sum, topk_idx [T, K] int64, topk_weights [T, K] fp32).

    The sums are in the memory of attended and residual.
    """
    top_k = block.num_experts_per_tok
    topk_idx = torch.empty(step.num_tokens, top_k, dtype=torch.int64)
    topk_weights = torch.empty(step.num_tokens, top_k)
    build.c_function(*_MOE_ROUTE)(
        byref(block),
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


def moe_block(block: MoeBlock, step: StepArgs, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(attended, residual) [T, H] -> (MoE output, attended + residual), in their memory; this rank has all experts."""
    build.c_function(*_MOE_BLOCK)(
        byref(block),
        byref(step.threads),
        step.num_tokens,
        attended.data_ptr(),
        residual.data_ptr(),
        residual.data_ptr(),
        attended.data_ptr(),
    )
    return attended, residual
