"""FlashMLA for `mla_attention`: its sparse kernel for a bf16 cache, its decode kernels for FP8 or dense attention.

Heads are padded with zeros to 64 or 128. The decode kernels treat every token as a sequence. Lists of selected
positions become lists of slots, padded with -1. Slots are not checked.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention import PagedLayout
from ..kv_format import FP8_CACHE
from ..registry import register
from ..triton.attention import find_lists
from . import ModelProperties

LATENT_DIM, ROPE_DIM = 512, 64
HEADS = (64, 128)
LIST_MULTIPLE = 128
"""Lists of keys are padded to a multiple of this, the kernels' tile size."""
PAGE_SIZE = 64
"""Page size of the dense kernel, in tokens."""
FP8_ENTRY_BYTES = 656


def check(device: torch.device) -> None:
    """ValueError unless the library computes attention on this device."""
    library = _library()
    q = torch.zeros(1, HEADS[0], LATENT_DIM + ROPE_DIM, dtype=torch.bfloat16, device=device)
    slots = torch.zeros(1, 1, LIST_MULTIPLE, dtype=torch.int32, device=device)
    try:
        library.flash_mla_sparse_fwd(q, q.transpose(0, 1), slots, 1.0)
        library.get_mla_metadata()
    except Exception as error:  # its checks are C++ exceptions and assertions
        raise ValueError(f"vendor_kernels flash_mla: the library does not run on {device}: {error}") from error


def check_model(model: ModelProperties) -> None:
    """ValueError for a model whose attention FlashMLA does not compute."""
    check_attention(
        model.dtype,
        (model.kv_lora_rank, model.qk_rope_head_dim),
        model.num_heads,
        fp8=model.fp8_cache,
        sparse=model.index_shape is not None,
        page_size=model.block_size,
    )


def _library() -> ModuleType:
    import flash_mla  # type: ignore[import-not-found]

    module: ModuleType = flash_mla
    return module


@register("mla_attention", "flash_mla")
def mla_attention_flash_mla(
    q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, layout: PagedLayout, scale: float, selected: Tensor | None
) -> Tensor:
    """ValueError for inputs that FlashMLA does not support: see `check_attention`."""
    num_tokens, num_heads, latent_dim = q_latent.shape
    fp8 = kv_cache.dtype == FP8_CACHE
    check_attention(
        q_latent.dtype,
        (latent_dim, q_rope.shape[2]),
        num_heads,
        fp8=fp8,
        sparse=selected is not None,
        page_size=layout.block_size,
    )
    if num_tokens == 0:
        return torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    q = pad(torch.cat([q_latent, q_rope], dim=2), (0, 0, 0, padded_heads(num_heads) - num_heads))
    if selected is None:
        block_table, lengths = layout.block_tables[layout.sequence_of_tokens()], (layout.positions + 1).int()
        out = _dense(q, kv_cache, block_table, lengths, scale)
    else:
        _, slots, _ = find_lists(layout, kv_cache.shape[0], selected)
        width = slots.shape[1]
        slots = pad(slots.clamp_min(-1), (0, -width % LIST_MULTIPLE), value=-1)
        out = _sparse_fp8(q, kv_cache, slots, layout.block_size, scale) if fp8 else _sparse(q, kv_cache, slots, scale)
    return out[:, :num_heads]


def check_attention(
    dtype: torch.dtype, dims: tuple[int, int], num_heads: int, *, fp8: bool, sparse: bool, page_size: int
) -> None:
    """ValueError for queries, numbers of heads, caches or pages that FlashMLA has no kernel for."""
    if dtype != torch.bfloat16 or dims != (LATENT_DIM, ROPE_DIM) or num_heads > HEADS[-1]:
        raise ValueError(
            f"flash_mla attends in bfloat16 with kv_lora_rank {LATENT_DIM}, qk_rope_head_dim {ROPE_DIM} and up to "
            f"{HEADS[-1]} heads on a rank, not in {dtype} with {dims[0]}, {dims[1]} and {num_heads}"
        )
    if fp8 and not sparse:
        raise ValueError("flash_mla reads an FP8 cache where attention is sparse, this model attends to all positions")
    if not sparse and page_size != PAGE_SIZE:
        raise ValueError(f"flash_mla attends to all positions with block_size {PAGE_SIZE}, not {page_size}")


def padded_heads(num_heads: int) -> int:
    """Smallest supported number of heads that is at least `num_heads`."""
    return next(heads for heads in HEADS if num_heads <= heads)


def _sparse(q: Tensor, kv_cache: Tensor, slots: Tensor, scale: float) -> Tensor:
    """q [T, H, 576], kv_cache [num_slots, >= 576] bf16, slots [T, topk] -> [T, H, 512]."""
    kv = kv_cache[:, None, : q.shape[2]]
    out: Tensor = _library().flash_mla_sparse_fwd(q, kv, slots[:, None], scale)[0]
    return out


def _sparse_fp8(q: Tensor, kv_cache: Tensor, slots: Tensor, page_size: int, scale: float) -> Tensor:
    library = _library()
    pages = kv_cache.view(-1, page_size, 1, kv_cache.shape[1])[..., :FP8_ENTRY_BYTES]
    out: Tensor
    out, _ = library.flash_mla_with_kvcache(
        q[:, None],
        pages,
        None,
        None,
        LATENT_DIM,
        library.get_mla_metadata()[0],
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=slots[:, None],
    )
    return out[:, 0]


def _dense(q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """block_table [T, max_blocks], lengths [T], both int32."""
    library = _library()
    pages = kv_cache.view(-1, PAGE_SIZE, 1, kv_cache.shape[1])[..., : q.shape[2]]
    out: Tensor
    out, _ = library.flash_mla_with_kvcache(
        q[:, None], pages, block_table, lengths, LATENT_DIM, library.get_mla_metadata()[0], softmax_scale=scale
    )
    return out[:, 0]
