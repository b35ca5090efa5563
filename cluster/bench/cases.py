"""Cases of `shoal bench kernels`: every public op of the kernels with the sizes of a model. Add new ones to `cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.math_utils import cdiv, round_up
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable, cos_sin_table, inv_freq
from shoal.runtime.sampling.sampler import Sampler, SamplingRow
from shoal.runtime.types import SamplingParams

from .shapes import BLOCK_SIZE, Inputs, Shapes

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Case:
    """One op with one set of sizes."""

    op: str
    sizes: str
    make: Callable[[Inputs], tuple[Any, ...]]
    """Arguments of the call, made for `Inputs.ops`."""
    call: Callable[[Ops], Callable[..., Any]]
    """The function to measure, on a backend."""
    flops: float
    num_bytes: float
    """Lower bound of memory traffic: used weights and inputs read once, outputs written once (perhaps to a cache)."""
    tolerance: float | None = None
    """Largest `difference` from the reference; None: by the dtype of the output."""
    has_reference: bool = True


def num_slots(sequences: int, context: int) -> int:
    return sequences * round_up(context, BLOCK_SIZE)


def index_keys(r: Inputs, sequences: int, context: int, dim: int) -> Tensor:
    """Pages of index keys for all blocks of the sequences."""
    return r.normal(num_slots(sequences, context), dim).view(-1, BLOCK_SIZE * dim)


def rope_table(r: Inputs, dim: int, tokens: int, *, interleaved: bool) -> RopeTable:
    """Rotary table of 4096 positions, with random positions of tokens."""
    return RopeTable(cos_sin_table(inv_freq(dim, 10000.0), 4096), r.positions(tokens, 4096), interleaved)


def cases(s: Shapes) -> Iterator[Case]:
    """All cases: every public op of the kernels, and the sampler."""
    for group in (_gemms, _rows, _attention, _cache_writes, _index, _exchange, _sampling):
        yield from group(s)


def _gemms(s: Shapes) -> Iterator[Case]:
    """Linear layers and experts."""
    h = s.hidden_size
    inner = s.moe_intermediate_size
    dl = s.kv_lora_rank
    heads = s.num_attention_heads
    top_k = s.num_experts_per_tok
    v_all = heads * s.v_head_dim
    local = s.num_local_experts
    for t in s.rows:
        yield _linear(t, v_all, h)
    yield _linear(s.decode_batch, h, s.vocab_size, out_dtype=torch.float32)
    yield _linear(s.decode_batch, h, s.n_routed_experts, dtype=torch.float32)
    for t in s.rows:
        yield _batched_linear(t, heads, s.qk_nope_head_dim, dl)
    for t in s.rows:
        yield _experts_mlp(max(1, t * top_k * local // s.n_routed_experts), local, h, inner)
    t = s.rows[-1]
    yield Case(
        "swiglu",
        f"{t} x {inner}",
        lambda r: (r.normal(t, 2 * inner),),
        lambda ops: ops.swiglu,
        4 * t * inner,
        6 * t * inner,
    )
    yield Case(
        "combine_topk",
        f"{t} x {top_k} x {h}",
        lambda r: (
            r.normal(t * top_k, h),
            torch.arange(t * top_k).view(t, top_k),
            r.normal(t, top_k, dtype=torch.float32).abs(),
            r.normal(t, h),
        ),
        lambda ops: ops.combine_topk,
        2 * t * (top_k + 1) * h,
        2 * t * (top_k + 2) * h,
    )


def _rows(s: Shapes) -> Iterator[Case]:
    """Norms, rotary embedding, routing, quantisation."""
    h = s.hidden_size
    dr = s.qk_rope_head_dim
    d = s.index_head_dim
    t = s.rows[-1]
    heads, top_k = s.num_attention_heads, s.num_experts_per_tok
    norm_weight = partial(Inputs.normal, dtype=torch.float32)
    yield Case(
        "rms_norm",
        f"{t} x {h}",
        lambda r: (r.normal(t, h), norm_weight(r, h), EPS),
        lambda ops: ops.rms_norm,
        4 * t * h,
        4 * t * h,
    )
    yield Case(
        "add_rms_norm",
        f"{t} x {h}",
        lambda r: (r.normal(t, h), r.normal(t, h), norm_weight(r, h), EPS),
        lambda ops: ops.add_rms_norm,
        5 * t * h,
        8 * t * h,
    )
    yield Case(
        "layer_norm",
        f"{t} x {d}",
        lambda r: (r.normal(t, d), norm_weight(r, d), norm_weight(r, d), EPS),
        lambda ops: ops.layer_norm,
        7 * t * d,
        4 * t * d,
    )
    yield Case(
        "apply_rope",
        f"{t} x {heads} x {dr}",
        lambda r: (r.normal(t, heads, dr), rope_table(r, dr, t, interleaved=True)),
        lambda ops: ops.apply_rope,
        3 * t * heads * dr,
        4 * t * heads * dr,
    )
    yield Case(
        "route",
        f"{t} x {s.n_routed_experts} -> {top_k}",
        lambda r: (r.normal(t, s.n_routed_experts, dtype=torch.float32), torch.zeros(s.n_routed_experts)),
        lambda ops: partial(
            ops.route,
            n_group=s.n_group,
            topk_group=s.topk_group,
            top_k=top_k,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        8 * t * s.n_routed_experts,
        4 * t * s.n_routed_experts + 12 * t * top_k,
    )
    yield Case(
        "quantize_token_groups",
        f"{t} x {h}",
        lambda r: (r.normal(t, h),),
        lambda ops: ops.quantize_token_groups,
        3 * t * h,
        3 * t * h,
    )


def _attention(s: Shapes) -> Iterator[Case]:
    """Dense and sparse attention of prompts and of generated tokens."""
    heads = s.num_attention_heads
    dl = s.kv_lora_rank
    dr = s.qk_rope_head_dim
    width = dl + dr
    b = s.decode_batch
    context = s.context
    long = s.long_context
    scale = (s.qk_nope_head_dim + dr) ** -0.5
    yield Case(
        "mla_attention",
        f"decode {b} x {context}",
        lambda r: (
            r.normal(b, heads, dl),
            r.normal(b, heads, dr),
            r.normal(num_slots(b, context), width),
            r.layout(b, 1, context),
            scale,
        ),
        lambda ops: ops.mla_attention,
        2 * b * context * heads * (width + dl),
        2 * (b * context * width + b * heads * (width + dl)),
    )
    yield Case(
        "mla_attention",
        f"decode {b} x {s.index_topk} of {long}",
        lambda r: (
            r.normal(b, heads, dl),
            r.normal(b, heads, dr),
            r.normal(num_slots(b, long), width),
            r.layout(b, 1, long),
            scale,
            r.selected(b, long, s.index_topk),
        ),
        lambda ops: lambda *args: ops.mla_attention(*args[:5], selected=args[5]),
        2 * b * s.index_topk * heads * (width + dl),
        2 * (b * s.index_topk * width + b * heads * (width + dl)),
    )
    pairs = context * (context + 1) // 2
    made = context * heads * dl * (s.qk_nope_head_dim + s.v_head_dim)
    yield Case(
        "mha_attention",
        f"prefill {context}",
        lambda r: (
            r.normal(context, heads, s.qk_nope_head_dim + dr),
            r.normal(num_slots(1, context), width),
            r.layout(1, context, context),
            r.weight(heads, s.qk_nope_head_dim, dl),
            r.weight(heads, s.v_head_dim, dl),
            scale,
        ),
        lambda ops: ops.mha_attention,
        2 * made + 2 * pairs * heads * (s.qk_nope_head_dim + dr + s.v_head_dim),
        2 * context * (width + heads * (s.qk_nope_head_dim + dr + s.v_head_dim)),
    )


def _cache_writes(s: Shapes) -> Iterator[Case]:
    """Writes to the KV cache and reads from it."""
    dl = s.kv_lora_rank
    dr = s.qk_rope_head_dim
    d = s.index_head_dim
    t = s.rows[-1]
    width = dl + dr
    norm_weight = partial(Inputs.normal, dtype=torch.float32)
    yield Case(
        "write_latents",
        f"{t} x {width}",
        lambda r: (
            r.normal(t, width),
            torch.arange(t),
            r.normal(t, width),
            norm_weight(r, dl),
            EPS,
            rope_table(r, dr, t, interleaved=True),
        ),
        lambda ops: _written(ops.write_latents),
        4 * t * width,
        4 * t * width,
    )
    fp8_bytes = t * (3 * dl + 4 * cdiv(dl, 128))
    yield Case(
        "quantize_rows_fp8",
        f"{t} x {dl}",
        lambda r: (r.normal(t, dl),),
        lambda ops: ops.quantize_rows_fp8,
        4 * t * dl,
        fp8_bytes,
    )
    yield Case(
        "dequantize_rows_fp8",
        f"{t} x {dl}",
        lambda r: (*r.ops.quantize_rows_fp8(r.normal(t, dl)), torch.bfloat16),
        lambda ops: ops.dequantize_rows_fp8,
        t * dl,
        fp8_bytes,
    )
    yield Case(
        "write_index_keys",
        f"{t} x {d}",
        lambda r: (
            index_keys(r, 1, t, d),
            torch.arange(t),
            r.normal(t, d),
            (norm_weight(r, d), norm_weight(r, d)),
            EPS,
            rope_table(r, dr, t, interleaved=False),
        ),
        lambda ops: _written(ops.write_index_keys),
        7 * t * d,
        4 * t * d,
    )


def _index(s: Shapes) -> Iterator[Case]:
    """Indexer scores and top-k selection."""
    hi = s.index_n_heads
    d = s.index_head_dim
    b = s.decode_batch
    long = s.long_context
    yield Case(
        "index_topk",
        f"decode {b} x {long} -> {s.index_topk}",
        lambda r: (
            r.normal(b, hi, d),
            r.normal(b, hi, dtype=torch.float32),
            index_keys(r, b, long, d),
            r.layout(b, 1, long),
            s.index_topk,
        ),
        lambda ops: ops.index_topk,
        2 * b * long * hi * d,
        2 * b * long * d,
        tolerance=0.01,  # nearly equal scores may be selected differently
    )
    yield Case(
        "index_scores",
        f"{b} x {long}",
        lambda r: (r.normal(b, hi, d), r.normal(b, hi, dtype=torch.float32), r.normal(long, d)),
        lambda ops: ops.index_scores,
        2 * b * long * hi * d,
        2 * long * d + 4 * b * long,
    )
    yield Case(
        "topk_positions",
        f"{b} x {long} -> {s.index_topk}",
        lambda r: (r.normal(b, long, dtype=torch.float32), torch.full((b,), long), s.index_topk),
        lambda ops: ops.topk_positions,
        2 * b * long,
        4 * b * (long + s.index_topk),
    )


def _exchange(s: Shapes) -> Iterator[Case]:
    """Dispatch of tokens to experts."""
    h = s.hidden_size
    t = s.rows[-1]
    top_k = s.num_experts_per_tok
    identity = torch.arange(s.n_routed_experts)
    halves = (identity * 2 // s.n_routed_experts, identity % (s.n_routed_experts // 2))
    yield Case(
        "permute_by_expert",
        f"{t} x {top_k}",
        lambda r: (r.experts(t, s.n_routed_experts, top_k), identity, s.n_routed_experts),
        lambda ops: ops.permute_by_expert,
        0,
        8 * t * top_k * 3,
    )
    yield Case(
        "pack_send_buffers",
        f"{t} x {h} to 2 ranks",
        lambda r: (r.normal(t, h), r.experts(t, s.n_routed_experts, top_k), *halves, 2),
        lambda ops: ops.pack_send_buffers,
        0,
        2 * t * h * 3,
    )
    yield Case(
        "unpack_recv_buffers",
        f"{t} x {h} from 2 ranks",
        lambda r: _unpack_inputs(r.ops, r.normal(t, h), r.experts(t, s.n_routed_experts, top_k), halves),
        lambda ops: ops.unpack_recv_buffers,
        0,
        4 * t * h,
    )


def _sampling(s: Shapes) -> Iterator[Case]:
    """Sampling."""
    b = s.decode_batch
    yield Case(
        "sample_tokens",
        f"{b} x {s.vocab_size}",
        lambda r: (
            r.normal(b, s.vocab_size, dtype=torch.float32),
            torch.ones(b),
            *(torch.arange(b) for _ in range(3)),
        ),
        lambda ops: ops.sample_tokens,
        0,
        4 * b * s.vocab_size,
        tolerance=0.0,
    )
    yield Case(
        "mask_logits",
        f"{b} x {s.vocab_size}",
        lambda r: (
            r.normal(b, s.vocab_size, dtype=torch.float32),
            torch.full((b, (s.vocab_size + 31) // 32), 0x55555555, dtype=torch.int32),
        ),
        lambda ops: ops.mask_logits,
        0,
        8 * b * s.vocab_size,
        tolerance=0.0,
    )
    ones = partial(torch.ones, b)
    yield Case(
        "truncate_logits",
        f"top-p {b} x {s.vocab_size}",
        lambda r: (
            r.normal(b, s.vocab_size, dtype=torch.float32),
            ones(),
            torch.zeros(b, dtype=torch.int64),
            0.9 * ones(),
            0.0 * ones(),
        ),
        lambda ops: partial(_num_kept, ops),
        0,
        8 * b * s.vocab_size,
    )
    yield Case(
        "token_logprobs",
        f"{b} x {s.vocab_size}",
        lambda r: (r.normal(b, s.vocab_size, dtype=torch.float32), torch.arange(2 * b).view(b, 2)),
        lambda ops: ops.token_logprobs,
        0,
        4 * b * s.vocab_size,
    )
    yield _sample("greedy", b, s.vocab_size, SamplingParams(temperature=0.0))
    yield _sample("top-p", b, s.vocab_size, SamplingParams(top_p=0.9))


def _linear(
    rows: int, k: int, n: int, *, dtype: torch.dtype = torch.bfloat16, out_dtype: torch.dtype | None = None
) -> Case:
    size, out_size = dtype.itemsize, (out_dtype or dtype).itemsize
    return Case(
        "linear",
        f"{rows} x {k} -> {n}" + (" fp32" if dtype == torch.float32 else ""),
        lambda r: (r.normal(rows, k, dtype=dtype), r.weight(n, k, dtype=dtype)),
        lambda ops: partial(ops.linear, out_dtype=out_dtype),
        2 * rows * k * n,
        size * (n * k + rows * k) + out_size * rows * n,
    )


def _batched_linear(rows: int, batch: int, k: int, n: int) -> Case:
    return Case(
        "batched_linear",
        f"{rows} x {batch} x {k} -> {n}",
        lambda r: (r.normal(rows, batch, k), r.weight(batch, n, k)),
        lambda ops: ops.batched_linear,
        2 * rows * batch * k * n,
        2 * batch * (n * k + rows * (n + k)),
    )


def _experts_mlp(rows: int, experts: int, h: int, inner: int) -> Case:
    return Case(
        "experts_mlp",
        f"{rows} rows on {experts} experts, {h} -> {inner}",
        lambda r: (
            r.normal(rows, h),
            _even(rows, experts),
            r.weight(experts, 2 * inner, h),
            r.weight(experts, h, inner),
        ),
        lambda ops: ops.experts_mlp,
        6 * rows * h * inner,
        2 * (min(rows, experts) * 3 * h * inner + 2 * rows * h),
    )


def _written(write: Callable[..., None]) -> Callable[..., Tensor]:
    """Turn a call that writes to its first argument into one that returns it."""

    def call(kv_cache: Tensor, *args: Any) -> Tensor:
        write(kv_cache, *args)
        return kv_cache

    return call


def _num_kept(ops: Ops, *args: Tensor) -> Tensor:
    """Number of tokens that `truncate_logits` leaves; the identity of the last one depends on the last bit."""
    return (~ops.truncate_logits(*args).isneginf()).sum(dim=1).float()


def _sample(name: str, rows: int, vocab_size: int, params: SamplingParams) -> Case:
    row = SamplingRow(params=params, prompt_token_ids=(), output_token_ids=(), seed=0)
    return Case(
        "sample",
        f"{name} {rows} x {vocab_size}",
        lambda r: (r.normal(rows, vocab_size, dtype=torch.float32), [row] * rows),
        lambda _: Sampler(vocab_size).sample,
        0,
        4 * rows * vocab_size,
        has_reference=False,
    )


def _even(rows: int, experts: int) -> Tensor:
    """Number of rows per expert, as even as possible: [experts] int64."""
    return torch.tensor([rows // experts + (e < rows % experts) for e in range(experts)])


def _unpack_inputs(
    ops: Ops, x: Tensor, topk_idx: Tensor, halves: tuple[Tensor, Tensor]
) -> tuple[list[Tensor], Tensor, int]:
    """Receive buffers of a rank to which both ranks send what this one would."""
    send_buffers, _, _ = ops.pack_send_buffers(x, topk_idx, *halves, 2)
    return [send_buffers[0], send_buffers[0]], x, len(halves[0]) // 2
