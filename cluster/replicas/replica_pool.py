"""Several replicas as one set of engines: carries out what `RequestRouter` decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import ray

from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import EngineOutput, Finished, Request, RequestOutput

from ..routing.groups import GroupSpec
from ..routing.quarantine import Quarantine
from ..routing.request_router import Effect, RequestRouter, Send
from ..supervision.fault import Fault
from ..supervision.supervisor import RankFilled, RankLost, Supervisor
from ..workers.wire import Command
from .replica import EngineFailed, Replica

LOOK_S = 0.1
"""How often to look for lost workers while nothing else happens."""
MAX_LOSSES = 10
"""Workers of one replica that may be lost without anything new of a request: it is not bad luck then."""
MAX_GIVEN_UP = 10
"""Requests that may be given up one after another without an answer in between: they are not the cause then."""


class ReplicaPool:
    """Takes requests, sends them to the replicas, and returns their outputs; for one thread at a time."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        supervisor: Supervisor,
        close: Callable[[], None],
        *,
        max_num_seqs: int,
        block_size: int,
    ) -> None:
        """Take over replicas that are ready and the supervisor that watches them; `close` is called after their end."""
        self._replicas = list(replicas)
        self._supervisor = supervisor
        self._close = close
        self._num_losses = [0] * len(replicas)
        """Worker losses per replica since its last event."""
        self._ranks = [(number, rank) for number, replica in enumerate(replicas) for rank in replica.leaders]
        """Replica and rank of the leader of every attention group."""
        self._groups = {place: group for group, place in enumerate(self._ranks)}
        self.limits: RequestLimits = min((r.limits for r in replicas), key=lambda x: x.max_model_len)
        """The limits that hold in every replica."""
        specs = [
            GroupSpec(role=replicas[n].role, max_num_seqs=max_num_seqs, num_kv_tokens=replicas[n].num_kv_tokens(rank))
            for n, rank in self._ranks
        ]
        self.capacity = 2 * max_num_seqs * len(specs)
        """Requests in flight that keep every replica busy."""
        self._routing = RequestRouter(specs, max_model_len=self.limits.max_model_len, block_size=block_size)
        self._quarantine = Quarantine()
        self._allowed: frozenset[str] | None = None
        """The requests that `_routing` may send."""
        self._num_given_up = 0
        """Since a request was last answered."""
        self._losses: dict[str, int] = {}
        """Requests that were interrupted since `take_losses`, and how often each was in all."""
        self._outputs: list[EngineOutput | RequestOutput] = []
        self._interrupted: list[tuple[Fault, frozenset[str]]] = []
        """Losses with the requests that they interrupted, until one of those has a new token."""

    @property
    def num_in_flight(self) -> int:
        return self._routing.num_in_flight

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; ValueError, before any is taken, for an id that is in use."""
        suspects = [request for request in requests if request.num_losses]
        if suspects:
            self._restrict(frozenset())  # none is sent before it is decided which may run together
        self._carry_out(self._routing.submit(requests))
        for request in suspects:
            self._quarantine.add(request.request_id, request.num_losses)
        self._follow_quarantine()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; no output of theirs is returned after this. Unknown ids are ignored."""
        for request_id in request_ids:
            self._carry_out(self._routing.abort(request_id))
            self._quarantine.forget(request_id)
        self._follow_quarantine()
        dropped = set(request_ids)
        self._outputs = [output for output in self._outputs if output.request_id not in dropped]

    def poll(self, timeout_s: float) -> list[EngineOutput | RequestOutput]:
        """New parts of answers, and the whole answers of finished requests, as soon as there are any.

        [] after `timeout_s`, or at once when nothing is in flight. EngineFailed when a loop failed, or a lost rank
        cannot be replaced, or workers are lost too often. A request whose workers are lost again and again while it
        runs alone is answered with an error.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._follow_supervisor()
            refs = [ref for replica in self._replicas for ref in replica.refs()]
            left = max(0.0, deadline - time.monotonic()) if self.num_in_flight else 0.0
            ready, _ = ray.wait(refs, timeout=min(left, LOOK_S))
            if ready:
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for number, replica in enumerate(self._replicas):
                for rank, event in replica.collect(set(ready)):
                    self._num_losses[number] = 0
                    if isinstance(event, Finished):
                        self._num_given_up = 0
                    self._carry_out(self._routing.handle(self._groups[number, rank], event))
                while replica.unreachable:
                    self._supervisor.suspect(*replica.unreachable.pop())
            self._follow_quarantine()
            if self._outputs or not self.num_in_flight or time.monotonic() >= deadline:
                outputs, self._outputs = self._outputs, []
                return outputs

    def take_losses(self) -> dict[str, int]:
        """Requests that were interrupted since the last call, and how often each was in all."""
        losses, self._losses = self._losses, {}
        return losses

    def audit(self) -> list[str]:
        """What workers still hold with nothing in flight; [] when every block of every rank is free."""
        assert not self.num_in_flight
        return [problem for replica in self._replicas for problem in replica.audit()]

    def step_profiles(self) -> list[StepProfile]:
        """Where the time of the steps went on every rank; needs engines that measure it."""
        return [profile for replica in self._replicas for profile in replica.step_profiles()]

    def close(self) -> None:
        """End all workers, and Ray where it was started for them. Closing twice is allowed."""
        for replica in self._replicas:
            replica.stop()
        self._supervisor.close()
        for replica in self._replicas:
            replica.close()
        self._replicas = []
        self._close()

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor that watches the workers."""
        return self._supervisor

    @property
    def faults(self) -> list[Fault]:
        """Workers that were lost so far, and how far each loss is repaired."""
        return self._supervisor.faults

    def _follow_supervisor(self) -> None:
        self._supervisor.check()
        while not self._supervisor.events.empty():
            event = self._supervisor.events.get()
            replica = self._replicas[event.replica]
            group = self._groups.get((event.replica, event.rank))
            if isinstance(event, RankLost):
                self._num_losses[event.replica] += 1
                if self._num_losses[event.replica] > MAX_LOSSES:
                    reason = f"{MAX_LOSSES} workers were lost without progress: {event.fault.reason}"
                    raise EngineFailed(event.rank, reason)
                self._note_interrupted(event.fault, self._groups[event.replica, replica.leader_of(event.rank)])
                was_leader = replica.lose(event.rank)
                self._suspect_requests(event.replica, event.fault)
                if was_leader:
                    assert group is not None
                    self._carry_out(self._routing.lose(group))
            elif isinstance(event, RankFilled):
                if replica.fill(event.rank, event.worker):
                    assert group is not None
                    self._carry_out(self._routing.restore(group))
            else:
                raise EngineFailed(event.rank, event.reason)

    def _note_interrupted(self, fault: Fault, group: int) -> None:
        num_tokens = self._routing.generated_in(group)
        fault.num_replayed_requests, fault.num_replayed_tokens = len(num_tokens), sum(num_tokens.values())
        if num_tokens:
            self._interrupted.append((fault, frozenset(num_tokens)))

    def _suspect_requests(self, replica: int, fault: Fault) -> None:
        """Count a loss for every request of the replica: the one to blame may be with another of its groups."""
        groups = [group for group, (number, _) in enumerate(self._ranks) if number == replica]
        interrupted = {request_id for group in groups for request_id in self._routing.generated_in(group)}
        given_up = self._quarantine.lose(interrupted)
        self._losses |= {request_id: self._quarantine.num_losses(request_id) for request_id in interrupted}
        for request_id in given_up:
            self._num_given_up += 1
            if self._num_given_up > MAX_GIVEN_UP:
                reason = f"{MAX_GIVEN_UP} requests were given up one after another: {fault.reason}"
                raise EngineFailed(fault.rank or 0, reason)
            self._num_losses[replica] = 0
            message = (
                f"its worker was lost {self._quarantine.num_losses(request_id)} times while it was answered, at last "
                f"with no other request: {fault.reason}"
            )
            self._carry_out(self._routing.fail(request_id, message))
        self._follow_quarantine()

    def _follow_quarantine(self) -> None:
        allowed = self._quarantine.allowed()
        if allowed != self._allowed:
            self._restrict(allowed)

    def _restrict(self, allowed: frozenset[str] | None) -> None:
        self._allowed = allowed
        self._carry_out(self._routing.restrict(allowed))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        sent: list[Send] = []
        for effect in effects:
            if isinstance(effect, Send):
                sent.append(effect)
            else:
                self._deliver(effect.output)
        # Sorting is stable: the commands of one group keep their order.
        for group, sends in groupby(sorted(sent, key=lambda s: s.group), key=lambda s: s.group):
            number, rank = self._ranks[group]
            commands: list[Command] = [send.command for send in sends]
            self._replicas[number].send(rank, commands)

    def _deliver(self, output: EngineOutput | RequestOutput) -> None:
        for entry in [entry for entry in self._interrupted if output.request_id in entry[1]]:
            self._supervisor.note_first_token(entry[0])
            self._interrupted.remove(entry)
        self._outputs.append(output)
        if isinstance(output, RequestOutput):
            self._quarantine.forget(output.request_id)
