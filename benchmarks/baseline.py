#!/usr/bin/env python3
"""Shoal and other engines in turn on one checkpoint and the same token ids: rounds of subprocesses, medians, ratios.

    python benchmarks/baseline.py compare --model m_v3 --rounds 3 --output result.json --workload W1 \\
        --peer 'vllm=vllm/bin/python bench_vllm_cpu.py m_v3 --eager --native-rope --workloads W1 --repeats 1'

A peer's command prints one JSON line with "seconds". `one` is the subprocess that measures Shoal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKLOADS = {"W1": (64, 256, 64), "W2": (16, 32, 256), "W3": (8, 2048, 1), "W4": (1, 128, 128), "TINY": (2, 16, 4)}
"""name: (requests, prompt tokens, output tokens)"""
LAYOUTS: dict[str, dict[str, Any]] = {
    "shoal 1 process x 2 threads": {"executor": "inprocess", "num_threads_per_worker": 2},
    "shoal 2 workers x 1 thread": {"executor": "ray", "data_parallel_size": 2, "num_threads_per_worker": 1},
}
TIMEOUT_S = 1800


def prompts(name: str, vocab_size: int, repeat: int) -> list[list[int]]:
    """Random ids that every engine gets alike; they change with each repeat, so that no prefix cache helps."""
    count, length, _ = WORKLOADS[name]
    rng = random.Random(f"1234/{name}/{repeat}")
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def one(model: str, workload: str, layout: str, repeat: int) -> dict[str, Any]:
    """Measure one layout in this process, after a warm-up with other ids that is not counted."""
    from shoal import LLM, SamplingParams

    _, _, output_len = WORKLOADS[workload]
    begin = time.perf_counter()
    with LLM(model=model, max_num_seqs=64, **LAYOUTS[layout]) as llm:
        startup = time.perf_counter() - begin
        vocab_size = llm.limits.vocab_size

        def generate(rows: list[list[int]], length: int) -> int:
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        warm = prompts(workload, vocab_size, 99)
        generate(warm[: max(2, len(warm) // 4)], min(4, output_len))
        rows = prompts(workload, vocab_size, repeat)
        begin = time.perf_counter()
        produced = generate(rows, output_len)
        seconds = time.perf_counter() - begin
    assert produced == len(rows) * output_len, f"{produced} tokens instead of {len(rows) * output_len}"
    return {"engine": layout, "workload": workload, "seconds": round(seconds, 3), "startup_seconds": round(startup, 2)}


def compare(args: argparse.Namespace) -> None:
    """Rounds of all contenders in turn; writes medians, spread and ratios to the first."""
    me = [sys.executable, str(Path(__file__).resolve()), "one", "--model", args.model, "--workload", args.workload]
    commands = {name: [*me, "--layout", name] for name in LAYOUTS}
    for peer in args.peer:
        name, _, command = peer.partition("=")
        commands[name] = shlex.split(command)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            extra = ["--repeat", str(number)] if name in LAYOUTS else []
            seconds[name].append(measure([*command, *extra]))
            print(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians))
    count, prompt, output = WORKLOADS[args.workload]
    report = {
        "workload": {"name": args.workload, "requests": count, "prompt_tokens": prompt, "output_tokens": output},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "rounds": args.rounds,
        "seconds": {n: {"median": medians[n], "min": min(v), "max": max(v), "all": v} for n, v in seconds.items()},
        "time_over_first": {n: round(m / medians[first], 3) for n, m in medians.items()},
        "comparable": False,
    }
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["time_over_first"]))


def measure(command: list[str]) -> float:
    """Seconds that a contender's subprocess reports."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(json.loads(lines[-1])["seconds"])


def cpu_model() -> str:
    """As the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("one", "compare"):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--workload", required=True, choices=list(WORKLOADS))
    commands.choices["one"].add_argument("--layout", required=True, choices=list(LAYOUTS))
    commands.choices["one"].add_argument("--repeat", type=int, default=0)
    commands.choices["compare"].add_argument("--rounds", type=int, default=3)
    commands.choices["compare"].add_argument("--output", required=True)
    commands.choices["compare"].add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(one(args.model, args.workload, args.layout, args.repeat)))
    else:
        compare(args)


if __name__ == "__main__":
    main()
