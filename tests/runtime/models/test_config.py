from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.kernels.rope import YarnConfig
from shoal.runtime.models.config import ModelConfig
from shoal.runtime.models.families import FAMILIES, parse_config, read_config
from shoal.runtime.random_checkpoint import make_checkpoint, tiny_config
from tests.runtime.checkpoint.test_compressed_tensors import KIMI_K2_THINKING

# The published numbers of DeepSeek-V3 and R1.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
V3_YARN = YarnConfig(
    factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)


INDEXER = {"index_n_heads": 2, "index_head_dim": 64, "index_topk": 8}


def changed(**changes: Any) -> ModelConfig:
    return parse_config({**DEEPSEEK_V3, **changes})


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in DEEPSEEK_V3.items() if name not in names}


def test_deepseek_v3() -> None:
    config = parse_config(DEEPSEEK_V3)
    assert config.yarn == V3_YARN
    assert config.qk_head_dim == 192
    assert config.softmax_scale == pytest.approx(0.1352337789, rel=1e-8)
    assert config.eos_token_ids == (1,)
    assert config.weight_block_size == (128, 128)
    assert config.rope_interleave
    assert not config.has_index
    assert config.indexer_types == ()
    assert [layer for layer in range(61) if not config.is_moe_layer(layer)] == [0, 1, 2]
    assert not config.has_indexer(0)
    assert config.torch_dtype is torch.bfloat16
    assert config.rope_cos_sin_scale == 1.0


@pytest.mark.parametrize(("factor", "scale"), [(32, 0.1308608), (64, 0.1446796)])
def test_softmax_scale_of_other_yarn_factors(factor: int, scale: float) -> None:
    assert changed(rope_scaling=DEEPSEEK_V3["rope_scaling"] | {"factor": factor}).softmax_scale == pytest.approx(
        scale, rel=1e-6
    )


def test_softmax_scale_without_yarn_or_without_mscale_all_dim() -> None:
    assert changed(rope_scaling=None).softmax_scale == pytest.approx(0.0721688, rel=1e-6)
    rope = {name: value for name, value in DEEPSEEK_V3["rope_scaling"].items() if not name.startswith("mscale")}
    config = changed(rope_scaling=rope)
    assert config.softmax_scale == pytest.approx(0.0721688, rel=1e-6)
    assert config.yarn is not None
    assert (config.yarn.mscale, config.yarn.mscale_all_dim) == (1.0, 0.0)
    # By hand: 0.1 * ln(40) + 1, over 1.
    assert config.rope_cos_sin_scale == pytest.approx(1.3688879454)
    assert changed(rope_scaling=None).rope_cos_sin_scale == 1.0


def test_rope_spellings_are_equal() -> None:
    yarn = {name: value for name, value in DEEPSEEK_V3["rope_scaling"].items() if name != "type"} | {
        "rope_type": "yarn"
    }
    old = parse_config(DEEPSEEK_V3)
    assert changed(rope_scaling=yarn) == old
    merged = without("rope_scaling", "rope_theta") | {"rope_parameters": yarn | {"rope_theta": 10000.0}}
    assert parse_config(merged) == old


def test_theta_in_rope_parameters_wins() -> None:
    rope = {"rope_theta": 8000000.0, "rope_type": "default"}
    config = parse_config(without("rope_scaling") | {"rope_parameters": rope})
    assert (config.rope_theta, config.yarn) == (8000000.0, None)


def test_deepseek_v32_has_an_indexer_in_every_layer() -> None:
    config = changed(model_type="deepseek_v32", index_n_heads=64, index_head_dim=128, index_topk=2048)
    assert config.has_index
    assert config.indexer_types == ("full",) * 61
    assert not config.indexer_rope_interleave


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        ({}, []),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, [3, 4, 5, 7]),
        ({"index_topk_freq": 2}, [2, 4, 6]),
        ({"index_topk_pattern": "FSSFFFFS"}, [1, 2, 7]),
        ({"indexer_types": ["full", "shared"] + ["full"] * 6, "index_topk_freq": 4}, [1]),
    ],
)
def test_glm_indexer_types(fields: dict[str, Any], shared: list[int]) -> None:
    # By hand for frequency 4, offset 3: max(i - 2, 0) = 0 0 0 1 2 3 4 5 for layers 0 to 7; multiples of 4 are full.
    base = tiny_config("glm_moe_dsa", {"num_hidden_layers": 8, "index_topk_freq": None, "index_skip_topk_offset": None})
    config = parse_config(base | fields)
    assert [layer for layer, kind in enumerate(config.indexer_types) if kind == "shared"] == shared
    assert [layer for layer in range(8) if not config.has_indexer(layer)] == shared


def test_glm_defaults() -> None:
    config = parse_config(tiny_config("glm_moe_dsa", {"indexer_rope_interleave": None, "eos_token_id": [7, 8, 9]}))
    assert config.indexer_rope_interleave
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 1000000.0
    assert config.eos_token_ids == (7, 8, 9)


def test_null_values() -> None:
    config = changed(
        n_group=None,
        topk_group=None,
        n_shared_experts=None,
        bos_token_id=None,
        eos_token_id=None,
        quantization_config=None,
    )
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)
    assert (config.bos_token_id, config.eos_token_ids, config.weight_block_size) == (None, (), None)


def test_fields_of_transformers_5() -> None:
    values = without("torch_dtype", "num_nextn_predict_layers", "first_k_dense_replace", "scoring_func", "topk_method")
    layer_types = ["dense"] * 2 + ["sparse"] * 59
    config = parse_config(values | {"dtype": "float32", "num_mtp_layers": 2, "mlp_layer_types": layer_types})
    assert (config.torch_dtype, config.num_nextn_predict_layers, config.first_k_dense_replace) == (torch.float32, 2, 2)


def test_moe_layer_freq() -> None:
    config = changed(moe_layer_freq=2, num_hidden_layers=8)
    assert [layer for layer in range(8) if config.is_moe_layer(layer)] == [4, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "model_type 'llama' with architecture 'LlamaForCausalLM' is not supported; supported .* deepseek_v3, deep",
        ),
        ({"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}, "'deepseek_v2'.* is not supported"),
        ({"model_type": None, "architectures": []}, "model_type and architectures are missing"),
        ({"model_type": ["deepseek_v3"], "architectures": "DeepseekV3ForCausalLM"}, "is not supported"),
        (
            {"model_type": "deepseek_v32", "q_lora_rank": None} | INDEXER,
            "q_lora_rank null is not supported with an indexer",
        ),
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1 to 2147483647, got 0"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": "7168"}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"num_hidden_layers": 10_000}, r"num_hidden_layers \(10000\) x n_routed_experts \(256\) is above 200000"),
        ({"max_position_embeddings": 1 << 23}, "max_position_embeddings must be a whole number from 1 to 4194304"),
        ({"torch_dtype": ["float32"]}, "torch_dtype"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}}, "factor is missing"),
        ({"rope_theta": -1}, "rope_theta must be a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_bias": True}, "attention_bias True is not supported: .* biases of attention projections"),
        ({"post_mlp_layernorm": True}, "post_mlp_layernorm True is not supported: .* a norm after the MLP"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling .* queries scaled by position"),
        ({"zero_expert_num": 256}, "zero_expert_num 256 .* experts that return their input"),
        ({"hc_mult": 4}, "hc_mult 4 .* hyper-connections"),
        ({"compress_ratios": [0, 4, 128]}, "compress_ratios .* compressed attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types .*'linear_attention'"),
        ({"text_config": {"hidden_size": 7168}}, "text_config .* a decoder inside a multimodal model"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must equal"),
        ({"qk_rope_head_dim": 63}, "must be even"),
        ({"n_group": 7}, r"n_group \(7\) must divide"),
        ({"topk_group": 9}, r"topk_group \(9\) must be at most n_group"),
        ({"n_group": 256, "topk_group": 8}, "one expert per group"),
        ({"num_experts_per_tok": 129}, "more than the 128 experts"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"eos_token_id": 129280}, "below vocab_size"),
        ({"eos_token_id": "1"}, "eos_token_id must be a token id"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"mlp_layer_types": ["sparse"] + ["dense"] * 60}, "mlp_layer_types"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"quantization_config": DEEPSEEK_V3["quantization_config"] | {"weight_block_size": [64, 64]}}, r"\[64, 64\]"),
        ({"model_type": "deepseek_v32"}, "index_n_heads is missing"),
        (
            {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
            "index_head_dim .32. must be at least qk_rope_head_dim .64.",
        ),
    ],
)
def test_refused_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**changes)


@pytest.mark.parametrize(
    "name", ["hidden_size", "rms_norm_eps", "norm_topk_prob", "rope_theta", "n_group", "first_k_dense_replace"]
)
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"the field {name} is missing"):
        parse_config(without(name))


def test_a_derivative_is_found_by_its_architecture() -> None:
    assert changed(model_type="some_derivative") == changed()
    assert changed(model_type=None) == changed()
    assert changed(model_type="kimi_k2").model_type == "kimi_k2"


def test_fields_that_change_the_model_may_be_there_unused() -> None:
    unused: dict[str, Any] = {"attention_bias": None, "hc_mult": 0, "compress_ratios": [], "zero_expert_num": None}
    assert changed(**unused, layer_types=["full_attention"] * 61) == changed()


def test_queries_without_a_latent() -> None:
    assert changed(q_lora_rank=None).q_lora_rank is None
    with pytest.raises(ValueError, match="q_lora_rank is missing"):
        parse_config(without("q_lora_rank"))


KIMI_K25: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "model_type": "kimi_k25",
    "dtype": "float32",
    "eos_token_id": 163586,
    "media_placeholder_token_id": 163605,
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1152, "tie_word_embeddings": True},
    "text_config": {name: value for name, value in DEEPSEEK_V3.items() if name not in ("torch_dtype", "eos_token_id")}
    | {"model_type": "kimi_k2", "vocab_size": 163840, "quantization_config": None},
}


def kimi(top: dict[str, Any] | None = None, **decoder: Any) -> ModelConfig:
    """Kimi-K2.5 with other fields outside of `text_config` (`top`) and in it."""
    return parse_config(KIMI_K25 | {"text_config": KIMI_K25["text_config"] | decoder} | (top or {}))


def test_the_decoder_of_a_multimodal_model() -> None:
    config = kimi()
    assert (config.model_type, config.tensor_prefix, config.hidden_size) == ("kimi_k25", "language_model.", 7168)
    assert (config.torch_dtype, config.eos_token_ids) == (torch.float32, (163586,))
    assert kimi({"model_type": None}) == config, "found by its architecture"
    assert kimi(eos_token_id=163585).eos_token_ids == (163585,), "its own fields come first"
    assert kimi(eos_token_id=None) == config
    assert kimi(model_type="deepseek_v3") == config


def test_a_multimodal_model_may_be_quantised_in_either_place() -> None:
    inside = kimi(quantization_config=KIMI_K2_THINKING)
    assert inside.int4_groups is not None
    assert inside.int4_groups.prefix == "language_model."
    assert kimi({"quantization_config": KIMI_K2_THINKING}) == inside
    assert kimi({"quantization_config": KIMI_K2_THINKING}, quantization_config=KIMI_K2_THINKING) == inside
    assert inside.weight_block_size is None
    assert not inside.ue8m0_scales
    assert changed(quantization_config=KIMI_K2_THINKING).int4_groups is not None
    assert changed().int4_groups is None


@pytest.mark.parametrize(
    ("top", "decoder", "message"),
    [
        ({"text_config": None}, {}, "text_config must be a JSON object with the decoder's fields, got None"),
        ({}, {"model_type": "qwen3"}, "text_config with model_type 'qwen3' is not supported in kimi_k25, only kimi_k2"),
        (
            {},
            {"hidden_size": 0},
            "hidden_size must be a whole number .*, got 0 .the fields of the decoder are those of text_config",
        ),
        ({}, {"sliding_window": 128}, "sliding_window 128 is not supported"),
        ({}, {"text_config": {"hidden_size": 1}}, "text_config .* a decoder inside a multimodal model"),
        ({"attention_bias": True}, {}, "attention_bias True is not supported"),
        ({"tie_word_embeddings": True}, {}, "tie_word_embeddings is True, but False in text_config"),
        (
            {"quantization_config": KIMI_K2_THINKING},
            {"quantization_config": DEEPSEEK_V3["quantization_config"]},
            "quantization_config is .*, but .* in text_config; correct one of them",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "'awq'"),
        ({"compression_config": {"format": "int-quantized"}}, {}, "compression_config"),
        ({"quantization_config": KIMI_K2_THINKING | {"format": "dense"}}, {}, "format 'dense' is not supported"),
    ],
)
def test_refused_values_of_a_multimodal_model(top: dict[str, Any], decoder: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kimi(top, **decoder)


@pytest.mark.parametrize("types", [["shared", "full", "full"], ["full", "full"], ["full", "full", "half"], "FSX", 3])
def test_refused_indexer_types(types: object) -> None:
    with pytest.raises(ValueError, match="indexer_types"):
        parse_config(tiny_config("glm_moe_dsa", {"indexer_types": types}))


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_read_config(tmp_path: Path, model_type: str) -> None:
    values = make_checkpoint(tmp_path, model_type)
    assert read_config(tmp_path) == parse_config(values)


def test_read_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist; give the directory"):
        read_config(tmp_path)
    for text in ("{", "[" * 100_000, "\udcff"):
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: the model configuration must be a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(without("hidden_size")))
    with pytest.raises(ValueError, match=r"config.json: the field hidden_size is missing"):
        read_config(tmp_path)
