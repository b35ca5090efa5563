"""Triton's products, interpreted: parity with the reference, and every row on its own.

The interpreter multiplies with numpy, whose bits depend on the shape, so bits are compared on small integers: sums of
those are exact, and what can differ is which elements are summed. Rounding is compared on a device.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops
from shoal.kernels.quant import BlockFP8Weight, quantize_block_fp8
from shoal.kernels.triton.gemm_config import TILES, tiles_for
from shoal.kernels.triton.linear import Operands, gemm
from tests.kernels.triton.interpreter import TRITON_OPS
from tests.support.ops import CPU_OPS

from .interpreter import DEVICE
from .test_rows import DTYPES, on_both, randn

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="interpreted here; tests/gpu is for devices")


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8_weight(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random FP8 matrices [B, N, K] or one [N, K], and their scales."""
    pairs = [quantize_block_fp8(w) for w in randn(*shape, seed=seed).reshape(-1, *shape[-2:])]
    w, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return (w, scale) if len(shape) == 3 else (w[0], scale[0])


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 140), n=st.integers(1, 150), k=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_linear(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    y, expected = on_both(lambda ops: ops.linear(x, ops.pack_weight(w), out_dtype=torch.float32))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * k**0.5)


@settings(max_examples=10, deadline=None)
@given(
    t=st.integers(1, 70),
    b=st.integers(1, 3),
    n=st.integers(1, 70),
    k=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
)
def test_batched_linear(t: int, b: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = randn(t, b, k + 3, dtype=dtype)[..., 3:], randn(b, n, k, dtype=dtype, seed=1)
    y, expected = on_both(lambda ops: ops.batched_linear(x, ops.pack_weight(w)))
    rtol, atol = (1e-5, 1e-5 * k**0.5) if dtype == torch.float32 else (2**-7, 1e-3)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 130, 300), (65, 40, 128)])
def test_fp8_linear(m: int, n: int, k: int, ue8m0: bool) -> None:
    x, w = randn(m, k, dtype=torch.bfloat16), fp8_weight(n, k, seed=1)
    y, expected = on_both(lambda ops: ops.linear(x, ops.pack_block_fp8(*w, ue8m0=ue8m0), out_dtype=torch.float32))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * k**0.5)
    exact = x.float() @ (w[0].float() * w[1].repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]).T
    assert (y - exact).norm() < 0.05 * exact.norm()  # three bits of mantissa


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_that_is_not_contiguous_or_aligned(dtype: torch.dtype) -> None:
    w, x = integers(24, 70, dtype=dtype), integers(3, 2, 70, dtype=dtype, seed=1)
    views = [x[..., 5:69], x[..., :64], x[:, 1, 1:65], x.transpose(0, 1)[..., 6:], x[:1, 1, :64], x.new_empty(0, 64)]
    for view in views:
        for weight in (w[:, 3:67], w[5:6, :64]):
            y, expected = on_both(lambda ops: ops.linear(view, ops.pack_weight(weight)))  # noqa: B023
            assert torch.equal(y, expected)
    for view in (x[:1, :, 2:66], x[:, :, :64]):
        y, expected = on_both(lambda ops: ops.batched_linear(view, ops.pack_weight(w.view(2, 12, 70)[..., 1:65])))  # noqa: B023
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    x = integers(150, 96, dtype=dtype)
    w = TRITON_OPS.pack_weight(integers(40, 96, dtype=dtype, seed=1))
    together = TRITON_OPS.linear(x, w)
    assert torch.equal(TRITON_OPS.linear(x[3:67], w), together[3:67])
    for i in (0, 63, 64, 127, 128, 149):
        assert torch.equal(TRITON_OPS.linear(x[i : i + 1], w)[0], together[i])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_all_tiles_compute_the_same(dtype: torch.dtype) -> None:
    m, n, k = 66, 132, 130
    x = integers(m, k, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16)
    if dtype == torch.float8_e4m3fn:
        w = TRITON_OPS.pack_block_fp8(
            integers(n, k, seed=1).to(dtype), torch.tensor([[0.5, 2.0], [1.0, 0.25]]), ue8m0=True
        )
    else:
        w = TRITON_OPS.pack_weight(integers(n, k, dtype=dtype, seed=1))
    expected = TRITON_OPS.linear(x, w, out_dtype=torch.float32)
    assert expected.abs().sum() > 0
    for tiles in TILES[dtype]:
        y = torch.empty(1, m, n)
        gemm(Operands.of(x.unsqueeze(0), w, tiles), y, tiles)
        assert torch.equal(y[0], expected)


def test_tiles_are_smaller_where_large_ones_would_leave_the_device_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.kernels.triton.gemm_config.num_sms", lambda device: 132)
    large, medium, small, narrow = TILES[torch.bfloat16]
    chosen = [tiles_for(torch.bfloat16, m, n, torch.device("cpu")) for m, n in ((4096, 7168), (256, 7168), (64, 7168))]
    assert chosen == [large, medium, small]
    assert tiles_for(torch.bfloat16, 64, 576, torch.device("cpu")) == narrow
    assert large.stages(2, 232448) == 4
    assert large.stages(2, 101376) == 1
    assert small.stages(2, 101376) == 2


@pytest.mark.parametrize("k", [512, 513, 1300])
def test_chunks_of_fp32_side_by_side_add_up_as_one_after_the_other(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = integers(3, 2, k, dtype=torch.float32), integers(2, 5, k, dtype=torch.float32, seed=1)
    in_one_program = TRITON_OPS.batched_linear(x, TRITON_OPS.pack_weight(w))
    monkeypatch.setattr("shoal.kernels.triton.linear.num_sms", lambda device: 132)
    assert torch.equal(TRITON_OPS.batched_linear(x, TRITON_OPS.pack_weight(w)), in_one_program)
    assert torch.equal(in_one_program, torch.einsum("tbk,bnk->tbn", x, w))


def experts_weights(
    ops: Ops, kind: torch.dtype, num_experts: int, hidden: int, inner: int
) -> tuple[PackedWeight, PackedWeight]:
    shapes = (num_experts, 2 * inner, hidden), (num_experts, hidden, inner)
    if kind == torch.float8_e4m3fn:
        gate_up, down = (ops.pack_block_fp8(*fp8_weight(*shape, seed=1)) for shape in shapes)
    else:
        gate_up, down = (ops.pack_weight(randn(*shape, dtype=kind, seed=1)) for shape in shapes)
    return gate_up, down


@pytest.mark.parametrize("counts", [[5], [0, 3, 0, 65, 1], [1] * 6, [0, 0]])
@pytest.mark.parametrize("kind", [*DTYPES, torch.float8_e4m3fn])
def test_experts(counts: list[int], kind: torch.dtype) -> None:
    hidden, inner = (128, 128) if kind == torch.float8_e4m3fn else (40, 24)
    x = randn(sum(counts), hidden, dtype=torch.float32 if kind == torch.float32 else torch.bfloat16)
    per_expert = torch.tensor(counts)
    y, expected = on_both(
        lambda ops: ops.experts_mlp(x, per_expert, *experts_weights(ops, kind, len(counts), hidden, inner))
    )
    # The hidden values round to bf16, then to FP8: where sums differ in their last bit, a step of those.
    tolerance = 1e-5 if kind == torch.float32 else 2**-7
    assert (y.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("kind", [*DTYPES, torch.float8_e4m3fn])
def test_experts_read_rows_wherever_they_are(kind: torch.dtype) -> None:
    counts = torch.tensor([3, 0, 70])
    x = randn(9, 128, dtype=torch.float32 if kind == torch.float32 else torch.bfloat16)
    x_row = torch.randint(0, 9, (73,), generator=torch.Generator().manual_seed(4))
    weights = experts_weights(TRITON_OPS, kind, 3, 128, 128)
    assert torch.equal(
        TRITON_OPS.experts_mlp(x, counts, *weights, x_row), TRITON_OPS.experts_mlp(x[x_row], counts, *weights)
    )


def test_fp8_rows_that_were_put_together_between_blocks() -> None:
    hidden, inner = 256, 72
    gate, up = (BlockFP8Weight.of_rows(*fp8_weight(n, hidden, seed=n)) for n in (inner, inner + 1))
    up = BlockFP8Weight(up.values[:inner], up.scales[:inner], up.is_block_aligned)
    joined = BlockFP8Weight.cat([gate, up])
    blocks = BlockFP8Weight.cat([gate])
    x = randn(37, hidden, dtype=torch.bfloat16)
    both, first, alone = (TRITON_OPS.pack_weight(w, dtype=torch.bfloat16) for w in (joined, blocks, up))
    assert (both.has_row_scales, first.has_row_scales) == (True, False)
    y = TRITON_OPS.linear(x, both)
    parts = torch.cat([TRITON_OPS.linear(x, first), TRITON_OPS.linear(x, alone)], dim=1)
    torch.testing.assert_close(y, parts, rtol=2**-7, atol=1e-3)
    wide = CPU_OPS.linear(x, CPU_OPS.pack_weight(joined.dequantize(torch.bfloat16)))
    assert (y.float() - wide.float()).norm() <= 0.05 * wide.float().norm()


def test_experts_have_the_bits_of_their_linear_layers() -> None:
    counts, hidden, inner = [0, 66, 1, 2], 40, 24
    x = integers(sum(counts), hidden)
    gate_up, down = integers(4, 2 * inner, hidden, seed=1), integers(4, hidden, inner, seed=2)
    y = TRITON_OPS.experts_mlp(x, torch.tensor(counts), TRITON_OPS.pack_weight(gate_up), TRITON_OPS.pack_weight(down))
    out_row = torch.arange(len(x)).flip(0)
    moved = TRITON_OPS.experts_mlp(
        x.flip(0),
        torch.tensor(counts),
        TRITON_OPS.pack_weight(gate_up),
        TRITON_OPS.pack_weight(down),
        x_row=out_row,
        out_row=out_row,
    )
    assert torch.equal(moved, y.flip(0))
    for e, (rows, got) in enumerate(zip(torch.split(x, counts), torch.split(y, counts), strict=True)):
        inner_rows = TRITON_OPS.swiglu(TRITON_OPS.linear(rows, TRITON_OPS.pack_weight(gate_up[e])))
        torch.testing.assert_close(
            got, TRITON_OPS.linear(inner_rows, TRITON_OPS.pack_weight(down[e])), rtol=2**-8, atol=1e-3
        )


def test_refuses_what_does_not_fit() -> None:
    w, scale = fp8_weight(130, 256)
    with pytest.raises(ValueError, match="use pack_weight"):
        CPU_OPS.pack_block_fp8(w, scale)  # the CPU kernels
    with pytest.raises(ValueError, match="one scale per 128 x 128 block"):
        TRITON_OPS.pack_block_fp8(w, scale[:1])
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        TRITON_OPS.pack_block_fp8(w.float(), scale)
    with pytest.raises(ValueError, match=r"in torch\.bfloat16"):
        TRITON_OPS.linear(torch.ones(1, 256), TRITON_OPS.pack_block_fp8(w, scale))
    with pytest.raises(ValueError, match="does not take weights of pack_block_fp8"):
        TRITON_OPS.batched_linear(torch.ones(1, 1, 256).bfloat16(), TRITON_OPS.pack_block_fp8(w, scale))
