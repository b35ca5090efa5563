"""Clients that do not read: they hold up nobody, and the server keeps little for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from shoal.cluster.server.http_server import HttpServer
from tests.support.raw_http import Connection
from tests.support.served import DEADLINE_S, Served, serving

NUM_TOKENS = 4000
KERNEL_BYTES = 4096
MAX_BUFFER_BYTES = 128 << 10
"""uvicorn waits from 64 KiB on; what is written at a time comes on top."""


def post(**body: object) -> bytes:
    data = json.dumps({"prompt": [21, 22], **body}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


STREAM = post(max_tokens=NUM_TOKENS, stream=True)
SHORT = post(max_tokens=2)


@pytest.fixture
def server() -> Iterator[tuple[Served, HttpServer]]:
    with serving(send_buffer=KERNEL_BYTES) as one:
        yield one


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def buffer_sizes(server: HttpServer) -> list[int]:
    return [connection.transport.get_write_buffer_size() for connection in list(server.server_state.connections)]


def test_a_client_that_does_not_read_has_a_bounded_buffer(server: tuple[Served, HttpServer]) -> None:
    served, http = server
    with Connection(served.port, receive_buffer=KERNEL_BYTES) as slow:
        slow.send(STREAM)
        wait(lambda: served.client.num_requests == 1)
        wait(lambda: served.client.num_requests == 0)  # the engines did not wait for it
        assert max(buffer_sizes(http)) > 0, "it is behind"
        with Connection(served.port) as other:
            other.send(SHORT)
            assert other.read_response(SHORT).status == 200
        found: list[bytes] = []
        while not found or not found[-1].endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            assert max(buffer_sizes(http)) <= MAX_BUFFER_BYTES
            found.append(slow.socket.recv(20_000))
        assert b"".join(found).count(b'"text":"x"') == NUM_TOKENS


def test_a_client_that_leaves_instead_of_reading_leaves_nothing(server: tuple[Served, HttpServer]) -> None:
    served, http = server
    with Connection(served.port, receive_buffer=KERNEL_BYTES) as slow:
        slow.send(STREAM)
        wait(lambda: served.client.num_requests == 1)
        wait(lambda: served.client.num_requests == 0)
        assert http.server_state.tasks
    wait(lambda: not http.server_state.tasks)
    assert not http.server_state.connections
    assert json.loads(served.lines[-1])["status"] == 499
