from __future__ import annotations

import pytest

from shoal.cluster.bench.roofline import Peaks, decode_cost, measure_peaks, prefill_cost, workload_limit
from shoal.runtime.models.config import ModelConfig
from shoal.runtime.models.families import parse_config
from shoal.runtime.random_checkpoint import tiny_config

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
}


def config(model_type: str = "deepseek_v3", **overrides: object) -> ModelConfig:
    return parse_config(tiny_config(model_type, SIZES | overrides) | {"torch_dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("requests", "prompt", "output", "seconds"),
    [(64, 256, 64, 6.8141), (16, 32, 256, 3.4918), (8, 2048, 1, 6.4211), (1, 128, 128, 0.6177)],
)
def test_limits_of_a_dense_model(requests: int, prompt: int, output: int, seconds: float) -> None:
    """Against figures of another program."""
    limit = workload_limit(config(), Peaks(0.8e12, 65e9), requests=requests, prompt=prompt, output=output)
    assert limit == pytest.approx(seconds, abs=5e-5)


def test_a_sparse_model_reads_index_keys_and_selected_records() -> None:
    index = {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 256}
    dense, sparse = config(), config("deepseek_v32", **index)
    # projections of the indexer per layer: q_lora -> heads x dim, hidden -> dim, hidden -> heads
    weights = 8 * (384 * 16 * 128 + 1024 * 128 + 1024 * 16)
    flops, num_bytes = decode_cost(dense, 2, 256)
    assert decode_cost(sparse, 2, 256) == (flops + 2 * 2 * weights, num_bytes + 2 * weights)
    longer_flops, longer_bytes = decode_cost(sparse, 2, 1000)
    assert longer_flops - decode_cost(sparse, 2, 256)[0] == 2 * 8 * 2 * 1000 * 16 * 128
    assert longer_bytes - decode_cost(sparse, 2, 256)[1] == 2 * 8 * 2 * 1000 * 128
    # a prompt of 258 tokens: two of them score 257 and 258 keys, and leave out 1 and 2
    saved, scored = 1 + 2, 257 + 258
    expected = prefill_cost(dense, 1, 258)[0] + 2 * 258 * weights
    expected += 2 * 8 * 16 * (scored * 128 - saved * (128 + 64 + 128))
    assert prefill_cost(sparse, 1, 258)[0] == expected


def test_what_binds() -> None:
    peaks = Peaks(flops_per_s=100.0, bytes_per_s=10.0)
    assert (peaks.seconds(200.0, 10.0), peaks.binding(200.0, 10.0)) == (2.0, "compute")
    assert (peaks.seconds(200.0, 50.0), peaks.binding(200.0, 50.0)) == (5.0, "memory")
    assert peaks.best(Peaks(50.0, 20.0)) == Peaks(100.0, 20.0)


def test_peaks_are_measured() -> None:
    measured = measure_peaks(matrix_size=64, read_bytes=1 << 16, repeats=2)
    assert measured.flops_per_s > 0 < measured.bytes_per_s
