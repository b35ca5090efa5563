"""uvicorn as Shoal runs it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from .http_protocol import BoundedHttpProtocol

KEEP_ALIVE_S = 75
"""Idle connections are kept for longer than clients keep them, so that none is closed under a request."""
CLOSE_TIMEOUT_S = 5
"""Longest wait for connections that are still open after their requests ended."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: signals drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_config(app: ASGIApp, *, ssl_certfile: str | None = None, ssl_keyfile: str | None = None) -> uvicorn.Config:
    """The settings of a server for `app`."""
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        loop="asyncio",
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )


def freeze_objects() -> None:
    """Keep what exists now out of garbage collections: those of a loaded model take so long that streams stutter."""
    gc.collect()
    gc.freeze()
