"""The operations of one engine, bound to one kernel backend: everything that a model, dispatcher or sampler runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Concatenate, Generic, ParamSpec, TypeVar, get_args

import torch

from . import attention, dispatch, experts, indexer, kv_format, norm, quant, rope, sampling, topk_router
from . import linear as gemm
from .backends import Backend, KernelBackend
from .registry import Kernel, check_vendors, find_kernel, load_kernels
from .vendor import Vendor

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """An attribute of `Ops`: a public function of the kernels without its first argument, the kernel that it runs.

    Each `Ops` sets an attribute of the same name on itself, so a call costs one look-up; the class holds the signature.
    """

    def __init__(self, function: Callable[Concatenate[Kernel, P], R], *, kernel: str | None = None) -> None:
        """`kernel`: the operation whose kernel the function runs, by default the one of the attribute's name."""
        self._function = function
        self._kernel = kernel

    def __set_name__(self, owner: type[object], name: str) -> None:
        self._kernel = self._kernel or name

    def __get__(self, ops: object, owner: type[object]) -> Callable[P, R]:
        raise AttributeError(f"{self._kernel} is an attribute of instances of Ops")

    def bind(self, backend: Backend, vendors: Sequence[Vendor]) -> Callable[P, R]:
        """The function with its kernel on `backend`."""
        assert self._kernel is not None
        return partial(self._function, find_kernel(self._kernel, backend, vendors))


class Ops:
    """Operations as functions of tensors, with the contracts stated in kernels/<file>.py.

    Immutable, and independent of every other `Ops` of the process. Weights packed for one backend are refused by
    others.
    """

    backend: Backend
    vendors: tuple[Vendor, ...]

    def __init__(self, backend: Backend, vendors: Sequence[Vendor] = ()) -> None:
        """Bind every operation; the first of `vendors` that implements an operation replaces Triton's kernel.

        ValueError for an unknown backend, for "triton" without the package triton, and for `vendors` without "triton".
        `choose` also checks that vendor libraries work.
        """
        if backend not in get_args(Backend):
            raise ValueError(f"kernels {backend!r} do not exist, choose one of {', '.join(get_args(Backend))}")
        if vendors and backend != "triton":
            raise ValueError(
                f"kernels of {', '.join(vendors)} take the place of kernels 'triton', not of {backend!r}: "
                f"set vendor_kernels to none, or device to cuda"
            )
        load_kernels(backend, vendors)
        self.backend = backend
        self.vendors = tuple(vendors)
        for name, op in vars(Ops).items():
            if isinstance(op, Op):
                setattr(self, name, op.bind(backend, self.vendors))

    @classmethod
    def choose(cls, device: torch.device, backend: KernelBackend = "auto", vendors: Sequence[Vendor] = ()) -> Ops:
        """The operations for tensors on `device`; auto: triton on a GPU, cpu elsewhere.

        ValueError for a device that does not exist, and for kernels or vendor libraries that do not run on it.
        """
        if device.type == "cuda" and not torch.cuda.is_available():
            why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
            raise ValueError(f"device cuda: {why}; set device to cpu, or install torch for CUDA and a driver")
        ops = cls(choose_backend(backend, device), vendors)
        check_vendors(vendors, device)
        return ops

    def numerics_id(self, device: torch.device) -> str:
        """The class of bits that these kernels compute on `device`: two equal ids give equal bits.

        On a GPU it names the compute capability, because some kernels differ by it.
        """
        parts: list[str] = [self.backend, *self.vendors]
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            parts.append(f"sm_{major}{minor}")
        return "+".join(parts)

    # Normalisation, rotary embedding, routing
    rms_norm = Op(norm.rms_norm)
    layer_norm = Op(norm.layer_norm)
    add_rms_norm = Op(norm.add_rms_norm)
    apply_rope = Op(rope.apply_rope)
    route = Op(topk_router.route)

    # Weights, GEMMs, experts
    pack_weight = Op(gemm.pack_weight)
    pack_block_fp8 = Op(gemm.pack_block_fp8, kernel="pack_weight")
    pack_each = Op(gemm.pack_each, kernel="pack_weight")
    linear = Op(gemm.linear)
    batched_linear = Op(gemm.batched_linear)
    swiglu = Op(experts.swiglu)
    experts_mlp = Op(experts.experts_mlp)
    mlp = Op(experts.mlp, kernel="experts_mlp")
    combine_topk = Op(experts.combine_topk)

    # Attention and the KV cache
    mla_attention = Op(attention.mla_attention)
    mha_attention = Op(attention.mha_attention)
    write_latents = Op(kv_format.write_latents)
    write_index_keys = Op(kv_format.write_index_keys)
    index_topk = Op(indexer.index_topk)
    index_scores = Op(indexer.index_scores)
    topk_positions = Op(indexer.topk_positions)

    # Dispatch of tokens to experts
    permute_by_expert = Op(dispatch.permute_by_expert)
    pack_send_buffers = Op(dispatch.pack_send_buffers)
    unpack_recv_buffers = Op(dispatch.unpack_recv_buffers)

    # FP8
    quantize_token_groups = Op(quant.quantize_token_groups)
    quantize_rows_fp8 = Op(quant.quantize_rows_fp8)
    dequantize_rows_fp8 = Op(quant.dequantize_rows_fp8)

    # Sampling
    sample_tokens = Op(sampling.sample_tokens)
    mask_logits = Op(sampling.mask_logits)
    truncate_logits = Op(sampling.truncate_logits)
    token_logprobs = Op(sampling.token_logprobs)


def choose_backend(wanted: KernelBackend, device: torch.device) -> Backend:
    """The kernels for a device; ValueError for kernels that do not run there."""
    if wanted == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    if wanted == "cpu" and device.type != "cpu":
        raise ValueError('kernels "cpu" do not run on a GPU: choose "triton", or device "cpu"')
    if wanted == "triton" and device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(
            'kernels "triton" need device "cuda" (or TRITON_INTERPRET=1, which is for tests of the kernels)'
        )
    return wanted
