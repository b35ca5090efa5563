"""Norms: values against double precision, bits against the same row in other company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.kernels.backends import Backend
from shoal.kernels.ops import Ops
from tests.support.ops import CPU_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 512])
def test_norms_match_double_precision(
    backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(width)
    x, residual = torch.randn(2, 3, width).to(dtype), torch.randn(2, 3, width).to(dtype)
    weight, bias = torch.randn(width).to(weight_dtype), torch.randn(width).to(weight_dtype)
    wide = x.double()
    ops = Ops(backend)
    rms = ops.rms_norm(x, weight, 1e-3)
    layer = ops.layer_norm(x, weight, bias, 1e-3)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-3)
    assert rms.dtype == layer.dtype == normed.dtype == total.dtype == dtype
    _assert_close(rms, wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight)
    centred = wide - wide.mean(-1, keepdim=True)
    _assert_close(layer, centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    _assert_close(normed, total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed_row(backend: Backend) -> None:
    ops = Ops(backend)
    assert ops.rms_norm(torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 2.0]), 0.0).tolist() == [
        pytest.approx([3 / 12.5**0.5, -8 / 12.5**0.5])
    ]
    y = ops.layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 2.0]), torch.tensor([0.5, -0.5]), 0.0)
    assert y.tolist() == [pytest.approx([-1.5, 1.5])]


def test_weight_multiplies_before_the_only_rounding() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64)
    normed = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    once, twice = (normed * weight).bfloat16(), (normed.bfloat16() * weight).bfloat16()
    assert not torch.equal(once, twice)
    assert torch.equal(CPU_OPS.rms_norm(x, weight, 0.0), once)


def test_add_rms_norm_takes_fp32_into_a_bf16_residual_and_norms_the_rounded_sum() -> None:
    x, residual = torch.randn(5, 48), torch.randn(5, 48).bfloat16()
    weight = torch.randn(48)
    normed, total = CPU_OPS.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, (x + residual.float()).bfloat16())
    assert torch.equal(normed, CPU_OPS.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_its_bits_in_any_company_stride_and_thread_count(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.kernels.cpu_library.MIN_PARALLEL_WORK", 0)
    torch.manual_seed(0)
    wide = torch.randn(37, 700).to(dtype)
    x = wide[:, 100:612]
    weight, bias = torch.randn(512), torch.randn(512)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = (
            CPU_OPS.rms_norm(x, weight, 1e-6),
            CPU_OPS.layer_norm(x, weight, bias, 1e-6),
            CPU_OPS.add_rms_norm(x, x, weight, 1e-6)[0],
        )
    finally:
        torch.set_num_threads(threads)
    for r in range(37):
        row = x[r].clone()
        assert torch.equal(together[0][r], CPU_OPS.rms_norm(row, weight, 1e-6))
        assert torch.equal(together[1][r], CPU_OPS.layer_norm(row, weight, bias, 1e-6))
        assert torch.equal(together[2][r], CPU_OPS.add_rms_norm(row, row, weight, 1e-6)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Backend) -> None:
    ops = Ops(backend)
    assert ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="rms_norm needs"):
        CPU_OPS.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        CPU_OPS.rms_norm(torch.ones(2, 8, dtype=torch.float64), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="like the residual"):
        CPU_OPS.add_rms_norm(torch.ones(2, 8).bfloat16(), torch.ones(2, 8), torch.ones(8), 1e-6)
