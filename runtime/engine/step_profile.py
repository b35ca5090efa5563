"""Where the time of steps goes: a listener that divides it among phases."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from shoal.parallel.spans import SpanName, Spans

PHASE_OF_SPAN: Mapping[SpanName, str] = {
    "engine.schedule": "scheduler",
    "engine.agree": "batch building",
    "engine.prepare": "batch building",
    "engine.run": "model",
    "model.attention": "attention",
    "model.indexer": "indexer",
    "model.mlp": "dense mlp",
    "model.moe": "experts",
    "model.dispatch": "dispatch",
    "model.combine": "combine",
    "model.logits": "logits",
    "engine.launch_sampling": "sampling",
    "engine.sample": "sampling",
    "engine.update": "update",
    "collective": "collectives",
    "collective.wait": "collectives",
    "engine.step": "other",
}
PHASES = tuple(dict.fromkeys(PHASE_OF_SPAN.values()))
"""Each without what is nested in it: attention, dispatch and combine do not include their exchanges, nor experts (with
router and shared expert) the dispatch. Where half of a layer is one kernel call (`models/fused.py`), attention and
experts include their norms, and attention the indexer. model: embedding and norms; on a GPU, whole decode steps, as one
CUDA graph computes them. update: scheduler, detokenising and stop checks."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Seconds that one rank spent in its steps so far; steps that computed nothing are left out."""

    num_steps: int
    seconds: dict[str, float]
    """One entry for each of PHASES."""

    def since(self, earlier: StepProfile) -> StepProfile:
        """The profile of the steps after `earlier` was taken."""
        seconds = {phase: total - earlier.seconds[phase] for phase, total in self.seconds.items()}
        return StepProfile(self.num_steps - earlier.num_steps, seconds)


class StepClock(Protocol):
    """Marks points in the work of a device, which may come long after the host passed them."""

    def mark(self) -> Any:
        """This point; None if it cannot be marked."""
        ...

    def is_reached(self, mark: Any) -> bool: ...

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks that are reached."""
        ...


class HostClock:
    """Time of the host, which computes by itself."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Time of the current stream, from events."""

    def mark(self) -> torch.cuda.Event | None:
        if torch.cuda.is_current_stream_capturing():
            return None  # the kernels are recorded in a graph, not run
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3


class PhaseTimer:
    """Listens to the spans of a step and attributes the time between any two of their ends to one phase."""

    def __init__(self, clock: StepClock | None = None) -> None:
        self._clock: StepClock = clock or HostClock()
        self._profile = StepProfile(0, dict.fromkeys(PHASES, 0.0))
        self._open: list[str] = []
        """Phases of the spans that were entered, the innermost last."""
        self._marks: list[tuple[str, Any]] = []
        """Where each phase of this step began."""
        self._computes = False
        self._unread: deque[list[tuple[str, Any]]] = deque()
        """Marks of steps whose kernels may still run."""

    def enter(self, name: SpanName) -> None:
        if name == "engine.step":
            self._marks = []
            self._computes = False
        self._computes |= name == "engine.run"
        self._open.append(PHASE_OF_SPAN[name])
        self._begin(self._open[-1])

    def leave(self, name: SpanName) -> None:
        self._open.pop()
        self._begin(self._open[-1] if self._open else "other")
        if name == "engine.step" and self._computes:
            self._unread.append(self._marks)
            while self._unread and self._clock.is_reached(self._unread[0][-1][1]):
                self._read(self._unread.popleft())

    def profile(self) -> StepProfile:
        """The steps that ended by now. Any thread may ask."""
        return self._profile

    def _begin(self, phase: str) -> None:
        if (mark := self._clock.mark()) is not None:
            self._marks.append((phase, mark))

    def _read(self, marks: list[tuple[str, Any]]) -> None:
        seconds = dict(self._profile.seconds)
        for (phase, start), (_, end) in pairwise(marks):
            seconds[phase] += self._clock.seconds(start, end)
        self._profile = StepProfile(self._profile.num_steps + 1, seconds)


def add_phase_timer(spans: Spans, device: torch.device) -> None:
    """Time the phases of the steps that these spans belong to, by the clock of the device that computes them."""
    spans.add(PhaseTimer(CudaClock() if device.type == "cuda" else HostClock()), PHASE_OF_SPAN)


def profile_of(spans: Spans) -> StepProfile:
    """The profile of the phase timer that was added to these spans."""
    (timer,) = [listener for listener in spans.listeners("engine.step") if isinstance(listener, PhaseTimer)]
    return timer.profile()
