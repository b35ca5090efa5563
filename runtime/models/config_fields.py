"""Typed access to the fields of a config.json, and the fields that name another model than the one computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_SIZE = 2**31 - 1
PLAIN_LAYER_TYPES = {"full_attention", "indexed_attention"}
"""Names of the attention of this family; transformers writes one for each layer."""
CHANGES_THE_MODEL = {
    "attention_bias": "biases of attention projections",
    "mlp_bias": "biases of MLP projections",
    "post_mlp_layernorm": "a norm after the MLP",
    "sandwich_norm": "norms after attention and MLP",
    "use_qk_norm": "norms of queries and keys",
    "gated_norm": "gated norms",
    "llama_4_scaling": "queries scaled by position",
    "mla_scale_q_lora": "scaled query latents",
    "mla_scale_kv_lora": "scaled key-value latents",
    "zero_expert_num": "experts that return their input",
    "hc_mult": "hyper-connections",
    "compress_ratios": "compressed attention",
    "o_lora_rank": "a low-rank output projection",
    "num_hash_layers": "routing by token id",
    "swiglu_limit": "clipped activations",
    "linear_attn_config": "linear attention",
    "sliding_window": "attention to a window",
    "no_rope_layers": "layers without rotary embeddings",
    "final_logit_softcapping": "capped logits",
    "logits_soft_cap": "capped logits",
    "embedding_multiplier": "scaled embeddings",
    "residual_multiplier": "a scaled residual stream",
    "logits_scaling": "scaled logits",
    "text_config": "a decoder inside a multimodal model",
}
"""Fields of related architectures, with the part of them that the model code does not compute."""


def check_supported(values: Mapping[str, Any]) -> None:
    """ValueError for a field of `CHANGES_THE_MODEL` that is in use (null, false, 0 and empty mean unused)."""
    for name, part in CHANGES_THE_MODEL.items():
        if values.get(name):
            raise ValueError(f"{name} {values[name]!r} is not supported: the model code has no {part}")
    layer_types = values.get("layer_types")
    if layer_types and not (isinstance(layer_types, list) and all(t in PLAIN_LAYER_TYPES for t in layer_types)):
        raise ValueError(
            f"layer_types {layer_types!r} is not supported: every layer must have attention of the kind "
            f"{' or '.join(sorted(PLAIN_LAYER_TYPES))}"
        )
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor is not supported: qk_rope_head_dim says how much of a head is rotated")


class Reader:
    """Typed access to the fields of a config.json; every error names the field and its value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str, default: object = None) -> object:
        if name in self._values:
            return self._values[name]
        if default is None:
            raise ValueError(f"the field {name} is missing")
        return default

    def is_null(self, name: str) -> bool:
        """Whether the field is present and null."""
        return name in self._values and self._values[name] is None

    def integer(
        self, name: str, *, low: int = 1, high: int = MAX_SIZE, default: int | None = None, null: int | None = None
    ) -> int:
        """`default` stands in for a missing field, `null` for one that is present and null."""
        value = self.get(name, default)
        if value is None and null is not None:
            return null
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        return value

    def positive(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value

    def choice(self, name: str, only: str) -> str:
        """A field with one supported value, which is also its default."""
        value = self.get(name, only)
        if value != only:
            raise ValueError(f"{name} {value!r} is not supported, only {only!r} is")
        return only
