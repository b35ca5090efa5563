#!/usr/bin/env python3
"""Products, expert layers, norms, quantisation, rotations, routing and sampling of the Triton backend on one GPU.

    python benchmarks/gpu_gemm.py --output benchmarks/results/<device>/gemm.json

Shapes are DeepSeek-V3's. A case's floor is the larger of FLOP / peak and bytes / bandwidth, both peaks measured in
the same run; `of_floor` is floor / time. Times are medians with the L2 cache flushed before each call. Products are
timed on operands that are quantised already; `experts_mlp` is the whole layer, quantisation included.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable
from shoal.kernels.triton.experts import grouped_gemm, tile_table
from shoal.kernels.triton.gemm_config import tiles_for
from shoal.kernels.triton.linear import Operands, gemm

HIDDEN, INNER, VOCAB = 7168, 2048, 129280
FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
DEVICE = torch.device("cuda")
OPS = Ops("triton")


class Bench:
    """Peaks of the device, and cases measured against them."""

    def __init__(self, milliseconds: int) -> None:
        self.milliseconds = milliseconds
        self.cases: dict[str, dict[str, Any]] = {}
        a, b = randn(8192, 8192), randn(8192, 8192)
        bf16 = 2 * 8192**3 / self.time(lambda: a @ b.T)
        a8, b8, one = a.to(FP8), b.to(FP8), torch.ones((), device=DEVICE)
        fp8 = (
            2
            * 8192**3
            / self.time(
                lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=BF16, use_fast_accum=True)
            )
        )
        large = torch.empty(2**29, dtype=BF16, device=DEVICE)
        copy = torch.empty_like(large)
        self.bandwidth = 2 * large.nbytes / self.time(lambda: copy.copy_(large))
        # Six bf16 products make one of fp32.
        self.peak = {BF16: bf16, FP8: fp8, FP32: bf16 / 6}

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds, median."""
        return float(do_bench(call, warmup=10, rep=self.milliseconds, return_mode="median")) / 1e3

    def case(
        self, name: str, call: Callable[[], Any], *, bytes_: int, flop: int = 0, dtype: torch.dtype = BF16
    ) -> None:
        seconds = self.time(call)
        floor = max(flop / self.peak[dtype], bytes_ / self.bandwidth)
        self.cases[name] = {
            "us": round(seconds * 1e6, 1),
            "tflops": round(flop / seconds / 1e12, 1),
            "gb_per_s": round(bytes_ / seconds / 1e9),
            "of_floor": round(floor / seconds, 3),
        }
        print(f"{name:44s}", *(f"{key} {value:<8}" for key, value in self.cases[name].items()), flush=True)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def weight(dtype: torch.dtype, *shape: int) -> PackedWeight:
    if dtype != FP8:
        return OPS.pack_weight(randn(*shape, dtype=dtype))
    blocks = [-(-size // 128) for size in shape[-2:]]
    return OPS.pack_block_fp8(randn(*shape).to(FP8), torch.rand(*shape[:-2], *blocks, device=DEVICE) + 0.1)


def bench_linear(bench: Bench, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    w, x = weight(dtype, n, k), randn(1, m, k, dtype=FP32 if dtype == FP32 else BF16)
    y = torch.empty(1, m, n, dtype=x.dtype, device=DEVICE)
    tiles = tiles_for(dtype, m, n, DEVICE)
    call = partial(gemm, Operands.of(x, w, tiles), y, tiles)
    size = w.data.nbytes + m * k * dtype.itemsize + y.nbytes
    bench.case(f"linear {str(dtype)[6:]} M {m} N {n} K {k}", call, bytes_=size, flop=2 * m * n * k, dtype=dtype)


def bench_experts(bench: Bench, dtype: torch.dtype, rows: int, num_experts: int) -> None:
    gate_up, down = weight(dtype, num_experts, 2 * INNER, HIDDEN), weight(dtype, num_experts, HIDDEN, INNER)
    counts = torch.full((num_experts,), rows // num_experts, device=DEVICE)
    shape = f"{str(dtype)[6:]} {rows} rows {num_experts} experts"
    for part, w, n, k in (("gate_up", gate_up, INNER, HIDDEN), ("down", down, HIDDEN, INNER)):
        gated = part == "gate_up"
        tiles = tiles_for(dtype, rows // num_experts, n * num_experts, DEVICE, gated=gated)
        table = tile_table(counts, rows, tiles.block_m)
        y = torch.empty(rows, n, dtype=BF16, device=DEVICE)
        call = partial(grouped_gemm, Operands.of(randn(1, rows, k), w, tiles), table, y, tiles, gated=gated)
        size = w.data.nbytes + rows * k * dtype.itemsize + y.nbytes
        bench.case(f"{part} {shape}", call, bytes_=size, flop=2 * rows * k * n * (1 + gated), dtype=dtype)
    x = randn(rows, HIDDEN)
    size, flop = gate_up.data.nbytes + down.data.nbytes + 2 * x.nbytes, 6 * rows * HIDDEN * INNER
    call = partial(OPS.experts_mlp, x, counts, gate_up, down)
    bench.case(f"experts_mlp {shape}", call, bytes_=size, flop=flop, dtype=dtype)


def bench_rows(bench: Bench, tokens: int) -> None:
    x, residual, norm_weight = randn(tokens, HIDDEN), randn(tokens, HIDDEN), randn(HIDDEN, dtype=FP32)
    size = x.nbytes
    bench.case(f"rms_norm {tokens} x {HIDDEN}", partial(OPS.rms_norm, x, norm_weight, 1e-6), bytes_=2 * size)
    bench.case(
        f"add_rms_norm {tokens} x {HIDDEN}", partial(OPS.add_rms_norm, x, residual, norm_weight, 1e-6), bytes_=4 * size
    )
    kv = randn(4 * tokens, 576)
    latent = kv[:, :512]
    latent_weight = randn(512, dtype=FP32)
    bench.case(f"rms_norm {4 * tokens} x 512", partial(OPS.rms_norm, latent, latent_weight, 1e-6), bytes_=tokens * 8192)
    for scales in ("float32", "ue8m0"):
        call = partial(OPS.quantize_token_groups, x, ue8m0=scales == "ue8m0")
        bench.case(f"quantize_token_groups {scales} {tokens} x {HIDDEN}", call, bytes_=size + size // 2 + size // 64)
    table = torch.rand(4096, 64, device=DEVICE)
    positions = torch.randint(0, 4096, (4 * tokens,), device=DEVICE)
    q_rope = randn(tokens // 2, 128, 192)[..., 128:]
    for order in ("interleaved", "halves"):
        call = partial(OPS.apply_rope, q_rope, RopeTable(table, positions[: tokens // 2], order == "interleaved"))
        bench.case(f"apply_rope {order} {tokens // 2} x 128 x 64", call, bytes_=2 * 2 * q_rope.numel())
    pages = torch.randperm(tokens // 8, device=DEVICE)[: tokens // 16]  # of 64 entries
    slots = (pages[:, None] * 64 + torch.arange(64, device=DEVICE)).flatten()
    for dtype, width, written in ((BF16, 576, 1152), (torch.uint8, 656, 656)):
        kv_cache = torch.zeros(8 * tokens, width, dtype=dtype, device=DEVICE)
        call = partial(OPS.write_latents, kv_cache, slots, kv, latent_weight, 1e-6, RopeTable(table, positions, True))
        bench.case(f"write_latents {str(dtype)[6:]} {4 * tokens}", call, bytes_=4 * tokens * (1152 + written))
    gate_up = randn(tokens, 2 * INNER)
    bench.case(f"swiglu {tokens} x {INNER}", partial(OPS.swiglu, gate_up), bytes_=gate_up.nbytes * 3 // 2)
    y, row_of = randn(tokens * 4, HIDDEN), torch.randperm(tokens * 4, device=DEVICE).view(-1, 8)
    weights = torch.rand(row_of.shape, device=DEVICE)
    size = y.nbytes + row_of.shape[0] * HIDDEN * 4
    bench.case(f"combine_topk {row_of.shape[0]} x 8", partial(OPS.combine_topk, y, row_of, weights), bytes_=size)


def bench_decode_rows(bench: Bench, rows: int) -> None:
    logits, bias = randn(rows, 256, dtype=FP32), randn(256, dtype=FP32)
    call = partial(
        OPS.route, logits, bias, n_group=8, topk_group=4, top_k=8, norm_topk_prob=True, routed_scaling_factor=2.5
    )
    bench.case(f"route {rows} x 256", call, bytes_=logits.nbytes)
    vocabulary, index = randn(rows, VOCAB, dtype=FP32), torch.arange(rows, device=DEVICE)
    call = partial(OPS.sample_tokens, vocabulary, torch.ones(rows, device=DEVICE), index, index, index)
    bench.case(f"sample_tokens {rows} x {VOCAB}", call, bytes_=vocabulary.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=int, default=30, help="to spend on each case")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args.milliseconds)
    for dtype, peak in bench.peak.items():
        print(f"{str(dtype)[6:]}: {peak / 1e12:.0f} TFLOP/s")
    print(f"copy: {bench.bandwidth / 1e9:.0f} GB/s")
    for dtype in (FP8, BF16):
        for rows, num_experts in ((4096, 8), (64, 8), (16, 2), (128, 2)):
            bench_experts(bench, dtype, rows, num_experts)
        for m in (4096, 64, 1):
            bench_linear(bench, dtype, m, HIDDEN, HIDDEN)
        bench_linear(bench, dtype, 64, 576, HIDDEN)
    bench_linear(bench, BF16, 64, VOCAB, HIDDEN)
    for m in (4096, 64, 1):
        bench_linear(bench, FP32, m, 256, HIDDEN)
    bench_rows(bench, 8192)
    for rows in (64, 1):
        bench_decode_rows(bench, rows)
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "tflops": {str(dtype)[6:]: round(peak / 1e12, 1) for dtype, peak in bench.peak.items()},
        "copy_gb_per_s": round(bench.bandwidth / 1e9),
        "cases": bench.cases,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
