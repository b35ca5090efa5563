"""Triton's products and row kernels on a device: parity with the reference at V3's widths, and rows on their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops
from shoal.kernels.quant import quantize_block_fp8
from shoal.kernels.rope import RopeTable, cos_sin_table, inv_freq
from tests.support.ops import REFERENCE_OPS

pytestmark = pytest.mark.gpu

R = TypeVar("R")
FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
KINDS = [FP32, BF16, FP8]
# Relative, of the whole result. FP8: the tensor cores add up products of FP8 numbers with fewer bits than fp32 has.
TOLERANCE = {FP32: 1e-6, BF16: 5e-5, FP8: 1e-3}


def randn(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


@functools.cache
def triton() -> Ops:
    return Ops("triton")


def on_both(call: Callable[[Ops], R]) -> tuple[R, R]:
    return call(triton()), call(REFERENCE_OPS)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def weight(ops: Ops, kind: torch.dtype, *shape: int, seed: int = 1) -> PackedWeight:
    w = randn(*shape, seed=seed) * shape[-1] ** -0.5
    if kind != FP8:
        return ops.pack_weight(w.to(kind))
    pairs = [quantize_block_fp8(m) for m in w.reshape(-1, *shape[-2:])]
    codes, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return ops.pack_block_fp8(codes, scales)


def inputs(kind: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=FP32 if kind == FP32 else BF16, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 576, 7168), (64, 256, 7168), (65, 1000, 512), (300, 4096, 1536)])
def test_linear(kind: torch.dtype, m: int, n: int, k: int) -> None:
    x = inputs(kind, m, k)
    y, expected = on_both(lambda ops: ops.linear(x, weight(ops, kind, n, k), out_dtype=FP32))
    assert error(y, expected) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", [FP32, BF16])
def test_batched_linear(kind: torch.dtype) -> None:
    x = inputs(kind, 70, 16, 192)[..., :128]
    y, expected = on_both(lambda ops: ops.batched_linear(x, weight(ops, kind, 16, 512, 128)))
    assert error(y, expected) < (1e-5 if kind == FP32 else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(4096, 1536), (1000, 7168)])
def test_a_row_has_the_same_bits_in_every_batch(kind: torch.dtype, n: int, k: int) -> None:
    x = inputs(kind, 1500, k)
    w = weight(triton(), kind, n, k)
    together = triton().linear(x, w, out_dtype=FP32)
    for size in (1, 3, 16, 64, 65, 128, 300):  # both sides of where tiles change
        for start in (0, 1, 127, 1200):
            assert torch.equal(
                triton().linear(x[start : start + size], w, out_dtype=FP32), together[start : start + size]
            )


@pytest.mark.parametrize("kind", KINDS)
def test_all_tiles_have_the_same_bits(kind: torch.dtype) -> None:
    # Not at the top: where there is no GPU there may be no Triton.
    from shoal.kernels.triton.gemm_config import TILES
    from shoal.kernels.triton.linear import Operands, gemm

    x = inputs(kind, 300, 7168)
    w = weight(triton(), kind, 1000, 7168)
    expected = triton().linear(x, w, out_dtype=FP32)
    for tiles in TILES[kind]:
        y = torch.full((1, 300, 1000), torch.nan, device="cuda")
        gemm(Operands.of(x.unsqueeze(0), w, tiles), y, tiles)
        assert torch.equal(y[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[0, 300, 5, 70], [1] * 32, [64, 65]])
def test_experts_have_the_bits_of_their_linear_layers(kind: torch.dtype, counts: list[int]) -> None:
    x, per_expert = inputs(kind, sum(counts), 512), torch.tensor(counts)

    def weights(ops: Ops) -> tuple[PackedWeight, PackedWeight]:
        return weight(ops, kind, len(counts), 512, 512), weight(ops, kind, len(counts), 512, 256, seed=2)

    y, expected = on_both(lambda ops: ops.experts_mlp(x, per_expert, *weights(ops)))
    # What lies between the two products rounds to bf16, then to FP8: some of it to the other side.
    assert error(y, expected) < {FP32: 1e-5, BF16: 1e-3, FP8: 2e-2}[kind]
    gate_up, down = weights(triton())
    assert torch.equal(triton().experts_mlp(x, per_expert.cuda(), gate_up, down), y)
    for e, (rows, got) in enumerate(zip(torch.split(x, counts), torch.split(y, counts), strict=True)):
        inner = triton().swiglu(triton().linear(rows, one_of(gate_up, e)))
        assert torch.equal(triton().linear(inner, one_of(down, e)), got)


def one_of(w: PackedWeight, index: int) -> PackedWeight:
    if w.scale_inv is not None:
        return triton().pack_block_fp8(w.data[index], w.scale_inv[index], ue8m0=w.ue8m0)
    return triton().pack_weight(w.data[index])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("dim", [128, 512, 1536, 7168])
def test_norms(dtype: torch.dtype, dim: int) -> None:
    x, w, b = randn(37, dim, dtype=dtype), randn(dim, seed=1), randn(dim, seed=2)
    tolerance = 1e-6 if dtype == FP32 else 1e-4
    assert error(*on_both(lambda ops: ops.rms_norm(x, w, 1e-6))) < tolerance
    assert error(*on_both(lambda ops: ops.layer_norm(x, w, b, 1e-6))) < tolerance
    (normed, total), (expected, expected_total) = on_both(lambda ops: ops.add_rms_norm(x.float(), x, w, 1e-6))
    assert error(normed, expected) < tolerance
    assert torch.equal(total, expected_total)
    assert torch.equal(
        torch.cat([triton().rms_norm(row, w, 1e-6) for row in torch.split(x, 1)]), triton().rms_norm(x, w, 1e-6)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    x = randn(37, 7168, dtype=dtype)
    for ue8m0 in (False, True):
        (q, scales), (expected_q, expected_scales) = on_both(
            lambda ops: ops.quantize_token_groups(x, ue8m0=ue8m0)  # noqa: B023
        )
        assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
        assert torch.equal(scales, expected_scales)
    table = cos_sin_table(inv_freq(64, 1e4), 100).cuda()
    positions = torch.randint(0, 100, (37,), device="cuda")
    heads = randn(37, 128, 192, dtype=dtype)[..., 128:]
    for interleaved in (False, True):
        rope = RopeTable(table, positions, interleaved)
        assert torch.equal(*on_both(lambda ops: ops.apply_rope(heads, rope)))  # noqa: B023
    row_of, weights = torch.randint(-1, 37, (20, 8), device="cuda"), randn(20, 8)
    assert torch.equal(*on_both(lambda ops: ops.combine_topk(x, row_of, weights)))


def test_routing_and_sampling() -> None:
    logits, bias = randn(300, 256), randn(256, seed=1) / 10
    sizes: dict[str, Any] = {"n_group": 8, "topk_group": 4, "top_k": 8}
    sizes |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
    (idx, weights), (expected_idx, expected_weights) = on_both(lambda ops: ops.route(logits, bias, **sizes))
    assert torch.equal(idx, expected_idx)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)
    vocabulary, index = randn(64, 129280) * 3, torch.arange(64, device="cuda")
    temperatures = (index % 4).float() / 2
    tokens, expected = on_both(
        lambda ops: ops.sample_tokens(vocabulary, temperatures, index * 7 - 99, index * 3, index % 2)
    )
    assert torch.equal(tokens, expected)
    bits = torch.randint(-(2**31), 2**31, (64, 129280 // 32), device="cuda").int()
    assert torch.equal(*on_both(lambda ops: ops.mask_logits(vocabulary, bits)))
