"""Builds an engine from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from shoal.parallel.groups import ParallelGroups
from shoal.parallel.kv_transport import KVTransport

from ..kv_cache.receiver import KVReceiver
from ..kv_cache.sender import Clock, KVSender
from ..kv_cache.transfer import KVTransfer
from ..request_limits import RequestLimits
from ..sampling.device_sampler import DeviceSampler
from ..sampling.sampler import Sampler
from ..scheduling.block_manager import BlockManager
from ..scheduling.scheduler import Scheduler, SchedulerConfig
from ..scheduling.transfer_buffer import TransferBuffer
from ..structured.structured_outputs import StructuredOutputs
from ..tokenization.tokenizer import Tokenizer, read_eos_token_ids
from .config import EngineConfig
from .engine import Engine
from .lockstep import Lockstep
from .model_loading import LoadedModel, OnPhase, load_model
from .output_processor import OutputProcessor

TRANSFER_TIMEOUT_S = 30.0
"""Longest wait for news of a prompt that another replica computes; then it is computed here."""
LEASE_S = 600.0
"""How long a published prompt is held for a replica that never confirms that it has read it."""


def build_engine(
    model_dir: str | Path,
    config: EngineConfig,
    groups: ParallelGroups,
    *,
    transport: KVTransport | None = None,
    clock: Clock = time.monotonic,
    on_phase: OnPhase = lambda _: None,
) -> Engine:
    """Load this rank's part of the model and connect the parts of its engine.

    `transport` exchanges prompts with other replicas; without it every request is prefilled and decoded here.
    `on_phase` is called with notices for the user. ValueError for a checkpoint or a setting that cannot work.
    """
    loaded = load_model(model_dir, config, groups, on_phase)
    runner = loaded.runner
    scheduler = _scheduler(config, loaded)
    vocab_size = loaded.config.vocab_size
    on_cpu = groups.device.type == "cpu"
    tokenizer = Tokenizer.from_pretrained(model_dir)
    eos_token_ids = tokenizer.eos_token_ids if tokenizer else read_eos_token_ids(model_dir)
    kv = None
    if transport is not None and groups.is_leader:
        kv = _kv_transfer(config, loaded, groups, scheduler, transport, clock)
    return Engine(
        runner,
        scheduler,
        Sampler(vocab_size) if on_cpu else DeviceSampler(vocab_size, groups.device, loaded.ops),
        OutputProcessor(tokenizer, eos_token_ids, StructuredOutputs(tokenizer, vocab_size)),
        lockstep=Lockstep(groups),
        limits=RequestLimits(vocab_size=vocab_size, max_model_len=loaded.max_model_len),
        kv=kv,
        spans=groups.spans,
        seed=config.seed,
        overlap=runner.graphs is not None and transport is None,
    )


def _scheduler(config: EngineConfig, loaded: LoadedModel) -> Scheduler:
    cache = loaded.runner.cache
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_chunk_size=config.max_chunk_size,
    )
    block_manager = BlockManager(
        cache.num_blocks,
        cache.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        fingerprint=loaded.kv_fingerprint,
    )
    return Scheduler(limits, block_manager, TransferBuffer(max(1, config.kv_buffer_size // cache.bytes_per_token)))


def _kv_transfer(
    config: EngineConfig,
    loaded: LoadedModel,
    groups: ParallelGroups,
    scheduler: Scheduler,
    transport: KVTransport,
    clock: Clock,
) -> KVTransfer:
    sender = KVSender(
        transport,
        loaded.runner.cache,
        scheduler.transfer_buffer,
        fingerprint=loaded.kv_fingerprint,
        chunk_tokens=config.max_num_batched_tokens,
        lease_s=LEASE_S,
        clock=clock,
        spans=groups.spans,
    )
    receiver = KVReceiver(
        transport,
        scheduler,
        fingerprint=loaded.kv_fingerprint,
        bytes_per_token=loaded.runner.cache.bytes_per_token,
        max_step_tokens=config.max_num_batched_tokens,
        timeout_s=TRANSFER_TIMEOUT_S,
        clock=clock,
        spans=groups.spans,
    )
    return KVTransfer(sender, receiver)
