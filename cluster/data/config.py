"""Configuration of a processor: names, defaults and meanings of Ray 2.60's `vLLMEngineProcessorConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from shoal.parallel.settings import Setting, check_settings, shown

from ..engine_args import EngineArgs
from .engine_kwargs import read_engine_kwargs
from .stages import (
    ChatTemplateStageConfig,
    DetokenizeStageConfig,
    PrepareMultimodalStageConfig,
    TokenizerStageConfig,
    read_stage,
)

_LACKED: dict[str, tuple[object, str]] = {
    "task_type": ("generate", "the models generate text"),
    "dynamic_lora_loading_path": (None, "there are no adapters"),
    "placement_group_config": (None, "an engine places its workers itself"),
}
"""Fields of Ray's that Shoal lacks: the value that asks for nothing, and why others are refused."""


@dataclass(frozen=True, kw_only=True)
class EngineProcessorConfig:
    """What a processor runs and how; a bad value, or one that cannot be honoured, is a ValueError that names it."""

    model_source: Annotated[str, Setting("Model directory; every node sees it under this path.", is_path=True)]
    engine_kwargs: Annotated[
        Mapping[str, Any], Setting("Settings of an engine, by their names in `LLM`, which are vLLM's.")
    ] = field(default_factory=dict)
    batch_size: Annotated[int, Setting("Rows that are given to an engine together.", ge=1)] = 32
    concurrency: Annotated[
        int | Sequence[int], Setting("Engines: at most so many, or a pair with the fewest and the most.", ge=1)
    ] = 1
    max_concurrent_batches: Annotated[int, Setting("Batches that an engine works on at a time.", ge=1)] = 8
    max_tasks_in_flight_per_actor: Annotated[
        int | None, Setting("Tasks that Ray Data sends to an engine ahead.", ge=1, derived="Ray Data's default")
    ] = None
    max_pending_requests: Annotated[
        int | None, Setting("Rows that an engine has at a time; 0 or less: no limit.", derived="no limit")
    ] = None
    should_continue_on_error: Annotated[
        bool, Setting("Keep a row that cannot be answered, with the reason in `__inference_error__`.")
    ] = False
    accelerator_type: Annotated[str | None, Setting("Ray's name of the GPUs that engines run on.")] = None
    log_engine_metrics: Annotated[bool, Setting("Export the engine's metrics by Ray's exporter.")] = True
    runtime_env: Annotated[Mapping[str, Any] | None, Setting("Ray's runtime environment of the engines.")] = None

    chat_template_stage: bool | Mapping[str, Any] | ChatTemplateStageConfig = True
    tokenize_stage: bool | Mapping[str, Any] | TokenizerStageConfig = True
    detokenize_stage: bool | Mapping[str, Any] | DetokenizeStageConfig = True
    prepare_multimodal_stage: bool | Mapping[str, Any] | PrepareMultimodalStageConfig = False

    task_type: str = "generate"
    dynamic_lora_loading_path: str | None = None
    placement_group_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        for name, (harmless, reason) in _LACKED.items():
            if (value := getattr(self, name)) != harmless:
                raise ValueError(f"{name} = {shown(value)} is not supported: {reason}; remove it")
        if self.chat_template.chat_template is not None:
            raise ValueError(
                "chat_template_stage.chat_template is not supported: messages are written in the model's own chat "
                "format; give tokenized_prompt for another"
            )
        source = self.model_source
        if read_stage(
            "prepare_multimodal_stage", self.prepare_multimodal_stage, PrepareMultimodalStageConfig, model_source=source
        ).enabled:
            raise ValueError("prepare_multimodal_stage is not supported: the models read text alone; remove it")
        _ = self.pool_size, self.tokenizes, self.detokenizes, self.engine_args  # ValueError for bad ones

    @property
    def pool_size(self) -> tuple[int, int]:
        """The fewest and the most engines."""
        if isinstance(self.concurrency, int):
            return 1, self.concurrency
        if len(self.concurrency) != 2 or self.concurrency[0] > self.concurrency[1]:
            raise ValueError(f"concurrency must be a number or a pair (fewest, most), got {shown(self.concurrency)}")
        fewest, most = self.concurrency
        return fewest, most

    @property
    def chat_template(self) -> ChatTemplateStageConfig:
        """Whether and how the messages of a row become its prompt."""
        return read_stage(
            "chat_template_stage", self.chat_template_stage, ChatTemplateStageConfig, model_source=self.model_source
        )

    @property
    def tokenizes(self) -> bool:
        """Whether the prompt of a row goes before its tokenized_prompt."""
        stage = read_stage("tokenize_stage", self.tokenize_stage, TokenizerStageConfig, model_source=self.model_source)
        return stage.enabled

    @property
    def detokenizes(self) -> bool:
        """Whether a row has its text even if its sampling_params say `detokenize` false."""
        stage = read_stage(
            "detokenize_stage", self.detokenize_stage, DetokenizeStageConfig, model_source=self.model_source
        )
        return stage.enabled

    @property
    def engine_args(self) -> EngineArgs:
        """The settings of one engine."""
        return read_engine_kwargs(self.model_source, self.engine_kwargs, self.accelerator_type)
