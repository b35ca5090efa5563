#!/usr/bin/env python3
"""What a step costs as the context grows, as the batch grows, and over ranks: dense attention against sparse.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json
    python benchmarks/scaling.py --curves context --output benchmarks/results/scaling.json

Makes its own checkpoints with random weights, a DeepSeek-V3 and a V3.2 of the same sizes. Points that the output file
has are not measured again, so an interrupted run goes on where it was; `--again` measures the chosen curves anew. A
picture of each curve is written next to the output.

context  one generated token for each of 4 sequences, and a chunk of 512 prompt tokens, at the end of 1k to 32k tokens
batch    one generated token for each of 1 to 256 sequences with 512 tokens
ranks    a whole job: 32 prompts of 128 tokens, 32 generated, on one rank and on two

A step of the first two curves is one call of the model runner over a cache of random entries.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import names_in, without_paths

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "max_position_embeddings": 32768,
}
MODELS = {
    "dense": ("deepseek_v3", SIZES),
    "sparse": ("deepseek_v32", SIZES | {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 256}),
}
CONTEXTS = [1024 << i for i in range(6)]
BATCHES = [1 << i for i in range(9)]
DECODE_SEQUENCES, CHUNK, BATCH_CONTEXT = 4, 512, 512
LAYOUTS = {
    "1 rank x 1 thread": ["--executor", "inprocess", "--num-threads-per-worker", "1"],
    "1 rank x 2 threads": ["--executor", "inprocess", "--num-threads-per-worker", "2"],
    "2 ranks x 1 thread, data parallel": ["-dp", "2", "--num-threads-per-worker", "1"],
    "2 ranks x 1 thread, tensor parallel": ["-tp", "2", "--num-threads-per-worker", "1"],
}
JOB = ["--num-prompts", "32", "--input-len", "128", "--output-len", "32", "--max-model-len", "160"]
BLOCK_SIZE = 64
MIN_SECONDS, MIN_STEPS = 1.0, 3
TIMEOUT_S = 600

Point = tuple[str, Callable[[], dict[str, Any]]]
"""Its name in the output, and how to measure it."""


def context_points(models: Path, contexts: list[int]) -> Iterator[Point]:
    """Seconds of a decode step and of a prefill chunk at the end of contexts of these lengths."""
    for kind in MODELS:
        steps = Steps(models, kind, DECODE_SEQUENCES * max(contexts))
        for context in contexts:

            def measure(context: int = context, steps: Steps = steps) -> dict[str, Any]:
                decode, chunk = steps.seconds(DECODE_SEQUENCES, 1, context), steps.seconds(1, CHUNK, context)
                return {
                    "decode_seconds": decode,
                    "decode_seconds_per_token": decode / DECODE_SEQUENCES,
                    "prefill_seconds_per_token": chunk / CHUNK,
                }

            yield f"{kind} {context}", measure


def batch_points(models: Path, batches: list[int]) -> Iterator[Point]:
    """Seconds of a decode step of so many sequences."""
    for kind in MODELS:
        steps = Steps(models, kind, max(batches) * BATCH_CONTEXT)
        for batch in batches:

            def measure(batch: int = batch, steps: Steps = steps) -> dict[str, Any]:
                seconds = steps.seconds(batch, 1, BATCH_CONTEXT)
                return {"decode_seconds": seconds, "tokens_per_s": batch / seconds}

            yield f"{kind} {batch}", measure


def ranks_points(models: Path, layouts: dict[str, list[str]]) -> Iterator[Point]:
    """Output tokens per second of a job, as `shoal bench throughput` measures it."""
    for kind in MODELS:
        for layout, flags in layouts.items():
            model = checkpoint(models, kind)

            def measure(model: Path = model, flags: list[str] = flags) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as folder:
                    report = Path(folder) / "report.json"
                    command = ["-m", "shoal", "bench", "throughput", "--model", str(model), "-o", str(report)]
                    subprocess.run(
                        [sys.executable, *command, *JOB, *flags],
                        check=True,
                        timeout=TIMEOUT_S,
                        stdout=subprocess.DEVNULL,
                    )
                    results = json.loads(report.read_text())["results"]
                return {"output_tokens_per_s": results["output_tokens_per_s"], "seconds": results["seconds"]}

            yield f"{kind} {layout}", measure


class Steps:
    """Steps of one model over a cache with room for `num_tokens`; loaded when the first one is measured."""

    def __init__(self, models: Path, kind: str, num_tokens: int) -> None:
        self._models, self._kind = models, kind
        self._num_blocks = -(-num_tokens // BLOCK_SIZE)
        self._runner: Any = None

    def seconds(self, sequences: int, length: int, context: int) -> float:
        """Median of steps in which each sequence computes the last `length` tokens of its context.

        One is a generated token, several are a chunk of a prompt.
        """
        from shoal.runtime.scheduling.batch import Batch, ScheduledSequence

        runner = self._load()
        blocks = -(-context // BLOCK_SIZE)
        draw = random.Random(0)
        batch = Batch(
            [
                ScheduledSequence(
                    seq_id=i,
                    start=context - length,
                    token_ids=draw.choices(range(3, SIZES["vocab_size"]), k=length),
                    block_table=list(range(i * blocks, (i + 1) * blocks)),
                    num_prompt_tokens=context if length > 1 else 0,
                    num_logits=1,
                )
                for i in range(sequences)
            ]
        )
        runner.run(batch, 0)
        seconds: list[float] = []
        while len(seconds) < MIN_STEPS or sum(seconds) < MIN_SECONDS:
            begin = time.perf_counter()
            runner.run(batch, 0)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def _load(self) -> Any:
        from shoal.parallel.groups import single_process_groups
        from shoal.runtime.engine.config import EngineConfig
        from shoal.runtime.engine.model_loading import load_model

        if self._runner is None:
            config = EngineConfig(num_kv_blocks=self._num_blocks, block_size=BLOCK_SIZE)
            model = checkpoint(self._models, self._kind)
            self._runner = load_model(model, config, single_process_groups(), lambda _: None).runner
            cache = self._runner.cache
            for layer in (*cache.latents, *(keys for keys in cache.index_keys if keys is not None)):
                layer.normal_(generator=torch.Generator().manual_seed(0))
        return self._runner


def checkpoint(models: Path, kind: str) -> Path:
    """A model of that kind, made once."""
    from shoal.runtime.random_checkpoint import make_checkpoint

    folder = models / kind
    if not (folder / "tokenizer.json").exists():  # written last
        model_type, sizes = MODELS[kind]
        make_checkpoint(folder, model_type, dtype=torch.bfloat16, overrides=sizes)
    return folder


def measure_curve(name: str, points: Iterator[Point], report: dict[str, Any], path: Path) -> None:
    """Measure the points that the report lacks, and write it after each of them."""
    curve = report["curves"].setdefault(name, {})
    for key, measure in points:
        if key not in curve:
            curve[key] = measure()
            path.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{name}: {key} {curve[key]}", file=sys.stderr, flush=True)


def plot(name: str, curve: dict[str, Any], path: Path) -> None:
    """The picture of one curve."""
    from plots import save_bars, save_lines

    if name == "ranks":
        layouts = list(dict.fromkeys(key.partition(" ")[2] for key in curve))
        bars = {
            kind: [curve[f"{kind} {layout}"]["output_tokens_per_s"]["median"] for layout in layouts] for kind in MODELS
        }
        save_bars(
            path,
            [layout.replace(", ", "\n") for layout in layouts],
            bars,
            ylabel="output tokens per second",
            label="{:.0f}",
        )
        return
    titles = {
        "context": {
            "decode_seconds_per_token": ("ms per generated token", 1e3),
            "prefill_seconds_per_token": ("ms per prompt token", 1e3),
        },
        "batch": {"tokens_per_s": ("generated tokens per second", 1.0), "decode_seconds": ("ms per step", 1e3)},
    }[name]
    panels = {}
    for field, (title, factor) in titles.items():
        lines: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in MODELS}
        for key, point in sorted(curve.items(), key=lambda item: int(item[0].split()[1])):
            kind, x = key.split()
            lines[kind][0].append(int(x))
            lines[kind][1].append(factor * point[field])
        panels[title] = lines
    save_lines(path, panels, xlabel={"context": "tokens of context", "batch": "sequences"}[name])


def main() -> None:
    curves: dict[str, Callable[[Path], Iterator[Point]]] = {
        "context": lambda models: context_points(models, [c for c in CONTEXTS if c <= args.max_context]),
        "batch": lambda models: batch_points(models, [b for b in BATCHES if b <= args.max_batch]),
        "ranks": lambda models: ranks_points(models, LAYOUTS),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--curves", type=names_in(curves), default=list(curves), metavar="A,B,..")
    parser.add_argument("--max-context", type=int, default=CONTEXTS[-1])
    parser.add_argument("--max-batch", type=int, default=BATCHES[-1])
    parser.add_argument("--models", type=Path, default=Path("build/scaling"), help="where the checkpoints are made")
    parser.add_argument("--again", action="store_true", help="forget the points of the chosen curves")
    args = parser.parse_args()
    path: Path = args.output
    path.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"benchmark": "scaling", "curves": {}}
    report |= header()
    for name in args.curves:
        if args.again:
            report["curves"].pop(name, None)
        measure_curve(name, curves[name](args.models), report, path)
        plot(name, report["curves"][name], path.with_name(f"{path.stem}-{name}.png"))


def header() -> dict[str, Any]:
    """What the measurements were made with."""
    from shoal.cluster.environment import environment

    return {
        "command": without_paths(" ".join(["python", *sys.argv])),
        "comparable": False,
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "models": {kind: {"model_type": model_type, **sizes} for kind, (model_type, sizes) in MODELS.items()},
        "decode_sequences": DECODE_SEQUENCES,
        "prefill_chunk": CHUNK,
        "batch_context": BATCH_CONTEXT,
        "job": " ".join(JOB),
    }


if __name__ == "__main__":
    main()
