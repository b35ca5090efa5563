"""`shoal bench throughput`: how many tokens per second a model reads and writes on this machine or cluster."""

from __future__ import annotations

import hashlib
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from shoal.kernels.math_utils import cdiv
from shoal.runtime.engine.step_profile import PHASES, StepProfile
from shoal.runtime.types import RequestOutput, SamplingParams

from ..engine_args import EngineArgs, Executor, read_model_config
from ..environment import environment, peak_rss_mib
from ..exit_codes import ExitCode
from ..llm import LLM
from ..report import engine_errors, line_printer, prepare_report, write_report
from ..workers.engine_factory import BUILD_ENGINE, BUILD_PROFILED_ENGINE
from ..workers.spec import Phase
from .workload import FIRST_TOKEN_ID, Workload


def throughput(
    args: EngineArgs,
    workload: Workload,
    *,
    executor: Executor,
    phases: bool = False,
    output: Path | None,
    stdout: TextIO,
    stderr: TextIO,
) -> int:
    """Measure, print a table on stdout and write the report to `output`; progress goes to stderr.

    `phases`: also measure what the steps spend their time on.

    ValueError for a workload that the model cannot take, EnginesFailed if the engines fail.
    """
    prepare_report(output)
    with engine_errors():
        report = measure(args, workload, executor=executor, phases=phases, say=line_printer(stderr))
    print(table(report), file=stdout, flush=True)
    write_report(output, report)
    return ExitCode.OK


def measure(
    args: EngineArgs, workload: Workload, *, executor: Executor, say: Callable[[str], None], phases: bool = False
) -> dict[str, Any]:
    """Start the engines, warm up, run the workload and return the report.

    The warm-up answers a quarter as many prompts, with token ids of their own, and is not counted.
    """
    model = read_model_config(args)
    needed, longest = workload.input_len + workload.output_len, args.max_model_len or model.max_position_embeddings
    if needed > longest:
        raise ValueError(f"input_len plus output_len is {needed}, above the longest context of {longest} tokens")
    if model.vocab_size <= FIRST_TOKEN_ID:
        raise ValueError(f"a vocabulary of {model.vocab_size} tokens is too small to draw prompts from")
    startup: list[Phase] = []

    def on_phase(phase: Phase) -> None:
        startup.append(phase)
        say(str(phase))

    started = time.perf_counter()
    factory = BUILD_PROFILED_ENGINE if phases else BUILD_ENGINE
    with LLM(executor=executor, on_phase=on_phase, engine_factory=factory, **asdict(args)) as llm:
        startup_s = time.perf_counter() - started
        warm_up = workload.prompts(model.vocab_size, "warm-up")[: cdiv(workload.num_prompts, 4)]
        answer(llm, warm_up, workload.output_len)
        before = llm.step_profiles() if phases else []
        seconds, digests = [], []
        for run in range(workload.runs):
            prompts = workload.prompts(model.vocab_size, str(run))
            begin = time.perf_counter()
            outputs = answer(llm, prompts, workload.output_len)
            seconds.append(time.perf_counter() - begin)
            digests.append(output_digest(outputs))
            say(f"run {run + 1} of {workload.runs}: {seconds[-1]:.2f} s")
        after = llm.step_profiles() if phases else []
        memory = peak_rss_mib()
    on_cpu = args.device == "cpu"
    return {
        "benchmark": "throughput",
        "comparable": not on_cpu,
        "comparable_reason": "measured on a CPU; compare only with runs on the same machine" if on_cpu else None,
        "environment": environment(),
        "model": {"name": Path(args.model).name, "model_type": model.model_type},
        "layout": {
            "executor": llm.executor,
            "num_workers": args.num_workers,
            **args.layout,
        },
        "engine": asdict(args),
        "workload": asdict(workload),
        "warmup": {"num_prompts": len(warm_up), "counted": False},
        "startup": {
            "seconds": round(startup_s, 3),
            "phases": [asdict(phase) | {"seconds": round(phase.seconds, 3)} for phase in startup],
        },
        "results": results(workload, args.num_workers, seconds),
        "step_phases": step_phases([b.since(a) for a, b in zip(before, after, strict=True)], sum(seconds)),
        "peak_rss_mib": memory,
        "output_digests": digests,
    }


def answer(llm: LLM, prompts: Sequence[Sequence[int]], output_len: int) -> list[RequestOutput]:
    """Greedy continuations of exactly `output_len` tokens; RuntimeError if one has another length."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for number, output in enumerate(outputs):
        (completion,) = output.outputs
        if len(completion.token_ids) != output_len:
            reason = completion.error or completion.finish_reason
            raise RuntimeError(f"row {number} has {len(completion.token_ids)} tokens, not {output_len} ({reason})")
    return outputs


def results(workload: Workload, num_workers: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Seconds and rates of the runs: median, min and max, with the values of every run."""
    num_input = workload.num_prompts * workload.input_len
    num_output = workload.num_prompts * workload.output_len
    figures: dict[str, Any] = {
        "num_input_tokens": num_input,
        "num_output_tokens": num_output,
        "seconds": _spread(seconds),
    }
    for name, num_tokens in (("input", num_input), ("output", num_output), ("total", num_input + num_output)):
        figures[f"{name}_tokens_per_s"] = _spread([num_tokens / s for s in seconds])
        figures[f"{name}_tokens_per_s_per_worker"] = _spread([num_tokens / s / num_workers for s in seconds])
    return figures


def step_phases(ranks: Sequence[StepProfile], run_seconds: float) -> dict[str, Any] | None:
    """Shares of the time inside steps, averaged over the ranks, and every rank's own seconds; None for no ranks."""
    if not ranks:
        return None
    totals = [sum(rank.seconds.values()) for rank in ranks]
    return {
        "share": {phase: round(sum(r.seconds[phase] for r in ranks) / sum(totals), 4) for phase in PHASES},
        "share_of_time_between_steps": round(1 - sum(totals) / (len(ranks) * run_seconds), 4),
        "seconds_per_step": round(sum(totals) / sum(rank.num_steps for rank in ranks), 6),
        "ranks": [
            {"num_steps": r.num_steps, "seconds": {phase: round(s, 4) for phase, s in r.seconds.items()}} for r in ranks
        ],
    }


def output_digest(outputs: Sequence[RequestOutput]) -> str:
    """`sha256:<hex>` over the token ids of all continuations, in order: equal for every layout."""
    digest = hashlib.sha256()
    for output in outputs:
        for completion in output.outputs:
            digest.update(struct.pack(f"<{len(completion.token_ids)}I", *completion.token_ids))
    return f"sha256:{digest.hexdigest()}"


def _sizes(layout: dict[str, Any]) -> str:
    if isinstance(layout["replicas"], list):
        each = [f"{r['role']} tp {r['tensor_parallel_size']} dp {r['data_parallel_size']}" for r in layout["replicas"]]
        return ", ".join(each)
    sizes = f"tensor parallel {layout['tensor_parallel_size']}, data parallel {layout['data_parallel_size']}"
    return f"{sizes}, replicas {layout['replicas']}"


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per figure."""
    workload, layout, figures = report["workload"], report["layout"], report["results"]
    memory, startup = report["peak_rss_mib"], report["startup"]
    what = f"{workload['num_prompts']} prompts, {workload['input_len']} tokens in, {workload['output_len']} out"
    lines = [
        f"{report['model']['name']}: {what}, {workload['runs']} runs",
        f"workers {layout['num_workers']} ({layout['executor']}): {_sizes(layout)}",
        f"{'':30}{'median':>10}{'min':>10}{'max':>10}",
    ]
    for name in ("seconds", "input_tokens_per_s", "output_tokens_per_s", "total_tokens_per_s"):
        lines.append(_row(name, figures[name]))
    lines.append(_row("output_tokens_per_s_per_worker", figures["output_tokens_per_s_per_worker"]))
    if (phases := report["step_phases"]) is not None:
        shares = sorted(phases["share"].items(), key=lambda item: -item[1])
        lines.append(f"a step takes {1e3 * phases['seconds_per_step']:.2f} ms: {_percents(shares)}")
        lines.append(f"between steps: {phases['share_of_time_between_steps']:.1%} of the runs")
    workers = ", ".join(str(mib) for mib in memory["workers"])
    peak = f"{memory['driver']} MiB" + (f", of the workers {workers} MiB" if workers else "")
    lines.append(f"start-up {startup['seconds']:.1f} s; peak memory of this process {peak}")
    if not report["comparable"]:
        lines.append(f"not comparable: {report['comparable_reason']}")
    return "\n".join(lines)


def _percents(shares: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{phase} {share:.1%}" for phase, share in shares if share)


def _row(name: str, spread: dict[str, Any]) -> str:
    label = name.replace("_per_s", "/s").replace("_per_", " per ").replace("_", " ")
    return f"{label:30}" + "".join(f"{spread[key]:10.2f}" for key in ("median", "min", "max"))


def _spread(values: Sequence[float]) -> dict[str, Any]:
    kept = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "min": min(kept), "max": max(kept), "runs": kept}
