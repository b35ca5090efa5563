"""Socket transport between the ranks of a group: one connection to every peer, driven by the thread that waits.

Ranks on one host are connected by Unix sockets, others by TCP. A rank that waits for a message sleeps in `poll` on its
own core, or polls the connection for a while first; no second thread has to be scheduled. Gloo's progress thread
competes for busy cores: between two computing ranks a round of 16 KB took more than twice as long through Gloo in the
median, and seven times as long in the slowest tenth.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

_HELLO = struct.Struct("<8sq32s")  # magic, rank, session key
_MAGIC = b"shoal-t1"
_SOCKET_BUFFER_BYTES = 4 << 20
_HELLO_TIMEOUT_S = 5.0
_MAX_PENDING_PEERS = 64
"""Unauthenticated connections that are kept, besides those of the ranks; beyond that the oldest is closed."""

_CHECK_S = 0.01
"""Interval at which a rank that waits for its peers checks its deadline."""

OnHeader = Callable[[int, bytes], memoryview]
"""(peer, header) -> buffer for the payload; raises for an unexpected header."""


@dataclass(slots=True)
class _Incoming:
    """A message being received: first its header, then its payload."""

    view: memoryview
    header: bytearray | None
    filled: int = field(default=0)


@dataclass(slots=True)
class Round:
    """One message to and one from every peer: what is still to be sent and received."""

    on_header: OnHeader
    sending: dict[int, list[memoryview]] = field(default_factory=dict)
    receiving: dict[int, _Incoming] = field(default_factory=dict)


class SocketMesh:
    """Connections of one rank to its peers. Messages are [header of `header_bytes` | payload]. Not thread-safe."""

    def __init__(self, sockets: Mapping[int, socket.socket], header_bytes: int, *, busy_wait_s: float = 0.0) -> None:
        """`busy_wait_s`: seconds of busy polling before sleeping, for a rank with a dedicated core.

        Waking up costs tens of microseconds on an idle core, and milliseconds if another process occupies it.
        """
        self._sockets = dict(sockets)
        self._header_bytes = header_bytes
        self._busy_wait_s = busy_wait_s
        for connection in self._sockets.values():
            connection.setblocking(False)

    def begin(self, messages: Mapping[int, tuple[bytes, memoryview]], on_header: OnHeader) -> Round:
        """Begin to send every peer in `messages` its (header, payload), without waiting.

        Call `finish` before the next `begin`; the payloads must not change until then.
        """
        round_ = Round(on_header)
        for peer, (header, payload) in messages.items():
            if rest := self._send(peer, [memoryview(header), payload]):
                round_.sending[peer] = rest
            buffer = bytearray(self._header_bytes)
            round_.receiving[peer] = _Incoming(memoryview(buffer), buffer)
        return round_

    def finish(self, round_: Round, deadline: float) -> None:
        """Send what is left and receive one message from each peer of the round.

        TimeoutError after `deadline` (time.monotonic), ConnectionError when a peer is gone; the mesh is unusable then.
        """
        sending, receiving = round_.sending, round_.receiving
        while True:
            for peer in list(receiving):
                if self._receive(peer, receiving[peer], round_.on_header):
                    del receiving[peer]
            for peer in list(sending):
                if rest := self._send(peer, sending[peer]):
                    sending[peer] = rest
                else:
                    del sending[peer]
            if not (sending or receiving):
                return
            self._wait(receiving.keys(), sending.keys(), deadline)

    def shut_down(self) -> None:
        """End all connections: waits on them, here and on peers, raise ConnectionError. Any thread may call."""
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _send(self, peer: int, parts: list[memoryview]) -> list[memoryview]:
        """Send as much as the connection accepts; returns the rest."""
        try:
            sent = self._sockets[peer].sendmsg(parts)
        except BlockingIOError:
            return parts
        while parts and sent >= len(parts[0]):
            sent -= len(parts[0])
            parts = parts[1:]
        return [parts[0][sent:], *parts[1:]] if parts else []

    def _receive(self, peer: int, incoming: _Incoming, on_header: OnHeader) -> bool:
        """Read what has arrived; True once the message is complete."""
        while True:
            while incoming.filled < len(incoming.view):
                try:
                    count = self._sockets[peer].recv_into(incoming.view[incoming.filled :])
                except BlockingIOError:
                    return False
                if count == 0:
                    raise ConnectionError(f"rank {peer} closed the connection")
                incoming.filled += count
            if incoming.header is None:
                return True
            incoming.view = on_header(peer, bytes(incoming.header))
            incoming.header = None
            incoming.filled = 0

    def _wait(self, receiving: Container[int], sending: Container[int], deadline: float) -> None:
        """Wait until a connection can send or receive; TimeoutError after `deadline`."""
        begin = time.monotonic()
        remaining = deadline - begin
        if remaining <= 0:
            raise TimeoutError("the deadline passed")
        poll = select.poll()
        for peer, connection in self._sockets.items():
            events = (select.POLLIN if peer in receiving else 0) | (select.POLLOUT if peer in sending else 0)
            if events:
                poll.register(connection, events)
        while time.monotonic() < begin + self._busy_wait_s:
            if poll.poll(0):
                return
        poll.poll(remaining * 1000)


@dataclass(frozen=True, slots=True)
class _Address:
    """Addresses a rank listens on."""

    host: str
    port: int
    unix_name: str
    """Name of a socket in Linux's abstract namespace; "" where there is none."""
    machine: str
    """Equal for two processes if and only if they can connect to each other's abstract sockets."""

    def connect(self, machine: str, timeout_s: float) -> socket.socket:
        """Connect from a process on `machine`."""
        if not (self.unix_name and self.machine == machine):
            return socket.create_connection((self.host, self.port), timeout=timeout_s)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect("\0" + self.unix_name)
        except OSError:
            connection.close()
            raise
        return connection


class Deadline:
    """Time limit of a wait for the other ranks, which `stop` can end early."""

    def __init__(self, timeout_s: float, stop: Callable[[], bool] = lambda: False) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._stop = stop

    def left(self) -> float:
        """Seconds left, above 0; TimeoutError when there are none."""
        remaining = self._deadline - time.monotonic()
        if self._stop():
            raise TimeoutError("waiting for the other ranks was given up")
        if remaining <= 0:
            raise TimeoutError("the other ranks did not connect in time")
        return remaining


def connect_mesh(
    store: Store,
    rank: int,
    size: int,
    *,
    hostname: str,
    header_bytes: int,
    deadline: Deadline,
    busy_wait_s: float = 0.0,
    secret: bytes = b"",
) -> SocketMesh:
    """Connect `rank` to all others; every rank calls it with the same store.

    Each rank listens on `hostname` and publishes its address; of two ranks the higher one connects. A connection that
    does not begin with the session's key is closed, and delays no other. The key is derived from `secret`, which the
    ranks share, and a value that rank 0 puts into the store, which anyone can read. TimeoutError after `deadline`.
    """
    if rank == 0:
        store.set("session", secrets.token_hex(16))
    machine = _machine()
    backlog = size + _MAX_PENDING_PEERS
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server((hostname, 0), backlog=backlog))
        listeners = [tcp]
        unix_name = ""
        if machine:
            unix_name = f"shoal-{secrets.token_hex(16)}"
            listeners.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            listeners[1].bind("\0" + unix_name)
            listeners[1].listen(backlog)
        store.set(f"address/{rank}", json.dumps(asdict(_Address(hostname, tcp.getsockname()[1], unix_name, machine))))
        key = hmac.digest(secret, _await_key(store, "session", deadline), "sha256")
        sockets: dict[int, socket.socket] = {}
        for peer in range(rank):
            address = _Address(**json.loads(_await_key(store, f"address/{peer}", deadline)))
            sockets[peer] = address.connect(machine, deadline.left())
            sockets[peer].sendall(_HELLO.pack(_MAGIC, rank, key))
        acceptor = stack.enter_context(contextlib.closing(_Acceptor(listeners, key, max_pending=backlog)))
        while len(sockets) < size - 1:
            for caller, connection in acceptor.take(min(_CHECK_S, deadline.left())):
                if not rank < caller < size or caller in sockets:
                    connection.close()
                else:
                    sockets[caller] = connection
    for connection in sockets.values():
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return SocketMesh(sockets, header_bytes, busy_wait_s=busy_wait_s)


def _machine() -> str:
    """Identity of the running kernel and this process's network namespace; "" where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


@dataclass(slots=True)
class _PendingPeer:
    """A connection that has not authenticated and named its rank yet."""

    connection: socket.socket
    deadline: float
    received: bytes = b""


class _Acceptor:
    """Accepts connections on several listeners and reads the hello of all pending peers concurrently."""

    def __init__(self, listeners: Sequence[socket.socket], key: bytes, *, max_pending: int) -> None:
        """When more than `max_pending` peers have not authenticated, the oldest is closed."""
        self._key = key
        self._max_pending = max_pending
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._pending: dict[int, _PendingPeer] = {}
        self._poll = select.poll()
        for listener in listeners:
            listener.setblocking(False)
            self._poll.register(listener, select.POLLIN)

    def take(self, timeout_s: float) -> list[tuple[int, socket.socket]]:
        """Wait for an event; returns the ranks and connections of peers that have authenticated."""
        accepted = []
        for fd, _ in self._poll.poll(timeout_s * 1000):
            if fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd in self._pending and (hello := self._read_hello(self._pending[fd])) is not None:
                accepted.append((hello, self._forget(fd)))
        now = time.monotonic()
        for fd in [fd for fd, peer in self._pending.items() if peer.deadline <= now]:
            self._forget(fd).close()
        return accepted

    def close(self) -> None:
        """Close all pending peers."""
        for fd in list(self._pending):
            self._forget(fd).close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):  # the peer is gone already
            return
        connection.setblocking(False)
        self._poll.register(connection, select.POLLIN)
        self._pending[connection.fileno()] = _PendingPeer(connection, time.monotonic() + _HELLO_TIMEOUT_S)
        if len(self._pending) > self._max_pending:
            self._forget(next(iter(self._pending))).close()

    def _read_hello(self, peer: _PendingPeer) -> int | None:
        """Rank of a peer that has sent its hello; None until then. A peer that sends anything else is closed."""
        try:
            data = peer.connection.recv(_HELLO.size - len(peer.received))
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        peer.received += data
        if data and len(peer.received) < _HELLO.size:
            return None
        if data:
            magic, rank, sent_key = _HELLO.unpack(peer.received)
            if magic == _MAGIC and hmac.compare_digest(sent_key, self._key):
                return int(rank)
        self._forget(peer.connection.fileno()).close()
        return None

    def _forget(self, fd: int) -> socket.socket:
        self._poll.unregister(fd)
        return self._pending.pop(fd).connection


def _await_key(store: Store, key: str, deadline: Deadline) -> bytes:
    """Value of a key that another rank sets; polled, as `Store.get` cannot be interrupted."""
    pause_s = 0.0
    while not store.check([key]):
        time.sleep(min(pause_s, deadline.left()))
        pause_s = min(pause_s + 1e-3, _CHECK_S)
    value: bytes = store.get(key)
    return value
