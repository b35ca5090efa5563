from __future__ import annotations

import io
import json
import re

import pytest

from shoal.cluster.jobs.progress import JobProgress, ProgressReporter, Rates, duration, plain_line, rates
from shoal.runtime.engine.stats import EngineStats


def at(completed: int, tokens: int, phase: str = "answering", num_rows: int | None = 100) -> JobProgress:
    return JobProgress(
        phase=phase,
        num_rows=num_rows,
        completed=completed,
        failed=2,
        in_flight=7,
        num_prompt_tokens=2 * tokens,
        num_output_tokens=tokens,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rates_count_from_the_start_of_this_process() -> None:
    assert rates(at(38, 1000), at(58, 3000), 10.0) == Rates(400.0, 200.0, 20.0)
    assert rates(at(38, 1000), at(38, 1000), 10.0).eta_s is None
    assert rates(at(0, 0, num_rows=None), at(5, 9, num_rows=None), 1.0).eta_s is None


def test_a_line_for_a_log() -> None:
    line = plain_line(at(58, 3000), Rates(400.0, 200.0, 20.0), {})
    assert line == "answering: 60/100 rows, 2 failed, 7 in flight, 400.0 tok/s in, 200.0 tok/s out, 0:20 left"
    engines = {
        "prefill": EngineStats(num_blocks=10, num_used_blocks=4, num_running_seqs=2),
        "decode": EngineStats(
            num_running_seqs=30,
            num_waiting_seqs=1,
            num_blocks=100,
            num_used_blocks=25,
            prefix_cache_queries=200,
            prefix_cache_hits=50,
            num_preemptions=3,
            num_failed_transfers=2,
        ),
    }
    assert plain_line(at(58, 3000), Rates(400.0, 200.0, 20.0), engines) == (
        line + "; prefill: 2 running, 0 waiting, KV cache 40%; decode: 30 running, 1 waiting, KV cache 25%, "
        "prefix cache hits 25%, 3 preempted, 2 transfers failed"
    )
    checking = JobProgress(phase="checking", num_rows=None, completed=5, failed=1)
    assert plain_line(checking, Rates(0.0, 0.0, None), {}) == "checking: 6/? rows, 1 failed"


def test_lines_for_programs() -> None:
    stream = Terminal()
    now = 0.0
    reporter = ProgressReporter(stream, log_format="json", clock=lambda: now, wall_clock=lambda: 1.75e9 + now)
    reporter.message('ray "1.0 s"')
    reporter.update(at(38, 1000))
    now = 10.0
    reporter.update(at(58, 3000), engines=lambda: {"decode": EngineStats(num_running_seqs=30)})
    reporter.close()
    message, progress = map(json.loads, stream.getvalue().splitlines())
    assert message == {"time": 1.75e9, "message": 'ray "1.0 s"'}
    assert progress["engines"]["decode"]["num_running_seqs"] == 30
    assert {name: value for name, value in progress.items() if name != "engines"} == {
        "time": 1.75e9 + 10,
        "phase": "answering",
        "num_rows": 100,
        "completed": 58,
        "failed": 2,
        "in_flight": 7,
        "num_prompt_tokens": 6000,
        "num_output_tokens": 3000,
        "prompt_tokens_per_s": 400.0,
        "output_tokens_per_s": 200.0,
        "eta_s": 20.0,
    }


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (360000, "100:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_plain_line_every_ten_seconds() -> None:
    now, stream = 0.0, io.StringIO()
    reporter = ProgressReporter(stream, clock=lambda: now)
    for tick in range(250):
        now = tick / 10
        reporter.update(at(tick, tick))
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(":")[1].split(" rows")[0] for line in lines] == [" 102/100", " 202/100"]
    reporter.update(at(9, 9), force=True)
    assert len(stream.getvalue().splitlines()) == 3


def test_a_terminal_gets_a_panel() -> None:
    now, stream = 0.0, Terminal()
    reporter = ProgressReporter(stream, clock=lambda: now)
    reporter.update(at(8, 0))
    now = 2.0
    reporter.update(at(48, 100), engines=lambda: {"mixed": EngineStats(num_running_seqs=5, num_blocks=4)})
    reporter.message("[weights] 2 s")
    reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "shoal: answering" in text
    assert "50 / 100" in text
    assert "50.0" in text
    assert "mixed engines" in text
    assert "5 running, 0 waiting, KV cache 0%" in text
    assert "[weights] 2 s" in text
