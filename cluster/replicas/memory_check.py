"""Memory check of a layout: whether the weights fit, and how much is left for the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from shoal.parallel.config import ParallelConfig
from shoal.runtime.memory_estimate import (
    StorageFormat,
    fitting_layouts,
    kv_bytes_per_token,
    rank_weight_bytes,
    storage_format,
)
from shoal.runtime.models.config import ModelConfig

from ..engine_args import EngineArgs
from ..workers.ray_cluster import LayoutDoesNotFit, Node

NUM_SHOWN = 3
"""Number of layouts that an error message names."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory use of a layout that fits."""

    weight_bytes: tuple[int, ...]
    """Bytes of weights on each worker, per replica."""
    kv_tokens: int | None
    """Capacity in tokens of the KV caches of all replicas; None where the memory of the GPUs is unknown."""

    def __str__(self) -> str:
        room = "" if self.kv_tokens is None else f", room for {self.kv_tokens:,} tokens of KV cache"
        return f"{_gb(max(self.weight_bytes))} of weights per worker{room}"


def check_memory(args: EngineArgs, config: ModelConfig, available: Sequence[Node]) -> MemoryUse:
    """LayoutDoesNotFit when the nodes, even if idle, cannot hold the weights.

    No weights are read: sizes follow from the configuration, the layout and the dtypes on the device.
    """
    storage = storage_format(args, config, on_gpu=args.device == "cuda")
    per_worker = [_weights_per_worker(config, spec.parallel, storage, available, args) for spec in args.replica_specs]
    memory = _gpu_memory(available) if args.device == "cuda" else _host_memory(args, config, per_worker, available)
    if memory is None:
        return MemoryUse(tuple(per_worker), None)
    room = 0
    for spec, weights in zip(args.replica_specs, per_worker, strict=True):
        if args.device == "cuda" and weights >= memory:
            raise LayoutDoesNotFit(_too_little_gpu_memory(config, spec.parallel, storage, weights, memory, available))
        bytes_left = max(0, memory - weights) * args.kv_cache_memory_fraction
        room += int(bytes_left // kv_bytes_per_token(config, storage)) * spec.parallel.data_parallel_size
    return MemoryUse(tuple(per_worker), room)


def _weights_per_worker(
    config: ModelConfig,
    layout: ParallelConfig,
    storage: StorageFormat,
    available: Sequence[Node],
    args: EngineArgs,
) -> int:
    on_node = _most_workers_on_a_node(available, args)
    return rank_weight_bytes(config, layout, storage, local_world_size=min(on_node, layout.world_size))


def _most_workers_on_a_node(available: Sequence[Node], args: EngineArgs) -> int:
    if args.device == "cuda":
        return max(1, *(int(node.num_gpus) for node in available))
    return max(1, *(int(node.num_cpus // (args.num_threads_per_worker or 1)) for node in available))


def _gpu_memory(available: Sequence[Node]) -> int | None:
    """Bytes of the largest GPU; None where the memory of some GPU is unknown."""
    sizes = [node.gpu_memory_bytes for node in available if node.num_gpus]
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None


def _host_memory(args: EngineArgs, config: ModelConfig, per_worker: Sequence[int], available: Sequence[Node]) -> int:
    """Bytes of host memory per worker; LayoutDoesNotFit when all weights together exceed the cluster's memory."""
    layouts = [spec.parallel for spec in args.replica_specs]
    total = sum(node.memory_bytes for node in available)
    needed = sum(weights * layout.world_size for weights, layout in zip(per_worker, layouts, strict=True))
    if needed <= total:
        return total // sum(layout.world_size for layout in layouts)
    alone = rank_weight_bytes(config, ParallelConfig(), storage_format(args, config, on_gpu=False))
    fitting = total // (per_worker[0] * layouts[0].world_size)
    if fitting:
        hint = f"replicas={fitting} would fit"
    elif alone <= total:
        hint = f"tensor_parallel_size=1 data_parallel_size=1 replicas=1 would fit with {_gb(alone)}"
    else:
        hint = f"one worker alone would need {_gb(alone)}; use nodes with more memory or a smaller checkpoint"
    raise LayoutDoesNotFit(
        f"the weights{_origin(config)} need {_gb(needed)} of memory ({len(layouts)} replica(s), {_gb(max(per_worker))} "
        f"per worker); the cluster has {_gb(total)}, {_gb(needed - total)} are missing: {hint}"
    )


def _too_little_gpu_memory(
    config: ModelConfig,
    asked: ParallelConfig,
    storage: StorageFormat,
    weights: int,
    memory: int,
    available: Sequence[Node],
) -> str:
    per_node = max(int(node.num_gpus) for node in available)
    nearest = islice(fitting_layouts(config, asked, storage, memory, local_world_size=per_node), NUM_SHOWN)
    shown = [f"{_layout(layout)} ({layout.world_size} GPUs)" for layout in nearest]
    hint = f"the nearest layouts that fit are {'; '.join(shown)}" if shown else "use GPUs with more memory"
    return (
        f"the weights{_origin(config)} need {_gb(weights)} on each GPU with {_layout(asked)}; a GPU has {_gb(memory)}, "
        f"{_gb(weights - memory)} are missing: {hint}"
    )


def _origin(config: ModelConfig) -> str:
    """What makes the weights larger than their files, as part of a sentence."""
    return "" if config.int4_groups is None else ", unpacked from int4,"


def _layout(layout: ParallelConfig) -> str:
    return f"tensor_parallel_size={layout.tensor_parallel_size} data_parallel_size={layout.data_parallel_size}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
