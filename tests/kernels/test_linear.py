from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.kernels.quant import BlockFP8Weight
from tests.support.ops import CPU_OPS, REFERENCE_OPS

ROWS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 64, 100, 257]
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_to_float32(exact: Fraction) -> Fraction:
    """Nearest fp32, ties to even, of an exact number in the normal range."""
    if exact == 0:
        return exact
    magnitude, exponent = abs(exact), 0
    while magnitude >= 2**24:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 2**23:
        magnitude, exponent = magnitude * 2, exponent - 1
    return (1 if exact > 0 else -1) * round(magnitude) * Fraction(2) ** exponent


def fma_chain(a: Tensor, b: Tensor) -> float:
    """acc = fma(a[k], b[k], acc) over k ascending, in exact arithmetic rounded once per term."""
    acc = Fraction(0)
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        acc = round_to_float32(Fraction(x) * Fraction(y) + acc)
    return float(acc)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 31, 64])
def test_every_element_is_one_fma_chain_over_k(dtype: torch.dtype, k: int) -> None:
    x, w = randn(9, k, dtype=dtype), randn(37, k, dtype=dtype, seed=1)
    y = CPU_OPS.linear(x, CPU_OPS.pack_weight(w), out_dtype=torch.float32)
    expected = [[fma_chain(x[i], w[j]) for j in range(37)] for i in range(9)]
    assert torch.equal(y, torch.tensor(expected))


def test_the_order_of_k_is_ascending_and_starts_at_zero() -> None:
    # 2^24 + 1 is not an fp32 number: only the ascending order gives 2^24 for the first row and 2^24 + 2 for the second.
    x = torch.tensor([[2.0**24, 1.0, 1.0], [1.0, 1.0, 2.0**24]])
    assert CPU_OPS.linear(x, CPU_OPS.pack_weight(torch.ones(1, 3))).flatten().tolist() == [2.0**24, 2.0**24 + 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 40, 7), (17, 100, 65), (70, 129, 256), (6, 64, 1000)])
def test_cpu_equals_reference_up_to_rounding(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    y = CPU_OPS.linear(x, CPU_OPS.pack_weight(w))
    expected = REFERENCE_OPS.linear(x, REFERENCE_OPS.pack_weight(w))
    assert y.dtype == expected.dtype == dtype
    rtol, atol = (1e-5, 1e-5 * k**0.5) if dtype == torch.float32 else (2**-7, 1e-4 * k**0.5)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [192, 33])
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype, k: int) -> None:
    x, w = randn(257, k, dtype=dtype), CPU_OPS.pack_weight(randn(83, k, dtype=dtype, seed=1))
    alone = torch.cat([CPU_OPS.linear(x[i : i + 1], w) for i in range(257)])
    order = torch.randperm(257, generator=torch.Generator().manual_seed(2))
    for rows in ROWS:
        assert torch.equal(CPU_OPS.linear(x[:rows], w), alone[:rows]), f"the first {rows} rows"
        some = order[:rows]
        assert torch.equal(CPU_OPS.linear(x[some], w), alone[some]), f"{rows} rows in another order"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [160, 100])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_an_output_split_does_not_change_bits(dtype: torch.dtype, n: int, parts: int) -> None:
    w = randn(n, 96, dtype=dtype, seed=1)
    for rows in (1, 7, 33):
        x = randn(rows, 96, dtype=dtype)
        whole = CPU_OPS.linear(x, CPU_OPS.pack_weight(w))
        pieces = [CPU_OPS.linear(x, CPU_OPS.pack_weight(part)) for part in w.tensor_split(parts)]
        assert torch.equal(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_bits(dtype: torch.dtype) -> None:
    w = CPU_OPS.pack_weight(randn(300, 512, dtype=dtype, seed=1))
    threads = torch.get_num_threads()
    try:
        for rows in (1, 16, 100):
            x = randn(rows, 512, dtype=dtype)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(CPU_OPS.linear(x.repeat(8, 1), w)[:rows])
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_equals_float32_on_the_widened_numbers() -> None:
    x, w = randn(20, 77, dtype=torch.bfloat16), randn(50, 77, dtype=torch.bfloat16, seed=1)
    wide = CPU_OPS.linear(x.float(), CPU_OPS.pack_weight(w.float()))
    assert torch.equal(CPU_OPS.linear(x, CPU_OPS.pack_weight(w), out_dtype=torch.float32), wide)
    assert torch.equal(CPU_OPS.linear(x, CPU_OPS.pack_weight(w)), wide.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(dtype: torch.dtype) -> None:
    tiny = 2.0**-133  # subnormal in both dtypes
    x = torch.tensor([[float("nan")], [float("inf")], [-0.0], [tiny], [3e38]], dtype=dtype)
    y = CPU_OPS.linear(x, CPU_OPS.pack_weight(torch.ones(1, 1, dtype=dtype))).flatten()
    assert y[0].isnan()
    assert y[1:].tolist() == [float("inf"), 0.0, 0.0, x[4].item()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_zero_whatever_the_thread_s_mode(dtype: torch.dtype) -> None:
    tiny, small = 2.0**-133, 2.0**-70
    x = torch.tensor([[tiny, 0.0], [small, small], [small, 0.0]], dtype=dtype)
    w = CPU_OPS.pack_weight(torch.tensor([[1.0, 0.0], [small, small]], dtype=dtype))
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        try:
            y = CPU_OPS.linear(x, w, out_dtype=torch.float32)
        finally:
            torch.set_flush_denormal(False)
        assert y.tolist() == [[0.0, 0.0], [small, 0.0], [small, 0.0]]


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    values = torch.cat([randn(4000), (1 + randn(4000).abs()) * 1e-37, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])])
    y = CPU_OPS.linear(values[:, None], CPU_OPS.pack_weight(torch.ones(1, 1)), out_dtype=torch.bfloat16)
    assert torch.equal(y.flatten(), values.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    x, w = randn(5, 4, 33, dtype=dtype), randn(20, 33, dtype=dtype, seed=1)
    packed = CPU_OPS.pack_weight(w)
    assert torch.equal(CPU_OPS.pack_weight(w.T.contiguous().T).data, packed.data)
    expected = CPU_OPS.linear(x, packed)
    assert expected.shape == (5, 4, 20)
    assert torch.equal(CPU_OPS.linear(x.transpose(0, 1), packed), expected.transpose(0, 1))
    assert torch.equal(CPU_OPS.linear(x[:, 1], packed), expected[:, 1])
    wide = randn(5, 70, dtype=dtype)
    assert torch.equal(CPU_OPS.linear(wide[:, 3:36], packed), CPU_OPS.linear(wide[:, 3:36].contiguous(), packed))
    assert torch.equal(CPU_OPS.linear(wide.T[:33].T, packed), CPU_OPS.linear(wide[:, :33].contiguous(), packed))
    assert torch.equal(CPU_OPS.linear(x[0, 0].expand(70, 33), packed), expected[0, 0].expand(70, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_past_a_row(dtype: torch.dtype) -> None:
    x = torch.full((4, 40), float("nan"), dtype=dtype)
    x[:, :33] = 1.0
    assert CPU_OPS.linear(x[:, :33], CPU_OPS.pack_weight(torch.ones(5, 33, dtype=dtype))).tolist() == [[33.0] * 5] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_linear_equals_linear_per_matrix(dtype: torch.dtype) -> None:
    w = randn(3, 40, 33, dtype=dtype, seed=1)
    packed = CPU_OPS.pack_weight(w)
    for tokens in (0, 1, 9, 130):
        x = randn(tokens, 3, 33, dtype=dtype)
        y = CPU_OPS.batched_linear(x, packed)
        assert y.shape == (tokens, 3, 40)
        assert y.is_contiguous()
        head_major = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(CPU_OPS.batched_linear(head_major, packed), y)
        for b in range(3):
            assert torch.equal(y[:, b], CPU_OPS.linear(x[:, b], CPU_OPS.pack_weight(w[b])))
    one_row = randn(1, 1, 33, dtype=dtype).expand(130, 3, 33)
    assert torch.equal(CPU_OPS.batched_linear(one_row, packed), CPU_OPS.batched_linear(one_row.contiguous(), packed))


def test_batched_linear_in_the_reference_backend() -> None:
    x, w = randn(4, 3, 10), randn(3, 6, 10, seed=1)
    y = REFERENCE_OPS.batched_linear(x, REFERENCE_OPS.pack_weight(w))
    np.testing.assert_allclose(y.numpy(), np.einsum("tbk,bnk->tbn", x.numpy(), w.numpy()), rtol=1e-5, atol=1e-5)


def test_empty_inputs() -> None:
    w = CPU_OPS.pack_weight(torch.ones(4, 6))
    assert CPU_OPS.linear(torch.empty(0, 6), w).shape == (0, 4)
    assert CPU_OPS.linear(torch.empty(2, 0, 6), w).shape == (2, 0, 4)
    assert CPU_OPS.linear(torch.ones(2, 6), CPU_OPS.pack_weight(torch.empty(0, 6))).shape == (2, 0)
    assert CPU_OPS.pack_weight(torch.empty(0, 4, 6)).num_matrices == 0


def test_a_packed_weight_keeps_its_backend() -> None:
    x = randn(2, 8)
    w = REFERENCE_OPS.pack_weight(torch.eye(8))
    assert w == PackedWeight(w.data, 1, 8, 8, torch.float32, "reference")
    assert torch.equal(REFERENCE_OPS.linear(x, w), x)


def test_what_does_not_fit_is_refused() -> None:
    w = CPU_OPS.pack_weight(torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"needs x \[\.\.\., 6\]"):
        CPU_OPS.linear(torch.ones(2, 5), w)
    with pytest.raises(ValueError, match=r"in torch\.bfloat16, got .* torch\.float32"):
        CPU_OPS.linear(torch.ones(2, 6), CPU_OPS.pack_weight(torch.ones(4, 6, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        CPU_OPS.linear(torch.ones(2, 6), w, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="use batched_linear"):
        CPU_OPS.linear(torch.ones(2, 6), CPU_OPS.pack_weight(torch.ones(2, 4, 6)))
    with pytest.raises(ValueError, match=r"needs x \[T, 2, 6\]"):
        CPU_OPS.batched_linear(torch.ones(2, 3, 6), CPU_OPS.pack_weight(torch.ones(2, 4, 6)))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        CPU_OPS.pack_weight(torch.ones(4, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="move x to the CPU"):
        CPU_OPS.linear(torch.ones(2, 6, device="meta"), w)


def fp8_weight(n: int, k: int, *, seed: int = 0) -> BlockFP8Weight:
    """Every number that e4m3 has, and scales that are no powers of two."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (n, k), generator=generator).to(torch.uint8)
    bits[bits & 0x7F == 0x7F] = 0x08  # NaN
    scale_inv = torch.rand(-(-n // 128), -(-k // 128), generator=generator) * 0.01 + 1e-4
    return BlockFP8Weight.of_rows(bits.view(torch.float8_e4m3fn), scale_inv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 129), (300, 256), (130, 1000)])
def test_an_fp8_weight_gives_the_bits_of_the_dequantised_one(dtype: torch.dtype, n: int, k: int) -> None:
    w = fp8_weight(n, k)
    packed, dequantised = CPU_OPS.pack_weight(w, dtype=dtype), CPU_OPS.pack_weight(w.dequantize(dtype))
    assert packed.data.dtype == torch.uint8
    for rows in (1, 3, 17, 64, 300):
        x = randn(rows, k, dtype=dtype, seed=rows)
        assert torch.equal(CPU_OPS.linear(x, packed), CPU_OPS.linear(x, dequantised))
        assert torch.equal(CPU_OPS.linear(x[: rows // 2], packed), CPU_OPS.linear(x, packed)[: rows // 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_fp8_weights_can_be_cut_and_joined_anywhere(dtype: torch.dtype) -> None:
    first, second = fp8_weight(200, 150), fp8_weight(77, 150, seed=1)
    x = randn(5, 150, dtype=dtype)
    expected = torch.cat([CPU_OPS.linear(x, CPU_OPS.pack_weight(w, dtype=dtype)) for w in (first, second)], dim=1)
    joined = BlockFP8Weight.cat([first, second])
    assert torch.equal(CPU_OPS.linear(x, CPU_OPS.pack_weight(joined, dtype=dtype)), expected)
    assert not joined.is_block_aligned  # the second one begins in row 200
    assert BlockFP8Weight.cat([fp8_weight(256, 150), second]).is_block_aligned
    part = BlockFP8Weight(joined.values[190:210], joined.scales[190:210], is_block_aligned=False)
    assert torch.equal(CPU_OPS.linear(x, CPU_OPS.pack_weight(part, dtype=dtype)), expected[:, 190:210])


def test_an_fp8_weight_in_the_reference_backend_is_the_dequantised_one() -> None:
    w, x = fp8_weight(40, 140), randn(3, 140)
    assert torch.equal(
        REFERENCE_OPS.linear(x, REFERENCE_OPS.pack_weight(w, dtype=torch.float32)),
        REFERENCE_OPS.linear(x, REFERENCE_OPS.pack_weight(w.dequantize(x.dtype))),
    )


def test_weights_of_several_kinds_are_not_stacked() -> None:
    w = fp8_weight(16, 128)
    kinds = [CPU_OPS.pack_weight(w, dtype=torch.float32), CPU_OPS.pack_weight(w.dequantize(torch.float32))]
    with pytest.raises(ValueError, match="all in FP8 or none"):
        CPU_OPS.pack_each(kinds, 2, (16, 128), torch.float32)
    assert CPU_OPS.pack_each(kinds[:1] * 2, 2, (16, 128), torch.float32).num_matrices == 2
