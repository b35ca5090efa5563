"""Settings of an engine: all that are neither the model nor the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from shoal.kernels.backends import KernelBackend
from shoal.kernels.vendor import VendorKernels, describe_libraries
from shoal.parallel.settings import Setting, check_settings

DType = Literal["auto", "float32", "bfloat16"]
KVCacheDType = Literal["auto", "fp8"]
Invariance = Literal["strict", "relaxed"]
All2AllBackend = Literal["default", "deepep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of an engine; where the default is None, the engine derives the value when it is built."""

    dtype: Annotated[DType, Setting("Compute dtype; auto takes the checkpoint's torch_dtype, else bfloat16.")] = "auto"
    kv_cache_dtype: Annotated[
        KVCacheDType,
        Setting(
            "Dtype of the KV cache; auto is the compute dtype. fp8 stores latents and indexer keys as e4m3 with a "
            "scale per 128 values: about half of bfloat16's memory, and other bits, again the same on every layout."
        ),
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        Setting(
            "Longest prompt plus output, in tokens.",
            ge=1,
            derived="the model's max_position_embeddings, or less if the KV cache cannot hold that",
        ),
    ] = None
    max_num_seqs: Annotated[int, Setting("Sequences that an attention group runs at a time.", ge=1)] = 64
    max_num_batched_tokens: Annotated[int, Setting("Tokens that an attention group computes in a step.", ge=1)] = 2048
    max_chunk_size: Annotated[
        int | None,
        Setting("Largest chunk of one prompt in a step, in tokens.", ge=1, derived="max_num_batched_tokens"),
    ] = None
    block_size: Annotated[int, Setting("Tokens per KV cache block.", ge=1)] = 64
    num_kv_blocks: Annotated[
        int | None,
        Setting("KV cache blocks of an attention group.", ge=1, derived="from kv_cache_memory_fraction"),
    ] = None
    kv_cache_memory_fraction: Annotated[
        float,
        Setting(
            "Fraction of the memory left after loading the weights that the KV cache may take, where num_kv_blocks is "
            "not given. The memory is a GPU's own; on CPUs the ranks of a node share it.",
            gt=0,
            lt=1,
        ),
    ] = 0.5
    enable_prefix_caching: Annotated[bool, Setting("Reuse the KV cache of equal prompt prefixes.")] = True
    kv_buffer_size: Annotated[
        int,
        Setting(
            "Bytes of KV cache that a rank holds for other replicas to read. A longer prompt waits until it has the "
            "buffer alone.",
            ge=1,
            metavar="BYTES",
        ),
    ] = 1 << 30
    seed: Annotated[int, Setting("Seed of requests that bring none, together with their index in the run.")] = 0
    kernel_backend: Annotated[
        KernelBackend, Setting("Kernels to compute with; auto is cpu on a CPU and triton on a GPU.")
    ] = "auto"
    vendor_kernels: Annotated[VendorKernels, Setting(describe_libraries())] = "none"
    all2all_backend: Annotated[
        All2AllBackend,
        Setting(
            "How tokens reach experts on other ranks: default is NCCL (sockets on CPUs), deepep needs DeepEP and GPUs. "
            "The bits are the same."
        ),
    ] = "default"
    enforce_eager: Annotated[bool, Setting("Run decode steps on a GPU without CUDA graphs. The bits are the same.")] = (
        False
    )
    invariance: Annotated[
        Invariance, Setting("strict refuses kernels whose results depend on what else is in the batch.")
    ] = "strict"

    def __post_init__(self) -> None:
        check_settings(self)
