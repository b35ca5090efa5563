"""quantization_config of compressed-tensors: which one is read, and which tensors it means."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shoal.runtime.checkpoint.compressed_tensors import read_int4_groups

KIMI_K2_THINKING: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
KIMI_K26_IGNORE = [*KIMI_K2_THINKING["ignore"][1:], "re:.*lm_head.*", "re:vision_tower.*", "re:mm_projector.*"]

EXPERT = "model.layers.1.mlp.experts.17.up_proj.weight"
OTHERS = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.shared_experts.up_proj.weight",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
]


def changed(path: str, value: object) -> dict[str, Any]:
    """`KIMI_K2_THINKING` with another value of one field of the scheme, or of its `weights`, or of the whole."""
    config = copy.deepcopy(KIMI_K2_THINKING)
    *parents, field = path.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    part[field] = value
    return config


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("ignore", [KIMI_K2_THINKING["ignore"], KIMI_K26_IGNORE])
def test_the_routed_experts_of_kimi_are_int4(prefix: str, ignore: list[str]) -> None:
    int4 = read_int4_groups(changed("ignore", ignore), prefix)
    assert int4.group_size == 32
    assert int4.covers(prefix + EXPERT, (2048, 7168))
    assert [name for name in OTHERS if int4.covers(prefix + name, (64, 64))] == []
    assert not int4.covers(prefix + "model.layers.1.input_layernorm.weight", (7168,))
    assert not int4.covers(prefix + "model.layers.1.mlp.gate.e_score_correction_bias", (384,))


def test_targets_may_be_names_and_expressions() -> None:
    scheme = "config_groups.group_0.targets"
    by_name = read_int4_groups(changed(scheme, [EXPERT.removesuffix(".weight")]), "")
    assert by_name.covers(EXPERT, (8, 8))
    assert not by_name.covers(EXPERT.replace("17", "18"), (8, 8))
    by_expression = read_int4_groups(changed(scheme, [r"re:model.*experts\.1\d"]), "")
    assert by_expression.covers(EXPERT, (8, 8))  # from the start of the name on, not necessarily to its end
    assert not by_expression.covers(EXPERT.replace("17", "27"), (8, 8))
    assert not by_expression.covers("a." + EXPERT, (8, 8))


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "int-quantized", "format 'int-quantized' is not supported; .* only 'pack-quantized' is"),
        ("format", None, "format None"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme {'num_bits': 8} is not supported, only null is"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("transform_config", {"config_groups": {}}, "transform_config"),
        ("config_groups", {}, "config_groups must be an object with one scheme, got {}"),
        ("config_groups", {"a": {}, "b": {}}, "config_groups must be an object with one scheme"),
        ("config_groups", {"W4A16": ["Linear"]}, r"config_groups\.W4A16 must be an object with the object weights"),
        (f"{GROUP}.weights", None, "must be an object with the object weights"),
        (f"{GROUP}.format", "marlin-24", r"config_groups\.group_0\.format 'marlin-24' is not supported"),
        (f"{GROUP}.input_activations", {"num_bits": 8}, "input_activations {'num_bits': 8} .* only None is"),
        (f"{GROUP}.output_activations", {"num_bits": 8}, "output_activations"),
        (f"{GROUP}.targets", "Linear", r"targets must be a list of names and re: patterns, got 'Linear'"),
        (f"{GROUP}.targets", None, "targets must be a list"),
        ("ignore", ["re:("], r"ignore has the invalid pattern 're:\('"),
        ("ignore", [3], "ignore must be a list"),
        (f"{GROUP}.weights.num_bits", 8, r"weights\.num_bits 8 is not supported; .* only 4 is"),
        (f"{GROUP}.weights.num_bits", 4.0, r"weights\.num_bits 4\.0"),
        (f"{GROUP}.weights.type", "float", r"weights\.type 'float' .* only 'int' is"),
        (f"{GROUP}.weights.symmetric", False, r"weights\.symmetric False .* only True is"),
        (f"{GROUP}.weights.symmetric", 1, r"weights\.symmetric 1 "),
        (f"{GROUP}.weights.strategy", "channel", r"weights\.strategy 'channel' .* only 'group' is"),
        (f"{GROUP}.weights.dynamic", True, r"weights\.dynamic True"),
        (f"{GROUP}.weights.actorder", "group", r"weights\.actorder 'group' .* only None is"),
        (f"{GROUP}.weights.block_structure", [128, 128], r"weights\.block_structure \[128, 128\]"),
        (f"{GROUP}.weights.group_size", None, r"weights\.group_size must be a multiple of 8, got None"),
        (f"{GROUP}.weights.group_size", -1, "group_size must be a multiple of 8, got -1"),
        (f"{GROUP}.weights.group_size", 12, "group_size must be a multiple of 8, got 12"),
        (f"{GROUP}.weights.group_size", True, "group_size must be a multiple of 8, got True"),
    ],
)
def test_every_other_scheme_is_refused_by_the_name_of_its_field(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_int4_groups(changed(path, value), "")
