"""FlashMLA's module as far as Shoal calls it: what it takes, and what it gives, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEADS = (64, 128)
FP8_ENTRY_BYTES = 656


class FlashMLASchedMeta:
    used = False


def get_mla_metadata(*_: object) -> tuple[FlashMLASchedMeta, None]:
    return FlashMLASchedMeta(), None


def flash_mla_sparse_fwd(
    q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """q [s_q, h_q, 576], kv [s_kv, 1, 576], indices [s_q, 1, topk], of which -1 and those from s_kv on are nobody's."""
    assert q.dim() == kv.dim() == indices.dim() == 3
    assert q.dtype == kv.dtype == torch.bfloat16
    assert indices.dtype == torch.int32
    assert q.shape[1] in HEADS
    assert (q.shape[2], kv.shape[1:], d_v) == (576, (1, 576), 512)
    assert indices.shape[:2] == (len(q), 1)
    assert indices.shape[2] % 128 == 0
    assert q.stride(2) == kv.stride(2) == indices.stride(2) == 1
    assert kv.stride(0) % 8 == 0, "rows are read 16 bytes at a time"
    assert int(indices.min()) >= -1, "other negative numbers are not looked at"
    chosen = indices[:, 0].long()
    here = (chosen >= 0) & (chosen < len(kv))
    keys = kv[chosen.where(here, 0), 0].float()
    return _attend(q, keys, here, sm_scale)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, s_q, h_q, 576]; k_cache [num_blocks, page, 1, 576] bf16, or 656 bytes a token with `indices`."""
    assert num_splits is None
    assert not tile_scheduler_metadata.used, "the fake knows no reuse"
    tile_scheduler_metadata.used = True
    assert softmax_scale is not None
    assert (q.dim(), q.shape[1], q.dtype, q.stride(3)) == (4, 1, torch.bfloat16, 1)
    assert q.shape[2] in HEADS
    assert (q.shape[3], head_dim_v) == (576, 512)
    num_blocks, page, one, width = k_cache.shape
    assert one == 1
    if indices is not None:
        assert is_fp8_kvcache
        assert not causal
        assert (width, k_cache.dtype) == (FP8_ENTRY_BYTES, torch.uint8)
        assert k_cache.stride(1) == FP8_ENTRY_BYTES, "the whole block must be contiguous"
        assert k_cache.stride(3) == 1
        assert (indices.dtype, indices.shape[:2]) == (torch.int32, (len(q), 1))
        assert indices.shape[2] % 64 == 0
        chosen = indices[:, 0].long()
        assert -1 <= int(chosen.min()) <= int(chosen.max()) < num_blocks * page
        slots = chosen.clamp_min(0)
        keys = _dequantize(k_cache[slots // page, slots % page, 0])
        out, _, lse = _attend(q[:, 0], keys, chosen >= 0, softmax_scale)
        return out[:, None], lse[:, :, None]
    assert block_table is not None
    assert cache_seqlens is not None
    assert not is_fp8_kvcache
    assert (page, width, k_cache.dtype, k_cache.stride(3)) == (64, 576, torch.bfloat16, 1)
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.stride(1) == 1
    assert cache_seqlens.is_contiguous()
    assert len(block_table) == len(cache_seqlens) == len(q)
    positions = torch.arange(block_table.shape[1] * page, device=q.device)
    here = positions < cache_seqlens[:, None]
    blocks = block_table.long()[:, positions // page].where(here, 0)
    keys = k_cache[blocks, positions % page, 0].float()
    out, _, lse = _attend(q[:, 0], keys, here, softmax_scale)
    return out[:, None], lse[:, :, None]


def _attend(q: Tensor, keys: Tensor, here: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, h, 576], keys [T, n, 576] fp32, here [T, n]."""
    keys = keys.where(here[:, :, None], 0.0)
    logits = torch.einsum("thd,tnd->thn", q.float(), keys) * scale
    logits = logits.masked_fill(~here[:, None], -math.inf)
    weights = torch.softmax(logits, dim=2).nan_to_num(0.0)
    out = torch.einsum("thn,tnd->thd", weights, keys[..., :512])
    return out.bfloat16(), logits.amax(2), logits.logsumexp(2)


def _dequantize(kv_cache: Tensor) -> Tensor:
    """[..., 656] bytes: 512 e4m3 | 4 fp32 scales | 64 bf16 -> [..., 576] fp32."""
    latent = kv_cache[..., :512].contiguous().view(torch.float8_e4m3fn).float()
    scales = kv_cache[..., 512:528].contiguous().view(torch.float32)
    rope = kv_cache[..., 528:656].contiguous().view(torch.bfloat16).float()
    return torch.cat([latent * scales.repeat_interleave(128, dim=-1), rope], dim=-1)
