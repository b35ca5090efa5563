"""Which published models fit where: from their configurations alone, no weights."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.memory_check import MemoryUse, check_memory
from shoal.cluster.workers.ray_cluster import LayoutDoesNotFit, Node
from shoal.runtime.models.families import parse_config
from tests.runtime.checkpoint.test_compressed_tensors import KIMI_K2_THINKING
from tests.runtime.models.test_config import DEEPSEEK_V3

GIB = 1 << 30
FP8 = {"quantization_config": DEEPSEEK_V3["quantization_config"]}
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
V32 = DEEPSEEK_V3 | INDEXER | {"model_type": "deepseek_v32"}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
}
GLM_5 = DEEPSEEK_V3 | {
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 154880,
    "rope_scaling": None,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
}
MOONLIGHT = DEEPSEEK_V3 | {
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
    "rope_scaling": None,
    "quantization_config": None,
}

NEAREST = r"the nearest layouts that fit are {} \(16 GPUs\)"


def gpus(num_nodes: int, gib: int | None) -> list[Node]:
    """Nodes of 8 GPUs."""
    memory = None if gib is None else gib * GIB
    return [
        Node(node_id=str(i), address="", num_cpus=128, num_gpus=8, memory_bytes=2000 * GIB, gpu_memory_bytes=memory)
        for i in range(num_nodes)
    ]


def check(model: dict[str, Any], available: list[Node], **settings: Any) -> MemoryUse:
    args = EngineArgs(model="/model", **{"device": "cuda", **settings})
    return check_memory(args, parse_config(model), available)


@pytest.mark.parametrize(
    ("model", "num_nodes", "gib", "tp", "dp", "weights_gb", "kv_tokens"),
    [
        # Summed by hand as in tests/runtime/test_memory_estimate.py, without the scales. KV cache: half of the rest.
        (V32, 1, 141, 1, 8, 102.388, 2_282_464),
        (V32, 1, 141, 8, 1, 88.757, 364_666),
        (V32, 2, 80, 1, 16, 63.141, 2_119_824),
        (V32, 2, 80, 8, 2, 47.887, 442_576),
        (KIMI_K2, 2, 80, 16, 1, 68.355, 124_835),
        (KIMI_K2, 2, 141, 1, 16, 79.007, 8_241_216),
        (GLM_5, 1, 141, 8, 1, 98.213, 242_136),
        (GLM_5, 2, 80, 8, 2, 52.914, 300_344),
    ],
)
def test_layouts_that_fit_say_how_much_room_is_left(
    model: dict[str, Any], num_nodes: int, gib: int, tp: int, dp: int, weights_gb: float, kv_tokens: int
) -> None:
    use = check(model, gpus(num_nodes, gib), tensor_parallel_size=tp, data_parallel_size=dp)
    assert use.weight_bytes[0] / 1e9 == pytest.approx(weights_gb, rel=1e-3)
    assert use.kv_tokens == pytest.approx(kv_tokens, rel=2e-3)
    assert str(use).endswith(f" GB of weights per worker, room for {use.kv_tokens:,} tokens of KV cache")


@pytest.mark.parametrize(
    ("model", "num_nodes", "gib", "tp", "dp", "message"),
    [
        (
            V32,
            1,
            80,
            1,
            8,
            r"need 102 GB on each GPU with tensor_parallel_size=1 data_parallel_size=8; .* 16.5 GB are missing: "
            + NEAREST.format("tensor_parallel_size=1 data_parallel_size=16")
            + r"; tensor_parallel_size=2 data_parallel_size=8 \(16 GPUs\)",
        ),
        (V32, 1, 80, 8, 1, NEAREST.format("tensor_parallel_size=8 data_parallel_size=2")),
        (KIMI_K2, 1, 80, 8, 1, NEAREST.format("tensor_parallel_size=8 data_parallel_size=2")),
        (GLM_5, 1, 80, 8, 1, NEAREST.format("tensor_parallel_size=8 data_parallel_size=2")),
        (V32 | {"quantization_config": None}, 1, 141, 8, 1, r"are missing: .* \(16 GPUs\)"),
        (V32, 1, 1, 1, 8, "use GPUs with more memory"),
        (
            KIMI_K2 | {"quantization_config": KIMI_K2_THINKING},
            1,
            141,
            8,
            1,
            r"the weights, unpacked from int4, need .* GB are missing: .* \(16 GPUs\)",
        ),
    ],
)
def test_layouts_that_do_not_fit_name_the_nearest_that_do(
    model: dict[str, Any], num_nodes: int, gib: int, tp: int, dp: int, message: str
) -> None:
    with pytest.raises(LayoutDoesNotFit, match=message):
        check(model, gpus(num_nodes, gib), tensor_parallel_size=tp, data_parallel_size=dp)


def test_gpus_of_unknown_memory_are_not_judged() -> None:
    assert check(V32, gpus(1, None)).kv_tokens is None


def test_a_cpu_machine_shares_its_memory() -> None:
    """Moonlight in bfloat16: 16.0 B parameters, of which kv_b is stored three times over two."""
    node = Node(node_id="a", address="", num_cpus=32, num_gpus=0, memory_bytes=64 * GIB, gpu_memory_bytes=None)
    parameters = 26 * (64 + 2) * 3 * 2048 * 1408 + 3 * 2048 * 11264 + 2 * 163840 * 2048
    parameters += 27 * (2048 * (16 * 192 + 576) + 16 * 384 * 512 + 16 * 128 * 2048)
    use = check(MOONLIGHT, [node], device="cpu")
    assert use.weight_bytes[0] == pytest.approx(2 * parameters, rel=1e-3)
    assert use.kv_tokens == pytest.approx((64 * GIB - 2 * parameters) / 2 / (27 * 576 * 2), rel=1e-3)
    assert check(MOONLIGHT, [node], device="cpu", data_parallel_size=2).weight_bytes[0] < 2 * parameters
    with pytest.raises(LayoutDoesNotFit, match=r"\(3 replica\(s\), 32.* GB per worker\).*: replicas=2 would fit"):
        check(MOONLIGHT, [node], device="cpu", replicas=3)
    with pytest.raises(LayoutDoesNotFit, match=r"data_parallel_size=1 replicas=1 would fit with 32.* GB"):
        check(MOONLIGHT, [node], device="cpu", data_parallel_size=32)
    with pytest.raises(LayoutDoesNotFit, match=r"one worker alone would need 6.* GB; use nodes with more memory"):
        check(V32, [node], device="cpu")
