"""The operations of one engine, bound to one kernel backend: every operation that a model or a dispatcher runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .attention import mha_attention, mla_attention
from .dispatch import group_pairs, pack_segments, unpack_segments
from .experts import combine_topk, experts_mlp, mlp, swiglu
from .indexer import index_topk
from .kv_format import write_index_keys, write_latents
from .linear import batched_linear, linear, pack_block_fp8, pack_each, pack_weight
from .norm import add_rms_norm, rms_norm
from .quant import quantize_token_groups
from .registry import Backend, Vendor, current_backend
from .rope import apply_rope
from .sampling import sample_tokens, token_logprobs, truncate_logits
from .topk_router import route

KernelBackend = Literal["auto", "cpu", "triton", "reference"]


class Ops:
    """Operations as functions of tensors; each has the contract of the public function of its name."""

    def __init__(self, backend: Backend, vendors: Sequence[Vendor] = ()) -> None:
        self.backend: Backend = backend
        self.vendors = tuple(vendors)

    @classmethod
    def choose(cls, device: torch.device, backend: KernelBackend = "auto", vendors: Sequence[Vendor] = ()) -> Ops:
        """The operations for tensors on `device`; auto: triton on a GPU, cpu elsewhere."""
        if backend == "auto":
            backend = "triton" if device.type == "cuda" else current_backend()
        return cls(backend, vendors)

    add_rms_norm = staticmethod(add_rms_norm)
    apply_rope = staticmethod(apply_rope)
    batched_linear = staticmethod(batched_linear)
    combine_topk = staticmethod(combine_topk)
    experts_mlp = staticmethod(experts_mlp)
    group_pairs = staticmethod(group_pairs)
    index_topk = staticmethod(index_topk)
    linear = staticmethod(linear)
    mha_attention = staticmethod(mha_attention)
    mla_attention = staticmethod(mla_attention)
    mlp = staticmethod(mlp)
    pack_block_fp8 = staticmethod(pack_block_fp8)
    pack_each = staticmethod(pack_each)
    pack_segments = staticmethod(pack_segments)
    pack_weight = staticmethod(pack_weight)
    quantize_token_groups = staticmethod(quantize_token_groups)
    rms_norm = staticmethod(rms_norm)
    route = staticmethod(route)
    sample_tokens = staticmethod(sample_tokens)
    swiglu = staticmethod(swiglu)
    token_logprobs = staticmethod(token_logprobs)
    truncate_logits = staticmethod(truncate_logits)
    unpack_segments = staticmethod(unpack_segments)
    write_index_keys = staticmethod(write_index_keys)
    write_latents = staticmethod(write_latents)
