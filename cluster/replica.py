"""One copy of the model on a cluster, seen from the driver: its workers, their requests and their end."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.parallel.config import ParallelConfig
from shoal.runtime.validation import RequestLimits

from .engine_args import EngineArgs
from .ray_cluster import CoreShare, Layout, Placement
from .wire import Command, Event, pack_command, unpack_event
from .worker import BUILD_ENGINE, StartReport, Worker, WorkerFailure, WorkerSpec

POLL_WAIT_S = 1.0
"""How long a worker holds a poll that has nothing to say."""
STOP_TIMEOUT_S = 5.0
ENGINE_THREAD = "engine"
"""The group of one thread in a worker that `start` and `run` share."""
INBOX_THREAD = "inbox"
"""The group of one thread in a worker that takes commands in, so that they keep their order."""
BLAME_WAIT_S = 0.5
"""How long a failure waits for those of other ranks, so that the cause is named and not the rank that missed it."""

_KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # the engine's thread is not the first, and other arenas are cut into heaps of 64 MB
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""For glibc: a step frees what the next one allocates again, so giving it back costs a page fault for every 4 KB."""

ActorHandle = Any
ObjectRef = Any


class EngineFailed(RuntimeError):  # noqa: N818
    """A replica cannot go on: which rank is the cause, and why. What was in flight can be submitted elsewhere."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Phase:
    """A finished part of the start-up."""

    name: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.seconds:.1f} s" + (f" ({self.detail})" if self.detail else "")


OnPhase = Callable[[Phase], None]


@dataclass(slots=True)
class _Leader:
    """A worker that takes requests: tp rank 0 of an attention group."""

    rank: int
    worker: ActorHandle
    poll: ObjectRef | None = None
    num_steps: int = -1
    progress_at: float = 0.0


def listen(host: str) -> TCPStore:
    """The rendezvous of a replica's ranks, on a free port of one address (by itself, a store takes all of them)."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


class Replica:
    """Workers of one placement. Built at once, in use after `wait_ready`; one thread at a time may use it."""

    def __init__(
        self,
        args: EngineArgs,
        parallel: ParallelConfig,
        layout: Layout,
        placement: Placement,
        *,
        cores: Sequence[CoreShare],
        host: str,
        engine_factory: str = BUILD_ENGINE,
    ) -> None:
        """Starts the workers and lets them build their engines; `host` is this node's own address."""
        self._parallel = parallel
        self._stall_s = POLL_WAIT_S + args.collective_timeout_s
        self._placement = placement
        self._store = listen(host)
        self._failure: EngineFailed | None = None
        self._limits: RequestLimits | None = None
        self._num_kv_tokens: dict[int, int] = {}
        self._workers = [
            _create_worker(
                WorkerSpec(
                    args=args,
                    parallel=parallel,
                    rank=rank,
                    name=f"shoal-{secrets.token_hex(8)}",
                    store_host=host,
                    store_port=self._store.port,
                    num_threads=cores[rank].num_threads,
                    dedicated_cores=cores[rank].dedicated,
                    engine_factory=engine_factory,
                ),
                layout,
                placement,
            )
            for rank in range(self._parallel.world_size)
        ]
        tp = self._parallel.tensor_parallel_size
        self._leaders = [_Leader(rank, self._workers[rank]) for rank in range(0, len(self._workers), tp)]
        self._starts: dict[ObjectRef, int] = {_on_engine_thread(w.start): rank for rank, w in enumerate(self._workers)}
        self._runs: dict[ObjectRef, int] = {}

    def wait_ready(self, timeout_s: float) -> list[StartReport]:
        """Per rank, once all can serve. EngineFailed, or ValueError for what a user can mend, when one cannot."""
        deadline = time.monotonic() + timeout_s
        reports: dict[int, StartReport] = {}
        while len(reports) < len(self._starts):
            pending = [ref for ref, rank in self._starts.items() if rank not in reports]
            ready, _ = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(self._starts[ref] for ref in pending)
                self._fail(late[0], f"ranks {late} were not ready after {timeout_s:g} s (startup_timeout_s)")
            rank = self._starts[ready[0]]
            try:
                reports[rank] = ray.get(ready[0])
            except RayError as error:
                self._fail(rank, f"its process died during start-up: {error}")
            if (failure := reports[rank].failure) is not None:
                if failure.kind == "value":
                    self.close()
                    raise ValueError(failure.message.removeprefix("ValueError: "))
                self._fail(rank, f"{failure.message}\n{failure.traceback}")
        self._limits = _tightest(reports.values())
        self._num_kv_tokens = {rank: report.num_kv_tokens for rank, report in reports.items()}
        self._runs = {_on_engine_thread(w.run): rank for rank, w in enumerate(self._workers)}
        return [reports[rank] for rank in range(len(reports))]

    @property
    def limits(self) -> RequestLimits:
        """What every attention group can take."""
        assert self._limits is not None, "limits are known after wait_ready"
        return self._limits

    def num_kv_tokens(self, rank: int) -> int:
        """Tokens that the cache of a rank holds."""
        return self._num_kv_tokens[rank]

    @property
    def leaders(self) -> list[int]:
        """The ranks that take requests."""
        return [leader.rank for leader in self._leaders]

    def tell(self, rank: int, commands: Sequence[Command]) -> None:
        """Commands for a leader, which acts on them in this order."""
        self._check_alive()
        leader = next(leader for leader in self._leaders if leader.rank == rank)
        leader.worker.tell.options(concurrency_group=INBOX_THREAD).remote([pack_command(c) for c in commands])

    def refs(self) -> list[ObjectRef]:
        """What to wait for: news of the leaders, and the end of any rank's loop."""
        self._check_alive()
        for leader in self._leaders:
            if leader.poll is None:
                leader.progress_at = time.monotonic()
                leader.poll = leader.worker.poll.remote(POLL_WAIT_S)
        return [leader.poll for leader in self._leaders if leader.poll is not None] + list(self._runs)

    def collect(self, ready: set[ObjectRef]) -> list[tuple[int, Event]]:
        """What the leaders told in the polls that are `ready`, each with the leader's rank.

        EngineFailed when a worker died or failed, or finished no step for `collective_timeout_s`; only when the leaders
        told nothing, so that nothing gets lost.
        """
        events: list[tuple[int, Event]] = []
        died: dict[int, str] = {}
        for leader in self._leaders:
            if leader.poll is not None and leader.poll in ready:
                poll, leader.poll = leader.poll, None
                try:
                    num_steps, messages = ray.get(poll)
                except RayError as error:
                    died[leader.rank] = str(error)
                    continue
                if num_steps != leader.num_steps:
                    leader.num_steps, leader.progress_at = num_steps, time.monotonic()
                events += [(leader.rank, unpack_event(message)) for message in messages]
        if events:
            return events
        if died or any(ref in ready for ref in self._runs):
            self._fail_with_cause(died)
        for leader in self._leaders:
            if leader.poll is not None and time.monotonic() - leader.progress_at > self._stall_s:
                self._fail(leader.rank, f"no step ended in {self._stall_s:g} s (collective_timeout_s): frozen or stuck")
        return []

    def close(self) -> None:
        """Stop the loops in the same step, then end the processes and give the place back. Closing twice is allowed."""
        if self._failure is None and self._runs:
            for worker in self._workers:
                worker.stop.remote()
            ray.wait(list(self._runs), num_returns=len(self._runs), timeout=STOP_TIMEOUT_S)
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._workers:
            self._placement.remove()
        self._workers, self._runs = [], {}

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        assert self._workers, "the replica is closed"

    def _fail(self, rank: int, reason: str) -> None:
        self._failure = EngineFailed(rank, reason)
        self._kill()
        raise self._failure

    def _fail_with_cause(self, died: dict[int, str]) -> None:
        ended, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=BLAME_WAIT_S)
        failures: list[WorkerFailure] = []
        for ref in ended:
            rank = self._runs[ref]
            try:
                failure = ray.get(ref)
            except RayError as error:
                died[rank] = str(error)
            else:
                failures.append(failure or WorkerFailure(rank, "error", "its loop ended although nobody asked", ""))
        self._fail(*cause_of_end(died, failures))


def cause_of_end(died: Mapping[int, str], failures: Sequence[WorkerFailure]) -> tuple[int, str]:
    """Rank and reason to blame: one rank's end makes others fail in collectives, so a death counts before an error,
    and an error before a collective; among equals the lowest rank.
    """
    if died:
        rank = min(died)
        return rank, f"its process died: {died[rank]}"
    cause = min(failures, key=lambda f: (f.kind == "collective", f.rank))
    return cause.rank, f"{cause.message}\n{cause.traceback}".rstrip()


def _tightest(reports: Iterable[StartReport]) -> RequestLimits:
    limits = [report.limits for report in reports if report.limits is not None]
    return RequestLimits(
        vocab_size=min(x.vocab_size for x in limits),
        max_model_len=min(x.max_model_len for x in limits),
    )


def _create_worker(spec: WorkerSpec, layout: Layout, placement: Placement) -> ActorHandle:
    # OpenMP reads its thread count once, when its library is loaded: before the worker's first line of Python.
    env = {"OMP_NUM_THREADS": str(spec.num_threads), "MKL_NUM_THREADS": str(spec.num_threads), **_KEEP_FREED_MEMORY}
    actor: Any = ray.remote(concurrency_groups={ENGINE_THREAD: 1, INBOX_THREAD: 1})(Worker)  # type: ignore[call-overload]
    return actor.options(
        num_cpus=layout.num_cpus_per_worker,
        num_gpus=layout.num_gpus_per_worker,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement.group, spec.rank),
        runtime_env={"env_vars": env},
        name=spec.name,
        max_concurrency=4,  # a waiting poll must not keep requests out
        max_restarts=0,
        max_task_retries=0,
    ).remote(spec)


def _on_engine_thread(method: Any) -> ObjectRef:
    return method.options(concurrency_group=ENGINE_THREAD).remote()
