"""Connections between supervisor and workers, with real sockets and real processes that are killed and frozen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.exit_codes import ExitCode
from shoal.cluster.workers.liveness import Liveness, LivenessLink, Process
from shoal.cluster.workers.wire import (
    ORDERS,
    REPORTS,
    Heartbeat,
    Hello,
    Joined,
    Joining,
    LeaveEpoch,
    Left,
    WireError,
    WorkerReport,
)

WORKER = """
import sys, time
from shoal.cluster.workers.liveness import LivenessLink
from shoal.cluster.workers.wire import Left
host, port, key, name = sys.argv[1:]
link = LivenessLink((host, int(port)), key, name, node_id="n", on_order=lambda o: link.send(Left(o.epoch, "echo")))
link.start()
print("up", flush=True)
time.sleep(600)
"""
WAIT_S = 300.0


class Broken(Exception):  # noqa: N818
    """What an observer must not raise."""


class Observer:
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.greet: Callable[[str], None] = lambda name: None

    def on_hello(self, name: str) -> None:
        self.events.append(("hello", name))
        self.greet(name)

    def on_report(self, name: str, report: WorkerReport) -> None:
        if not isinstance(report, Heartbeat):
            self.events.append(("report", name, report))

    def on_lost(self, name: str, how: str, silent_s: float) -> None:
        assert 0 <= silent_s < WAIT_S
        self.events.append(("lost", name, how))

    def on_tick(self) -> None:
        pass

    def wait_for(self, *event: Any) -> None:
        deadline = time.monotonic() + WAIT_S
        while event not in self.events:
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)


@pytest.fixture
def watched() -> Iterator[tuple[Liveness, Observer]]:
    liveness, observer = Liveness("127.0.0.1", timeout_s=3.0), Observer()
    observer.greet = lambda name: liveness.send(name, LeaveEpoch(3))
    liveness.start(observer)
    yield liveness, observer
    liveness.close()


@pytest.fixture
def spawn() -> Iterator[Callable[[Liveness, str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(liveness: Liveness, name: str) -> subprocess.Popen[str]:
        host, port = liveness.address
        root = Path(__file__).parents[3]
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, host, str(port), liveness.key, name],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root / ".src")},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_worker_is_greeted_and_answers_and_its_death_is_known(watched: Any, spawn: Any) -> None:
    liveness, observer = watched
    process = spawn(liveness, "w0")
    observer.wait_for("report", "w0", Left(3, "echo"))
    assert liveness.process("w0") == Process("n", process.pid)
    time.sleep(4.0)  # it beats
    assert not [e for e in observer.events if e[0] == "lost"]
    process.kill()
    observer.wait_for("lost", "w0", "its connection ended")


def test_a_frozen_worker_is_lost_and_ends_itself_when_it_thaws(watched: Any, spawn: Any) -> None:
    liveness, observer = watched
    process = spawn(liveness, "w0")
    observer.wait_for("hello", "w0")
    os.kill(process.pid, signal.SIGSTOP)
    observer.wait_for("lost", "w0", "silent for 3 s")
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(WAIT_S) == ExitCode.ORPHAN, "its supervisor hung up"
    assert [e[0] for e in observer.events].count("lost") == 1


def test_an_orphan_ends_itself(spawn: Any) -> None:
    liveness, observer = Liveness("127.0.0.1", timeout_s=5.0), Observer()
    liveness.start(observer)
    process = spawn(liveness, "w0")
    observer.wait_for("hello", "w0")
    liveness.close()
    assert process.wait(WAIT_S) == ExitCode.ORPHAN
    assert not [e for e in observer.events if e[0] == "lost"], "who closed knows"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        REPORTS.encode(Hello("wrong key", "w9", "n", 1)),
        REPORTS.encode(Heartbeat(1)),
        ORDERS.encode(LeaveEpoch(1)),
        REPORTS.magic + (1 << 31).to_bytes(4, "big"),
        REPORTS.magic + b"\x00\x00\x00\x01\xc1",
    ],
)
def test_strangers_are_turned_away(watched: Any, sent: bytes) -> None:
    liveness, observer = watched
    with socket.create_connection(liveness.address) as connection:
        connection.settimeout(WAIT_S)
        connection.sendall(sent)
        assert connection.recv(1) == b""
    assert observer.events == []


def test_a_second_worker_of_the_same_name_is_turned_away(watched: Any) -> None:
    liveness, observer = watched
    ended = threading.Event()
    first = LivenessLink(
        liveness.address, liveness.key, "w0", node_id="n", on_order=lambda o: None, on_end=lambda: None
    )
    first.start()
    observer.wait_for("hello", "w0")
    LivenessLink(liveness.address, liveness.key, "w0", node_id="n", on_order=lambda o: None, on_end=ended.set).start()
    assert ended.wait(WAIT_S)
    assert observer.events == [("hello", "w0")]
    first.close()
    observer.wait_for("lost", "w0", "its connection ended")


def test_messages_come_in_any_pieces() -> None:
    data = REPORTS.encode(Joining(1)) + REPORTS.encode(Joined(2))
    received, found = bytearray(), []
    for byte in data:
        received.append(byte)
        found += REPORTS.take(received)
    assert found == [Joining(1), Joined(2)]
    assert received == b""
    with pytest.raises(WireError, match="announces"):
        REPORTS.take(bytearray(REPORTS.magic + (REPORTS.max_bytes + 1).to_bytes(4, "big")))
    with pytest.raises(WireError, match="starts with b'GET '"):
        REPORTS.take(bytearray(b"GET / HTTP/1.1"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_observer_that_fails_is_found_out(watched: tuple[Liveness, Observer]) -> None:
    liveness, observer = watched
    assert liveness.failure is None

    def greet(name: str) -> None:
        raise Broken

    observer.greet = greet
    LivenessLink(liveness.address, liveness.key, "w0", node_id="n", on_order=print, on_end=lambda: None).start()
    deadline = time.monotonic() + WAIT_S
    while liveness.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert isinstance(liveness.failure, Broken)
