"""The real engine over the fake model: what is scheduled, handed over and told is decided by the product's own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from shoal.parallel.config import ParallelConfig
from shoal.parallel.spans import Spans
from shoal.runtime.engine.engine import Engine
from shoal.runtime.engine.lockstep import Lockstep
from shoal.runtime.engine.output_processor import OutputProcessor
from shoal.runtime.kv_cache.receiver import KVReceiver
from shoal.runtime.kv_cache.sender import Clock, KVSender
from shoal.runtime.kv_cache.transfer import KVTransfer
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.scheduling.batch import ScheduledSequence
from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from shoal.runtime.scheduling.transfer_buffer import TransferBuffer

from .model import BYTES_PER_TOKEN, EOS, VOCAB_SIZE, Cache, Row, Runner, Sampler

FINGERPRINT = bytes(32)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What differs between the engines of a world."""

    num_blocks: int = 16
    block_size: int = 2
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 8
    max_chunk_size: int | None = None
    max_transfer_tokens: int = 64
    enable_prefix_caching: bool = True
    max_model_len: int = 32
    transfer_timeout_s: float = 3.0
    lease_s: float = 5.0


@dataclass
class Alone:
    """The group of one rank."""

    size: int = 1
    rank: int = 0
    epoch: int = 0


class SingleRank:
    """As much of `ParallelGroups` as an engine without peers uses."""

    def __init__(self) -> None:
        self.config = ParallelConfig()
        self.rank = self.leader_rank = 0
        self.is_leader = True
        self.world = self.tp = Alone()
        self.spans = Spans()

    def set_step(self, step: int) -> None:
        pass


def make_scheduler(settings: EngineSettings) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_chunk_size=settings.max_chunk_size,
    )
    block_manager = BlockManager(
        settings.num_blocks,
        settings.block_size,
        enable_prefix_caching=settings.enable_prefix_caching,
        fingerprint=FINGERPRINT,
    )
    return Scheduler(config, block_manager, TransferBuffer(settings.max_transfer_tokens))


PROCESSOR = OutputProcessor(None, (EOS,))
SAMPLER = Sampler()


class SimulatedEngine(Engine):
    """The leader of an attention group; compares every entry that it reads with what the row's answer says."""

    def __init__(
        self, settings: EngineSettings, rows: Mapping[str, Row], groups: Any, transport: Any, clock: Clock
    ) -> None:
        self.rows = rows
        self.transport = transport
        self.cache = Cache(settings.num_blocks, settings.block_size)
        scheduler = make_scheduler(settings)
        sender = KVSender(
            transport,
            cast(Any, self.cache),
            scheduler.transfer_buffer,
            fingerprint=FINGERPRINT,
            chunk_tokens=settings.max_num_batched_tokens,
            lease_s=settings.lease_s,
            clock=clock,
            spans=groups.spans,
        )
        receiver = KVReceiver(
            transport,
            scheduler,
            fingerprint=FINGERPRINT,
            bytes_per_token=BYTES_PER_TOKEN,
            max_step_tokens=settings.max_num_batched_tokens,
            timeout_s=settings.transfer_timeout_s,
            clock=clock,
            spans=groups.spans,
        )
        max_model_len = min(settings.max_model_len, settings.num_blocks * settings.block_size)
        super().__init__(
            cast(Any, Runner(self.cache, self.check_read)),
            scheduler,
            cast(Any, SAMPLER),
            PROCESSOR,
            lockstep=Lockstep(groups),
            limits=RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=max_model_len),
            kv=KVTransfer(sender, receiver),
            spans=groups.spans,
        )

    def check_read(self, part: ScheduledSequence, entries: list[int]) -> None:
        running = self._running[part.seq_id]
        request_id = running.state.request.request_id
        answer = self.rows[request_id].answers[running.completion.sample_index]
        end = part.start + len(part.token_ids)
        assert part.token_ids == answer.token_ids[part.start : end], f"{request_id}: wrong tokens at {part.start}"
        if entries != (right := answer.entries[: part.start]):
            wrong = [p for p, entry in enumerate(right) if entries[p] != entry]
            raise AssertionError(f"{request_id}: attention reads wrong entries at positions {wrong}")

    def check_nothing_left(self) -> None:
        """AssertionError unless the engine is as one that was never asked anything, its prefix cache aside."""
        problems = self.audit()
        left: dict[str, object] = {
            "sequences": list(self._running),
            "requests that wait for their prompts": list(self.kv._waiting) if isinstance(self.kv, KVTransfer) else [],
            "scheduled sequences": list(self.scheduler._sequences),
            "published chunks": list(self.transport.published),
        }
        problems += [f"{name}: {what}" for name, what in left.items() if what]
        assert not problems, f"left behind: {'; '.join(problems)}"
