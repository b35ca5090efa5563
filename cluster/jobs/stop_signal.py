"""SIGINT and SIGTERM as requests to stop a job."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..exit_codes import ExitCode


class JobStopped(Exception):  # noqa: N818  (a request, not an error)
    """A signal requested the job to stop."""


class StopSignal:
    """Context in which the first SIGINT or SIGTERM sets a flag (or raises, inside `interrupting`).

    The second signal ends the process at once, which is safe: the journal is durable, and all other rows are answered
    again.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.reason = "stopped by a signal"
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = self._install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.signum == signal.SIGINT else ExitCode.DRAINED

    def expire(self) -> None:
        """Stop as SIGTERM does, because the time of the job is over; nothing after a signal."""
        if self.signum is None:
            self.signum = signal.SIGTERM
            self.reason = "the deadline has come"

    def check(self) -> None:
        """Raise JobStopped if a signal has arrived."""
        if self.signum is not None:
            raise JobStopped

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal raise JobStopped at once, for long calls that do not check for it.

        Handlers that the calls install, as `ray.init` does, are replaced again at the end.
        """
        self.check()
        self._raise = True
        try:
            yield
        except SystemExit as exit_request:
            # Ray's handler of SIGTERM.
            self.signum = signal.SIGTERM
            raise JobStopped from exit_request
        finally:
            self._raise = False
            self._install()

    def _install(self) -> dict[int, Any]:
        return {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(self.exit_code)
        self.signum = signum
        if self._raise:
            raise JobStopped
