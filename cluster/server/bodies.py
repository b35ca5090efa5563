"""Bodies of requests: JSON objects of bounded size."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ..openai.errors import ApiError
from ..openai.json_object import parse_object
from .http_errors import HttpError

MAX_BODY_BYTES = 8 << 20
MAX_PENDING_BYTES = 256 << 20
"""Bodies that are read or checked at a time; requests beyond are refused with status 429."""
LONG_BODY_BYTES = 64 << 10
"""Longer bodies are parsed in another thread, so that streams go on."""


class BodyReader:
    """Reads bodies, and bounds the memory that those take together which are not checked yet."""

    def __init__(self, max_pending_bytes: int) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._num_pending_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[tuple[dict[str, Any], int]]:
        """The JSON object in a request's body, and how many bytes it has; the block checks it.

        ApiError for one that is no JSON object, HttpError 413 for one that is too large, said from Content-Length
        before it is read, or 429 while too much is read already. ClientDisconnect for a client that leaves.
        """
        announced = int(request.headers.get("content-length", 0))  # the HTTP parser takes whole numbers only
        if announced > MAX_BODY_BYTES:
            raise _too_large()
        data = bytearray()
        num_taken = 0
        try:
            async for chunk in request.stream():
                if len(data) + len(chunk) > MAX_BODY_BYTES:
                    raise _too_large()
                if self._num_pending_bytes + len(chunk) > self._max_pending_bytes:
                    raise _too_many()
                self._num_pending_bytes += len(chunk)
                num_taken += len(chunk)
                data += chunk
            if len(data) < announced:
                raise ClientDisconnect
            yield await _parse(bytes(data)), len(data)
        finally:
            self._num_pending_bytes -= num_taken


async def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > LONG_BODY_BYTES:
        return await run_in_threadpool(parse_object, data, place="body")
    return parse_object(data, place="body")


def _too_large() -> HttpError:
    error = ApiError("body_too_large", f"a body may have {MAX_BODY_BYTES} bytes")
    return HttpError(413, error, {"Connection": "close"})


def _too_many() -> HttpError:
    error = ApiError(
        "queue_full", "the bodies of other requests take all the memory there is for them; try again later"
    )
    return HttpError(429, error, {"Connection": "close", "Retry-After": "1"})
