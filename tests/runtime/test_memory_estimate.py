"""The memory of a layout against sums by hand, and against what a loaded model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.kernels.linear import packed_num_bytes
from shoal.parallel.config import ParallelConfig
from shoal.runtime.memory_estimate import StorageFormat, fitting_layouts, kv_bytes_per_token, rank_weight_bytes
from shoal.runtime.models.families import parse_config
from shoal.runtime.random_checkpoint import make_checkpoint, tiny_config
from tests.runtime.checkpoint.test_compressed_tensors import KIMI_K2_THINKING
from tests.runtime.models.test_config import DEEPSEEK_V3
from tests.runtime.models.test_weights import stored_tensors
from tests.support.harness import make_runner

V32 = parse_config(
    DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
)
ON_GPU = StorageFormat(dtype=torch.bfloat16, backend="triton")


def layout(tp: int, dp: int) -> ParallelConfig:
    return ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)


@pytest.mark.parametrize(
    ("model_type", "overrides", "dtype", "quantised"),
    [
        ("deepseek_v32", {}, torch.float32, {}),
        ("deepseek_v32", {}, torch.bfloat16, {"fp8": True}),
        ("kimi_k25", {}, torch.bfloat16, {"int4": True}),
        ("deepseek_v3", {"q_lora_rank": None, "tie_word_embeddings": True}, torch.bfloat16, {}),
    ],
)
def test_the_estimate_is_what_a_loaded_model_holds(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], dtype: torch.dtype, quantised: dict[str, bool]
) -> None:
    values = make_checkpoint(tmp_path, model_type, dtype=dtype, overrides=overrides, **quantised)
    held = sum(tensor.nbytes for _, tensor in stored_tensors(make_runner(tmp_path, dtype=dtype).model))
    storage = StorageFormat(dtype=dtype, backend="cpu")
    assert rank_weight_bytes(parse_config(values), ParallelConfig(), storage) == held


@pytest.mark.parametrize(
    ("backend", "dtype", "options", "expected"),
    [
        ("cpu", torch.bfloat16, {}, 208 * 300 * 2),  # rows in panels of 16
        ("cpu", torch.bfloat16, {"fp8": True}, 208 * (300 + 4 * 3)),  # a scale per row and 128 columns
        ("reference", torch.bfloat16, {"fp8": True}, 200 * 300 * 2),  # dequantised
        ("triton", torch.bfloat16, {}, 200 * 304 * 2),  # rows of a multiple of 16 bytes
        ("triton", torch.bfloat16, {"fp8": True}, 200 * 304 + 4 * 2 * 3),  # a scale per block of 128 x 128
        ("triton", torch.bfloat16, {"fp8": True, "row_scales": True}, 200 * 304 + 4 * (200 + 128) * 3),
        ("triton", torch.float32, {"fp8": True}, 200 * 300 * 4),
    ],
)
def test_bytes_of_a_packed_weight(backend: Any, dtype: torch.dtype, options: dict[str, Any], expected: int) -> None:
    assert packed_num_bytes((200, 300), dtype, backend, **options) == expected


def test_deepseek_v32_in_fp8_on_a_gpu_of_eight() -> None:
    """8 bits per projection weight; experts and head in eighths, the rest on every rank. Scales add less than 0.1 %."""
    experts = 58 * 32 * 3 * 7168 * 2048
    attention = 61 * (7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168)
    kv_b = 61 * 3 * 128 * 128 * 512 * 2  # keys, absorbed keys and values in bfloat16
    indexer = 61 * (1536 * 64 * 128 + 7168 * 128 + 4 * 7168 * 64)
    mlps = 58 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432
    router = 58 * 256 * 7168 * 4
    embedding = 129280 * 7168 * 2
    expected = experts + attention + kv_b + indexer + mlps + router + embedding * 9 // 8
    assert rank_weight_bytes(V32, layout(1, 8), ON_GPU) == pytest.approx(expected, rel=1e-3)
    # over several nodes the head is split over the tp group only, so that every rank has all of it
    several = rank_weight_bytes(V32, layout(1, 8), ON_GPU, local_world_size=4)
    assert several - rank_weight_bytes(V32, layout(1, 8), ON_GPU) == embedding * 7 // 8


def test_int4_experts_are_in_bfloat16_on_the_device() -> None:
    """V3 with its experts in int4: 16 bits per weight of everything but the router."""
    experts = 58 * 16 * 3 * 7168 * 2048
    attention = 61 * (7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168 + 3 * 128 * 128 * 512)
    mlps = 58 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432
    embedding = 129280 * 7168
    expected = 2 * (experts + attention + mlps + embedding * 17 // 16) + 58 * 256 * 7168 * 4
    int4 = parse_config(DEEPSEEK_V3 | {"quantization_config": KIMI_K2_THINKING})
    assert rank_weight_bytes(int4, layout(1, 16), ON_GPU) == pytest.approx(expected, rel=1e-3)


def test_tensor_parallelism_splits_what_it_can() -> None:
    saved = rank_weight_bytes(V32, layout(1, 8), ON_GPU) - rank_weight_bytes(V32, layout(8, 1), ON_GPU)
    split = 61 * (1536 * 128 * 192 + 128 * 128 * 7168 + 3 * 128 * 128 * 512 * 2)
    split += 3 * 3 * 7168 * 18432 + 129280 * 7168 * 2
    assert saved == pytest.approx(split * 7 // 8, rel=1e-3)


def test_bytes_of_a_token() -> None:
    assert kv_bytes_per_token(V32, ON_GPU) == 61 * (576 + 128) * 2
    assert kv_bytes_per_token(parse_config(DEEPSEEK_V3), ON_GPU) == 61 * 576 * 2
    fp8 = StorageFormat(dtype=torch.bfloat16, backend="triton", fp8_cache=True)
    assert kv_bytes_per_token(V32, fp8) == 61 * (656 + 132)
    shared = parse_config(tiny_config("glm_moe_dsa"))  # 3 layers, the last without an indexer
    assert kv_bytes_per_token(shared, ON_GPU) == (3 * (32 + 16) + 2 * 32) * 2


def test_the_nearest_layouts_come_first() -> None:
    found = list(fitting_layouts(V32, layout(1, 8), ON_GPU, 80 << 30, local_world_size=8))
    assert found[0] == layout(1, 16)
    assert layout(1, 8) not in found
    assert layout(8, 1) not in found
    assert [size.world_size for size in found] == sorted(size.world_size for size in found)
