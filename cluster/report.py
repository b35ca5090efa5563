"""Helpers that commands share: output directories, JSON reports, progress lines, failed engines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class EnginesFailed(Exception):  # noqa: N818  (the name of the event)
    """The engines could not start or go on."""


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turn the RuntimeError of failed engines into EnginesFailed, which ends a command with `ExitCode.ENGINE`."""
    try:
        yield
    except RuntimeError as error:
        raise EnginesFailed(f"the engines failed: {error}") from error


@contextmanager
def warnings_shown(say: Callable[[str], None]) -> Iterator[None]:
    """Pass Shoal's warnings, those of its workers included, to `say`."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.levelname.lower()}: {record.getMessage()}")

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("shoal")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def line_printer(stream: TextIO) -> Callable[[object], None]:
    """A function that writes a line at once."""
    return lambda line: print(line, file=stream, flush=True)


def check_directory(directory: Path) -> None:
    """ValueError unless files can be written in `directory`, or it can be made."""
    existing = directory
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{existing} is not a directory; give another place than {directory}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} cannot be written: no permission")


def prepare_report(path: Path | None) -> None:
    """Make the directory of a report before the work begins; ValueError if the report cannot be written there."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file")
    check_directory(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_report(path: Path | None, report: Any) -> None:
    """Write a report as JSON; nothing where no path is given."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
