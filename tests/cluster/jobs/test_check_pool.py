"""Rows checked in other processes."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.check_pool import CHUNK_ROWS, CheckFailed, CheckPool
from shoal.cluster.jobs.check_row import CheckedRow
from shoal.cluster.jobs.choose_checker import MIN_BYTES, choose_checker
from shoal.cluster.jobs.config import InputArgs
from shoal.cluster.jobs.input.files import InputFile
from shoal.cluster.jobs.input.rows import InputRow, JobInput
from shoal.cluster.jobs.job import run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.stop_signal import StopSignal
from shoal.cluster.jobs.validation import check_here
from shoal.cluster.openai.requests import RequestDefaults
from shoal.cluster.prompts import request_defaults
from shoal.runtime.request_limits import RequestLimits
from tests.support.batch_input import job_input
from tests.support.processes import descendants
from tests.support.stub_job import StubEngines, make_spec

pytestmark = pytest.mark.slow
ENGINE = EngineArgs(model=str(BUNDLED_MODEL), max_model_len=512)
LIMITS = RequestLimits(vocab_size=272, max_model_len=512)
SAMPLING = {"temperature": 0.5, "stop": ["\n"]}


@pytest.fixture(scope="module")
def rules() -> RequestDefaults:
    return request_defaults(ENGINE, SAMPLING, True)


def pool(num_processes: int, args: InputArgs | None = None) -> CheckPool:
    args = replace(args or InputArgs(), num_check_processes=num_processes)
    checker = choose_checker(args, ENGINE, [], limits=LIMITS, sampling=SAMPLING, thinking=True)
    assert isinstance(checker, CheckPool)
    return checker


def write_lines(path: Path, num_rows: int) -> Path:
    """Good rows of both forms, of all lengths, and bad ones."""
    with path.open("wb") as file:
        for i in range(num_rows):
            match i % 7:
                case 0:
                    file.write(b'{"prompt": "cut\n')
                case 1:
                    file.write(json.dumps({"id": i, "prompt": "x" * (i * i % 700), "n": 2}).encode() + b"\n")
                case 2:
                    file.write(b'\n{"prompt": "\xff"}\n')
                case 3:
                    file.write(json.dumps({"id": i // 20, "prompt": [i]}).encode() + b"\n")
                case _:
                    messages = [{"role": "user", "content": f"What is {i} + {i}? é</think>"}]
                    body = {"messages": messages, "max_tokens": 1 + i % 50}
                    row = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                    file.write(json.dumps(row).encode() + b"\n")
    return path


def check_same(source: JobInput, rules: RequestDefaults, checker: CheckPool) -> list[tuple[InputRow, CheckedRow]]:
    """What the processes find is what this one finds, row by row and byte by byte."""
    expected = list(check_here(source, rules))
    assert list(checker(source, rules)) == expected
    return expected


@pytest.mark.parametrize("num_processes", [1, 3])
def test_lines(tmp_path: Path, rules: RequestDefaults, num_processes: int) -> None:
    source = job_input(write_lines(tmp_path / "in.jsonl", 5 * CHUNK_ROWS + 3))
    found = check_same(source, rules, pool(num_processes))
    codes = {checked.error[0] for _, checked in found if checked.error is not None}
    assert codes == {"invalid_json", "invalid_utf8", "context_length_exceeded", "token_out_of_vocabulary"}
    assert sum(checked.error is None for _, checked in found) >= 2 * CHUNK_ROWS


def test_long_lines_make_short_chunks(tmp_path: Path) -> None:
    """More data in both directions than pipes hold."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": [i] * 60_000, "max_tokens": 1}) + "\n" for i in range(12)))
    roomy = replace(ENGINE, max_model_len=None)
    rules = request_defaults(roomy, {}, None)
    args = InputArgs(num_check_processes=2)
    checker = choose_checker(args, roomy, [], limits=rules.limits, sampling={}, thinking=None)
    assert isinstance(checker, CheckPool)
    check_same(job_input(path), rules, checker)


def test_tables_and_templates(tmp_path: Path, rules: RequestDefaults) -> None:
    args = InputArgs(prompt_template="{q}?", system_template="Be brief.", id_column="key")
    rows = [{"q": None if i % 50 == 7 else f"question {i}", "key": i % 290, "at": None} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    source = job_input(tmp_path / "in.parquet", columns=args.columns)
    found = check_same(source, rules, pool(2, args))
    assert sum(checked.error is not None for _, checked in found) == 6


def test_an_empty_input(tmp_path: Path, rules: RequestDefaults) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    assert check_same(job_input(tmp_path / "in.jsonl"), rules, pool(2)) == []


def children() -> set[int]:
    return descendants(os.getpid())


def test_processes_end_with_whoever_reads(tmp_path: Path, rules: RequestDefaults) -> None:
    before = children()
    answers: Iterator[object] = pool(2)(job_input(write_lines(tmp_path / "in.jsonl", 5000)), rules)
    next(answers)
    assert len(children() - before) == 2
    answers.close()  # type: ignore[attr-defined]
    assert children() <= before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_named(tmp_path: Path, rules: RequestDefaults, signum: int) -> None:
    before = children()
    answers = pool(2)(job_input(write_lines(tmp_path / "in.jsonl", 5000)), rules)
    next(answers)
    os.kill(min(children() - before), signum)
    with pytest.raises(CheckFailed, match=f"a process that checks rows ended with status -{signum:d}"):
        list(answers)
    assert children() <= before


def test_ctrl_c_is_for_the_job(tmp_path: Path, rules: RequestDefaults) -> None:
    """A terminal sends it to the group of the job."""
    before = children()
    answers: Iterator[object] = pool(2)(job_input(write_lines(tmp_path / "in.jsonl", 1000)), rules)
    next(answers)
    assert {os.getpgid(pid) for pid in children() - before} == children() - before
    answers.close()  # type: ignore[attr-defined]


def test_a_job_whose_check_broke_can_be_resumed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", 2000)
    rules = request_defaults(ENGINE, SAMPLING, True)
    before = children()
    spec = make_spec(path, tmp_path / "out", rules=rules, checker=pool(2))

    def kill_when_checking(row: InputRow) -> None:
        os.kill(max(children() - before), signal.SIGKILL)

    def checker(source: JobInput, defaults: RequestDefaults) -> Iterator[tuple[InputRow, CheckedRow]]:
        for number, (row, checked) in enumerate(spec.checker(source, defaults)):
            if number == 300:
                kill_when_checking(row)
            yield row, checked

    with StopSignal() as stop:
        broken = replace(spec, checker=checker)
        result = run_job(broken, StubEngines, stop=stop, progress=ProgressReporter(io.StringIO()))
    assert (result.exit_code, result.num_rows) == (5, None)
    assert "a process that checks rows ended with status -9" in str(result.message)
    engines = StubEngines(limits=rules.limits)
    with StopSignal() as stop:
        result = run_job(spec, lambda: engines, stop=stop, progress=ProgressReporter(io.StringIO()))
    assert result.num_rows == len(list(job_input(path).rows()))
    assert result.num_rows == result.completed + result.failed


def test_small_inputs_are_checked_here() -> None:
    def choose(num_bytes: int, **settings: int) -> object:
        files = [InputFile("a", num_bytes // 2), InputFile("b", num_bytes - num_bytes // 2)]
        return choose_checker(InputArgs(**settings), ENGINE, files, limits=LIMITS, sampling={}, thinking=None)  # type: ignore[arg-type]

    assert choose(MIN_BYTES - 1) is check_here
    assert isinstance(choose(MIN_BYTES), CheckPool)
    assert choose(MIN_BYTES, num_check_processes=0) is check_here
    assert isinstance(choose(1, num_check_processes=1), CheckPool)
