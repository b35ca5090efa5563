"""Supported architectures: one row each, with everything that the engine asks of an architecture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from shoal.kernels.ops import Ops
from shoal.parallel.dispatcher import TokenDispatcher
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.placement import ExpertPlacement

from ..checkpoint.file_kinds import read_json
from ..checkpoint.model_directory import CONFIG_FILE, describe_directory, describe_missing, find_file
from ..checkpoint.quantization import check_quantization
from .config import ModelConfig
from .config_fields import check_supported
from .deepseek import DeepseekModel
from .fused import decoder_layer_class
from .model import Model

MAX_CONFIG_BYTES = 16 << 20
_OF_THE_WHOLE_MODEL = (
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "quantization_config",
)
"""Fields of the decoder that a multimodal model's config.json may have outside of `text_config`."""


class BuildModel(Protocol):
    """Declares one rank's part of a model; reads and allocates no weights."""

    def __call__(
        self,
        config: ModelConfig,
        ops: Ops,
        groups: ParallelGroups,
        *,
        placement: ExpertPlacement,
        dispatcher: TokenDispatcher,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> Model:
        """placement: the one that `dispatcher` sends tokens by. dtype: of the computation."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """An architecture: how its config.json is read, and what is built from it."""

    architecture: str | None
    """Its class in `architectures` of config.json, by which derivatives with a `model_type` of their own are found."""
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    build: BuildModel


def _build_deepseek(
    config: ModelConfig,
    ops: Ops,
    groups: ParallelGroups,
    *,
    placement: ExpertPlacement,
    dispatcher: TokenDispatcher,
    dtype: torch.dtype,
    max_model_len: int,
) -> Model:
    return DeepseekModel(
        config,
        ops,
        groups,
        placement=placement,
        dispatcher=dispatcher,
        dtype=dtype,
        max_model_len=max_model_len,
        layer_class=decoder_layer_class(ops, groups),
    )


def _read_decoder_config(
    values: Mapping[str, Any], *, model_type: str, decoder_types: Collection[str], tensor_prefix: str
) -> ModelConfig:
    """The configuration of the decoder of a multimodal model, from `text_config`.

    Fields of `_OF_THE_WHOLE_MODEL` may be beside it; they must not contradict it.
    """
    check_supported({name: value for name, value in values.items() if name != "text_config"})
    check_quantization(values)
    decoder = values.get("text_config")
    if not isinstance(decoder, Mapping):
        raise ValueError(f"text_config must be a JSON object with the decoder's fields, got {decoder!r}")
    if decoder.get("model_type") not in decoder_types:
        raise ValueError(
            f"text_config with model_type {decoder.get('model_type')!r} is not supported in {model_type}, only "
            f"{' and '.join(decoder_types)} are"
        )
    beside = {name: values[name] for name in _OF_THE_WHOLE_MODEL if values.get(name) is not None}
    for name in ("tie_word_embeddings", "quantization_config"):
        if name in beside and decoder.get(name) not in (None, beside[name]):
            raise ValueError(f"{name} is {beside[name]!r}, but {decoder[name]!r} in text_config; correct one of them")
    own = {name: value for name, value in decoder.items() if name not in beside or value is not None}
    try:
        return ModelConfig.from_dict(beside | own, model_type=model_type, tensor_prefix=tensor_prefix)
    except ValueError as error:
        raise ValueError(f"{error} (the fields of the decoder are those of text_config)") from error


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        read_config=partial(ModelConfig.from_dict, model_type="deepseek_v3"),
        build=_build_deepseek,
    ),
    "deepseek_v32": Family(
        architecture="DeepseekV32ForCausalLM",
        read_config=partial(ModelConfig.from_dict, model_type="deepseek_v32", has_indexer=True),
        build=_build_deepseek,
    ),
    "kimi_k2": Family(
        architecture=None,  # its checkpoints name DeepseekV3ForCausalLM
        read_config=partial(ModelConfig.from_dict, model_type="kimi_k2"),
        build=_build_deepseek,
    ),
    "kimi_k25": Family(
        architecture="KimiK25ForConditionalGeneration",
        read_config=partial(
            _read_decoder_config,
            model_type="kimi_k25",
            decoder_types=("kimi_k2", "deepseek_v3"),
            tensor_prefix="language_model.",
        ),
        build=_build_deepseek,
    ),
    "glm_moe_dsa": Family(
        architecture="GlmMoeDsaForCausalLM",
        read_config=partial(ModelConfig.from_dict, model_type="glm_moe_dsa", has_indexer=True, interleave_indexer=True),
        build=_build_deepseek,
    ),
    "glm4_moe_lite": Family(
        architecture="Glm4MoeLiteForCausalLM",
        read_config=partial(ModelConfig.from_dict, model_type="glm4_moe_lite"),
        build=_build_deepseek,
    ),
}
"""Supported families by `model_type`."""


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json: by `model_type`, else by the first entry of `architectures`."""
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    architectures = values.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES.values():
        if architecture is not None and family.architecture == architecture:
            return family
    if model_type is None and architecture is None:
        problem = "the fields model_type and architectures are missing"
    else:
        problem = f"model_type {model_type!r} with architecture {architecture!r} is not supported"
    raise ValueError(f"{problem}; supported model types are {', '.join(FAMILIES)}")


def parse_config(values: object) -> ModelConfig:
    """The configuration in the contents of a config.json; ValueError names the field that cannot be used."""
    if not isinstance(values, Mapping):
        raise ValueError("the model configuration must be a JSON object")
    return find_family(values).read_config(values)


def read_config(model_dir: str | Path) -> ModelConfig:
    """Read `config.json` of a model directory. ValueError names the file; code in the directory is never run."""
    path = find_file(Path(model_dir), CONFIG_FILE) or Path(model_dir) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{describe_missing(path)}; give the directory that holds config.json and the *.safetensors files"
            f"{describe_directory(Path(model_dir))}"
        )
    values = read_json(path, MAX_CONFIG_BYTES)
    try:
        return parse_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
