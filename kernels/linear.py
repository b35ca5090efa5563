"""Linear layers whose bits depend only on the input row and the weight row.

Contract: y[i, j] is one fp32 chain over k ascending, `acc = fma(x[i, k], w[j, k], acc)` from 0, with bf16 operands
widened to fp32 (exact), and one rounding to the output dtype (to nearest, ties to even). So the number of rows, columns
or threads and splits of the output do not change a bit. The reference backend has the same dtypes and roundings with
torch's order of sums; Triton's kernels have an order of their own, the same for every row (kernels/triton/gemm.py).

Block-scaled FP8 weights stay in 8 bits; results are bit-identical to dequantising first: a panel is dequantised when it
is used, each element rounded once to the input's dtype. Triton's kernels quantise bf16 inputs to FP8 instead: y = sum
over blocks of 128 columns, ascending, of (fp32 dot product of the block) * (scale of the input row * scale of the
weight row), in fp32, with one rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backends import Backend
from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .math_utils import cdiv, round_up
from .quant import BLOCK, BlockFP8Weight, quantize_token_groups_reference
from .registry import Kernel, register

FP8_CODE = 2
PANEL = 16
ALIGNMENT = 16
"""Rows of Triton's weights are padded to a multiple of this many bytes."""

shoal_pack_weight = CFunction("shoal_pack_weight", c_int64, c_void_p, c_int64, c_int64, c_void_p, *[c_int64] * 4)
shoal_pack_fp8 = CFunction("shoal_pack_fp8", c_int64, *[c_void_p] * 3, *[c_int64] * 3)
shoal_linear = CFunction(
    "shoal_linear", *[c_int64] * 2, c_void_p, *[c_int64] * 2, c_void_p, c_int64, c_void_p, *[c_int64] * 7
)


@dataclass(frozen=True)
class PackedWeight:
    """`num_matrices` weights [out_features, in_features] in the layout of `backend`'s GEMM.

    cpu: [num_matrices, ceil(N / 16), ceil(K / width), 16, width], width 1 for fp32 and 2 for bf16, padded with zeros;
    in FP8 [num_matrices, ceil(N / 16), bytes of a panel] uint8, as kernels/cpu/fp8.h says.
    reference: [num_matrices, N, K]. triton: the same, K padded with zeros to a multiple of 16 bytes.
    """

    data: Tensor
    num_matrices: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Dtype of the GEMM's inputs."""
    backend: Backend
    is_fp8: bool = False
    scale_inv: Tensor | None = None
    """FP8 GEMMs only: [num_matrices, ceil(N / 128), ceil(K / 128)] float32, a scale per 128 x 128 block, or
    [num_matrices, N + 128, ceil(K / 128)] one per row, for rows sliced or concatenated off block boundaries."""
    ue8m0: bool = False
    """FP8 GEMMs only: input scales are rounded up to powers of two."""

    @property
    def has_row_scales(self) -> bool:
        return self.scale_inv is not None and self.scale_inv.shape[1] != cdiv(self.out_features, BLOCK)

    def matrices(self, part: slice) -> PackedWeight:
        """A slice of the weights, which have no scales."""
        assert self.scale_inv is None
        data = self.data[part]
        return replace(self, data=data, num_matrices=len(data))

    @property
    def format(self) -> int:
        """The compiled kernels' code of the format of `data`."""
        return FP8_CODE if self.is_fp8 else DTYPE_CODES[self.dtype]


def pack_weight(
    kernel: Kernel, w: Tensor | BlockFP8Weight, *, dtype: torch.dtype | None = None, ue8m0: bool = False
) -> PackedWeight:
    """Pack a weight [N, K] or weights [B, N, K] (fp32 or bf16, any strides) for the GEMMs of the kernel's backend.

    A block-scaled FP8 weight is packed for inputs in `dtype`; on a backend that quantises bf16 inputs for it,
    `ue8m0` rounds their scales up to powers of two.
    """
    backend = kernel.backend
    if isinstance(w, BlockFP8Weight):
        assert dtype in DTYPE_CODES, "an FP8 weight needs the dtype of its inputs"
        if backend == "cpu":
            return _pack_fp8_cpu(w, dtype)
        if backend == "triton" and dtype == torch.bfloat16:
            rows = w.scales[::BLOCK] if w.is_block_aligned else torch.nn.functional.pad(w.scales, (0, 0, 0, BLOCK))
            return _packed_fp8(kernel, w.values.unsqueeze(0), rows.unsqueeze(0), ue8m0=ue8m0)
        w = w.dequantize(dtype)
    if w.dim() not in (2, 3) or w.dtype not in DTYPE_CODES:
        raise ValueError(
            f"a weight must be [N, K] or [B, N, K] in float32 or bfloat16, got {list(w.shape)} in {w.dtype}: "
            "convert it first"
        )
    stacked = w if w.dim() == 3 else w.unsqueeze(0)
    data: Tensor = kernel.run(stacked)
    batch, n, k = stacked.shape
    return PackedWeight(data, batch, n, k, w.dtype, backend)


def pack_block_fp8(kernel: Kernel, w: Tensor, scale_inv: Tensor, *, ue8m0: bool = False) -> PackedWeight:
    """Pack an FP8 weight [N, K] or weights [B, N, K] float8_e4m3fn with block scales for FP8 GEMMs.

    Inputs are bf16, quantised first (`quantize_token_groups` with `ue8m0`). ValueError on the CPU backend, which has no
    FP8 GEMM: use `pack_weight` there.
    """
    stacked, scales = (w, scale_inv) if w.dim() == 3 else (w.unsqueeze(0), scale_inv.unsqueeze(0))
    batch, n, k = stacked.shape
    if w.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32:
        raise ValueError(f"an FP8 weight is float8_e4m3fn with float32 scales, got {w.dtype}, {scale_inv.dtype}")
    if scales.shape != (batch, cdiv(n, BLOCK), cdiv(k, BLOCK)):
        raise ValueError(
            f"an FP8 weight {list(w.shape)} has one scale per 128 x 128 block, got {list(scale_inv.shape)}"
        )
    if kernel.backend == "cpu":
        raise ValueError("the CPU kernels have no FP8 GEMM: use pack_weight(BlockFP8Weight)")
    return _packed_fp8(kernel, stacked, scales, ue8m0=ue8m0)


def _packed_fp8(kernel: Kernel, values: Tensor, scales: Tensor, *, ue8m0: bool) -> PackedWeight:
    """values: [B, N, K]; scales as `PackedWeight.scale_inv`."""
    data: Tensor = kernel.run(values)
    batch, n, k = values.shape
    return PackedWeight(
        data, batch, n, k, torch.bfloat16, kernel.backend, is_fp8=True, scale_inv=scales.contiguous(), ue8m0=ue8m0
    )


def pack_each(
    kernel: Kernel, weights: Iterable[PackedWeight], num_matrices: int, shape: tuple[int, int], dtype: torch.dtype
) -> PackedWeight:
    """`num_matrices` packed weights [N, K] = `shape` for inputs in `dtype`, stacked, consuming them one at a time.

    With a generator at most one unpacked weight exists at a time; `num_matrices` may be 0. ValueError unless all are in
    FP8 or none.
    """
    stacked: PackedWeight | None = None
    for index, weight in enumerate(weights):
        if stacked is None:
            data, scales = (
                None if part is None else part.new_empty(num_matrices, *part.shape[1:])
                for part in (weight.data, weight.scale_inv)
            )
            assert data is not None
            stacked = replace(weight, data=data, scale_inv=scales, num_matrices=num_matrices)
        if (weight.out_features, weight.in_features) != shape or weight.is_fp8 != stacked.is_fp8:
            raise ValueError("the weights of a layer's experts must have one shape and be all in FP8 or none")
        stacked.data[index] = weight.data[0]
        if stacked.scale_inv is not None:
            assert weight.scale_inv is not None
            stacked.scale_inv[index] = weight.scale_inv[0]
    return stacked or pack_weight(kernel, torch.empty(0, *shape, dtype=dtype))


def linear(kernel: Kernel, x: Tensor, w: PackedWeight, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = x w^T: x [..., K] in the weight's dtype -> [..., N] in `out_dtype` (float32 or bfloat16, by default x's)."""
    if w.num_matrices != 1:
        raise ValueError(f"linear takes one weight matrix, this one holds {w.num_matrices}: use batched_linear")
    check_input(kernel, x, w)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in DTYPE_CODES:
        raise ValueError(f"linear returns float32 or bfloat16, not {out_dtype}")
    y: Tensor = kernel.run(x, w, out_dtype)
    return y


def batched_linear(kernel: Kernel, x: Tensor, w: PackedWeight) -> Tensor:
    """y[:, b] = x[:, b] w[b]^T: x [T, B, K], last dimension contiguous -> [T, B, N] in x's dtype."""
    check_input(kernel, x, w)
    if w.scale_inv is not None:
        raise ValueError("batched_linear does not take weights of pack_block_fp8: dequantize them")
    if x.dim() != 3 or x.shape[1] != w.num_matrices:
        raise ValueError(f"batched_linear needs x [T, {w.num_matrices}, {w.in_features}], got {list(x.shape)}")
    y: Tensor = kernel.run(x, w)
    return y


def check_input(kernel: Kernel, x: Tensor, w: PackedWeight) -> None:
    """ValueError unless x [..., K] fits the weight, and the weight's layout the kernel."""
    op = kernel.op
    if w.backend != kernel.backend:
        raise ValueError(
            f"{op}: the weight is packed for kernels {w.backend!r} and these are {kernel.backend!r}: pack it with "
            f"pack_weight of the same Ops"
        )
    if x.dim() == 0 or x.shape[-1] != w.in_features or x.dtype != w.dtype:
        raise ValueError(f"{op} needs x [..., {w.in_features}] in {w.dtype}, got {list(x.shape)} in {x.dtype}")
    if w.backend == "cpu" and not x.is_cpu:
        raise ValueError(f"{op}: the weight is packed for the CPU and x is on {x.device}: move x to the CPU")


@register("pack_weight", "cpu")
def _pack_weight_cpu(w: Tensor) -> Tensor:
    if not w.is_cpu:
        raise ValueError(f"the CPU kernels cannot pack a weight on {w.device}: move it to the CPU")
    if w.stride(2) != 1:
        w = w.contiguous()
    batch, n, k = w.shape
    width = 2 if w.dtype == torch.bfloat16 else 1
    data = w.new_empty(batch, cdiv(n, PANEL), cdiv(k, width), PANEL, width)
    shoal_pack_weight(
        DTYPE_CODES[w.dtype],
        w.data_ptr(),
        w.stride(0),
        w.stride(1),
        data.data_ptr(),
        batch,
        n,
        k,
        num_threads(w.numel()),
    )
    return data


def _pack_fp8_cpu(w: BlockFP8Weight, dtype: torch.dtype) -> PackedWeight:
    (n, k), width = w.values.shape, 2 if dtype == torch.bfloat16 else 1
    values, scales = w.values.contiguous(), w.scales.contiguous()
    panel_bytes = PANEL * (round_up(k, width) + 4 * cdiv(k, BLOCK))
    data = torch.empty(1, cdiv(n, PANEL), panel_bytes, dtype=torch.uint8)
    shoal_pack_fp8(
        DTYPE_CODES[dtype], values.data_ptr(), scales.data_ptr(), data.data_ptr(), n, k, num_threads(values.numel())
    )
    return PackedWeight(data, 1, n, k, dtype, "cpu", is_fp8=True)


@register("linear", "cpu")
def _linear_cpu(x: Tensor, w: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, w.in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = x.new_empty(*x.shape[:-1], w.out_features, dtype=out_dtype)
    _gemm(rows, (0, rows.stride(0)), w, y, (0, w.out_features))
    return y


@register("batched_linear", "cpu")
def _batched_linear_cpu(x: Tensor, w: PackedWeight) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    n = w.out_features
    y = x.new_empty(x.shape[0], w.num_matrices, n)
    _gemm(x, (x.stride(1), x.stride(0)), w, y, (n, w.num_matrices * n))
    return y


def _gemm(x: Tensor, x_strides: tuple[int, int], w: PackedWeight, y: Tensor, y_strides: tuple[int, int]) -> None:
    """y[b, i] = x[b, i] w[b]^T for all matrices b and rows i; strides are those of b and i."""
    shoal_linear(
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[y.dtype],
        x.data_ptr(),
        *x_strides,
        w.data.data_ptr(),
        w.format,
        y.data_ptr(),
        *y_strides,
        w.num_matrices,
        x.shape[0],
        w.out_features,
        w.in_features,
        num_threads(y.numel() * w.in_features),
    )


@register("pack_weight", "reference")
def _pack_weight_reference(w: Tensor) -> Tensor:
    return w.contiguous()


@register("linear", "reference")
def _linear_reference(x: Tensor, w: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    return matmul_reference(x, w, 0).to(out_dtype)


def matmul_reference(x: Tensor, w: PackedWeight, index: int) -> Tensor:
    """x [..., K] times the transpose of matrix `index`, in fp32."""
    if w.scale_inv is None:
        return x.float() @ w.data[index].float().T
    rows = x.reshape(-1, w.in_features)
    q, scales = quantize_token_groups_reference(rows, w.ue8m0)
    wide = q.float() * scales.repeat_interleave(BLOCK, dim=1)[:, : w.in_features]
    if w.has_row_scales:
        stored = BlockFP8Weight(w.data[index], w.scale_inv[index, : w.out_features], is_block_aligned=False)
    else:
        stored = BlockFP8Weight.of_rows(w.data[index], w.scale_inv[index])
    weight = stored.dequantize(torch.float32)
    y: Tensor = wide @ weight.T
    return y.view(*x.shape[:-1], w.out_features)


@register("batched_linear", "reference")
def _batched_linear_reference(x: Tensor, w: PackedWeight) -> Tensor:
    return torch.einsum("tbk,bnk->tbn", x.float(), w.data.float()).to(x.dtype)


def packed_num_bytes(
    shape: tuple[int, int], dtype: torch.dtype, backend: Backend, *, fp8: bool = False, row_scales: bool = False
) -> int:
    """Bytes of a packed weight [N, K] for inputs in `dtype`: `data` and `scale_inv` of what `pack_weight` returns.

    fp8: packed from a `BlockFP8Weight`. row_scales: its rows were sliced or concatenated off block boundaries.
    """
    n, k = shape
    blocks = cdiv(k, BLOCK)
    if backend == "cpu":
        width = 2 if dtype == torch.bfloat16 else 1
        columns = round_up(k, width)
        return round_up(n, PANEL) * (columns + 4 * blocks if fp8 else columns * dtype.itemsize)
    fp8 = fp8 and backend == "triton" and dtype == torch.bfloat16
    itemsize = 1 if fp8 else dtype.itemsize
    columns = round_up(k * itemsize, ALIGNMENT) // itemsize if backend == "triton" else k
    scales = n + BLOCK if row_scales else cdiv(n, BLOCK)
    return n * columns * itemsize + (4 * scales * blocks if fp8 else 0)
