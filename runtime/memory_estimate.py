"""Memory that a layout needs on each rank, from the model configuration alone: nothing is read or allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shoal.kernels.backends import Backend
from shoal.kernels.kv_format import FP8_CACHE
from shoal.kernels.ops import Ops
from shoal.parallel.config import ParallelConfig
from shoal.parallel.dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher, TokenDispatcher
from shoal.parallel.groups import create_groups
from shoal.parallel.placement import default_placement

from .engine.config import EngineConfig
from .engine.model_loading import compute_dtype
from .models.config import ModelConfig
from .models.families import FAMILIES
from .models.model import Model

POWERS_OF_TWO = [1 << i for i in range(10)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageFormat:
    """How weights and KV cache are stored on the device."""

    dtype: torch.dtype
    """Compute dtype; block-scaled FP8 weights stay in 8 bits, int4 weights are unpacked to it."""
    backend: Backend
    fp8_cache: bool = False


def storage_format(engine: EngineConfig, config: ModelConfig, *, on_gpu: bool) -> StorageFormat:
    """The storage format that an engine with these settings uses."""
    backend: Backend = "triton" if on_gpu else "cpu"
    return StorageFormat(
        dtype=compute_dtype(config, engine.dtype),
        backend=backend if engine.kernel_backend == "auto" else engine.kernel_backend,
        fp8_cache=engine.kv_cache_dtype == "fp8",
    )


def declare_model(
    config: ModelConfig,
    layout: ParallelConfig | None = None,
    *,
    rank: int = 0,
    local_world_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Model:
    """One rank's part of a model whose weights are declared, for their names, shapes and sizes; it cannot run.

    local_world_size: ranks of the replica that share a node; None: all of them.
    """
    layout = layout or ParallelConfig()
    groups = create_groups(layout, rank, local_world_size=local_world_size or layout.world_size)
    placement = default_placement(config.n_routed_experts, groups)
    ops = Ops("cpu")
    dispatcher: TokenDispatcher
    if layout.world_size == 1:
        dispatcher = LocalTokenDispatcher(placement, ops)
    else:
        dispatcher = AllToAllTokenDispatcher(placement, groups.world, ops)
    build = FAMILIES[config.model_type].build
    return build(config, ops, groups, placement=placement, dispatcher=dispatcher, dtype=dtype, max_model_len=1)


def rank_weight_bytes(
    config: ModelConfig, layout: ParallelConfig, storage: StorageFormat, *, local_world_size: int | None = None
) -> int:
    """Bytes of the weights that rank 0, which holds as much as any other rank, stores on its device.

    Counts what every rank repeats (latent projections, indexer, shared experts, norms) and what is split. A checkpoint
    with block scales is taken to be in FP8 wherever it can stay so.
    """
    model = declare_model(config, layout, local_world_size=local_world_size, dtype=storage.dtype)
    is_fp8 = config.weight_block_size is not None
    return sum(weight.num_bytes(storage.backend, lambda name: is_fp8) for _, weight in model.named_weights())


def kv_bytes_per_token(config: ModelConfig, storage: StorageFormat) -> int:
    """Bytes of a token's KV cache entries in all layers; every rank of an attention group stores them."""
    specs = declare_model(config).cache_specs(FP8_CACHE if storage.fp8_cache else storage.dtype)
    return sum(spec.num_bytes for spec in specs)


def fitting_layouts(
    config: ModelConfig, asked: ParallelConfig, storage: StorageFormat, rank_bytes: int, *, local_world_size: int
) -> Iterator[ParallelConfig]:
    """Layouts with at least as many ranks as `asked` whose weights fit into `rank_bytes` on each rank, nearest first.

    The nearest have the fewest ranks, and of these the most similar tensor-parallel size.
    """
    asked_tp = asked.tensor_parallel_size
    candidates = [
        ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)
        for tp in {*POWERS_OF_TWO[:5], asked_tp}
        for dp in {*POWERS_OF_TWO, asked.data_parallel_size}
        if all(size % tp == 0 for size in (config.num_attention_heads, config.hidden_size, config.intermediate_size))
        and asked.world_size <= tp * dp <= POWERS_OF_TWO[-1]
    ]
    candidates.sort(key=lambda layout: (layout.world_size, abs(layout.tensor_parallel_size - asked_tp)))
    for candidate in candidates:
        on_node = min(local_world_size, candidate.world_size)
        if rank_weight_bytes(config, candidate, storage, local_world_size=on_node) < rank_bytes:
            yield candidate
