"""The Grafana board asks for metrics that exist, by labels that they have."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.metrics.catalog import METRICS, Metric

BOARD = json.loads((Path(__file__).parents[3] / "examples" / "grafana" / "shoal.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
FROM_THE_SCRAPE = {"instance", "WorkerId"}
"""Labels that Prometheus and Ray add."""
SERIES = {
    metric.name + suffix: metric
    for metric in METRICS
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


def expressions() -> Iterator[str]:
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["definition"] for variable in VARIABLES.values() if variable["type"] == "query")


def used(expression: str) -> dict[str, tuple[Metric, set[str]]]:
    """Series in an expression, with their metric and the labels they are selected by."""
    found = re.findall(r"\$\{prefix\}(\w+)(?:\{([^}]*)\})?", expression)
    return {name: (SERIES[name], set(re.findall(r"(\w+)=~", selector))) for name, selector in found}


def test_every_metric_is_on_the_board_and_no_other() -> None:
    shown = {metric.name for expression in expressions() for metric, _ in used(expression).values()}
    assert shown == {metric.name for metric in METRICS}


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_expressions(expression: str) -> None:
    found = used(expression)
    assert found
    labels = set.intersection(*(set(metric.labels) for metric, _ in found.values()))
    for metric, selected in found.values():
        assert selected <= set(metric.labels), metric.name
    grouped = {name for names in re.findall(r"by \(([^)]*)\)", expression) for name in names.split(", ")}
    assert grouped <= labels | FROM_THE_SCRAPE | ({"le"} if "histogram_quantile" in expression else set())
    for metric, _ in found.values():
        is_rate = re.search(rf"(rate|increase)\(\$\{{prefix\}}{metric.name}", expression) is not None
        assert is_rate == (metric.kind != "gauge"), "counters grow, gauges do not"
    assert expression.count("(") == expression.count(")")
    assert expression.count('"') % 2 == 0
    variables = set(re.findall(r"\$\{?(\w+)", expression)) - {"__rate_interval"}
    assert variables <= VARIABLES.keys()


def test_variables() -> None:
    assert list(VARIABLES) == ["datasource", "prefix", "model_name", "role", "engine"]
    assert (VARIABLES["prefix"]["type"], VARIABLES["prefix"]["query"]) == ("textbox", "shoal_")
    sources = [place["datasource"] for place in [*PANELS, *VARIABLES.values()] if "datasource" in place]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_legends_name_labels_of_their_series() -> None:
    for target in (target for panel in PANELS for target in panel["targets"]):
        (grouped,) = {names.removeprefix("le, ") for names in re.findall(r"by \(([^)]*)\)", target["expr"])}
        assert re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]), target
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == set(grouped.split(", ")), target


def test_panels_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken = [
        (x, y)
        for panel in BOARD["panels"]
        for x, y in itertools.product(
            range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"]),
            range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"]),
        )
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) == 23
    for panel in PANELS:
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)
