"""Workers on a real local Ray that are killed and frozen, and one judgement of every run: the same bits, each request
once, all blocks given back, every rank in its group again.

`tests/contract/fault_matrix.py` runs it over every role and failpoint, and over random faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from msgspec.structs import replace

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.cluster.replicas.replica_pool import ReplicaPool
from shoal.cluster.replicas.start import start_engines
from shoal.cluster.supervision.fault import Fault
from shoal.cluster.workers.actors import WorkerProcess
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.support.invariance import bits, rows

DEADLINE_S = 600.0
VOCAB_SIZE = 512

Bits = tuple[Any, ...]


def make_model(path: Path) -> str:
    """V3.2 whose sparse selection leaves tokens out in every prompt but the shortest."""
    overrides = {"vocab_size": VOCAB_SIZE, "index_topk": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    make_checkpoint(path, "deepseek_v32", seed=6, overrides=overrides)
    return str(path)


def arguments(model: str, **changes: Any) -> EngineArgs:
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 8,
        "num_kv_blocks": 128,
        "max_model_len": 256,
        "kv_transport": "ray",
        "heartbeat_timeout_s": 5.0,
        "collective_timeout_s": 10.0,
        "startup_timeout_s": 600.0,
        "num_threads_per_worker": 1,
    }
    return EngineArgs(model=model, **{**settings, **changes})


def requests(name: str = "") -> list[Request]:
    """The rows of the invariance matrix and longer answers, so that a fault hits them in the middle."""
    long = SamplingParams(temperature=0.9, seed=3, max_tokens=60, ignore_eos=True, logprobs=1)
    asked = rows(VOCAB_SIZE) + [
        Request(request_id="", prompt_token_ids=tuple(range(3 + i, 40 + i)), params=long) for i in range(5)
    ]
    return [replace(one, request_id=f"{name}{i}", index=i) for i, one in enumerate(asked)]


def answers_of_one_process(model: str) -> list[Bits]:
    """Answers of one undisturbed process, by index of the request."""
    engine = InProcessEngine(arguments(model))
    engine.submit(requests())
    answers: dict[str, Bits] = {}
    while engine.num_in_flight:
        answers |= {o.request_id: bits(o) for o in engine.poll(1.0) if isinstance(o, RequestOutput)}
    return [answers[str(i)] for i in range(len(answers))]


@dataclass(slots=True)
class Target:
    """A rank, and what happens to whoever has it."""

    replica: int
    rank: int
    point: str
    nth: int = 1
    action: str = "kill"


@dataclass
class Rig:
    """Replicas that stay up from one case to the next, and what one process answers."""

    pool: ReplicaPool
    expected: list[Bits]
    num_spares: int
    pids: set[int] = field(default_factory=set)
    """Process ids of all workers that were ever started."""
    num_cases: int = 0

    def run(self, strike: Callable[[], None], *, then: Callable[[], None] = lambda: None) -> list[Fault]:
        """Ask everything after `strike`, and judge what comes; returns the faults that happened.

        `then` is called once all is answered, before the ranks and spares are waited for.
        """
        first = len(self.pool.faults)
        self.num_cases += 1
        strike()
        name = f"{self.num_cases}-"
        asked = requests(name)
        answers: dict[str, Bits] = {}
        deadline = time.monotonic() + DEADLINE_S
        self.pool.submit(asked)
        while self.pool.num_in_flight:
            assert time.monotonic() < deadline, f"{self.pool.num_in_flight} requests are not answered"
            for output in self.pool.poll(0.02):
                if isinstance(output, RequestOutput):
                    assert output.request_id not in answers, "answered twice"
                    answers[output.request_id] = bits(output)
        assert [answers[request.request_id] for request in asked] == self.expected
        then()
        self.recover(deadline)
        assert self.pool.audit() == []
        return self.pool.faults[first:]

    def recover(self, deadline: float) -> None:
        """Wait until every rank has joined and the spares are there again."""
        supervisor = self.pool.supervisor
        while not supervisor.is_whole(self.num_spares):
            assert time.monotonic() < deadline, "the ranks were not filled again"
            self.pool.poll(0.02)
        self.pool.poll(0.0)
        self.pids |= {process.pid for w in self.workers() if (process := supervisor.process(w)) is not None}

    def workers(self) -> list[WorkerProcess]:
        return list(self.pool.supervisor._processes.values())

    def worker(self, replica: int, rank: int) -> WorkerProcess:
        worker = self.pool.supervisor.worker(replica, rank)
        assert worker is not None
        return worker

    def pid(self, replica: int, rank: int) -> int:
        process = self.pool.supervisor.process(self.worker(replica, rank))
        assert process is not None
        return process.pid

    def arm(self, targets: Sequence[Target], spares: str = "") -> None:
        """Give workers their faults; `spares` is a list of faults for those that wait now, `{}` standing for each."""
        calls = []
        for target in targets:
            worker = self.worker(target.replica, target.rank)
            calls.append(worker.actor.arm.remote(f"{worker.label}:{target.point}:{target.nth}:{target.action}"))
        supervisor = self.pool.supervisor
        for worker in [supervisor._processes[name] for name in supervisor._waiting] if spares else []:
            calls.append(worker.actor.arm.remote(spares.replace("{}", worker.label)))
        ray.wait(calls, num_returns=len(calls), timeout=300)  # one may strike before another is armed

    def close(self) -> None:
        """End everything, and check that nothing is left."""
        self.pool.close()
        deadline = time.monotonic() + 10
        while left := [pid for pid in self.pids if not gone(pid)]:
            assert time.monotonic() < deadline, f"workers {left} were left behind"
            time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or between that and reading
        return True


@contextmanager
def rig(model: str, expected: list[Bits], *, spares: int = 1, **layout: Any) -> Iterator[Rig]:
    """Replicas with spares, until the end of the block."""
    built = Rig(start_engines(arguments(model, spares=spares, **layout)), expected, spares)
    try:
        built.recover(time.monotonic() + DEADLINE_S)
        yield built
    finally:
        built.close()
