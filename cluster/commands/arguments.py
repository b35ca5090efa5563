"""Settings of the commands besides those of the engine and of a job; the command line derives its options from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shoal.parallel.config import DataParallelSize, TensorParallelSize
from shoal.parallel.settings import Setting, check_settings

from ..engine_args import Device, Executor

Victim = Literal["prefill:0", "decode:0", "node:1", "driver"]
Thinking = Literal["on", "off", "both"]

ReportFile = Annotated[
    str | None, Setting("Write all figures to this JSON file.", short="-o", metavar="FILE.json", is_path=True)
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoArgs:
    """Settings of `shoal demo`."""

    output: Annotated[
        str, Setting("Directory of the prompts and the answers.", short="-o", metavar="DIR", is_path=True)
    ] = "demo-output"
    tensor_parallel_size: TensorParallelSize = 2
    data_parallel_size: DataParallelSize = 1
    kill: Annotated[
        Victim | None,
        Setting(
            "Kill this worker, node or driver in the middle; the answers are the same. The layout is then a prefill "
            "and a decode replica and a spare."
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportArgs:
    """Settings of a command that writes a report."""

    output: ReportFile = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def report(self) -> Path | None:
        """`output` as a path."""
        return None if self.output is None else Path(self.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalArgs(ReportArgs):
    """Settings of `shoal eval`."""

    tasks: Annotated[str | None, Setting("Tasks, separated by commas.", metavar="A,B,..", derived="all seven")] = None
    thinking: Annotated[Thinking, Setting("Whether the model thinks before it answers.")] = "both"
    limit: Annotated[int | None, Setting("Questions of each task.", ge=1, derived="all")] = None
    max_tokens: Annotated[int, Setting("Longest answer, in tokens.", ge=1)] = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputArgs(ReportArgs):
    """Settings of `shoal bench throughput` besides the workload."""

    executor: Annotated[
        Executor, Setting("Where the engines run; auto is ray for more than one worker, else inprocess.")
    ] = "auto"
    phases: Annotated[bool, Setting("Also measure what the steps spend their time on.")] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelArgs(ReportArgs):
    """Settings of `shoal bench kernels`."""

    refcheck: Annotated[bool, Setting("Compare every op with its reference; exit status 1 if one differs.")] = False
    threads: Annotated[int | None, Setting("CPU threads.", ge=1, derived="one per core")] = None
    device: Annotated[Device, Setting("Device to measure.")] = "cpu"
    shapes: Annotated[
        Literal["tiny", "v3-test", "v3"], Setting("Sizes of the inputs; v3 is one rank of 32 of DeepSeek-V3.")
    ] = "v3-test"
    ops: Annotated[str | None, Setting("Ops, separated by commas.", metavar="A,B,..", derived="all")] = None
