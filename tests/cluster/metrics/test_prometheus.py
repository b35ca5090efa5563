"""The text of the metrics, read by the parsers of prometheus-client."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from shoal.cluster.metrics.catalog import METRICS
from shoal.cluster.metrics.prometheus import PrometheusInstruments

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
HERE = ("m", "decode", "decode:0")


def families(instruments: PrometheusInstruments, accept: str) -> dict[str, Family]:
    body, content_type = instruments.render(accept)
    is_openmetrics = accept == OPENMETRICS
    assert content_type.startswith("application/openmetrics-text" if is_openmetrics else "text/plain")
    found: Iterable[Family] = (parse_openmetrics if is_openmetrics else parse_text)(body.decode())
    return {family.name: family for family in found}


def values(family: Family) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values of a family by series and label values (sorted by label), without the times of creation."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["text", "openmetrics"])
@pytest.mark.parametrize("prefix", ["shoal_", "vllm:"])
def test_every_metric_is_rendered(prefix: str, accept: str) -> None:
    instruments = PrometheusInstruments(prefix)
    found = families(instruments, accept)
    kinds = {prefix + metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
    assert {name: family.type for name, family in found.items() if not name.endswith("_created")} == kinds
    helps = {prefix + metric.name.removesuffix("_total"): metric.help for metric in METRICS}
    assert {name: found[name].documentation for name in helps} == helps


@pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["text", "openmetrics"])
@pytest.mark.parametrize("prefix", ["shoal_", "vllm:"])
def test_values_and_labels(prefix: str, accept: str) -> None:
    instruments = PrometheusInstruments(prefix)
    instruments.add("request_success_total", ("m", "stop"), 2)
    instruments.add("request_success_total", ("m", "stop"), 1)
    instruments.add("request_success_total", ("m", "length"), 0)
    instruments.set("kv_cache_usage_perc", HERE, 0.75)
    instruments.set("kv_cache_usage_perc", HERE, 0.25)
    for value in (0.004, 0.3, 0.5, 10_000.0):
        instruments.observe("time_to_first_token_seconds", ('a "quoted"\\ name\n',), value)
    found = families(instruments, accept)
    name = f"{prefix}request_success"
    assert values(found[name]) == {(f"{name}_total", ("stop", "m")): 3, (f"{name}_total", ("length", "m")): 0}
    name = f"{prefix}kv_cache_usage_perc"
    assert values(found[name]) == {(name, ("decode:0", "m", "decode")): 0.25}
    name = f"{prefix}time_to_first_token_seconds"
    model = 'a "quoted"\\ name\n'
    series = values(found[name])
    assert series[f"{name}_count", (model,)] == 4
    assert series[f"{name}_sum", (model,)] == pytest.approx(10_000.804)
    buckets = {sample.labels["le"]: sample.value for sample in found[name].samples if sample.name == f"{name}_bucket"}
    assert (buckets["0.002"], buckets["0.005"], buckets["0.5"], buckets["600.0"], buckets["+Inf"]) == (0, 1, 3, 3, 4)


def test_two_registries_are_apart() -> None:
    one, other = PrometheusInstruments("shoal_"), PrometheusInstruments("shoal_")
    one.add("recoveries_total", ("m",), 1)
    assert values(families(one, "")["shoal_recoveries"])
    assert not values(families(other, "")["shoal_recoveries"])


def test_counters_do_not_go_down() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        PrometheusInstruments("shoal_").add("recoveries_total", ("m",), -1)
