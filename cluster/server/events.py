"""Streams of server-sent events as a small ASGI response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class EventStream:
    """Sends the bodies of an iterator as events, and [DONE] after the last one."""

    def __init__(
        self,
        bodies: AsyncIterator[Sequence[Mapping[str, Any]]],
        *,
        headers: Mapping[str, str],
        close: Callable[[], None],
    ) -> None:
        """`close` is called when the stream ends, however it does."""
        self._bodies = bodies
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await until_disconnect(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers + self._headers})
        async for bodies in self._bodies:
            if bodies:
                data = b"".join(b"data: " + msgspec.json.encode(body) + b"\n\n" for body in bodies)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientDisconnect as soon as the client leaves; the body must have been read."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
