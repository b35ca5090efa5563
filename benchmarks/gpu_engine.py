#!/usr/bin/env python3
"""One engine on one GPU: V3.2's shapes with fewer layers and experts, FP8 weights, random numbers.

    python benchmarks/gpu_engine.py --output benchmarks/results/<device>/engine.json

Prompts go in, then every request decodes at temperature 1. Of decode steps: time, and the part of it in which no kernel
ran. Then the same with `top_p`, whose tokens take longer to choose.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.models.families import parse_config
from shoal.runtime.random_checkpoint import YARN, is_quantized, tensor_shapes, tiny_config
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.types import Request, SamplingParams

DEVICE = torch.device("cuda")
V32: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "rope_scaling": YARN | {"original_max_position_embeddings": 4096},
    "max_position_embeddings": 163840,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    },
}
"""Where V3.2 differs from the tiny model of its type."""


def write_model(model_dir: Path, layers: int, experts: int) -> int:
    """Random weights, made on the GPU, one file for each layer; returns their bytes."""
    config = tiny_config("deepseek_v32", V32 | {"num_hidden_layers": layers, "n_routed_experts": experts})
    (model_dir / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(model_dir / "tokenizer.json")
    files: dict[str, dict[str, Tensor]] = {}
    torch.manual_seed(0)
    for name, shape in tensor_shapes(parse_config(config)).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        tensors = files.setdefault(part, {})
        if is_quantized(name):
            # numbers of e4m3 of about unit variance; the scale makes them weights
            tensors[name] = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(torch.float8_e4m3fn).cpu()
            blocks = [-(-size // 128) for size in shape]
            tensors[name + "_scale_inv"] = torch.full(blocks, shape[1] ** -0.5)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(shape) * 0.1
        else:
            values = torch.randn(shape, device=DEVICE)
            values = 1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
            tensors[name] = values.to(torch.bfloat16).cpu()
    weight_map = {}
    for part, tensors in files.items():
        save_file(tensors, model_dir / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{part}.safetensors")
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


def step(engine: Engine) -> float:
    """Seconds of one step, with everything that the device does in it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    engine.step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def busy_seconds(engine: Engine, steps: int) -> tuple[float, float, list[tuple[str, float, int]]]:
    """(seconds in which kernels ran, of all, the kernels that took longest) over some steps, from the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    events = profile.events()
    assert events is not None
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name[:70], []).append(event.time_range.end - event.time_range.start)
    longest = sorted(((n, sum(t) / steps, len(t) // steps) for n, t in by_name.items()), key=lambda x: -x[1])
    return busy / 1e6, wall, longest


def measure(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    engine = build_engine(
        model_dir,
        EngineConfig(
            max_num_seqs=args.batch,
            max_model_len=args.context + args.steps * 4 + 64,
            max_num_batched_tokens=args.chunk,
            kv_cache_dtype=args.kv_cache_dtype,
        ),
        single_process_groups(DEVICE),
        on_phase=print,
    )
    torch.cuda.synchronize()
    gc.collect()
    gc.freeze()  # as every process of Shoal does once it has an engine
    result: dict[str, Any] = {"load_s": round(time.perf_counter() - begin, 1)}
    result["memory_gib"] = round(torch.cuda.memory_allocated() / 2**30, 1)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 129000, (args.context,), generator=generator).tolist() for _ in range(args.batch)]
    add_requests(engine, prompts, args.steps, temperature=1.0)
    prefill = []
    while prompts_are_left(engine):
        if len(prefill) == 8:
            result["prefill_kernels_us"] = table(busy_seconds(engine, 1)[2])
        prefill.append(step(engine))
    result["prefill_tokens_per_s"] = round(args.chunk / statistics.median(prefill[1:] or prefill))
    result |= decode(engine, args)
    while engine.has_unfinished:
        engine.step()
    add_requests(engine, prompts, args.steps, temperature=1.0, top_p=0.95)
    while prompts_are_left(engine):
        step(engine)
    result["top_p"] = decode(engine, args)
    return result


def add_requests(engine: Engine, prompts: list[list[int]], steps: int, **params: Any) -> None:
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=steps * 4 + 32, ignore_eos=True, seed=i, **params)
        engine.add_request(Request(request_id=str(i), index=i, prompt_token_ids=tuple(prompt), params=sampling))


def prompts_are_left(engine: Engine) -> bool:
    running = engine.scheduler.running
    return engine.scheduler.num_waiting > 0 or any(s.num_computed_tokens < s.num_prompt_tokens for s in running)


def decode(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of steps in which every request decodes."""
    for _ in range(8):
        step(engine)
    times = [step(engine) for _ in range(args.steps)]
    ends = [time.perf_counter()]
    for _ in range(args.steps):
        engine.step()
        ends.append(time.perf_counter())
    torch.cuda.synchronize()
    wall = (time.perf_counter() - ends[0]) / args.steps
    busy, profiled, longest = busy_seconds(engine, args.steps // 2)
    busy, profiled = busy / (args.steps // 2), profiled / (args.steps // 2)
    return {
        "decode_step_ms": round(1e3 * statistics.median(times), 3),
        "decode_tokens_per_s": round(args.batch / wall),
        "longest_step_ms": round(1e3 * max(end - begin for begin, end in pairwise(ends)), 3),
        "kernel_ms_per_step": round(1e3 * busy, 3),
        "profiled_step_ms": round(1e3 * profiled, 3),
        "host_gap": round(1 - busy / wall, 4),
        "kernels_us": table(longest),
    }


def table(kernels: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """The kernels that take longest, of a step."""
    return [{"name": name, "us": round(us, 1), "calls": calls} for name, us, calls in kernels[:25]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    model_dir = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        size = write_model(model_dir, args.layers, args.experts)
        result = measure(args, model_dir)
    finally:
        shutil.rmtree(model_dir)
    result |= {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "checkpoint_gib": round(size / 2**30, 1),
    }
    for figures in (result, result["top_p"]):
        print(json.dumps({name: value for name, value in figures.items() if not isinstance(value, list | dict)}))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
