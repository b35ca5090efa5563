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
GC_THRESHOLDS = (20_000, 10, 20)
"""Python's 700 objects are those of one step of a thousand streams."""
CLOSE_TIMEOUT_S = 5
"""Longest wait for connections that are still open after their requests ended."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: signals drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_config(app: ASGIApp, *, ssl_certfile: str | None = None, ssl_keyfile: str | None = None) -> uvicorn.Config:
    """The settings of a server for `app`. ValueError for a certificate or a key that cannot be used."""
    config = uvicorn.Config(
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
    try:
        config.load()
    except OSError as error:  # ssl.SSLError, too
        files = " and ".join(filter(None, [ssl_certfile, ssl_keyfile]))
        raise ValueError(f"{files} cannot be used for HTTPS: {error}; ssl_certfile and ssl_keyfile are PEM") from error
    return config


def freeze_objects() -> None:
    """Keep what exists now out of garbage collections, which would make streams stutter, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
