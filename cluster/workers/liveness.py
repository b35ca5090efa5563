"""One connection between every worker and its supervisor: it ends when either of them does, and carries heartbeats.

A killed process is noticed within milliseconds by the end of its connection, a frozen or unreachable one by missing
heartbeats. A worker whose supervisor is gone ends itself: nobody would take its answers.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..exit_codes import ExitCode
from .wire import ORDERS, REPORTS, Heartbeat, Hello, SupervisorOrder, WireError, WorkerReport

BEAT_S = 0.1
CONNECT_TIMEOUT_S = 30.0
HELLO_TIMEOUT_S = 10.0
"""How long a new connection may take to say hello."""
MAX_PENDING_PEERS = 64
"""Connections without a hello; beyond that the oldest is closed: a worker says hello at once."""
MAX_HELLO_BYTES = 1 << 10

_TICK_S = 0.02


class LivenessObserver(Protocol):
    """Receives what happens to workers, on the watching thread."""

    def on_hello(self, name: str) -> None:
        """A worker connected: its process is up, and can be given a rank."""
        ...

    def on_report(self, name: str, report: WorkerReport) -> None: ...

    def on_lost(self, name: str, how: str, silent_s: float) -> None:
        """A worker is dead, or was silent for too long and is fenced off; called once per worker.

        `silent_s`: seconds since its last message, an upper bound of the time it took to notice.
        """
        ...

    def on_tick(self) -> None:
        """Called every few hundredths of a second."""
        ...


@dataclass(frozen=True, slots=True)
class Process:
    """Where a worker runs."""

    node_id: str
    pid: int


@dataclass(slots=True, eq=False)
class _Peer:
    connection: socket.socket
    name: str | None = None
    process: Process | None = None
    received: bytearray = field(default_factory=bytearray)
    heard_at: float = field(default_factory=time.monotonic)
    """Time of the last message, or of the connection before its hello."""


class Liveness:
    """The supervisor's end: listens on one address and watches on a thread of its own."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        """`timeout_s`: a worker that is silent for longer counts as lost."""
        self.key = secrets.token_hex(16)
        """Secret that a worker sends in its hello; other connections are closed."""
        self._timeout_s = timeout_s
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[str, _Peer] = {}
        self._pending: list[_Peer] = []
        """Connections without a hello; the oldest first."""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        """Why the watching thread ended without `close`."""

    def start(self, observer: LivenessObserver) -> None:
        self._thread = threading.Thread(target=self._main, args=(observer,), name="shoal-liveness", daemon=True)
        self._thread.start()

    def send(self, name: str, order: SupervisorOrder) -> None:
        """Send an order to a worker, unless it is gone. Call on the watching thread."""
        peer = self._peers.get(name)
        if peer is not None:
            with contextlib.suppress(OSError):  # its end is found by reading
                peer.connection.sendall(ORDERS.encode(order))

    def process(self, name: str) -> Process:
        """Process of a connected worker."""
        process = self._peers[name].process
        assert process is not None
        return process

    def drop(self, name: str) -> None:
        """Close a worker's connection without reporting it; the worker ends itself. Call on the watching thread."""
        peer = self._peers.pop(name, None)
        if peer is not None:
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def close(self) -> None:
        """Stop watching; workers that end after this are not reported. Closing twice is allowed."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for peer in [*self._peers.values(), *self._pending]:
            peer.connection.close()
        self._peers.clear()
        self._pending.clear()
        self._selector.close()
        self._listener.close()

    def _main(self, observer: LivenessObserver) -> None:
        try:
            self._watch(observer)
        except Exception as error:
            self.failure = error
            raise

    def _watch(self, observer: LivenessObserver) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_TICK_S):
                if key.fileobj is self._listener:
                    self._accept(observer)
                else:
                    self._read(key.data, observer)
            now = time.monotonic()
            for peer in [p for p in self._pending if now - p.heard_at > HELLO_TIMEOUT_S]:
                self._lose(peer, "did not say hello", observer)
            for peer in [p for p in self._peers.values() if now - p.heard_at > self._timeout_s]:
                self._lose(peer, f"silent for {self._timeout_s:g} s", observer)
            observer.on_tick()

    def _accept(self, observer: LivenessObserver) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pending.append(_Peer(connection))
            self._selector.register(connection, selectors.EVENT_READ, self._pending[-1])
        if len(self._pending) > MAX_PENDING_PEERS:
            self._lose(self._pending[0], "too many connections without a hello", observer)

    def _read(self, peer: _Peer, observer: LivenessObserver) -> None:
        if peer.connection.fileno() < 0:
            return  # closed since it was found ready
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and peer.name is not None:
            peer.heard_at = time.monotonic()
        peer.received += data
        try:
            reports = REPORTS.take(peer.received)
        except WireError:  # not a worker of ours
            reports = []
            data = b""
        for report in reports:
            if peer.name is not None:
                observer.on_report(peer.name, report)
            elif not self._greet(peer, report, observer):
                data = b""
                break
        if not data or (peer.name is None and len(peer.received) > MAX_HELLO_BYTES):
            self._lose(peer, "its connection ended", observer)

    def _greet(self, peer: _Peer, hello: WorkerReport, observer: LivenessObserver) -> bool:
        """Take a connection's first message; whether it comes from a worker of this run."""
        if not isinstance(hello, Hello) or hello.name in self._peers:
            return False
        if not hmac.compare_digest(hello.key.encode(), self.key.encode()):
            return False
        self._pending.remove(peer)
        peer.name = hello.name
        peer.process = Process(hello.node_id, hello.pid)
        peer.heard_at = time.monotonic()
        self._peers[hello.name] = peer
        observer.on_hello(hello.name)
        return True

    def _lose(self, peer: _Peer, how: str, observer: LivenessObserver) -> None:
        if peer.connection.fileno() < 0:
            return  # it was dropped meanwhile
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.name is None:
            self._pending.remove(peer)
        else:
            del self._peers[peer.name]
            observer.on_lost(peer.name, how, time.monotonic() - peer.heard_at)


class LivenessLink:
    """A worker's end, with two threads: one sends heartbeats, one listens."""

    def __init__(
        self,
        address: tuple[str, int],
        key: str,
        name: str,
        *,
        node_id: str,
        on_order: Callable[[SupervisorOrder], None],
        heartbeat: Callable[[], Heartbeat] = lambda: Heartbeat(-1),
        on_end: Callable[[], None] = lambda: os._exit(ExitCode.ORPHAN),
    ) -> None:
        """Connect to the supervisor.

        From `start` on, `on_order` is called on the listening thread, and `on_end` when that thread ends: the
        supervisor is gone, or sent something that is not an order. `heartbeat` is called for every heartbeat.
        """
        self._connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._on_order = on_order
        self._on_end = on_end
        self._heartbeat = heartbeat
        self._hello = Hello(key, name, node_id, os.getpid())

    def start(self) -> None:
        """Say hello: from here on the supervisor can send orders."""
        self.send(self._hello)
        for target in (self._listen, self._beat):
            threading.Thread(target=target, name="shoal-link", daemon=True).start()

    def send(self, report: WorkerReport) -> None:
        """Send a report; it is dropped when the supervisor is gone. Any thread may call."""
        data = REPORTS.encode(report)
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(data)

    def close(self) -> None:
        """End the connection, which the supervisor notices."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self.send(self._heartbeat())

    def _listen(self) -> None:
        received = bytearray()
        try:
            while data := self._receive():
                received += data
                for order in ORDERS.take(received):
                    self._on_order(order)
        finally:
            if not self._closed.is_set():
                self._on_end()

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(1 << 16)
        except OSError:
            return b""
