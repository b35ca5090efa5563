from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.parallel.groups import single_process_groups
from shoal.parallel.spans import Spans
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.step_profile import (
    PHASE_OF_SPAN,
    PHASES,
    PhaseTimer,
    StepProfile,
    add_phase_timer,
    profile_of,
)
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import EngineOutput, Prefilled, Request, SamplingParams


class Work:
    """A device that takes a known time, by a clock of its own; it has done what was queued up to `reached`."""

    def __init__(self) -> None:
        self.time = 0.0
        self.reached = float("inf")
        self.is_capturing = False
        self.spans = Spans()
        self.timer = PhaseTimer(self)
        self.spans.add(self.timer, PHASE_OF_SPAN)

    def mark(self) -> float | None:
        return None if self.is_capturing else self.time

    def is_reached(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def run(self) -> None:
        with self.spans("engine.run"):
            self.time += 64
            with self.spans("model.attention"):
                self.time += 1
                self.exchange(fails=False)
                self.time += 2

    def exchange(self, *, fails: bool) -> None:
        with self.spans("collective"):
            self.time += 4
            if fails:
                raise ValueError("lost")


def only(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | seconds


def test_a_phase_does_not_count_what_is_nested_in_it() -> None:
    work = Work()
    work.run()  # outside a step
    with work.spans("engine.step"):
        work.time += 16
        work.run()
        work.exchange(fails=False)
        work.time += 32
    assert work.timer.profile() == StepProfile(1, only(model=64, attention=3, collectives=8, other=48))


def test_a_failed_phase_ends_too() -> None:
    work = Work()
    with work.spans("engine.step"):
        work.run()
        with pytest.raises(ValueError, match="lost"):
            work.exchange(fails=True)
        work.time += 16
    assert work.timer.profile() == StepProfile(1, only(model=64, attention=3, collectives=8, other=16))


def test_steps_that_compute_nothing_are_left_out() -> None:
    work = Work()
    with work.spans("engine.step"):
        work.run()
    before = work.timer.profile()
    with work.spans("engine.step"):
        work.exchange(fails=False)
    assert work.timer.profile() == before
    with work.spans("engine.step"):
        work.run()
    assert work.timer.profile().since(before) == StepProfile(1, only(model=64, attention=3, collectives=4))


def test_a_step_counts_once_the_device_has_done_it() -> None:
    work = Work()
    work.reached = 100.0
    for _ in range(2):
        with work.spans("engine.step"):
            work.run()
    assert work.timer.profile().num_steps == 1
    work.reached = 200.0
    with work.spans("engine.step"):
        work.run()
    assert work.timer.profile() == StepProfile(2, only(model=128, attention=6, collectives=8))


def test_kernels_that_are_captured_take_no_time_of_their_own() -> None:
    work = Work()
    with work.spans("engine.step"), work.spans("engine.run"):
        work.is_capturing = True
        work.run()
        work.is_capturing = False
    assert work.timer.profile() == StepProfile(1, only(model=71))


def without_times(output: EngineOutput) -> EngineOutput:
    return replace(output, scheduled_at=None, first_token_at=None) if isinstance(output, Prefilled) else output


def test_an_engine_that_is_timed_answers_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v32")
    config = EngineConfig(num_kv_blocks=8, block_size=16, max_model_len=64)
    answers: list[Any] = []
    for timed in (False, True):
        groups = single_process_groups()
        if timed:
            add_phase_timer(groups.spans, groups.device)
        engine = build_engine(tmp_path, config, groups)
        params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1)
        engine.add_request(Request(request_id="a", prompt_token_ids=tuple(range(3, 20)), params=params))
        outputs = [without_times(output) for _ in range(5) for output in engine.step().outputs]
        assert engine.step().idle
        answers.append(outputs)
    assert answers[0] == answers[1]
    profile = profile_of(engine.spans)
    assert profile.num_steps == 5
    # One process has no exchanges, and its layers are two kernel calls.
    assert {p for p, seconds in profile.seconds.items() if seconds == 0} == {
        "collectives",
        "indexer",
        "dispatch",
        "combine",
    }
