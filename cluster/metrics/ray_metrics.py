"""Metrics for Ray's own exporter; its Prometheus names begin with `ray_`."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from .catalog import METRICS
from .instruments import Labels


class RayInstruments:
    """The catalog by `ray.util.metrics`. Ray must be initialized."""

    def __init__(self, prefix: str) -> None:
        """A colon in the prefix, which Ray does not take, becomes an underscore."""
        prefix = prefix.replace(":", "_")
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            name = prefix + metric.name
            if metric.kind == "histogram":
                made: Any = Histogram(name, metric.help, boundaries=list(metric.buckets), tag_keys=metric.labels)
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                made = kind(name, metric.help, tag_keys=metric.labels)
            self._metrics[metric.name] = made
        self._labels = {metric.name: metric.labels for metric in METRICS}

    def add(self, name: str, labels: Labels, amount: float) -> None:
        if amount > 0:  # Ray refuses others
            self._metrics[name].inc(amount, tags=self._tags(name, labels))

    def set(self, name: str, labels: Labels, value: float) -> None:
        self._metrics[name].set(value, tags=self._tags(name, labels))

    def observe(self, name: str, labels: Labels, value: float) -> None:
        self._metrics[name].observe(value, tags=self._tags(name, labels))

    def _tags(self, name: str, labels: Labels) -> dict[str, str]:
        return dict(zip(self._labels[name], labels, strict=True))
