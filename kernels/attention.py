"""Multi-head latent attention over a paged KV cache, in two forms with the same mathematics and different roundings.

T tokens of B sequences, h heads; Dl latent, Dr rotary, Dn other key and Dv value columns.

MHA form (`mha_attention`)            keys [W_UK latent | rotary] and values W_UV latent are computed per head: few
                                      operations per pair of tokens, for prompts
MQA form, absorbed (`mla_attention`)  queries (q W_UK) and outputs are in latent space: all heads of a token share one
                                      key [latent | rotary] and one value, the latent; for generated tokens and for
                                      sparse attention

The form of a token depends on its row alone, never on the schedule, as the two differ in their last bits.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .cpu_library import DTYPE_CODES, CFunction, num_threads
from .kv_format import FP8_CACHE, KVCacheArgs, kv_cache_args, latent_width, read_latents
from .linear import PackedWeight
from .registry import Kernel, register

BLOCK_KEYS = 64
"""Keys between two rescalings of the online softmax; part of the numeric contract, not a tuning parameter."""
SPLIT_KEYS = 512
"""Keys per split of the absorbed form; part of the numeric contract as well."""


class LayoutArgs(ctypes.Structure):
    """shoal::LayoutArgs of the compiled kernels."""

    _fields_ = (
        ("block_tables", c_void_p),
        ("max_blocks", c_int64),
        ("block_size", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("num_sequences", c_int64),
        ("positions", c_void_p),
    )


class PagedArgs(ctypes.Structure):
    """shoal::PagedArgs of the compiled kernels."""

    _fields_ = (("kv_cache", KVCacheArgs), ("layout", LayoutArgs))


shoal_mla_attention = CFunction(
    "shoal_mla_attention",
    c_int64,
    *[c_void_p, c_int64, c_int64] * 2,
    POINTER(PagedArgs),
    *[c_int64] * 3,
    c_float,
    c_void_p,
    c_int64,
    c_void_p,
    c_int64,
    POINTER(c_int64),
)
shoal_mha_attention = CFunction(
    "shoal_mha_attention",
    c_int64,
    *[c_void_p, c_int64, c_int64],
    POINTER(PagedArgs),
    *[c_void_p] * 2,
    *[c_int64] * 5,
    c_float,
    c_void_p,
    c_int64,
    POINTER(c_int64),
)


@dataclass(frozen=True)
class PagedLayout:
    """Positions of a step's tokens in their sequences, and the cache blocks of the sequences.

    Token t of sequence b attends to positions 0..positions[t] of b, and the KV cache entry of position p is in slot
    block_tables[b, p // block_size] * block_size + p % block_size. ValueError for shapes or dtypes that do not fit; in
    host memory also for values (on a GPU that check would synchronise).
    """

    block_tables: Tensor
    """[B, max_blocks] int32; elements beyond the blocks of a sequence are never read."""
    cu_seqlens_q: Tensor
    """[B + 1] int32: tokens [cu_seqlens_q[b], cu_seqlens_q[b + 1]) belong to sequence b, which may have none."""
    positions: Tensor
    """[T] int64, ascending within a sequence."""
    block_size: int

    def __post_init__(self) -> None:
        wanted = (("block_tables", torch.int32, 2), ("cu_seqlens_q", torch.int32, 1), ("positions", torch.int64, 1))
        for name, dtype, dims in wanted:
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != dims or not tensor.is_contiguous():
                raise ValueError(f"PagedLayout: {name} must be contiguous {dtype} with {dims} dimensions")
        if self.block_size < 1 or self.cu_seqlens_q.shape[0] != self.block_tables.shape[0] + 1:
            raise ValueError(
                "PagedLayout: cu_seqlens_q needs one entry more than block_tables has rows; block_size >= 1"
            )
        if self.positions.is_cpu:
            self._check_values()

    def _check_values(self) -> None:
        bounds = self.cu_seqlens_q.tolist()
        if bounds[0] != 0 or bounds[-1] != self.num_tokens or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"PagedLayout: cu_seqlens_q must ascend from 0 to the {self.num_tokens} tokens of positions"
            )
        positions = self.positions.tolist()
        if any(positions[t] >= positions[t + 1] for a, b in pairwise(bounds) for t in range(a, b - 1)):
            raise ValueError("PagedLayout: positions must ascend within a sequence")

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    def sequence_of_tokens(self) -> Tensor:
        """Sequence of every token, [T] int64."""
        tokens = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens_q.device)
        return torch.searchsorted(self.cu_seqlens_q[1:], tokens, right=True)

    @cached_property
    def contexts(self) -> tuple[Tensor, Tensor]:
        """Slots of all contexts, concatenated [S] int64, and the start of each of them [B + 1] int32.

        A context ends with its sequence's last token in the step; without a token it is empty. Synchronises, for S.
        """
        num_sequences, device = self.block_tables.shape[0], self.positions.device
        begins, ends = self.cu_seqlens_q[:-1].long(), self.cu_seqlens_q[1:].long()
        padded = torch.nn.functional.pad(self.positions, (1, 0), value=-1)
        lengths = torch.where(ends > begins, padded[ends] + 1, 0)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total = int(starts[-1])
        sequences = torch.arange(num_sequences, device=device).repeat_interleave(lengths, output_size=total)
        places = torch.arange(total, device=device) - starts[sequences]
        blocks = self.block_tables[sequences, places // self.block_size].long()
        return blocks * self.block_size + places % self.block_size, starts.int()

    def args(self) -> LayoutArgs:
        """Argument of the compiled kernels; the tensors must outlive it."""
        return LayoutArgs(
            self.block_tables.data_ptr(),
            self.block_tables.shape[1],
            self.block_size,
            self.cu_seqlens_q.data_ptr(),
            self.block_tables.shape[0],
            self.positions.data_ptr(),
        )

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        """Slots of positions [n] int64 of a sequence -> [n] int64."""
        blocks = self.block_tables[sequence].long()[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


def slot_error(op: str) -> ValueError:
    """Error for a context outside its block table or the cache."""
    return ValueError(f"{op}: a position has no slot in its sequence's block table, or the slot is outside the cache")


def mla_attention(
    kernel: Kernel,
    q_latent: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    layout: PagedLayout,
    scale: float,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """Absorbed form: softmax(scale * q . key) . value per token and head -> [T, h, Dl] in the queries' dtype.

    q_latent: [T, h, Dl], q_rope: [T, h, Dr], both fp32 or both bf16, last dimension contiguous. kv_cache: [num_slots,
    W] in a format of kernels/kv_format.py, in the queries' dtype or in FP8, any row stride.
    selected: [T, topk] int32, positions that a token attends to, ascending, then -1; None: every position up to its
    own.

    Numerics, per row (token, head); bf16 operands are widened to fp32, which is exact:
    1. s[j] = scale * (one fma chain from 0 over the columns of [latent | rotary key], ascending); j is the key's index
       in the row's list.
    2. Splits of 512 keys of the list, each in blocks of 64: m' = max(m, s of the block); a = exp(m - m');
       p[j] = exp(s[j] - m'); l = l * a, then + p[j] ascending; o = o * a, then fma(p[j], value[j], o) ascending, where
       p[j] is rounded to the queries' dtype.
    3. Splits join in order: m' = max(m, m2); o = o * exp(m - m') + o2 * exp(m2 - m'), l likewise.
    4. o / l, rounded once. A row with no key is zero.
    Keys outside a row's list take no part, so its bits depend on its own list only: not on other rows, chunking, block
    size, where blocks are, or threads; and selecting every position changes nothing.
    ValueError for a position outside the block table or a slot outside the cache.
    """
    shapes_fit = q_latent.dim() == q_rope.dim() == 3 and q_latent.shape[:2] == q_rope.shape[:2] and kv_cache.dim() == 2
    if not shapes_fit or kv_cache.shape[1] < latent_width(kv_cache.dtype, q_latent.shape[2], q_rope.shape[2]):
        raise ValueError(
            f"mla_attention needs q_latent [T, h, Dl], q_rope [T, h, Dr] and kv_cache [num_slots, >= Dl + Dr] (in FP8: "
            f"bytes), got {list(q_latent.shape)}, {list(q_rope.shape)}, {list(kv_cache.shape)}"
        )
    dtypes_fit = q_latent.dtype == q_rope.dtype and kv_cache.dtype in (q_latent.dtype, FP8_CACHE)
    if not dtypes_fit or q_latent.dtype not in DTYPE_CODES:
        raise ValueError(
            f"mla_attention needs queries and kv_cache of one dtype, float32 or bfloat16, or kv_cache in {FP8_CACHE}, "
            f"got {q_latent.dtype}, {q_rope.dtype}, {kv_cache.dtype}"
        )
    _check_tokens("mla_attention", q_latent, layout)
    if selected is not None and (
        selected.dtype != torch.int32 or selected.dim() != 2 or selected.shape[0] != q_latent.shape[0]
    ):
        raise ValueError(
            f"mla_attention: selected must be [T, topk] int32, got {list(selected.shape)} {selected.dtype}"
        )
    out: Tensor = kernel.run(q_latent, q_rope, kv_cache, layout, scale, selected)
    return out


def mha_attention(
    kernel: Kernel,
    q: Tensor,
    kv_cache: Tensor,
    layout: PagedLayout,
    w_uk: PackedWeight,
    w_uv: PackedWeight,
    scale: float,
) -> Tensor:
    """MHA form: causal softmax(scale * q . key) . value per token and head -> [T, h, Dv] in q's dtype.

    q: [T, h, Dn + Dr], last dimension contiguous: part without | part with rotary embedding. kv_cache: as in
    `mla_attention`. w_uk: h weights [Dn, Dl]; w_uv: h weights [Dv, Dl]. All fp32 or all bf16, or kv_cache in FP8.

    Numerics, per row (token, head):
    1. key[j] = [W_UK latent[j] | rotary key[j]], value[j] = W_UV latent[j], GEMMs as in `linear`.
    2. s[j] = scale * (one fma chain from 0 over the columns, ascending).
    3. Blocks of 64 positions as in `mla_attention` (no splits), except that l has 16 parts: part i sums the p[j] with
       j % 16 = i, ascending; at the end they add up in a tree (halves, quarters, ..).
    4. o / l, rounded once.
    Positions after a token's own take no part in its row, not even as zeros; bits depend on the row only, as above.
    ValueError for a position outside the block table or a slot outside the cache.
    """
    fits = q.dim() == 3 and kv_cache.dim() == 2 and w_uk.num_matrices == w_uv.num_matrices == q.shape[1]
    latent_dim, rope_dim = w_uk.in_features, q.shape[-1] - w_uk.out_features
    fits = fits and w_uv.in_features == latent_dim and rope_dim >= 0
    if not fits or kv_cache.shape[1] < latent_width(kv_cache.dtype, latent_dim, rope_dim):
        raise ValueError(
            f"mha_attention needs q [T, h, Dn + Dr], h weights [Dn, Dl] and [Dv, Dl], kv_cache [num_slots, >= Dl + Dr],"
            f" got {list(q.shape)}, {w_uk.num_matrices} of [{w_uk.out_features}, {w_uk.in_features}], "
            f"{w_uv.num_matrices} of [{w_uv.out_features}, {w_uv.in_features}], {list(kv_cache.shape)}"
        )
    dtypes_fit = q.dtype == w_uk.dtype == w_uv.dtype and kv_cache.dtype in (q.dtype, FP8_CACHE)
    if not dtypes_fit or w_uk.backend != w_uv.backend:
        raise ValueError(
            f"mha_attention needs q, kv_cache and weights of one dtype and backend, or kv_cache in {FP8_CACHE}, "
            f"got {q.dtype}, {kv_cache.dtype}, {w_uk.dtype}, {w_uv.dtype}"
        )
    _check_tokens("mha_attention", q, layout)
    out: Tensor = kernel.run(q, kv_cache, layout, w_uk, w_uv, scale)
    return out


def _check_tokens(op: str, q: Tensor, layout: PagedLayout) -> None:
    if q.shape[0] != layout.num_tokens:
        raise ValueError(f"{op}: {q.shape[0]} query tokens, but the layout has {layout.num_tokens}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@register("mla_attention", "cpu")
def _mla_attention_cpu(
    q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, layout: PagedLayout, scale: float, selected: Tensor | None
) -> Tensor:
    q_latent, q_rope, kv_cache = _rows(q_latent), _rows(q_rope), _rows(kv_cache)
    if selected is not None:
        selected = selected.contiguous()
    num_tokens, num_heads, latent_dim = q_latent.shape
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    status = c_int64()
    shoal_mla_attention(
        DTYPE_CODES[q_latent.dtype],
        q_latent.data_ptr(),
        q_latent.stride(0),
        q_latent.stride(1),
        q_rope.data_ptr(),
        q_rope.stride(0),
        q_rope.stride(1),
        byref(PagedArgs(kv_cache_args(kv_cache), layout.args())),
        num_heads,
        latent_dim,
        q_rope.shape[2],
        scale,
        None if selected is None else selected.data_ptr(),
        0 if selected is None else selected.shape[1],
        out.data_ptr(),
        num_threads(num_tokens * num_heads * latent_dim * BLOCK_KEYS),
        byref(status),
    )
    if status.value:
        raise slot_error("mla_attention")
    return out


@register("mha_attention", "cpu")
def _mha_attention_cpu(
    q: Tensor, kv_cache: Tensor, layout: PagedLayout, w_uk: PackedWeight, w_uv: PackedWeight, scale: float
) -> Tensor:
    q, kv_cache = _rows(q), _rows(kv_cache)
    num_tokens, num_heads, key_dim = q.shape
    out = q.new_empty(num_tokens, num_heads, w_uv.out_features)
    status = c_int64()
    shoal_mha_attention(
        DTYPE_CODES[q.dtype],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        byref(PagedArgs(kv_cache_args(kv_cache), layout.args())),
        w_uk.data.data_ptr(),
        w_uv.data.data_ptr(),
        num_heads,
        w_uk.in_features,
        w_uk.out_features,
        key_dim - w_uk.out_features,
        w_uv.out_features,
        scale,
        out.data_ptr(),
        num_threads(num_tokens * num_heads * key_dim * BLOCK_KEYS),
        byref(status),
    )
    if status.value:
        raise slot_error("mha_attention")
    return out


@register("mla_attention", "reference")
def _mla_attention_reference(
    q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, layout: PagedLayout, scale: float, selected: Tensor | None
) -> Tensor:
    out = torch.zeros_like(q_latent, memory_format=torch.contiguous_format)
    queries = torch.cat([q_latent, q_rope], dim=-1).float()
    latent_dim, rope_dim = q_latent.shape[2], q_rope.shape[2]
    for sequence, (first, last) in enumerate(pairwise(layout.cu_seqlens_q.tolist())):
        for t in range(first, last):
            if selected is None:
                context = torch.arange(int(layout.positions[t]) + 1, device=kv_cache.device)
            else:
                context = selected[t][(selected[t] < 0).cumsum(0) == 0].long()
            gathered = _gather("mla_attention", kv_cache, layout, sequence, context)
            keys = read_latents(gathered, latent_dim, rope_dim, q_latent.dtype).float()
            weights = torch.softmax(queries[t] @ keys.T * scale, dim=1) if len(context) else keys.new_zeros(1, 0)
            out[t] = (weights @ keys[:, :latent_dim]).to(out.dtype)
    return out


@register("mha_attention", "reference")
def _mha_attention_reference(
    q: Tensor, kv_cache: Tensor, layout: PagedLayout, w_uk: PackedWeight, w_uv: PackedWeight, scale: float
) -> Tensor:
    out = q.new_zeros(q.shape[0], q.shape[1], w_uv.out_features)
    latent_dim, rope_dim = w_uk.in_features, q.shape[2] - w_uk.out_features
    for sequence, (first, last) in enumerate(pairwise(layout.cu_seqlens_q.tolist())):
        if first == last:
            continue
        positions = layout.positions[first:last]
        context = torch.arange(int(positions[-1]) + 1, device=kv_cache.device)
        gathered = _gather("mha_attention", kv_cache, layout, sequence, context)
        read = read_latents(gathered, latent_dim, rope_dim, q.dtype).float()
        latents, rope = read[:, :latent_dim], read[:, latent_dim:]
        made = torch.einsum("sl,hnl->hsn", latents, w_uk.data.float()).to(q.dtype).float()
        keys = torch.cat([made, rope.expand(q.shape[1], -1, -1)], dim=-1)
        values = torch.einsum("sl,hvl->hsv", latents, w_uv.data.float()).to(q.dtype).float()
        scores = torch.einsum("thk,hsk->hts", q[first:last].float(), keys) * scale
        scores = scores.masked_fill(context > positions[:, None], -torch.inf)
        out[first:last] = torch.einsum("hts,hsv->thv", torch.softmax(scores, dim=2), values).to(q.dtype)
    return out


def _gather(op: str, kv_cache: Tensor, layout: PagedLayout, sequence: int, context: Tensor) -> Tensor:
    """Cache entries of some positions of a sequence."""
    try:
        return kv_cache[layout.slots(sequence, context)]
    except IndexError as error:
        raise slot_error(op) from error
