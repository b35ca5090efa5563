"""The parts of the work on a row, as Ray's configuration names them: its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from shoal.parallel.settings import refuse_unknown, shown

StageT = TypeVar("StageT", bound="StageConfig")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One part. All parts run where the engine is, so that nothing can be said about where a part runs."""

    enabled: bool = True
    model_source: str | None = None
    batch_size: int | None = None
    concurrency: int | Sequence[int] | None = None
    runtime_env: Mapping[str, Any] | None = None
    num_cpus: float | None = None
    memory: float | None = None


@dataclass(frozen=True, kw_only=True)
class ChatTemplateStageConfig(StageConfig):
    """From messages to a prompt."""

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerStageConfig(StageConfig):
    """From a prompt to token ids."""


@dataclass(frozen=True, kw_only=True)
class DetokenizeStageConfig(StageConfig):
    """From token ids to text."""


@dataclass(frozen=True, kw_only=True)
class PrepareMultimodalStageConfig(StageConfig):
    """From images and audio to a model's input, which Shoal does not have."""

    model_config_kwargs: Mapping[str, Any] | None = None
    chat_template_content_format: str | None = "string"
    apply_sys_msg_formatting: bool | None = False


_PLACES = ("batch_size", "concurrency", "runtime_env", "num_cpus", "memory")


def read_stage(name: str, value: object, kind: type[StageT], *, model_source: str) -> StageT:
    """Read true, false, a mapping or a `kind`; ValueError for anything that cannot be honoured."""
    if isinstance(value, bool):
        return kind(enabled=value)
    if isinstance(value, Mapping):
        refuse_unknown(value, {f.name for f in fields(kind)}, f"{name}.")
        value = kind(**value)
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be true, false, a mapping or a {kind.__name__}, got {shown(value)}")
    if not isinstance(value.enabled, bool):
        raise ValueError(f"{name}.enabled must be true or false, got {shown(value.enabled)}")
    if value.model_source not in (None, model_source):
        raise ValueError(f"{name}.model_source is not the processor's model_source; remove it")
    for place in _PLACES:
        if getattr(value, place) is not None:
            raise ValueError(f"{name}.{place} is not supported: this part runs where the engine is; remove it")
    return value
