"""Metrics for a Prometheus server that scrapes this process, by prometheus-client."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

from .catalog import METRICS
from .instruments import Labels


class PrometheusInstruments:
    """The catalog in a registry of its own."""

    def __init__(self, prefix: str) -> None:
        self._registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            name = prefix + metric.name
            if metric.kind == "histogram":
                made: Any = Histogram(name, metric.help, metric.labels, buckets=metric.buckets, registry=self._registry)
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                made = kind(name, metric.help, metric.labels, registry=self._registry)
            self._metrics[metric.name] = made
        self._series: dict[tuple[str, Labels], Any] = {}

    def add(self, name: str, labels: Labels, amount: float) -> None:
        self._one(name, labels).inc(amount)

    def set(self, name: str, labels: Labels, value: float) -> None:
        self._one(name, labels).set(value)

    def observe(self, name: str, labels: Labels, value: float) -> None:
        self._one(name, labels).observe(value)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text of all metrics and its content type, in the format that an Accept header prefers."""
        encode, content_type = choose_encoder(accept)
        if content_type.startswith("application/openmetrics-text"):
            # Other escapings replace the colon of a prefix, although every scraper takes it.
            text: bytes = openmetrics.generate_latest(self._registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
            return text, content_type
        return encode(self._registry), content_type

    def _one(self, name: str, labels: Labels) -> Any:
        series = self._series.get((name, labels))
        if series is None:
            series = self._metrics[name].labels(*labels)
            self._series[name, labels] = series
        return series
