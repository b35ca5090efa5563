"""Entries and index keys of a KV cache in every dtype: sizes, and transfer of their bytes to another cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shoal.kernels.kv_format import FP8_CACHE
from shoal.runtime.kv_cache.cache import KVCache, KVCacheSpec, bytes_per_block
from shoal.runtime.models.config import ModelConfig
from shoal.runtime.models.deepseek import cache_specs
from shoal.runtime.models.families import read_config
from shoal.runtime.random_checkpoint import make_checkpoint

DTYPES = (torch.float32, torch.bfloat16, FP8_CACHE)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """DeepSeek-V3.2's cache; of four layers two have an indexer."""
    path = tmp_path_factory.mktemp("model")
    cache = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    layers = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]}
    make_checkpoint(path, "glm_moe_dsa", seed=0, overrides=cache | layers)
    return read_config(path)


def make_cache(specs: list[KVCacheSpec]) -> KVCache:
    return KVCache(specs, num_blocks=3, block_size=4, device=torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "latent", "key"), [*zip(DTYPES, (2304, 1152, 656), (512, 256, 132), strict=True)])
def test_bytes_of_a_token(config: ModelConfig, dtype: torch.dtype, latent: int, key: int) -> None:
    specs = cache_specs(config, dtype)
    cache = make_cache(specs)
    assert [[layer.shape[0], layer.shape[1] * dtype.itemsize] for layer in cache.latents] == [[12, latent]] * 4
    pages = [keys if keys is None else [keys.shape[0], keys.shape[1] * dtype.itemsize] for keys in cache.index_keys]
    assert pages == [[3, 4 * key], None] * 2
    assert {layer.dtype for layer in (*cache.latents, *cache.index_keys) if layer is not None} == {dtype}
    assert cache.bytes_per_token == 4 * latent + 2 * key
    assert bytes_per_block(specs, 16) == 16 * (4 * latent + 2 * key)


def test_rows_of_entries_are_aligned_where_memory_is_not_the_hosts() -> None:
    specs = [KVCacheSpec(21, 10, torch.bfloat16)]
    cache = KVCache(specs, num_blocks=3, block_size=4, device=torch.device("meta"))
    assert (cache.latents[0].shape, cache.latents[0].stride()) == ((12, 21), (24, 1))
    assert cache.index_keys[0] is not None
    assert (cache.index_keys[0].shape, cache.index_keys[0].stride()) == ((3, 40), (40, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_travel_as_bytes(config: ModelConfig, dtype: torch.dtype) -> None:
    source, target = make_cache(cache_specs(config, dtype)), make_cache(cache_specs(config, dtype))
    generator = torch.Generator().manual_seed(0)
    for cache, high in ((source, 100), (target, 1)):
        for layer in (*cache.latents, *cache.index_keys):
            if layer is not None:
                layer.copy_(torch.randint(0, high, layer.shape, generator=generator))
    payload = source.read_kv(torch.tensor([9, 2, 5]))
    assert payload.numel() == 3 * source.bytes_per_token
    target.write_kv(torch.tensor([0, 11]), payload)
    for a, b in zip(_rows(source), _rows(target), strict=True):
        assert torch.equal(a[[2, 5]], b[[0, 11]])
        assert not b[1:11].any()
    assert torch.equal(payload, torch.cat([rows[[9, 2, 5]].flatten().view(torch.uint8) for rows in _rows(source)]))


def _rows(cache: KVCache) -> Iterator[Tensor]:
    """Per layer, the KV rows [12, width] and then the index keys [12, 128], in FP8 followed by the bytes of a scale."""
    for latents, pages in zip(cache.latents, cache.index_keys, strict=True):
        yield latents
        if pages is not None and pages.dtype == FP8_CACHE:
            yield torch.cat([pages[:, :512].reshape(12, 128), pages[:, 512:].reshape(12, 4)], dim=1)
        elif pages is not None:
            yield pages.view(12, 128)
