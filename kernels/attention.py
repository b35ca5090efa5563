"""Multi-head latent attention in the absorbed form over paged records, for prompt and generated tokens alike.

T tokens of B sequences, h heads, Dl latent and Dr rotary columns. All heads of a token share one key, the record's
[latent | rotary key], and one value, its latent.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .build import c_function, num_threads
from .linear import DTYPE_CODES
from .registry import implementation, register

BLOCK_KEYS = 64
"""Keys between two rescalings of the online softmax; part of the contract, not a tuning knob."""

_MLA_ATTENTION = (
    "shoal_mla_attention",
    c_int64,
    *[c_void_p, c_int64, c_int64] * 3,
    c_void_p,
    *[c_int64] * 2,
    c_void_p,
    c_int64,
    c_void_p,
    *[c_int64] * 3,
    c_float,
    c_void_p,
    c_int64,
    c_void_p,
    c_int64,
    c_void_p,
)


@dataclass(frozen=True)
class PagedLayout:
    """Where the tokens of a step sit in their sequences, and where the sequences' records are.

    Token t of sequence b attends to positions 0..positions[t] of b, and the record of position p is in slot
    block_tables[b, p // block_size] * block_size + p % block_size.
    """

    block_tables: Tensor
    """[B, max_blocks] int32; entries that hold no position of their sequence are never read."""
    cu_seqlens_q: Tensor
    """[B + 1] int32: tokens [cu_seqlens_q[b], cu_seqlens_q[b + 1]) belong to sequence b, which may have none."""
    positions: Tensor
    """[T] int64."""
    block_size: int

    def check(self, op: str, num_tokens: int) -> None:
        """ValueError unless shapes and dtypes fit `num_tokens` tokens."""
        wanted = (("block_tables", torch.int32, 2), ("cu_seqlens_q", torch.int32, 1), ("positions", torch.int64, 1))
        for name, dtype, dims in wanted:
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != dims or not tensor.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous {dtype} with {dims} dimensions")
        if self.block_size < 1 or self.cu_seqlens_q.shape[0] != self.block_tables.shape[0] + 1:
            raise ValueError(f"{op}: cu_seqlens_q needs one entry more than block_tables has rows, and block_size >= 1")
        bounds = self.cu_seqlens_q
        if self.positions.shape[0] != num_tokens or int(bounds[0]) != 0 or int(bounds[-1]) != num_tokens:
            raise ValueError(f"{op}: positions and cu_seqlens_q must cover the {num_tokens} query tokens")
        if bool((bounds.diff() < 0).any()):
            raise ValueError(f"{op}: cu_seqlens_q must not decrease")

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        """Slots of some positions ([n] int64) of a sequence -> [n] int64."""
        blocks = self.block_tables[sequence].long()[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


def slot_error(op: str) -> ValueError:
    """What to raise when a context reaches outside its block table or the records."""
    return ValueError(f"{op}: a position has no slot in its sequence's block table, or the slot is outside the records")


def mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    records: Tensor,
    layout: PagedLayout,
    scale: float,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q . key) . value per token and head -> [T, h, Dl] in the queries' dtype.

    q_latent: [T, h, Dl], q_rope: [T, h, Dr], last dimension contiguous. records: [num_slots, W], rows at any distance,
    columns [0, Dl) the latent, [Dl, Dl + Dr) the rotary key, others ignored. All three fp32 or all three bf16.
    selected: [T, topk] int32, the positions a token attends to, ascending, -1 from the first unused entry on; None is
    every position up to its own.

    Numerics, per row (token, head); bf16 operands are widened to fp32, which is exact:
    1. s[j] = scale * (one fma chain from 0 over the columns of [latent | rotary key], ascending); j is the key's index
       in the row's list.
    2. Blocks of 64 list entries: m' = max(m, s of the block); a = exp(m - m'); p[j] = exp(s[j] - m');
       l = l * a, then + p[j] ascending; o = o * a, then fma(p[j], value[j], o) ascending; p stays fp32.
    3. o / l, rounded once. A row with no key is zero.
    Keys outside a row's list take no part at all, not even as zeros, so its bits depend on its own list only: not on
    other rows, chunking, block size, where blocks are, or threads; and selecting every position changes nothing.
    ValueError when a position lies outside the block table or a slot outside the records.
    """
    shapes_fit = q_latent.dim() == q_rope.dim() == 3 and q_latent.shape[:2] == q_rope.shape[:2] and records.dim() == 2
    if not shapes_fit or records.shape[1] < q_latent.shape[2] + q_rope.shape[2]:
        raise ValueError(
            f"mla_attention needs q_latent [T, h, Dl], q_rope [T, h, Dr] and records [num_slots, >= Dl + Dr], got "
            f"{list(q_latent.shape)}, {list(q_rope.shape)}, {list(records.shape)}"
        )
    if not q_latent.dtype == q_rope.dtype == records.dtype or records.dtype not in DTYPE_CODES:
        raise ValueError(
            f"mla_attention needs queries and records all in float32 or all in bfloat16, got {q_latent.dtype}, "
            f"{q_rope.dtype}, {records.dtype}"
        )
    layout.check("mla_attention", q_latent.shape[0])
    if selected is not None and (
        selected.dtype != torch.int32 or selected.dim() != 2 or selected.shape[0] != q_latent.shape[0]
    ):
        raise ValueError(
            f"mla_attention: selected must be [T, topk] int32, got {list(selected.shape)} {selected.dtype}"
        )
    out: Tensor = implementation("mla_attention")(q_latent, q_rope, records, layout, scale, selected)
    return out


@register("mla_attention", "cpu")
def _mla_attention_cpu(
    q_latent: Tensor, q_rope: Tensor, records: Tensor, layout: PagedLayout, scale: float, selected: Tensor | None
) -> Tensor:
    q_latent, q_rope, records = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope, records))
    if selected is not None:
        selected = selected.contiguous()
    num_tokens, num_heads, latent_dim = q_latent.shape
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    status = torch.zeros(1, dtype=torch.int64)
    c_function(*_MLA_ATTENTION)(
        DTYPE_CODES[records.dtype],
        q_latent.data_ptr(),
        q_latent.stride(0),
        q_latent.stride(1),
        q_rope.data_ptr(),
        q_rope.stride(0),
        q_rope.stride(1),
        records.data_ptr(),
        records.stride(0),
        records.shape[0],
        layout.block_tables.data_ptr(),
        layout.block_tables.shape[1],
        layout.block_size,
        layout.cu_seqlens_q.data_ptr(),
        layout.block_tables.shape[0],
        layout.positions.data_ptr(),
        num_heads,
        latent_dim,
        q_rope.shape[2],
        scale,
        None if selected is None else selected.data_ptr(),
        0 if selected is None else selected.shape[1],
        out.data_ptr(),
        num_threads(num_tokens * num_heads * latent_dim * BLOCK_KEYS),
        status.data_ptr(),
    )
    if status.item():
        raise slot_error("mla_attention")
    return out


@register("mla_attention", "reference")
def _mla_attention_reference(
    q_latent: Tensor, q_rope: Tensor, records: Tensor, layout: PagedLayout, scale: float, selected: Tensor | None
) -> Tensor:
    out = torch.zeros_like(q_latent, memory_format=torch.contiguous_format)
    queries = torch.cat([q_latent, q_rope], dim=-1).float()
    num_heads, latent_dim, key_dim = q_latent.shape[1], q_latent.shape[2], queries.shape[2]
    bounds = layout.cu_seqlens_q.tolist()
    for sequence, (first, last) in enumerate(pairwise(bounds)):
        for t in range(first, last):
            if selected is None:
                context = torch.arange(int(layout.positions[t]) + 1)
            else:
                context = selected[t][(selected[t] < 0).cumsum(0) == 0].long()
            if context.numel() == 0:
                continue
            try:
                keys = records[layout.slots(sequence, context), :key_dim].float()
            except IndexError as error:
                raise slot_error("mla_attention") from error
            maximum = torch.full((num_heads,), -torch.inf)
            total, output = torch.zeros(num_heads), torch.zeros(num_heads, latent_dim)
            for block in torch.split(keys, BLOCK_KEYS):
                scores = queries[t] @ block.T * scale
                new_maximum = torch.maximum(maximum, scores.amax(dim=1))
                rescale = torch.exp(maximum - new_maximum)
                weights = torch.exp(scores - new_maximum[:, None])
                total = total * rescale + weights.sum(dim=1)
                output = output * rescale[:, None] + weights @ block[:, :latent_dim]
                maximum = new_maximum
            out[t] = (output / total[:, None]).to(out.dtype)
    return out
