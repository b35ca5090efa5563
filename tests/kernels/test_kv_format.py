"""Cache entries and index keys in both formats: bytes built by hand, writes against single operations."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from shoal.kernels.backends import Backend
from shoal.kernels.kv_format import (
    FP8_CACHE,
    gather_index_keys,
    index_key_width,
    latent_width,
    read_index_keys,
    read_latents,
    scatter_index_keys,
)
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable, cos_sin_table, inv_freq
from tests.support.ops import CPU_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = [(512, 64, 128), (40, 8, 24), (200, 6, 130)]
"""Columns of latent, rope key and index key."""


class Written:
    """Five tokens written to slots of twelve, in company of bytes that nobody may touch; blocks hold three."""

    slots = torch.tensor([7, 0, 3, 11, 4])
    positions = torch.tensor([5, 0, 2, 30, 9])

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype, ops: Ops) -> None:
        self.ops = ops
        torch.manual_seed(sizes[0])
        self.latent, self.rope, self.dim = sizes
        self.dtype = dtype
        self.kv, self.k = torch.randn(5, self.latent + self.rope + 3).to(dtype), torch.randn(5, self.dim).to(dtype)
        self.norm, self.key_norm = torch.randn(self.latent), (torch.randn(self.dim), torch.randn(self.dim))
        self.table = cos_sin_table(inv_freq(self.rope, 10000.0), 31)
        width = latent_width(cache_dtype, self.latent, self.rope)
        self.kv_cache = torch.full((12, width + 5), 77).to(cache_dtype)[:, : width + 2]
        self.index_keys = torch.full((4, 3 * index_key_width(cache_dtype, self.dim)), 77).to(cache_dtype)

    def write(self) -> Tensor:
        """The entries."""
        kv = self.kv[:, : self.latent + self.rope]
        rope = RopeTable(self.table, self.positions, True)
        self.ops.write_latents(self.kv_cache, self.slots, kv, self.norm, 1e-6, rope)
        return self.kv_cache[self.slots]

    def write_keys(self) -> Tensor:
        """The pages of index keys."""
        self.ops.write_index_keys(
            self.index_keys,
            self.slots,
            self.k,
            self.key_norm,
            1e-6,
            RopeTable(self.table, self.positions, False),
        )
        return self.index_keys

    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, rope keys and index keys by the single operations."""
        latents = self.ops.rms_norm(self.kv[:, : self.latent], self.norm, 1e-6)
        rope = self.kv[:, None, self.latent : self.latent + self.rope]
        keys = self.ops.layer_norm(self.k, *self.key_norm, 1e-6)
        keys[:, : self.rope] = self.ops.apply_rope(
            keys[:, None, : self.rope], RopeTable(self.table, self.positions, False)
        )[:, 0]
        return latents, self.ops.apply_rope(rope, RopeTable(self.table, self.positions, True))[:, 0], keys


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_plain_entries_are_the_fields_side_by_side(
    backend: Backend, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    written = Written(sizes, dtype, dtype, Ops(backend))
    latents, rope, keys = written.fields()
    assert torch.equal(written.write()[:, :-2], torch.cat([latents, rope], dim=1))
    rows = written.write_keys().view(12, -1)
    assert torch.equal(rows[written.slots], keys)
    assert bool((written.kv_cache[:, -2:] == 77).all())
    for others in (written.kv_cache, rows):
        assert bool((others[[1, 2, 5, 6, 8, 9, 10]] == 77).all())


def _quantized_by_hand(row: list[float]) -> tuple[bytes, bytes]:
    """Codes and scales."""
    codes, scales = b"", b""
    for begin in range(0, len(row), 128):
        group = row[begin : begin + 128]
        scale = next(2.0**e for e in range(-22, 128) if 448 * 2.0**e >= max(map(abs, group)))
        codes += bytes(torch.tensor([x / scale for x in group]).to(torch.float8_e4m3fn).view(torch.uint8).tolist())
        scales += struct.pack("<f", scale)
    return codes, scales


def _entry_by_hand(latent: list[float], rope: list[float]) -> bytes:
    return b"".join([*_quantized_by_hand(latent), *(struct.pack("<f", x)[2:] for x in rope)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_entries_are_those_put_together_by_hand(
    backend: Backend, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    written = Written(sizes, dtype, FP8_CACHE, Ops(backend))
    kv_cache, (latents, rope, _) = written.write(), written.fields()
    for t in range(5):
        by_hand = _entry_by_hand(latents[t].tolist(), rope[t].bfloat16().tolist())
        assert bytes(kv_cache[t, :-2].tolist()) == by_hand
    assert bool((written.kv_cache[:, -2:] == 77).all())
    assert bool((written.kv_cache[[1, 2, 5, 6, 8, 9, 10]] == 77).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_pages_are_those_put_together_by_hand(
    backend: Backend, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    written = Written(sizes, dtype, FP8_CACHE, Ops(backend))
    pages, keys = written.write_keys(), written.fields()[2]
    dim, groups = sizes[2], -(-sizes[2] // 128)
    numbers = [[b"M" * dim] * 3 for _ in range(4)]  # 77
    scales = [[b"MMMM" * groups] * 3 for _ in range(4)]
    for slot, key in zip([7, 0, 3, 11, 4], keys.tolist(), strict=True):
        numbers[slot // 3][slot % 3], scales[slot // 3][slot % 3] = _quantized_by_hand(key)
    assert [bytes(page.tolist()) for page in pages] == [b"".join(numbers[b] + scales[b]) for b in range(4)]


def test_the_page_of_deepgemm_at_its_offsets() -> None:
    torch.manual_seed(0)
    k, slots = torch.randn(3, 128).bfloat16(), torch.tensor([2 * 64 + 63, 64, 5])
    weight, bias, table = torch.ones(128), torch.zeros(128), cos_sin_table(inv_freq(64, 10000.0), 8)
    pages = torch.zeros(3, 64 * 132, dtype=torch.uint8)
    positions = torch.zeros(3, dtype=torch.int64)  # nothing turns
    CPU_OPS.write_index_keys(pages, slots, k, (weight, bias), 1e-6, RopeTable(table, positions, False))
    codes, scales = CPU_OPS.quantize_rows_fp8(CPU_OPS.layer_norm(k, weight, bias, 1e-6))
    expected = torch.zeros(3, 8448, dtype=torch.uint8)
    for row, (page, offset) in enumerate([(2, 63), (1, 0), (0, 5)]):
        expected[page, 128 * offset : 128 * offset + 128] = codes[row].view(torch.uint8)
        expected[page, 8192 + 4 * offset : 8192 + 4 * offset + 4] = scales[row].view(torch.uint8)
    assert torch.equal(pages, expected)


def test_the_layout_of_flashmla_at_its_offsets() -> None:
    written = Written(SIZES[0], torch.bfloat16, FP8_CACHE, CPU_OPS)
    entry, (latents, rope, _) = written.write()[2], written.fields()
    assert entry.shape == (656 + 2,)
    q, scales = CPU_OPS.quantize_rows_fp8(latents)
    assert torch.equal(entry[:512], q[2].view(torch.uint8))
    assert torch.equal(entry[512:528].clone().view(torch.float32), scales[2])
    assert torch.equal(entry[528:656].clone().view(torch.bfloat16), rope[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_reading_gives_what_was_written_up_to_the_step(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    written = Written(sizes, dtype, FP8_CACHE, CPU_OPS)
    kv_cache, (latents, rope, keys) = written.write(), written.fields()
    read = read_latents(kv_cache, written.latent, written.rope, dtype)
    assert torch.equal(read[:, written.latent :], rope.bfloat16().to(dtype))
    read_keys = read_index_keys(written.write_keys(), written.slots, written.dim, dtype)
    for found, expected in ((read[:, : written.latent], latents), (read_keys, keys)):
        assert found.dtype == dtype
        error = (found.float() - expected.float()).abs()
        assert bool((error <= expected.float().abs() * 2**-4 + 2**-10).all())
        assert float(error.max()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8_CACHE])
def test_slots_and_positions_are_checked(backend: Backend, cache_dtype: torch.dtype) -> None:
    for name, bad in (("slots", 12), ("slots", -1), ("positions", 31)):
        written = Written(SIZES[1], torch.float32, cache_dtype, Ops(backend))
        setattr(written, name, getattr(written, name).clone().fill_(bad))
        with pytest.raises(ValueError, match=r"outside the (cache|rotary table)"):
            written.write()
        with pytest.raises(ValueError, match=r"outside the (cache|rotary table)"):
            written.write_keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8_CACHE])
def test_rows_of_index_keys_go_from_pages_to_pages(dtype: torch.dtype) -> None:
    width = index_key_width(dtype, 130)
    rows = torch.randint(0, 100, (6, width)).to(dtype)  # 2 pages of 3
    split = [rows[:3, :130], rows[:3, 130:], rows[3:, :130], rows[3:, 130:]]
    pages = torch.cat([part.flatten() for part in split]).view(2, 3 * width)
    assert torch.equal(gather_index_keys(pages, torch.tensor([5, 0, 3]), 130), rows[[5, 0, 3]])
    target = torch.full((3, 2 * width), 77).to(dtype)
    scatter_index_keys(target, torch.tensor([4, 1]), rows[[2, 5]], 130)
    assert torch.equal(gather_index_keys(target, torch.tensor([1, 4]), 130), rows[[5, 2]])
    assert int((target != 77).sum()) == int((rows[[2, 5]] != 77).sum())


def test_refuses_what_does_not_fit() -> None:
    written = Written(SIZES[1], torch.float32, FP8_CACHE, CPU_OPS)
    written.kv_cache = written.kv_cache[:, :59]
    with pytest.raises(
        ValueError, match=r"write_latents needs kv_cache \[num_slots, >= 60\] in torch.float32 or in torch"
    ):
        written.write()
    written.kv_cache = torch.zeros(12, 60)
    written.kv = written.kv.bfloat16()
    with pytest.raises(ValueError, match=r"write_latents needs kv_cache .* in torch.bfloat16 or in torch.uint8, got"):
        written.write()
    written.kv = written.kv[:, :47]
    with pytest.raises(ValueError, match=r"write_latents needs rows \[T, 48\]"):
        written.write()


def test_pages_that_do_not_fit_are_refused() -> None:
    written = Written(SIZES[1], torch.float32, FP8_CACHE, CPU_OPS)
    assert written.index_keys.shape == (4, 3 * 28)
    for pages in (
        written.index_keys[:, :-1].contiguous(),
        written.index_keys[:, :28],  # not contiguous
        written.index_keys[:, :0],
        written.index_keys.flatten(),
        torch.zeros(4, 3 * 24, dtype=torch.bfloat16),
    ):
        written.index_keys = pages
        expected = (
            r"needs contiguous index keys \[num_blocks, block_size \* 2\d\] in torch.float32 or in torch.uint8, got"
        )
        with pytest.raises(ValueError, match=f"write_index_keys {expected}"):
            written.write_keys()
        with pytest.raises(ValueError, match=f"read_index_keys {expected}"):
            read_index_keys(pages, written.slots, 24, torch.float32)
    written.k = written.k[:, :23]
    with pytest.raises(ValueError, match=r"write_index_keys needs rows \[T, 24\]"):
        written.write_keys()
