"""The loop of a rank, run on threads of this process instead of in a Ray actor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.replica import listen
from shoal.cluster.workers import worker as worker_module
from shoal.cluster.workers.assignment import Assignment
from shoal.cluster.workers.spec import StartReport, WorkerFailure, WorkerSpec, failure_of
from shoal.cluster.workers.wire import COMMANDS, EVENTS, Abort, Event
from shoal.cluster.workers.worker import Worker
from shoal.parallel.collectives import CollectiveError
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import Finished, GeneratedTokens, Request, SamplingParams, Tokens
from tests.support import stub_engine
from tests.support.stub_engine import RAISES, REFUSED, STUB

JOIN_S = 300.0


def spec(rank: int = 0, store: TCPStore | None = None, factory: str = STUB, **args: Any) -> WorkerSpec:
    engine = EngineArgs(model="none", collective_timeout_s=10.0, **args)
    parallel = engine.replica_specs[0].parallel
    return WorkerSpec(
        args=engine,
        name=f"worker {rank}",
        assignment=Assignment(
            epoch=0,
            rank=rank,
            tensor_parallel_size=parallel.tensor_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
            store_host="127.0.0.1",
            store_port=0 if store is None else store.port,
        ),
        num_threads=1,
        dedicated_cores=False,
        engine_factory=factory,
    )


def message(request_id: str, first: int = 1, *, max_tokens: int = 3, **fields: Any) -> bytes:
    params = SamplingParams(max_tokens=max_tokens)
    request = Request(request_id=request_id, prompt_token_ids=(first, 1), params=params, **fields)
    return COMMANDS.encode(request)


def abort(request_id: str) -> bytes:
    return COMMANDS.encode(Abort(RequestId(request_id)))


class Running:
    """A worker whose `start` and `run` are on a thread, as the actor's engine group has them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.report: StartReport | None = None
        self.end: WorkerFailure | None = None
        self.num_sends = 0
        self.answers: dict[str, list[int]] = {}
        self.started = threading.Event()
        self.thread = threading.Thread(target=self.main, daemon=True)
        self.thread.start()

    def main(self) -> None:
        self.report = self.worker.start()
        self.started.set()
        if self.report.failure is None:
            self.end = self.worker.run()

    def send(self, messages: list[bytes]) -> None:
        self.worker.send(self.num_sends, messages)
        self.num_sends += 1

    def join(self) -> WorkerFailure | None:
        self.thread.join(JOIN_S)
        assert not self.thread.is_alive()
        return self.end

    def events(self, num_ends: int) -> list[Event]:
        """What the worker reports, until so many requests are finished."""
        found: list[Event] = []
        while sum(isinstance(event, Finished) for event in found) < num_ends:
            messages = self.worker.poll(JOIN_S)
            assert messages, "nothing came before the deadline, or the loop ended"
            found += map(EVENTS.decode, messages)
        for tokens in found:
            if isinstance(tokens, Tokens):
                answer = self.answers.setdefault(tokens.request_id, [])
                assert tokens.start == len(answer), "every token is reported once, in order"
                answer += tokens.token_ids
        return found

    def finished(self, count: int) -> list[str]:
        """The next requests that are finished, in order."""
        return [event.request_id for event in self.events(count) if isinstance(event, Finished)]


@contextmanager
def running(count: int = 1, **args: Any) -> Iterator[list[Running]]:
    store = listen("127.0.0.1") if count > 1 else None
    workers = [Running(Worker(spec(rank, store, **args))) for rank in range(count)]
    for w in workers:
        assert w.started.wait(JOIN_S)
    yield workers
    for w in workers:
        w.worker.stop()
    for w in workers:
        w.join()


def test_requests_go_in_and_tokens_come_out() -> None:
    with running() as (one,):
        assert one.report is not None
        assert list(one.report.phases) == ["groups", "stub"]
        assert one.report.notices == ["this is a stub"]
        assert one.report.limits is not None
        assert one.report.limits.max_model_len == 128
        one.send([message("a"), message("b", 10)])
        assert sorted(one.finished(2)) == ["a", "b"]
        assert one.answers == {"a": [2, 3, 4], "b": [11, 12, 13]}
        one.send([message("c", 20)])  # after an idle time
        assert one.finished(1) == ["c"]
        assert one.answers["c"] == [21, 22, 23]


def test_a_stream_is_reported_step_by_step_and_other_requests_at_their_end() -> None:
    with running() as (one,):
        one.send([message("a", report="step"), message("b", report="interval")])
        told = [e for e in one.events(2) if isinstance(e, Tokens)]
        assert [(t.start, t.token_ids, t.text) for t in told if t.request_id == "a"] == [
            (0, (2,), "x"),
            (1, (3,), "x"),
            (2, (4,), "x"),
        ]
        assert one.answers == {"a": [2, 3, 4], "b": [2, 3, 4]}


def test_an_interval_that_is_over_brings_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "REPORT_INTERVAL_S", 0.0)
    with running() as (one,):
        one.send([message("a", max_tokens=6, generated=(GeneratedTokens((2, 3)),))])
        events = one.events(1)
    told = [e for e in events if isinstance(e, Tokens)]
    assert [(t.id, t.sample_index, t.start, t.token_ids) for t in told] == [
        (RequestId("a"), 0, 0, (2, 3, 4)),
        (RequestId("a"), 0, 3, (5,)),
        (RequestId("a"), 0, 4, (6,)),
        (RequestId("a"), 0, 5, (7,)),
    ]
    assert events[-1] == Finished(id=RequestId("a"), sample_index=0, reason="length", num_tokens=6)


def test_a_refused_request_ends_in_all_its_samples_and_the_others_go_on() -> None:
    with running() as (one,):
        params = SamplingParams(n=2)
        bad = Request(request_id="bad", attempt=3, prompt_token_ids=(REFUSED, 1), params=params)
        one.send([COMMANDS.encode(bad), message("good")])
        ends = [e for e in one.events(3) if isinstance(e, Finished)]
        assert [(e.id, e.sample_index, e.reason, e.error) for e in ends if e.request_id == "bad"] == [
            (RequestId("bad", 3), 0, "error", "refused by the stub"),
            (RequestId("bad", 3), 1, "error", "refused by the stub"),
        ]
        assert one.answers == {"good": [2, 3, 4]}


def test_a_request_that_is_sent_twice_is_answered_once() -> None:
    with running() as (one,):
        one.send([message("a", max_tokens=30), message("a", max_tokens=30)])
        one.send([message("a", max_tokens=30), message("b", 10)])
        assert sorted(one.finished(2)) == ["a", "b"]
        assert one.answers["a"] == list(range(2, 32))
        assert one.worker.poll(0.05) == []


def test_calls_that_overtake_each_other_are_put_in_order() -> None:
    with running() as (one,):
        one.worker.send(2, [message("b", 10)])
        one.worker.send(1, [abort("a")])
        assert one.worker.audit() == []
        one.worker.send(0, [message("a", max_tokens=10**9)])
        assert one.finished(1) == ["b"]
        engine = one.worker._engine
        assert isinstance(engine, stub_engine.StubEngine)
        assert engine.aborted == [RequestId("a")]


def test_an_aborted_request_leaves_the_engine() -> None:
    with running() as (one,):
        one.send([message("long", max_tokens=10**9)])
        one.send([abort("long"), abort("unknown")])
        one.send([message("next")])
        assert one.finished(1) == ["next"]
        engine = one.worker._engine
        assert isinstance(engine, stub_engine.StubEngine)
        assert engine.aborted == [RequestId("long"), RequestId("unknown")]
        assert engine.requests == {}


def test_a_poll_with_nothing_to_say_returns_while_the_loop_lives() -> None:
    with running() as (one,):
        before = one.worker._num_steps
        assert one.worker.poll(0.05) == []
        assert one.worker._num_steps > before


def test_an_audit_sees_what_was_sent_before_it() -> None:
    with running() as (one,):
        assert one.worker.audit() == []
        one.send([message("long", max_tokens=10**9)])
        assert one.worker.audit() == ["request long is not finished"]
        one.send([abort("long")])
        assert one.worker.audit() == []


def test_a_poll_is_bounded_in_bytes_but_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(spec())
    worker._outbox.extend([b"aaaa", b"bb", b"cc", b"d"])
    monkeypatch.setattr(worker_module, "MAX_POLL_BYTES", 4)
    assert [worker.poll(1.0) for _ in range(3)] == [[b"aaaa"], [b"bb", b"cc"], [b"d"]]
    worker._outbox.append(b"eeeeee")
    assert worker.poll(1.0) == [b"eeeeee"]


def test_an_event_that_no_message_holds_becomes_an_error_of_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(spec())
    monkeypatch.setattr(EVENTS, "max_bytes", 1000)
    request_id = RequestId("a", 1)
    worker._emit([Tokens(id=request_id, sample_index=2, start=0, token_ids=(1,), text="x" * 2000)])
    (found,) = map(EVENTS.decode, worker.poll(1.0))
    assert isinstance(found, Finished)
    assert (found.id, found.sample_index, found.reason) == (request_id, 2, "error")
    assert "above the limit of 1000" in (found.error or "")


def test_an_error_ends_the_loop_with_its_traceback_and_frees_the_polls() -> None:
    with running() as (one,):
        one.send([message("a", RAISES)])
        end = one.join()
        assert end is not None
        assert (end.rank, end.kind, end.message) == (0, "error", "RuntimeError: the stub broke")
        assert "in misbehave" in end.traceback
        assert one.worker.poll(3600.0) == []


def test_one_rank_that_stops_stops_all_in_the_same_step() -> None:
    with running(2, tensor_parallel_size=2) as (first, second):
        first.send([message("a")])
        assert first.finished(1) == ["a"]
        assert first.answers["a"] == [2, 3, 4]
        second.worker.stop()
        assert first.join() is None
        assert second.join() is None
        engines = [w.worker._engine for w in (first, second)]
        assert all(isinstance(engine, stub_engine.StubEngine) for engine in engines)
        assert len({engine.num_steps for engine in engines if isinstance(engine, stub_engine.StubEngine)}) == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("v"), "value"), (CollectiveError("c"), "collective"), (MemoryError("m"), "error")],
)
def test_failures_are_told_apart(error: Exception, kind: str) -> None:
    try:
        raise error
    except Exception as caught:
        failure = failure_of(3, caught)
    assert (failure.rank, failure.kind) == (3, kind)
    assert failure.message == f"{type(error).__name__}: {error}"
    assert failure.traceback.endswith(f"{error}\n")


def test_a_start_that_fails_is_a_report() -> None:
    report = Worker(spec(factory=stub_engine.BAD_VALUE)).start()
    assert report.failure is not None
    assert (report.failure.rank, report.failure.kind) == (0, "value")
    assert report.failure.message == "ValueError: the stub's model is not there"


def test_the_rendezvous_listens_on_one_address_only() -> None:
    store = listen("127.0.0.1")
    client = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
    client.set("key", "value")
    assert store.get("key") == b"value"
    assert listeners(store.port) == ["0100007F"]


def listeners(port: int) -> list[str]:
    """The local addresses, as the kernel prints them, of sockets that listen on `port`."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            rows = [line.split() for line in lines][1:]
        locals_ = [row[1].split(":") for row in rows if row[3] == "0A"]
        found += [address for address, hex_port in locals_ if int(hex_port, 16) == port]
    return found
