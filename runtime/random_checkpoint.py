"""Small models with random weights in the Hugging Face layout, for trying things out, tests and benchmarks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.kernels.quant import quantize_block_fp8

from .checkpoint.int4_groups import quantize_int4
from .memory_estimate import declare_model
from .models.config import ModelConfig
from .models.families import parse_config
from .models.weights import tensor_shapes as declared_shapes
from .tokenization.byte_tokenizer import write_byte_tokenizer

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_BASE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 2560,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# With few heads many keys score exactly 0 (no q . k of a head is positive), and transformers breaks ties differently.
_INDEX = {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 8}
_KIMI = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000,
    "rope_scaling": YARN | {"factor": 32, "beta_fast": 1},
}
_DIFFERENCES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "kimi_k2": _KIMI,
    "kimi_k25": {"model_type": "kimi_k2", **_KIMI},
    "deepseek_v32": {"architectures": ["DeepseekV32ForCausalLM"], **_INDEX},
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "qk_nope_head_dim": 32,
        "v_head_dim": 40,
        "routed_scaling_factor": 1.8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "partial_rotary_factor": 1.0,
    },
    "glm_moe_dsa": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "v_head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "rope_interleave": True,
        "indexer_rope_interleave": True,
        "index_topk_freq": 2,
        "index_skip_topk_offset": 2,
        **_INDEX,
    },
}
_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 16,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        "re:vision_tower.*",
        "re:mm_projector.*",
    ],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}
"""As in Kimi-K2-Thinking and later ones, where a group has 32 columns."""
_VISION_TENSORS = {"vision_tower.patch_embed.proj.weight": (24, 12), "mm_projector.linear_1.weight": (96, 24)}


def tiny_config(model_type: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a tiny model; None in `overrides` removes a field, except q_lora_rank, which becomes null.

    Of the 3 layers the first is dense. kimi_k2 uses YaRN, the others plain RoPE unless `rope_scaling` is given (YARN is
    one that fits); in glm_moe_dsa the last layer shares the index of the second. In kimi_k25 all fields that are
    described here are those of `text_config`.
    """
    config = {**_BASE, "model_type": model_type, **_DIFFERENCES[model_type], **(overrides or {})}
    config = {name: value for name, value in config.items() if value is not None or name == "q_lora_rank"}
    if model_type != "kimi_k25":
        return config
    return {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": config}


def make_checkpoint(
    model_dir: Path,
    model_type: str = "deepseek_v3",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    overrides: Mapping[str, Any] | None = None,
    fp8: bool = False,
    int4: bool = False,
    mtp: bool = False,
    num_shards: int = 1,
    tokenizer: bool = True,
) -> dict[str, Any]:
    """Write a random tiny model to `model_dir` and return its config.json.

    Weights are scaled so that logits spread over about +-5 and more. A tensor's values depend on `seed` and its name
    in the decoder only, not on the dtype, the layout in files or the tensors around it (bfloat16, FP8 and int4 round
    the same numbers).

    dtype        of everything but e_score_correction_bias, which is float32
    overrides    fields of config.json, see `tiny_config`
    fp8          projections as float8_e4m3fn with scales per block of 128 x 128
    int4         routed experts as int4 with scales per group of 16 columns
    mtp          append one multi-token prediction layer
    num_shards   above 1: files with an index
    tokenizer    also write the tokenizer of single bytes
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type, overrides)
    decoder = config.get("text_config", config)
    decoder["torch_dtype"] = str(dtype).removeprefix("torch.")
    if fp8:
        decoder["quantization_config"] = _FP8
    if int4:
        decoder["quantization_config"] = _INT4
    if mtp:
        decoder["num_nextn_predict_layers"] = 1
    (model_dir / "config.json").write_text(json.dumps(config, indent=2))
    parsed = parse_config(config)
    shapes = tensor_shapes(parsed, mtp=mtp) | (_VISION_TENSORS if parsed.tensor_prefix else {})
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values = random_tensor(name.removeprefix(parsed.tensor_prefix), shape, seed)
        if fp8 and is_quantized(name):
            tensors[name], tensors[name + "_scale_inv"] = quantize_block_fp8(values)
        elif parsed.int4_groups is not None and parsed.int4_groups.covers(name, shape):
            tensors |= _int4_tensors(name, values, parsed.int4_groups.group_size)
        else:
            tensors[name] = values if name.endswith("e_score_correction_bias") else values.to(dtype)
    write_safetensors(model_dir, tensors, num_shards)
    if tokenizer:
        write_byte_tokenizer(model_dir / "tokenizer.json")
    return config


def tensor_shapes(config: ModelConfig, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, and with `mtp` of one MTP layer after it."""
    if not mtp:
        return declared_shapes(declare_model(config).named_weights())
    hidden, vocab, layer = config.hidden_size, config.vocab_size, config.num_hidden_layers
    # The MTP layer is one more decoder layer, with an indexer of its own, and what joins it to the model.
    indexer_types = (*config.indexer_types, "full") if config.has_index else ()
    extended = replace(config, num_hidden_layers=layer + 1, indexer_types=indexer_types)
    shapes = tensor_shapes(extended)
    prefix = f"{config.tensor_prefix}model.layers.{layer}."
    shapes |= {prefix + name: (hidden,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    shapes |= {prefix + name: (vocab, hidden) for name in ("embed_tokens.weight", "shared_head.head.weight")}
    shapes[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
    return shapes


def _int4_tensors(name: str, values: Tensor, group_size: int) -> dict[str, Tensor]:
    packed, scales = quantize_int4(values, group_size, torch.bfloat16)
    return {name + "_packed": packed, name + "_scale": scales, name + "_shape": torch.tensor(values.shape)}


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of one tensor in float32."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
    values: Tensor = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return values * 0.1
    if name.endswith("bias"):
        return values * 0.2
    if len(shape) == 1:
        return 1.0 + values * 0.1
    if "embed_tokens" in name:
        return values
    gain = 2.5 if name.endswith(("lm_head.weight", "shared_head.head.weight")) else 1.5
    return values * (gain / math.sqrt(shape[1]))


def write_safetensors(model_dir: Path, tensors: Mapping[str, Tensor], num_shards: int = 1) -> None:
    """One model.safetensors, or `num_shards` files dealt round-robin with an index."""
    if num_shards == 1:
        save_file(dict(tensors), model_dir / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, model_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))


def is_quantized(name: str) -> bool:
    """Whether DeepSeek's FP8 checkpoints quantise the tensor of that name."""
    return name.endswith(("_proj.weight", "_with_mqa.weight", "wq_b.weight", "wk.weight")) and not name.endswith(
        ("weights_proj.weight", "eh_proj.weight")
    )
