"""`shoal batch` on real Ray workers, killed while its rows are being answered, and run again."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from shoal.cluster.commands.batch import job_spec
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.config import JobConfig
from shoal.cluster.jobs.job import run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.stop_signal import StopSignal
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from tests.support.faults import gone

NUM_ROWS, MAX_TOKENS = 10, 800
DEADLINE_S = 300.0


def write_rows(path: Path) -> Path:
    rows = [
        {
            "prompt": f"row {i}, which is answered at length",
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "temperature": 0.8 * (i % 2),
            "n": 1 + i % 3 // 2,
        }
        for i in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def undisturbed_digest(model: Path, rows: Path, output: Path) -> str:
    """From one process without Ray."""
    args = EngineArgs(model=str(model), max_model_len=2048, num_threads_per_worker=1)
    spec = job_spec(JobConfig(input=str(rows), output=str(output), engine=args))
    threads = torch.get_num_threads()
    result = run_job(spec, lambda: InProcessEngine(args), stop=StopSignal(), progress=ProgressReporter(io.StringIO()))
    torch.set_num_threads(threads)
    assert result.digest is not None
    return result.digest


@contextmanager
def batch_process(model: Path, rows: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """`shoal batch`, which is killed at the end if it still runs."""
    command = [sys.executable, "-m", "shoal", "batch", str(rows), "--model", str(model), "--output", str(output)]
    layout = ["-dp", "2", "--max-model-len", "2048", "--num-threads-per-worker", "1"]
    process = subprocess.Popen([*command, *layout], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        # Two agents of Ray's end by themselves, a minute later.
        started = [pid for pid in descendants(process.pid) if b"Agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while left := [pid for pid in started if not gone(pid)]:
            assert time.monotonic() < deadline, f"processes {left} were left behind"
            time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """What a process has started, and those have started."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            children.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(
                int(status.parent.name)
            )
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def wait_for_journal(process: subprocess.Popen[str], journal: Path, num_bytes: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not journal.exists() or journal.stat().st_size < num_bytes:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.ray
def test_a_killed_driver_goes_on_in_the_middle_of_answers(tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    make_checkpoint(model, "deepseek_v32", seed=41, overrides={"vocab_size": 272, "max_position_embeddings": 2048})
    write_byte_tokenizer(model / "tokenizer.json")
    rows = write_rows(tmp_path / "rows.jsonl")

    journal, size = output / "journal.log", 0
    for more in (15_000, 50_000):  # the second time far enough that it has tokens of two runs
        with batch_process(model, rows, output) as process:
            wait_for_journal(process, journal, size + more)
            assert len(descendants(process.pid)) > 4, "Ray and two workers"
        size = journal.stat().st_size
    with batch_process(model, rows, output) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, stderr
    said = re.search(r"resuming (\d+) partially generated rows \((\d+) tokens\)", stderr)
    assert said is not None, stderr
    assert int(said[1]) > 0
    assert int(said[2]) > 100
    expected = undisturbed_digest(model, rows, tmp_path / "undisturbed")
    assert stdout.splitlines()[-1] == f"output digest: {expected}"
    ids = [json.loads(line)["id"] for line in (output / "part-00000.jsonl").open()]
    assert sorted(ids) == sorted(f"batch_req_{i}" for i in range(NUM_ROWS))
