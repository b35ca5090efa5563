"""What a token leaves in the cache, written to its record in one pass: norm, rotation, store.

T tokens; Dl latent and Dr rotary columns, index keys of D columns.
"""

from __future__ import annotations

from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .build import c_function, num_threads
from .linear import DTYPE_CODES
from .norm import layer_norm, rms_norm
from .registry import implementation, register
from .rope import apply_rope

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
    c_void_p,
    *[c_int64] * 2,
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
    c_void_p,
    *[c_int64] * 3,
    c_void_p,
    c_int64,
    POINTER(c_int64),
)


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
    """records[slots[t]] = [rms_norm(latent) | apply_rope(rope key) | as before], where kv[t] = [latent | rope key].

    records: [num_slots, >= Dl + Dr] in kv's dtype; slots and positions: [T] int64; kv: [T, Dl + Dr]; norm: [Dl] fp32;
    rope_table: [P, Dr] of `cos_sin_table`. Slots are written once. The bits are those of `rms_norm` and `apply_rope`.
    ValueError for a slot outside the records or a position outside the table.
    """
    width = norm.shape[0] + rope_table.shape[1]
    _check("write_latents", records, slots, kv, positions, width, 0)
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
    """Columns [key_offset, key_offset + D) of records[slots[t]] = layer_norm(k[t]), its first Dr columns then rotated.

    k: [T, D]; norm: weight and bias, each [D] fp32; the others as in `write_latents`.
    """
    _check("write_index_keys", records, slots, k, positions, k.shape[1], key_offset)
    implementation("write_index_keys")(records, slots, k, key_offset, norm, eps, rope_table, positions, interleaved)


def _check(op: str, records: Tensor, slots: Tensor, rows: Tensor, positions: Tensor, width: int, offset: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != width or records.dim() != 2 or records.shape[1] < offset + width:
        raise ValueError(
            f"{op} needs rows [T, {width}] and records [num_slots, >= {offset + width}], got {list(rows.shape)} and "
            f"{list(records.shape)}"
        )
    if rows.dtype != records.dtype or rows.dtype not in DTYPE_CODES:
        raise ValueError(f"{op} needs rows and records in float32 or in bfloat16, got {rows.dtype}, {records.dtype}")
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
        records.data_ptr(),
        records.stride(0),
        records.shape[0],
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
        records.data_ptr(),
        key_offset,
        records.stride(0),
        records.shape[0],
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
    _store("write_latents", records, slots, torch.cat([latent, k_rope], dim=1), 0)


@register("write_index_keys", "reference")
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
    _store("write_index_keys", records, slots, torch.cat([rotated, normed[:, rope_dim:]], dim=1), key_offset)


def _store(op: str, records: Tensor, slots: Tensor, rows: Tensor, offset: int) -> None:
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < records.shape[0]:
        raise _outside(op)
    records[slots, offset : offset + rows.shape[1]] = rows
