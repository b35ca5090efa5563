"""What the search of the hand-off moves about: an engine, the router, and the messages between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.cluster.replica_spec import Role
from shoal.cluster.routing.groups import GroupSpec
from shoal.cluster.routing.request_router import Deliver, Effect, RequestRouter
from shoal.cluster.workers.wire import Abort, Command, EndPrefill, Event
from shoal.cluster.workers.worker import apply_command
from shoal.parallel import kv_transport
from shoal.parallel.kv_transport import KVChunk, TransferError
from shoal.runtime.kv_cache.receiver import _Load
from shoal.runtime.kv_cache.transfer import KVTransfer
from shoal.runtime.scheduling.sequence import Sequence as RuntimeSequence
from shoal.runtime.types import Finished, Prefilled, PromptLoaded, Tokens

from .engine import EngineSettings, SimulatedEngine, SingleRank
from .model import Payload, Row
from .oracle import Ledger, check_routing

Key = tuple[Any, ...]


@dataclass
class Fetch:
    """A read that is on its way until it is told what arrives; `close` takes it off the list."""

    transport: Transport
    chunk: KVChunk
    deadline: float
    arrived: bool = False
    payload: Payload | None = None

    def poll(self) -> Payload | None:
        if not self.arrived:
            if self.transport.now >= self.deadline:
                raise TransferError("it takes too long")
            return None
        if self.payload is None:
            raise TransferError("it was released")
        kv_transport.check_payload(self.chunk, self.payload)  # type: ignore[arg-type]
        return self.payload

    def close(self) -> None:
        if self in self.transport.fetches:
            self.transport.fetches.remove(self)


@dataclass
class Transport:
    """What one side published, and what it reads; also its clock."""

    published: dict[int, Payload] = field(default_factory=dict)
    fetches: list[Fetch] = field(default_factory=list)
    now: float = 0.0

    def clock(self) -> float:
        return self.now

    def publish(self, payload: Payload, *, generation: int) -> bytes:
        self.published[generation] = payload
        return b""

    def release(self, generation: int) -> None:
        self.published.pop(generation, None)

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        self.fetches.append(Fetch(self, chunk, self.now + timeout_s))
        return self.fetches[-1]


class Site:
    """A process with an engine."""

    def __init__(self, settings: EngineSettings, rows: Mapping[str, Row]) -> None:
        self.transport = Transport()
        self.engine = SimulatedEngine(settings, rows, SingleRank(), self.transport, self.transport.clock)

    def step(self, commands: Sequence[Command], arriving: Sequence[tuple[int, Payload | None]]) -> list[Event]:
        """A step before which some reads, by number, brought something, or failed."""
        for number, payload in arriving:
            fetch = self.transport.fetches[number]
            fetch.arrived, fetch.payload = True, payload
        refused = [end for command in commands for end in apply_command(self.engine, command)]
        assert not refused, f"refused: {refused}"
        result = self.engine.step()
        self.engine.block_manager.check_integrity()
        return [*result.chunks, *result.loaded, *result.outputs, *self.engine.take_outputs()]

    def pass_time(self, seconds: float) -> None:
        self.transport.now += seconds

    def preempt(self, seq_id: int) -> None:
        self.engine.scheduler.preempt(seq_id)

    def forget(self) -> None:
        """See `Part`."""
        vars(self.engine).clear()
        self.transport.fetches = []

    @property
    def preemptible(self) -> list[int]:
        return [seq.seq_id for seq in self.engine.scheduler.running]

    @property
    def reading(self) -> list[tuple[int, int]]:
        """Reads that are on their way: number, and generation of the chunk."""
        return [(n, f.chunk.generation) for n, f in enumerate(self.transport.fetches) if not f.arrived]

    def key(self) -> Key:
        """Equal for sites that can go on in the same ways; what only tells the past is left out."""
        engine, transport = self.engine, self.transport
        pool, prefixes = engine.block_manager.pool, engine.block_manager.prefixes
        buffer = engine.scheduler.transfer_buffer
        assert isinstance(engine.kv, KVTransfer)
        sender, receiver = engine.kv.sender, engine.kv.receiver
        return (
            tuple((*_sequence_key(seq), buffer.holds(i)) for i, seq in engine.scheduler._sequences.items()),
            (tuple(pool._free), tuple(pool._idle), tuple(n and n.digest for n in prefixes._nodes)),
            tuple(engine.cache.entries),
            tuple(
                (
                    i,
                    r.prefill_reported,
                    tuple((tuple(c.token_ids), c.num_reported, c.num_given, c.end_reported) for c in r.completions),
                )
                for i, r in engine._requests.items()
            ),
            tuple(
                (i, e.seq.seq_id, e.num_published, tuple(e.generations), self._left(e.lease_ends))
                for i, e in sender._exports.items()
            ),
            tuple((*_load_key(load), self._left(load.deadline)) for load in receiver._loads.values()),
            tuple((f.chunk.generation, f.arrived, f.payload, self._left(f.deadline)) for f in transport.fetches),
            tuple(transport.published.items()),
            (engine._next_seq_id, sender._num_chunks),
        )

    def _left(self, deadline: float | None) -> float | None:
        return None if deadline is None else max(0.0, deadline - self.transport.now)


class Desk:
    """The router, and whoever asked it."""

    def __init__(self, settings: Sequence[EngineSettings], rows: Mapping[str, Row]) -> None:
        roles: list[Role] = ["prefill", "decode"]
        specs = [
            GroupSpec(role=role, max_num_seqs=s.max_num_seqs, num_kv_tokens=s.num_blocks * s.block_size)
            for role, s in zip(roles, settings, strict=True)
        ]
        self.routing = RequestRouter(specs, max_model_len=settings[0].max_model_len)
        known = {
            (name, index): len(tokens.token_ids)
            for name, row in rows.items()
            for index, tokens in enumerate(row.request.generated)
        }
        self.ledger = Ledger(rows, known)

    def submit(self) -> list[tuple[int, Command]]:
        return self._carry_out(self.routing.submit([row.request for row in self.ledger.rows.values()]))

    def hear(self, side: int, events: Sequence[Event]) -> list[tuple[int, Command]]:
        return [sent for event in events for sent in self._carry_out(self.routing.handle(side, event))]

    def lose(self, side: int) -> list[tuple[int, Command]]:
        return self._carry_out(self.routing.lose(side))

    def restore(self, side: int) -> list[tuple[int, Command]]:
        return self._carry_out(self.routing.restore(side))

    def abort(self, row: str) -> list[tuple[int, Command]]:
        sent = self._carry_out(self.routing.abort(row))
        self.ledger.aborted.add(row)
        return sent

    @property
    def open(self) -> list[str]:
        return sorted(self.ledger.open)

    def check_end(self) -> None:
        assert not self.ledger.open, f"never answered: {sorted(self.ledger.open)}"
        check_routing(self.routing)

    def check_fair_end(self) -> None:
        """When nothing went wrong on the way."""
        assert self.routing.num_failed_transfers == 0, "entries were not there in time"

    def forget(self) -> None:
        """See `Part`."""

    def key(self) -> Key:
        """As of a site."""
        routing, ledger = self.routing, self.ledger
        return (
            tuple((g.alive, tuple(g.requests)) for g in routing._groups),
            tuple(
                (
                    i,
                    t.attempt,
                    t.prefill,
                    t.decode,
                    t.announced,
                    t.prefilled,
                    t.response._prefilled is None,
                    *(g.token_ids for g in t.known),
                    *((len(s.token_ids), s.end is None) for s in t.response._samples),
                )
                for i, t in routing._tracked.items()
            ),
            tuple(routing._queue),
            (tuple(sorted(ledger.told.items())), tuple(sorted(ledger.answered)), tuple(sorted(ledger.aborted))),
        )

    def _carry_out(self, effects: Sequence[Effect]) -> list[tuple[int, Command]]:
        sent = []
        for effect in effects:
            if isinstance(effect, Deliver):
                self.ledger.take(effect.output)
            else:
                sent.append((effect.group, effect.command))
        return sent


def _sequence_key(seq: RuntimeSequence) -> Key:
    progress = (seq.num_computed_tokens, seq.num_output_tokens, seq.remote_prefill_pending)
    return (seq.seq_id, seq.arrival, seq.status.value, tuple(seq.block_table), *progress)


def _load_key(load: _Load) -> Key:
    chunks = tuple(c.generation for c in load.chunks)
    fetches = (tuple(load.fetches), tuple(load.num_failures.items()))
    is_current = load.num_preemptions == load.seq.num_preemptions
    known = (tuple(load.output_token_ids), load.prefill_ended, load.error is None)
    return (load.seq.seq_id, chunks, load.num_written, *fetches, is_current, *known)


def message_key(message: Command | Event) -> Key:
    """Equal for messages that say the same."""
    kind = type(message).__name__
    match message:
        case KVChunk():
            return kind, message.id, message.start, message.generation
        case Tokens():
            return kind, message.id, message.sample_index, message.start, message.token_ids
        case Prefilled():
            return kind, message.id, message.handed_over, message.prompt_logprobs is None
        case Finished():
            return kind, message.id, message.sample_index, message.reason
        case PromptLoaded():
            return kind, message.id, message.error is None
        case Abort():
            return kind, message.id
        case EndPrefill():
            return kind, message.id, message.generated
        case _:
            return kind, message.id, message.generated, message.do_remote_decode, message.do_remote_prefill
