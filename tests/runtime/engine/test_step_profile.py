from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.engine.profiled_engine import ProfiledEngine
from shoal.runtime.engine.step_profile import PHASES, PhaseClock, StepProfile
from shoal.runtime.types import Request, SamplingParams
from tests.support.checkpoints import make_checkpoint


class Work:
    """Parts that take a known time by a clock of their own."""

    def __init__(self) -> None:
        self.time = 0.0

    def attend(self) -> str:
        self.time += 1
        self.exchange(fails=False)
        self.time += 2
        return "attended"

    def exchange(self, *, fails: bool) -> None:
        self.time += 4
        if fails:
            raise ValueError("lost")


def watched() -> tuple[Work, PhaseClock]:
    work = Work()
    clock = PhaseClock(lambda: work.time)
    clock.watch(work, "attend", "attention")
    clock.watch(work, "exchange", "collectives")
    return work, clock


def only(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | seconds


def test_a_phase_does_not_count_what_is_nested_in_it() -> None:
    work, clock = watched()
    work.attend()  # outside a step
    clock.begin_step()
    work.time += 16
    assert work.attend() == "attended"
    work.exchange(fails=False)
    work.time += 32
    clock.end_step(counts=True)
    assert clock.profile() == StepProfile(1, only(attention=3, collectives=8, other=48))


def test_a_failed_phase_ends_too() -> None:
    work, clock = watched()
    clock.begin_step()
    with pytest.raises(ValueError, match="lost"):
        work.exchange(fails=True)
    work.time += 16
    clock.end_step(counts=True)
    assert clock.profile() == StepProfile(1, only(collectives=4, other=16))


def test_steps_without_work_are_left_out() -> None:
    work, clock = watched()
    clock.begin_step()
    work.attend()
    clock.end_step(counts=True)
    before = clock.profile()
    clock.begin_step()
    work.exchange(fails=False)
    clock.end_step(counts=False)
    assert clock.profile() == before
    clock.begin_step()
    work.exchange(fails=False)
    clock.end_step(counts=True)
    assert clock.profile().since(before) == StepProfile(1, only(collectives=4))


def test_an_engine_that_measures_answers_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v32")
    config = EngineConfig(num_kv_blocks=8, block_size=16, max_model_len=64)
    answers: list[Any] = []
    for engine_class in (Engine, ProfiledEngine):
        engine = engine_class(tmp_path, config, single_process_groups())
        params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1)
        engine.add_request(Request(request_id="a", prompt_token_ids=tuple(range(3, 20)), params=params))
        outputs = [output for _ in range(5) for output in engine.step().outputs]
        assert engine.step().idle
        answers.append(outputs)
    assert answers[0] == answers[1]
    assert isinstance(engine, ProfiledEngine)
    profile = engine.profile()
    assert profile.num_steps == 5
    # One process has no exchanges, and its layers are two kernel calls.
    assert {p for p, seconds in profile.seconds.items() if seconds == 0} == {
        "collectives",
        "indexer",
        "dispatch",
        "combine",
    }
