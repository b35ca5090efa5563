"""Records of a cache in every dtype: their size, and the way of their bytes from one cache to another."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.records import FP8_RECORDS
from shoal.runtime.kv_cache import KVCache, RecordSpec, bytes_per_block
from shoal.runtime.models.config import ModelConfig
from shoal.runtime.models.deepseek import record_specs
from tests.checkpoints import make_checkpoint

DTYPES = (torch.float32, torch.bfloat16, FP8_RECORDS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """DeepSeek-V3.2's cache; of four layers two have an indexer."""
    path = tmp_path_factory.mktemp("model")
    cache = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    layers = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]}
    make_checkpoint(path, "glm_moe_dsa", seed=0, overrides=cache | layers)
    return ModelConfig.from_pretrained(path)


def make_cache(specs: list[RecordSpec]) -> KVCache:
    return KVCache(specs, num_blocks=3, block_size=4, device=torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "latent", "key"), [*zip(DTYPES, (2304, 1152, 656), (512, 256, 132), strict=True)])
def test_bytes_of_a_token(config: ModelConfig, dtype: torch.dtype, latent: int, key: int) -> None:
    specs = record_specs(config, dtype)
    assert [spec.offset("index_key") * dtype.itemsize for spec in specs[::2]] == [latent, latent]
    assert [spec.width * dtype.itemsize for spec in specs] == [latent + key, latent] * 2
    assert make_cache(specs).bytes_per_token == 4 * latent + 2 * key
    assert bytes_per_block(specs, 16) == 16 * (4 * latent + 2 * key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_records_travel_as_bytes(config: ModelConfig, dtype: torch.dtype) -> None:
    source, target = make_cache(record_specs(config, dtype)), make_cache(record_specs(config, dtype))
    generator = torch.Generator().manual_seed(0)
    for layer in source.records:
        layer.view(torch.uint8).random_(generator=generator)
    payload = source.read_records(torch.tensor([9, 2, 5]))
    assert payload.numel() == 3 * source.bytes_per_token
    target.write_records(torch.tensor([0, 11]), payload)
    for a, b in zip(source.records, target.records, strict=True):
        assert torch.equal(a[[2, 5]].view(torch.uint8), b[[0, 11]].view(torch.uint8))
