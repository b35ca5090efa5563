"""A worker process: what `Worker` does, one event after the other; and how it dies, freezes and comes too late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import RayError

from shoal.cluster.workers.assignment import Assignment
from shoal.cluster.workers.spec import StartReport
from shoal.cluster.workers.wire import (
    Command,
    Event,
    Joined,
    JoinEpoch,
    Joining,
    LeaveEpoch,
    Left,
    Loaded,
    LoadRank,
    SupervisorOrder,
    WorkerReport,
)
from shoal.cluster.workers.worker import apply_command
from shoal.runtime.engine.step import StepResult
from shoal.runtime.kv_cache.transfer import KVTransfer
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.scheduling.batch import Batch

from .engine import SimulatedEngine
from .lockstep import Epoch, Groups, LeadingRunner, Lockstep
from .messages import may_get_lost
from .model import VOCAB_SIZE, Cache, Payload, Runner
from .transport import Transport
from .virtual import Method, Ref

if TYPE_CHECKING:
    from .cluster import Cluster

POLL_WAIT_S = 1.0


class Process:
    """A worker; also the handle that a driver has of it."""

    def __init__(self, cluster: Cluster, name: str, assignment: Assignment | None) -> None:
        self.cluster, self.world, self.name = cluster, cluster.world, name
        self.alive, self.frozen = True, False
        self.is_connected = False
        """To the supervisor."""
        self.commands: list[Command] = []
        self._num_sends = 0
        self.transport = Transport(self)
        self.place: Assignment | None = None
        self.groups: Groups | None = None
        self.engine: SimulatedEngine | None = None
        self.epoch: Epoch | None = None
        self.has_failed = False
        """The step that it is in."""
        self._assignment = assignment
        self._epoch_left = -1
        self._outbox: list[Event] = []
        self._poll: Ref | None = None
        self._calls: list[Ref] = []
        """Calls that have no answer yet."""
        self._deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        """What happens to it once it is no longer frozen."""
        self.supervised_at = self._heard_at = self._told_at = 0.0
        """Messages of one connection do not overtake each other."""
        self.send, self.poll = Method(self._on_send), Method(self._on_poll)
        self.start, self.run, self.stop = Method(self._on_start), Method(self._call), Method(self._on_stop)

    @property
    def can_work(self) -> bool:
        return self.alive and not self.frozen

    @property
    def rank(self) -> int:
        assert self.place is not None
        return self.place.rank

    @property
    def is_leader(self) -> bool:
        return self.groups is not None and self.groups.is_leader

    @property
    def leading(self) -> SimulatedEngine:
        assert self.engine is not None
        return self.engine

    @property
    def waits(self) -> bool:
        """Whether its engine is to look again, although it has nothing to compute."""
        kv = self.leading.kv
        return self.leading.has_unfinished or (isinstance(kv, KVTransfer) and kv.sender.num_requests > 0)

    # -- its life ----------------------------------------------------------------------------------------------------

    def build(self, place: Assignment) -> None:
        """The engine of a rank, or for one that follows, its cache."""
        self.place = place
        self.groups = Groups(self)
        settings = self.cluster.settings_of(place)
        if self.groups.is_leader:
            self.engine = SimulatedEngine(
                settings, self.cluster.rows, self.groups, self.transport, self.world.monotonic
            )
            self.runner = cast(Runner, self.engine.runner)
            self.engine.runner = cast(Any, LeadingRunner(self))
        else:
            self.runner = Runner(Cache(settings.num_blocks, settings.block_size), self._check_read)

    def _check_read(self, part: Any, entries: list[int]) -> None:
        assert self.epoch is not None
        assert self.groups is not None
        self.epoch.members[self.groups.leader_rank].leading.check_read(part, entries)

    def die(self) -> None:
        if not self.alive:
            return
        self.alive, self.is_connected = False, False
        self.world.at(self.world.latency(), self.cluster.liveness.on_end, self.name)
        self.world.at(self.world.latency(0.05), self._fail_calls)
        if self.epoch is not None:
            self.epoch.break_up()

    def cut_off(self) -> None:
        """The supervisor ended the connection: whoever finds that out ends itself."""
        self.is_connected = False
        if not self.frozen:
            self.world.at(self.world.latency(0.1), self.die)

    def _fail_calls(self) -> None:
        for ref in self._calls:
            ref.settle(error=RayError("the actor died"))

    def freeze(self, seconds: float) -> None:
        if self.can_work:
            self.frozen = True
            self.world.at(seconds, self._thaw)
            self.world.at(self.cluster.heartbeat_timeout_s, self.cluster.liveness.on_silence, self)

    def _thaw(self) -> None:
        """One that was fenced off meanwhile finds its connection ended, but not at once."""
        if not self.alive:
            return
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for act, arguments in deferred:
            act(*arguments)
        if not self.is_connected:
            self.world.at(self.world.latency(0.1), self.die)
        self.kick()

    def preempt(self) -> None:
        """As the scheduler does when blocks are short."""
        if self.engine is not None and (running := self.engine.scheduler.running):
            self.engine.scheduler.preempt(self.world.rng.choice(running).seq_id)

    def kick(self) -> None:
        if self.epoch is not None and self.can_work:
            self.epoch.kick()

    def _is_able(self, act: Callable[..., None], *arguments: Any) -> bool:
        """Whether it can act now; one that is frozen does so later."""
        if self.alive and self.frozen:
            self._deferred.append((act, arguments))
        return self.can_work

    # -- the supervisor ----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        if self._is_able(self.connect):
            self.is_connected = True
            self.cluster.liveness.greet(self)

    def report(self, report: WorkerReport) -> None:
        self._told_at = max(self._told_at, self.world.now + self.world.latency())
        self.world.at(self._told_at - self.world.now, self.cluster.liveness.on_report, self, report)

    def on_order(self, order: SupervisorOrder) -> None:
        if not self._is_able(self.on_order, order):
            return
        match order:
            case LeaveEpoch():
                self._epoch_left = max(self._epoch_left, order.epoch)
                if self.epoch is not None and self.epoch.number <= order.epoch and self.epoch.size > 1:
                    self.epoch.break_up()
            case LoadRank():
                self.world.at(self.world.latency(0.3), self._load, order.assignment)
            case JoinEpoch():
                self._assignment = order.assignment
                if self.epoch is None or self.epoch.size == 1:
                    self.enter()

    def _load(self, place: Assignment) -> None:
        if self._is_able(self._load, place):
            self.build(place)
            self._outbox = self.cluster.late_events(place)
            self.report(Loaded())

    def enter(self) -> None:
        """Join the newest epoch, unless it is known to be in vain."""
        assignment, place = self._assignment, self.place
        if assignment is None or place is None or not self.can_work:
            return
        if assignment.epoch <= self._epoch_left:
            self.report(Left(assignment.epoch, "in vain"))
        else:
            self.report(Joining(assignment.epoch))
            self.cluster.epoch_of(assignment).join(assignment.rank, self)

    def on_joined(self, number: int) -> None:
        """All ranks are there."""
        assert self._assignment is not None
        if number == 0:
            return
        assert self.groups is not None
        self.groups.epoch = number
        self.report(Joined(number))
        if self.engine is not None:
            self.engine.rejoin(self._assignment.replaced)

    def break_off(self, epoch: Epoch) -> None:
        """An exchange with other ranks fails, and so does the step that it belongs to."""
        if self.epoch is not epoch or not self._is_able(self.break_off, epoch):
            return
        if epoch.is_formed and self.is_leader and not self.has_failed:
            self.take_in()
            for result in Lockstep.in_vain(epoch, self).run().values():
                self.hand_out(result)
        self.has_failed = False
        self.epoch = None
        self._epoch_left = max(self._epoch_left, epoch.number)
        self.report(Left(epoch.number, "a peer is gone"))
        assert self._assignment is not None
        if self._assignment.epoch > epoch.number:
            self.enter()

    # -- the driver --------------------------------------------------------------------------------------------------

    def _call(self, *_arguments: Any) -> Ref:
        ref = Ref()
        if not self.alive:
            ref.settle(error=RayError("the actor is dead"))
        self._calls.append(ref)
        return ref

    def _on_start(self) -> Ref:
        ref = self._call()
        if self.place is not None:
            settings = self.cluster.settings_of(self.place)
            num_tokens = settings.num_blocks * settings.block_size
            ref.settle(
                StartReport(
                    limits=RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=settings.max_model_len),
                    num_kv_tokens=num_tokens,
                    num_kv_blocks=settings.num_blocks,
                )
            )
        return ref

    def _on_stop(self) -> Ref:
        """All ranks leave their loops together."""
        for process in self.epoch.members.values() if self.epoch is not None else [self]:
            process.alive = False
            for ref in process._calls:
                ref.settle()
        return self._call()

    def _on_send(self, number: int, messages: Sequence[Command]) -> Ref:
        assert number == self._num_sends, "calls are numbered"
        self._num_sends += 1
        self.cluster.count_call()
        weather, rng = self.cluster.weather, self.world.rng
        on_time: list[Command] = []
        for message in messages:
            if weather.is_fair or not may_get_lost(message):
                on_time.append(message)
                continue
            if rng.random() < weather.late:
                self.world.at(self.world.latency(0.2), self._hear, [message])
            elif rng.random() >= weather.lost:
                on_time.append(message)
            if rng.random() < weather.repeated:
                on_time.append(message)
        self._heard_at = max(self._heard_at, self.world.now + self.world.latency())
        self.world.at(self._heard_at - self.world.now, self._hear, on_time)
        told = self._call()
        if self.alive:
            told.settle()
        return told

    def _hear(self, messages: list[Command]) -> None:
        if self._is_able(self._hear, messages):
            self.commands += messages
            self.kick()

    def take_in(self) -> None:
        commands, self.commands = self.commands, []
        self._tell([end for command in commands for end in apply_command(self.leading, command)])

    def follow(self, batch: Batch, payloads: list[bytes], *, computes: bool) -> None:
        """What a rank that follows does with the batch of its leader."""
        rng, cache = self.world.rng, self.runner.cache
        for write, payload in zip(batch.writes, payloads, strict=False):
            if computes or rng.random() < 0.5:
                cache.write_kv(cache.slots(write.block_table, write.start, write.end), Payload(payload))
        if computes:
            self.runner.run(batch, 0, None)
        else:
            self.runner.spoil(batch, rng)

    def hand_out(self, result: StepResult) -> None:
        """Tell what a step brought about, and now and then what was generated."""
        events: list[Event] = [*result.chunks, *result.loaded, *result.outputs]
        if self.world.rng.random() < self.cluster.progress_rate:
            events += self.leading.take_outputs()
        self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        if events and self._is_able(self._tell, events):
            weather, rng = self.cluster.weather, self.world.rng
            for event in events:
                if not (may_get_lost(event) and rng.random() < weather.lost):
                    self.cluster.note_told(self, event)
                    self._outbox += [event] * (2 if rng.random() < weather.repeated else 1)
            self._answer_poll()

    def _on_poll(self, _max_wait_s: float) -> Ref:
        ref = self._call()
        self.world.at(self.world.latency(), self._await, ref)
        return ref

    def _await(self, ref: Ref) -> None:
        if self._is_able(self._await, ref):
            self._poll = ref
            self.world.at(POLL_WAIT_S, self._end_wait, ref)
            if self._outbox:
                self._answer_poll()

    def _end_wait(self, ref: Ref) -> None:
        if self._poll is ref and self._is_able(self._end_wait, ref):
            self._answer_poll()

    def _answer_poll(self) -> None:
        if self._poll is not None:
            ref, self._poll = self._poll, None
            events, self._outbox = self._outbox, []
            self.world.at(self.world.latency(), self._bring, ref, events)

    def _bring(self, ref: Ref, events: list[Event]) -> None:
        """An answer of one that died is still there, or not."""
        if self.alive or self.world.rng.random() < 0.5:
            ref.settle(events)
