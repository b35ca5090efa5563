"""uvicorn's HTTP protocol with bounds: heads of requests in bytes, whole requests in seconds."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

import httptools
import msgspec
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

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
        self._num_begun = 0
        """Requests that began in the data that came last."""
        self._deadline: TimerHandle | None = None
        """Not None while a request is being read."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the one that came last, and `pipeline` has those between."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A connection that never sends anything is an idle one.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._unset_keepalive_if_required()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_between_requests = self._deadline is None
        self._num_begun = 0
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        if not self._reads_head or self.transport.is_closing():
            return
        if self._num_begun <= is_between_requests:  # otherwise the data ends other requests, too
            self._num_read_bytes += len(data)
        if self._num_read_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_parsed_bytes = 0
        self._num_read_bytes = 0
        self._num_begun += 1
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
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_deadline()
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._num_parsed_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            self._refuse(400, ApiError("invalid_http", "not a request of HTTP/1.1"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._running = cycle
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _parse(self, data: bytes) -> None:
        """Feed the parser, which takes no body after a head that offers another protocol: those are fed again."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_offer() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_offer(self) -> bytes:
        """The head that was parsed last, without its Upgrade header."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT is for proxies")
        version = self.parser.get_http_version().encode()
        headers = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, headers)

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
        running = self._running
        if running is None or running.response_complete or not running.response_started:
            body = msgspec.json.encode(error.body(status_code))
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status_code] + head + body)
        self.transport.close()
