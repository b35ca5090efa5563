"""Lightning indexer of DeepSeek sparse attention: scores of all earlier positions, and top-k selection.

T tokens, Hi index heads of dimension D, S keys.
"""

from __future__ import annotations

from ctypes import POINTER, byref, c_int64, c_void_p
from itertools import pairwise

import torch
from torch import Tensor

from .attention import LayoutArgs, PagedLayout, slot_error
from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .kv_format import IndexKeys, index_keys_args, index_page_size, read_index_keys
from .registry import Kernel, register

shoal_index_topk = CFunction(
    "shoal_index_topk",
    c_int64,
    c_void_p,
    *[c_int64] * 2,
    c_void_p,
    *[c_int64] * 3,
    POINTER(LayoutArgs),
    POINTER(IndexKeys),
    c_int64,
    c_void_p,
    c_int64,
    POINTER(c_int64),
)
shoal_index_scores = CFunction(
    "shoal_index_scores",
    c_int64,
    c_void_p,
    c_void_p,
    *[c_int64] * 3,
    c_void_p,
    c_int64,
    c_void_p,
    c_int64,
)
shoal_topk_positions = CFunction("shoal_topk_positions", c_void_p, c_int64, c_void_p, *[c_int64] * 2, c_void_p, c_int64)


def index_topk(kernel: Kernel, q: Tensor, weights: Tensor, keys: Tensor, layout: PagedLayout, topk: int) -> Tensor:
    """The `topk` highest-scoring positions of each token's context -> [T, topk] int32, ascending, then -1.

    q: [T, Hi, D], weights: [T, Hi] fp32, keys: pages [num_blocks, block_size * width] in q's dtype or in FP8, in the
    format of kernels/kv_format.py, contiguous. A context (positions 0..positions[t]) of at most topk positions is
    returned whole, unscored. Otherwise scores are those of `index_scores` and the selection is that of
    `topk_positions`, so both depend on the token and its context only. ValueError for a context outside the block table
    or the pages.
    """
    _check_queries("index_topk", q, weights, topk)
    page_size = index_page_size("index_topk", keys, q.shape[2], q.dtype)
    if page_size != layout.block_size:
        raise ValueError(
            f"index_topk: a page holds {page_size} index keys, but a block of the layout {layout.block_size}"
        )
    if q.shape[0] != layout.num_tokens:
        raise ValueError(f"index_topk: {q.shape[0]} query tokens, but the layout has {layout.num_tokens}")
    selected: Tensor = kernel.run(q, weights, keys, layout, topk)
    return selected


def index_scores(kernel: Kernel, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """score[t, s] = sum over heads h ascending of weights[t, h] * relu(q[t, h] . keys[s]) -> [T, S] fp32.

    q: [T, Hi, D] and keys: [S, D], both fp32 or both bf16; weights: [T, Hi] fp32, of any sign.
    bf16 is widened to fp32; a dot is one fma chain from 0 over ascending columns; products and sums over heads round.
    """
    _check_queries("index_scores", q, weights, 1)
    if keys.dim() != 2 or keys.dtype != q.dtype or keys.shape[1] != q.shape[2]:
        raise ValueError(
            f"index_scores needs keys [S, {q.shape[2]}] in {q.dtype}, got {list(keys.shape)} in {keys.dtype}"
        )
    scores: Tensor = kernel.run(q, weights, keys)
    return scores


def topk_positions(kernel: Kernel, scores: Tensor, lengths: Tensor, topk: int) -> Tensor:
    """Positions of the `topk` highest of each row's first lengths[t] scores -> [T, topk] int32, ascending, then -1.

    scores: [T, S] fp32, lengths: [T] int64, checked on the CPU only. Order is (score descending, position
    ascending), -0 equal to 0, NaN below -infinity, so the selection is unique.
    """
    if scores.dim() != 2 or scores.dtype != torch.float32 or lengths.shape != scores.shape[:1] or topk < 1:
        raise ValueError(f"topk_positions needs scores [T, S] in float32, lengths [T] and topk >= 1, got topk={topk}")
    outside = lengths.is_cpu and bool(((lengths < 0) | (lengths > scores.shape[1])).any())
    if lengths.dtype != torch.int64 or outside:
        raise ValueError(f"topk_positions: lengths must be int64 in [0, {scores.shape[1]}]")
    selected: Tensor = kernel.run(scores, lengths, topk)
    return selected


def _check_queries(op: str, q: Tensor, weights: Tensor, topk: int) -> None:
    if q.dim() != 3 or q.dtype not in DTYPE_CODES or weights.shape != q.shape[:2] or weights.dtype != torch.float32:
        raise ValueError(
            f"{op} needs q [T, Hi, D] in float32 or bfloat16 and weights [T, Hi] in float32, got {list(q.shape)} in "
            f"{q.dtype} and {list(weights.shape)} in {weights.dtype}"
        )
    if topk < 1:
        raise ValueError(f"{op} needs topk >= 1, got {topk}")


@register("index_topk", "cpu")
def _index_topk_cpu(q: Tensor, weights: Tensor, keys: Tensor, layout: PagedLayout, topk: int) -> Tensor:
    q, weights = q if q.stride(-1) == 1 else q.contiguous(), weights.contiguous()
    out = torch.empty(q.shape[0], topk, dtype=torch.int32)
    status = c_int64()
    shoal_index_topk(
        DTYPE_CODES[q.dtype],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        weights.data_ptr(),
        *q.shape,
        byref(layout.args()),
        byref(index_keys_args(keys, q.shape[2])),
        topk,
        out.data_ptr(),
        num_threads(q.numel() * topk),
        byref(status),
    )
    if status.value:
        raise slot_error("index_topk")
    return out


@register("index_scores", "cpu")
def _index_scores_cpu(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    q = q.contiguous()
    weights = weights.contiguous()
    keys = keys.contiguous()
    out = torch.empty(q.shape[0], keys.shape[0])
    shoal_index_scores(
        DTYPE_CODES[q.dtype],
        q.data_ptr(),
        weights.data_ptr(),
        *q.shape,
        keys.data_ptr(),
        keys.shape[0],
        out.data_ptr(),
        num_threads(q.numel() * keys.shape[0]),
    )
    return out


@register("topk_positions", "cpu")
def _topk_positions_cpu(scores: Tensor, lengths: Tensor, topk: int) -> Tensor:
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    lengths = lengths.contiguous()
    out = torch.empty(scores.shape[0], topk, dtype=torch.int32)
    shoal_topk_positions(
        scores.data_ptr(),
        scores.stride(0),
        lengths.data_ptr(),
        scores.shape[0],
        topk,
        out.data_ptr(),
        num_threads(8 * scores.numel()),
    )
    return out


@register("index_topk", "reference")
def _index_topk_reference(q: Tensor, weights: Tensor, keys: Tensor, layout: PagedLayout, topk: int) -> Tensor:
    out = torch.full((q.shape[0], topk), -1, dtype=torch.int32, device=q.device)
    bounds = layout.cu_seqlens_q.tolist()
    for sequence, (first, last) in enumerate(pairwise(bounds)):
        for t in range(first, last):
            context = int(layout.positions[t]) + 1
            if context <= topk:
                out[t, :context] = torch.arange(context, dtype=torch.int32, device=q.device)
                continue
            try:
                slots = layout.slots(sequence, torch.arange(context, device=q.device))
                context_keys = read_index_keys(keys, slots, q.shape[2], q.dtype)
            except IndexError as error:
                raise slot_error("index_topk") from error
            scores = _index_scores_reference(q[t : t + 1], weights[t : t + 1], context_keys)
            out[t] = _topk_positions_reference(scores, torch.tensor([context]), topk)[0]
    return out


@register("index_scores", "reference")
def _index_scores_reference(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    scores = torch.zeros(q.shape[0], keys.shape[0], device=q.device)
    for head in range(q.shape[1]):
        dots = q[:, head].float() @ keys.float().T
        scores = scores + weights[:, head, None] * torch.relu(dots)
    return scores


@register("topk_positions", "reference")
def _topk_positions_reference(scores: Tensor, lengths: Tensor, topk: int) -> Tensor:
    out = torch.full((scores.shape[0], topk), -1, dtype=torch.int32, device=scores.device)
    for t, length in enumerate(lengths.tolist()):
        row = scores[t, :length].tolist()
        best = sorted(range(length), key=lambda s: (row[s] != row[s], -row[s] if row[s] == row[s] else 0.0, s))
        chosen = sorted(best[:topk])
        out[t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32, device=out.device)
    return out
