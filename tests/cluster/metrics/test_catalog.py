"""Names and kinds of metrics, which dashboards depend on."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.metrics.catalog import ENGINE, METRICS, MODEL

RAYS_BOARD = "dashboard/modules/metrics/dashboards/data_llm_dashboard_panels.py"
NOT_IN_SHOAL = {"num_requests_swapped"}
"""Sequences are computed again and not swapped: this line of Ray's board stays empty."""


def test_names_kinds_and_labels() -> None:
    expected = {
        **dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), ("gauge", ENGINE)),
        **dict.fromkeys(("prompt_tokens_total", "generation_tokens_total", "recoveries_total"), ("counter", MODEL)),
        "request_success_total": ("counter", ("model_name", "finished_reason")),
        **dict.fromkeys(
            (
                "num_preemptions_total",
                "prefix_cache_queries_total",
                "prefix_cache_hits_total",
                "kv_transfer_bytes_total",
                "kv_transfer_failures_total",
            ),
            ("counter", ("model_name", "role", "engine")),
        ),
        **dict.fromkeys(
            (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "request_time_per_output_token_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
                "request_prompt_tokens",
                "request_generation_tokens",
            ),
            ("histogram", MODEL),
        ),
    }
    assert {metric.name: (metric.kind, metric.labels) for metric in METRICS} == expected
    assert len(METRICS) == len(expected)


def test_buckets_grow_and_only_histograms_have_them() -> None:
    for metric in METRICS:
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert metric.buckets == tuple(sorted(set(metric.buckets)))
        assert all(bound > 0 for bound in metric.buckets), "Ray wants positive ones"
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name


def test_the_board_of_ray_finds_its_metrics() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / RAYS_BOARD).read_text()
    found = set(re.findall(r"\bray_vllm_(\w+)", text))
    histograms = {metric.name for metric in METRICS if metric.kind == "histogram"}
    wanted = {re.sub(r"_(sum|count|bucket)$", "", name) for name in found}
    assert len(wanted) > 10
    assert wanted - NOT_IN_SHOAL <= {metric.name for metric in METRICS}
    assert {name for name in wanted if name not in found} <= histograms


@pytest.mark.parametrize("prefix", ["shoal_", "vllm:", "vllm_", "A1_", "_", "x"])
def test_prefixes_that_are_taken(prefix: str) -> None:
    assert EngineArgs(model="m", metrics_prefix=prefix).metrics_prefix == prefix


@pytest.mark.parametrize("prefix", ["", ":", "1a_", "vllm::", "a:b", "a-b", "é_", "a b", "a_\n", " a"])
def test_prefixes_that_are_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="metrics_prefix must be"):
        EngineArgs(model="m", metrics_prefix=prefix)
