"""A client of HTTP/1.1 that sends any bytes."""

from __future__ import annotations

import random
import socket
import time
from dataclasses import dataclass
from types import TracebackType

DEADLINE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Response:
    """A parsed response."""

    status: int
    headers: dict[str, str]
    body: bytes
    has_body: bool


class Connection:
    """A connection to a port of loopback."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        """receive_buffer: bytes that the kernel takes for a client that does not read."""
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(("127.0.0.1", port))
        self._data = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send everything; False if the server closed before."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def send_in_pieces(self, rng: random.Random, data: bytes) -> None:
        """Send in one piece, or in several with a short pause between them."""
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if not self.send(data[begin:end]):
                return
            if end < len(data):
                time.sleep(0.0005)

    def read_response(self, request: bytes) -> Response:
        """The next response that is final. request: tells whether the response has a body."""
        status, headers = self._read_head()
        while status < 200:
            status, headers = self._read_head()
        has_body = not request.startswith(b"HEAD ") and status not in (204, 304)
        body = b""
        if has_body and headers.get("transfer-encoding") == "chunked":
            body = self._read_chunks()
        elif has_body and "content-length" in headers:
            body = self._read(int(headers["content-length"]))
        elif has_body:
            body = self.read_to_end()
        return Response(status=status, headers=headers, body=body, has_body=has_body)

    def read_to_end(self) -> bytes:
        """Everything until the server closes."""
        while self._receive():
            pass
        data = self._data
        self._data = b""
        return data

    def _read_head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self._read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1", first
        pairs = [line.split(": ", 1) for line in lines]
        return int(status), {name.lower(): value for name, value in pairs}

    def _read_chunks(self) -> bytes:
        body = b""
        while True:
            size = int(self._read_until(b"\r\n"), 16)
            chunk = self._read(size)
            assert self._read(2) == b"\r\n"
            if not size:
                return body
            body += chunk

    def _read_until(self, end: bytes) -> bytes:
        while end not in self._data:
            assert self._receive(), f"the server closed after {self._data[:200]!r}"
        found, _, self._data = self._data.partition(end)
        return found

    def _read(self, size: int) -> bytes:
        while len(self._data) < size:
            assert self._receive(), f"the server closed after {len(self._data)} bytes of {size}"
        found, self._data = self._data[:size], self._data[size:]
        return found

    def _receive(self) -> bool:
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            return False
        self._data += data
        return bool(data)
