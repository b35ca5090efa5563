"""Ray Data processors whose engines are Shoal's: `ray.data.llm` with another import. Needs `shoal[data]`."""

from shoal.cluster.data.config import EngineProcessorConfig
from shoal.cluster.data.processor import Processor, build_processor
from shoal.cluster.data.stages import (
    ChatTemplateStageConfig,
    DetokenizeStageConfig,
    PrepareMultimodalStageConfig,
    TokenizerStageConfig,
)

vLLMEngineProcessorConfig = EngineProcessorConfig  # noqa: N816 - Ray's name
"""Ray's name, so that its examples run with one import changed."""

__all__ = [
    "ChatTemplateStageConfig",
    "DetokenizeStageConfig",
    "EngineProcessorConfig",
    "PrepareMultimodalStageConfig",
    "Processor",
    "TokenizerStageConfig",
    "build_processor",
    "vLLMEngineProcessorConfig",
]
