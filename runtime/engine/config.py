"""How one replica runs a model: everything that is not the model and not the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DType = Literal["auto", "float32", "bfloat16"]
KVCacheDType = Literal["auto", "fp8"]
Invariance = Literal["strict", "relaxed"]
All2AllBackend = Literal["default", "deepep"]
VendorKernels = Literal["none", "flash_mla", "deep_gemm", "all"]
KernelBackend = Literal["auto", "cpu", "triton", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of an engine; None means: derived from the model and the memory at hand when the engine is built."""

    dtype: DType = "auto"
    """Compute dtype; auto takes the checkpoint's `torch_dtype` (bfloat16 where it names neither)."""
    kv_cache_dtype: KVCacheDType = "auto"
    """auto: as the computation. fp8 keeps latents and index keys as e4m3 with a scale for every 128 numbers: about half
    of the memory of bfloat16 and other bits, which are again the same for every layout."""
    max_model_len: int | None = None
    """Longest prompt plus output; None: what the model was made for, or less if the cache cannot hold that."""
    max_num_seqs: int = 64
    """Sequences that one attention group runs at a time."""
    max_num_batched_tokens: int = 2048
    """Tokens that one attention group computes in a step."""
    max_chunk_size: int | None = None
    """Most tokens of one sequence in a step."""
    block_size: int = 64
    """Tokens per cache block."""
    num_kv_blocks: int | None = None
    """Cache blocks of one attention group."""
    kv_cache_memory_fraction: float = 0.5
    """Of the memory that is free once the weights are there, of the GPU or of the node's ranks together, what the cache
    may take when num_kv_blocks is not given; a step needs some as well."""
    enable_prefix_caching: bool = True
    kv_buffer_size: int = 1 << 30
    """Bytes of cache records that a rank holds for other replicas to read; a longer prompt still gets its turn."""
    seed: int = 0
    """With a request's index, the seed of requests that bring none."""
    kernel_backend: KernelBackend = "auto"
    """auto: cpu on a CPU, triton on a GPU."""
    vendor_kernels: VendorKernels = "none"
    """Libraries, to be installed, whose kernels run on a GPU in place of Triton's: FlashMLA for absorbed attention,
    DeepGEMM for experts with FP8 weights and for index scores over an FP8 cache. They need invariance relaxed."""
    all2all_backend: All2AllBackend = "default"
    """How tokens get to experts on other ranks: with NCCL (on a CPU, sockets), or on GPUs with DeepEP, if it is
    installed; the bits are the same."""
    enforce_eager: bool = False
    """On a GPU, start every kernel of a decode step by itself instead of all by a CUDA graph; the bits are the same."""
    invariance: Invariance = "strict"
    """strict refuses kernels whose results depend on the batch."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "kv_buffer_size"):
            _positive(name, getattr(self, name))
        for name in ("max_model_len", "max_chunk_size", "num_kv_blocks"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        fraction = self.kv_cache_memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(f"kv_cache_memory_fraction must be a number between 0 and 1, got {fraction!r}")
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8"))
        _one_of("kernel_backend", self.kernel_backend, get_args(KernelBackend))
        _one_of("vendor_kernels", self.vendor_kernels, get_args(VendorKernels))
        _one_of("all2all_backend", self.all2all_backend, get_args(All2AllBackend))
        _one_of("invariance", self.invariance, ("strict", "relaxed"))


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
