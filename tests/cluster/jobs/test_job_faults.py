"""A job whose process is killed at each of its failpoints, and what a job tells of workers that were lost."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.jobs.job import run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.stop_signal import StopSignal
from shoal.cluster.supervision.fault import Fault
from shoal.parallel.failpoints import POINTS, VARIABLE
from tests.support import stub_job
from tests.support.stub_job import StubEngines, make_spec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NUM_ROWS = 60


def write_input(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(NUM_ROWS)))
    return path


def run_process(source: Path, output: Path, faults: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(stub_job.__file__)), str(source), str(output), "0.05"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src"), VARIABLE: faults}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.parametrize("point", [p for p in POINTS if p.startswith("job.")])
def test_a_job_killed_at_a_failpoint_goes_on(tmp_path: Path, point: str) -> None:
    source = write_input(tmp_path / "in.jsonl")
    undisturbed = run_process(source, tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    nth = 1 if point == "job.finish" else 2
    killed = run_process(source, tmp_path / "out", f"driver:0:{point}:{nth}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_process(source, tmp_path / "out", f"driver:0:{point}:1")
    assert again.returncode == -signal.SIGKILL, again.stderr
    resumed = run_process(source, tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == undisturbed.stdout.splitlines()[-1]
    ids = [json.loads(line)["id"] for line in (tmp_path / "out" / "part-00000.jsonl").open()]
    assert sorted(ids) == sorted(f"batch_req_{i}" for i in range(NUM_ROWS))


def test_no_room_to_begin_with_is_no_end_either(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl")
    command = [sys.executable, str(Path(stub_job.__file__)), str(source), str(tmp_path / "out"), "0", "4"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    full = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert full.returncode == 75, full.stderr
    assert run_process(source, tmp_path / "out").returncode == 0


def test_losses_of_a_row_count_over_all_runs(tmp_path: Path) -> None:
    """A row that loses its workers must not begin anew with every resume."""
    source = write_input(tmp_path / "in.jsonl")

    def run(on_poll: Callable[[StubEngines], None]) -> tuple[int, StubEngines]:
        engines = StubEngines(per_poll=0, capacity=4)

        def poll(count: int) -> None:
            on_poll(engines)

        engines._on_poll = poll
        with StopSignal() as stop:
            result = run_job(
                make_spec(source, tmp_path / "out"),
                lambda: engines,
                stop=stop,
                progress=ProgressReporter(io.StringIO()),
            )
        return result.exit_code, engines

    def lose_then_fail(engines: StubEngines) -> None:
        if engines.told_losses:
            raise RuntimeError("the cluster is gone")
        engines.told_losses = True
        engines.losses = {engines.submitted[2]: engines.num_losses.get(engines.submitted[2], 0) + 1}

    first, engines = run(lose_then_fail)
    assert (first, engines.num_losses) == (5, {})
    second, engines = run(lose_then_fail)
    assert (second, engines.num_losses) == (5, {engines.submitted[2]: 1})
    third, engines = run(lose_then_fail)
    assert (third, engines.num_losses) == (5, {engines.submitted[2]: 2})


def fault(worker: str, **fields: Any) -> Fault:
    values: dict[str, Any] = {"replica": 1, "rank": 0, "reason": "its connection ended", "noticed_at": 5.0}
    return Fault(at="2026-01-01T00:00:00.000+00:00", worker=worker, node_id="n", silent_s=0.1, **(values | fields))


def test_losses_are_told_and_kept(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl")
    spec = make_spec(source, tmp_path / "out")

    def run(lost: list[Fault], change: dict[str, Any]) -> str:
        """A run that loses workers in its first poll; in the third, what is in `change` is known of the first loss."""
        engines = StubEngines(capacity=8, per_poll=2)

        def on_poll(count: int) -> None:
            if count == 1:
                engines.lost += lost
            if count == 3:
                for name, value in change.items():
                    setattr(engines.lost[0], name, value)
            if count == 8:
                os.kill(os.getpid(), signal.SIGINT)

        engines._on_poll = on_poll
        said = io.StringIO()
        with StopSignal() as stop:
            run_job(spec, lambda: engines, stop=stop, progress=ProgressReporter(said))
        return said.getvalue()

    mended = {"formed_s": 0.25, "first_token_s": 0.5, "num_replayed_requests": 1, "num_replayed_tokens": 7}
    said = run([fault("decode:0"), fault("spare:0", replica=None, rank=None)], mended)
    assert said.count("lost decode:0: its connection ended") == 1
    assert said.count("lost spare:0") == 1
    mending = "lost decode:0 (its connection ended), all ranks in their groups again after 250 ms, 1 rows interrupted"
    assert said.count(f"{mending}, 7 of their tokens computed again, first new token after 500 ms") == 1
    run([fault("prefill:0")], {})
    kept = json.loads((tmp_path / "out" / "faults.json").read_text())["faults"]
    assert [f["worker"] for f in kept] == ["decode:0", "spare:0", "prefill:0"]
    assert {name: kept[0][name] for name in mended} == mended
    assert kept[0]["at"] == "2026-01-01T00:00:00.000+00:00"
    assert "noticed_at" not in kept[0]


def test_without_a_loss_there_is_no_file(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl"), tmp_path / "out")
    with StopSignal() as stop:
        run_job(spec, StubEngines, stop=stop, progress=ProgressReporter(io.StringIO()))
    assert not (tmp_path / "out" / "faults.json").exists()
