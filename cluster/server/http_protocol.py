"""uvicorn's HTTP protocol with bounds: heads of requests in bytes, whole requests in seconds."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..openai.errors import ApiError

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together; the parser has no limit of its own."""
REQUEST_TIMEOUT_S = 30.0
"""From the first byte of a request to the last one of its body."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. What breaks a bound, or is no HTTP, gets an error in OpenAI's format and is closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_parsed_bytes = 0
        """Request line and complete headers of a head that is being read."""
        self._num_read_bytes = 0
        """The same, with headers that have not ended: the parser keeps them to itself."""
        self._reads_head = False
        self._deadline: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A connection that never sends anything is an idle one.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._reads_head or self.transport.is_closing():
            return
        self._num_read_bytes += len(data)
        if self._num_read_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_parsed_bytes = 0
        self._num_read_bytes = 0
        self._reads_head = True
        self._stop_deadline()
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self._on_deadline)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._reads_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._num_parsed_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            self._refuse(400, ApiError("invalid_http", "not a request of HTTP/1.1"))

    def _count_head(self, num_bytes: int) -> None:
        self._num_parsed_bytes += num_bytes
        if self._num_parsed_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head of the request is too large")  # the parser gives up with a bad request

    def _on_deadline(self) -> None:
        if self.flow.read_paused:  # the server does not read now: the client is not the slow one
            self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self._on_deadline)
            return
        self._refuse(408, ApiError("request_timeout", f"the request did not come within {REQUEST_TIMEOUT_S:g} s"))

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse_head(self) -> None:
        self._refuse(431, ApiError("head_too_large", f"the head of a request may have {MAX_HEAD_BYTES} bytes"))

    def _refuse(self, status_code: int, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun, and close the connection."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = msgspec.json.encode(error.body(status_code))
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status_code] + head + body)
        self.transport.close()
