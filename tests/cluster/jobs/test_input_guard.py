"""An input that changes while its job runs, or between two runs of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cluster.jobs.input import file_sha256
from shoal.cluster.jobs.job import JobResult, run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.stop_signal import StopSignal
from tests.support.stub_job import StubEngines, make_spec

NUM_ROWS = 40
LATE = '{"custom_id": "late", "prompt": "x"}\n{"custom_id": "r3", "prompt": "x"}\n'


def line(number: int, prompt: str = "x") -> str:
    return json.dumps({"custom_id": f"r{number}", "prompt": prompt}) + "\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(line(number) for number in range(NUM_ROWS)))
    return path


def run(source: Path, start: Callable[[], StubEngines], said: io.StringIO | None = None) -> JobResult:
    """A job as the command line makes it: its identity has the digest of the input as it is now."""
    num_bytes = source.stat().st_size
    spec = make_spec(source, source.parent / "out", input_bytes=num_bytes)
    spec = replace(spec, identity={**spec.identity, "input": file_sha256(source, num_bytes)})
    with StopSignal() as stop:
        return run_job(spec, start, stop=stop, progress=ProgressReporter(said or io.StringIO()))


def answered(source: Path) -> list[str]:
    return sorted(json.loads(row)["custom_id"] for row in (source.parent / "out" / "part-00000.jsonl").open())


EXPECTED = sorted(f"r{number}" for number in range(NUM_ROWS))


def test_lines_that_come_later_are_not_answered(source: Path) -> None:
    def start() -> StubEngines:
        with source.open("a") as file:
            file.write(LATE)
        return StubEngines()

    assert run(source, start).exit_code == 0
    assert answered(source) == EXPECTED


def test_a_job_goes_on_although_its_input_has_grown(source: Path) -> None:
    def fail(count: int) -> None:
        if count == 3:
            raise RuntimeError("the cluster is gone")

    assert run(source, lambda: StubEngines(on_poll=fail)).exit_code == 5
    with source.open("a") as file:
        file.write(LATE)
    said = io.StringIO()
    assert run(source, StubEngines, said).exit_code == 0
    assert answered(source) == EXPECTED
    assert f"has grown by {len(LATE)} bytes since the job was started: they are not read" in said.getvalue()


def test_a_row_that_was_rewritten_is_refused_by_its_line(source: Path) -> None:
    def start() -> StubEngines:
        lines = source.read_text().splitlines(keepends=True)
        source.write_text("".join([*lines[:30], line(30, "y"), *lines[31:]]))
        return StubEngines(capacity=4)

    with pytest.raises(ValueError, match=r"line 31 of the input is not what it was when the rows were checked"):
        run(source, start)


def test_an_input_that_was_cut_off_is_refused(source: Path) -> None:
    def start() -> StubEngines:
        source.write_text("".join(source.read_text().splitlines(keepends=True)[:35]))
        return StubEngines(capacity=4)

    with pytest.raises(ValueError, match=r"has 35 rows now, and had 40 when they were checked"):
        run(source, start)


def test_another_input_is_refused_between_runs(source: Path) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("the cluster is gone")

    assert run(source, lambda: StubEngines(on_poll=fail)).exit_code == 5
    source.write_text(line(0, "y") + source.read_text().split("\n", 1)[1] + LATE)
    with pytest.raises(ValueError, match=r"belongs to a job with another input"):
        run(source, StubEngines)
