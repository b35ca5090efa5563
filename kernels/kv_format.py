"""Formats of the KV cache of a layer: latents with rope keys, and indexer keys, each in the compute dtype or in FP8.

T tokens; Dl latent and Dr rotary columns, index keys of D columns. `kv_cache` has one entry per slot, a row of
[num_slots, W]:

compute dtype   latent (Dl) | rope key (Dr)
FP8, in bytes   Dl e4m3 | ceil(Dl / 128) fp32 scales | Dr bf16 rope key

W may be larger than an entry. Index keys of a layer with an indexer are in pages [num_blocks, block_size * width], one
per cache block; the key of slot s is number s % block_size of page s // block_size:

compute dtype   block_size x D
FP8, in bytes   block_size x D e4m3 | block_size x ceil(D / 128) fp32 scales

With Dl = 512 and Dr = 64 an FP8 entry has the 656 bytes per token that FlashMLA reads. With D = 128 and 64 keys an FP8
page is what DeepGEMM's paged index logits read: codes in bytes [0, 8192), scales in [8192, 8448).

Readers of FP8 apply `dequantize_rows_fp8`, widen the rope key to the compute dtype, and then compute as in that dtype.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .norm import layer_norm_reference, rms_norm_reference
from .quant import dequantize_rows_reference, fp8_row_bytes, quantize_rows_reference
from .registry import Kernel, register
from .rope import RopeTable, apply_rope_reference

FP8_CACHE = torch.uint8
"""Dtype of cache tensors in FP8."""


class KVCacheArgs(ctypes.Structure):
    """shoal::KVCacheArgs of the compiled kernels."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("num_slots", c_int64), ("fp8", c_int64))


class IndexKeys(ctypes.Structure):
    """shoal::IndexKeys of the compiled kernels."""

    _fields_ = (
        ("pages", c_void_p),
        *((name, c_int64) for name in ("num_blocks", "block_size", "data_bytes", "scale_bytes")),
    )


shoal_write_latents = CFunction(
    "shoal_write_latents",
    c_int64,
    c_void_p,
    *[c_int64] * 4,
    c_void_p,
    c_float,
    c_void_p,
    c_int64,
    c_void_p,
    c_int64,
    POINTER(KVCacheArgs),
    c_void_p,
    c_int64,
    POINTER(c_int64),
)
shoal_write_index_keys = CFunction(
    "shoal_write_index_keys",
    c_int64,
    c_void_p,
    *[c_int64] * 4,
    *[c_void_p] * 2,
    c_float,
    c_void_p,
    c_int64,
    c_void_p,
    c_int64,
    POINTER(IndexKeys),
    c_void_p,
    c_int64,
    POINTER(c_int64),
)


def kv_cache_args(kv_cache: Tensor) -> KVCacheArgs:
    """Argument of the compiled kernels; the tensor must outlive it."""
    size = kv_cache.element_size()
    return KVCacheArgs(kv_cache.data_ptr(), kv_cache.stride(0) * size, kv_cache.shape[0], kv_cache.dtype == FP8_CACHE)


def index_keys_args(keys: Tensor, dim: int) -> IndexKeys:
    """Argument of the compiled kernels; the tensor must outlive it."""
    size, width = keys.element_size(), index_key_width(keys.dtype, dim)
    return IndexKeys(keys.data_ptr(), keys.shape[0], keys.shape[1] // width, dim * size, (width - dim) * size)


def latent_width(dtype: torch.dtype, latent_dim: int, rope_dim: int) -> int:
    """Columns of an entry in a cache of this dtype."""
    return fp8_row_bytes(latent_dim) + 2 * rope_dim if dtype == FP8_CACHE else latent_dim + rope_dim


def index_key_width(dtype: torch.dtype, dim: int) -> int:
    """Columns of an index key in pages of this dtype."""
    return fp8_row_bytes(dim) if dtype == FP8_CACHE else dim


def read_latents(kv_cache: Tensor, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """kv_cache [n, >= W], in FP8 or in `dtype` -> [latent | rope key] in `dtype` [n, Dl + Dr]."""
    if kv_cache.dtype != FP8_CACHE:
        assert kv_cache.dtype == dtype
        return kv_cache[:, : latent_dim + rope_dim]
    width = fp8_row_bytes(latent_dim)
    rope = _aligned(kv_cache[:, width : width + 2 * rope_dim]).view(torch.bfloat16)
    return torch.cat([_read_quantized(kv_cache[:, :width], latent_dim, dtype), rope.to(dtype)], dim=1)


def read_index_keys(keys: Tensor, slots: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Index keys of slots [n] int64 -> [n, D] in `dtype`; keys: pages in `dtype` or in FP8. ValueError for others."""
    index_page_size("read_index_keys", keys, dim, dtype)
    rows = gather_index_keys(keys, slots, dim)
    return _read_quantized(rows, dim, dtype) if keys.dtype == FP8_CACHE else rows


def gather_index_keys(keys: Tensor, slots: Tensor, dim: int) -> Tensor:
    """Stored index keys of slots [n] -> [n, width] in the pages' dtype: D values, in FP8 followed by the scales."""
    numbers, scales = _numbers_and_scales(keys, dim)
    place = (slots // numbers.shape[1], slots % numbers.shape[1])
    return torch.cat([numbers[place], scales[place]], dim=1)


def scatter_index_keys(keys: Tensor, slots: Tensor, rows: Tensor, dim: int) -> None:
    """Inverse of `gather_index_keys`."""
    numbers, scales = _numbers_and_scales(keys, dim)
    place = (slots // numbers.shape[1], slots % numbers.shape[1])
    numbers[place], scales[place] = rows[:, :dim], rows[:, dim:]


def _numbers_and_scales(keys: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Views of pages: [num_blocks, block_size, D], and [num_blocks, block_size, width - D] with columns in FP8 only."""
    width = index_key_width(keys.dtype, dim)
    block_size = keys.shape[1] // width
    numbers, scales = keys[:, : block_size * dim], keys[:, block_size * dim :]
    return numbers.view(len(keys), block_size, dim), scales.view(len(keys), block_size, width - dim)


def index_page_size(op: str, keys: Tensor, dim: int, dtype: torch.dtype) -> int:
    """Number of index keys in a page; ValueError, in the name of `op`, unless keys are pages in `dtype` or in FP8."""
    width = index_key_width(keys.dtype, dim)
    fits = keys.dim() == 2 and 0 < width <= keys.shape[1] and keys.shape[1] % width == 0 and keys.is_contiguous()
    if not fits or keys.dtype not in (dtype, FP8_CACHE):
        raise ValueError(
            f"{op} needs contiguous index keys [num_blocks, block_size * {width}] in {dtype} or in {FP8_CACHE}, got "
            f"{list(keys.shape)} in {keys.dtype}"
        )
    return keys.shape[1] // width


def _read_quantized(rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """rows: [n, fp8_row_bytes(columns)] uint8."""
    scales = _aligned(rows[:, columns:]).view(torch.float32)
    return dequantize_rows_reference(rows[:, :columns].view(torch.float8_e4m3fn), scales, dtype)


def _aligned(rows: Tensor) -> Tensor:
    """A copy that can be viewed as rows of wider elements."""
    return rows.clone(memory_format=torch.contiguous_format)


def write_latents(
    kernel: Kernel,
    kv_cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope: RopeTable,
) -> None:
    """kv_cache[slots[t]] = rms_norm(latent) | apply_rope(rope key) | as before, where kv[t] = [latent | rope key].

    kv_cache: in kv's dtype or in FP8; slots: [T] int64; kv: [T, Dl + Dr]; norm: [Dl] fp32; rope: of Dr columns.
    Slots are distinct. The bits are those of `rms_norm`, `apply_rope` and `quantize_rows_fp8`. ValueError for a slot
    outside the cache or a position outside the table.
    """
    latent_dim = norm.shape[0]
    width = latent_width(kv_cache.dtype, latent_dim, rope.dim)
    _check_rows("write_latents", kv, latent_dim + rope.dim, slots, rope)
    if kv_cache.dim() != 2 or kv_cache.shape[1] < width or kv_cache.dtype not in (kv.dtype, FP8_CACHE):
        raise ValueError(
            f"write_latents needs kv_cache [num_slots, >= {width}] in {kv.dtype} or in {FP8_CACHE}, got "
            f"{list(kv_cache.shape)} in {kv_cache.dtype}"
        )
    kernel.run(kv_cache, slots, kv, norm, eps, rope)


def write_index_keys(
    kernel: Kernel,
    keys: Tensor,
    slots: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeTable,
) -> None:
    """Index key of slots[t] = layer_norm(k[t]), then `apply_rope` of its first Dr columns.

    keys: pages [num_blocks, block_size * width] in k's dtype or in FP8, contiguous; k: [T, D]; norm: weight and bias,
    each [D] fp32; the others as in `write_latents`. ValueError for a slot outside the pages or a position outside the
    table.
    """
    _check_rows("write_index_keys", k, norm[0].shape[0], slots, rope)
    index_page_size("write_index_keys", keys, k.shape[1], k.dtype)
    kernel.run(keys, slots, k, norm, eps, rope)


def _check_rows(op: str, rows: Tensor, columns: int, slots: Tensor, rope: RopeTable) -> None:
    if rows.dim() != 2 or rows.shape[1] != columns or rows.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{op} needs rows [T, {columns}] in float32 or in bfloat16, got {list(rows.shape)} in {rows.dtype}"
        )
    for name, tensor in (("slots", slots), ("positions", rope.positions)):
        if tensor.shape != rows.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(f"{op}: {name} must be [{rows.shape[0]}] int64, got {list(tensor.shape)} {tensor.dtype}")


def _outside(op: str) -> ValueError:
    return ValueError(f"{op}: a slot is outside the cache or a position outside the rotary table")


@register("write_latents", "cpu")
def _write_latents_cpu(
    kv_cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope: RopeTable,
) -> None:
    assert kv_cache.stride(1) == 1
    assert kv.stride(1) == 1
    status = c_int64()
    shoal_write_latents(
        DTYPE_CODES[kv.dtype],
        kv.data_ptr(),
        kv.stride(0),
        kv.shape[0],
        norm.shape[0],
        rope.dim,
        norm.data_ptr(),
        eps,
        rope.table.data_ptr(),
        rope.table.shape[0],
        rope.positions.data_ptr(),
        int(rope.interleaved),
        byref(kv_cache_args(kv_cache)),
        slots.data_ptr(),
        num_threads(kv.numel()),
        byref(status),
    )
    if status.value:
        raise _outside("write_latents")


@register("write_index_keys", "cpu")
def _write_index_keys_cpu(
    keys: Tensor,
    slots: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeTable,
) -> None:
    assert k.stride(1) == 1
    status = c_int64()
    shoal_write_index_keys(
        DTYPE_CODES[k.dtype],
        k.data_ptr(),
        k.stride(0),
        *k.shape,
        rope.dim,
        norm[0].data_ptr(),
        norm[1].data_ptr(),
        eps,
        rope.table.data_ptr(),
        rope.table.shape[0],
        rope.positions.data_ptr(),
        int(rope.interleaved),
        byref(index_keys_args(keys, k.shape[1])),
        slots.data_ptr(),
        num_threads(k.numel()),
        byref(status),
    )
    if status.value:
        raise _outside("write_index_keys")


@register("write_latents", "reference")
def _write_latents_reference(
    kv_cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope: RopeTable,
) -> None:
    latent_dim = norm.shape[0]
    latent = rms_norm_reference(kv[:, :latent_dim], norm, eps)
    k_rope = apply_rope_reference(kv[:, None, latent_dim:], rope).squeeze(1)
    if kv_cache.dtype == FP8_CACHE:
        fields = [_quantized_bytes(latent), k_rope.bfloat16().contiguous().view(FP8_CACHE)]
    else:
        fields = [latent, k_rope]
    rows = torch.cat(fields, dim=1)
    _check_slots("write_latents", slots, kv_cache.shape[0])
    kv_cache[slots, : rows.shape[1]] = rows


@register("write_index_keys", "reference")
def _write_index_keys_reference(
    keys: Tensor,
    slots: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeTable,
) -> None:
    normed = layer_norm_reference(k, *norm, eps)
    rotated = apply_rope_reference(normed[:, None, : rope.dim], rope).squeeze(1)
    rows, dim = torch.cat([rotated, normed[:, rope.dim :]], dim=1), k.shape[1]
    if keys.dtype == FP8_CACHE:
        rows = _quantized_bytes(rows)
    _check_slots("write_index_keys", slots, keys.numel() // rows.shape[1])
    scatter_index_keys(keys, slots, rows, dim)


def _quantized_bytes(x: Tensor) -> Tensor:
    """[n, D] -> [n, fp8_row_bytes(D)] uint8."""
    return torch.cat([part.view(FP8_CACHE) for part in quantize_rows_reference(x)], dim=1)


def _check_slots(op: str, slots: Tensor, num_slots: int) -> None:
    if slots.is_cpu and slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise _outside(op)  # on a GPU the check would synchronise
