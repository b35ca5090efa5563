"""Metrics, and the log of requests."""

from __future__ import annotations

import asyncio
import json

import httpx

from shoal.cluster.replicas.async_engines import AsyncEngines
from shoal.cluster.replicas.engine_thread import EngineThread
from shoal.cluster.server.state import ServerState
from tests.support.app import serve


def series(text: str) -> dict[str, float]:
    """The values of a scrape by name and labels."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_count_what_was_answered(engines: EngineThread) -> None:
    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        async def scrape() -> dict[str, float]:
            response = await http.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            return series(response.text)

        label = '{model_name="shoal-tiny"}'
        await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        before = await scrape()
        whole = await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True})
        await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True, "stream": True})
        after = await scrape()
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        assert whole.status_code == 200, whole.text
        num_prompt_tokens = whole.json()["usage"]["prompt_tokens"]
        assert grown[f"shoal_prompt_tokens_total{label}"] == 2 * num_prompt_tokens
        assert grown[f"shoal_generation_tokens_total{label}"] == 10
        assert grown['shoal_request_success_total{finished_reason="length",model_name="shoal-tiny"}'] == 2
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
            assert grown[f"shoal_{name}_seconds_count{label}"] == 2
        assert grown[f"shoal_inter_token_latency_seconds_count{label}"] == 4, "the gaps of the stream"
        assert (
            after[f"shoal_time_to_first_token_seconds_sum{label}"]
            <= after[f"shoal_e2e_request_latency_seconds_sum{label}"]
        )
        engine = '{engine="mixed:0",model_name="shoal-tiny",role="mixed"}'
        assert after[f"shoal_num_requests_running{engine}"] == 0
        assert grown[f"shoal_prefix_cache_queries_total{engine}"] > 0
        asked = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True}
        asking = asyncio.ensure_future(http.post("/v1/completions", json=asked))
        while (await scrape())[f"shoal_num_requests_running{engine}"] == 0:
            assert not asking.done()
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while (await scrape())[f"shoal_num_requests_running{engine}"] > 0:
            await asyncio.sleep(0.01)
        scraped = await http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert scraped.headers["content-type"].startswith("application/openmetrics-text")

    serve(engines, use)


def test_every_request_has_a_line_in_the_log(engines: EngineThread) -> None:
    lines: list[str] = []
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "X-Request-Id": "mine"}

    async def use(http: httpx.AsyncClient, client: AsyncEngines, state: ServerState) -> None:
        asked = {"prompt": [21, 22, 23], "max_tokens": 4, "ignore_eos": True}
        await http.post("/v1/completions", json=asked, headers=trace)
        await http.post("/v1/completions", json={**asked, "stream": True, "n": 2})
        await http.post("/v1/completions", json={**asked, "max_tokens": 0})
        asking = asyncio.ensure_future(http.post("/v1/completions", json={**asked, "max_tokens": 1500}))
        while client.num_requests == 0:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    serve(engines, use, lines=lines)
    whole, streamed, refused, left = map(json.loads, lines)
    assert {name: whole[name] for name in ("status", "request_id", "path", "traceparent")} == {
        "status": 200,
        "request_id": "mine",
        "path": "/v1/completions",
        "traceparent": trace["traceparent"],
    }
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["finish_reasons"]) == (3, 4, ["length"])
    assert whole["e2e_s"] >= whole["prefill_s"] + whole["decode_s"] > 0
    assert (streamed["completion_tokens"], streamed["finish_reasons"]) == (8, ["length", "length"])
    assert (refused["status"], refused["code"]) == (400, "invalid_parameter")
    assert (left["status"], left["finish_reasons"]) == (499, [])
