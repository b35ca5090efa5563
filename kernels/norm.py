"""Normalisation over the last dimension, independently per row.

Contract, all three: the input is widened to fp32; sums run in fp32 over 16 lanes (lane j adds elements j, j + 16, ...
in order), the lanes add up in a fixed tree; the weight multiplies in fp32; one rounding to the output dtype.
The reference sums in torch's order, Triton's kernels in a tree that depends on D alone.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .registry import Kernel, register

shoal_rms_norm = CFunction("shoal_rms_norm", c_int64, c_void_p, *[c_int64] * 3, c_void_p, c_float, c_void_p, c_int64)
shoal_layer_norm = CFunction(
    "shoal_layer_norm", c_int64, c_void_p, *[c_int64] * 3, c_void_p, c_void_p, c_float, c_void_p, c_int64
)
shoal_add_rms_norm = CFunction(
    "shoal_add_rms_norm",
    *[c_int64] * 2,
    c_void_p,
    c_int64,
    c_void_p,
    *[c_int64] * 2,
    c_void_p,
    c_float,
    *[c_void_p] * 2,
    c_int64,
)


def rms_norm(kernel: Kernel, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: x [..., D] and weight [D], each fp32 or bf16 -> [..., D] in x's dtype."""
    _check("rms_norm", x, weight)
    y: Tensor = kernel.run(x, weight.float(), eps)
    return y


def layer_norm(kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias: x [..., D], weight and bias [D] -> [..., D] in x's dtype.

    The variance is the mean of (x - mean)^2, from a second pass over the row.
    """
    _check("layer_norm", x, weight)
    _check("layer_norm", x, bias)
    y: Tensor = kernel.run(x, weight.float(), bias.float(), eps)
    return y


def add_rms_norm(kernel: Kernel, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm of the sum, the sum), where the sum is x + residual in fp32, rounded to the residual's dtype.

    x: [..., D] in the residual's dtype or fp32. The norm is that of the rounded sum, so the two outputs agree.
    """
    _check("add_rms_norm", residual, weight)
    if x.shape != residual.shape or x.dtype not in (residual.dtype, torch.float32):
        raise ValueError(
            f"add_rms_norm needs x like the residual {list(residual.shape)} in {residual.dtype}, or in float32; "
            f"got {list(x.shape)} in {x.dtype}"
        )
    normed: Tensor
    total: Tensor
    normed, total = kernel.run(x, residual, weight.float(), eps)
    return normed, total


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:] or x.dtype not in DTYPE_CODES or weight.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{op} needs x [..., D] and weights [D] in float32 or bfloat16, got {list(x.shape)} in {x.dtype} "
            f"and {list(weight.shape)} in {weight.dtype}"
        )


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> rows [R, D] with contiguous elements."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@register("rms_norm", "cpu")
def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, weight = _rows(x), weight.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    shoal_rms_norm(
        DTYPE_CODES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        *rows.shape,
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        num_threads(x.numel()),
    )
    return out


@register("layer_norm", "cpu")
def _layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    rows = _rows(x)
    weight = weight.contiguous()
    bias = bias.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    shoal_layer_norm(
        DTYPE_CODES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        *rows.shape,
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        out.data_ptr(),
        num_threads(x.numel()),
    )
    return out


@register("add_rms_norm", "cpu")
def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    residual = residual.contiguous()
    weight = weight.contiguous()
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    shoal_add_rms_norm(
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[residual.dtype],
        rows.data_ptr(),
        rows.stride(0),
        residual.data_ptr(),
        *rows.shape,
        weight.data_ptr(),
        eps,
        normed.data_ptr(),
        total.data_ptr(),
        num_threads(x.numel()),
    )
    return normed, total


@register("rms_norm", "reference")
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@register("layer_norm", "reference")
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x.float() - x.float().mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


@register("add_rms_norm", "reference")
def _add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm_reference(total, weight, eps), total
