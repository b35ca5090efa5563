"""FP8 weights and rows: values by hand, torch's conversions as the oracle for every number, rows on their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.kernels.backends import Backend
from shoal.kernels.ops import Ops
from shoal.kernels.quant import BlockFP8Weight, fp8_row_bytes, quantize_block_fp8
from tests.support.ops import CPU_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)


def fp8_weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.01
    return w, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (576, 200), (1, 1), (130, 257)])
def test_dequantize_multiplies_by_the_scale_of_the_block(dtype: torch.dtype, rows: int, columns: int) -> None:
    w, scales = fp8_weight(rows, columns)
    out = BlockFP8Weight.of_rows(w, scales).dequantize(dtype)
    values = w.float()
    for n, k in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2), (rows - 1, 0), (0, columns - 1)]:
        assert out[n, k] == (values[n, k] * scales[n // 128, k // 128]).to(dtype)
    whole = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    assert torch.equal(out, (values * whole).to(dtype))


@pytest.mark.parametrize("offset", [0, 1, 100, 127, 128, 300])
def test_a_slice_of_rows_equals_the_rows_of_the_whole(offset: int) -> None:
    w, scales = fp8_weight(576, 150)
    whole = BlockFP8Weight.of_rows(w, scales).dequantize(torch.bfloat16)
    for rows in (0, 1, 30, 200):
        part = BlockFP8Weight.of_rows(w[offset : offset + rows], scales, row_offset=offset).dequantize(torch.bfloat16)
        assert torch.equal(part, whole[offset : offset + rows])


def test_every_fp8_value_is_exact() -> None:
    w = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    out = BlockFP8Weight.of_rows(w, torch.ones(1, 1)).dequantize(torch.bfloat16)
    assert torch.equal(out.float().nan_to_num(-1), w.float().nan_to_num(-1))
    assert int(out.isnan().sum()) == 2


def test_quantize_by_hand() -> None:
    w = torch.zeros(129, 256)
    w[0, 0], w[1, 1] = 896.0, -448.0  # block (0, 0): scale 2
    w[128, 255] = 44.8  # block (1, 1): scale 0.1
    q, scales = quantize_block_fp8(w)
    assert scales.shape == (2, 2)
    assert scales[0, 0] == 2.0
    assert q[0, 0].float() == 448.0
    assert q[1, 1].float() == -224.0
    assert scales[1, 1] == torch.tensor(44.8) / 448
    assert q[128, 255].float() == 448.0
    assert torch.equal(BlockFP8Weight.of_rows(q, scales).dequantize(torch.float32)[:128], w[:128])


@pytest.mark.parametrize(("rows", "columns"), [(576, 200), (1, 1), (128, 384)])
def test_quantize_then_dequantize_is_within_the_fp8_step(rows: int, columns: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 1e-3
    q, scales = quantize_block_fp8(w)
    assert not q.float().isnan().any()
    error = (BlockFP8Weight.of_rows(q, scales).dequantize(torch.float32) - w).abs()
    # 3 fraction bits: half a step is 2^-4 of a normal number, and 2^-10 of the scale below.
    limit = torch.maximum(
        w.abs() * 2**-4, scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns] * 2**-10
    )
    assert bool((error <= limit * 1.0001).all())


def test_quantize_zero_and_tiny_blocks() -> None:
    w = torch.zeros(128, 384)
    w[:, 128:256] = 1e-44
    w[:, 256:] = 3e38
    q, scales = quantize_block_fp8(w)
    assert bool(torch.isfinite(q.float()).all())
    assert bool((scales > 0).all())
    out = BlockFP8Weight.of_rows(q, scales).dequantize(torch.float32)
    assert bool((out[:, :128] == 0).all())
    torch.testing.assert_close(out[:, 256:], w[:, 256:])


def test_what_is_not_a_block_fp8_weight_is_refused() -> None:
    w, scales = fp8_weight(200, 128)
    with pytest.raises(ValueError, match=r"scales of at least \[3, 1\]"):
        BlockFP8Weight.of_rows(w, scales, row_offset=128).dequantize(torch.float32)
    with pytest.raises(ValueError, match="128 x 128"):
        BlockFP8Weight.of_rows(w, scales.repeat(1, 2)).dequantize(torch.float32)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        BlockFP8Weight.of_rows(w.float(), scales)
    with pytest.raises(ValueError, match="finite"):
        quantize_block_fp8(torch.tensor([[float("inf")]]))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for what a NaN says."""
    a, b = a.float(), b.float()
    bits = [x.masked_fill(x.isnan(), 1.5).view(torch.int32) for x in (a, b)]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (0.0, 2.0**-22),
        (1e-6, 2.0**-22),  # counts as 1e-4, and 1e-4 / 448 = 2.2321e-7
        (1.0, 2.0**-8),  # 1 / 448 = 0.00223214
        (448.0, 1.0),
        (449.0, 2.0),
        (896.0, 2.0),
        (3e38, 2.0**120),
        (math.inf, 2.0**127),
    ],
)
def test_scales_by_hand(backend: Backend, amax: float, scale: float) -> None:
    x = torch.zeros(1, 200)
    x[0, 60], x[0, 61] = -amax, amax / 2
    ops = Ops(backend)
    q, scales = ops.quantize_rows_fp8(x)
    assert scales.tolist() == [[scale, 2.0**-22]]
    assert q[0, 60] == torch.tensor(max(-amax / scale, -448.0)).to(torch.float8_e4m3fn)
    assert not q[0, :60].float().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_rounded_as_torch_rounds(backend: Backend, dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    finite = every[every.abs() <= 448].float()
    if dtype == torch.float32:  # between two of bf16 as well, and on either side of what is halfway
        finite = torch.cat([finite, finite * 1.001, finite * 1.0625, finite.nextafter(torch.tensor(0.0))]).clamp(
            -448, 448
        )
    x = torch.nn.functional.pad(finite, (0, -len(finite) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1).to(dtype)  # so that the scale is 1
    ops = Ops(backend)
    q, scales = ops.quantize_rows_fp8(x)
    assert bool((scales == 1).all())
    assert torch.equal(q.view(torch.uint8), x.float().to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-22, 2.0**-110, 2.0**117, 2.0**118, 2.0**127, 0.3, math.inf])
def test_every_code_times_its_scale(backend: Backend, dtype: torch.dtype, scale: float) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(2)[: 256 + 77].view(1, -1)  # also where a vector does not end
    ops = Ops(backend)
    out = ops.dequantize_rows_fp8(codes.view(torch.float8_e4m3fn), torch.full((1, 3), scale), dtype)
    assert out.dtype == dtype
    assert same(out, (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 40, 127, 128, 129, 300, 512])
def test_within_the_step_and_again_the_same(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(columns)
    x = (torch.randn(9, columns + 3) * torch.tensor(10.0) ** torch.randint(-3, 4, (9, 1))).to(dtype)[:, :columns]
    ops = Ops(backend)
    q, scales = ops.quantize_rows_fp8(x)
    back = ops.dequantize_rows_fp8(q, scales, dtype)
    again = ops.dequantize_rows_fp8(*ops.quantize_rows_fp8(back), dtype)
    alone = ops.quantize_rows_fp8(x[4:5])
    assert scales.shape == (9, -(-columns // 128))
    # 3 fraction bits: half a step is 2^-4 of a normal number, and 2^-10 of the scale below
    limit = torch.maximum(x.float().abs() * 2**-4, scales.repeat_interleave(128, 1)[:, :columns] * 2**-10)
    assert bool(((back.float() - x.float()).abs() <= limit).all())
    assert torch.equal(again, back)
    assert torch.equal(alone[0].view(torch.uint8), q[4:5].view(torch.uint8))
    assert torch.equal(alone[1], scales[4:5])


def test_both_backends_have_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 300) * torch.tensor(2.0) ** torch.randint(-140, 120, (50, 300))
    x[3, 5], x[4, 200], x[5, 299], x[6] = math.nan, math.inf, -math.inf, math.nan
    found = []
    for backend in BACKENDS:
        ops = Ops(backend)
        found.append(ops.quantize_rows_fp8(x))
    assert same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert int(found[0][0].float().isnan().sum()) == 301
    assert found[0][1][6].tolist() == [2.0**-22] * 3


def test_bytes_of_a_row() -> None:
    assert [fp8_row_bytes(n) for n in (1, 40, 128, 129, 512)] == [5, 44, 132, 137, 528]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Backend) -> None:
    ops = Ops(backend)
    q, scales = ops.quantize_rows_fp8(torch.empty(0, 40))
    assert (q.shape, scales.shape) == ((0, 40), (0, 1))
    assert ops.dequantize_rows_fp8(q, scales, torch.bfloat16).shape == (0, 40)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        CPU_OPS.quantize_rows_fp8(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scales \[T, ceil\(D / 128\)\]"):
        CPU_OPS.dequantize_rows_fp8(torch.zeros(2, 129).to(torch.float8_e4m3fn), torch.ones(2, 1), torch.float32)
