"""One connection between every worker and its supervisor: it ends when either of them does, and beats while both live.

A process that is killed is known within milliseconds by the end of its connection; one that is frozen, or cut off, by
the beats that are missing. A worker whose supervisor is gone ends itself: nobody would take its answers.

    message:  length (4 bytes) | msgpack: [kind, values..]
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from ..exit_codes import ExitCode

BEAT_S = 0.1
CONNECT_TIMEOUT_S = 30.0
HELLO_TIMEOUT_S = 10.0
"""How long a connection may take to say whose it is."""
MAX_STRANGERS = 64
"""Connections that have not said it yet; of more, the oldest is closed: a worker says it at once."""
MAX_MESSAGE_BYTES = 1 << 16
MAX_HELLO_BYTES = 1 << 10

_LENGTH = struct.Struct("<I")
_TICK_S = 0.02

Message = list[Any]


class LivenessObserver(Protocol):
    """Told what happens, on the thread that watches."""

    def on_hello(self, name: str) -> None:
        """A worker connected: its process is up, and can be given a rank."""
        ...

    def on_message(self, name: str, message: Message) -> None: ...

    def on_lost(self, name: str, how: str, silent_s: float) -> None:
        """A worker is dead, or said nothing for too long and is fenced off; told once.

        `silent_s`: since it was last heard, so at most how long it took to notice.
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
    """Time of the last message, or of the connection while the peer is unauthenticated."""


class Liveness:
    """The supervisor's end: listens on one address, on a thread of its own."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        """`timeout_s`: a worker that is silent for longer counts as lost."""
        self.key = secrets.token_hex(16)
        """Opens a connection; everything else is turned away."""
        self._timeout_s = timeout_s
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[str, _Peer] = {}
        self._strangers: list[_Peer] = []
        """Without a name; the oldest first."""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        """Why nobody watches any more, although nobody asked for that."""

    def start(self, observer: LivenessObserver) -> None:
        self._thread = threading.Thread(target=self._main, args=(observer,), name="shoal-liveness", daemon=True)
        self._thread.start()

    def send(self, name: str, message: Message) -> None:
        """Tell a worker something; one that is gone hears nothing. On the thread that watches."""
        peer = self._peers.get(name)
        if peer is not None:
            with contextlib.suppress(OSError):  # its end is found by reading
                peer.connection.sendall(pack(message))

    def process(self, name: str) -> Process:
        """Process of a connected worker."""
        process = self._peers[name].process
        assert process is not None
        return process

    def drop(self, name: str) -> None:
        """End a worker's connection without reporting it; the worker ends itself. On the thread that watches."""
        peer = self._peers.pop(name, None)
        if peer is not None:
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def close(self) -> None:
        """Stop watching; what ends after this is not reported. Closing twice is allowed."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for peer in [*self._peers.values(), *self._strangers]:
            peer.connection.close()
        self._peers.clear()
        self._strangers.clear()
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
            for peer in [p for p in self._strangers if now - p.heard_at > HELLO_TIMEOUT_S]:
                self._lose(peer, "did not say who it is", observer)
            for peer in [p for p in self._peers.values() if now - p.heard_at > self._timeout_s]:
                self._lose(peer, f"silent for {self._timeout_s:g} s", observer)
            observer.on_tick()

    def _accept(self, observer: LivenessObserver) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._strangers.append(_Peer(connection))
            self._selector.register(connection, selectors.EVENT_READ, self._strangers[-1])
        if len(self._strangers) > MAX_STRANGERS:
            self._lose(self._strangers[0], "too many strangers", observer)

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
            messages = unpack(peer.received)
        except ValueError:  # not one of ours
            messages, data = [], b""
        for message in messages:
            if peer.name is not None:
                observer.on_message(peer.name, message)
            elif not self._greet(peer, message, observer):
                data = b""
                break
        if not data or (peer.name is None and len(peer.received) > MAX_HELLO_BYTES):
            self._lose(peer, "its connection ended", observer)

    def _greet(self, peer: _Peer, message: Message, observer: LivenessObserver) -> bool:
        """Take a stranger's first message; whether it is a worker of this run."""
        match message:
            case ["hello", str(key), str(name), str(node_id), int(pid)] if name not in self._peers:
                if not hmac.compare_digest(key.encode(), self.key.encode()):
                    return False
            case _:
                return False
        self._strangers.remove(peer)
        peer.name, peer.process, peer.heard_at = name, Process(node_id, pid), time.monotonic()
        self._peers[name] = peer
        observer.on_hello(name)
        return True

    def _lose(self, peer: _Peer, how: str, observer: LivenessObserver) -> None:
        if peer.connection.fileno() < 0:
            return  # it was dropped meanwhile
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.name is None:
            self._strangers.remove(peer)
        else:
            del self._peers[peer.name]
            observer.on_lost(peer.name, how, time.monotonic() - peer.heard_at)


class LivenessLink:
    """A worker's end, with two threads: one beats, one listens."""

    def __init__(
        self,
        address: tuple[str, int],
        key: str,
        name: str,
        *,
        node_id: str,
        on_message: Callable[[Message], None],
        num_steps: Callable[[], int] = lambda: -1,
        on_end: Callable[[], None] = lambda: os._exit(ExitCode.ORPHAN),
    ) -> None:
        """Connects; from `start` on, `on_message` is called on the listening thread, `on_end` when that ends: the
        supervisor is gone, or sent what cannot be understood. Beats carry `num_steps`, which grows while work goes on;
        -1 while there is none."""
        self._connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._on_message, self._on_end, self._num_steps = on_message, on_end, num_steps
        self._hello: Message = ["hello", key, name, node_id, os.getpid()]

    def start(self) -> None:
        """Say hello: from here on this worker can be told something."""
        self.send(self._hello)
        for target in (self._listen, self._beat):
            threading.Thread(target=target, name="shoal-link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Tell the supervisor something; nobody hears it when it is gone. Any thread may call."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(pack(message))

    def close(self) -> None:
        """Take leave; the supervisor finds the connection ended."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self.send(["beat", self._num_steps()])

    def _listen(self) -> None:
        received = bytearray()
        try:
            while data := self._receive():
                received += data
                for message in unpack(received):
                    self._on_message(message)
        finally:
            if not self._closed.is_set():
                self._on_end()

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(1 << 16)
        except OSError:
            return b""


def pack(message: Message) -> bytes:
    """A message with its length before it."""
    payload: bytes = msgpack.packb(message)
    assert len(payload) <= MAX_MESSAGE_BYTES
    return _LENGTH.pack(len(payload)) + payload


def unpack(received: bytearray) -> list[Message]:
    """The complete messages in `received`, which they are cut off; ValueError for what is no message."""
    messages = []
    while len(received) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(received)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message announces {length} bytes")
        if len(received) < _LENGTH.size + length:
            break
        try:
            message = msgpack.unpackb(bytes(received[_LENGTH.size : _LENGTH.size + length]))
        except (ValueError, msgpack.UnpackException) as error:
            raise ValueError(f"a message is not msgpack: {error}") from error
        if not isinstance(message, list) or not message:
            raise ValueError("a message must be a list that begins with its kind")
        del received[: _LENGTH.size + length]
        messages.append(message)
    return messages
