"""DeepGEMM's module as far as Shoal calls it: what it takes, and what it gives, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 4


def get_mk_alignment_for_contiguous_layout() -> int:
    return ALIGNMENT


def get_num_sms() -> int:
    return 3


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, grouped_layout: Tensor
) -> None:
    """d[m] = a[m] b[grouped_layout[m]]^T; tiles of ALIGNMENT rows are of one expert, which their first row names."""
    (x, x_scales), (w, w_scales) = a, b
    rows, channels = x.shape
    experts, columns, _ = w.shape
    assert x.dtype == w.dtype == torch.float8_e4m3fn
    assert x.is_contiguous()
    assert w.is_contiguous()
    assert d.is_contiguous()
    assert (w.shape, d.shape, d.dtype) == ((experts, columns, channels), (rows, columns), torch.bfloat16)
    assert x_scales.shape == (rows, -(-channels // 128))
    assert w_scales.shape == (experts, -(-columns // 128), -(-channels // 128))
    assert x_scales.dtype == w_scales.dtype == torch.float32
    assert (grouped_layout.shape, grouped_layout.dtype) == ((rows,), torch.int32)
    assert rows % ALIGNMENT == 0
    wide = x.float() * x_scales.repeat_interleave(128, dim=1)[:, :channels]
    blocks = w_scales.repeat_interleave(128, dim=1)[:, :columns].repeat_interleave(128, dim=2)[..., :channels]
    weights = w.float() * blocks
    for first in range(0, rows, ALIGNMENT):
        tile = slice(first, first + ALIGNMENT)
        expert = int(grouped_layout[first])
        assert set(grouped_layout[tile].tolist()) <= {expert, -1}
        d[tile] = torch.nan if expert < 0 else (wide[tile] @ weights[expert].T).bfloat16()


def get_paged_mqa_logits_metadata(context_lens: Tensor, block_kv: int, num_sms: int) -> Tensor:
    assert (context_lens.dim(), context_lens.dtype, context_lens.is_contiguous()) == (2, torch.int32, True)
    assert block_kv in (32, 64)
    return torch.full((num_sms + 1, 2), block_kv, dtype=torch.int32)


def fp8_paged_mqa_logits(
    q: Tensor,
    fused_kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
) -> Tensor:
    """q [b, next_n, heads, D] e4m3, pages of `page x D e4m3 | page x fp32` -> [b * next_n, max_context_len].

    What is beyond a context is NaN here, and anything in the library.
    """
    batch, next_n, heads, dim = q.shape
    pages, page, one, width = fused_kv_cache.shape
    assert (q.dtype, q.is_contiguous()) == (torch.float8_e4m3fn, True)
    assert heads in (32, 64)
    assert (one, width, fused_kv_cache.dtype) == (1, dim + 4, torch.uint8)
    assert (fused_kv_cache.stride(1), fused_kv_cache.stride(3)) == (dim + 4, 1)
    assert (weights.shape, weights.dtype, weights.stride(1)) == ((batch * next_n, heads), torch.float32, 1)
    assert (block_table.dtype, block_table.stride(1), len(block_table)) == (torch.int32, 1, batch)
    assert (context_lens.shape, context_lens.dtype) == ((batch, next_n), torch.int32)
    assert schedule_meta.tolist() == [[page, page]] * (get_num_sms() + 1)
    assert not clean_logits
    content = fused_kv_cache.reshape(pages, page * width)
    keys = content[:, : page * dim].contiguous().view(torch.float8_e4m3fn).view(pages, page, dim).float()
    scales = content[:, page * dim :].contiguous().view(torch.float32)
    logits = torch.full((batch * next_n, max_context_len), torch.nan)
    for row in range(batch * next_n):
        length = int(context_lens.flatten()[row])
        assert length <= max_context_len
        positions = torch.arange(length)
        blocks = block_table[row // next_n].long()[positions // page]
        dots = torch.relu(q.view(-1, heads, dim)[row].float() @ keys[blocks, positions % page].T)
        logits[row, :length] = (weights[row] @ dots) * scales[blocks, positions % page]
    return logits
