"""`shoal bench throughput`: how many tokens per second a model answers on this machine or cluster."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import resource
import statistics
import struct
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from shoal.runtime.types import RequestOutput, SamplingParams

from .engine_args import EngineArgs
from .llm import LLM

PACKAGES = ("shoal", "torch", "ray", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Random prompts of one length, each answered with exactly `output_len` tokens."""

    num_prompts: int
    input_len: int
    output_len: int
    seed: int = 0

    def prompts(self, vocab_size: int, repeat: int) -> list[list[int]]:
        """Different token ids for every repeat, so that no prefix cache can help between them."""
        rng = random.Random(f"{self.seed}/{repeat}")
        low = min(3, vocab_size - 1)
        return [[rng.randrange(low, vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]


def run_throughput(args: EngineArgs, workload: Workload, *, executor: str, runs: int, on_phase: Any) -> dict[str, Any]:
    """Start the engines, warm up, run the workload `runs` times and report; every figure is measured here.

    The warm-up runs a quarter of the prompts with different token ids and is not counted.
    """
    started = time.perf_counter()
    with LLM.from_args(args, executor=executor, on_phase=on_phase) as llm:
        startup_s = time.perf_counter() - started
        vocab_size = llm.model_config.vocab_size
        _run(llm, workload.prompts(vocab_size, -1)[: max(1, workload.num_prompts // 4)], min(4, workload.output_len))
        seconds, digests = [], []
        for repeat in range(runs):
            prompts = workload.prompts(vocab_size, repeat)
            begin = time.perf_counter()
            outputs = _run(llm, prompts, workload.output_len)
            seconds.append(time.perf_counter() - begin)
            digests.append(output_digest(outputs))
    median = statistics.median(seconds)
    inputs, outputs_total = workload.num_prompts * workload.input_len, workload.num_prompts * workload.output_len
    return {
        "benchmark": "throughput",
        "environment": environment(),
        "layout": {
            "executor": executor,
            "tensor_parallel_size": args.tensor_parallel_size,
            "data_parallel_size": args.data_parallel_size,
            "replicas": args.replicas,
            "num_threads_per_worker": args.num_threads_per_worker,
        },
        "engine": asdict(args),
        "workload": asdict(workload),
        "startup_seconds": round(startup_s, 3),
        "warmup": "a quarter of the prompts, not counted",
        "runs": [round(s, 4) for s in seconds],
        "seconds": {"median": round(median, 4), "min": round(min(seconds), 4), "max": round(max(seconds), 4)},
        "tokens_per_second": {
            "input": round(inputs / median, 1),
            "output": round(outputs_total / median, 1),
            "total": round((inputs + outputs_total) / median, 1),
        },
        "peak_rss_mib": peak_rss_mib(),
        "output_digests": digests,
        "comparable": False,
        "comparable_reason": "measured on a CPU",
    }


def _run(llm: LLM, prompts: list[list[int]], output_len: int) -> list[RequestOutput]:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    for output in outputs:
        if len(output.outputs[0].token_ids) != output_len:
            raise RuntimeError(f"a row gave {len(output.outputs[0].token_ids)} tokens instead of {output_len}")
    return outputs


def output_digest(outputs: list[RequestOutput]) -> str:
    """SHA-256 over the token ids of all continuations, in order: equal for every layout."""
    digest = hashlib.sha256()
    for output in outputs:
        for completion in output.outputs:
            digest.update(struct.pack(f"<{len(completion.token_ids)}q", *completion.token_ids))
    return f"sha256:{digest.hexdigest()}"


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    from shoal.kernels.build import isa

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kernels": isa(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def peak_rss_mib() -> int:
    """Largest resident size of this process and of its largest finished child, in MiB."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round((own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
