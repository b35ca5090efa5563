"""Records: what a token leaves in the cache of a layer, in two formats, written in one pass of norm, rotation, store.

T tokens; Dl latent and Dr rotary columns, index keys of D columns. Records are rows [num_slots, W] of

the computing dtype   latent (Dl) | rope key (Dr) | index key (D)
bytes, in FP8         Dl e4m3 | ceil(Dl / 128) fp32 scales | Dr bf16 rope key | D e4m3 | ceil(D / 128) fp32 scales

where the index key is missing if the layer has no indexer, and W may be larger. For Dl = 512 and Dr = 64 the FP8 record
begins with the 656 bytes per token that FlashMLA reads. Its index key (132 bytes for D = 128) follows there, because a
token has one record; DeepGEMM reads the same bytes from planar pages, 64 tokens' e4m3 and then their 64 scales.

Who reads an FP8 record gets `dequantize_rows_fp8` and the rope key in the computing dtype, and goes on as with records
in that dtype.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .build import c_function, num_threads
from .fp8_rows import dequantize_rows_fp8, fp8_row_bytes, quantize_rows_fp8
from .linear import DTYPE_CODES
from .norm import layer_norm, rms_norm
from .registry import implementation, register
from .rope import apply_rope

FP8_RECORDS = torch.uint8
"""The dtype of records in FP8."""


class Records(ctypes.Structure):
    """shoal::Records of the compiled kernels."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("num_slots", c_int64), ("fp8", c_int64))


_WRITE_LATENTS = (
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
    POINTER(Records),
    c_void_p,
    c_int64,
    POINTER(c_int64),
)
_WRITE_INDEX_KEYS = (
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
    POINTER(Records),
    c_int64,
    c_void_p,
    c_int64,
    POINTER(c_int64),
)


def records_args(records: Tensor) -> Records:
    """For the compiled kernels; its pointer lives as long as the tensor."""
    size = records.element_size()
    return Records(records.data_ptr(), records.stride(0) * size, records.shape[0], records.dtype == FP8_RECORDS)


def latent_width(dtype: torch.dtype, latent_dim: int, rope_dim: int) -> int:
    """Columns of latent and rope key in records of a dtype."""
    return fp8_row_bytes(latent_dim) + 2 * rope_dim if dtype == FP8_RECORDS else latent_dim + rope_dim


def index_key_width(dtype: torch.dtype, dim: int) -> int:
    """Columns of an index key in records of a dtype."""
    return fp8_row_bytes(dim) if dtype == FP8_RECORDS else dim


def read_latents(records: Tensor, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """[latent | rope key] of records [n, >= W] as `dtype` [n, Dl + Dr]; records of another dtype than FP8 have it."""
    if records.dtype != FP8_RECORDS:
        assert records.dtype == dtype
        return records[:, : latent_dim + rope_dim]
    width = fp8_row_bytes(latent_dim)
    rope = _aligned(records[:, width : width + 2 * rope_dim]).view(torch.bfloat16)
    return torch.cat([_read_quantized(records[:, :width], latent_dim, dtype), rope.to(dtype)], dim=1)


def read_index_keys(records: Tensor, key_offset: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The index keys, which begin in column `key_offset`, of records [n, W] as `dtype` [n, D]."""
    keys = records[:, key_offset : key_offset + index_key_width(records.dtype, dim)]
    return _read_quantized(keys, dim, dtype) if records.dtype == FP8_RECORDS else keys


def _read_quantized(rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """rows: [n, fp8_row_bytes(columns)] uint8."""
    scales = _aligned(rows[:, columns:]).view(torch.float32)
    return dequantize_rows_fp8(rows[:, :columns].view(torch.float8_e4m3fn), scales, dtype)


def _aligned(rows: Tensor) -> Tensor:
    """A copy that can be viewed as rows of wider elements."""
    return rows.clone(memory_format=torch.contiguous_format)


def write_latents(
    records: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    *,
    interleaved: bool,
) -> None:
    """records[slots[t]] = rms_norm(latent) | apply_rope(rope key) | as before, where kv[t] = [latent | rope key].

    records: in kv's dtype or in FP8; slots and positions: [T] int64; kv: [T, Dl + Dr]; norm: [Dl] fp32;
    rope_table: [P, Dr] of `cos_sin_table`. Slots are written once. The bits are those of `rms_norm`, `apply_rope` and
    `quantize_rows_fp8`. ValueError for a slot outside the records or a position outside the table.
    """
    latent_dim, rope_dim = norm.shape[0], rope_table.shape[1]
    width = latent_width(records.dtype, latent_dim, rope_dim)
    _check("write_latents", records, slots, kv, positions, latent_dim + rope_dim, width)
    implementation("write_latents")(records, slots, kv, norm, eps, rope_table, positions, interleaved)


def write_index_keys(
    records: Tensor,
    slots: Tensor,
    k: Tensor,
    key_offset: int,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    *,
    interleaved: bool,
) -> None:
    """Index key of records[slots[t]], from column `key_offset` on, = layer_norm(k[t]), first Dr columns then rotated.

    k: [T, D]; norm: weight and bias, each [D] fp32; the others as in `write_latents`.
    """
    width = index_key_width(records.dtype, k.shape[-1])
    _check("write_index_keys", records, slots, k, positions, norm[0].shape[0], key_offset + width)
    implementation("write_index_keys")(records, slots, k, key_offset, norm, eps, rope_table, positions, interleaved)


def _check(op: str, records: Tensor, slots: Tensor, rows: Tensor, positions: Tensor, columns: int, width: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != columns or records.dim() != 2 or records.shape[1] < width:
        raise ValueError(
            f"{op} needs rows [T, {columns}] and records [num_slots, >= {width}], got {list(rows.shape)} and "
            f"{list(records.shape)}"
        )
    if rows.dtype not in DTYPE_CODES or records.dtype not in (rows.dtype, FP8_RECORDS):
        raise ValueError(
            f"{op} needs rows in float32 or in bfloat16 and records in the same or in {FP8_RECORDS}, got {rows.dtype}, "
            f"{records.dtype}"
        )
    for name, tensor in (("slots", slots), ("positions", positions)):
        if tensor.shape != rows.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(f"{op}: {name} must be [{rows.shape[0]}] int64, got {list(tensor.shape)} {tensor.dtype}")


def _outside(op: str) -> ValueError:
    return ValueError(f"{op}: a slot is outside the records or a position outside the rotary table")


@register("write_latents", "cpu")
def _write_latents_cpu(
    records: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> None:
    assert records.stride(1) == 1
    assert kv.stride(1) == 1
    status = c_int64()
    c_function(*_WRITE_LATENTS)(
        DTYPE_CODES[kv.dtype],
        kv.data_ptr(),
        kv.stride(0),
        kv.shape[0],
        norm.shape[0],
        rope_table.shape[1],
        norm.data_ptr(),
        eps,
        rope_table.data_ptr(),
        rope_table.shape[0],
        positions.data_ptr(),
        int(interleaved),
        byref(records_args(records)),
        slots.data_ptr(),
        num_threads(kv.numel()),
        byref(status),
    )
    if status.value:
        raise _outside("write_latents")


@register("write_index_keys", "cpu")
def _write_index_keys_cpu(
    records: Tensor,
    slots: Tensor,
    k: Tensor,
    key_offset: int,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> None:
    assert records.stride(1) == 1
    assert k.stride(1) == 1
    status = c_int64()
    c_function(*_WRITE_INDEX_KEYS)(
        DTYPE_CODES[k.dtype],
        k.data_ptr(),
        k.stride(0),
        *k.shape,
        rope_table.shape[1],
        norm[0].data_ptr(),
        norm[1].data_ptr(),
        eps,
        rope_table.data_ptr(),
        rope_table.shape[0],
        positions.data_ptr(),
        int(interleaved),
        byref(records_args(records)),
        key_offset * records.element_size(),
        slots.data_ptr(),
        num_threads(k.numel()),
        byref(status),
    )
    if status.value:
        raise _outside("write_index_keys")


@register("write_latents", "reference")
def _write_latents_reference(
    records: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> None:
    latent_dim = norm.shape[0]
    latent = rms_norm(kv[:, :latent_dim], norm, eps)
    k_rope = apply_rope(kv[:, None, latent_dim:], rope_table, positions, interleaved=interleaved).squeeze(1)
    if records.dtype == FP8_RECORDS:
        fields = [_quantized_bytes(latent), k_rope.bfloat16().contiguous().view(FP8_RECORDS)]
    else:
        fields = [latent, k_rope]
    _store("write_latents", records, slots, torch.cat(fields, dim=1), 0)


@register("write_index_keys", "reference")
@register("write_index_keys", "triton")
def _write_index_keys_reference(
    records: Tensor,
    slots: Tensor,
    k: Tensor,
    key_offset: int,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> None:
    normed, rope_dim = layer_norm(k, *norm, eps), rope_table.shape[1]
    rotated = apply_rope(normed[:, None, :rope_dim], rope_table, positions, interleaved=interleaved).squeeze(1)
    key = torch.cat([rotated, normed[:, rope_dim:]], dim=1)
    if records.dtype == FP8_RECORDS:
        key = _quantized_bytes(key)
    _store("write_index_keys", records, slots, key, key_offset)


def _quantized_bytes(x: Tensor) -> Tensor:
    """[n, D] -> [n, fp8_row_bytes(D)] uint8."""
    return torch.cat([part.view(FP8_RECORDS) for part in quantize_rows_fp8(x)], dim=1)


def _store(op: str, records: Tensor, slots: Tensor, rows: Tensor, offset: int) -> None:
    if slots.is_cpu and slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < records.shape[0]:
        raise _outside(op)  # nobody waits for a device to look
    records[slots, offset : offset + rows.shape[1]] = rows
