"""Memory that a layout needs on each rank, from the model configuration alone: nothing is read or allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shoal.kernels.kv_format import FP8_RECORDS
from shoal.kernels.ops import Ops
from shoal.kernels.registry import Backend
from shoal.parallel.config import ParallelConfig
from shoal.parallel.dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher, TokenDispatcher
from shoal.parallel.groups import create_groups
from shoal.parallel.placement import default_placement

from .models.config import ModelConfig
from .models.families import FAMILIES
from .models.model import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageFormat:
    """How weights and KV cache are stored on the device."""

    dtype: torch.dtype
    """Compute dtype; block-scaled FP8 weights stay in 8 bits."""
    backend: Backend
    fp8_cache: bool = False


def declare_model(
    config: ModelConfig,
    layout: ParallelConfig | None = None,
    *,
    rank: int = 0,
    ranks_on_node: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Model:
    """One rank's part of a model whose weights are declared, for their names, shapes and sizes; it cannot run.

    ranks_on_node: ranks of the replica that share a node; None: all of them.
    """
    layout = layout or ParallelConfig()
    groups = create_groups(layout, rank, ranks_on_node=ranks_on_node or layout.world_size)
    placement = default_placement(config.n_routed_experts, groups)
    dispatcher: TokenDispatcher
    if layout.world_size == 1:
        dispatcher = LocalTokenDispatcher(placement)
    else:
        dispatcher = AllToAllTokenDispatcher(placement, groups.world)
    build = FAMILIES[config.model_type].build
    return build(config, Ops("cpu"), groups, placement=placement, dispatcher=dispatcher, dtype=dtype, max_model_len=1)


def rank_weight_bytes(
    config: ModelConfig, layout: ParallelConfig, storage: StorageFormat, *, ranks_on_node: int | None = None
) -> int:
    """Bytes of the weights that rank 0, which holds as much as any other rank, stores on its device.

    Counts what every rank repeats (latent projections, indexer, shared experts, norms) and what is split. A checkpoint
    with block scales is taken to be in FP8 wherever it can stay so.
    """
    model = declare_model(config, layout, ranks_on_node=ranks_on_node, dtype=storage.dtype)
    is_fp8 = config.weight_block_size is not None
    return sum(weight.num_bytes(storage.backend, lambda name: is_fp8) for _, weight in model.named_weights())


def kv_bytes_per_token(config: ModelConfig, storage: StorageFormat) -> int:
    """Bytes of a token's KV cache entries in all layers; every rank of an attention group stores them."""
    specs = declare_model(config).cache_specs(FP8_RECORDS if storage.fp8_cache else storage.dtype)
    return sum(spec.num_bytes for spec in specs)


def fitting_layouts(
    config: ModelConfig, asked: ParallelConfig, storage: StorageFormat, rank_bytes: int, *, ranks_on_node: int
) -> Iterator[ParallelConfig]:
    """Layouts whose weights fit into `rank_bytes` on every rank, the nearest to the one asked for first.

    Near means few ranks more or less, then little change of the tensor-parallel size.
    """
    sizes = [2**i for i in range(10)]
    candidates = [
        ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)
        for tp in {*sizes[:5], asked.tensor_parallel_size}
        for dp in {*sizes, asked.data_parallel_size}
        if all(size % tp == 0 for size in (config.num_attention_heads, config.hidden_size, config.intermediate_size))
        and tp * dp <= max(sizes)
    ]
    candidates.sort(
        key=lambda c: (
            abs(c.world_size - asked.world_size),
            abs(c.tensor_parallel_size - asked.tensor_parallel_size),
        )
    )
    for candidate in candidates:
        on_node = min(ranks_on_node, candidate.world_size)
        if rank_weight_bytes(config, candidate, storage, ranks_on_node=on_node) < rank_bytes:
            yield candidate
