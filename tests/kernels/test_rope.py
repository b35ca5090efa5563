"""Rotary embedding: published frequencies, complex numbers as the oracle, both pair orders."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.kernels.backends import Backend
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable, YarnConfig, cos_sin_table, inv_freq, yarn_mscale
from tests.support.ops import CPU_OPS, REFERENCE_OPS

BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DEEPSEEK = YarnConfig(
    factor=40.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
)


def test_deepseek_frequencies() -> None:
    freq = inv_freq(64, 10000.0, DEEPSEEK)
    assert freq.dtype == torch.float32
    assert freq.shape == (32,)
    assert freq[0] == 1.0
    assert freq[10].item() == pytest.approx(0.0562341288, rel=2e-9)
    assert freq[11].item() == pytest.approx(0.0390069261, rel=2e-9)
    assert freq[16].item() == pytest.approx(0.0055000004, rel=2e-8)
    assert freq[23].item() == pytest.approx(3.3338e-05, rel=2e-5)
    assert freq[31].item() == pytest.approx(3.3338e-06, rel=2e-5)


def test_frequencies_without_yarn() -> None:
    expected = [500000.0 ** (-2 * i / 8) for i in range(4)]
    assert inv_freq(8, 500000.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_equal_betas_make_a_step_instead_of_a_division_by_zero() -> None:
    yarn = YarnConfig(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0)
    plain, freq = inv_freq(64, 50000.0), inv_freq(64, 50000.0, yarn)
    # one turn over 4096 positions: pair 64 ln(4096 / 2 pi) / (2 ln 50000) = 19.16, so low = 19 and high = 20
    assert torch.equal(freq[:20], plain[:20])
    assert torch.equal(freq[20:], plain[20:] / 32)
    # a whole number of turns at a pair's own index: low = high
    theta = (4096 / (2 * math.pi)) ** 2
    same = inv_freq(64, theta, yarn)
    assert torch.equal(same[:17], inv_freq(64, theta)[:17])
    assert torch.equal(same[17:], inv_freq(64, theta)[17:] / 32)


def test_mscale() -> None:
    assert yarn_mscale(40.0, 1.0) ** 2 == pytest.approx(1.8738542, rel=1e-7)
    assert 192**-0.5 * yarn_mscale(40.0, 1.0) ** 2 == pytest.approx(0.1352337789, rel=1e-9)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40.0, 0.0) == 1.0


def test_table_rows_do_not_depend_on_their_number() -> None:
    freq = inv_freq(64, 10000.0, DEEPSEEK)
    table = cos_sin_table(freq, 1003)
    assert table.shape == (1003, 64)
    assert torch.equal(cos_sin_table(freq, 517), table[:517])
    angle = (torch.tensor(1002.0) * freq[3]).item()
    assert table[1002, 3].item() == pytest.approx(math.cos(angle), rel=1e-7)
    assert table[1002, 32 + 3].item() == pytest.approx(math.sin(angle), rel=1e-7)
    assert torch.equal(cos_sin_table(freq, 4, scale=0.5), table[:4] * 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads", [1, 5])
def test_rotation_is_a_complex_product(backend: Backend, dtype: torch.dtype, interleaved: bool, heads: int) -> None:
    torch.manual_seed(0)
    dim, positions = 12, torch.tensor([5, 0, 31, 5])
    x = torch.randn(4, heads, dim).to(dtype)
    freq = inv_freq(dim, 10000.0)
    ops = Ops(backend)
    y = ops.apply_rope(x, RopeTable(cos_sin_table(freq, 32), positions, interleaved))
    wide = x.double()
    if interleaved:
        pairs = torch.complex(wide[..., 0::2], wide[..., 1::2])
    else:
        pairs = torch.complex(wide[..., : dim // 2], wide[..., dim // 2 :])
    angle = positions[:, None, None].double() * freq.double()
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    expected = torch.empty(4, heads, dim, dtype=torch.float64)
    if interleaved:
        expected[..., 0::2], expected[..., 1::2] = turned.real, turned.imag
    else:
        expected[..., : dim // 2], expected[..., dim // 2 :] = turned.real, turned.imag
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(y[1], x[1])  # position 0 turns nothing


def test_pair_orders_by_hand() -> None:
    table = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # a quarter turn: (a, b) -> (-b, a)
    x, zero = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([0])
    assert CPU_OPS.apply_rope(x, RopeTable(table, zero, True)).tolist() == [[[-2.0, 1.0, -4.0, 3.0]]]
    assert CPU_OPS.apply_rope(x, RopeTable(table, zero, False)).tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_reference_bit_for_bit_on_strided_input(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(9, 3, 200).to(dtype)[..., 128:192]
    table, positions = cos_sin_table(inv_freq(64, 10000.0, DEEPSEEK), 5000), torch.randint(0, 5000, (9,))
    for interleaved in (True, False):
        expected = REFERENCE_OPS.apply_rope(x, RopeTable(table, positions, interleaved))
        assert torch.equal(CPU_OPS.apply_rope(x, RopeTable(table, positions, interleaved)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend: Backend) -> None:
    table = cos_sin_table(inv_freq(4, 10000.0), 8)
    ops = Ops(backend)
    assert ops.apply_rope(torch.empty(0, 2, 4), RopeTable(table, torch.empty(0, dtype=torch.int64), True)).shape == (
        0,
        2,
        4,
    )
    for bad in (8, -1):
        with pytest.raises(ValueError, match="outside the rotary table"):
            ops.apply_rope(torch.ones(1, 1, 4), RopeTable(table, torch.tensor([bad]), True))
    with pytest.raises(ValueError, match="apply_rope needs"):
        ops.apply_rope(torch.ones(1, 1, 6), RopeTable(table, torch.tensor([0]), True))
    with pytest.raises(ValueError, match="pairs"):
        inv_freq(5, 10000.0)
