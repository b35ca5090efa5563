from __future__ import annotations

import torch

from shoal.parallel.spans import Spans
from shoal.runtime.engine.tracing import ProfilerRanges


def test_spans_are_ranges_of_a_trace() -> None:
    spans = Spans()
    spans.add(ProfilerRanges(), ["engine.run", "model.attention"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with spans("engine.run"), spans("model.attention"):
            torch.ones(2).sum()
        with spans("engine.sample"):
            pass
    events = {event.name: event for event in profile.events() or []}
    assert {"engine.run", "model.attention"} <= set(events)
    assert "engine.sample" not in events
    run, attention = events["engine.run"].time_range, events["model.attention"].time_range
    assert run.start <= attention.start <= attention.end <= run.end
