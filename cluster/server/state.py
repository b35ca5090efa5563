"""Whether the server answers, for /health and for new requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from ..replicas.async_engines import AsyncEngines

Status = Literal["starting", "ready", "draining", "stalled", "dead"]


class ServerState:
    """The life of a server: starting, ready, draining; dead when the engines failed."""

    def __init__(self, *, stall_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """stall_timeout_s: running requests without any output for so long mean that the engines are stuck."""
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._engines: AsyncEngines | None = None
        self._is_draining = False
        self._failure: str | None = None

    @property
    def engines(self) -> AsyncEngines | None:
        """The engines, once they are ready."""
        return self._engines

    def set_ready(self, engines: AsyncEngines) -> None:
        self._engines = engines

    def drain(self) -> None:
        """Take no more requests."""
        self._is_draining = True

    def fail(self, reason: str) -> None:
        """The engines failed."""
        self._failure = reason

    @property
    def status(self) -> Status:
        if self._failure is not None:
            return "dead"
        if self._is_draining:
            return "draining"
        if self._engines is None:
            return "starting"
        return "stalled" if self._is_stalled(self._engines) else "ready"

    @property
    def reason(self) -> str:
        """Why the server does not answer, as a sentence."""
        return {
            "dead": f"the engines failed: {self._failure}",
            "draining": "the server is shutting down",
            "starting": "the engines are starting",
            "stalled": f"requests run and no token came in {self._stall_timeout_s:g} s",
            "ready": "",
        }[self.status]

    def _is_stalled(self, engines: AsyncEngines) -> bool:
        return engines.num_requests > 0 and self._clock() - engines.progressed_at > self._stall_timeout_s
