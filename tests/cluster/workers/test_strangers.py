"""What a process that is none of ours can do to the listeners of the driver: nothing that anybody notices."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import msgpack

from shoal.cluster.replicas.replica import listen
from shoal.cluster.workers import liveness as liveness_module
from shoal.cluster.workers.liveness import MAX_PENDING_PEERS, Liveness, LivenessLink
from shoal.cluster.workers.wire import REPORTS, Hello, Joined, WorkerReport
from tests.support.sockets import listening

WAIT_S = 300.0
LOOPBACK = "127.0.0.2"
"""Not what a listener gets that asks for localhost, or for nothing."""


class Observer:
    def __init__(self) -> None:
        self.messages: list[tuple[str, object]] = []

    def on_hello(self, name: str) -> None:
        self.messages.append((name, "hello"))

    def on_report(self, name: str, report: WorkerReport) -> None:
        self.messages.append((name, report))

    def on_lost(self, name: str, how: str, silent_s: float) -> None:
        self.messages.append((name, how))

    def on_tick(self) -> None:
        pass


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture
def liveness(observer: Observer) -> Iterator[Liveness]:
    liveness = Liveness(LOOPBACK, timeout_s=WAIT_S)
    liveness.start(observer)
    yield liveness
    liveness.close()


@pytest.fixture
def connect(liveness: Liveness) -> Iterator[Callable[[], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def begin() -> socket.socket:
            connection = stack.enter_context(socket.create_connection(liveness.address))
            connection.settimeout(WAIT_S)
            return connection

        yield begin


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_it_works(liveness: Liveness, observer: Observer) -> None:
    """A worker connects, and is heard."""
    link = LivenessLink(liveness.address, liveness.key, "w0", node_id="n", on_order=print, on_end=lambda: None)
    link.start()
    link.send(Joined(1))
    wait_for(lambda: ("w0", Joined(1)) in observer.messages)
    assert observer.messages[0] == ("w0", "hello")
    link.close()
    wait_for(lambda: ("w0", "its connection ended") in observer.messages)


def test_listeners_are_bound_to_the_address_that_they_were_given(liveness: Liveness) -> None:
    before = listening()
    assert liveness.address in before
    store = listen(LOOPBACK)
    assert listening() - before == {(LOOPBACK, store.port)}
    with socket.create_server(("", 0)) as everywhere:
        assert listening() - before == {(LOOPBACK, store.port), ("0.0.0.0", everywhere.getsockname()[1])}


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x01"


def framed(payload: bytes) -> bytes:
    return REPORTS.magic + len(payload).to_bytes(4, "big") + payload


def hello(key: object, name: object, node_id: object, pid: object) -> bytes:
    return framed(msgpack.encode(["hello", key, name, node_id, pid]))


@pytest.mark.parametrize(
    "sent",
    [
        hello("clé", "w9", "n", 1),
        hello(7, "w9", "n", 1),
        hello(["k"], "w9", "n", 1),
        framed(b"\x95" + msgpack.encode("hello") + nested(900) + msgpack.encode("w9") + b"\x01\x01"),
        framed(nested(60_000)),
        framed(b"\xdd\xff\xff\xff\xff"),
        framed(b"\xdf\xff\xff\xff\xff"),
        framed(b"\xc6\xff\xff\xff\xff"),
        framed(b"\x91\x81\x90\x01"),
        framed(b"\xc7\x01\xff\x00"),
        framed(b"\x80"),
        framed(b""),
        REPORTS.magic + b"\x7f\xff\xff\xff",
        REPORTS.magic + b"\x00\x00\xff\xff" + bytes(2000),
        b"\xff",
    ],
)
def test_garbage_ends_the_connection_and_nothing_else(
    liveness: Liveness, observer: Observer, connect: Callable[[], socket.socket], sent: bytes
) -> None:
    connection = connect()
    connection.sendall(sent)
    with contextlib.suppress(ConnectionResetError):  # it was closed with bytes unread
        assert connection.recv(1) == b""
    check_it_works(liveness, observer)


@pytest.mark.parametrize("spoils", ["key", "name", "node", "pid"])
def test_each_part_of_a_hello_is_checked(
    liveness: Liveness, observer: Observer, connect: Callable[[], socket.socket], spoils: str
) -> None:
    parts: dict[str, object] = {"key": liveness.key, "name": "w9", "node": "n", "pid": 1}
    connection = connect()
    connection.sendall(hello(*{**parts, spoils: [[]]}.values()))
    assert connection.recv(1) == b""
    connection = connect()
    connection.sendall(hello(*parts.values()))
    wait_for(lambda: ("w9", "hello") in observer.messages)


def test_who_says_nothing_or_says_it_slowly_is_turned_away(
    liveness: Liveness, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness_module, "HELLO_TIMEOUT_S", 0.3)
    silent, slow = connect(), connect()
    ended = False
    for byte in REPORTS.encode(Hello(liveness.key, "w9", "n", 1)):
        try:
            slow.sendall(bytes([byte]))
        except OSError:
            ended = True
            break
        time.sleep(0.05)
    assert ended
    assert silent.recv(1) == b""


def test_a_crowd_of_strangers_keeps_no_worker_out(
    liveness: Liveness, observer: Observer, connect: Callable[[], socket.socket]
) -> None:
    def num_open() -> int:
        return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))

    before, crowd = num_open(), 5 * MAX_PENDING_PEERS
    for _ in range(crowd):
        connect().sendall(REPORTS.magic[:1])
    check_it_works(liveness, observer)
    assert num_open() - before <= crowd + MAX_PENDING_PEERS, "of those that wait, only so many are kept"
