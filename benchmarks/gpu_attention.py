#!/usr/bin/env python3
"""Attention and indexer kernels of the Triton tier on one GPU, against the bandwidth and products of that same GPU.

    python benchmarks/gpu_attention.py --output benchmarks/results/<device>/attention.json

A time is the median over replays of a CUDA graph. The floor of a kernel is the larger of its bytes over the measured
copy bandwidth and its operations over the measured rate of bfloat16 products (FP8 kernels multiply in bfloat16 too).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.ops import Ops
from shoal.kernels.triton.indexer import paged_scores
from shoal.kernels.triton.prefill import prefill_attention

HEADS, LATENT, ROPE = 128, 512, 64
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 2048
BLOCK_SIZE = 64
SCALE = 0.1352
DEVICE = "cuda"


def measure(calls: Sequence[Callable[[], Any]], *, replays: int = 20) -> float:
    """Seconds of one call, in a graph of all of them, so that none finds its input in the cache."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


class Report:
    """Rows of the table; `floor` is computed from the peaks measured at the start."""

    def __init__(self) -> None:
        source = torch.randn(1 << 30, device=DEVICE)
        target = torch.empty_like(source)
        copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
        self.bandwidth = 2 * source.nbytes / min(measure([copy]) for copy in copies)
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        self.rate = 2 * 8192**3 / measure([lambda: a @ b])
        self.rows: list[dict[str, Any]] = []
        peaks = f"copy {self.bandwidth / 1e12:.2f} TB/s, product {self.rate / 1e12:.0f} TFLOP/s"
        print(f"{torch.cuda.get_device_name()}: {peaks}")

    def add(self, name: str, calls: Sequence[Callable[[], Any]], *, flop: float, num_bytes: float) -> None:
        seconds = measure(calls)
        floor = max(flop / self.rate, num_bytes / self.bandwidth)
        self.rows.append(
            {
                "name": name,
                "us": round(seconds * 1e6, 1),
                "floor_us": round(floor * 1e6, 1),
                "fraction": round(floor / seconds, 3),
                "tflops": round(flop / seconds / 1e12, 1),
                "gb_per_s": round(num_bytes / seconds / 1e9, 1),
                "bound": "products" if flop / self.rate > num_bytes / self.bandwidth else "bandwidth",
            }
        )
        line = (
            "{name:52} {us:9.1f} us  floor {floor_us:8.1f} {fraction:6.1%} {tflops:7.1f} TFLOP/s {gb_per_s:7.1f} GB/s"
        )
        print(line.format(**self.rows[-1]), flush=True)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def make_layout(batch: int, context: int, tokens: int = 1) -> PagedLayout:
    """The last `tokens` positions of `batch` sequences of `context`, in shuffled blocks."""
    blocks = context // BLOCK_SIZE
    tables = torch.randperm(batch * blocks, device=DEVICE).int().view(batch, blocks)
    positions = torch.arange(context - tokens, context, device=DEVICE).repeat(batch)
    return PagedLayout(tables, torch.arange(batch + 1, device=DEVICE).int() * tokens, positions, BLOCK_SIZE)


def random_selection(tokens: int, context: int) -> Tensor:
    """[tokens, TOPK] int32, ascending, of contexts of at least `context`."""
    chosen = [torch.randperm(context, device=DEVICE)[:TOPK].sort().values for _ in range(min(tokens, 256))]
    return torch.stack([chosen[t % len(chosen)] for t in range(tokens)]).int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--prefill", type=int, default=2048, help="prompt tokens at the end of the context")
    args = parser.parse_args()
    torch.manual_seed(0)
    ops = Ops("triton")
    report = Report()
    batch, context, prefill = args.batch, args.context, args.prefill
    decode, prompt = make_layout(batch, context), make_layout(1, context, prefill)
    kv_cache = torch.empty(batch * context, LATENT + ROPE, dtype=torch.bfloat16, device=DEVICE).normal_()

    attention = ops.mla_attention
    flop_per_key = 2 * HEADS * (2 * LATENT + ROPE)

    def attend(layout: PagedLayout, selected: Tensor | None) -> Callable[[], Tensor]:
        q = normal(len(layout.positions), HEADS, LATENT + ROPE)
        return lambda: attention(q[..., :LATENT], q[..., LATENT:], kv_cache, layout, SCALE, selected=selected)

    key_bytes = 2 * (LATENT + ROPE)
    for tokens in sorted({1, 8, batch, 2 * batch}):
        layout = make_layout(tokens, context if tokens <= batch else context // 2)
        selections = [random_selection(tokens, len(layout.block_tables[0]) * BLOCK_SIZE) for _ in range(3)]
        report.add(
            f"sparse decode bf16, {tokens} tokens",
            [attend(layout, s) for s in selections],
            flop=flop_per_key * TOPK * tokens,
            num_bytes=key_bytes * TOPK * tokens,
        )
    report.add(
        f"sparse prefill bf16, {prefill} tokens",
        [attend(prompt, random_selection(prefill, context - prefill))],
        flop=flop_per_key * TOPK * prefill,
        num_bytes=key_bytes * context,
    )
    for length in (4096, context):
        layout = make_layout(batch, length)
        report.add(
            f"dense decode bf16, {batch} tokens, context {length}",
            [attend(layout, None)],
            flop=flop_per_key * length * batch,
            num_bytes=key_bytes * length * batch,
        )

    for tokens, length in ((4096, 4096), (4096, 16384)):
        q, k = normal(tokens, HEADS, 192), normal(length, HEADS, 128 + 128)
        bounds = [torch.tensor([0, n], device=DEVICE).int() for n in (tokens, length)]
        positions = torch.arange(length - tokens, length, device=DEVICE)
        k_rope = normal(length, ROPE)
        report.add(
            f"per-head prefill bf16, {tokens} tokens, context {length}",
            [
                lambda q=q, k=k, r=k_rope, b=bounds, p=positions: prefill_attention(
                    q[..., :128], q[..., 128:], k[..., :128], r, k[..., 128:], b[0], b[1], p, SCALE
                )
            ],
            flop=2 * HEADS * (192 + 128) * float((positions + 1).sum()),
            num_bytes=2.0 * (q.numel() + k.numel()),
        )

    fp8 = torch.randint(0, 120, (batch * context, 656), dtype=torch.uint8, device=DEVICE)
    fp8[:, 512:528] = torch.full((batch * context, 4), 2.0**-6, device=DEVICE).view(torch.uint8)
    fp8[:, 528:656] = normal(batch * context, ROPE).view(torch.uint8)

    def attend_fp8(kv_cache: Tensor, layout: PagedLayout, selected: Tensor) -> Callable[[], Tensor]:
        q = normal(len(layout.positions), HEADS, LATENT + ROPE)
        return lambda: attention(q[..., :LATENT], q[..., LATENT:], kv_cache, layout, SCALE, selected=selected)

    for name, layout in (("decode", decode), ("prefill", prompt)):
        tokens = len(layout.positions)
        report.add(
            f"sparse {name} FP8, {tokens} tokens",
            [attend_fp8(fp8, layout, random_selection(tokens, context - prefill)) for _ in range(3)],
            flop=flop_per_key * TOPK * tokens,
            num_bytes=656 * min(TOPK * tokens, context * len(layout.block_tables)),
        )

    pages = batch * context // BLOCK_SIZE
    keys = normal(pages, BLOCK_SIZE * INDEX_DIM)
    fp8_keys = torch.randint(0, 120, (pages, BLOCK_SIZE * (INDEX_DIM + 4)), dtype=torch.uint8, device=DEVICE)
    fp8_keys[:, BLOCK_SIZE * INDEX_DIM :] = torch.rand(pages, BLOCK_SIZE, device=DEVICE).view(torch.uint8)
    select = ops.index_topk
    for name, layout in (("decode", decode), ("prefill", prompt)):
        tokens = len(layout.positions)
        q, weights = normal(tokens, INDEX_HEADS, INDEX_DIM), normal(tokens, INDEX_HEADS, dtype=torch.float32)
        contexts = float((layout.positions + 1).sum())
        flop = 2 * INDEX_HEADS * INDEX_DIM * contexts
        stored = len(layout.block_tables) * context
        written = 4 * contexts
        report.add(
            f"index scores {name} bf16, {tokens} tokens",
            [lambda q=q, w=weights, x=layout: paged_scores(q, w, keys, x, unscored=0)],
            flop=flop,
            num_bytes=2 * INDEX_DIM * stored + written,
        )
        report.add(
            f"index scores {name} FP8, {tokens} tokens",
            [lambda q=q, w=weights, x=layout: paged_scores(q, w, fp8_keys, x, unscored=0)],
            flop=flop,
            num_bytes=132 * stored + written,
        )
        report.add(
            f"index top-k {name} bf16, {tokens} tokens",
            [lambda q=q, w=weights, x=layout: select(q, w, keys, x, TOPK)],
            flop=flop,
            num_bytes=2 * INDEX_DIM * stored,
        )
        report.add(
            f"index top-k {name} FP8, {tokens} tokens",
            [lambda q=q, w=weights, x=layout: select(q, w, fp8_keys, x, TOPK)],
            flop=flop,
            num_bytes=132 * stored,
        )

    topk = ops.topk_positions
    for rows, length in ((batch, 9295), (batch, context), (batch, 4 * context), (prefill, context)):
        scores = normal(rows, length, dtype=torch.float32)
        lengths = torch.full((rows,), length, device=DEVICE)
        size = {"flop": 0.0, "num_bytes": 4.0 * rows * length}
        report.add(f"top-k, {rows} x {length}", [lambda s=scores, n=lengths: topk(s, n, TOPK)], **size)
        report.add(f"torch.topk, {rows} x {length}", [lambda s=scores: s.topk(TOPK, dim=1)], **size)

    if args.output:
        result = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_s": report.bandwidth,
            "bf16_flop_per_s": report.rate,
            "kernels": report.rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
