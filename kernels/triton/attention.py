"""`mla_attention`: flash attention in the absorbed form, over a KV cache in bf16, fp32 or FP8.

One program computes up to 64 heads of a token over SPLIT_KEYS keys of its list. Tiles and splits begin at fixed indices
of the list, and splits are merged in order, so a row's bits depend on its own list only: not on other rows, chunks,
block size or the number of heads. Softmax weights are rounded to the cache's dtype before the GEMM with the values. A
position without a slot makes its row NaN instead of raising an error, which would have to synchronise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import PagedLayout
from ..kv_format import FP8_CACHE
from ..registry import register
from .launch import decode_e4m3, dot, has_fp8, round_to, shared_memory

SPLIT_KEYS = 2048
"""Keys per split; part of the numeric contract, like the tiles below."""
BLOCK_HEADS = 64
"""Heads per tile, fixed so that the matrix instructions do not depend on the number of heads of a rank."""
MAX_PARTIAL_BYTES = 256 << 20
"""Maximum bytes of the splits' partial results; more tokens are processed in parts."""
FP8_LATENT_DIM, FP8_ROPE_DIM = 512, 64
_LOG2_E = 1.4426950408889634

NO_SLOT = tl.constexpr(-1)
BAD_SLOT = tl.constexpr(-2)


@triton.jit
def find_sequence(cu_seqlens_q, num_sequences, token, BLOCK_SEQUENCES: tl.constexpr):
    """Sequence of a token: the number of sequences that end at or before it."""
    sequences = tl.arange(0, BLOCK_SEQUENCES)
    ends = tl.load(cu_seqlens_q + 1 + sequences, mask=sequences < num_sequences, other=0x7FFFFFFF)
    return tl.sum((ends <= token).to(tl.int32), axis=0)


@triton.jit
def find_blocks(positions, inside, table, max_blocks, block_size):
    """Blocks of positions in a sequence's block table; negative unless `inside` and in the table."""
    index = positions // block_size
    return tl.load(table + index, mask=inside & (index < max_blocks), other=-1)


@triton.jit
def find_slots(positions, inside, table, max_blocks, block_size, num_slots):
    """Slots of positions in a sequence's block table; NO_SLOT unless `inside`, BAD_SLOT where there is no block."""
    block = find_blocks(positions, inside, table, max_blocks, block_size)
    slot = block * block_size + positions % block_size
    slot = tl.where((block < 0) | (slot >= num_slots), BAD_SLOT, slot)
    return tl.where(inside, slot, NO_SLOT)


@triton.jit
def list_kernel(
    selected,
    positions,
    cu_seqlens_q,
    block_tables,
    sequences,
    slots,
    lengths,
    num_sequences,
    width,
    max_blocks,
    block_size,
    num_slots,
    SPARSE: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's sequence, the length of its list and, with a selection, the slots of its list."""
    token = tl.program_id(0).to(tl.int64)
    sequence = find_sequence(cu_seqlens_q, num_sequences, token, BLOCK_SEQUENCES)
    tl.store(sequences + token, sequence)
    if SPARSE:
        entries = tl.arange(0, BLOCK)
        chosen = tl.load(selected + token * width + entries, mask=entries < width, other=-1)
        length = tl.min(tl.where(chosen < 0, tl.minimum(entries, width), width), axis=0)
        table = block_tables + sequence.to(tl.int64) * max_blocks
        slot = find_slots(chosen, entries < length, table, max_blocks, block_size, num_slots)
        tl.store(slots + token * width + entries, slot, mask=entries < width)
    else:
        length = tl.minimum(tl.load(positions + token) + 1, width).to(tl.int32)
    tl.store(lengths + token, length)


@triton.jit
def expand_kernel(block_tables, slots, width, max_blocks, block_size, num_slots, BLOCK: tl.constexpr):
    """Slots of a sequence's positions [0, width)."""
    sequence = tl.program_id(0).to(tl.int64)
    positions = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    table = block_tables + sequence * max_blocks
    slot = find_slots(positions, positions < width, table, max_blocks, block_size, num_slots)
    tl.store(slots + sequence * width + positions, slot, mask=positions < width)


@triton.jit
def _load_fp8_latents(values, scales, slot, entry_bytes, NATIVE_FP8: tl.constexpr, DTYPE: tl.constexpr):
    """[keys, 512] in DTYPE: FP8 codes times the scale of their group of 128; scales follow the codes."""
    rows = slot.to(tl.int64)[:, None, None]
    groups = tl.arange(0, 4)
    columns = tl.arange(0, 128)
    found = rows >= 0
    places = rows * entry_bytes + groups[None, :, None] * 128 + columns[None, None, :]
    codes = tl.load(values + places, mask=found, other=0)
    scale = tl.load(scales + rows * (entry_bytes // 4) + 128 + groups[None, :, None], mask=found, other=0)
    if NATIVE_FP8:
        widened = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        widened = decode_e4m3(codes).to(tl.float32)
    return tl.reshape(round_to(widened * scale, DTYPE), [slot.shape[0], 512])


@triton.jit
def mla_kernel(
    q_latent,
    latent_token_stride,
    latent_head_stride,
    q_rope,
    rope_token_stride,
    rope_head_stride,
    kv_cache,
    kv_stride,
    fp8_values,
    fp8_scales,
    slots,
    slots_stride,
    sequences,
    lengths,
    out,
    partial_out,
    partial_stats,
    num_tokens,
    num_heads,
    scale,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_OFFSET: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    SPARSE: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of a token's heads to one split of its list. `scale` includes log2(e).

    kv_stride is in elements of `kv_cache`, with FP8 in units of 16 bytes, so that loads know the alignment of rows.
    """
    if FP8:
        kv_stride *= 8
    head_blocks = tl.cdiv(num_heads, BLOCK_HEADS)
    token = (tl.program_id(0) // head_blocks).to(tl.int64)
    heads = tl.program_id(0) % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    begin = tl.program_id(1) * SPLIT_KEYS
    end = tl.minimum(begin + SPLIT_KEYS, tl.load(lengths + token))
    if SPLIT and begin >= end:
        return
    slots += (token if SPARSE else tl.load(sequences + token).to(tl.int64)) * slots_stride
    latents = tl.arange(0, BLOCK_LATENT)
    ropes = tl.arange(0, BLOCK_ROPE)
    has_head = (heads < num_heads)[:, None]
    q_latent += token * latent_token_stride + heads[:, None] * latent_head_stride
    q_rope += token * rope_token_stride + heads[:, None] * rope_head_stride
    query = tl.load(q_latent + latents[None, :], mask=has_head & (latents < LATENT)[None, :], other=0.0)
    query_rope = tl.load(q_rope + ropes[None, :], mask=has_head & (ropes < ROPE)[None, :], other=0.0)

    maximum = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    output = tl.zeros([BLOCK_HEADS, BLOCK_LATENT], tl.float32)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        entries = start + tl.arange(0, BLOCK_KEYS)
        slot = tl.load(slots + entries, mask=entries < end, other=NO_SLOT)
        found = (slot >= 0)[:, None]
        rows = kv_cache + slot.to(tl.int64)[:, None] * kv_stride
        key_rope = tl.load(rows + ROPE_OFFSET + ropes[None, :], mask=found & (ropes < ROPE)[None, :], other=0.0)
        if FP8:
            latent = _load_fp8_latents(fp8_values, fp8_scales, slot, kv_stride * 2, NATIVE_FP8, query.dtype)
        else:
            latent = tl.load(rows + latents[None, :], mask=found & (latents < LATENT)[None, :], other=0.0)
        scores = tl.zeros([BLOCK_HEADS, BLOCK_KEYS], tl.float32)
        scores = dot(query, tl.trans(latent), scores)
        scores = dot(query_rope, tl.trans(key_rope), scores) * scale
        scores += tl.where(slot >= 0, 0.0, tl.where(slot == BAD_SLOT, float("nan"), float("-inf")))[None, :]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(maximum - base)
        total = total * rescale + tl.sum(weights, axis=1)
        output = dot(round_to(weights, latent.dtype), latent, output * rescale[:, None])
        maximum = new_maximum

    offsets = token * num_heads + heads[:, None]
    stored = has_head & (latents < LATENT)[None, :]
    if SPLIT:
        offsets += tl.program_id(1).to(tl.int64) * num_tokens * num_heads
        tl.store(partial_out + offsets * LATENT + latents[None, :], output, mask=stored)
        tl.store(partial_stats + offsets * 2, maximum[:, None], mask=has_head)
        tl.store(partial_stats + offsets * 2 + 1, total[:, None], mask=has_head)
    else:
        output = output / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + offsets * LATENT + latents[None, :], round_to(output, out.dtype.element_ty), mask=stored)


@triton.jit
def merge_kernel(
    partial_out,
    partial_stats,
    lengths,
    out,
    num_tokens,
    num_heads,
    LATENT: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):
    """Merge the splits of one row in order; a single split keeps its bits."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // num_heads)
    latents = tl.arange(0, BLOCK_LATENT)
    output = tl.zeros([BLOCK_LATENT], tl.float32)
    maximum = float("-inf")
    total = 0.0
    offset = row
    for _ in range(tl.cdiv(length, SPLIT_KEYS)):
        part = tl.load(partial_out + offset * LATENT + latents, mask=latents < LATENT, other=0.0)
        part_maximum = tl.load(partial_stats + offset * 2)
        part_total = tl.load(partial_stats + offset * 2 + 1)
        new_maximum = tl.maximum(maximum, part_maximum)
        old, new = tl.exp2(maximum - new_maximum), tl.exp2(part_maximum - new_maximum)
        output = output * old + part * new
        total = total * old + part_total * new
        maximum = new_maximum
        offset += num_tokens * num_heads
    output = output / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * LATENT + latents, round_to(output, out.dtype.element_ty), mask=latents < LATENT)


def mla_options(dtype: torch.dtype, capability: tuple[int, int], shared_bytes: int, *, fp8: bool) -> dict[str, int]:
    """Launch options of `mla_kernel` by shared memory; BLOCK_KEYS is part of its numeric contract."""
    if dtype == torch.float32:
        return {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4}
    if capability[0] != 9:  # smaller shared memory on sm_80, yet smaller on others; on sm_100 the compiler needs more
        heads = BLOCK_HEADS if fp8 or shared_bytes >= 128 << 10 else 32
        return {"BLOCK_HEADS": heads, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 8}
    return {"BLOCK_HEADS": BLOCK_HEADS, "BLOCK_KEYS": 64, "STAGES": 1 if fp8 else 2, "num_warps": 8}


@register("mla_attention", "triton")
def mla_attention_triton(
    q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, layout: PagedLayout, scale: float, selected: Tensor | None
) -> Tensor:
    """An FP8 cache needs bf16 queries of 512 and 64 columns; ValueError for others."""
    if kv_cache.dtype == FP8_CACHE:
        dims = (q_latent.shape[2], q_rope.shape[2])
        if q_latent.dtype != torch.bfloat16 or dims != (FP8_LATENT_DIM, FP8_ROPE_DIM):
            raise ValueError(
                f"an FP8 cache needs bfloat16 queries [T, h, {FP8_LATENT_DIM}] and [T, h, {FP8_ROPE_DIM}] on a GPU, "
                f"got {list(dims)} in {q_latent.dtype}"
            )
        check_fp8_rows(kv_cache)
    kv_cache = kv_cache if kv_cache.stride(-1) == 1 else kv_cache.contiguous()
    return _attend(q_latent, q_rope, kv_cache, layout, scale, selected, fp8=kv_cache.dtype == FP8_CACHE)


def _fits_hopper_kernel(capability: tuple[int, int], kv_cache: Tensor, latent_dim: int, rope_dim: int) -> bool:
    """Whether attention_hopper.mla_kernel supports this cache on such a device: it copies 16 bytes at a time."""
    aligned = kv_cache.data_ptr() % 16 == 0 and kv_cache.stride(0) * kv_cache.element_size() % 16 == 0
    fits = kv_cache.dtype in (torch.bfloat16, torch.uint8) and (latent_dim, rope_dim) == (512, 64)
    return capability[0] == 9 and aligned and fits


def check_fp8_rows(kv_cache: Tensor) -> None:
    """ValueError unless entries of an FP8 cache begin at multiples of 16 bytes."""
    if kv_cache.stride(0) % 16 or kv_cache.data_ptr() % 16:
        raise ValueError(f"FP8 entries on a GPU begin at multiples of 16 bytes, these are {kv_cache.stride(0)} apart")


def _attend(
    q_latent: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    layout: PagedLayout,
    scale: float,
    selected: Tensor | None,
    *,
    fp8: bool,
) -> Tensor:
    q_latent, q_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope))
    num_tokens, num_heads, latent_dim = q_latent.shape
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    device = q_latent.device
    sequences, slots, lengths = find_lists(layout, kv_cache.shape[0], selected)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    by_hand = device.type == "cuda" and _fits_hopper_kernel(capability, kv_cache, latent_dim, q_rope.shape[2])
    options = mla_options(q_latent.dtype, capability, shared_memory(device), fp8=fp8)
    head_blocks = triton.cdiv(num_heads, options["BLOCK_HEADS"])
    num_splits = triton.cdiv(slots.shape[1], SPLIT_KEYS)
    step = num_tokens
    partial_out = partial_stats = out
    if num_splits > 1:
        step = min(step, max(1, MAX_PARTIAL_BYTES // (4 * num_splits * num_heads * latent_dim)))
        partial_out = torch.empty(num_splits * step * num_heads, latent_dim, dtype=torch.float32, device=device)
        partial_stats = torch.empty(num_splits * step * num_heads, 2, dtype=torch.float32, device=device)
    block_latent = max(16, triton.next_power_of_2(latent_dim))
    stored = (kv_cache, kv_cache.stride(0), kv_cache, kv_cache)
    if fp8:
        stored = (kv_cache.view(torch.bfloat16), kv_cache.stride(0) // 16, kv_cache, kv_cache.view(torch.float32))
    for first in range(0, num_tokens, step):
        chunk = slice(first, min(first + step, num_tokens))
        count = chunk.stop - first
        grid = (count * head_blocks, num_splits)
        queries = (
            q_latent[chunk],
            q_latent.stride(0),
            q_latent.stride(1),
            q_rope[chunk],
            q_rope.stride(0),
            q_rope.stride(1),
        )
        lists = (slots if selected is None else slots[chunk], slots.shape[1], sequences[chunk], lengths[chunk])
        results = (out[chunk], partial_out, partial_stats, count, num_heads, scale * _LOG2_E)
        splits = {"SPLIT_KEYS": SPLIT_KEYS, "SPARSE": selected is not None, "SPLIT": num_splits > 1}
        if by_hand:
            from . import attention_hopper as hopper  # here: it needs names of one version of Triton

            hopper.mla_kernel[grid](*queries, *stored, *lists, *results, **splits, FP8=fp8, num_warps=hopper.NUM_WARPS)
        else:
            mla_kernel[grid](
                *queries,
                *stored,
                *lists,
                *results,
                **splits,
                LATENT=latent_dim,
                ROPE=q_rope.shape[2],
                ROPE_OFFSET=(FP8_LATENT_DIM + 16) // 2 if fp8 else latent_dim,
                BLOCK_LATENT=block_latent,
                BLOCK_ROPE=max(16, triton.next_power_of_2(q_rope.shape[2])),
                FP8=fp8,
                NATIVE_FP8=has_fp8(device),
                **options,
            )
        if num_splits > 1:
            merge_kernel[(count * num_heads,)](
                partial_out,
                partial_stats,
                lengths[chunk],
                out[chunk],
                count,
                num_heads,
                LATENT=latent_dim,
                BLOCK_LATENT=block_latent,
                SPLIT_KEYS=SPLIT_KEYS,
            )
    return out


def find_lists(layout: PagedLayout, num_slots: int, selected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> (sequence of each token [T], slots of the key lists, number of keys of each token [T]).

    Slots are [T, topk] with a selection, otherwise [B, positions]: the tokens of a sequence share a list.
    """
    tables = layout.block_tables
    num_sequences, max_blocks = tables.shape
    num_tokens = layout.positions.shape[0]
    sequences, lengths = tables.new_empty(num_tokens), tables.new_empty(num_tokens)
    sizes = (max_blocks, layout.block_size, num_slots)
    if selected is None:
        # at least one position beyond the table, so that a context that is too long ends with a BAD_SLOT
        width = (max_blocks * layout.block_size // 16 + 1) * 16
        slots = tables.new_empty(num_sequences, width)
        expand_kernel[(num_sequences, triton.cdiv(width, 1024))](tables, slots, width, *sizes, BLOCK=1024)
    else:
        width = selected.shape[1]
        slots = torch.empty_like(selected, memory_format=torch.contiguous_format)
    list_kernel[(num_tokens,)](
        None if selected is None else selected.contiguous(),
        layout.positions,
        layout.cu_seqlens_q,
        tables,
        sequences,
        slots,
        lengths,
        num_sequences,
        width,
        *sizes,
        SPARSE=selected is not None,
        BLOCK_SEQUENCES=triton.next_power_of_2(num_sequences),
        BLOCK=triton.next_power_of_2(width),
    )
    return sequences, slots, lengths
