"""docs/metrics.md has the table of the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from shoal.cluster.metrics.catalog import ENGINE, METRICS, Metric
from shoal.runtime.types import RequestMetrics
from tests.support.tables import write_or_compare

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"

BEFORE = """\
# Metrics

Names, kinds and labels are vLLM's where the meaning is the same. Names begin with `shoal_`, or what `metrics_prefix`
([settings](settings.md#engine)) says: `vllm:` serves dashboards made for vLLM.
"""

AFTER = """\
- `role` is prefill, decode or mixed, and `engine` is an attention group such as `decode:0`. Both are `driver` for
  sequences that no engine has yet.
- `model_name` is the served name, elsewhere the name of the model directory.
- `finished_reason` is stop, length, error or abort.
- Each prompt of an HTTP request is a request here. One with several samples (`n`) begins with the first token of any
  and ends with the last one of all. Only streams of one sample have gaps between tokens.
- Counters go on after a lost worker is replaced, and start at 0 with each process.

Not exported: the times of parts of a step (`moe_dispatch_seconds`, `moe_combine_seconds`, `dsa_indexer_seconds`) and
`expert_load_imbalance`, which engines do not measure while they serve.

## Prometheus

`shoal serve` answers `GET /metrics`, in Prometheus' text format or in OpenMetrics, as the scraper asks. It needs a key
where the other routes do:

```yaml
scrape_configs:
  - job_name: shoal
    authorization: {credentials_file: /etc/shoal/key}  # where the server has keys
    static_configs: [{targets: ["localhost:8000"]}]
```

[shoal.json](../examples/grafana/shoal.json) is a Grafana board of all of these; `prefix` at its top is the beginning of
the names.

## Ray

`shoal batch`, `shoal serve` and `LLM` with engines on Ray, and [Ray Data processors](ray-data.md), export the metrics
by Ray's exporter too, where `ray[default]` is installed. Names then begin with `ray_shoal_`, which is the `prefix` of
the board, and have Ray's labels too, such as `WorkerId`. With `metrics_prefix` `vllm:` they begin with `ray_vllm_`, and
Ray's own board for LLMs shows them; its KV cache usage is the sum over the engines of a driver. Ray estimates `_sum`
of histograms from their buckets.

## Single requests

`RequestOutput.metrics` of `LLM` has the times of a request in seconds since 1970, None where one is not known:
"""

LOG = """\
Its properties `queue_s`, `prefill_s`, `decode_s`, `time_to_first_token_s` and `e2e_s` are the seconds between them.

`shoal serve` prints a line of JSON for every completion that is asked for, unless `log_requests` is false. It has
neither prompt nor answer, but `message` may quote a bad value:

| field | |
|---|---|
| `time` | end of the request, in seconds since 1970 |
| `request_id` | the one in the response's `X-Request-Id`, which the client may give |
| `path` | route |
| `traceparent` | the header, if there was one |
| `status` | HTTP status; 499: the client left |
| `code`, `message` | why it was refused |
| `finish_reasons` | one per sample that ended |
| `prompt_tokens`, `completion_tokens`, `cached_tokens` | counts |
| `queue_s`, `prefill_s`, `decode_s`, `e2e_s` | seconds, of the last prompt of several |
"""


def row(metric: Metric) -> str:
    others = [name for name in metric.labels if name != "model_name"]
    return f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{name}`' for name in others)} | {metric.help} |"


def document() -> Iterator[str]:
    yield BEFORE
    yield "Every metric has the label `model_name`. `make docs` writes this table from the code.\n"
    yield "| name | kind | more labels | |"
    yield "|---|---|---|---|"
    yield from map(row, METRICS)
    yield ""
    yield AFTER
    yield "| field | |"
    yield "|---|---|"
    meanings = ("arrival", "start of the prompt's computation", "first token", "end")
    for field, meaning in zip(fields(RequestMetrics), meanings, strict=True):
        yield f"| `{field.name}` | {meaning} |"
    yield ""
    yield LOG.rstrip("\n")


@pytest.mark.docs
def test_the_document_lists_every_metric() -> None:
    write_or_compare(DOCUMENT, "\n".join(document()) + "\n")


def test_the_document_names_the_labels_of_engines() -> None:
    assert ENGINE == ("model_name", "role", "engine")
    assert {label for metric in METRICS for label in metric.labels} == {*ENGINE, "finished_reason"}
    assert all(f"`{label}`" in AFTER for label in (*ENGINE, "finished_reason"))
