"""The whole batch job over a simulated cluster: real files, killed drivers, full disks; the outputs never differ."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from shoal.cluster.exit_codes import ExitCode
from shoal.cluster.jobs import journal as journal_module
from shoal.cluster.jobs import output as batch_output_module
from shoal.cluster.jobs.job import JobResult, JobSpec, run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.row_output import answered_row
from shoal.cluster.jobs.rows import BatchRow, read_row
from shoal.cluster.jobs.stop_signal import StopSignal
from shoal.cluster.openai.requests import RequestDefaults
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import CompletionOutput, RequestOutput
from tests.support.batch_input import job_input
from tests.support.stub_job import AllowedErrors

from .cluster import Cluster, installed, replaced
from .faults import Plan
from .model import BROKEN, VOCAB_SIZE, Row, random_rows
from .run import MAX_LIVES, MAX_PROMPT, MAX_TOKENS, random_layout
from .virtual import DriverKilled, World

pytestmark = pytest.mark.slow

NUM_SEEDS = 200
RULES = RequestDefaults(limits=RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=MAX_PROMPT + MAX_TOKENS))
PARAMS = ("n", "max_tokens", "seed", "ignore_eos")


class Disk:
    """The module `os` with a disk that fills up, or whose writer is killed; `fsync`, which takes long, does nothing."""

    def __init__(self, world: World, writes_left: int = -1, *, is_full: bool = False) -> None:
        self._world, self._writes_left, self._is_full = world, writes_left, is_full

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        pass

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._writes_left -= 1
        if self._writes_left != 0:
            return os.pwrite(fd, data, offset)
        os.pwrite(fd, data[: self._world.rng.randint(0, len(data))], offset)
        if not self._is_full:
            self._world.kill_driver()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("seed", range(0, NUM_SEEDS, 10))
def test_a_job_that_dies_again_and_again_answers_the_same(tmp_path: Path, seed: int) -> None:
    num_ends: dict[int | None, int] = {}
    for number in range(seed, seed + 10):
        for end in run_to_the_end(tmp_path / str(number), Random(number)):
            num_ends[end] = num_ends.get(end, 0) + 1
    assert num_ends[ExitCode.OK] == 10


def run_to_the_end(directory: Path, rng: Random) -> Iterator[int | None]:
    """The exit codes of one job's runs; None for one that was killed."""
    directory.mkdir()
    rows = write_input(directory / "input.jsonl", rng)
    expected = digest_of(rows)
    layout = random_layout(rng)
    asked = {row.request.request_id: Row(row.request) for row in rows}
    for life in range(MAX_LIVES):
        is_last = life == MAX_LIVES - 1
        world = World(Random(rng.random()))
        plan = Plan(rng, num_faults=0 if is_last else rng.choice([0, 1, 2]), kill_driver=not is_last)
        disk = Disk(world, -1 if is_last else rng.randint(1, 40), is_full=rng.random() < 0.5)
        result = run_once(directory, Cluster(world, layout, asked, plan), disk)
        yield None if result is None else result.exit_code
        if result is not None and result.exit_code == ExitCode.OK:
            assert result.digest == expected
            check_files(directory / "output", asked)
            shutil.rmtree(directory)
            return
        assert result is None or result.exit_code == ExitCode.DRAINED, result


def run_once(directory: Path, cluster: Cluster, disk: Disk) -> JobResult | None:
    spec = JobSpec(
        input=job_input(directory / "input.jsonl"),
        output=directory / "output",
        identity={},
        rules=RULES,
        model_name="simulated",
        stop_at_error_limit=False,
        error_limit=AllowedErrors(100),
    )
    progress = ProgressReporter(io.StringIO())
    with (
        StopSignal() as stop,
        installed(cluster),
        replaced(journal_module, os=disk),
        replaced(batch_output_module, os=Disk(cluster.world)),
    ):
        try:
            return run_job(spec, cluster.start, stop=stop, progress=progress, clock=cluster.world.monotonic)
        except DriverKilled:
            return None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return None  # the disk was full when the directory was opened


def write_input(path: Path, rng: Random) -> list[BatchRow]:
    with path.open("w") as file:
        for row in random_rows(rng, rng.randint(2, 5), max_prompt=MAX_PROMPT, max_tokens=MAX_TOKENS).values():
            params = {name: getattr(row.request.params, name) for name in PARAMS}
            file.write(json.dumps({"prompt_token_ids": row.request.prompt_token_ids, **params}) + "\n")
    return [read_row(row, RULES) for row in job_input(path).rows()]


def digest_of(rows: list[BatchRow]) -> str:
    """Digest of the answers, which are known without an engine."""
    hashed = hashlib.sha256()
    for row in rows:
        outputs = []
        for index, answer in enumerate(Row(row.request).answers):
            broken = answer.finish_reason == "error"
            output = CompletionOutput(index=index, text="", token_ids=answer.output, logprobs=answer.logprobs())
            output.cumulative_logprob = sum(p.logprob for logprobs in answer.logprobs() for p in logprobs.values())
            output.finish_reason, output.error = answer.finish_reason, BROKEN if broken else None
            outputs.append(output)
        answered = RequestOutput(
            request_id=row.request.request_id,
            prompt_token_ids=list(row.request.prompt_token_ids),
            outputs=outputs,
            finished=True,
        )
        hashed.update(answered_row(row, answered, "simulated", None).digest)
    return f"sha256:{hashed.hexdigest()}"


def check_files(output: Path, asked: dict[str, Row]) -> None:
    """Each row is in one of the files, once, and the answers are right."""
    found = []
    for name in ("part-00000.jsonl", "errors.jsonl"):
        for line in (output / name).read_text().splitlines():
            row = json.loads(line)
            found.append(row["custom_id"])
            answers = asked[row["custom_id"]].answers
            failed = any(answer.finish_reason == "error" for answer in answers)
            assert failed == (name == "errors.jsonl")
            if not failed:
                choices = row["response"]["body"]["choices"]
                assert [c["token_ids"] for c in choices] == [a.output for a in answers]
    assert sorted(found) == sorted(asked)
