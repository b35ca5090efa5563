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

BEAT_S = 0.1
CONNECT_TIMEOUT_S = 30.0
MAX_MESSAGE_BYTES = 1 << 16
EXIT_ORPHAN = 70

_LENGTH = struct.Struct("<I")
_TICK_S = 0.02

Message = list[Any]


class LivenessObserver(Protocol):
    """Told what happens, on the thread that watches."""

    def on_hello(self, name: str) -> None:
        """A worker connected: its process is up, and can be given a rank."""
        ...

    def on_message(self, name: str, message: Message) -> None: ...

    def on_lost(self, name: str, how: str) -> None:
        """A worker is dead, or said nothing for too long and is fenced off; told once."""
        ...

    def on_tick(self) -> None:
        """Called every few hundredths of a second."""
        ...


@dataclass(slots=True)
class _Peer:
    connection: socket.socket
    name: str | None = None
    pid: int = 0
    received: bytearray = field(default_factory=bytearray)
    heard_at: float = 0.0


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
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, observer: LivenessObserver) -> None:
        self._thread = threading.Thread(target=self._main, args=(observer,), name="shoal-liveness", daemon=True)
        self._thread.start()

    def send(self, name: str, message: Message) -> None:
        """Tell a worker something; one that is gone hears nothing. On the thread that watches."""
        peer = self._peers.get(name)
        if peer is not None:
            with contextlib.suppress(OSError):  # its end is found by reading
                peer.connection.sendall(pack(message))

    def pid(self, name: str) -> int:
        """The process of a connected worker, on its machine."""
        return self._peers[name].pid

    def close(self) -> None:
        """Stop watching; what ends after this is not reported. Closing twice is allowed."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for peer in self._peers.values():
            peer.connection.close()
        self._peers.clear()
        self._selector.close()
        self._listener.close()

    def _main(self, observer: LivenessObserver) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_TICK_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data, observer)
            silent_since = time.monotonic() - self._timeout_s
            for name in [n for n, p in self._peers.items() if p.heard_at < silent_since]:
                self._lose(self._peers[name], f"silent for {self._timeout_s:g} s", observer)
            observer.on_tick()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer, observer: LivenessObserver) -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.heard_at = time.monotonic()
        peer.received += data
        try:
            for message in unpack(peer.received):
                self._take(peer, message, observer)
        except ValueError:
            data = b""  # not one of ours
        if not data:
            self._lose(peer, "its connection ended", observer)

    def _take(self, peer: _Peer, message: Message, observer: LivenessObserver) -> None:
        if peer.name is not None:
            observer.on_message(peer.name, message)
            return
        kind, key, name, pid = message
        if kind != "hello" or not hmac.compare_digest(str(key), self.key) or name in self._peers:
            raise ValueError("not a worker of this run")
        peer.name, peer.pid = str(name), int(pid)
        self._peers[peer.name] = peer
        observer.on_hello(peer.name)

    def _lose(self, peer: _Peer, how: str, observer: LivenessObserver) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.name is not None:
            del self._peers[peer.name]
            observer.on_lost(peer.name, how)


class LivenessLink:
    """A worker's end, with two threads: one beats, one listens."""

    def __init__(
        self,
        address: tuple[str, int],
        key: str,
        name: str,
        *,
        on_message: Callable[[Message], None],
        on_end: Callable[[], None] = lambda: os._exit(EXIT_ORPHAN),
    ) -> None:
        """Connects; from `start` on, `on_message` is called on the listening thread, `on_end` when that ends: the
        supervisor is gone, or sent what cannot be understood."""
        self._connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._on_message, self._on_end = on_message, on_end
        self._hello: Message = ["hello", key, name, os.getpid()]

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
            self.send(["beat"])

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
