"""DeepGEMM for `experts_mlp` with FP8 weights and for `index_topk` of generated tokens over FP8 keys.

Rows are grouped by expert, and each group starts at a multiple of DeepGEMM's row alignment:

    pairs   | e0 e0 e0 | e2 e2 |                      rows without a pair have expert -1
    rows    | e0 e0 e0 -1 | e2 e2 -1 -1 | -1 .. |
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..attention import PagedLayout
from ..kv_format import FP8_CACHE
from ..linear import PackedWeight
from ..quant import BLOCK, scale_columns
from ..registry import register
from ..triton.experts import swiglu_triton
from ..triton.indexer import index_topk_triton
from ..triton.quant import quantize_token_groups_triton
from ..triton.topk import topk_positions_triton
from . import ModelProperties

INDEX_HEADS = (32, 64)
INDEX_PAGE_SIZE = 64


def check(device: torch.device) -> None:
    """ValueError unless the library computes a GEMM on this device."""
    library = _library()
    rows = library.get_mk_alignment_for_contiguous_layout()
    x = torch.zeros(rows, BLOCK, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
    w = torch.zeros(1, BLOCK, BLOCK, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
    y = torch.empty(rows, BLOCK, dtype=torch.bfloat16, device=device)
    scales = scale_columns(rows, BLOCK, device).fill_(1.0)
    layout = torch.zeros(rows, dtype=torch.int32, device=device)
    try:
        library.m_grouped_fp8_gemm_nt_contiguous((x, scales), (w, torch.ones(1, 1, 1, device=device)), y, layout)
    except Exception as error:  # its checks are C++ exceptions
        raise ValueError(f"vendor_kernels deep_gemm: the library does not run on {device}: {error}") from error


def check_model(model: ModelProperties) -> None:
    """ValueError for a model whose experts or index scores DeepGEMM does not compute."""
    check_scales(model.device, ue8m0=model.ue8m0_scales)
    check_experts(model.hidden_size, model.moe_intermediate_size, is_block_aligned=model.block_fp8_weights)
    if model.index_shape is not None and model.fp8_cache:
        check_index(*model.index_shape, model.block_size)


def check_index(num_heads: int, head_dim: int, page_size: int) -> None:
    """ValueError for an indexer or a page size that DeepGEMM has no kernel for."""
    if num_heads not in INDEX_HEADS or head_dim != BLOCK or page_size != INDEX_PAGE_SIZE:
        raise ValueError(
            f"deep_gemm scores an FP8 cache with block_size {INDEX_PAGE_SIZE}, index_head_dim {BLOCK} and "
            f"index_n_heads {' or '.join(map(str, INDEX_HEADS))}, not with {page_size}, {head_dim} and {num_heads}"
        )


def check_experts(hidden_size: int, intermediate_size: int, *, is_block_aligned: bool) -> None:
    """ValueError for experts' weights that DeepGEMM has no kernel for."""
    if not is_block_aligned or hidden_size % BLOCK or intermediate_size % BLOCK:
        raise ValueError(
            f"deep_gemm needs FP8 weights with a scale for each {BLOCK} x {BLOCK} block and whole blocks, the "
            f"model has hidden_size {hidden_size}, experts of {intermediate_size} and "
            + ("FP8 weights" if is_block_aligned else "other weights")
        )


def check_scales(device: torch.device, *, ue8m0: bool) -> None:
    """ValueError for scales that DeepGEMM does not support on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10 and not ue8m0:
        raise ValueError(
            "deep_gemm needs scales that are powers of two on sm_100 and newer, those of this model are not "
            "(its quantization_config has no scale_fmt ue8m0)"
        )


def _library() -> ModuleType:
    import deep_gemm  # type: ignore[import-not-found]

    module: ModuleType = deep_gemm
    return module


@register("experts_mlp", "deep_gemm")
def experts_mlp_deep_gemm(
    x: Tensor,
    counts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    x_row: Tensor | None,
    out_row: Tensor | None,
) -> Tensor:
    """Inputs of both GEMMs are quantised per row and 128 channels, as for Triton's kernels."""
    is_block_aligned = all(w.scale_inv is not None and not w.has_row_scales for w in (gate_up, down))
    check_experts(x.shape[1], down.in_features, is_block_aligned=is_block_aligned)
    num_rows = len(x if x_row is None else x_row)
    if num_rows == 0:
        return torch.empty_like(x[:0])
    place, layout = place_rows(
        counts.to(x.device, non_blocking=True), num_rows, _library().get_mk_alignment_for_contiguous_layout()
    )
    inputs = quantize_token_groups_triton(x, gate_up.ue8m0)
    if x_row is not None:
        inputs = (inputs[0].view(torch.uint8)[x_row].view(torch.float8_e4m3fn), inputs[1][x_row])
    gated = _grouped_gemm(_spread(inputs, place, len(layout)), gate_up, layout)
    inner = quantize_token_groups_triton(swiglu_triton(gated), down.ue8m0)
    y = _grouped_gemm(inner, down, layout)[place]
    return y if out_row is None else torch.empty_like(y).index_copy_(0, out_row, y)


def place_rows(counts: Tensor, num_rows: int, alignment: int) -> tuple[Tensor, Tensor]:
    """-> (row of each pair [num_rows] int64, expert of each row [M] int32, -1 for rows without a pair).

    counts: [E] number of pairs per expert; these come first among the num_rows, the rest share one unused row. M is an
    upper bound that depends on num_rows and E only.
    """
    num_experts = counts.shape[0]
    ends = counts.cumsum(0)
    aligned = (counts + alignment - 1) // alignment * alignment
    shift = aligned.cumsum(0) - aligned - (ends - counts)
    pairs = torch.arange(num_rows, device=counts.device)
    expert = torch.searchsorted(ends, pairs, right=True)
    exists = expert < num_experts
    used = (num_rows + num_experts * (alignment - 1)) // alignment * alignment
    place = torch.where(exists, pairs + shift[expert.clamp_max(num_experts - 1)], used)
    layout = torch.full((used + alignment,), -1, dtype=torch.int32, device=counts.device)
    layout[place] = torch.where(exists, expert, -1).int()
    return place, layout


def _spread(inputs: tuple[Tensor, Tensor], place: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Scatter quantised rows and their scales to `place` among `num_rows`; the other rows are undefined."""
    values, scales = inputs
    rows = torch.empty(num_rows, values.shape[1], dtype=torch.uint8, device=values.device)
    rows[place] = values.view(torch.uint8)
    row_scales = scale_columns(num_rows, values.shape[1], values.device)
    row_scales[place] = scales
    return rows.view(torch.float8_e4m3fn), row_scales


def _grouped_gemm(inputs: tuple[Tensor, Tensor], w: PackedWeight, layout: Tensor) -> Tensor:
    y = torch.empty(len(layout), w.out_features, dtype=torch.bfloat16, device=layout.device)
    _library().m_grouped_fp8_gemm_nt_contiguous(inputs, (w.data, w.scale_inv), y, layout)
    return y


@register("index_topk", "deep_gemm")
def index_topk_deep_gemm(q: Tensor, weights: Tensor, keys: Tensor, layout: PagedLayout, topk: int) -> Tensor:
    """Queries are quantised per token and head; slots are not checked.

    Caches in other dtypes and prompts use Triton's kernels; for prompts a tile of keys is shared by many tokens.
    """
    num_tokens, num_heads, dim = q.shape
    if keys.dtype != FP8_CACHE or not 0 < num_tokens <= layout.block_tables.shape[0]:
        return index_topk_triton(q, weights, keys, layout, topk)
    check_index(num_heads, dim, layout.block_size)
    library = _library()
    codes, scales = quantize_token_groups_triton(q.reshape(-1, dim), False)
    block_table = layout.block_tables[layout.sequence_of_tokens()].clamp(0, keys.shape[0] - 1)
    lengths = layout.positions + 1
    context_lens = lengths.int()[:, None]
    logits = library.fp8_paged_mqa_logits(
        codes.view(num_tokens, 1, num_heads, dim),
        keys.view(keys.shape[0], INDEX_PAGE_SIZE, 1, -1),
        weights * scales.view(num_tokens, num_heads),
        context_lens,
        block_table,
        library.get_paged_mqa_logits_metadata(context_lens, INDEX_PAGE_SIZE, library.get_num_sms()),
        block_table.shape[1] * layout.block_size,
        clean_logits=False,
    )
    return topk_positions_triton(logits, lengths, topk)
