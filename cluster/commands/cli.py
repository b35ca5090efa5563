"""The command line: one function per command, with options derived from settings classes.

Modules that load torch, Ray or yaml are imported inside the commands that need them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import shoal

from ..bench.workload import Workload
from ..engine_args import EngineArgs
from ..exit_codes import ExitCode
from ..jobs.config import InputArgs, JobConfig
from ..server.settings import ServeArgs
from .arguments import DemoArgs, EvalArgs, KernelArgs, ReportArgs, ThroughputArgs
from .options import exits, given, options, take

EXIT_STATUS = "\b\nExit status:\n" + "\n".join(f"{code:5d}  {code.meaning}" for code in ExitCode)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_STATUS)
@click.version_option(shoal.__version__, prog_name="shoal")
def main() -> None:
    """Inference for the DeepSeek-V3 family whose answers do not depend on the cluster."""


@main.command()
@click.argument("input", nargs=-1, metavar="INPUT...")
@options(JobConfig, EngineArgs, leave_out=["input"])
@click.option("--config", metavar="JOB.yaml", help="File with settings, under the names of these options.")
@exits
def batch(input: tuple[str, ...], config: str | None, **flags: Any) -> int:
    """Answer every row of the INPUT files; run it again to resume.

    INPUT is a file, a directory, a pattern or a URL: JSON lines (.jsonl, .gz, .zst) or Parquet.
    `shoal batch JOB.yaml` is short for `shoal batch --config JOB.yaml`.
    """
    from ..jobs.job_file import load_job_config
    from .batch import batch as run

    if config is None and len(input) == 1 and input[0].endswith((".yaml", ".yml")):
        (config,) = input
        input = ()
    job = load_job_config(config, given(flags | {"input": input[0] if len(input) == 1 else list(input) or None}))
    return run(job, command=command_line(), stdout=sys.stdout, stderr=sys.stderr)


@main.command()
@click.argument("input", nargs=-1, required=True, metavar="INPUT...")
@options(InputArgs, EngineArgs)
@exits
def validate(input: tuple[str, ...], **flags: Any) -> int:
    """Check every row of the INPUT files against a model, without its weights. Exit status 3: a row is bad."""
    from .validate import validate as run

    engine = take(EngineArgs, flags)
    return run(input, take(InputArgs, flags), engine, sampling={}, thinking=None, stdout=sys.stdout, stderr=sys.stderr)


@main.command()
@options(DemoArgs)
@exits
def demo(**flags: Any) -> int:
    """Answer real prompts on Ray workers and in one process, and compare every token.

    The model is shoal-tiny, which is bundled: DeepSeek-V3.2's architecture, small, and trained.
    """
    from .demo import demo as run

    return run(take(DemoArgs, flags), stdout=sys.stdout, stderr=sys.stderr)


@main.command()
@options(ServeArgs, EngineArgs)
@exits
def serve(**flags: Any) -> int:
    """Answer OpenAI's API over HTTP until SIGTERM or Ctrl-C. Needs `pip install 'shoal[serve]'`."""
    try:
        from ..server.serve import serve as run
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'shoal[serve]'") from error
    return run(take(ServeArgs, flags), take(EngineArgs, flags), stdout=sys.stdout, stderr=sys.stderr)


@main.command("eval")
@options(EvalArgs, EngineArgs)
@exits
def evaluate(**flags: Any) -> int:
    """Exact answers to held-out questions, with 95 % intervals. Without --model: shoal-tiny, which is bundled."""
    from ..bundled import BUNDLED_MODEL
    from .eval import evaluate as run

    engine = take(EngineArgs, {"model": str(BUNDLED_MODEL)} | given(flags))
    return run(engine, take(EvalArgs, flags), stdout=sys.stdout, stderr=sys.stderr)


@main.command()
@options(ReportArgs)
@exits
def doctor(**flags: Any) -> int:
    """List the optional libraries of this machine, which of them Shoal uses, and why not the others."""
    from .doctor import doctor as run

    return run(output=take(ReportArgs, flags).report, stdout=sys.stdout)


@main.group()
def bench() -> None:
    """Measure a model on this machine or cluster."""


@bench.command()
@options(Workload, ThroughputArgs, EngineArgs)
@exits
def throughput(**flags: Any) -> int:
    """Tokens per second for random prompts of one length that are all there at the start."""
    from ..bench.throughput import throughput as run

    args = take(ThroughputArgs, flags)
    return run(
        take(EngineArgs, flags),
        take(Workload, flags),
        executor=args.executor,
        phases=args.phases,
        output=args.report,
        stdout=sys.stdout,
        stderr=sys.stderr,
    )


@bench.command()
@options(KernelArgs)
@exits
def kernels(**flags: Any) -> int:
    """Time of every kernel, and how close it comes to what the machine could do."""
    from ..bench.kernels import kernels as run

    args = take(KernelArgs, flags)
    return run(
        shapes=args.shapes,
        ops=None if args.ops is None else args.ops.split(","),
        threads=args.threads,
        device=args.device,
        refcheck=args.refcheck,
        output=args.report,
        stdout=sys.stdout,
        stderr=sys.stderr,
    )


def command_line() -> list[str]:
    """The command line in a form that can be typed again."""
    program = Path(sys.argv[0])
    start = ["python", "-m", "shoal"] if program.name == "__main__.py" else [program.name]
    return start + sys.argv[1:]
