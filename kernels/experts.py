"""The experts of one MoE layer, and the weighted sum of their outputs."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .linear import PackedWeight, check_input, matmul_reference
from .registry import Kernel, register

shoal_swiglu = CFunction("shoal_swiglu", c_int64, c_void_p, c_int64, c_void_p, *[c_int64] * 3)
shoal_experts_mlp = CFunction(
    "shoal_experts_mlp",
    c_int64,
    c_void_p,
    c_int64,
    *[c_void_p] * 2,
    c_int64,
    *[c_void_p, c_int64] * 2,
    *[c_void_p] * 3,
    *[c_int64] * 3,
)
shoal_combine_topk = CFunction("shoal_combine_topk", c_int64, c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 4)


def swiglu(kernel: Kernel, gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2I] = [gate | up] in float32 or bfloat16 -> [T, I] in the same dtype.

    fp32 per element, silu(g) = g / (1 + e^-g), with the same e^x for every element index, one rounding.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in DTYPE_CODES:
        raise ValueError(f"swiglu needs [T, 2I] in float32 or bfloat16, got {list(gate_up.shape)} in {gate_up.dtype}")
    y: Tensor = kernel.run(gate_up)
    return y


def experts_mlp(
    kernel: Kernel,
    x: Tensor,
    num_tokens_per_expert: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    x_row: Tensor | None = None,
    out_row: Tensor | None = None,
) -> Tensor:
    """y = linear(swiglu(linear(x, gate_up[e])), down[e]) for the rows of each expert e, with exactly those bits.

    x: [N, H]. x_row: [R] int64, rows of x (not checked) grouped by expert, ascending; None: all rows in order.
    num_tokens_per_expert: [E] int64 summing to R, on the CPU, or on x's device for kernels of that device, which do not
    check the sum.
    gate_up: E weights [2I, H]. down: E weights [H, I].
    out_row: [R] int64, a permutation (not checked): output row of each input row; None: the same row.
    Returns [R, H] in x's dtype.
    """
    check_input(kernel, x, gate_up)
    experts = gate_up.num_matrices
    hidden = gate_up.in_features
    intermediate = down.in_features
    expected = (experts, hidden, gate_up.dtype, gate_up.backend)
    if (down.num_matrices, down.out_features, down.dtype, down.backend) != expected or (
        gate_up.out_features != 2 * intermediate
    ):
        raise ValueError("experts_mlp needs gate_up [E, 2I, H] and down [E, H, I] of one dtype and backend")
    counts = num_tokens_per_expert
    if (
        counts.dtype != torch.int64
        or counts.device not in (torch.device("cpu"), x.device)
        or counts.shape != (experts,)
    ):
        raise ValueError(f"num_tokens_per_expert must be [{experts}] int64 on the CPU, got {list(counts.shape)}")
    if x.dim() != 2:
        raise ValueError(f"experts_mlp needs x [R, H], got {list(x.shape)}")
    if x_row is not None and (x_row.dtype != torch.int64 or x_row.dim() != 1):
        raise ValueError(f"experts_mlp: x_row must be [R] int64, got {list(x_row.shape)} {x_row.dtype}")
    rows = len(x if x_row is None else x_row)
    if counts.is_cpu:
        per_expert = counts.tolist()
        if min(per_expert, default=0) < 0 or sum(per_expert) != rows:
            raise ValueError(f"experts_mlp: {rows} rows, num_tokens_per_expert {per_expert}: it must sum to the rows")
    if out_row is not None and (out_row.dtype != torch.int64 or out_row.shape != (rows,)):
        raise ValueError(f"experts_mlp: out_row must be [{rows}] int64, got {list(out_row.shape)}")
    y: Tensor = kernel.run(x, counts, gate_up, down, x_row, out_row)
    return y


def mlp(kernel: Kernel, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """linear(swiglu(linear(x, gate_up)), down), with exactly those bits: `experts_mlp` of one expert for all rows."""
    return experts_mlp(kernel, x, torch.full((1,), len(x), device=x.device), gate_up, down)


def combine_topk(
    kernel: Kernel, y: Tensor, row_of: Tensor, topk_weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """out[t] = sum over k = 0..K-1 of topk_weights[t, k] * y[row_of[t, k]], in that order, then + shared[t].

    y: [R, H] float32 or bfloat16. row_of: [T, K] int64, -1 for no contribution, checked on the CPU only.
    topk_weights: [T, K] float32. shared: [T, H] in y's dtype.
    Returns [T, H] in y's dtype: acc = acc + w * y from 0, each step rounded to fp32, the last one to y's dtype.
    """
    if row_of.dim() != 2 or row_of.dtype != torch.int64 or topk_weights.dtype != torch.float32:
        raise ValueError(f"combine_topk needs row_of [T, K] int64 and float32 weights, got {row_of.dtype}")
    if topk_weights.shape != row_of.shape or y.dim() != 2 or y.dtype not in DTYPE_CODES:
        raise ValueError(
            f"combine_topk: y {list(y.shape)}, row_of {list(row_of.shape)}, weights {list(topk_weights.shape)}"
        )
    if shared is not None and (shared.shape != (row_of.shape[0], y.shape[1]) or shared.dtype != y.dtype):
        raise ValueError(f"combine_topk: shared must be [T, H] in {y.dtype}, got {list(shared.shape)} {shared.dtype}")
    if (
        row_of.is_cpu
        and row_of.numel()
        and not -1 <= (limits := [int(x) for x in row_of.aminmax()])[0] <= limits[1] < y.shape[0]
    ):
        raise ValueError(f"combine_topk: row_of must lie in [-1, {y.shape[0]}), the rows of y")
    out: Tensor = kernel.run(y, row_of, topk_weights, shared)
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@register("swiglu", "cpu")
def _swiglu_cpu(gate_up: Tensor) -> Tensor:
    gate_up = _rows(gate_up)
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, intermediate)
    threads = num_threads(16 * y.numel())
    shoal_swiglu(DTYPE_CODES[y.dtype], gate_up.data_ptr(), gate_up.stride(0), y.data_ptr(), rows, intermediate, threads)
    return y


@register("experts_mlp", "cpu")
def _experts_mlp_cpu(
    x: Tensor,
    counts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    x_row: Tensor | None,
    out_row: Tensor | None,
) -> Tensor:
    x, counts = _rows(x), counts.contiguous()
    x_row, out_row = (None if rows is None else rows.contiguous() for rows in (x_row, out_row))
    rows, h = len(x if x_row is None else x_row), x.shape[1]
    hidden = x.new_empty(rows, down.in_features)
    y = x.new_empty(rows, h)
    shoal_experts_mlp(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        None if x_row is None else x_row.data_ptr(),
        counts.data_ptr(),
        gate_up.num_matrices,
        gate_up.data.data_ptr(),
        gate_up.format,
        down.data.data_ptr(),
        down.format,
        hidden.data_ptr(),
        y.data_ptr(),
        None if out_row is None else out_row.data_ptr(),
        h,
        down.in_features,
        num_threads(3 * hidden.numel() * h),
    )
    return y


@register("combine_topk", "cpu")
def _combine_topk_cpu(y: Tensor, row_of: Tensor, topk_weights: Tensor, shared: Tensor | None) -> Tensor:
    y = _rows(y)
    row_of = row_of.contiguous()
    topk_weights = topk_weights.contiguous()
    shared = None if shared is None else shared.contiguous()
    tokens, top_k = row_of.shape
    out = y.new_empty(tokens, y.shape[1])
    shoal_combine_topk(
        DTYPE_CODES[y.dtype],
        y.data_ptr(),
        y.stride(0),
        row_of.data_ptr(),
        topk_weights.data_ptr(),
        None if shared is None else shared.data_ptr(),
        out.data_ptr(),
        tokens,
        top_k,
        y.shape[1],
        num_threads(top_k * out.numel()),
    )
    return out


@register("swiglu", "reference")
def _swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@register("experts_mlp", "reference")
def _experts_mlp_reference(
    x: Tensor,
    counts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    x_row: Tensor | None,
    out_row: Tensor | None,
) -> Tensor:
    x = x if x_row is None else x[x_row]
    outputs = []
    for e, rows in enumerate(torch.split(x, counts.tolist())):
        hidden = _swiglu_reference(matmul_reference(rows, gate_up, e).to(x.dtype))
        outputs.append(matmul_reference(hidden, down, e).to(x.dtype))
    y = torch.cat(outputs) if outputs else x.new_empty(x.shape)
    return y if out_row is None else torch.empty_like(y).index_copy_(0, out_row, y)


@register("combine_topk", "reference")
def _combine_topk_reference(y: Tensor, row_of: Tensor, topk_weights: Tensor, shared: Tensor | None) -> Tensor:
    out = torch.zeros(row_of.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    for k in range(row_of.shape[1]):
        rows = row_of[:, k]
        present = rows >= 0
        out[present] += topk_weights[present, k, None] * y[rows[present]].float()
    return (out if shared is None else out + shared.float()).to(y.dtype)
