"""Where the time of a step goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PHASES = (
    "scheduler",
    "batch building",
    "attention",
    "indexer",
    "dense mlp",
    "experts",
    "dispatch",
    "combine",
    "logits",
    "sampling",
    "collectives",
    "other",
)
"""Each without what is nested in it: dispatch, combine and attention do not count their exchanges, nor experts (norm,
router and shared expert included) the dispatch. Where a half of a layer is one kernel call (`kernels/fused.py`), the
indexer counts as attention, dispatch and combine as experts. other: embedding, detokenising, Python in between."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """What one rank spent on its steps so far; steps that computed nothing are left out."""

    num_steps: int
    seconds: dict[str, float]
    """One entry for each of PHASES."""

    def since(self, earlier: StepProfile) -> StepProfile:
        """Of the steps after `earlier` was taken."""
        seconds = {phase: total - earlier.seconds[phase] for phase, total in self.seconds.items()}
        return StepProfile(self.num_steps - earlier.num_steps, seconds)


class PhaseClock:
    """Divides the time of steps among phases; one thread at a time."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._num_steps = 0
        self._total = dict.fromkeys(PHASES, 0.0)
        self._step = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "other", 0.0

    def begin_step(self) -> None:
        self._step = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "other", self._now()

    def end_step(self, *, counts: bool) -> None:
        """`counts`: whether the step computed something."""
        self.switch("other")
        if counts:
            self._num_steps += 1
            self._total = {phase: total + self._step[phase] for phase, total in self._total.items()}

    def switch(self, phase: str) -> str:
        """Let `phase` begin; returns the one that it interrupts."""
        now, before = self._now(), self._phase
        self._step[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def watch(self, owner: object, method: str, phase: str) -> None:
        """From now on, this method of this object is `phase`; so is what it returns, if that is a function."""
        setattr(owner, method, self._timed(getattr(owner, method), phase))

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(phase)
            try:
                result = function(*args, **kwargs)
            finally:
                self.switch(before)
            return self._timed(result, phase) if callable(result) else result

        return timed

    def profile(self) -> StepProfile:
        """Any thread may ask."""
        return StepProfile(self._num_steps, dict(self._total))
