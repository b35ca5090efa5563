"""Workers on a real local Ray that are killed and frozen: the same bits, every request once, nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.inprocess import InProcessEngine
from shoal.cluster.router import Router
from shoal.cluster.start import start_engines
from shoal.runtime.types import Request, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.invariance import bits, rows

DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    overrides = {"vocab_size": 512, "index_topk": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
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
        "heartbeat_timeout_s": 3.0,
        "startup_timeout_s": 60.0,
    }
    return EngineArgs(model=model, **{**settings, **changes})


def requests() -> list[Request]:
    """The rows of the invariance matrix and longer answers, so that a kill hits them in the middle."""
    long = SamplingParams(temperature=0.9, seed=3, max_tokens=120, ignore_eos=True, logprobs=1)
    asked = rows(512) + [
        Request(request_id="", prompt_token_ids=tuple(range(3 + i, 40 + i)), params=long) for i in range(5)
    ]
    return [replace(request, request_id=str(i), index=i, report_progress=True) for i, request in enumerate(asked)]


@pytest.fixture(scope="module")
def expected(model: str) -> dict[str, Any]:
    engine = InProcessEngine(arguments(model))
    engine.submit(requests())
    answers: dict[str, Any] = {}
    while engine.num_in_flight:
        answers |= {o.request_id: bits(o) for o in engine.poll(1.0)}
    return answers


@pytest.fixture
def start(model: str) -> Iterator[Callable[..., Router]]:
    started: list[Router] = []

    def begin(**changes: Any) -> Router:
        started.append(start_engines(arguments(model, **changes)))
        return started[-1]

    yield begin
    for router in started:
        router.close()
    assert not ray.is_initialized()


class Run:
    """Drives a router; `strike` is called once some tokens are there."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.answers: dict[str, Any] = {}
        self.num_tokens = 0

    def until(self, enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not enough():
            assert time.monotonic() < deadline, f"{self.router.num_in_flight} requests are not answered"
            for output in self.router.poll(0.05):
                if output.finished:
                    assert output.request_id not in self.answers
                    self.answers[output.request_id] = bits(output)
            self.num_tokens += sum(len(p.new.token_ids) for p in self.router.take_progress())

    def finish(self) -> dict[str, Any]:
        self.until(lambda: not self.router.num_in_flight)
        return self.answers


def pid_of(router: Router, replica: int, rank: int) -> int:
    supervisor = router._supervisor
    name = supervisor._replicas[replica].members.workers[rank]
    assert name is not None
    return supervisor._pids[name]


def all_pids(router: Router) -> list[int]:
    return list(router._supervisor._pids.values())


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("layout", "victim"),
    [
        ({"data_parallel_size": 2, "spares": 1}, (0, 1)),
        ({"tensor_parallel_size": 2, "spares": 1}, (0, 1)),
        ({"tensor_parallel_size": 2}, (0, 0)),
        ({"replicas": ["prefill:1", "decode:1:dp=2"], "spares": 1}, (1, 0)),
        ({"replicas": ["prefill:1", "decode:1"], "spares": 1}, (0, 0)),
    ],
    ids=["dp 2", "follower of tp 2", "leader of tp 2, no spare", "decode", "prefill"],
)
def test_a_killed_worker_changes_nothing(
    start: Callable[..., Router], expected: dict[str, Any], layout: dict[str, Any], victim: tuple[int, int]
) -> None:
    router = start(**layout)
    run = Run(router)
    router.submit(requests())
    run.until(lambda: run.num_tokens > 20)
    os.kill(pid_of(router, *victim), signal.SIGKILL)
    assert run.finish() == expected
    (fault,) = router.faults
    assert (fault.replica, fault.rank) == victim
    assert fault.formed_s is not None
    pids = all_pids(router)
    router.close()
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, "a worker was left behind"
        time.sleep(0.05)


def test_a_frozen_worker_is_replaced_and_fenced(start: Callable[..., Router], expected: dict[str, Any]) -> None:
    router = start(data_parallel_size=2, spares=1)
    run = Run(router)
    router.submit(requests())
    run.until(lambda: run.num_tokens > 20)
    pid = pid_of(router, 0, 0)
    os.kill(pid, signal.SIGSTOP)
    assert run.finish() == expected
    assert [fault.reason for fault in router.faults] == ["silent for 3 s"]
    assert gone(pid), "it was ended, or it would hold its place for ever"


def test_two_at_once_and_another_during_the_recovery(start: Callable[..., Router], expected: dict[str, Any]) -> None:
    router = start(data_parallel_size=3, spares=1)
    run = Run(router)
    router.submit(requests())
    run.until(lambda: run.num_tokens > 20)
    for rank in (0, 2):
        os.kill(pid_of(router, 0, rank), signal.SIGKILL)
    run.until(lambda: len(router.faults) == 2)
    os.kill(pid_of(router, 0, 1), signal.SIGKILL)
    assert run.finish() == expected
    assert sorted(fault.rank for fault in router.faults) == [0, 1, 2]
