"""Weights are declared without files, and loading again changes values, never addresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.parallel.config import ParallelConfig
from shoal.parallel.groups import single_process_groups
from shoal.parallel.placement import ExpertPlacement
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.model_loading import load_model
from shoal.runtime.memory_estimate import declare_model
from shoal.runtime.models.families import parse_config
from shoal.runtime.models.model import Model
from shoal.runtime.models.weights import tensor_shapes
from shoal.runtime.random_checkpoint import make_checkpoint, tiny_config
from tests.support.harness import logits_in_chunks, make_runner

TOKENS = list(range(3, 33))


def stored_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a loaded model holds for its weights."""
    for name, weight in model.named_weights():
        for value in vars(weight).values():
            if isinstance(value, PackedWeight):
                yield name, value.data
                if value.scale_inv is not None:
                    yield name, value.scale_inv
            elif isinstance(value, Tensor):
                yield name, value


def test_names_and_shapes_are_known_without_any_file() -> None:
    config = parse_config(tiny_config("deepseek_v32", {"num_hidden_layers": 2}))
    shapes = tensor_shapes(declare_model(config).named_weights())
    # By hand, from the sizes of the tiny model: hidden 96, 4 heads of 24 + 16 and 24, latents of 48 and 32, vocab 320.
    attention = {
        "q_a_proj.weight": (48, 96),
        "q_a_layernorm.weight": (48,),
        "q_b_proj.weight": (160, 48),
        "kv_a_proj_with_mqa.weight": (48, 96),
        "kv_a_layernorm.weight": (32,),
        "kv_b_proj.weight": (192, 32),
        "o_proj.weight": (96, 96),
        "indexer.wq_b.weight": (512, 48),
        "indexer.wk.weight": (32, 96),
        "indexer.k_norm.weight": (32,),
        "indexer.k_norm.bias": (32,),
        "indexer.weights_proj.weight": (16, 96),
    }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (320, 96),
        "model.norm.weight": (96,),
        "lm_head.weight": (320, 96),
        "model.layers.1.mlp.gate.weight": (16, 96),
        "model.layers.1.mlp.gate.e_score_correction_bias": (16,),
    }
    for i in range(2):
        expected |= {f"model.layers.{i}.self_attn.{name}": shape for name, shape in attention.items()}
        expected |= {f"model.layers.{i}.{name}_layernorm.weight": (96,) for name in ("input", "post_attention")}
    mlps = {"0.mlp": 160, "1.mlp.shared_experts": 48} | {f"1.mlp.experts.{e}": 48 for e in range(16)}
    for name, inner in mlps.items():
        expected |= {f"model.layers.{name}.{part}_proj.weight": (inner, 96) for part in ("gate", "up")}
        expected[f"model.layers.{name}.down_proj.weight"] = (96, inner)
    assert shapes == expected


def test_every_rank_asks_for_all_tensors_of_the_checkpoint() -> None:
    config = parse_config(tiny_config("deepseek_v3"))
    whole = tensor_shapes(declare_model(config).named_weights())
    layout = ParallelConfig(tensor_parallel_size=2, data_parallel_size=2)
    for rank in range(4):
        assert tensor_shapes(declare_model(config, layout, rank=rank).named_weights()) == whole


@pytest.mark.parametrize(
    ("model_type", "dtype", "fp8"),
    [
        ("deepseek_v32", torch.float32, False),
        ("deepseek_v32", torch.bfloat16, True),
        ("glm4_moe_lite", torch.bfloat16, False),
    ],
)
def test_loading_again_keeps_memory_and_gives_the_new_weights(
    tmp_path: Path, model_type: str, dtype: torch.dtype, fp8: bool
) -> None:
    for seed in (1, 2):
        make_checkpoint(tmp_path / str(seed), model_type, seed=seed, dtype=dtype, fp8=fp8)
    first, second = (
        logits_in_chunks(make_runner(tmp_path / str(seed), dtype=dtype), TOKENS, [20, 10]) for seed in (1, 2)
    )
    assert not torch.equal(first, second)
    runner = make_runner(tmp_path / "1", dtype=dtype)
    addresses = [(name, tensor.data_ptr()) for name, tensor in stored_tensors(runner.model)]
    assert {name for name, _ in addresses} == {name for name, _ in runner.model.named_weights()}
    with Checkpoint(tmp_path / "2") as checkpoint:
        runner.model.load(checkpoint)
    assert [(name, tensor.data_ptr()) for name, tensor in stored_tensors(runner.model)] == addresses
    assert torch.equal(logits_in_chunks(runner, TOKENS, [20, 10]), second)


def test_a_weight_in_another_format_is_refused(tmp_path: Path) -> None:
    for name, fp8 in (("plain", False), ("fp8", True)):
        make_checkpoint(tmp_path / name, "deepseek_v3", dtype=torch.bfloat16, fp8=fp8)
    runner = make_runner(tmp_path / "plain", dtype=torch.bfloat16)
    with (
        Checkpoint(tmp_path / "fp8") as checkpoint,
        pytest.raises(ValueError, match=r"was loaded unquantised and cannot be replaced by one .* that is in FP8"),
    ):
        runner.model.load(checkpoint)


def test_a_placement_reaches_the_model_and_the_dispatcher(tmp_path: Path) -> None:
    """Experts in another order give the same bits only if both are given that order."""
    make_checkpoint(tmp_path, "deepseek_v3")  # 16 experts
    logits = []
    for order in (range(16), range(15, -1, -1)):
        loaded = load_model(
            tmp_path,
            EngineConfig(num_kv_blocks=8, max_model_len=64),
            single_process_groups(),
            lambda _: None,
            placement=ExpertPlacement(16, (tuple(order),)),
        )
        logits.append(logits_in_chunks(loaded.runner, TOKENS, [20, 10], block_table=[0]))
    assert torch.equal(*logits)
