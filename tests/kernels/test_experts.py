from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.ops import CPU_OPS, REFERENCE_OPS

DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_swiglu_is_close_to_the_exact_value() -> None:
    gate = torch.cat([torch.linspace(-110, 110, 5001), randn(5001)])
    up = torch.ones_like(gate)
    y = CPU_OPS.swiglu(torch.stack([gate, up], dim=1))
    exact = torch.tensor([g / (1 + math.exp(-g)) for g in gate.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y.flatten().double(), exact, rtol=5e-7, atol=1e-36)  # e^-g overflows below -88.7


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_special_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -1e30, 1e30, float("inf"), float("nan")], dtype=dtype)
    y = CPU_OPS.swiglu(torch.stack([gate, torch.full_like(gate, 2.0)], dim=1)).flatten()
    assert y[:4].tolist() == [0.0, 0.0, 2 * gate[2].item(), float("inf")]
    assert y[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_does_not_depend_on_position(dtype: torch.dtype) -> None:
    gate_up = randn(70, 2 * 37, dtype=dtype) * 10
    y = CPU_OPS.swiglu(gate_up)
    for j in range(37):
        assert torch.equal(CPU_OPS.swiglu(gate_up[:, [j, 37 + j]])[:, 0], y[:, j])
    assert torch.equal(CPU_OPS.swiglu(gate_up.T.contiguous().T), y)
    wide = randn(70, 100, dtype=dtype)
    assert torch.equal(CPU_OPS.swiglu(wide[:, 5:45]), CPU_OPS.swiglu(wide[:, 5:45].contiguous()))
    expected = REFERENCE_OPS.swiglu(gate_up)
    torch.testing.assert_close(y, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


# Widths that fill panels, and widths where the up half starts inside a panel.
@pytest.mark.parametrize(("h", "intermediate"), [(64, 48), (33, 21), (50, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_mlp_equals_linear_swiglu_linear(dtype: torch.dtype, h: int, intermediate: int) -> None:
    counts = [0, 1, 3, 0, 7, 130, 16, 0]
    x = randn(sum(counts), h, dtype=dtype)
    gate_up = randn(len(counts), 2 * intermediate, h, dtype=dtype, seed=1)
    down = randn(len(counts), h, intermediate, dtype=dtype, seed=2)
    y = CPU_OPS.experts_mlp(x, torch.tensor(counts), CPU_OPS.pack_weight(gate_up), CPU_OPS.pack_weight(down))
    expected = [
        CPU_OPS.linear(
            CPU_OPS.swiglu(CPU_OPS.linear(rows, CPU_OPS.pack_weight(gate_up[e]))), CPU_OPS.pack_weight(down[e])
        )
        for e, rows in enumerate(torch.split(x, counts))
    ]
    assert y.dtype == dtype
    assert torch.equal(y, torch.cat(expected))
    order = torch.randperm(2 * len(x), generator=torch.Generator().manual_seed(3))
    place, out_row = order[: len(x)], order[len(x) :].argsort()
    spread = torch.full((2 * len(x), h), torch.nan, dtype=dtype).index_copy_(0, place, x)
    moved = CPU_OPS.experts_mlp(
        spread, torch.tensor(counts), CPU_OPS.pack_weight(gate_up), CPU_OPS.pack_weight(down), place, out_row
    )
    assert torch.equal(moved[out_row], y)
    reference = REFERENCE_OPS.experts_mlp(
        x, torch.tensor(counts), REFERENCE_OPS.pack_weight(gate_up), REFERENCE_OPS.pack_weight(down)
    )
    moved = REFERENCE_OPS.experts_mlp(
        spread,
        torch.tensor(counts),
        REFERENCE_OPS.pack_weight(gate_up),
        REFERENCE_OPS.pack_weight(down),
        place,
        out_row,
    )
    assert torch.equal(moved[out_row], reference)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(y, reference, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_s_rows_do_not_depend_on_other_experts_or_threads(dtype: torch.dtype) -> None:
    counts = [5, 64, 20]
    x = randn(sum(counts), 96, dtype=dtype)
    gate_up, down = randn(3, 160, 96, dtype=dtype, seed=1), randn(3, 96, 80, dtype=dtype, seed=2)
    packed = CPU_OPS.pack_weight(gate_up), CPU_OPS.pack_weight(down)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = CPU_OPS.experts_mlp(x, torch.tensor(counts), *packed)
        torch.set_num_threads(2)
        assert torch.equal(CPU_OPS.experts_mlp(x, torch.tensor(counts), *packed), y)
    finally:
        torch.set_num_threads(threads)
    for row in (0, 4, 5, 68, 69, 88):
        expert = 0 if row < 5 else 1 if row < 69 else 2
        alone = [int(e == expert) for e in range(3)]
        assert torch.equal(CPU_OPS.experts_mlp(x[row : row + 1], torch.tensor(alone), *packed), y[row : row + 1])
    only_middle = CPU_OPS.experts_mlp(
        x[5:69], torch.tensor([64]), CPU_OPS.pack_weight(gate_up[1:2]), CPU_OPS.pack_weight(down[1:2])
    )
    assert torch.equal(only_middle, y[5:69])
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(CPU_OPS.experts_mlp(wide[:, 96:], torch.tensor(counts), *packed), y)


def test_experts_mlp_with_nothing_to_do() -> None:
    for experts in (0, 2):
        gate_up, down = CPU_OPS.pack_weight(torch.ones(experts, 8, 6)), CPU_OPS.pack_weight(torch.ones(experts, 6, 4))
        counts = torch.zeros(experts, dtype=torch.int64)
        assert CPU_OPS.experts_mlp(torch.empty(0, 6), counts, gate_up, down).shape == (0, 6)


def test_experts_mlp_refuses_what_does_not_fit() -> None:
    gate_up, down = CPU_OPS.pack_weight(torch.ones(2, 8, 6)), CPU_OPS.pack_weight(torch.ones(2, 6, 4))
    with pytest.raises(ValueError, match="must sum to the rows"):
        CPU_OPS.experts_mlp(torch.ones(3, 6), torch.tensor([1, 1]), gate_up, down)
    with pytest.raises(ValueError, match="must sum to the rows"):
        CPU_OPS.experts_mlp(torch.ones(3, 6), torch.tensor([4, -1]), gate_up, down)
    with pytest.raises(ValueError, match=r"must be \[2\] int64"):
        CPU_OPS.experts_mlp(torch.ones(3, 6), torch.tensor([3]), gate_up, down)
    with pytest.raises(ValueError, match=r"out_row must be \[3\] int64"):
        CPU_OPS.experts_mlp(torch.ones(3, 6), torch.tensor([1, 2]), gate_up, down, out_row=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"x_row must be \[R\] int64"):
        CPU_OPS.experts_mlp(torch.ones(3, 6), torch.tensor([1, 2]), gate_up, down, torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"gate_up \[E, 2I, H\]"):
        CPU_OPS.experts_mlp(torch.ones(3, 6), torch.tensor([1, 2]), gate_up, CPU_OPS.pack_weight(torch.ones(2, 6, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_topk_sums_in_slot_order(dtype: torch.dtype) -> None:
    y = torch.tensor([[1.0, 2.0**24], [1.0, 1.0], [4.0, 1.0]], dtype=dtype)
    rows = torch.tensor([[0, 1, 2], [1, 2, 0], [-1, 2, -1], [-1, -1, -1]])
    weights = torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 1.0], [9.0, 3.0, 9.0], [9.0, 9.0, 9.0]])
    # 2^24 + 2 + 0.5 keeps the 2 and loses the half; 1 + 1 + 2^24 keeps both ones. The last summand uncovers them.
    shared = torch.tensor([[0.0, -(2.0**24)], [1.0, -(2.0**24)], [0.0, 5.0], [7.0, 0.0]], dtype=dtype)
    assert CPU_OPS.combine_topk(y, rows, weights, shared).tolist() == [[5.0, 2.0], [7.0, 2.0], [12.0, 8.0], [7.0, 0.0]]
    expected = torch.tensor([[5.0, 2.0**24 + 2], [6.0, 2.0**24 + 2], [12.0, 3.0], [0.0, 0.0]])
    assert torch.equal(CPU_OPS.combine_topk(y, rows, weights), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_shared", [False, True])
def test_combine_topk_equals_the_reference_bit_for_bit(dtype: torch.dtype, with_shared: bool) -> None:
    y, weights = randn(40, 67, dtype=dtype), randn(25, 8, seed=1)
    shared = randn(25, 67, dtype=dtype, seed=3) if with_shared else None
    rows = torch.randint(-1, 40, (25, 8), generator=torch.Generator().manual_seed(2))
    out = CPU_OPS.combine_topk(y, rows, weights, shared)
    assert out.dtype == dtype
    assert torch.equal(REFERENCE_OPS.combine_topk(y, rows, weights, shared), out)
    assert torch.equal(CPU_OPS.combine_topk(torch.cat([y, y], dim=1)[:, 67:], rows, weights, shared), out)
    # An absent row is skipped, not multiplied by something: NaN elsewhere cannot leak in.
    y[0] = float("nan")
    assert not CPU_OPS.combine_topk(y, torch.full((1, 8), -1), weights[:1]).isnan().any()


def test_combine_topk_refuses_another_shape_of_shared() -> None:
    with pytest.raises(ValueError, match=r"shared must be \[T, H\]"):
        CPU_OPS.combine_topk(torch.ones(3, 4), torch.tensor([[0]]), torch.ones(1, 1), torch.ones(2, 4))


def test_combine_topk_refuses_rows_outside_y() -> None:
    for bad in (3, -2):
        with pytest.raises(ValueError, match=r"\[-1, 3\)"):
            CPU_OPS.combine_topk(torch.ones(3, 4), torch.tensor([[bad]]), torch.ones(1, 1))
