"""Bodies of requests: JSON objects of bounded size."""

from __future__ import annotations

from typing import Any

from starlette.requests import ClientDisconnect, Request

from ..openai.errors import ApiError
from ..openai.json_object import parse_object
from .http_errors import HttpError

MAX_BODY_BYTES = 8 << 20


async def read_body(request: Request) -> dict[str, Any]:
    """Read the JSON object in a request's body.

    ApiError for one that is no JSON object, HttpError 413 for one that is too large, said from Content-Length before
    it is read. ClientDisconnect for a client that leaves.
    """
    announced = int(request.headers.get("content-length", 0))  # the HTTP parser takes whole numbers only
    if announced > MAX_BODY_BYTES:
        raise _too_large()
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise _too_large()
    if len(data) < announced:
        raise ClientDisconnect
    return parse_object(bytes(data), place="body")


def _too_large() -> HttpError:
    error = ApiError("body_too_large", f"a body may have {MAX_BODY_BYTES} bytes")
    return HttpError(413, error, {"Connection": "close"})
