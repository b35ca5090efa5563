"""A replica on a real local Ray, with a stub for the engine: what it answers, and how it fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import ray

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.replica import EngineFailed, Replica
from shoal.cluster.workers.actors import LaunchConfig, WorkerSlot
from shoal.cluster.workers.ray_cluster import BundlePlacement, CoreShare, Layout, connect, node_address, nodes, place
from shoal.cluster.workers.wire import Abort, Event
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import Finished, GeneratedTokens, Request, SamplingParams, Tokens
from tests.support import stub_engine
from tests.support.stub_engine import KILLED, RAISES, REFUSED, STUB

pytestmark = pytest.mark.ray

DEADLINE_S = 600.0


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    cluster = connect(None, num_cpus=4)
    yield
    cluster.close()


Start = Callable[..., Replica]


@pytest.fixture
def start() -> Iterator[Start]:
    """Creates replicas and closes them; nothing of theirs is left when the test ends."""
    created: list[Replica] = []
    placements: list[BundlePlacement] = []

    def create(tp: int = 1, dp: int = 1, *, factory: str = STUB, collective_timeout_s: float = 20.0) -> Replica:
        args = EngineArgs(
            model="none",
            tensor_parallel_size=tp,
            data_parallel_size=dp,
            max_num_seqs=4,
            collective_timeout_s=collective_timeout_s,
        )
        (spec,) = args.replica_specs
        layout = Layout(replicas=(spec.parallel,), spares=0, num_cpus_per_worker=1, num_gpus_per_worker=0)
        (placement,) = place(layout, nodes(), timeout_s=DEADLINE_S)
        placements.append(placement)
        slots = [WorkerSlot(placement, rank, CoreShare(3, dedicated=False)) for rank in range(args.num_workers)]
        created.append(Replica(spec, LaunchConfig(args, factory, 1, 0), slots, host=node_address()))
        return created[-1]

    yield create
    for replica in created:
        replica.close()
    for placement in placements:
        placement.remove()
    deadline = time.monotonic() + DEADLINE_S
    state: Any = ray  # its functions have no types
    while state.available_resources().get("CPU", 0.0) < state.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "a placement was not given back"
        time.sleep(0.05)


def request(
    request_id: str, first: int = 1, *, max_tokens: int = 3, report: Literal["interval", "step"] = "interval"
) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(request_id=request_id, prompt_token_ids=(first, 1), params=params, report=report)


def events_of(replica: Replica, enough: Callable[[list[tuple[int, Event]]], bool]) -> list[tuple[int, Event]]:
    """What the leaders report until there is enough of it."""
    events: list[tuple[int, Event]] = []
    deadline = time.monotonic() + DEADLINE_S
    while not enough(events):
        assert time.monotonic() < deadline
        ready, _ = ray.wait(replica.refs(), timeout=0.1)
        events += replica.collect(set(ready))
    return events


def answers_of(replica: Replica, count: int) -> dict[str, list[tuple[int, Tokens | Finished]]]:
    """Tokens and ends, with their leaders, by request, until so many requests are finished."""

    def num_ended(events: list[tuple[int, Event]]) -> int:
        return sum(isinstance(event, Finished) for _, event in events)

    found: dict[str, list[tuple[int, Tokens | Finished]]] = {}
    for rank, event in events_of(replica, lambda events: num_ended(events) >= count):
        if isinstance(event, Tokens | Finished):
            found.setdefault(event.request_id, []).append((rank, event))
    return found


def test_progress_arrives_while_a_request_runs(start: Start) -> None:
    replica = start()
    replica.wait_ready(DEADLINE_S)
    params = SamplingParams(max_tokens=10**7)
    long = Request(
        request_id="long",
        prompt_token_ids=(1, 1),
        params=params,
        generated=(GeneratedTokens((2, 3)),),
    )
    replica.send(0, [long, request("short", max_tokens=10**7)])
    told = [event for _, event in events_of(replica, lambda events: len(events) >= 3)]
    tokens = [event for event in told if isinstance(event, Tokens) and event.request_id == "long"]
    assert len(tokens) > 1
    assert tokens[0].start == 0
    ids = [token_id for event in tokens for token_id in event.token_ids]
    assert ids == list(range(2, 2 + len(ids)))


def test_requests_are_answered_by_the_leader_that_they_were_sent_to(start: Start) -> None:
    replica = start(dp=2)
    (first, second) = replica.wait_ready(DEADLINE_S)
    assert (list(first.phases), second.notices) == (["groups", "stub"], ["this is a stub"])
    assert replica.limits.max_model_len == 128
    assert replica.leaders == [0, 1]

    environment: Any = ray.get(replica.workers[1].actor.__ray_call__.remote(lambda _: dict(os.environ)))
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")

    replica.send(0, [request("long", max_tokens=30)])
    replica.send(1, [request("a"), request("b", report="step"), request("bad", REFUSED)])
    answers = answers_of(replica, 4)
    tokens = {i: [(rank, e.token_ids) for rank, e in a if isinstance(e, Tokens)] for i, a in answers.items()}
    (own,) = {rank for rank, _ in tokens["long"]}
    assert (own, [t for _, ids in tokens["long"] for t in ids]) == (0, list(range(2, 32)))
    assert [t for _, ids in tokens["a"] for t in ids] == [1002, 1003, 1004]
    assert tokens["b"] == [(1, (1002,)), (1, (1003,)), (1, (1004,))]
    assert [(rank, e.error) for rank, e in answers["bad"] if isinstance(e, Finished)] == [(1, "refused by the stub")]

    # Commands are applied in the order in which they were sent, call after call.
    for number in range(50):
        replica.send(0, [request(f"{number}", max_tokens=10**6)])
        replica.send(0, [Abort(RequestId(f"{number}"))])
    replica.send(0, [request("last")])
    assert [i for i, a in answers_of(replica, 1).items() if isinstance(a[-1][1], Finished)] == ["last"]

    assert replica.audit() == []
    workers: list[Any] = [worker.ended for worker in replica._running.values()]
    replica.close()
    assert ray.get(workers) == [None, None]  # both loops ended by agreement, before their processes did
    replica.close()


def test_a_worker_that_does_not_answer_is_reported_and_its_commands_are_lost(start: Start) -> None:
    replica = start()
    replica.wait_ready(DEADLINE_S)
    name = replica.workers[0].name
    replica.send(0, [request("kill", KILLED)])
    deadline = time.monotonic() + DEADLINE_S
    while not replica.unreachable:
        assert time.monotonic() < deadline
        ready, _ = ray.wait(replica.refs(), timeout=0.1)
        assert replica.collect(set(ready)) == []
    assert [who for who, _ in replica.unreachable] == [name]
    replica.send(0, [request("b")])
    assert replica.lose(0)


def test_a_rank_whose_loop_failed_is_told_of(start: Start) -> None:
    replica = start(dp=2)
    replica.wait_ready(DEADLINE_S)
    replica.send(0, [request("a", max_tokens=100)])
    replica.send(1, [request("break", RAISES)])
    events_of(replica, lambda _: bool(replica.unreachable))
    assert replica.unreachable == [(replica.workers[1].name, "its loop failed: RuntimeError: the stub broke")]


def test_what_a_user_can_mend_ends_the_start_as_a_value_error(start: Start) -> None:
    with pytest.raises(ValueError, match=r"^the stub's model is not there$"):
        start(dp=2, factory=stub_engine.BAD_VALUE).wait_ready(DEADLINE_S)


def test_a_start_has_a_deadline_and_names_who_is_late(start: Start) -> None:
    with pytest.raises(EngineFailed, match=r"rank 0: ranks \[0\] were not ready after 0.5 s"):
        start(factory=stub_engine.LATE).wait_ready(0.5)


def test_a_process_that_dies_during_the_start_is_named(start: Start) -> None:
    with pytest.raises(EngineFailed, match="rank 0: its process died during start-up"):
        start(factory=stub_engine.DEAD).wait_ready(DEADLINE_S)
