"""One line of JSON per request for text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request

from .generation import Answer
from .http_errors import HttpError

MAX_TRACEPARENT_CHARS = 128
_SECONDS = ("queue_s", "prefill_s", "decode_s", "e2e_s")
Write = Callable[[str], None]


class RequestLog:
    """Writes a line when a request has been answered, refused or given up."""

    def __init__(self, write: Write | None, *, clock: Callable[[], float] = time.time) -> None:
        """write: takes a line without its end; None logs nothing. clock: seconds since 1970."""
        self._write = write
        self._clock = clock

    def refused(self, http: Request, error: HttpError) -> None:
        """A request that was not given to the engines."""
        self._log(http, {"status": error.status_code, "code": error.error.code, "message": error.error.message})

    def ended(self, http: Request, answer: Answer) -> None:
        """A request whose answer is complete, or will never be."""
        metrics = answer.metrics
        seconds = {name: _rounded(getattr(metrics, name, None)) for name in _SECONDS}
        usage = answer.usage
        counts = {
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": usage.num_output_tokens,
            "cached_tokens": usage.num_cached_tokens,
        }
        self._log(http, {"status": answer.status_code, "finish_reasons": answer.finish_reasons, **counts, **seconds})

    def _log(self, http: Request, facts: dict[str, Any]) -> None:
        if self._write is None:
            return
        line: dict[str, Any] = {"time": round(self._clock(), 3), "request_id": http.state.request_id}
        line["path"] = http.scope["path"]
        if (traceparent := http.headers.get("traceparent")) is not None:
            line["traceparent"] = traceparent[:MAX_TRACEPARENT_CHARS]
        self._write(msgspec.json.encode(line | facts).decode())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
