"""Watches the requests of a driver and its engines, and tells instruments about them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.types import EngineOutput, Finished, Prefilled, Request, RequestOutput, Tokens

from .instruments import Instruments

LOOK_S = 0.25
"""Shortest time between two looks at the engines."""
DRIVER = ("driver", "driver")
"""Role and engine of what no engine has yet."""

_COUNTERS = {
    "num_preemptions_total": "num_preemptions",
    "prefix_cache_queries_total": "prefix_cache_queries",
    "prefix_cache_hits_total": "prefix_cache_hits",
    "kv_transfer_bytes_total": "num_transferred_bytes",
    "kv_transfer_failures_total": "num_failed_transfers",
}
"""Metric: field of `EngineStats`."""


class WatchedEngines(Protocol):
    """What a meter reads of an engine client."""

    @property
    def faults(self) -> Sequence[object]:
        """Lost workers."""
        ...

    def stats(self) -> Mapping[str, EngineStats]:
        """Counters of every attention group's engine, by the group's name."""
        ...


@dataclass(slots=True)
class _OpenRequest:
    request: Request
    arrived_at: float
    num_open: int
    """Samples that have not ended."""
    is_prefilled: bool = False
    last_token_at: float | None = None


class RequestMeter:
    """Counts requests from their arrival to their end. Only one thread may use it at a time."""

    def __init__(
        self, instruments: Sequence[Instruments] = (), *, model_name: str, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock`: seconds since 1970."""
        self._instruments = instruments
        self._model = (model_name,)
        self._clock = clock
        self._open: dict[str, _OpenRequest] = {}
        self._looked_at = 0.0
        self._seen: dict[str, EngineStats] = {}
        self._num_faults = 0

    def arrived(self, requests: Sequence[Request], at: float | None = None) -> None:
        """Requests came, now or at a time that is over."""
        arrived_at = self._clock() if at is None else at
        for request in requests:
            self._open[request.request_id] = _OpenRequest(request, arrived_at, request.params.n)

    def reported(self, outputs: Sequence[EngineOutput | RequestOutput]) -> None:
        """The engines reported something. Completes the metrics of whole answers."""
        now = self._clock()
        num_tokens = 0
        for output in outputs:
            known = self._open.get(output.request_id)
            if known is None:
                continue
            match output:
                case Tokens():
                    num_tokens += len(output.token_ids)
                    self._observe_gaps(known, output, now)
                case Prefilled():
                    self._add_prompt(known)
                case Finished():
                    known.num_open -= 1
                    self._add("request_success_total", 1, output.reason)
                case RequestOutput():
                    del self._open[output.request_id]
                    self._finish(known, output, now)
        if num_tokens:
            self._add("generation_tokens_total", num_tokens)

    def dropped(self, request_ids: Sequence[str]) -> None:
        """Requests were given up by who asked."""
        for request_id in request_ids:
            known = self._open.pop(request_id, None)
            if known is not None and known.num_open:
                self._add("request_success_total", known.num_open, "abort")

    def look(self, engines: WatchedEngines, *, force: bool = False) -> None:
        """Read the engines' counters, unless that was done just before and requests are open."""
        is_due = force or not self._open or self._clock() - self._looked_at >= LOOK_S
        if not self._instruments or not is_due:
            return
        self._looked_at = self._clock()
        num_left = sum(known.num_open for known in self._open.values())
        for name, stats in engines.stats().items():
            labels = (*self._model, name.partition(":")[0], name)
            # What engines hold is told with a delay: nothing is there when no request is open.
            num_running = stats.num_running_seqs if self._open else 0
            num_waiting = stats.num_waiting_seqs if self._open else 0
            num_left -= num_running + num_waiting
            for one in self._instruments:
                one.set("num_requests_running", labels, num_running)
                one.set("num_requests_waiting", labels, num_waiting)
                one.set("kv_cache_usage_perc", labels, stats.kv_cache_usage if self._open else 0.0)
                for metric, field in _COUNTERS.items():
                    before = getattr(self._seen.get(name, EngineStats()), field)
                    one.add(metric, labels, max(0, getattr(stats, field) - before))
            self._seen[name] = stats
        num_faults = len(engines.faults)
        for one in self._instruments:
            one.set("num_requests_waiting", (*self._model, *DRIVER), max(0, num_left))
            one.add("recoveries_total", self._model, num_faults - self._num_faults)
        self._num_faults = num_faults

    def _add_prompt(self, known: _OpenRequest) -> None:
        # Another engine may prefill it once more, for the log-probabilities of the prompt.
        if not known.is_prefilled:
            known.is_prefilled = True
            self._add("prompt_tokens_total", len(known.request.prompt_token_ids))

    def _observe_gaps(self, known: _OpenRequest, tokens: Tokens, now: float) -> None:
        if known.request.report != "step" or known.request.params.n > 1:
            return
        if known.last_token_at is not None:
            # Several tokens at a time share the gap before them.
            gap = max(0.0, now - known.last_token_at) / len(tokens.token_ids)
            for _ in tokens.token_ids:
                self._observe("inter_token_latency_seconds", gap)
        known.last_token_at = now

    def _finish(self, known: _OpenRequest, output: RequestOutput, now: float) -> None:
        metrics = output.metrics
        metrics.arrival_time = known.arrived_at
        metrics.finished_time = now
        num_tokens = sum(len(sample.token_ids) for sample in output.outputs)
        given = [len(sample.token_ids) for sample in known.request.generated]  # by an earlier run
        given += [0] * (len(output.outputs) - len(given))
        longest = max(len(sample.token_ids) - num for sample, num in zip(output.outputs, given, strict=True))
        self._observe("time_to_first_token_seconds", metrics.time_to_first_token_s)
        self._observe("e2e_request_latency_seconds", metrics.e2e_s)
        self._observe("request_queue_time_seconds", metrics.queue_s)
        self._observe("request_prefill_time_seconds", metrics.prefill_s)
        self._observe("request_decode_time_seconds", metrics.decode_s)
        if metrics.decode_s is not None and longest > 1:
            self._observe("request_time_per_output_token_seconds", metrics.decode_s / (longest - 1))
        self._observe("request_prompt_tokens", len(output.prompt_token_ids))
        self._observe("request_generation_tokens", num_tokens)

    def _add(self, name: str, amount: float, *labels: str) -> None:
        for one in self._instruments:
            one.add(name, (*self._model, *labels), amount)

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            for one in self._instruments:
                one.observe(name, self._model, value)


def no_meter() -> RequestMeter:
    """A meter that tells nobody."""
    return RequestMeter(model_name="")
