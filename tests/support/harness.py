"""Runs a model on one rank without an engine, so that tests see all logits and intermediate tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shoal.kernels.ops import Ops
from shoal.parallel.dispatcher import LocalTokenDispatcher
from shoal.parallel.groups import single_process_groups
from shoal.parallel.placement import default_placement
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.engine.model_runner import ModelRunner, prompt_slices
from shoal.runtime.kv_cache.cache import KVCache
from shoal.runtime.models.families import FAMILIES, read_config
from shoal.runtime.scheduling.batch import Batch, ScheduledSequence


def make_runner(
    model_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    num_blocks: int = 64,
    block_size: int = 16,
) -> ModelRunner:
    """A runner with an empty cache of `num_blocks` blocks, in `cache_dtype`, or else in `dtype`."""
    config = read_config(model_dir)
    groups = single_process_groups()
    placement = default_placement(config.n_routed_experts, groups)
    model = FAMILIES[config.model_type].build(
        config,
        Ops("cpu"),
        groups,
        placement=placement,
        dispatcher=LocalTokenDispatcher(placement, Ops("cpu"), groups.device),
        dtype=dtype,
        max_model_len=min(config.max_position_embeddings, 4096),
    )
    with Checkpoint(model_dir) as checkpoint:
        model.load(checkpoint)
    specs = model.cache_specs(cache_dtype or dtype)
    cache = KVCache(specs, num_blocks=num_blocks, block_size=block_size, device=groups.device)
    return ModelRunner(model, cache, groups.device)


def logits_in_chunks(
    runner: ModelRunner, token_ids: list[int], chunks: list[int], *, block_table: list[int] | None = None
) -> Tensor:
    """Feed one sequence in steps of the given sizes; returns the logits of every position, [len(token_ids), V]."""
    assert sum(chunks) == len(token_ids)
    block_size = runner.cache.block_size
    table = block_table or list(range(-(-len(token_ids) // block_size)))
    rows: dict[int, Tensor] = {}

    def keep(seq: ScheduledSequence, position: int, logits: Tensor) -> None:
        rows.update({position + i: row.clone() for i, row in enumerate(logits)})

    start = 0
    for size in chunks:
        end = start + size
        scheduled = ScheduledSequence(
            seq_id=0,
            start=start,
            token_ids=token_ids[start:end],
            block_table=table[: -(-end // block_size)],
            num_prompt_tokens=len(token_ids),
            num_logits=0,
            num_prompt_logits=size,
        )
        batch = Batch([scheduled])
        runner.run(batch, len(prompt_slices(batch)), keep)
        start = end
    return torch.stack([rows[i] for i in range(len(token_ids))])


def record_tap(wanted: str, into: dict[int, list[Tensor]]) -> Callable[[int, str, Tensor], None]:
    """A tap that keeps the tensors of one op, per layer, in call order."""

    def tap(layer: int, op: str, tensor: Tensor) -> None:
        if op == wanted:
            into.setdefault(layer, []).append(tensor.clone())

    return tap
