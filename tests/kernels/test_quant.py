from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.kernels.quant import BlockFP8Weight, quantize_block_fp8


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
