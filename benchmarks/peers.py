#!/usr/bin/env python3
"""Shoal and other engines in turn on one checkpoint and the same token ids: medians, ratios, fraction of the limit.

    python benchmarks/peers.py compare --model m_v3 --long-model m_v32 --workloads W1,W2,W5 --rounds 3 \\
        --peer 'NAME=COMMAND' --output result.json --plot result.png

A peer is any command. {model} and {workload} in it are replaced by the checkpoint and one of WORKLOADS; it generates
the workload's output tokens greedily from `prompts(workload, vocab_size)`, after a warm-up with other ids, and the last
line that it prints is a JSON object:

    "seconds"        of the measured run, without start-up and warm-up
    "startup_s"      optional: from its start until it can answer
    "peak_rss_mib"   optional: else the process tree is sampled from outside

Every measurement is a process of its own; in each round another contender begins. A peer that fails is reported and
asked no more. The output file keeps the workloads that it has and that are not measured again.
`one` is the process that measures Shoal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORKLOADS = {
    "W1": (64, 256, 64),
    "W2": (16, 32, 256),
    "W3": (8, 2048, 1),
    "W4": (1, 128, 128),
    "W5": (2, 8192, 64),
    "TINY": (2, 16, 4),
}
"""name: (requests, prompt tokens, output tokens)"""
LONG_CONTEXT = {"W5"}
"""These take --long-model."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "shoal 1 process x 2 threads": {"executor": "inprocess", "num_threads_per_worker": 2},
    "shoal 2 workers x 1 thread": {"executor": "ray", "data_parallel_size": 2, "num_threads_per_worker": 1},
}
TIMEOUT_S = 1800
SAMPLE_S = 0.2


def prompts(name: str, vocab_size: int, repeat: int = 0) -> list[list[int]]:
    """Random ids that every engine gets alike; another `repeat` has others."""
    count, length, _ = WORKLOADS[name]
    rng = random.Random(f"1234/{name}/{repeat}")
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def one(model: str, workload: str, layout: str) -> dict[str, Any]:
    """Measure one layout in this process; until its first token counts as start-up."""
    from shoal import LLM, SamplingParams

    count, prompt_len, output_len = WORKLOADS[workload]
    engine = {"max_num_seqs": count, "max_model_len": prompt_len + output_len, **LAYOUTS[layout]}
    with LLM(model=model, **engine) as llm:
        vocab_size = llm.limits.vocab_size

        def generate(rows: list[list[int]], length: int) -> int:
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        warm = prompts(workload, vocab_size, 99)
        generate([warm[0][:16]], 1)
        startup = seconds_since_start()
        generate(warm[: max(2, len(warm) // 4)], min(4, output_len))
        rows = prompts(workload, vocab_size)
        begin = time.perf_counter()
        produced = generate(rows, output_len)
        seconds = time.perf_counter() - begin
    assert produced == len(rows) * output_len, f"{produced} tokens instead of {len(rows) * output_len}"
    settings = {"invariance": llm.args.invariance, **engine}
    return {"seconds": round(seconds, 4), "startup_s": round(startup, 2), "engine": settings}


def seconds_since_start() -> float:
    """How long this process has been there, as the kernel knows it."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def compare(args: argparse.Namespace) -> None:
    """Measure the workloads that were asked for, and write the report, the table and the plot."""
    from shoal.cluster.bench.roofline import measure_peaks
    from shoal.cluster.environment import environment

    path = Path(args.output)
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"benchmark": "peers", "workloads": {}}
    report["comparable"] = False
    report["environment"] = environment()
    for workload in args.workloads:
        model = args.long_model if workload in LONG_CONTEXT else args.model
        if model is None:
            raise SystemExit(f"{workload} needs --long-model")
        contenders = {name: shoal_command(model, workload, name) for name in args.layouts}
        for peer in args.peer:
            name, _, command = peer.partition("=")
            contenders[name] = [
                part.replace("{model}", model).replace("{workload}", workload) for part in shlex.split(command)
            ]
        before = measure_peaks()
        runs = run_rounds(contenders, args.rounds, args.timeout)
        peaks = before.best(measure_peaks())
        report["workloads"][workload] = summary(workload, model, peaks, runs, args.layouts) | {
            "rounds": args.rounds,
            "command": without_paths(shlex.join(["python", *sys.argv])),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if args.plot:
        plot(report, Path(args.plot))


def shoal_command(model: str, workload: str, layout: str) -> list[str]:
    """The process that measures a layout."""
    me = [sys.executable, str(Path(__file__).resolve())]
    return [*me, "one", "--model", model, "--workload", workload, "--layout", layout]


def run_rounds(contenders: dict[str, list[str]], rounds: int, timeout_s: float) -> dict[str, list[dict[str, Any]]]:
    """What every contender said in every round; of one that failed, the reason alone."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    failed: set[str] = set()
    names = list(contenders)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in failed:
                continue
            try:
                runs[name].append(measure(contenders[name], timeout_s))
            except RuntimeError as error:
                if name in LAYOUTS:
                    raise
                failed.add(name)
                runs[name] = [{"error": without_paths(str(error).splitlines()[-1])}]
            print(f"round {number + 1}: {name} {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def measure(command: list[str], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """What a contender's process says on its last line of JSON, with the peak of the memory of its process tree.

    RuntimeError, whose last line is the likely reason, when it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = PeakMemory(process.pid)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise RuntimeError(f"no answer within {timeout_s:g} s") from error
    finally:
        peak_mib = peak.stop()
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{stdout[-2000:]}{stderr[-2000:]}".rstrip())
    return {"peak_rss_mib": peak_mib, **json.loads(lines[-1])}


class PeakMemory:
    """The largest sum of resident sizes of a process and its descendants, sampled until `stop`; shared pages count in
    each of them."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak_kib, self._stopped = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """In MiB."""
        self._stopped.set()
        self._thread.join()
        return self._peak_kib // 1024

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self._peak_kib = max(self._peak_kib, _tree_kib(self._pid), _high_water_kib(self._pid))


def _high_water_kib(pid: int) -> int:
    """Peak resident memory of one process (VmHWM, so samples miss nothing), in KiB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


def _tree_kib(pid: int) -> int:
    """0 for a process that has ended meanwhile."""
    folder = Path(f"/proc/{pid}")
    try:
        resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return resident + sum(_tree_kib(int(child)) for child in children)


def summary(
    workload: str, model: str, peaks: Any, runs: dict[str, list[dict[str, Any]]], layouts: list[str]
) -> dict[str, Any]:
    """Medians with spread, ratios between contenders, and how close each comes to the limit."""
    from shoal.cluster.bench.roofline import workload_limit
    from shoal.runtime.models.families import read_config

    count, prompt, output = WORKLOADS[workload]
    limit = workload_limit(read_config(model), peaks, requests=count, prompt=prompt, output=output)
    contenders: dict[str, Any] = {}
    for name, said in runs.items():
        if "error" in said[0]:
            contenders[name] = said[0]
            continue
        seconds = [run["seconds"] for run in said]
        contenders[name] = {
            "seconds": {**spread(seconds), "all": seconds},
            "fraction_of_limit": round(limit / statistics.median(seconds), 4),
            "output_tokens_per_s": round(count * output / statistics.median(seconds), 2),
            "peak_rss_mib": max(run["peak_rss_mib"] for run in said),
            "startup_s": spread([run["startup_s"] for run in said]) if "startup_s" in said[0] else None,
            "engine": said[0].get("engine"),
        }
    measured = {name: c["seconds"]["all"] for name, c in contenders.items() if "seconds" in c}
    return {
        "requests": count,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "model": Path(model).name,
        "peaks": {"flops_per_s": peaks.flops_per_s, "bytes_per_s": peaks.bytes_per_s},
        "limit_s": round(limit, 4),
        "contenders": contenders,
        "best_peer": min(
            (name for name in measured if name not in layouts),
            key=lambda n: statistics.median(measured[n]),
            default=None,
        ),
        "time_over": {
            layout: {name: ratio(measured[layout], seconds) for name, seconds in measured.items() if name != layout}
            for layout in layouts
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": round(statistics.median(values), 4), "min": min(values), "max": max(values)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Our time over theirs: of the medians, and the least and the greatest of the rounds."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(ours) / statistics.median(theirs)
    return {"of_medians": round(of_medians, 4), "min": round(min(rounds), 4), "max": round(max(rounds), 4)}


def without_paths(text: str) -> str:
    """Absolute paths become the names of their files."""
    return re.sub(r"(?<![\w.}])/(?:[^\s/'\"=:]+/)*(?=[^\s/'\"=:])", "", text)


def table(report: dict[str, Any]) -> str:
    """One line for each workload and contender; over best: the time against the best peer's."""
    head = f"{'':6}{'':30}{'seconds':>9}{'min':>9}{'max':>9}{'of limit':>10}{'over best':>11}{'MiB':>7}{'start s':>9}"
    lines = [head]
    for workload, result in report["workloads"].items():
        lines.append(f"{workload:6}{'limit':30}{result['limit_s']:9.2f}")
        for name, c in result["contenders"].items():
            if "error" in c:
                lines.append(f"{'':6}{name:30}  failed: {c['error'][:80]}")
                continue
            numbers = "".join(f"{c['seconds'][key]:9.2f}" for key in ("median", "min", "max"))
            over = result["time_over"].get(name, {}).get(result["best_peer"])
            over_best = f"{over['of_medians']:.2f}" if over else ""
            startup = f"{c['startup_s']['median']:.1f}" if c["startup_s"] else ""
            lines.append(
                f"{'':6}{name:30}{numbers}{c['fraction_of_limit']:10.0%}{over_best:>11}{c['peak_rss_mib']:7d}"
                f"{startup:>9}"
            )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """How close every contender comes to the limit of every workload."""
    from plots import save_bars

    workloads = report["workloads"]
    names = list(dict.fromkeys(name for result in workloads.values() for name in result["contenders"]))
    bars = {
        name: [result["contenders"].get(name, {}).get("fraction_of_limit", 0.0) for result in workloads.values()]
        for name in names
    }
    titles = [
        f"{name}\n{r['requests']} x {r['prompt_tokens']} -> {r['output_tokens']}" for name, r in workloads.items()
    ]
    save_bars(path, titles, bars, ylabel="physical limit / measured time", label="{:.0%}")


def names_in(known: Any) -> Any:
    """An argument that lists some of the known names, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    single = commands.add_parser("one")
    single.add_argument("--model", required=True)
    single.add_argument("--workload", required=True, choices=list(WORKLOADS))
    single.add_argument("--layout", required=True, choices=list(LAYOUTS))
    several = commands.add_parser("compare")
    several.add_argument("--model", required=True)
    several.add_argument("--long-model", help=f"for {', '.join(sorted(LONG_CONTEXT))}: a checkpoint with an indexer")
    several.add_argument("--workloads", type=names_in(WORKLOADS), default=["W1", "W2", "W3", "W4"], metavar="W1,W2,..")
    several.add_argument("--layouts", type=names_in(LAYOUTS), default=list(LAYOUTS), metavar="A,B,..")
    several.add_argument("--rounds", type=int, default=3)
    several.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="of one measurement")
    several.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    several.add_argument("--output", required=True, metavar="FILE.json")
    several.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(one(args.model, args.workload, args.layout)))
    else:
        compare(args)


if __name__ == "__main__":
    main()
