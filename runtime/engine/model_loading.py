"""From a checkpoint directory to one rank's part of a model, with a cache of the size that fits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.kernels.kv_format import FP8_CACHE
from shoal.kernels.math_utils import cdiv
from shoal.kernels.numerics import set_deterministic_fp_mode
from shoal.kernels.ops import Ops, choose_backend
from shoal.kernels.registry import check_model, is_invariant
from shoal.kernels.vendor import ModelProperties, select_vendors, why_not_invariant
from shoal.parallel.deep_ep import deep_ep_dispatcher
from shoal.parallel.dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher, TokenDispatcher
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.placement import ExpertPlacement, default_placement

from ..checkpoint.checkpoint import Checkpoint
from ..kv_cache.cache import KVCache, KVCacheSpec, bytes_per_block
from ..memory import available_memory, release_freed_memory
from ..models.config import ModelConfig
from ..models.families import FAMILIES, read_config
from ..models.model import Model
from ..models.weights import tensor_shapes
from .config import DType, EngineConfig
from .cuda_graphs import DecodeGraphs
from .model_runner import ModelRunner

OnPhase = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run."""

    runner: ModelRunner
    ops: Ops
    config: ModelConfig
    max_model_len: int
    """Most tokens of a sequence: as asked for, or what the model and the cache can take."""
    kv_fingerprint: bytes
    """SHA-256 of everything that decides about the bits of a KV cache entry: checkpoint, dtypes and kernels."""


def load_model(
    model_dir: str | Path,
    config: EngineConfig,
    groups: ParallelGroups,
    on_phase: OnPhase,
    *,
    placement: ExpertPlacement | None = None,
) -> LoadedModel:
    """Build one rank's part of the model and its KV cache.

    placement: experts of every rank; None: `default_placement`. `on_phase` receives notices for the user.
    ValueError for a checkpoint or a setting that cannot work.
    """
    ops = _choose_ops(config, groups.device)
    set_deterministic_fp_mode()
    model_config = read_config(model_dir)
    check_layout(model_config, groups.config.tensor_parallel_size)
    dtype = compute_dtype(model_config, config.dtype)
    cache_dtype = FP8_CACHE if config.kv_cache_dtype == "fp8" else dtype
    if cache_dtype == FP8_CACHE and ops.backend == "triton":
        _check_fp8_cache(model_config, dtype)
    check_model(ops.vendors, _model_properties(config, model_config, dtype, groups))
    wanted_len = config.max_model_len or model_config.max_position_embeddings
    if wanted_len > model_config.max_position_embeddings:
        raise ValueError(
            f"max_model_len {wanted_len} is above the model's max_position_embeddings "
            f"({model_config.max_position_embeddings})"
        )
    placement = placement or default_placement(model_config.n_routed_experts, groups)
    dispatcher = _dispatcher(config, model_config, groups, placement, ops, dtype)
    model = FAMILIES[model_config.model_type].build(
        model_config, ops, groups, placement=placement, dispatcher=dispatcher, dtype=dtype, max_model_len=wanted_len
    )
    fingerprint = _load_weights(model, model_dir, on_phase)
    release_freed_memory()  # tensors were unpacked one at a time, of all sizes
    specs = model.cache_specs(cache_dtype)
    num_blocks = _num_kv_blocks(config, groups, specs, wanted_len)
    max_model_len = min(wanted_len, num_blocks * config.block_size)
    if config.max_model_len is not None and max_model_len < wanted_len:
        raise ValueError(
            f"the cache holds {num_blocks} blocks of {config.block_size} tokens, which is less than "
            f"max_model_len = {wanted_len}; lower max_model_len or raise num_kv_blocks"
        )
    if max_model_len < wanted_len:
        on_phase(f"notice: max_model_len is {max_model_len}, which is what the cache can hold")
    cache = KVCache(specs, num_blocks=num_blocks, block_size=config.block_size, device=groups.device)
    graphs = None
    on_gpu_alone = groups.device.type == "cuda" and groups.world.size == 1 and ops.backend == "triton"
    if on_gpu_alone and not config.enforce_eager:
        graphs = DecodeGraphs(
            model, cache, groups.device, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len
        )
    kernels = ops.numerics_id(groups.device)
    depends_on = f"{fingerprint}/{dtype}/{cache_dtype}/{kernels}"
    return LoadedModel(
        runner=ModelRunner(model, cache, groups.device, graphs, groups.spans),
        ops=ops,
        config=model_config,
        max_model_len=max_model_len,
        kv_fingerprint=hashlib.sha256(depends_on.encode()).digest(),
    )


def _choose_ops(config: EngineConfig, device: torch.device) -> Ops:
    """The kernels of the engine. ValueError for kernels that do not run there or are not as invariant as asked."""
    backend = choose_backend(config.kernel_backend, device)
    vendors = select_vendors(config.vendor_kernels)
    if config.invariance == "strict" and not is_invariant(backend):
        raise ValueError(f"kernels {backend!r} are not batch-invariant; choose others or set invariance to relaxed")
    if config.invariance == "strict" and (why := why_not_invariant(vendors)):
        raise ValueError(
            f"vendor_kernels {config.vendor_kernels} are not batch-invariant ({why}); "
            f"set vendor_kernels to none or invariance to relaxed"
        )
    return Ops.choose(device, backend, vendors)


def _check_fp8_cache(config: ModelConfig, dtype: torch.dtype) -> None:
    """ValueError for an FP8 cache that the Triton kernels cannot read."""
    dims = (config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim if config.has_index else 128)
    if dtype != torch.bfloat16 or dims[:2] != (512, 64) or dims[2] not in (32, 64, 128):
        raise ValueError(
            f"kv_cache_dtype fp8 on a GPU needs dtype bfloat16, kv_lora_rank 512, qk_rope_head_dim 64 and an "
            f"index_head_dim of 32, 64 or 128, the model has {dtype}, {dims[0]}, {dims[1]} and {dims[2]}; "
            f"use kv_cache_dtype auto"
        )


def _model_properties(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, groups: ParallelGroups
) -> ModelProperties:
    return ModelProperties(
        device=groups.device,
        dtype=dtype,
        num_heads=model.num_attention_heads // groups.tp.size,
        kv_lora_rank=model.kv_lora_rank,
        qk_rope_head_dim=model.qk_rope_head_dim,
        block_size=config.block_size,
        fp8_cache=config.kv_cache_dtype == "fp8",
        index_shape=(model.index_n_heads, model.index_head_dim) if model.has_index else None,
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.moe_intermediate_size,
        block_fp8_weights=model.weight_block_size is not None,
        ue8m0_scales=model.ue8m0_scales,
    )


def _load_weights(model: Model, model_dir: str | Path, on_phase: OnPhase) -> str:
    """Fill the model from a checkpoint directory; returns the fingerprint of the checkpoint."""
    with Checkpoint(model_dir) as checkpoint:
        leftovers = checkpoint.check_names(tensor_shapes(model.named_weights()), model.config.int4_groups)
        for notice in [*checkpoint.notices, *_describe_unused(checkpoint, model.config, set(leftovers))]:
            on_phase(f"notice: {notice}")
        model.load(checkpoint)
        return checkpoint.compute_fingerprint()


def _describe_unused(checkpoint: Checkpoint, config: ModelConfig, leftovers: set[str]) -> Iterator[str]:
    """Notices about the tensors that the model does not use."""
    mtp = set(checkpoint.mtp_names(config.num_hidden_layers, config.num_nextn_predict_layers, config.tensor_prefix))
    if mtp:
        yield f"{len(mtp)} tensors of the multi-token-prediction layer are not used"
    outside = {name for name in leftovers if not name.startswith(config.tensor_prefix)}
    if outside:
        yield f"{len(outside)} tensors of the vision tower are not used, such as {min(outside)}: only text is supported"
    if unused := sorted(leftovers - mtp - outside):
        yield f"{len(unused)} tensors of the checkpoint are not used, such as {unused[0]}"


def _dispatcher(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    placement: ExpertPlacement,
    ops: Ops,
    dtype: torch.dtype,
) -> TokenDispatcher:
    """ValueError for an all2all_backend that does not fit the model or the device, or that is not installed."""
    if groups.world.size == 1:
        return LocalTokenDispatcher(placement, ops, groups.device)
    if config.all2all_backend == "default":
        return AllToAllTokenDispatcher(placement, groups.world, ops, groups.device)
    if groups.device.type != "cuda" or dtype != torch.bfloat16:
        raise ValueError(
            f"all2all_backend deepep moves bfloat16 between GPUs, this is {dtype} on device {groups.device.type}: "
            f"set all2all_backend to default"
        )
    tokens_per_rank = cdiv(config.max_num_batched_tokens, groups.tp.size)
    return deep_ep_dispatcher(
        placement, groups, ops, model.hidden_size, max_rows=tokens_per_rank * model.num_experts_per_tok
    )


def _num_kv_blocks(config: EngineConfig, groups: ParallelGroups, specs: list[KVCacheSpec], max_len: int) -> int:
    """KV cache blocks of this attention group: as asked for, else what its sequences can use and its memory holds."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    per_sequence = cdiv(max_len, config.block_size)
    sharing = groups.local_world_size if groups.device.type == "cpu" else 1  # every rank has a GPU of its own
    budget = available_memory(groups.device) * config.kv_cache_memory_fraction / sharing
    fits = int(budget // bytes_per_block(specs, config.block_size))
    wanted = max(1, min(per_sequence * config.max_num_seqs, fits))
    agreed = groups.tp.all_gather_ints([wanted], layer=-1, op="engine.num_kv_blocks")
    return min(row[0] for row in agreed)


def compute_dtype(config: ModelConfig, dtype: DType) -> torch.dtype:
    """The dtype asked for; auto: float32 for a checkpoint in float32, otherwise bfloat16."""
    if dtype == "auto":
        return torch.float32 if config.torch_dtype is torch.float32 else torch.bfloat16
    return torch.float32 if dtype == "float32" else torch.bfloat16


def check_layout(config: ModelConfig, tensor_parallel_size: int) -> None:
    """ValueError, naming the size that does not divide, when the model cannot be split over that many ranks."""
    for name in ("num_attention_heads", "hidden_size", "intermediate_size"):
        value = getattr(config, name)
        if value % tensor_parallel_size:
            raise ValueError(
                f"{name} = {value} cannot be split over tensor_parallel_size = {tensor_parallel_size}; "
                f"choose a divisor of it, or use data_parallel_size"
            )
