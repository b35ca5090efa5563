#!/usr/bin/env python3
"""What reliability costs: a job on two workers with supervisor, journal and tags of collectives, and without them.

    python benchmarks/overhead.py compare --model m_v3 --workload W2 --rounds 5 --output result.json

Without: no worker reports to the supervisor; nothing is told of unfinished rows, and the journal is not written;
headers between ranks carry sizes, are made once and are not compared. `one` is the subprocess that measures a variant.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peers import WORKLOADS, measure, prompts

VARIANTS = ("with", "without")
ENGINE = {"data_parallel_size": 2, "num_threads_per_worker": 1, "max_num_seqs": 64}


def build_untagged(*args: Any) -> Any:
    """In a worker: an engine whose collectives have headers that are made once and say sizes only."""
    from shoal.cluster.workers.engine_factory import build_engine
    from shoal.parallel import collectives

    common = bytes(collectives._COMMON.size)

    def call(
        self: Any, kind: Any, layer: Any, op: Any, dtype: Any, sends: Any, expected: Any, peers: Any = None
    ) -> Any:
        return collectives._Call(common, sends, expected, self._peers if peers is None else peers)

    def check_header(self: Any, _call: Any, peer: int) -> int:
        return int(collectives._SENDER.unpack_from(self._recv_headers[peer])[2])

    collectives.Communicator._call = call
    collectives.Communicator._check_header = check_header
    return build_engine(*args)


def without() -> ExitStack:
    """The driver without supervision and without a journal."""
    from shoal.cluster.jobs.journal import Journal
    from shoal.cluster.supervision.supervisor import Supervisor

    stack = ExitStack()
    stack.enter_context(patch.object(Supervisor, "launch", lambda self, launch: launch))
    stack.enter_context(patch.object(Journal, "append", lambda self, records: None))
    return stack


def one(model: str, workload: str, variant: str, repeat: int) -> dict[str, Any]:
    """Seconds of a job, without its start; after a warm-up with other ids."""
    from shoal.cluster.commands.batch import job_spec
    from shoal.cluster.engine_args import EngineArgs
    from shoal.cluster.jobs.config import JobConfig
    from shoal.cluster.jobs.job import run_job
    from shoal.cluster.jobs.progress import ProgressReporter
    from shoal.cluster.jobs.stop_signal import StopSignal
    from shoal.cluster.replicas.start import start_engines

    args = EngineArgs(model=model, **ENGINE)
    _, _, output_len = WORKLOADS[workload]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        factory = {}
        if variant == "without":
            stack.enter_context(without())
            factory = {"engine_factory": "overhead:build_untagged"}
        engines = start_engines(args, **factory)
        stack.callback(engines.close)

        def job(name: str, rows: list[list[int]], length: int) -> float:
            lines = [{"prompt": row, "max_tokens": length, "temperature": 0, "ignore_eos": True} for row in rows]
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            config = JobConfig(input=str(directory / f"{name}.jsonl"), output=str(directory / name), engine=args)
            spec, begin = job_spec(config), 0.0

            def start() -> Any:
                nonlocal begin
                begin = time.perf_counter()
                return engines

            with patch.object(engines, "close"):
                result = run_job(spec, start, stop=StopSignal(), progress=ProgressReporter(io.StringIO()))
            assert (result.exit_code, result.completed) == (0, len(rows)), result
            return time.perf_counter() - begin

        vocab_size = engines.limits.vocab_size
        warm = prompts(workload, vocab_size, 99)
        job("warm", warm[: max(2, len(warm) // 4)], min(4, output_len))
        seconds = job("measured", prompts(workload, vocab_size, repeat), output_len)
    return {"variant": variant, "workload": workload, "seconds": round(seconds, 3)}


def compare(args: argparse.Namespace) -> None:
    """Rounds of both variants in turn, the order changing; medians, spread, and the ratio of the throughputs."""
    from shoal.cluster.environment import environment

    me = [sys.executable, str(Path(__file__).resolve()), "one", "--model", args.model, "--workload", args.workload]
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(args.rounds):
        for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            seconds[variant].append(measure([*me, "--variant", variant, "--repeat", str(number)])["seconds"])
            print(f"round {number + 1}: {variant} {seconds[variant][-1]:.2f} s", file=sys.stderr, flush=True)
    count, prompt, output = WORKLOADS[args.workload]
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    pairs = [b / a for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    report = {
        "workload": {"name": args.workload, "requests": count, "prompt_tokens": prompt, "output_tokens": output},
        "layout": ENGINE,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "cpu": environment()["cpu"],
        "cores": os.cpu_count(),
        "rounds": args.rounds,
        "seconds": {v: {"median": medians[v], "min": min(s), "max": max(s), "all": s} for v, s in seconds.items()},
        "throughput_with_over_without": {
            "of_medians": round(medians["without"] / medians["with"], 4),
            "median_of_pairs": round(statistics.median(pairs), 4),
            "pairs": [round(pair, 4) for pair in pairs],
        },
    }
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["throughput_with_over_without"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run: dict[str, Callable[[argparse.Namespace], None]] = {
        "one": lambda a: print(json.dumps(one(a.model, a.workload, a.variant, a.repeat))),
        "compare": compare,
    }
    for name in run:
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--workload", required=True, choices=list(WORKLOADS))
    commands.choices["one"].add_argument("--variant", required=True, choices=VARIANTS)
    commands.choices["one"].add_argument("--repeat", type=int, default=0)
    commands.choices["compare"].add_argument("--rounds", type=int, default=5)
    commands.choices["compare"].add_argument("--output", required=True)
    args = parser.parse_args()
    run[args.command](args)


if __name__ == "__main__":
    main()
