"""Random checkpoints are what transformers takes for models of these types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from shoal.runtime.models.families import parse_config
from shoal.runtime.random_checkpoint import YARN, make_checkpoint

HF_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}


def test_random_checkpoints_are_reproducible(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a")
    make_checkpoint(tmp_path / "b", dtype=torch.bfloat16, overrides={"num_hidden_layers": 2})
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(b) < set(a)
    assert all(torch.equal(a[name].to(b[name].dtype), b[name]) for name in b)
    assert b["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert b["model.layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0.05


@pytest.mark.parametrize("model_type", list(HF_CLASSES))
@pytest.mark.parametrize("mtp", [False, True])
def test_transformers_loads_the_random_checkpoints(tmp_path: Path, model_type: str, mtp: bool) -> None:
    overrides = {} if mtp or model_type == "kimi_k2" else {"rope_scaling": YARN}
    values = make_checkpoint(tmp_path, model_type, mtp=mtp, num_shards=2, overrides=overrides)
    if model_type == "kimi_k2":
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "deepseek_v3"}))
    hf_class = getattr(transformers, HF_CLASSES[model_type])
    model, info = hf_class.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert bool(info["unexpected_keys"]) == mtp
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    assert torch.isfinite(logits).all()
    assert logits.abs().max() >= 5.0
    assert logits.std() >= 1.5
    # Each position says something else: the model is not an embedding of its last token alone.
    assert len(set(logits.argmax(-1).flatten().tolist())) > 10


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("rope", [None, YARN])
def test_config_written_by_transformers_means_the_same(
    tmp_path: Path, model_type: str, rope: dict[str, Any] | None
) -> None:
    values = make_checkpoint(tmp_path, model_type, overrides={"rope_scaling": rope})
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    saved["num_nextn_predict_layers"] = values["num_nextn_predict_layers"]
    assert parse_config(saved) == parse_config(values)
