"""What a user can say about a batch job: one YAML file, overridden by flags, checked into a frozen `JobConfig`."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from shoal.runtime.types import SamplingParams

from ..engine_args import EngineArgs

OnError = Literal["continue", "fail"]


@dataclass(frozen=True, slots=True)
class ErrorLimit:
    """How many rows may fail before a job counts as failed: a number, or a share of all rows."""

    count: int = 0
    percent: float | None = None

    @classmethod
    def parse(cls, value: int | str) -> ErrorLimit:
        """From 10, "10" or "2.5%"."""
        text = str(value).strip()
        number = text.removesuffix("%").strip()
        try:
            limit = cls(percent=float(number)) if text.endswith("%") else cls(count=int(number))
        except ValueError:
            limit = cls(count=-1)
        if limit.count < 0 or not 0.0 <= (limit.percent or 0.0) <= 100.0:
            raise ValueError(f"max_errors must be a number of rows (10) or a percentage (2.5%), got {value!r}")
        return limit

    def allows(self, num_failed: int, num_rows: int) -> bool:
        """Whether that many failed rows are still fine."""
        if self.percent is not None:
            return num_failed * 100.0 <= self.percent * num_rows
        return num_failed <= self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplateKwargs:
    """Switches of the prompt format, for rows that do not set them."""

    thinking: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """One batch job. In YAML the fields of `engine` stand beside the others: `model`, `tensor_parallel_size`, ..."""

    input: str
    """A .jsonl or .jsonl.gz file."""
    output: str
    """A directory; it is the job, and the same command with the same directory resumes it."""
    engine: EngineArgs
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SamplingParams for rows that do not set them."""
    chat_template_kwargs: ChatTemplateKwargs = field(default_factory=ChatTemplateKwargs)
    on_error: OnError = "continue"
    """continue answers every row that can be answered; fail stops as soon as more than max_errors rows failed."""
    max_errors: int | str = 0
    """Failed rows, as a number or as "2%", beyond which the exit status is 3."""
    drain_grace_s: float = 10.0
    """How long a stopped job waits for the rows that are being answered."""
    overwrite: bool = False

    @property
    def error_limit(self) -> ErrorLimit:
        return ErrorLimit.parse(self.max_errors)


_OWN_FIELDS = {f.name: f for f in fields(JobConfig) if f.name != "engine"}
_ENGINE_FIELDS = {f.name: f for f in fields(EngineArgs)}
_SAMPLING_FIELDS = {f.name: f for f in fields(SamplingParams)}


def load_job_config(path: Path | None, flags: Mapping[str, Any]) -> JobConfig:
    """The YAML file's values, if there is one, with those of `flags` before them. A ValueError names key and file."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = read_yaml(path)
            if "overwrite" in values:
                raise ValueError("overwrite is a flag only, so that resuming a job never deletes it")
            _check(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    values |= flags
    return job_config(values)


def job_config(values: Mapping[str, Any]) -> JobConfig:
    """Build from plain data; every wrong key or value is a ValueError that names it."""
    _check(values)
    for name, what in (
        ("model", "a model directory (--model)"),
        ("input", "an input file"),
        ("output", "an output directory"),
    ):
        if name not in values:
            raise ValueError(f"{name} is missing; give {what}")
    engine = EngineArgs(**{name: value for name, value in values.items() if name in _ENGINE_FIELDS})
    own = {name: value for name, value in values.items() if name in _OWN_FIELDS}
    if "chat_template_kwargs" in own:
        own["chat_template_kwargs"] = ChatTemplateKwargs(**own["chat_template_kwargs"])
    config = JobConfig(engine=engine, **own)
    _ = config.error_limit
    if config.drain_grace_s < 0:
        raise ValueError(f"drain_grace_s must be at least 0, got {config.drain_grace_s}")
    try:
        SamplingParams.from_dict(config.sampling)
    except ValueError as error:
        raise ValueError(f"sampling: {error}") from error
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one, and a repeated key is a ValueError."""
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("must hold a mapping (key: value)")
    return values


def _check(values: Mapping[Any, Any]) -> None:
    """Names and types, before anything is built."""
    hints = get_type_hints(JobConfig) | get_type_hints(EngineArgs) | {"replicas": int}
    _refuse_unknown(values, {**_OWN_FIELDS, **_ENGINE_FIELDS}, "")
    for name, value in values.items():
        if name == "replicas" and isinstance(value, list | tuple):
            continue  # EngineArgs names what is wrong in it
        if name not in ("sampling", "chat_template_kwargs"):
            _check_type(name, value, hints[name])
        elif not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a mapping (key: value), got {value!r}")
    _refuse_unknown(values.get("sampling", {}), _SAMPLING_FIELDS, "sampling.")
    chat = values.get("chat_template_kwargs", {})
    _refuse_unknown(chat, {f.name: f for f in fields(ChatTemplateKwargs)}, "chat_template_kwargs.")
    for name, value in chat.items():
        _check_type(f"chat_template_kwargs.{name}", value, bool)


def _refuse_unknown(values: Mapping[Any, Any], known: Mapping[str, object], path: str) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{path}{name} is not a known setting; {hint}")


def _check_type(path: str, value: object, hint: Any) -> None:
    allowed = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if any(_matches(value, kind) for kind in allowed):
        return
    raise ValueError(f"{path} must be {' or '.join(_spelled(kind) for kind in allowed)}, got {value!r}")


def _matches(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _spelled(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names[kind]


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys without a word; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
