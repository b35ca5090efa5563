"""The model configuration: the fields of config.json under their Hugging Face names, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from shoal.kernels.rope import YarnConfig, yarn_mscale

from ..checkpoint.compressed_tensors import METHOD, Int4Groups, read_int4_groups
from ..checkpoint.quantization import check_quantization
from .config_fields import Reader, check_supported

IndexerType = Literal["full", "shared"]

_MAX_LAYERS = 10_000
_MAX_EXPERTS = 100_000
_MAX_EXPERTS_OF_ALL_LAYERS = 200_000
"""Far above any model; the names of their tensors are listed before any weight is read."""
_MAX_POSITIONS = 1 << 22
"""Bounds the rotary table, which covers all positions."""
_WEIGHT_BLOCK_SIZE = (128, 128)
_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One model of the DeepSeek-V3 family; built by `from_dict`, which checks every value."""

    model_type: str
    torch_dtype: torch.dtype
    """The dtype the model was saved in: bfloat16, float16 or float32."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int
    num_attention_heads: int
    q_lora_rank: int | None
    """Size of the query latent; None: queries are projected from the hidden states directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnConfig | None
    """From `rope_scaling` or `rope_parameters`; None is plain RoPE."""
    rope_interleave: bool
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    """MTP layers the model was trained with; the checkpoint may still leave them out."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_types: tuple[IndexerType, ...]
    """Per layer: "full" runs its own indexer, "shared" reuses the selection of the last full layer before it."""
    indexer_rope_interleave: bool
    weight_block_size: tuple[int, int] | None
    """Rows and columns that share one scale in an FP8 checkpoint; None for an unquantised one."""
    ue8m0_scales: bool
    """Whether the model was trained with inputs of FP8 GEMMs quantised by power-of-two scales."""
    int4_groups: Int4Groups | None
    """The matrices that are stored as int4; None where none are."""
    tensor_prefix: str
    """Beginning of the names of all tensors: the module of a multimodal model that holds this decoder, else empty."""

    @property
    def has_index(self) -> bool:
        """Whether attention is sparse (DSA): every layer then attends to at most `index_topk` positions."""
        return bool(self.indexer_types)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q.k in attention: qk_head_dim^-0.5, times mscale(factor, mscale_all_dim)^2 under YaRN."""
        scale = math.pow(self.qk_head_dim, -0.5)
        if self.yarn is None:
            return scale
        return scale * yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    @property
    def rope_cos_sin_scale(self) -> float:
        """Factor on cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim) under YaRN, else 1."""
        if self.yarn is None:
            return 1.0
        return yarn_mscale(self.yarn.factor, self.yarn.mscale) / yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    def num_mha_tokens(self, num_prompt_tokens: int) -> int:
        """Number of leading tokens of a sequence that take the MHA form of attention; all others take the MQA form.

        These are the prompt tokens that attend to every earlier position.
        """
        return min(num_prompt_tokens, self.index_topk) if self.has_index else num_prompt_tokens

    def has_indexer(self, layer: int) -> bool:
        """Whether `layer` (counted from 0) selects positions itself; other layers of a sparse model reuse them."""
        return self.has_index and self.indexer_types[layer] == "full"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` (counted from 0) has routed experts instead of one dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        model_type: str,
        has_indexer: bool = False,
        interleave_indexer: bool = False,
        tensor_prefix: str = "",
    ) -> ModelConfig:
        """Build from the contents of a config.json as a model of `model_type`.

        has_indexer: attention is sparse (DSA). interleave_indexer: default of `indexer_rope_interleave`.
        Fields that have no bearing on the forward pass are ignored; ValueError for those that would change it.
        """
        check_supported(values)
        check_quantization(values)
        read = Reader(values)
        num_layers = read.integer("num_hidden_layers", high=_MAX_LAYERS)
        rope_theta, yarn = _rope(values)
        quantization = _quantization(values)
        config = cls(
            model_type=model_type,
            torch_dtype=_torch_dtype(values),
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.integer("intermediate_size"),
            moe_intermediate_size=read.integer("moe_intermediate_size"),
            num_hidden_layers=num_layers,
            first_k_dense_replace=_first_k_dense_replace(values, num_layers),
            moe_layer_freq=read.integer("moe_layer_freq", default=1),
            num_attention_heads=read.integer("num_attention_heads"),
            q_lora_rank=None if read.is_null("q_lora_rank") else read.integer("q_lora_rank"),
            kv_lora_rank=read.integer("kv_lora_rank"),
            qk_nope_head_dim=read.integer("qk_nope_head_dim"),
            qk_rope_head_dim=read.integer("qk_rope_head_dim"),
            v_head_dim=read.integer("v_head_dim"),
            n_routed_experts=read.integer("n_routed_experts", high=_MAX_EXPERTS),
            n_shared_experts=read.integer("n_shared_experts", low=0, null=0),
            num_experts_per_tok=read.integer("num_experts_per_tok"),
            n_group=read.integer("n_group", null=1),
            topk_group=read.integer("topk_group", null=1),
            topk_method=read.choice("topk_method", "noaux_tc"),
            scoring_func=read.choice("scoring_func", "sigmoid"),
            norm_topk_prob=read.boolean("norm_topk_prob"),
            routed_scaling_factor=read.positive("routed_scaling_factor"),
            hidden_act=read.choice("hidden_act", "silu"),
            rms_norm_eps=read.positive("rms_norm_eps"),
            rope_theta=rope_theta,
            yarn=yarn,
            rope_interleave=read.boolean("rope_interleave", default=True),
            max_position_embeddings=read.integer("max_position_embeddings", high=_MAX_POSITIONS),
            tie_word_embeddings=read.boolean("tie_word_embeddings", default=False),
            num_nextn_predict_layers=read.integer(
                # transformers writes the same number as num_mtp_layers
                "num_nextn_predict_layers" if "num_nextn_predict_layers" in values else "num_mtp_layers",
                low=0,
                high=_MAX_LAYERS,
                default=0,
                null=0,
            ),
            bos_token_id=None if values.get("bos_token_id") is None else read.integer("bos_token_id", low=0),
            eos_token_ids=_eos_token_ids(values),
            index_n_heads=read.integer("index_n_heads") if has_indexer else 0,
            index_head_dim=read.integer("index_head_dim") if has_indexer else 0,
            index_topk=read.integer("index_topk") if has_indexer else 0,
            indexer_types=_indexer_types(values, num_layers) if has_indexer else (),
            indexer_rope_interleave=read.boolean("indexer_rope_interleave", default=interleave_indexer),
            weight_block_size=_weight_block_size(quantization),
            ue8m0_scales=_ue8m0_scales(quantization),
            int4_groups=_int4_groups(quantization, tensor_prefix),
            tensor_prefix=tensor_prefix,
        )
        config._check_together(values)
        return config

    def _check_together(self, values: Mapping[str, Any]) -> None:
        """Refuse values that are valid by themselves but contradict each other."""
        if values.get("num_key_value_heads") not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads must equal num_attention_heads ({self.num_attention_heads}) in latent "
                f"attention, got {values['num_key_value_heads']!r}"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.has_index and self.q_lora_rank is None:
            raise ValueError(
                "q_lora_rank null is not supported with an indexer, whose queries are made from that latent"
            )
        if self.has_index and self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim ({self.index_head_dim}) must be at least qk_rope_head_dim ({self.qk_rope_head_dim}): "
                "the rotated part is the head of every index key"
            )
        if self.num_hidden_layers * self.n_routed_experts > _MAX_EXPERTS_OF_ALL_LAYERS:
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) x n_routed_experts ({self.n_routed_experts}) is above "
                f"{_MAX_EXPERTS_OF_ALL_LAYERS}, which no model has"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts})")
        group_size = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group_size < 2:
            raise ValueError(
                f"n_group ({self.n_group}) leaves one expert per group; a group is scored by its two best experts"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) must be at most n_group ({self.n_group})")
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than the {self.topk_group * group_size} "
                f"experts in topk_group ({self.topk_group}) groups"
            )
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if token >= self.vocab_size:
                raise ValueError(
                    f"bos_token_id and eos_token_id must be below vocab_size ({self.vocab_size}), got {token}"
                )


def _torch_dtype(values: Mapping[str, Any]) -> torch.dtype:
    value = values.get("torch_dtype") or values.get("dtype") or "bfloat16"
    if not isinstance(value, str) or value not in _TORCH_DTYPES:
        raise ValueError(f"torch_dtype must be one of {', '.join(_TORCH_DTYPES)}, got {value!r}")
    return _TORCH_DTYPES[value]


def _first_k_dense_replace(values: Mapping[str, Any], num_layers: int) -> int:
    """Leading dense layers; `mlp_layer_types`, where present, decides as it does in transformers."""
    layer_types = values.get("mlp_layer_types")
    if layer_types is None:
        return Reader(values).integer("first_k_dense_replace", low=0)
    num_dense = layer_types.count("dense") if isinstance(layer_types, list) else 0
    if layer_types != ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense):
        raise ValueError(
            f'mlp_layer_types must list "dense" for leading layers and "sparse" for the others, {num_layers} in all, '
            f"got {layer_types!r}"
        )
    return num_dense


def _eos_token_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of token ids, got {value!r}")
    return tuple(ids)


def _indexer_types(values: Mapping[str, Any], num_layers: int) -> tuple[IndexerType, ...]:
    """`indexer_types`, else `index_topk_pattern` ("FSSF"), else the schedule of GLM-5.2.

    The schedule: layer i is full when max(i - index_skip_topk_offset + 1, 0) is a multiple of index_topk_freq.
    """
    types = values.get("indexer_types")
    name = "indexer_types" if types is not None else "index_topk_pattern"
    if types is None:
        types = values.get("index_topk_pattern")
    if isinstance(types, str):
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in types]
    if types is None:
        read = Reader(values)
        freq = max(read.integer("index_topk_freq", low=0, default=1, null=1), 1)
        offset = read.integer("index_skip_topk_offset", low=0, default=2, null=2)
        name = "index_topk_freq"
        types = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or any(t not in get_args(IndexerType) for t in types):
        raise ValueError(f'{name} must give "full" or "shared" for each of the {num_layers} layers, got {types!r}')
    if types[0] != "full":
        raise ValueError(f"{name} makes layer 0 a shared layer, which has no layer before it to share with")
    return tuple(types)


def _rope(values: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """`rope_theta` and YaRN from `rope_scaling` ("type" or "rope_type"), else from the merged `rope_parameters`."""
    part = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"rope_scaling and rope_parameters must be JSON objects or null, got {part!r}")
    rope = {"rope_theta": values["rope_theta"], **part} if "rope_theta" in values else part
    read = Reader(rope)
    theta = read.positive("rope_theta")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor is not supported: qk_rope_head_dim says how much of a head is rotated")
    if rope_type == "default":
        return theta, None
    if rope_type != "yarn":
        raise ValueError(f"rope type {rope_type!r} is not supported, only 'default' and 'yarn' are")
    if rope.get("attention_factor") is not None or rope.get("truncate", True) is not True:
        raise ValueError(
            "yarn with attention_factor or truncate is not supported; no released model of the family uses them"
        )
    if not (factor := read.positive("factor")) >= 1.0:
        raise ValueError(f"yarn factor must be at least 1, got {factor}")
    yarn = YarnConfig(
        factor=factor,
        original_max_position_embeddings=read.integer("original_max_position_embeddings"),
        beta_fast=read.positive("beta_fast") if rope.get("beta_fast") else 32.0,
        beta_slow=read.positive("beta_slow") if rope.get("beta_slow") else 1.0,
        mscale=read.positive("mscale") if rope.get("mscale") else 1.0,
        mscale_all_dim=read.positive("mscale_all_dim") if rope.get("mscale_all_dim") else 0.0,
    )
    return theta, yarn


def _quantization(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    quantization = values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping):
        raise ValueError(f"quantization_config must be a JSON object or null, got {quantization!r}")
    return quantization


def _int4_groups(quantization: Mapping[str, Any] | None, tensor_prefix: str) -> Int4Groups | None:
    if quantization is None or quantization.get("quant_method") != METHOD:
        return None
    return read_int4_groups(quantization, tensor_prefix)


def _weight_block_size(quantization: Mapping[str, Any] | None) -> tuple[int, int] | None:
    if quantization is None or quantization.get("quant_method") == METHOD:
        return None
    method, fmt = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    block = quantization.get("weight_block_size")
    if method != "fp8" or fmt != "e4m3" or not isinstance(block, list) or tuple(block) != _WEIGHT_BLOCK_SIZE:
        raise ValueError(
            f"quantization_config with quant_method {method!r}, fmt {fmt!r}, weight_block_size {block!r} is not "
            f"supported; use fp8 e4m3 with weight_block_size {list(_WEIGHT_BLOCK_SIZE)}, {METHOD} with symmetric int4 "
            f"groups, or no quantization"
        )
    return _WEIGHT_BLOCK_SIZE


def _ue8m0_scales(quantization: Mapping[str, Any] | None) -> bool:
    scale_fmt = None if quantization is None else quantization.get("scale_fmt")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"quantization_config with scale_fmt {scale_fmt!r} is not supported; only 'ue8m0' is, or none")
    return scale_fmt == "ue8m0"
