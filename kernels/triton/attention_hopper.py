"""`mla_kernel` of attention.py for cache entries of 512 + 64 columns on sm_90, with its layouts and copies by hand.

Tiles of 64 keys are processed in pairs by three warp groups of four warps: one copies cache entries, two compute. The
first of these scores the even tiles and accumulates the left half of the output, the second the odd tiles and the right
half; they exchange softmax weights, stored over the tile's rotary keys, and the running maximum, so that the GEMM of
one overlaps with the exponentials of the other. FP8 latents are widened to bf16 by the copying group, which loads the
next keys before it widens the last ones. The numeric contract is that of attention.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NUM_WARPS = 4


@gluon.jit
def _load_slots(slots, start, end, count: gl.constexpr, layout: gl.constexpr):
    entries = start + gl.arange(0, count, layout=layout)
    return gl.load(slots + entries, mask=entries < end, other=-1)


@gluon.jit
def _copy(kv_cache, kv_stride, slot, column: gl.constexpr, tile, layout: gl.constexpr):
    """Start to copy some columns of the entries in these slots; rows without an entry become zero."""
    columns = column + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    rows = kv_cache + slot.to(gl.int64) * kv_stride
    pointers = gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0)
    async_copy.async_copy_global_to_shared(tile, pointers, mask=gl.expand_dims(slot >= 0, 1))


@gluon.jit
def _load_codes(codes, scales, kv_stride, slot, column: gl.constexpr, layout: gl.constexpr):
    """256 codes of each key, starting at `column`, in two groups of 128, and the two scales of each key."""
    found = slot >= 0
    rows = slot.to(gl.int64) * kv_stride
    columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    pointers = codes + gl.expand_dims(rows * 16, 1) + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(found, 1)
    first = gl.load(pointers, mask=mask, other=0)
    second = gl.load(pointers + 128, mask=mask, other=0)
    scale = scales + rows * 4 + 128 + column // 128
    return first, second, gl.load(scale, mask=found, other=0.0), gl.load(scale + 1, mask=found, other=0.0)


@gluon.jit
def _widen(tile, codes, scale, column: gl.constexpr):
    """128 columns of keys in shared memory: codes times the key's scale, rounded to bf16."""
    values = codes.to(gl.float8e4nv, bitcast=True).to(gl.float32) * gl.expand_dims(scale, 1)
    tile.slice(column, 128, dim=1).store(values.to(gl.bfloat16))


@gluon.jit
def _widen_tiles(kv_cache, codes, scales, kv_stride, slots, begin, end, latents, ropes, full, free):
    """`_copy_tiles` of FP8 entries, whose latents go through registers; `kv_stride` counts 16 bytes."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    phase = 1
    for start in range(begin, end, 128):
        for place in gl.static_range(2):
            first = start + place * 64
            rope_slot = _load_slots(slots, first, end, 64, gl.SliceLayout(1, rope_layout))
            upper = _load_slots(slots, first, end, 32, gl.SliceLayout(1, layout))
            lower = _load_slots(slots, first + 32, end, 32, gl.SliceLayout(1, layout))
            left = latents.index(2 * place)
            right = latents.index(2 * place + 1)
            c0, c1, s0, s1 = _load_codes(codes, scales, kv_stride, upper, 0, layout)
            c2, c3, s2, s3 = _load_codes(codes, scales, kv_stride, upper, 256, layout)
            mbarrier.wait(free.index(place), phase)
            _copy(kv_cache, kv_stride * 8, rope_slot, 264, ropes.index(place), rope_layout)
            d0, d1, t0, t1 = _load_codes(codes, scales, kv_stride, lower, 0, layout)
            _widen(left.slice(0, 32, dim=0), c0, s0, 0)
            _widen(left.slice(0, 32, dim=0), c1, s1, 128)
            d2, d3, t2, t3 = _load_codes(codes, scales, kv_stride, lower, 256, layout)
            _widen(right.slice(0, 32, dim=0), c2, s2, 0)
            _widen(right.slice(0, 32, dim=0), c3, s3, 128)
            _widen(left.slice(32, 32, dim=0), d0, t0, 0)
            _widen(left.slice(32, 32, dim=0), d1, t1, 128)
            _widen(right.slice(32, 32, dim=0), d2, t2, 0)
            _widen(right.slice(32, 32, dim=0), d3, t3, 128)
            fence_async_shared()
            async_copy.mbarrier_arrive(full.index(place), increment_count=False)
        phase ^= 1
    async_copy.wait_group(0)


@gluon.jit
def _bring_tiles(kv_cache, codes, scales, kv_stride, slots, begin, end, latents, ropes, full, free, FP8: gl.constexpr):
    if FP8:
        _widen_tiles(kv_cache, codes, scales, kv_stride, slots, begin, end, latents, ropes, full, free)
    else:
        _copy_tiles(kv_cache, kv_stride, slots, begin, end, latents, ropes, full, free)


@gluon.jit
def _copy_tiles(kv_cache, kv_stride, slots, begin, end, latents, ropes, full, free):
    """The copying warp group: copies each tile as soon as both computing groups have released its buffer."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    phase = 1
    for start in range(begin, end, 128):
        for place in gl.static_range(2):
            first = start + place * 64
            rope_slot = _load_slots(slots, first, end, 64, gl.SliceLayout(1, rope_layout))
            upper = _load_slots(slots, first, end, 32, gl.SliceLayout(1, layout))
            lower = _load_slots(slots, first + 32, end, 32, gl.SliceLayout(1, layout))
            left = latents.index(2 * place)
            right = latents.index(2 * place + 1)
            mbarrier.wait(free.index(place), phase)
            _copy(kv_cache, kv_stride, upper, 0, left.slice(0, 32, dim=0), layout)
            _copy(kv_cache, kv_stride, upper, 256, right.slice(0, 32, dim=0), layout)
            _copy(kv_cache, kv_stride, lower, 0, left.slice(32, 32, dim=0), layout)
            _copy(kv_cache, kv_stride, lower, 256, right.slice(32, 32, dim=0), layout)
            _copy(kv_cache, kv_stride, rope_slot, 512, ropes.index(place), rope_layout)
            async_copy.mbarrier_arrive(full.index(place), increment_count=False)
        phase ^= 1
    async_copy.wait_group(0)


@gluon.jit
def _score_tile(queries, query_rope, latents, ropes, place, scale, slots, start, end, layout: gl.constexpr):
    """Scores of 64 heads for the keys in buffer `place`; -infinity for no key, NaN for a missing slot."""
    scores = gl.zeros([64, 64], gl.float32, layout=layout)
    rope = ropes.index(place).permute((1, 0))
    scores = warpgroup_mma(query_rope, rope, scores, use_acc=False, is_async=True)
    for half in gl.static_range(2):
        latent = latents.index(2 * place + half).permute((1, 0))
        scores = warpgroup_mma(queries.index(half), latent, scores, is_async=True)
    slot = _load_slots(slots, start, end, 64, gl.SliceLayout(0, layout))
    bias = gl.where(slot >= 0, 0.0, gl.where(slot == -2, float("nan"), float("-inf")))
    return warpgroup_mma_wait(0, deps=[scores]) * scale + gl.expand_dims(bias, 0)


@gluon.jit
def _base_of(maximum):
    return gl.where(maximum == float("-inf"), 0.0, maximum)


@gluon.jit
def _scaled(output, factor, layout: gl.constexpr):
    return output * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, layout)), 1)


@gluon.jit
def _pass_on(weights, maximum, ropes, maxima, weighed, place: gl.constexpr):
    """Pass the weights of a tile, and the maximum they are relative to, to the other computing group."""
    ropes.index(place).store(weights.to(gl.bfloat16))
    maxima.index(place).store(maximum)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(weighed.index(place), count=1)


@gluon.jit
def _release(free, place: gl.constexpr):
    gl.thread_barrier()
    mbarrier.arrive(free.index(place), count=1)


@gluon.jit
def _mma_group(
    queries,
    query_rope,
    latents,
    ropes,
    maxima,
    totals,
    full,
    weighed,
    free,
    done,
    slots,
    begin,
    end,
    scale,
    out,
    partial_out,
    partial_stats,
    row,
    heads_here,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A computing warp group: scores of every second tile, and 256 columns of the output."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    output_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    maximum = gl.full([64], float("-inf"), gl.float32, layout=rows)
    total = gl.zeros([64], gl.float32, layout=rows)
    output = gl.zeros([64, 256], gl.float32, layout=output_layout)
    phase = 0
    for start in range(begin, end, 128):
        # a zero unknown to the compiler keeps it from precomputing the addresses of all tiles
        zero = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [phase], dtype=gl.int32, is_pure=False, pack=1)
        mbarrier.wait(full.index(GROUP), phase)
        fence_async_shared()
        first = start + GROUP * 64
        scores = _score_tile(queries, query_rope, latents, ropes, zero + GROUP, scale, slots, first, end, score_layout)
        even_maximum = gl.max(scores, axis=1)
        odd_maximum = even_maximum
        if GROUP == 0:
            even_maximum = gl.maximum(maximum, even_maximum)
            even_base = _base_of(even_maximum)
            weights = gl.exp2(scores - gl.expand_dims(even_base, 1))
            _pass_on(weights, even_maximum, ropes, maxima, weighed, 0)
            rescale = gl.exp2(maximum - even_base)
            total = total * rescale + gl.sum(weights, axis=1)
            output = _scaled(output, rescale, output_layout)
            output = warpgroup_mma(ropes.index(zero), latents.index(zero), output, is_async=True)
            mbarrier.wait(weighed.index(1), phase)
            odd_maximum = maxima.index(1).load(rows)
            rescale = gl.exp2(even_maximum - _base_of(odd_maximum))
            total = total * rescale
        else:
            mbarrier.wait(weighed.index(0), phase)
            even_maximum = maxima.index(0).load(rows)
            rescale = gl.exp2(maximum - _base_of(even_maximum))
            total = total * rescale
            output = _scaled(output, rescale, output_layout)
            fence_async_shared()
            output = warpgroup_mma(ropes.index(zero), latents.index(zero + 1), output, is_async=True)
            odd_maximum = gl.maximum(even_maximum, odd_maximum)
            odd_base = _base_of(odd_maximum)
            weights = gl.exp2(scores - gl.expand_dims(odd_base, 1))
            _pass_on(weights, odd_maximum, ropes, maxima, weighed, 1)
            rescale = gl.exp2(even_maximum - odd_base)
            total = total * rescale + gl.sum(weights, axis=1)
        output = warpgroup_mma_wait(0, deps=[output])
        _release(free, 0)
        output = _scaled(output, rescale, output_layout)
        fence_async_shared()
        output = warpgroup_mma(ropes.index(zero + 1), latents.index(zero + 2 + GROUP), output, is_async=True)
        output = warpgroup_mma_wait(0, deps=[output])
        _release(free, 1)
        maximum = odd_maximum
        phase ^= 1

    totals.index(GROUP).store(total)
    gl.thread_barrier()
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    total = totals.index(0).load(rows) + totals.index(1).load(rows)
    columns = GROUP * 256 + gl.arange(0, 256, layout=gl.SliceLayout(0, output_layout))
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, output_layout))
    offsets = gl.expand_dims((row + head) * 512, 1) + gl.expand_dims(columns, 0)
    stored = gl.expand_dims(head < heads_here, 1)
    if SPLIT:
        gl.store(partial_out + offsets, output, mask=stored)
        if GROUP == 0:
            head = gl.arange(0, 64, layout=rows)
            gl.store(partial_stats + (row + head) * 2, maximum, mask=head < heads_here)
            gl.store(partial_stats + (row + head) * 2 + 1, total, mask=head < heads_here)
    else:
        total = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, output_layout))
        gl.store(out + offsets, (output / gl.expand_dims(total, 1)).to(gl.bfloat16), mask=stored)


@gluon.jit
def _load_query(query, token_stride, head_stride, token, first_head, num_heads, column: gl.constexpr, tile):
    """Copy some columns of 64 heads' queries to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    heads = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(heads * head_stride, 1) + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(heads < num_heads, 1)
    tile.store(gl.load(query + token * token_stride + offsets, mask=mask, other=0.0))


@gluon.jit
def mla_kernel(
    q_latent,
    latent_token_stride,
    latent_head_stride,
    q_rope,
    rope_token_stride,
    rope_head_stride,
    kv_cache,
    kv_stride,
    codes,
    scales,
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
    SPLIT_KEYS: gl.constexpr,
    SPARSE: gl.constexpr,
    SPLIT: gl.constexpr,
    FP8: gl.constexpr,
):
    """Attention of 64 of a token's heads to one split of its list. `scale` includes log2(e)."""
    head_blocks = (num_heads + 63) // 64
    token = (gl.program_id(0) // head_blocks).to(gl.int64)
    first_head = gl.program_id(0) % head_blocks * 64
    begin = gl.program_id(1) * SPLIT_KEYS
    end = gl.minimum(begin + SPLIT_KEYS, gl.load(lengths + token))
    if SPLIT and begin >= end:
        return
    if SPARSE:
        slots += token * slots_stride
    else:
        slots += gl.load(sequences + token).to(gl.int64) * slots_stride

    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], shared)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], shared)
    latents = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 256], shared)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], shared)
    maxima = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    totals = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(full.index(place), count=128)
        mbarrier.init(weighed.index(place), count=1)
        mbarrier.init(free.index(place), count=2)
    mbarrier.init(done, count=2)
    for half in gl.static_range(2):
        query = queries.index(half)
        _load_query(q_latent, latent_token_stride, latent_head_stride, token, first_head, num_heads, half * 256, query)
    _load_query(q_rope, rope_token_stride, rope_head_stride, token, first_head, num_heads, 0, query_rope)
    fence_async_shared()

    row = token * num_heads + first_head
    if SPLIT:
        row += gl.program_id(1).to(gl.int64) * num_tokens * num_heads
    heads_here = num_heads - first_head
    gl.warp_specialize(
        [
            (
                _mma_group,
                (
                    queries,
                    query_rope,
                    latents,
                    ropes,
                    maxima,
                    totals,
                    full,
                    weighed,
                    free,
                    done,
                    slots,
                    begin,
                    end,
                    scale,
                    out,
                    partial_out,
                    partial_stats,
                    row,
                    heads_here,
                    SPLIT,
                    gl.constexpr(0),
                ),
            ),
            (
                _mma_group,
                (
                    queries,
                    query_rope,
                    latents,
                    ropes,
                    maxima,
                    totals,
                    full,
                    weighed,
                    free,
                    done,
                    slots,
                    begin,
                    end,
                    scale,
                    out,
                    partial_out,
                    partial_stats,
                    row,
                    heads_here,
                    SPLIT,
                    gl.constexpr(1),
                ),
            ),
            (
                _bring_tiles,
                (kv_cache, codes, scales, kv_stride, slots, begin, end, latents, ropes, full, free, FP8),
            ),
        ],
        [4, 4],
        [208, 88] if FP8 else [216, 72],  # registers of a thread, of which widening takes more
    )
