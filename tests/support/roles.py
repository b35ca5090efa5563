"""Replicas of several roles in one process: real workers, router and wire format, with a thread for every rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.replica import listen
from shoal.cluster.routing.groups import GroupSpec
from shoal.cluster.routing.request_router import Deliver, Effect, RequestRouter
from shoal.cluster.workers import worker as worker_module
from shoal.cluster.workers import worker_groups
from shoal.cluster.workers.assignment import Assignment
from shoal.cluster.workers.engine_factory import BUILD_ENGINE
from shoal.cluster.workers.spec import WorkerFailure, WorkerSpec
from shoal.cluster.workers.wire import COMMANDS, EVENTS
from shoal.cluster.workers.worker import Worker
from shoal.parallel.kv_transport import KVChunk, KVTransport
from shoal.parallel.nixl_transport import NixlTransport
from shoal.runtime.types import PromptLoaded, Request, RequestOutput
from tests.support.invariance import bits, dtypes
from tests.support.split import MemoryTransport, Published, flip_a_byte

DEADLINE_S = 600.0

_names = count()


@dataclass(frozen=True)
class Roles:
    """One way to split the rows over replicas."""

    replicas: tuple[str, ...]
    transport: str = "memory"
    """memory, nixl, or spoiled: KV cache entries arrive damaged, and every prompt is computed again."""
    engine: dict[str, Any] = field(default_factory=dict)


def spoil(chunk: KVChunk, payload: Tensor) -> Tensor | None:
    return flip_a_byte(chunk, payload)


@dataclass
class _Rank:
    worker: Worker
    thread: threading.Thread
    failures: list[WorkerFailure]
    num_sends: int = 0


class RolesCluster:
    """Started workers; `answer` drives them as `shoal.cluster.replicas.replica_pool` does."""

    def __init__(self, point: Roles, model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
        settings: dict[str, Any] = {
            **dtypes(dtype),
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "block_size": 8,
            "num_kv_blocks": 64,
        }
        self._args = EngineArgs(
            model=str(model),
            replicas=list(point.replicas),
            max_model_len=128,
            num_threads_per_worker=1,
            collective_timeout_s=DEADLINE_S,
            **(settings | point.engine),
        )
        self._published: Published = {}
        monkeypatch.setattr(worker_module, "create_transport", lambda spec: self._transport(point, spec))
        monkeypatch.setattr(worker_groups, "node_address", lambda: "127.0.0.1")
        specs = self._args.replica_specs
        self._stores = [listen("127.0.0.1") for _ in specs]
        self._ranks = [
            [self._start(number, rank) for rank in range(spec.parallel.world_size)] for number, spec in enumerate(specs)
        ]
        self._leaders = [
            ranks[rank]
            for spec, ranks in zip(specs, self._ranks, strict=True)
            for rank in range(0, len(ranks), spec.tensor_parallel_size)
        ]
        self.loaded: list[PromptLoaded] = []

    def _transport(self, point: Roles, spec: WorkerSpec) -> KVTransport:
        if point.transport == "nixl":
            return NixlTransport(spec.name, host="127.0.0.1", buffer_bytes=1 << 22)
        number = int(spec.name.rpartition("-")[2]) % 256
        if point.transport == "spoiled":
            return MemoryTransport(number, self._published, spoil=spoil)
        return MemoryTransport(number, self._published, delay=1)

    def _start(self, number: int, rank: int) -> _Rank:
        replica = self._args.replica_specs[number]
        spec = WorkerSpec(
            args=self._args,
            name=f"roles-{next(_names)}",
            assignment=Assignment(
                epoch=0,
                rank=rank,
                tensor_parallel_size=replica.tensor_parallel_size,
                data_parallel_size=replica.data_parallel_size,
                store_host="127.0.0.1",
                store_port=self._stores[number].port,
            ),
            num_threads=1,
            dedicated_cores=False,
            engine_factory=BUILD_ENGINE,
        )
        worker, failures = Worker(spec), []

        def main() -> None:
            report = worker.start()
            if (failure := report.failure or worker.run()) is not None:
                failures.append(failure)

        thread = threading.Thread(target=main, daemon=True)
        thread.start()
        return _Rank(worker, thread, failures)

    def answer(self, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
        """The bits of every request, in order."""
        specs = [
            GroupSpec(role=spec.role, max_num_seqs=self._args.max_num_seqs, num_kv_tokens=8 * 64)
            for spec in self._args.replica_specs
            for _ in range(spec.data_parallel_size)
        ]
        router = RequestRouter(specs, max_model_len=128)
        answers: dict[str, tuple[Any, ...]] = {}
        self._carry_out(router.submit(requests), answers)
        deadline = time.monotonic() + DEADLINE_S
        while router.num_in_flight:
            assert time.monotonic() < deadline, f"{router.num_in_flight} requests are not answered"
            assert not (failures := [f for ranks in self._ranks for r in ranks for f in r.failures]), failures
            for group, leader in enumerate(self._leaders):
                for message in leader.worker.poll(0.002):
                    event = EVENTS.decode(message)
                    if isinstance(event, PromptLoaded):
                        self.loaded.append(event)
                    self._carry_out(router.handle(group, event), answers)
        return [answers[request.request_id] for request in requests]

    def _carry_out(self, effects: Iterable[Effect], answers: dict[str, tuple[Any, ...]]) -> None:
        for effect in effects:
            if not isinstance(effect, Deliver):
                leader = self._leaders[effect.group]
                leader.worker.send(leader.num_sends, [COMMANDS.encode(effect.command)])
                leader.num_sends += 1
            elif isinstance(effect.output, RequestOutput):
                answers[effect.output.request_id] = bits(effect.output)

    def audit(self) -> list[str]:
        return [problem for ranks in self._ranks for rank in ranks for problem in rank.worker.audit()]

    def close(self) -> None:
        for leader in self._leaders:
            leader.worker.stop()
        for rank in (rank for ranks in self._ranks for rank in ranks):
            rank.thread.join(DEADLINE_S)
            assert not rank.thread.is_alive()


@contextmanager
def roles_cluster(point: Roles, model: Path, dtype: str) -> Iterator[RolesCluster]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        cluster = RolesCluster(point, model, dtype, monkeypatch)
        try:
            yield cluster
        finally:
            cluster.close()


def run_roles(point: Roles, model: Path, dtype: str, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    """The bits of every request; checks what became of the KV cache entries, and that nothing is held."""
    with roles_cluster(point, model, dtype) as cluster:
        answers = cluster.answer(requests)
        assert any(spec.startswith("prefill") for spec in point.replicas)
        failed = [one.error for one in cluster.loaded if one.error is not None]
        assert cluster.loaded, "nothing was handed over"
        if point.transport == "spoiled":
            assert len(failed) == len(cluster.loaded), "damaged entries were used"
        else:
            assert not failed
        assert cluster.audit() == []
        return answers
