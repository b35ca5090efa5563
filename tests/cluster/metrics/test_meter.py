"""What the meter tells of requests and engines, with values computed by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from shoal.cluster.metrics.catalog import METRICS
from shoal.cluster.metrics.instruments import Labels
from shoal.cluster.metrics.meter import LOOK_S, RequestMeter, no_meter
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.response import ResponseAssembler
from shoal.runtime.types import (
    EngineOutput,
    Finished,
    FinishReason,
    GeneratedTokens,
    Prefilled,
    Request,
    RequestOutput,
    SamplingParams,
    Tokens,
)

CATALOG = {metric.name: metric for metric in METRICS}


class Recorder:
    """Instruments that keep everything, without the label of the model."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[str, ...]] = Counter()
        self.gauges: dict[tuple[str, ...], float] = {}
        self.observed: dict[str, list[float]] = {}

    def add(self, name: str, labels: Labels, amount: float) -> None:
        assert amount >= 0
        self.counters[self._key("counter", name, labels)] += amount  # type: ignore[assignment]

    def set(self, name: str, labels: Labels, value: float) -> None:
        self.gauges[self._key("gauge", name, labels)] = value

    def observe(self, name: str, labels: Labels, value: float) -> None:
        (key,) = self._key("histogram", name, labels)
        self.observed.setdefault(key, []).append(value)

    @staticmethod
    def _key(kind: str, name: str, labels: Labels) -> tuple[str, ...]:
        assert CATALOG[name].kind == kind
        assert len(CATALOG[name].labels) == len(labels)
        assert labels[0] == "m"
        return name, *labels[1:]


class Watched:
    """A meter, the clock that it reads, and engines with counters that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.recorder = Recorder()
        self.meter = RequestMeter([self.recorder], model_name="m", clock=lambda: self.now)
        self.groups: dict[str, EngineStats] = {}
        self.faults: list[object] = []
        self.answers: dict[str, ResponseAssembler] = {}

    def stats(self) -> dict[str, EngineStats]:
        return self.groups

    def arrive(self, name: str, *, at: float | None = None, **changes: Any) -> None:
        params = SamplingParams(n=changes.pop("n", 1), max_tokens=50)
        request = Request(request_id=name, prompt_token_ids=(5, 6, 7), params=params, **changes)
        self.answers[name] = ResponseAssembler(request)
        self.meter.arrived([request], at)

    def report(self, name: str, *outputs: EngineOutput) -> None:
        """Engines report something of a request, and its whole answer if that was the last part."""
        answer = self.answers[name]
        told: list[EngineOutput | RequestOutput] = [new for output in outputs if (new := answer.add(output))]
        if answer.finished:
            told.append(answer.output())
        self.meter.reported(told)

    def look(self, *, force: bool = True) -> None:
        self.meter.look(self, force=force)

    def gauge(self, name: str, role: str, engine: str) -> float:
        return self.recorder.gauges[name, role, engine]


def prefilled(name: str, scheduled_at: float, first_token_at: float) -> Prefilled:
    return Prefilled(id=RequestId(name), num_cached_tokens=0, scheduled_at=scheduled_at, first_token_at=first_token_at)


def tokens(name: str, start: int, count: int, sample: int = 0) -> Tokens:
    return Tokens(id=RequestId(name), sample_index=sample, start=start, token_ids=tuple(range(count)))


def end(name: str, num_tokens: int, reason: FinishReason = "stop", sample: int = 0) -> Finished:
    error = "it broke" if reason == "error" else None
    return Finished(id=RequestId(name), sample_index=sample, reason=reason, num_tokens=num_tokens, error=error)


def test_the_times_of_a_request() -> None:
    w = Watched()
    w.arrive("a", at=98.0)
    w.now = 101.0
    w.report("a", prefilled("a", scheduled_at=99.0, first_token_at=100.5), tokens("a", 0, 2))
    w.now = 104.0
    w.report("a", tokens("a", 2, 3))
    assert w.recorder.counters == {("prompt_tokens_total",): 3, ("generation_tokens_total",): 5}
    assert w.recorder.observed == {}, "nothing has ended, and nothing is streamed"
    w.now = 106.5
    w.report("a", end("a", 5))
    assert w.recorder.counters == {
        ("prompt_tokens_total",): 3,
        ("generation_tokens_total",): 5,
        ("request_success_total", "stop"): 1,
    }
    assert w.recorder.observed == {
        "time_to_first_token_seconds": [2.5],
        "e2e_request_latency_seconds": [8.5],
        "request_queue_time_seconds": [1.0],
        "request_prefill_time_seconds": [1.5],
        "request_decode_time_seconds": [6.0],
        "request_time_per_output_token_seconds": [1.5],  # 6 s for the four tokens after the first
        "request_prompt_tokens": [3],
        "request_generation_tokens": [5],
    }


def test_the_answer_has_its_metrics() -> None:
    w = Watched()
    w.arrive("a", at=98.0)
    w.report("a", prefilled("a", 99.0, 100.0), tokens("a", 0, 1))
    answer = w.answers["a"]
    answer.add(end("a", 1))
    output = answer.output()
    w.now = 103.0
    w.meter.reported([output])
    metrics = output.metrics
    assert (metrics.queue_s, metrics.prefill_s, metrics.decode_s, metrics.e2e_s) == (1.0, 1.0, 3.0, 5.0)


def test_the_clocks_of_two_machines_may_disagree() -> None:
    w = Watched()
    w.arrive("a", at=98.0)
    w.report("a", prefilled("a", scheduled_at=97.0, first_token_at=200.0), tokens("a", 0, 2), end("a", 2))
    assert w.recorder.observed["request_queue_time_seconds"] == [0.0]
    assert w.recorder.observed["request_decode_time_seconds"] == [0.0]


def test_the_gaps_of_a_stream() -> None:
    w = Watched()
    w.arrive("a", report="step")
    for at, start, count in [(101.0, 0, 1), (103.0, 1, 1), (106.0, 2, 3), (105.0, 5, 1)]:
        w.now = at
        w.report("a", tokens("a", start, count))
    # three tokens after three seconds; then the clock was set back
    assert w.recorder.observed == {"inter_token_latency_seconds": [2.0, 1.0, 1.0, 1.0, 0.0]}


def test_gaps_are_not_told_of_interleaved_samples() -> None:
    w = Watched()
    w.arrive("a", report="step", n=2)
    for sample in (0, 1, 0, 1):
        w.now += 1
        w.report("a", tokens("a", int(w.now - 101) // 2, 1, sample))
    assert w.recorder.counters["generation_tokens_total",] == 4
    assert w.recorder.observed == {}


def test_several_samples_are_one_request() -> None:
    w = Watched()
    w.arrive("a", at=100.0, n=3)
    w.report("a", prefilled("a", 100.0, 101.0), *(tokens("a", 0, 1, sample) for sample in range(3)))
    w.report("a", tokens("a", 1, 1, 1), end("a", 1), end("a", 2, "length", 1))
    w.now = 109.0
    w.report("a", tokens("a", 1, 4, 2), end("a", 5, "length", 2))
    assert w.recorder.counters["request_success_total", "stop"] == 1
    assert w.recorder.counters["request_success_total", "length"] == 2
    assert w.recorder.observed["e2e_request_latency_seconds"] == [9.0]
    assert w.recorder.observed["request_time_per_output_token_seconds"] == [2.0], "8 s, by the longest sample"
    assert w.recorder.observed["request_generation_tokens"] == [8]


def test_a_prompt_that_is_prefilled_again_counts_once() -> None:
    w = Watched()
    w.arrive("a")
    w.meter.reported([prefilled("a", 100.0, 101.0), prefilled("a", 102.0, 103.0)])
    assert w.recorder.counters == {("prompt_tokens_total",): 3}


def test_tokens_of_an_earlier_run_took_no_time_in_this_one() -> None:
    w = Watched()
    w.arrive("a", at=100.0, generated=(GeneratedTokens((0, 1, 2)),))
    w.report("a", prefilled("a", 100.0, 101.0), tokens("a", 0, 3), tokens("a", 3, 3))
    w.now = 105.0
    w.report("a", end("a", 6))
    assert w.recorder.counters["generation_tokens_total",] == 3
    assert w.recorder.observed["request_time_per_output_token_seconds"] == [2.0], "4 s for two tokens after the first"
    assert w.recorder.observed["request_generation_tokens"] == [6]


def test_requests_that_fail_or_are_given_up() -> None:
    w = Watched()
    w.arrive("failed")
    w.report("failed", end("failed", 0, "error"))
    w.arrive("left", n=3)
    w.report("left", tokens("left", 0, 1), end("left", 1))
    w.meter.dropped(["left", "unknown"])
    w.meter.dropped(["left"])
    w.meter.reported([tokens("left", 1, 1, 1)])
    assert w.recorder.counters == {
        ("request_success_total", "error"): 1,
        ("request_success_total", "stop"): 1,
        ("request_success_total", "abort"): 2,
        ("generation_tokens_total",): 1,
    }
    assert w.recorder.observed == {
        "e2e_request_latency_seconds": [0.0],
        "request_prompt_tokens": [3],
        "request_generation_tokens": [0],
    }, "nothing was prefilled"


def test_what_engines_hold() -> None:
    w = Watched()
    w.groups = {
        "prefill:0": EngineStats(num_running_seqs=1, num_waiting_seqs=2, num_blocks=10, num_used_blocks=4),
        "decode:0": EngineStats(num_running_seqs=3, num_blocks=8, num_used_blocks=8),
    }
    w.arrive("a", n=4)
    for number in range(5):
        w.arrive(f"b{number}")
    w.look()
    assert w.recorder.gauges == {
        ("num_requests_running", "prefill", "prefill:0"): 1,
        ("num_requests_waiting", "prefill", "prefill:0"): 2,
        ("kv_cache_usage_perc", "prefill", "prefill:0"): 0.4,
        ("num_requests_running", "decode", "decode:0"): 3,
        ("num_requests_waiting", "decode", "decode:0"): 0,
        ("kv_cache_usage_perc", "decode", "decode:0"): 1.0,
        ("num_requests_waiting", "driver", "driver"): 3,  # of 9 sequences
    }
    w.report("a", *(end("a", 0, sample=sample) for sample in range(2)))
    w.look()
    assert w.gauge("num_requests_waiting", "driver", "driver") == 1, "two samples have ended"
    w.meter.dropped(["b0", "b1"])
    w.look()
    assert w.gauge("num_requests_waiting", "driver", "driver") == 0, "the engines know it later: never below 0"


def test_nothing_is_held_when_no_request_is_open() -> None:
    w = Watched()
    w.groups = {"mixed:0": EngineStats(num_running_seqs=1, num_waiting_seqs=1, num_blocks=10, num_used_blocks=5)}
    w.arrive("a")
    w.look()
    assert w.gauge("kv_cache_usage_perc", "mixed", "mixed:0") == 0.5
    w.meter.dropped(["a"])
    w.look(force=False)
    assert set(w.recorder.gauges.values()) == {0}, "although the engine has not said so yet"


def test_counters_of_engines_grow_by_what_is_new() -> None:
    w = Watched()
    first = EngineStats(
        num_preemptions=1,
        prefix_cache_queries=20,
        prefix_cache_hits=4,
        num_failed_transfers=2,
        num_transferred_bytes=640,
    )
    w.groups = {"mixed:0": first}
    w.look()
    w.groups = {"mixed:0": first + EngineStats(prefix_cache_queries=7), "mixed:1": EngineStats(prefix_cache_queries=3)}
    w.look()
    w.look()
    here = ("mixed", "mixed:0")
    assert {key: value for key, value in w.recorder.counters.items() if value} == {
        ("num_preemptions_total", *here): 1,
        ("prefix_cache_queries_total", *here): 27,
        ("prefix_cache_hits_total", *here): 4,
        ("kv_transfer_failures_total", *here): 2,
        ("kv_transfer_bytes_total", *here): 640,
        ("prefix_cache_queries_total", "mixed", "mixed:1"): 3,
    }
    w.groups = {"mixed:0": EngineStats(prefix_cache_queries=5)}  # the recorder refuses to go down
    w.look()
    w.groups = {"mixed:0": EngineStats(prefix_cache_queries=8)}
    w.look()
    assert w.recorder.counters["prefix_cache_queries_total", *here] == 30


def test_lost_workers_are_counted_once() -> None:
    w = Watched()
    w.look()
    w.faults.append(object())
    w.look()
    w.look()
    w.faults += [object(), object()]
    w.look()
    assert w.recorder.counters["recoveries_total",] == 3


def test_busy_engines_are_looked_at_now_and_then() -> None:
    w = Watched()
    w.groups = {"mixed:0": EngineStats(num_running_seqs=1)}
    w.arrive("a")
    w.look(force=False)
    w.groups = {"mixed:0": EngineStats(num_running_seqs=2)}
    w.now += LOOK_S / 2
    w.look(force=False)
    assert w.gauge("num_requests_running", "mixed", "mixed:0") == 1
    w.now += LOOK_S / 2
    w.look(force=False)
    assert w.gauge("num_requests_running", "mixed", "mixed:0") == 2


def test_a_meter_without_instruments_asks_no_engine() -> None:
    class Engines:
        faults = ()

        def stats(self) -> dict[str, EngineStats]:
            pytest.fail("nobody wants to know")

    no_meter().look(Engines(), force=True)
