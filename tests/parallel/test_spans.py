"""Listeners see the spans of their names, in order."""

from __future__ import annotations

import pytest

from shoal.parallel.failpoints import SPAN_POINTS, Failpoints
from shoal.parallel.spans import SpanName, Spans


class Log:
    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen

    def enter(self, name: SpanName) -> None:
        self.seen.append(f"{self.name} enters {name}")

    def leave(self, name: SpanName) -> None:
        self.seen.append(f"{self.name} leaves {name}")


def test_listeners_see_the_spans_that_they_watch_and_nest() -> None:
    seen: list[str] = []
    spans = Spans()
    spans.add(Log("a", seen))
    spans.add(Log("b", seen), ["engine.run"])
    with spans("engine.step"), spans("engine.run"):
        seen.append("work")
    assert seen == [
        "a enters engine.step",
        "a enters engine.run",
        "b enters engine.run",
        "work",
        "b leaves engine.run",
        "a leaves engine.run",
        "a leaves engine.step",
    ]


def test_a_span_ends_when_an_exception_passes() -> None:
    seen: list[str] = []
    spans = Spans()
    spans.add(Log("a", seen))
    with pytest.raises(ValueError, match="broken"), spans("engine.run"):
        raise ValueError("broken")
    assert seen == ["a enters engine.run", "a leaves engine.run"]


def test_unwatched_spans_share_one_object() -> None:
    spans = Spans()
    assert spans("engine.run") is spans("engine.sample")


def test_failpoints_are_reached_before_or_after_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("shoal.parallel.failpoints.os.kill", lambda pid, signum: seen.append("killed"))
    spans = Spans()
    spans.add(Failpoints("mixed:0:engine.run:1,mixed:0:kv.publish:2", "mixed:0"), SPAN_POINTS)
    for name in ("kv.publish", "engine.run", "kv.publish", "model.attention"):
        with spans(name):
            seen.append(name)
    assert seen == ["kv.publish", "killed", "engine.run", "kv.publish", "killed", "model.attention"]
