"""The configuration of a processor: what is taken, and what is refused and why."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.data import (
    ChatTemplateStageConfig,
    EngineProcessorConfig,
    PrepareMultimodalStageConfig,
    TokenizerStageConfig,
    build_processor,
    vLLMEngineProcessorConfig,
)

MODEL = str(BUNDLED_MODEL)


def config(**values: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(**{"model_source": MODEL, **values})


def test_the_defaults_are_rays() -> None:
    made = config()
    assert vLLMEngineProcessorConfig is EngineProcessorConfig
    assert (made.batch_size, made.max_concurrent_batches, made.should_continue_on_error) == (32, 8, False)
    assert made.pool_size == (1, 1)
    assert made.log_engine_metrics is True
    assert (made.chat_template.enabled, made.tokenizes, made.detokenizes) == (True, True, True)
    assert made.engine_args.device == "cpu"


def test_engine_kwargs_are_the_settings_of_an_engine() -> None:
    args = config(
        engine_kwargs={
            "tensor_parallel_size": 2,
            "max_num_batched_tokens": 4096,
            "seed": 3,
            "enable_chunked_prefill": True,
            "pipeline_parallel_size": 1,
            "distributed_executor_backend": "ray",
            "trust_remote_code": True,
            "disable_log_stats": False,
            "gpu_memory_utilization": None,
        }
    ).engine_args
    assert (args.model, args.tensor_parallel_size, args.max_num_batched_tokens, args.seed) == (MODEL, 2, 4096, 3)


@pytest.mark.parametrize(
    ("engine_kwargs", "message"),
    [
        ({"max_num_seq": 8}, "engine_kwargs: max_num_seq is not a known setting; did you mean max_num_seqs"),
        ({"max_num_seqs": 0}, "engine_kwargs: max_num_seqs must be a whole number of at least 1, got 0"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size = 2 is not supported: use tensor_parallel_size"),
        ({"gpu_memory_utilization": 0.9}, "gpu_memory_utilization = 0.9 is not supported: use kv_cache_memory"),
        ({"enable_lora": True}, "enable_lora = True is not supported"),
        ({"model": "elsewhere"}, "model is not the processor's model_source"),
        ({"ray_address": "auto"}, "ray_address = 'auto' is not supported"),
    ],
)
def test_engine_kwargs_that_cannot_be_honoured_are_named(engine_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(engine_kwargs=engine_kwargs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"concurrency": 0}, "concurrency must be"),
        ({"concurrency": (3, 2)}, r"a pair \(fewest, most\)"),
        ({"concurrency": (1, 2, 3)}, r"a pair \(fewest, most\)"),
        ({"task_type": "embed"}, "task_type = 'embed' is not supported: the models generate text"),
        ({"log_engine_metrics": "yes"}, "log_engine_metrics must be true or false"),
        ({"dynamic_lora_loading_path": "s3://x"}, "dynamic_lora_loading_path = 's3://x' is not supported"),
        ({"placement_group_config": {"bundles": []}}, "placement_group_config = .* places its workers itself"),
        ({"prepare_multimodal_stage": True}, "prepare_multimodal_stage is not supported"),
        ({"chat_template_stage": {"chat_template": "{{ x }}"}}, "chat_template_stage.chat_template is not supported"),
        ({"chat_template_stage": {"templates": 1}}, "chat_template_stage.templates is not a known setting"),
        ({"chat_template_stage": TokenizerStageConfig()}, "a mapping or a ChatTemplateStageConfig"),
        ({"tokenize_stage": {"batch_size": 8}}, "tokenize_stage.batch_size is not supported"),
        ({"detokenize_stage": {"model_source": "other"}}, "detokenize_stage.model_source is not the processor's"),
        ({"detokenize_stage": {"enabled": "no"}}, "detokenize_stage.enabled must be true or false"),
        ({"detokenize_stage": None}, "detokenize_stage must be true, false"),
        ({"accelerator_type": "H100", "engine_kwargs": {"device": "cpu"}}, "contradicts accelerator_type"),
        ({"accelerator_type": "H100", "engine_kwargs": {"replicas": 2}}, "accelerator_type is for engines of one"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_stages_in_all_their_forms() -> None:
    assert config(chat_template_stage=False).chat_template.enabled is False
    assert config(chat_template_stage={"enabled": False}).chat_template.enabled is False
    assert config(chat_template_stage=ChatTemplateStageConfig(enabled=False)).chat_template.enabled is False
    assert config(tokenize_stage={"model_source": MODEL}).tokenizes is True
    assert config(prepare_multimodal_stage={"enabled": False}).tokenizes is True
    assert config(prepare_multimodal_stage=PrepareMultimodalStageConfig(enabled=False)).detokenizes is True


def test_pools_and_devices() -> None:
    assert config(concurrency=3).pool_size == (1, 3)
    assert config(concurrency=(2, 3)).pool_size == (2, 3)
    assert config(accelerator_type="H100").engine_args.device == "cuda"


def test_a_processor_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="builder_kwargs: chat_template_kwarg is not a known setting"):
        build_processor(config(), builder_kwargs={"chat_template_kwarg": {}})
    with pytest.raises(ValueError, match="nowhere"):
        build_processor(config(model_source="/nowhere"))


def test_without_the_extra_a_sentence_names_it() -> None:
    code = f"""
import sys
sys.modules["pyarrow"] = None
from shoal.data import EngineProcessorConfig, build_processor
try:
    build_processor(EngineProcessorConfig(model_source={MODEL!r}))
except ValueError as error:
    assert "pip install 'shoal[data]'" in str(error), error
else:
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
