#!/usr/bin/env python3
"""What the FP8 cache costs and saves: accuracy of shoal-tiny, and the time of decode attention, each against bf16.

python benchmarks/kv_cache_fp8.py --output benchmarks/results/kv-cache-fp8.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import TASKS, questions
from shoal.cluster.commands.eval import final_answer, score
from shoal.kernels.attention import PagedLayout
from shoal.kernels.kv_format import FP8_CACHE, index_key_width, latent_width
from shoal.kernels.ops import Ops
from shoal.runtime.types import RequestOutput

OPS = Ops("cpu")
# float32 is the yardstick: how far bf16 itself is from it.
CACHES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "float32": {"dtype": "float32"},
}
LATENT, ROPE, INDEX_KEY = 512, 64, 128
HEADS, BLOCK_SIZE = 16, 64
SHAPES = {"16 sequences x 1024 keys": (16, 1024), "2 sequences x 8192 keys": (2, 8192)}
LAYERS = 8
"""Caches that take turns, so that entries come from memory as in a model."""


def answers(settings: dict[str, Any], limit: int | None) -> dict[str, list[RequestOutput]]:
    """Greedy answers of shoal-tiny to the held-out questions, per task, with the log-probabilities of their tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=160, logprobs=0, skip_special_tokens=False)
    with LLM(num_threads_per_worker=os.cpu_count(), max_num_seqs=256, **settings) as llm:
        found = {}
        for task in TASKS:
            conversations = [[{"role": "user", "content": row.question}] for row in questions([task], limit)]
            found[task] = llm.chat(conversations, params, thinking=True)
        return found


def accuracy(limit: int | None) -> dict[str, Any]:
    """Scores with each cache, and how far the log-probabilities are from those with a bf16 cache."""
    found = {name: answers(settings, limit) for name, settings in CACHES.items()}
    report: dict[str, Any] = {}
    for name, per_task in found.items():
        right = {
            task: sum(
                final_answer(o, True) == row.answer for o, row in zip(outputs, questions([task], limit), strict=True)
            )
            for task, outputs in per_task.items()
        }
        count = sum(map(len, per_task.values()))
        report[name] = {
            "all tasks": score(sum(right.values()), count),
            "right per task": {task: f"{n} of {len(per_task[task])}" for task, n in right.items()},
        }
        if name != "bfloat16":
            pairs = [pair for task in TASKS for pair in zip(found["bfloat16"][task], per_task[task], strict=True)]
            report[name]["against bfloat16"] = differences(pairs)
    return report


def differences(pairs: list[tuple[RequestOutput, RequestOutput]]) -> dict[str, Any]:
    """Differences between log-probabilities of the same token after the same tokens, up to the first unequal token."""
    found, equal = [], 0
    for a, b in pairs:
        (first,), (second,) = a.outputs, b.outputs
        assert first.logprobs is not None
        assert second.logprobs is not None
        equal += first.token_ids == second.token_ids
        steps = zip(first.token_ids, second.token_ids, first.logprobs, second.logprobs, strict=False)
        for token, other, x, y in steps:
            if token != other:
                break
            found.append(abs(x[token].logprob - y[token].logprob))
    return {
        "tokens compared": len(found),
        "mean |difference of log-probability|": round(statistics.fmean(found), 6),
        "largest": round(max(found), 4),
        "answers with the same tokens": f"{equal} of {len(pairs)}",
    }


def decode_attention(sequences: int, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of `mla_attention` for a token of each sequence, both formats in turn."""
    blocks = context // BLOCK_SIZE
    tables = torch.randperm(sequences * blocks).view(sequences, blocks).int()
    bounds = torch.arange(sequences + 1, dtype=torch.int32)
    layout = PagedLayout(tables, bounds, torch.full((sequences,), context - 1), BLOCK_SIZE)
    q_latent = torch.randn(sequences, HEADS, LATENT).bfloat16()
    q_rope = torch.randn(sequences, HEADS, ROPE).bfloat16()
    caches: dict[str, list[torch.Tensor]] = {"bfloat16": [], "fp8": []}
    for _ in range(LAYERS):
        latent, rope = (
            torch.randn(sequences * context, LATENT).bfloat16(),
            torch.randn(sequences * context, ROPE).bfloat16(),
        )
        caches["bfloat16"].append(torch.cat([latent, rope], dim=1))
        caches["fp8"].append(torch.cat([x.view(FP8_CACHE) for x in (*OPS.quantize_rows_fp8(latent), rope)], dim=1))
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for number, (name, layers) in itertools.product(range(rounds + 1), caches.items()):
        begin = time.perf_counter()
        for kv_cache in layers:
            OPS.mla_attention(q_latent, q_rope, kv_cache, layout, 0.1)
        if number:  # the first is the warm-up
            seconds[name].append((time.perf_counter() - begin) / LAYERS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "milliseconds": {
            name: {
                "median": round(1e3 * medians[name], 3),
                "min": round(1e3 * min(v), 3),
                "max": round(1e3 * max(v), 3),
            }
            for name, v in seconds.items()
        },
        "fp8 over bfloat16": round(medians["fp8"] / medians["bfloat16"], 3),
    }


def entry_bytes() -> dict[str, dict[str, int]]:
    """Per token and layer of DeepSeek-V3.2's sizes."""
    sizes = {"bfloat16": torch.bfloat16, "fp8": FP8_CACHE}
    return {
        name: {
            "latent and rope key": latent_width(dtype, LATENT, ROPE) * dtype.itemsize,
            "index key": index_key_width(dtype, INDEX_KEY) * dtype.itemsize,
        }
        for name, dtype in sizes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="questions of each task; all of them by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    attention = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        attention[f"threads {threads}"] = {
            name: decode_attention(*shape, args.rounds) for name, shape in SHAPES.items()
        }
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "bytes per token and layer": entry_bytes(),
        "decode attention, 16 heads, latent 512, rope key 64": attention,
        "accuracy of shoal-tiny, thinking": accuracy(args.limit),
    }
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


def cpu_model() -> str:
    """As the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
