"""The command line. Only click is imported here: torch and Ray are loaded by the commands that need them.

Exit status: 0 all rows are fine, 1 the answers of the demo or the results of a kernel differ, 2 usage or configuration,
3 more rows failed than --max-errors allows, 4 the cluster cannot hold the layout, 5 the engines failed, 75 stopped or
no room on the disk, 130 Ctrl-C. After 3 (with --on-error fail), 5, 75 and 130 the same `shoal batch` resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

import shoal

EXIT_USAGE, EXIT_CLUSTER, EXIT_INTERRUPTED = 2, 4, 130

_Command = Callable[..., Any]


def _replicas(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> int | list[str] | None:
    if len(values) == 1 and values[0].isdecimal():
        return int(values[0])
    return list(values) or None


_ENGINE_OPTIONS: tuple[Callable[[_Command], _Command], ...] = (
    click.option("--model", metavar="DIR", help="Model directory: config.json, *.safetensors, tokenizer.json."),
    click.option("--tensor-parallel-size", "-tp", type=int, metavar="N", help="Workers that share each request."),
    click.option("--data-parallel-size", "-dp", type=int, metavar="N", help="Groups that run different requests."),
    click.option(
        "--replicas",
        multiple=True,
        callback=_replicas,
        metavar="N | ROLE[:COUNT][:tp=N][:dp=N]",
        help="Copies of the model; or, once for each kind, replicas with the role prefill, decode or mixed.",
    ),
    click.option("--kv-transport", type=click.Choice(["auto", "nixl", "ray"]), help="From prefill to decode replicas."),
    click.option("--kv-buffer-size", type=int, metavar="BYTES", help="Records that a rank holds for others to read."),
    click.option("--max-model-len", type=int, metavar="N", help="Longest prompt plus output, in tokens."),
    click.option("--max-num-seqs", type=int, metavar="N", help="Sequences a group runs at a time."),
    click.option("--max-num-batched-tokens", type=int, metavar="N", help="Tokens a group computes in a step."),
    click.option("--block-size", type=int, metavar="N", help="Tokens per cache block."),
    click.option("--num-kv-blocks", type=int, metavar="N", help="Cache blocks of a group."),
    click.option(
        "--kv-cache-memory-fraction", type=float, metavar="F", help="Of free memory, for the cache (default 0.5)."
    ),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of the computation."),
    click.option(
        "--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), help="Of the cache; auto: as the computation."
    ),
    click.option(
        "--generation-config",
        type=click.Choice(["auto", "none", "vllm"]),
        help="auto: sampling defaults of the model's generation_config.json; none (vLLM's word: vllm): ours.",
    ),
    click.option("--seed", type=int, metavar="N", help="For rows that bring no seed of their own."),
    click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=None, help="Reuse equal prompt starts."),
    click.option(
        "--invariance", type=click.Choice(["strict", "relaxed"]), help="strict: the same bits on every layout."
    ),
    click.option(
        "--kernel-backend",
        type=click.Choice(["auto", "cpu", "triton", "reference"]),
        help="Which kernels compute; auto: cpu on a CPU, triton on a GPU.",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where the workers compute."),
    click.option("--enforce-eager", is_flag=True, default=None, help="No CUDA graphs; the answers are the same."),
    click.option(
        "--vendor-kernels",
        type=click.Choice(["none", "flash_mla", "deep_gemm", "all"]),
        help="Libraries to use on a GPU; with --invariance relaxed only.",
    ),
    click.option(
        "--all2all-backend", type=click.Choice(["default", "deepep"]), help="How tokens get to experts on other GPUs."
    ),
    click.option("--num-threads-per-worker", type=int, metavar="N", help="CPU threads of a worker."),
    click.option("--ray-address", metavar="ADDRESS", help="Cluster to use; default: the job's own, else a local Ray."),
    click.option("--insecure", is_flag=True, default=None, help="Run on several nodes without Ray authentication."),
    click.option("--spares", type=int, metavar="N", help="Processes that wait to replace a lost worker."),
    click.option("--heartbeat-timeout-s", type=float, metavar="S", help="Silence after which a worker is replaced."),
    click.option("--startup-timeout-s", type=float, metavar="S", help="For starting all workers."),
    click.option("--collective-timeout-s", type=float, metavar="S", help="For one rank to wait for another."),
)


def engine_options(command: _Command) -> _Command:
    """The options of `EngineArgs`, under the same names; an option that is not given is None."""
    for option in reversed(_ENGINE_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(shoal.__version__, prog_name="shoal")
def main() -> None:
    """Inference for the DeepSeek-V3 family whose answers do not depend on the cluster."""


@main.command()
@click.argument("input", required=False, metavar="INPUT.jsonl")
@engine_options
@click.option("--output", "-o", metavar="DIR", help="Where the answers go; the directory is the job.")
@click.option("--config", metavar="JOB.yaml", type=click.Path(path_type=Path), help="All settings; flags override it.")
@click.option("--on-error", type=click.Choice(["continue", "fail"]), help="fail stops once --max-errors is exceeded.")
@click.option("--max-errors", metavar="N|P%", help="Failed rows that still count as success (default 0).")
@click.option("--drain-grace-s", type=float, metavar="S", help="How long a stopped job finishes running rows.")
@click.option("--overwrite", is_flag=True, default=None, help="Delete what the output directory holds and start over.")
def batch(input: str | None, config: Path | None, **options: Any) -> None:
    """Answer every row of INPUT.jsonl (or .jsonl.gz); run it again to resume.

    `shoal batch JOB.yaml` is short for `shoal batch --config JOB.yaml`.
    """

    def run() -> int:
        from ..jobs.config import load_job_config
        from .batch import batch as run_batch

        path, input_path = config, input
        if input is not None and input.endswith((".yaml", ".yml")) and config is None:
            path, input_path = Path(input), None
        loaded = load_job_config(path, _given(options | {"input": input_path}))
        return run_batch(loaded, command=command_line(), stdout=sys.stdout, stderr=sys.stderr)

    finish(run)


@main.command()
@click.argument("input", metavar="INPUT.jsonl")
@engine_options
def validate(input: str, **options: Any) -> None:
    """Check every row of INPUT.jsonl against a model, without loading its weights. Exit status 3: a row is bad."""

    def run() -> int:
        from ..engine_args import EngineArgs
        from .validate import validate as run_validate

        args = EngineArgs.from_dict(_given(options))
        return run_validate(Path(input), args, sampling={}, thinking=False, stdout=sys.stdout, stderr=sys.stderr)

    finish(run)


@main.command()
@click.option(
    "--output", "-o", metavar="DIR", type=click.Path(path_type=Path), default="demo-output", show_default=True
)
@click.option("--tensor-parallel-size", "-tp", type=int, metavar="N", default=2, show_default=True)
@click.option("--data-parallel-size", "-dp", type=int, metavar="N", default=1, show_default=True)
@click.option(
    "--kill",
    type=click.Choice(["prefill:0", "decode:0", "node:1", "driver"]),
    help="Kill that in the middle; the answers are the same. Prefill and decode are then replicas of their own.",
)
def demo(output: Path, tensor_parallel_size: int, data_parallel_size: int, kill: Any) -> None:
    """Answer real prompts on Ray workers and in one process, and compare every token.

    The model is shoal-tiny, which is bundled: DeepSeek-V3.2's architecture, small, and trained.
    """

    def run() -> int:
        from .demo import demo as run_demo

        return run_demo(
            output,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            kill=kill,
            stdout=sys.stdout,
            stderr=sys.stderr,
        )

    finish(run)


@main.command("eval")
@engine_options
@click.option("--tasks", metavar="A,B,..", help="Some of the tasks; default: all seven.")
@click.option(
    "--thinking", type=click.Choice(["on", "off", "both"]), default="both", show_default=True, help="Before answering."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Questions of each task; default: all.")
@click.option("--max-tokens", type=int, metavar="N", default=256, show_default=True, help="Longest answer.")
@click.option("--json", "output", metavar="FILE", type=click.Path(path_type=Path), help="Write the scores there.")
def evaluate(
    tasks: str | None,
    thinking: Literal["on", "off", "both"],
    limit: int | None,
    max_tokens: int,
    output: Path | None,
    **options: Any,
) -> None:
    """Exact answers to held-out questions, with 95 % intervals. Without --model: shoal-tiny, which is bundled."""

    def run() -> int:
        from ..bundled import BUNDLED_MODEL, TASKS
        from ..engine_args import EngineArgs
        from .eval import evaluate as run_evaluate

        return run_evaluate(
            EngineArgs.from_dict({"model": str(BUNDLED_MODEL)} | _given(options)),
            tasks=TASKS if tasks is None else tuple(tasks.split(",")),
            thinking=thinking,
            limit=limit,
            max_tokens=max_tokens,
            output=output,
            stdout=sys.stdout,
            stderr=sys.stderr,
        )

    finish(run)


@main.command()
@click.option("--json", "output", metavar="FILE", type=click.Path(path_type=Path), help="Write the findings there.")
def doctor(output: Path | None) -> None:
    """What is installed here, what of it would be used, and why. Exit status 1: something that is needed is broken."""

    def run() -> int:
        from .doctor import doctor as run_doctor

        return run_doctor(output=output, stdout=sys.stdout)

    finish(run)


@main.group()
def bench() -> None:
    """Measure a model on this machine or cluster."""


@bench.command()
@engine_options
@click.option("--num-prompts", type=int, metavar="N", default=64, show_default=True, help="Requests of a run.")
@click.option("--input-len", type=int, metavar="N", default=256, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=int, metavar="N", default=64, show_default=True, help="Tokens of an answer.")
@click.option("--runs", type=int, metavar="N", default=3, show_default=True, help="Measured runs after the warm-up.")
@click.option(
    "--executor", type=click.Choice(["auto", "ray", "inprocess"]), default="auto", show_default=True, help="Where."
)
@click.option("--phases", is_flag=True, help="Also measure what the steps spend their time on.")
@click.option("--output", "-o", metavar="FILE.json", type=click.Path(path_type=Path), help="Write all figures there.")
def throughput(
    num_prompts: int,
    input_len: int,
    output_len: int,
    runs: int,
    executor: Literal["auto", "ray", "inprocess"],
    phases: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Tokens per second for random prompts of one length that are all there at the start."""

    def run() -> int:
        from ..bench.throughput import Workload
        from ..bench.throughput import throughput as run_throughput
        from ..engine_args import EngineArgs

        args = EngineArgs.from_dict(_given(options))
        workload = Workload(
            num_prompts=num_prompts, input_len=input_len, output_len=output_len, runs=runs, seed=args.seed
        )
        return run_throughput(
            args, workload, executor=executor, phases=phases, output=output, stdout=sys.stdout, stderr=sys.stderr
        )

    finish(run)


@bench.command()
@click.option("--refcheck", is_flag=True, help="Compare every op with its reference. Exit status 1: one differs.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: one for every core.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--shapes",
    type=click.Choice(["tiny", "v3-test", "v3"]),
    default="v3-test",
    show_default=True,
    help="v3: one rank of 32.",
)
@click.option("--ops", metavar="A,B,..", help="Some of the ops; default: all.")
@click.option("--output", "-o", metavar="FILE.json", type=click.Path(path_type=Path), help="Write all figures there.")
def kernels(
    refcheck: bool, threads: int | None, device: str, shapes: Any, ops: str | None, output: Path | None
) -> None:
    """Time of every kernel, and how close it comes to what the machine could do."""

    def run() -> int:
        from ..bench.kernels import kernels as run_kernels

        return run_kernels(
            shapes=shapes,
            ops=None if ops is None else ops.split(","),
            threads=threads,
            device=device,
            refcheck=refcheck,
            output=output,
            stdout=sys.stdout,
            stderr=sys.stderr,
        )

    finish(run)


def finish(command: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; what a user can mend is one line on stderr."""
    try:
        status = command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_CLUSTER if _is_layout_error(error) else EXIT_USAGE
    except KeyboardInterrupt:
        # Before a command has its own way to stop: nothing was begun.
        status = EXIT_INTERRUPTED
    sys.exit(status)


def command_line() -> list[str]:
    """What the user typed, as it can be typed again."""
    program = Path(sys.argv[0])
    start = ["python", "-m", "shoal"] if program.name == "__main__.py" else [program.name]
    return start + sys.argv[1:]


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _is_layout_error(error: Exception) -> bool:
    # Whoever raised it has imported the module; a usage error must not load Ray.
    module = sys.modules.get("shoal.cluster.workers.ray_cluster")
    return module is not None and isinstance(error, module.LayoutDoesNotFit)
