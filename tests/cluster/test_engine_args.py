"""Engine arguments: what is accepted, what is refused and with which words."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from shoal.cluster.engine_args import EngineArgs
from shoal.runtime.engine.config import EngineConfig


def test_the_engine_gets_its_part() -> None:
    args = EngineArgs(
        model="m",
        tensor_parallel_size=2,
        data_parallel_size=3,
        replicas=4,
        dtype="float32",
        max_model_len=100,
        max_num_seqs=5,
        max_num_batched_tokens=50,
        max_chunk_size=7,
        block_size=8,
        num_kv_blocks=9,
        kv_cache_memory_fraction=0.75,
        enable_prefix_caching=False,
        seed=11,
        kernel_backend="reference",
        vendor_kernels="all",
        all2all_backend="deepep",
        invariance="relaxed",
    )
    config = args.to_engine_config()
    assert type(config) is EngineConfig
    assert [getattr(config, f.name) for f in fields(EngineConfig)] == [
        getattr(args, f.name) for f in fields(EngineConfig)
    ]
    assert (config.dtype, config.max_chunk_size, config.seed) == ("float32", 7, 11)
    assert [spec.parallel.world_size for spec in args.replica_specs] == [6] * 4
    assert args.num_workers == 24
    assert not args.hands_over


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": ""}, "model must be a path, got ''"),
        ({"model": " "}, "model must be a path"),
        ({"model": None}, "model must be a path, got None"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a whole number of at least 1, got 0"),
        ({"data_parallel_size": 1.5}, "data_parallel_size"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": None}, "replicas"),
        ({"num_threads_per_worker": 0}, "num_threads_per_worker"),
        ({"startup_timeout_s": 0}, "startup_timeout_s"),
        ({"collective_timeout_s": float("inf")}, "collective_timeout_s"),
        ({"startup_timeout_s": float("nan")}, "startup_timeout_s must be a number above 0, got nan"),
        ({"heartbeat_timeout_s": True}, "heartbeat_timeout_s"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"device": ["cpu"]}, "device must be one of cpu, cuda, got"),
        ({"max_num_seqs": 8.0}, "max_num_seqs must be a whole number of at least 1, got 8.0"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be a whole number of at least 1, got '8'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be true or false, got 1"),
        ({"seed": 2**63}, "seed must fit into 64 bits, got 9223372036854775808"),
        ({"ray_address": ""}, "ray_address must be non-empty text or null, got ''"),
        ({"spares": -1}, "spares must be a whole number of at least 0, got -1"),
        ({"replicas": []}, "replicas is an empty list"),
        ({"replicas": 10**9}, "replicas must be a whole number between 1 and 100000 or a list of values"),
        ({"replicas": "prefill"}, "replicas must be .*, got 'prefill'"),
        ({"replicas": [{"rle": "prefill"}]}, r"replicas\[0\]: rle is not a known setting; did you mean role"),
        (
            {"replicas": [{"role": "prefil"}]},
            r"replicas\[0\]: role must be one of .*, mixed, got 'prefil'",
        ),
        ({"replicas": [3]}, r"replicas\[0\]: must be a mapping"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype must be one of auto, fp8"),
        ({"invariance": "loose"}, "invariance must be one of"),
        ({"kv_cache_memory_fraction": 1.0}, "kv_cache_memory_fraction must be a number above 0 and below 1, got 1.0"),
        ({"vendor_kernels": "cutlass"}, "vendor_kernels must be one of none, flash_mla, deep_gemm, all"),
        ({"all2all_backend": "nvshmem"}, "all2all_backend must be one of default, deepep"),
        ({"block_size": True}, "block_size"),
        (
            {"tensor_paralel_size": 2},
            "tensor_paralel_size is not a known setting; did you mean tensor_parallel_size",
        ),
        ({"zzz": 2}, "zzz is not a known setting; known are .*replicas"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineArgs.from_dict({"model": "m", **values})


def test_the_model_is_required() -> None:
    with pytest.raises(ValueError, match="model is missing"):
        EngineArgs.from_dict({"tensor_parallel_size": 2})
