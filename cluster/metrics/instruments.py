"""Where metrics go."""

from __future__ import annotations

from typing import Protocol

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
