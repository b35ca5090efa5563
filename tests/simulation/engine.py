"""The real engine over the fake model: what is scheduled, handed over and told is decided by the product's own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from shoal.parallel.config import ParallelConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.engine.output_processor import OutputProcessor
from shoal.runtime.kv_cache.transfer import Clock, KVExporter, KVLoader
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.scheduling.batch import ScheduledSequence
from shoal.runtime.scheduling.block_manager import BlockManager
from shoal.runtime.scheduling.scheduler import Scheduler, SchedulerConfig

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
    max_export_tokens: int = 64
    enable_prefix_caching: bool = True
    max_model_len: int = 32
    transfer_timeout_s: float = 3.0
    lease_s: float = 5.0


class NoFailpoints:
    """Nothing fails."""

    def reach(self, point: str) -> None:
        pass


@dataclass
class Alone:
    """The group of one rank."""

    size: int = 1
    rank: int = 0
    epoch: int = 0


class SingleRank:
    """As much of `ParallelGroups` as an engine without peers uses."""

    def __init__(self, failpoints: Any = None) -> None:
        self.config = ParallelConfig()
        self.rank = self.leader_rank = 0
        self.is_leader = True
        self.world = self.tp = Alone()
        self.failpoints = failpoints or NoFailpoints()

    def set_step(self, step: int) -> None:
        pass


PROCESSOR = OutputProcessor(None, (EOS,))
SAMPLER = Sampler()


class SimulatedEngine(Engine):
    """The leader of an attention group; compares every record that it reads with what the row's answer says."""

    def __init__(
        self, settings: EngineSettings, rows: Mapping[str, Row], groups: Any, transport: Any, clock: Clock
    ) -> None:
        self.rows = rows
        self.groups = groups
        self.cache = Cache(settings.num_blocks, settings.block_size)
        self.runner = cast(Any, Runner(self.cache, self.check_read))
        self.block_manager = BlockManager(
            settings.num_blocks,
            settings.block_size,
            enable_prefix_caching=settings.enable_prefix_caching,
            fingerprint=FINGERPRINT,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_chunk_size=settings.max_chunk_size,
                max_export_tokens=settings.max_export_tokens,
            ),
            self.block_manager,
        )
        self.transport = transport
        self.exporter = KVExporter(
            transport,
            cast(Any, self.cache),
            self.scheduler,
            fingerprint=FINGERPRINT,
            chunk_tokens=settings.max_num_batched_tokens,
            lease_s=settings.lease_s,
            clock=clock,
        )
        self.loader = KVLoader(
            transport,
            self.scheduler,
            fingerprint=FINGERPRINT,
            bytes_per_token=BYTES_PER_TOKEN,
            max_step_tokens=settings.max_num_batched_tokens,
            timeout_s=settings.transfer_timeout_s,
            clock=clock,
        )
        self.sampler = cast(Any, SAMPLER)
        self.processor = PROCESSOR
        self.max_model_len = min(settings.max_model_len, settings.num_blocks * settings.block_size)
        self.limits = RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=self.max_model_len)
        self.seed = 0
        self._requests = {}
        self._running = {}
        self._awaiting = {}
        self._loaded = []
        self._next_seq_id = 0
        self._num_steps = 0
        self._stop_requested = False
        self._all_idle = True
        self._runs_ahead = False
        self._in_flight = None

    def check_read(self, part: ScheduledSequence, records: list[int]) -> None:
        running = self._running[part.seq_id]
        request_id = running.state.request.request_id
        answer = self.rows[request_id].answers[running.completion.sample_index]
        end = part.start + len(part.token_ids)
        assert part.token_ids == answer.token_ids[part.start : end], f"{request_id}: wrong tokens at {part.start}"
        if records != (right := answer.records[: part.start]):
            wrong = [p for p, record in enumerate(right) if records[p] != record]
            raise AssertionError(f"{request_id}: attention reads wrong records at positions {wrong}")

    def check_nothing_left(self) -> None:
        """AssertionError unless the engine is as one that was never asked anything, its prefix cache aside."""
        problems = self.audit()
        left: dict[str, object] = {
            "sequences": list(self._running),
            "requests that await records": list(self._awaiting),
            "scheduled sequences": list(self.scheduler._sequences),
            "published chunks": list(self.transport.published),
        }
        problems += [f"{name}: {what}" for name, what in left.items() if what]
        assert not problems, f"left behind: {'; '.join(problems)}"
