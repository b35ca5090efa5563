"""Settings of a batch job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from shoal.parallel.settings import (
    Setting,
    build_settings,
    check_settings,
    check_values,
    declarations,
    refuse_unknown,
    shown,
)
from shoal.runtime.types import SamplingParams

from ..engine_args import EngineArgs
from .input.columns import Columns, Template

LogFormat = Literal["text", "json"]
OnError = Literal["continue", "fail"]


@dataclass(frozen=True, slots=True)
class ErrorLimit:
    """Number or percentage of rows that may fail before the job counts as failed."""

    count: int = 0
    percent: float | None = None

    @classmethod
    def parse(cls, value: int | str) -> ErrorLimit:
        """Read 10, "10" or "2.5%"."""
        text = str(value).strip()
        number = text.removesuffix("%").strip()
        try:
            limit = cls(percent=float(number)) if text.endswith("%") else cls(count=int(number))
        except ValueError:
            limit = cls(count=-1)
        if limit.count < 0 or not 0.0 <= (limit.percent or 0.0) <= 100.0:
            raise ValueError(f"max_errors must be a number of rows (10) or a percentage (2.5%), got {shown(value)}")
        return limit

    def allows(self, num_failed: int, num_rows: int) -> bool:
        """Whether `num_failed` rows of `num_rows` are within the limit."""
        if self.percent is not None:
            return num_failed * 100.0 <= self.percent * num_rows
        return num_failed <= self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplateKwargs:
    """Switches of the chat format for rows that do not set them."""

    thinking: Annotated[
        bool | None, Setting("Let the model think before it answers.", derived="as its chat format does")
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputArgs:
    """How an input is read."""

    prompt_template: Annotated[
        str | None,
        Setting(
            'Makes the message of the user from the columns of a row: "What is {question}?". The answer repeats them.'
        ),
    ] = None
    system_template: Annotated[
        str | None, Setting("Makes the message of the system before it; a text without columns is the same for all.")
    ] = None
    id_column: Annotated[
        str | None, Setting("Column of the custom ids.", metavar="NAME", derived="custom_id or id, if there")
    ] = None
    keep_columns: Annotated[
        Sequence[str] | None,
        Setting(
            "Columns that the answers repeat.",
            metavar="NAME",
            derived="with a template or from Parquet all that are no fields of a row, else none",
        ),
    ] = None
    limit: Annotated[int | None, Setting("Rows that are read.", ge=1, derived="all")] = None
    num_check_processes: Annotated[
        int | None,
        Setting(
            "Processes that check and tokenise the rows; 0: none but the job's own.",
            ge=0,
            le=256,
            derived="one per core for large inputs, else 0",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.columns

    @property
    def columns(self) -> Columns:
        """How the columns of the input are read."""
        if self.system_template is not None and self.prompt_template is None:
            raise ValueError("system_template needs prompt_template, the message that follows it")
        return Columns(
            prompt=None if self.prompt_template is None else Template("prompt_template", self.prompt_template),
            system=None if self.system_template is None else Template("system_template", self.system_template),
            id=self.id_column,
            keep=self.keep_columns,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig(InputArgs):
    """Settings of a batch job. In YAML the fields of `engine` are top-level keys: `model`, `block_size`, .."""

    input: Annotated[
        str | Sequence[str],
        Setting(
            "Input files, directories, patterns (*.jsonl) or URLs (s3://, gs://, hf://): Parquet, or JSON lines, which "
            "may be compressed (.gz, .zst).",
            metavar="FILE",
            is_path=True,
        ),
    ]
    output: Annotated[
        str,
        Setting(
            "Output directory. It is the job: the same command with the same directory resumes it.",
            short="-o",
            metavar="DIR",
            is_path=True,
        ),
    ]
    engine: EngineArgs
    sampling: Annotated[
        Mapping[str, Any], Setting("Sampling parameters of rows that do not set them: temperature, max_tokens, ..")
    ] = field(default_factory=dict)
    chat_template_kwargs: Annotated[
        ChatTemplateKwargs, Setting("Switches of the chat format for rows that do not set them.")
    ] = field(default_factory=ChatTemplateKwargs)
    on_error: Annotated[
        OnError,
        Setting(
            "continue answers every row that can be answered; fail stops as soon as more than max_errors rows failed."
        ),
    ] = "continue"
    max_errors: Annotated[
        int | str,
        Setting('Failed rows, as a number or as "2%", beyond which the exit status is 3.', ge=0, metavar="N|P%"),
    ] = 0
    drain_grace_s: Annotated[
        float, Setting("Seconds that a stopped job waits for the rows that are being answered.", ge=0)
    ] = 10.0
    deadline_s: Annotated[
        float | None,
        Setting(
            "Seconds after which the job stops as at SIGTERM, with exit status 75; it can be resumed.",
            gt=0,
            derived="none",
        ),
    ] = None
    log_format: Annotated[
        LogFormat, Setting("text, with a panel on a terminal, or json: one object a line, for collectors of logs.")
    ] = "text"
    overwrite: Annotated[
        bool,
        Setting("Delete what the output directory holds and start over. Only on the command line, never in a file."),
    ] = False

    def __post_init__(self) -> None:
        InputArgs.__post_init__(self)
        _ = self.error_limit
        _check_sampling(self.sampling)

    @property
    def inputs(self) -> list[str]:
        """`input` as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    @property
    def error_limit(self) -> ErrorLimit:
        """`max_errors`, parsed."""
        return ErrorLimit.parse(self.max_errors)


def job_config(values: Mapping[Any, Any]) -> JobConfig:
    """Build a JobConfig from plain data; ValueError names a wrong name or value."""
    check_names_and_values(values)
    own = {name: value for name, value in values.items() if name in declarations(JobConfig)}
    if "chat_template_kwargs" in own:
        own["chat_template_kwargs"] = ChatTemplateKwargs(**own["chat_template_kwargs"])
    engine = build_settings(EngineArgs, {name: value for name, value in values.items() if name not in own})
    check_values(JobConfig, own)
    return JobConfig(engine=engine, **own)


def check_names_and_values(values: Mapping[Any, Any]) -> None:
    """ValueError for a wrong name or value among settings of a job as plain data; required ones may be missing."""
    known = declarations(JobConfig) | declarations(EngineArgs)
    refuse_unknown(values, known)
    for name, value in values.items():
        if name == "chat_template_kwargs" and isinstance(value, Mapping):
            check_values(ChatTemplateKwargs, value, "chat_template_kwargs.")
        else:
            known[name].check(value)
    if "max_errors" in values:
        ErrorLimit.parse(values["max_errors"])
    _check_sampling(values.get("sampling", {}))


def _check_sampling(values: Mapping[Any, Any]) -> None:
    check_values(SamplingParams, values, "sampling.")
    try:
        SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"sampling.{error}") from error
