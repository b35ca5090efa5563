"""Records in both formats: bytes against records put together by hand, writes against the single operations."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from shoal.kernels.fp8_rows import quantize_rows_fp8
from shoal.kernels.norm import layer_norm, rms_norm
from shoal.kernels.records import (
    FP8_RECORDS,
    index_key_width,
    latent_width,
    read_index_keys,
    read_latents,
    write_index_keys,
    write_latents,
)
from shoal.kernels.registry import Backend, use_backend
from shoal.kernels.rope import apply_rope, cos_sin_table, inv_freq

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = [(512, 64, 128), (40, 8, 24), (200, 6, 130)]
"""Columns of latent, rope key and index key."""


class Written:
    """Five tokens written to slots of twelve, in company of bytes that nobody may touch."""

    slots = torch.tensor([7, 0, 3, 11, 4])
    positions = torch.tensor([5, 0, 2, 30, 9])

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype, records_dtype: torch.dtype) -> None:
        torch.manual_seed(sizes[0])
        self.latent, self.rope, self.dim = sizes
        self.dtype = dtype
        self.kv, self.k = torch.randn(5, self.latent + self.rope + 3).to(dtype), torch.randn(5, self.dim).to(dtype)
        self.norm, self.key_norm = torch.randn(self.latent), (torch.randn(self.dim), torch.randn(self.dim))
        self.table = cos_sin_table(inv_freq(self.rope, 10000.0), 31)
        self.key_offset = latent_width(records_dtype, self.latent, self.rope)
        width = self.key_offset + index_key_width(records_dtype, self.dim)
        self.records = torch.full((12, width + 5), 77).to(records_dtype)[:, : width + 2]

    def write(self) -> Tensor:
        kv = self.kv[:, : self.latent + self.rope]
        write_latents(self.records, self.slots, kv, self.norm, 1e-6, self.table, self.positions, interleaved=True)
        write_index_keys(
            self.records,
            self.slots,
            self.k,
            self.key_offset,
            self.key_norm,
            1e-6,
            self.table,
            self.positions,
            interleaved=False,
        )
        return self.records[self.slots]

    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, rope keys and index keys by the single operations."""
        latents = rms_norm(self.kv[:, : self.latent], self.norm, 1e-6)
        rope = self.kv[:, None, self.latent : self.latent + self.rope]
        keys = layer_norm(self.k, *self.key_norm, 1e-6)
        keys[:, : self.rope] = apply_rope(keys[:, None, : self.rope], self.table, self.positions, interleaved=False)[
            :, 0
        ]
        return latents, apply_rope(rope, self.table, self.positions, interleaved=True)[:, 0], keys


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_plain_records_are_the_fields_side_by_side(
    backend: Backend, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    with use_backend(backend):
        written = Written(sizes, dtype, dtype)
        assert torch.equal(written.write()[:, :-2], torch.cat(written.fields(), dim=1))
    assert bool((written.records[:, -2:] == 77).all())
    assert bool((written.records[[1, 2, 5, 6, 8, 9, 10]] == 77).all())


def _bytes_by_hand(latent: list[float], rope: list[float], key: list[float]) -> bytes:
    """Numbers that FP8, with the scales that they need, holds exactly."""

    def quantized(row: list[float]) -> bytes:
        codes, scales = b"", b""
        for begin in range(0, len(row), 128):
            group = row[begin : begin + 128]
            scale = next(2.0**e for e in range(-22, 128) if 448 * 2.0**e >= max(map(abs, group)))
            codes += bytes(torch.tensor([x / scale for x in group]).to(torch.float8_e4m3fn).view(torch.uint8).tolist())
            scales += struct.pack("<f", scale)
        return codes + scales

    brain = b"".join(struct.pack("<f", x)[2:] for x in rope)
    return quantized(latent) + brain + quantized(key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_records_are_those_put_together_by_hand(
    backend: Backend, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    with use_backend(backend):
        written = Written(sizes, dtype, FP8_RECORDS)
        records, (latents, rope, keys) = written.write(), written.fields()
    for t in range(5):
        by_hand = _bytes_by_hand(latents[t].tolist(), rope[t].bfloat16().tolist(), keys[t].tolist())
        assert bytes(records[t, :-2].tolist()) == by_hand
    assert bool((written.records[:, -2:] == 77).all())
    assert bool((written.records[[1, 2, 5, 6, 8, 9, 10]] == 77).all())


def test_the_layout_of_flashmla_at_its_offsets() -> None:
    written = Written(SIZES[0], torch.bfloat16, FP8_RECORDS)
    record, (latents, rope, keys) = written.write()[2], written.fields()
    assert written.key_offset == 656
    assert record.shape == (656 + 132 + 2,)
    q, scales = quantize_rows_fp8(latents)
    assert torch.equal(record[:512], q[2].view(torch.uint8))
    assert torch.equal(record[512:528].clone().view(torch.float32), scales[2])
    assert torch.equal(record[528:656].clone().view(torch.bfloat16), rope[2])
    q, scales = quantize_rows_fp8(keys)
    assert torch.equal(record[656:784], q[2].view(torch.uint8))
    assert torch.equal(record[784:788].clone().view(torch.float32), scales[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_reading_gives_what_was_written_up_to_the_step(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    written = Written(sizes, dtype, FP8_RECORDS)
    records, (latents, rope, keys) = written.write(), written.fields()
    read = read_latents(records, written.latent, written.rope, dtype)
    assert torch.equal(read[:, written.latent :], rope.bfloat16().to(dtype))
    read_keys = read_index_keys(records, written.key_offset, written.dim, dtype)
    for found, expected in ((read[:, : written.latent], latents), (read_keys, keys)):
        assert found.dtype == dtype
        error = (found.float() - expected.float()).abs()
        assert bool((error <= expected.float().abs() * 2**-4 + 2**-10).all())
        assert float(error.max()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("records_dtype", [torch.float32, FP8_RECORDS])
def test_slots_and_positions_are_checked(backend: Backend, records_dtype: torch.dtype) -> None:
    with use_backend(backend):
        for name, bad in (("slots", 12), ("slots", -1), ("positions", 31)):
            written = Written(SIZES[1], torch.float32, records_dtype)
            setattr(written, name, getattr(written, name).clone().fill_(bad))
            with pytest.raises(ValueError, match="outside the r"):
                written.write()


def test_refuses_what_does_not_fit() -> None:
    written = Written(SIZES[1], torch.float32, FP8_RECORDS)
    written.records = written.records[:, : written.key_offset - 1]
    with pytest.raises(ValueError, match=r"write_latents needs rows \[T, 48\] and records \[num_slots, >= 60\]"):
        written.write()
    written.records = torch.zeros(12, written.key_offset)
    written.kv = written.kv.bfloat16()
    with pytest.raises(ValueError, match="in the same or in"):
        written.write()
