"""Checkpoints with int4 experts: the bits of the same checkpoint in bfloat16, in every layout, nested or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.parallel.groups import single_process_groups
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.model_loading import load_model
from shoal.runtime.memory_estimate import declare_model
from shoal.runtime.models.families import read_config
from shoal.runtime.models.weights import tensor_shapes
from shoal.runtime.random_checkpoint import make_checkpoint
from tests.support.harness import logits_in_chunks, make_runner
from tests.support.invariance import Point, differing, run_point, run_points_on_rank
from tests.support.spawn import run_ranks

KIMIS = ("kimi_k2", "kimi_k25")
PACKED = "model.layers.1.mlp.experts.0.up_proj.weight_packed"
TOKENS = list(range(3, 33))
POINTS = [Point("tp 2", tp=2), Point("dp 2, chunks of 7", dp=2, engine={"max_chunk_size": 7})]


def dequantise(int4_dir: Path, model_dir: Path) -> Path:
    """A copy of a checkpoint whose matrices are all in bfloat16."""
    values = json.loads((int4_dir / "config.json").read_text())
    del values.get("text_config", values)["quantization_config"]
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(values))
    shapes = tensor_shapes(declare_model(read_config(int4_dir)).named_weights())
    with Checkpoint(int4_dir) as checkpoint:
        packed = [name for name in shapes if checkpoint.dtype(name) is torch.int32]
        assert len(packed) == 2 * 16 * 3, "two layers of 16 experts"
        save_file({name: checkpoint.read(name) for name in shapes}, model_dir / "model.safetensors")
    return model_dir


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_logits_are_those_of_the_dequantised_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    logits = []
    for model_type in KIMIS:
        make_checkpoint(tmp_path / model_type, model_type, seed=3, dtype=torch.bfloat16, int4=True, num_shards=2)
        plain = dequantise(tmp_path / model_type, tmp_path / f"{model_type}-plain")
        for model_dir in (tmp_path / model_type, plain):
            logits.append(logits_in_chunks(make_runner(model_dir, dtype=dtype), TOKENS, [20, 10]))
    assert all(torch.equal(one, logits[0]) for one in logits)
    make_checkpoint(tmp_path / "unquantised", "kimi_k2", seed=3, dtype=torch.bfloat16)
    unquantised = logits_in_chunks(make_runner(tmp_path / "unquantised", dtype=dtype), TOKENS, [20, 10])
    assert not torch.equal(unquantised, logits[0])


@pytest.mark.slow
def test_ranks_that_hold_some_of_the_experts_answer_like_one_that_holds_all(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    make_checkpoint(model_dir, "kimi_k25", seed=11, dtype=torch.bfloat16, int4=True)
    expected = run_point(Point("reference"), model_dir, "bfloat16", single_process_groups())
    assert len(expected) == 7
    per_rank = run_ranks(run_points_on_rank, 2, [(model_dir, "bfloat16")], POINTS, timeout_s=300.0)
    for number, point in enumerate(POINTS):
        rows = {row: value for rank in per_rank for row, value in rank[0][number].items()}
        assert differing(rows, expected) == [], point.name


def load(model_dir: Path) -> list[str]:
    """Load a model as an engine does; what it says on the way."""
    phases: list[str] = []
    load_model(model_dir, EngineConfig(num_kv_blocks=8, max_model_len=64), single_process_groups(), phases.append)
    return phases


def test_the_vision_tower_is_left_out_with_a_notice(tmp_path: Path) -> None:
    for model_type in KIMIS:
        make_checkpoint(tmp_path / model_type, model_type, int4=True)
    assert load(tmp_path / "kimi_k2") == []
    make_checkpoint(tmp_path / "mtp", "kimi_k25", int4=True, mtp=True)
    assert "tensors of the multi-token-prediction layer are not used" in load(tmp_path / "mtp")[0]
    (notice,) = load(tmp_path / "kimi_k25")
    assert notice.startswith("notice: 2 tensors of the vision tower are not used, such as mm_projector.linear_1.weight")


def test_tensors_of_the_decoder_that_are_missing_or_damaged_are_errors_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "kimi_k25", int4=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"language_model.{PACKED}"
    cases: list[tuple[dict[str, Any], str]] = [
        ({name: None}, rf"lacks 1 of \d+ tensors of the model: {name}; it has others that the model has not: mm_pro"),
        ({name: tensors[name][:24].clone()}, rf"{name.replace('packed', 'scale')} is torch.bfloat16 \[48, 6\]"),
        ({name.replace("packed", "shape"): torch.tensor([48, 95])}, rf"says \[48, 95\], but {name} holds \[48, 96\]"),
        ({"language_model.model.norm.weight": None}, "the model: language_model.model.norm.weight; it has others"),
    ]
    for changes, message in cases:
        save_file({k: v for k, v in (tensors | changes).items() if v is not None}, file)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        (
            ["lm_head", "re:.*self_attn.*", "re:.*mlp.*"],
            r"gate_proj\.weight_packed is quantised by .* ignore of quantization_config model\.layers\.1\.mlp\.experts",
        ),
        (["lm_head", "re:.*mlp.shared.*"], r"model\.layers\.0\.self_attn\.\w+\.weight is stored unquantised, but by"),
    ],
)
def test_tensors_are_quantised_where_the_configuration_says(tmp_path: Path, ignored: list[str], message: str) -> None:
    make_checkpoint(tmp_path, "kimi_k2", int4=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"]["ignore"] = ignored
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
