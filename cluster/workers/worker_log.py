"""Log records of a worker: all on stderr, which Ray keeps in a file per process, and warnings also to the driver."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .wire import LogMessage

MAX_LOG_CHARS = 4000


class _Forwarder(logging.Handler):
    """Passes records to `send`, formatted and cut to MAX_LOG_CHARS."""

    def __init__(self, send: Callable[[LogMessage], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(LogMessage(record.name, record.levelno, self.format(record)[:MAX_LOG_CHARS]))


def start_worker_log(describe: Callable[[], str], send: Callable[[LogMessage], None]) -> None:
    """Log Shoal's records of this process from INFO up; `send` receives those from WARNING up.

    `describe` returns which worker this is, with its rank and epoch; every record has it.
    """

    def add_worker(record: logging.LogRecord) -> bool:
        record.worker = describe()
        return True

    stderr = logging.StreamHandler()
    stderr.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(worker)s] %(message)s"))
    forwarder = _Forwarder(send)
    forwarder.setFormatter(logging.Formatter("[%(worker)s] %(message)s"))
    logger = logging.getLogger("shoal")
    logger.setLevel(logging.INFO)
    for handler in (stderr, forwarder):
        handler.addFilter(add_worker)
        logger.addHandler(handler)
