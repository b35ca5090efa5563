"""Bounds of requests, through a socket: heads, time, bodies, and several requests on one connection."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoal.cluster.server import http_protocol
from shoal.cluster.server.http_protocol import MAX_HEAD_BYTES
from tests.support.raw_http import Connection, Response
from tests.support.served import DEADLINE_S, Served, paced_stub, serving

GET = b"GET /live HTTP/1.1\r\nHost: a\r\n"
MAX_PENDING_BYTES = 200_000


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(paced_stub, max_pending_bytes=MAX_PENDING_BYTES) as (one, _):
        yield one


def post(body: dict[str, Any], headers: bytes = b"") -> bytes:
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (headers, len(data))
    return head + data


SHORT = post({"prompt": [21, 22], "max_tokens": 2})
STREAM = post({"prompt": [21, 22], "max_tokens": 4000, "stream": True})


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check_error(response: Response, status: int, code: str) -> None:
    assert response.status == status, response
    assert json.loads(response.body)["error"]["code"] == code
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("num_headers", [1, 100])
@pytest.mark.parametrize("piece", [1 << 20, 1000])
@pytest.mark.parametrize("ends", [True, False])
def test_a_head_has_at_most_64_kib(served: Served, num_headers: int, piece: int, ends: bool) -> None:
    def head(size: int) -> bytes:
        values = [b"X%d: %b\r\n" % (i, b"x" * (size // num_headers)) for i in range(num_headers)]
        return GET + b"".join(values)

    for size, status in ((MAX_HEAD_BYTES - 3000, 200), (MAX_HEAD_BYTES + 3000, 431)):
        data = head(size) + (b"\r\n" if ends or status == 200 else b"")
        with Connection(served.port) as connection:
            for start in range(0, len(data), piece):
                connection.send(data[start : start + piece])
            response = connection.read_response(data)
            if status == 431:
                check_error(response, 431, "head_too_large")
                assert connection.read_to_end() == b""
            assert response.status == status


@pytest.mark.parametrize("sent", [b"G", GET, SHORT[:-3]], ids=["one byte", "head", "body"])
def test_half_of_a_request_is_not_waited_for(served: Served, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "REQUEST_TIMEOUT_S", 0.05)
    with Connection(served.port) as connection:
        connection.send(sent)
        check_error(connection.read_response(sent), 408, "request_timeout")
        assert connection.read_to_end() == b""


def test_requests_that_come_together_are_answered_in_turn(served: Served) -> None:
    requests = [post({"prompt": [21], "max_tokens": i, "stream": i % 2 == 0}) for i in range(1, 8)]
    with Connection(served.port) as connection:
        connection.send(b"".join(requests) + GET)
        responses = [connection.read_response(request) for request in requests]
        assert [json.loads(r.body)["usage"]["completion_tokens"] for r in responses[::2]] == [1, 3, 5, 7]
        assert [r.body.count(b'"text":"x"') for r in responses[1::2]] == [2, 4, 6]
        connection.send(b"\r\n")
        assert connection.read_response(GET).status == 200


def test_requests_before_half_a_head_do_not_count_as_its_bytes(served: Served) -> None:
    count = 2 * MAX_HEAD_BYTES // len(GET)
    with Connection(served.port) as connection:
        connection.send((GET + b"\r\n") * count + GET)
        for _ in range(count):
            assert connection.read_response(GET).status == 200
        connection.send(b"\r\n")
        assert connection.read_response(GET).status == 200


@pytest.mark.parametrize("queued", [b"", SHORT, SHORT + SHORT], ids=["alone", "one waits", "two wait"])
@pytest.mark.parametrize(
    "rubbish",
    [b"\0\0\0\0\r\n\r\n", GET + b"X: " + b"x" * 2 * MAX_HEAD_BYTES, b""],
    ids=["no HTTP", "long head", "client leaves"],
)
def test_a_stream_ends_and_frees_its_request_when_its_connection_breaks(
    served: Served, queued: bytes, rubbish: bytes
) -> None:
    """Nothing is written into the stream, and requests that wait behind it change nothing."""
    with Connection(served.port) as connection:
        connection.send(STREAM + queued)
        wait(lambda: served.client.num_requests == 1)
        if rubbish:
            connection.send(rubbish)
            assert connection.read_to_end().count(b"HTTP/1.1 ") == 1
    wait(lambda: served.client.num_requests == 0)


def test_an_offer_of_another_protocol_is_ignored(served: Served) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
    request = post({"prompt": [21, 22], "max_tokens": 2}, offer)
    with Connection(served.port) as connection:
        for cut in (len(request), len(request) - 5, 30):
            connection.send(request[:cut])
            time.sleep(0.01)
            connection.send(request[cut:])
            response = connection.read_response(request)
            assert json.loads(response.body)["usage"]["completion_tokens"] == 2
        many = GET + offer + b"\r\n"
        connection.send(many * 1200 + SHORT)
        for _ in range(1200):
            assert connection.read_response(many).body == b'{"status":"live"}'
        assert connection.read_response(SHORT).status == 200


def test_bodies_share_a_bound(served: Served) -> None:
    large = post({"prompt": "x" * (MAX_PENDING_BYTES - 1000)})
    with Connection(served.port) as first, Connection(served.port) as second:
        first.send(large[:-1])
        wait(lambda: served.api._bodies._num_pending_bytes > MAX_PENDING_BYTES - 2000)
        second.send(large)
        response = second.read_response(large)
        check_error(response, 429, "queue_full")
        assert response.headers["retry-after"] == "1"
        with Connection(served.port) as third:
            third.send(SHORT)
            assert third.read_response(SHORT).status == 200, "it has room"
        first.send(large[-1:])
        check = first.read_response(large)
        assert json.loads(check.body)["error"]["code"] == "context_length_exceeded"
    wait(lambda: served.api._bodies._num_pending_bytes == 0)


def test_a_body_that_breaks_off_leaves_nothing(served: Served) -> None:
    large = post({"prompt": "x" * 150_000})
    for request in (SHORT, STREAM, large):
        for cut in (len(request) - 1, len(request) // 2, request.index(b"\r\n\r\n") + 4):
            with Connection(served.port) as connection:
                connection.send(request[:cut])
    with Connection(served.port) as connection:
        connection.send(SHORT)
        assert connection.read_response(SHORT).status == 200
    wait(lambda: served.api._bodies._num_pending_bytes == 0)
    assert served.client.num_requests == 0
