"""Where metrics go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)
Labels = tuple[str, ...]
"""Values in the order of `Metric.labels`."""


class Instruments(Protocol):
    """All metrics of the catalog, by name. Any thread may call the methods."""

    def add(self, name: str, labels: Labels, amount: float) -> None:
        """Increase a counter."""
        ...

    def set(self, name: str, labels: Labels, value: float) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: str, labels: Labels, value: float) -> None:
        """Add a value to a histogram."""
        ...


class GuardedInstruments:
    """Instruments whose failure is logged once and ends them alone, not the engines that they watch."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments
        self._has_failed = False

    def add(self, name: str, labels: Labels, amount: float) -> None:
        self._tell(self._instruments.add, name, labels, amount)

    def set(self, name: str, labels: Labels, value: float) -> None:
        self._tell(self._instruments.set, name, labels, value)

    def observe(self, name: str, labels: Labels, value: float) -> None:
        self._tell(self._instruments.observe, name, labels, value)

    def _tell(self, method: Callable[[str, Labels, float], None], name: str, labels: Labels, value: float) -> None:
        if self._has_failed:
            return
        try:
            method(name, labels, value)
        except Exception:
            self._has_failed = True
            kind = type(self._instruments).__name__
            logger.exception("%s could not take %s: no further metrics go there", kind, name)
