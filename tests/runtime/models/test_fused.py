"""A fused layer computes the bits of the operations that `DecoderLayer` writes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.runtime.models.deepseek import DeepseekModel
from shoal.runtime.models.fused import FusedDecoderLayer
from shoal.runtime.random_checkpoint import make_checkpoint
from tests.support.harness import logits_in_chunks, make_runner

CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("deepseek_v3", {}, False),
    ("deepseek_v3", {"q_lora_rank": None}, False),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 0}, True),
    ("deepseek_v32", {}, True),
    ("glm_moe_dsa", {}, False),
    ("glm4_moe_lite", {}, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "overrides", "fp8"), CASES)
def test_fused_layers_keep_the_bits(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], fp8: bool, dtype: torch.dtype
) -> None:
    make_checkpoint(tmp_path, model_type, seed=3, dtype=dtype, overrides=overrides, fp8=fp8)
    runner = make_runner(tmp_path, dtype=dtype)
    assert isinstance(runner.model, DeepseekModel)
    assert all(isinstance(layer, FusedDecoderLayer) for layer in runner.model.layers)
    tokens, chunks = list(range(3, 43)), [17, 20, 1, 1, 1]
    fused = logits_in_chunks(runner, tokens, chunks)
    runner.tap = lambda layer, op, tensor: None  # a tap sees every operation, so nothing is fused
    assert torch.equal(logits_in_chunks(runner, tokens, chunks), fused)
