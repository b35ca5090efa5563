"""A pool of replicas as one engine client: carries out the decisions of `RequestRouter`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count, groupby

import ray

from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import EngineOutput, Finished, Request, RequestOutput

from ..replica_spec import Role
from ..routing.groups import GroupSpec
from ..routing.quarantine import Quarantine
from ..routing.request_router import Effect, RequestRouter, Send
from ..supervision.fault import Fault
from ..supervision.supervisor import RankFilled, RankLost, Supervisor
from ..workers.wire import Command
from .replica import EngineFailed, Replica

LOOK_S = 0.1
"""Interval of checks for lost workers while no events arrive."""
MAX_LOSSES = 10
"""Give up on a replica after this many worker losses in a row without a single new token."""
MAX_GIVEN_UP = 10
"""Give up on the run after this many requests in a row were given up without a finished one in between."""


class ReplicaPool:
    """Sends requests to replicas and returns their outputs. Not thread-safe."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        supervisor: Supervisor,
        close: Callable[[], None],
        *,
        max_num_seqs: int,
        block_size: int,
    ) -> None:
        """Own ready replicas and the supervisor that watches them; `close` is called after they are closed."""
        self._replicas = list(replicas)
        self._supervisor = supervisor
        self._close = close
        self._num_losses = [0] * len(replicas)
        """Worker losses per replica since its last event."""
        self._ranks = [(number, rank) for number, replica in enumerate(replicas) for rank in replica.leaders]
        """Replica and rank of the leader of every attention group."""
        self._groups = {place: group for group, place in enumerate(self._ranks)}
        names = _group_names([replicas[number].role for number, _ in self._ranks])
        self._named_ranks = dict(zip(names, self._ranks, strict=True))
        self.limits: RequestLimits = min((r.limits for r in replicas), key=lambda x: x.max_model_len)
        """Limits that hold in every replica."""
        specs = [
            GroupSpec(role=replicas[n].role, max_num_seqs=max_num_seqs, num_kv_tokens=replicas[n].num_kv_tokens(rank))
            for n, rank in self._ranks
        ]
        self.capacity = 2 * max_num_seqs * len(specs)
        """Number of requests in flight that keeps every replica busy."""
        self._routing = RequestRouter(specs, max_model_len=self.limits.max_model_len, block_size=block_size)
        self._quarantine = Quarantine()
        self._allowed: frozenset[str] | None = None
        """Requests that `_routing` may send; None: all."""
        self._num_given_up = 0
        """Requests given up since one was last finished."""
        self._losses: dict[str, int] = {}
        """Total number of losses by request, for requests interrupted since `take_losses`."""
        self._outputs: list[EngineOutput | RequestOutput] = []
        self._interrupted: list[tuple[Fault, frozenset[str]]] = []
        """Faults with the requests that they interrupted, until one of those has a new token."""

    @property
    def num_in_flight(self) -> int:
        return self._routing.num_in_flight

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; ValueError, before any is queued, for an id that is in use."""
        suspects = [request for request in requests if request.num_losses]
        if suspects:
            self._restrict(frozenset())  # send none before the quarantine has decided which may run together
        self._carry_out(self._routing.submit(requests))
        for request in suspects:
            self._quarantine.add(request.request_id, request.num_losses)
        self._follow_quarantine()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; no further outputs are returned for them. Unknown ids are ignored."""
        for request_id in request_ids:
            self._carry_out(self._routing.abort(request_id))
            self._quarantine.forget(request_id)
        self._follow_quarantine()
        dropped = set(request_ids)
        self._outputs = [output for output in self._outputs if output.request_id not in dropped]

    def poll(self, timeout_s: float) -> list[EngineOutput | RequestOutput]:
        """Return new parts of answers and the whole answers of finished requests, as soon as there are any.

        [] after `timeout_s`, or at once when nothing is in flight. EngineFailed when a loop failed, a lost rank cannot
        be replaced, or workers are lost too often. A request whose workers are lost repeatedly while it runs alone
        finishes with an error.
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
                outputs = self._outputs
                self._outputs = []
                return outputs

    def take_losses(self) -> dict[str, int]:
        """Requests that were interrupted since the last call, with the total number of losses of each."""
        losses = self._losses
        self._losses = {}
        return losses

    def stats(self) -> dict[str, EngineStats]:
        """Counters of every attention group's engine, by the group's name: decode:0 is the first of that role."""
        return {name: self._supervisor.stats(number, rank) for name, (number, rank) in self._named_ranks.items()}

    def audit(self) -> list[str]:
        """Resources that workers still hold with nothing in flight; [] when every block of every rank is free."""
        assert not self.num_in_flight
        return [problem for replica in self._replicas for problem in replica.audit()]

    def step_profiles(self) -> list[StepProfile]:
        """Step profiles of every rank; the engines must measure their steps."""
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
        """Workers lost so far, and the progress of each recovery."""
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
        fault.num_replayed_requests = len(num_tokens)
        fault.num_replayed_tokens = sum(num_tokens.values())
        if num_tokens:
            self._interrupted.append((fault, frozenset(num_tokens)))

    def _suspect_requests(self, replica: int, fault: Fault) -> None:
        """Count a loss for every request of the replica: the cause may be a request of another of its groups."""
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


def _group_names(roles: Sequence[Role]) -> list[str]:
    """Names of attention groups, numbered within their roles."""
    numbers = {role: count() for role in roles}
    return [f"{role}:{next(numbers[role])}" for role in roles]
