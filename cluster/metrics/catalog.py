"""The table of metrics. Names are vLLM's where the meaning is the same, for dashboards and adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODEL = ("model_name",)
ENGINE = ("model_name", "role", "engine")
"""role: prefill, decode or mixed. engine: an attention group, as in decode:0. Both are "driver" for sequences that no
engine has yet."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; its series differ in their labels, whose values are few."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = MODEL
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


METRICS = (
    Metric("num_requests_running", "gauge", "Sequences that engines compute.", ENGINE),
    Metric("num_requests_waiting", "gauge", "Sequences that wait to be computed.", ENGINE),
    Metric("kv_cache_usage_perc", "gauge", "Share of the KV cache in use by sequences; 1 is all of it.", ENGINE),
    Metric("prompt_tokens_total", "counter", "Prompt tokens of requests that were prefilled."),
    Metric("generation_tokens_total", "counter", "Tokens that were generated."),
    Metric("request_success_total", "counter", "Samples that ended, by any reason.", (*MODEL, "finished_reason")),
    Metric("num_preemptions_total", "counter", "Sequences whose KV cache blocks were taken from them.", ENGINE),
    Metric("prefix_cache_queries_total", "counter", "Tokens that were looked up in the prefix cache.", ENGINE),
    Metric("prefix_cache_hits_total", "counter", "Tokens that were found in the prefix cache.", ENGINE),
    Metric("kv_transfer_bytes_total", "counter", "KV cache bytes published by prefill, received by decode.", ENGINE),
    Metric("kv_transfer_failures_total", "counter", "Prompts that came incomplete from a prefill engine.", ENGINE),
    Metric("recoveries_total", "counter", "Workers that were lost."),
    Metric("time_to_first_token_seconds", "histogram", "From the arrival to the first token.", MODEL, _SECONDS),
    Metric("inter_token_latency_seconds", "histogram", "Between two tokens of a stream.", MODEL, _SECONDS),
    Metric(
        "request_time_per_output_token_seconds",
        "histogram",
        "Decode time over the tokens after the first.",
        MODEL,
        _SECONDS,
    ),
    Metric("e2e_request_latency_seconds", "histogram", "From the arrival to the end of a request.", MODEL, _SECONDS),
    Metric(
        "request_queue_time_seconds", "histogram", "From the arrival until the prompt is scheduled.", MODEL, _SECONDS
    ),
    Metric("request_prefill_time_seconds", "histogram", "From then to the first token.", MODEL, _SECONDS),
    Metric("request_decode_time_seconds", "histogram", "From the first token to the end.", MODEL, _SECONDS),
    Metric("request_prompt_tokens", "histogram", "Prompt tokens of a request.", MODEL, _TOKENS),
    Metric("request_generation_tokens", "histogram", "Generated tokens of a request.", MODEL, _TOKENS),
)
