from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.cluster.exit_codes import ExitCode
from shoal.cluster.jobs.config import InputArgs
from shoal.cluster.jobs.engine_client import EngineClient
from shoal.cluster.jobs.job import JobResult, JobSpec, run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.stop_signal import JobStopped, StopSignal
from shoal.runtime.chat.prompt import ChatPrompt
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import Request, RequestOutput
from tests.support.batch_input import job_input
from tests.support.stub_job import RULES, AllowedErrors, ByteEncoder, StubEngines, answer, make_spec

ROOT = Path(__file__).parents[3]
STUB_JOB = ROOT / "tests" / "support" / "stub_job.py"


def write_input(path: Path, num_rows: int, bad: tuple[int, ...] = ()) -> Path:
    rows = [{"custom_id": f"c{i}", "prompt": f"question {i}", "max_tokens": 4} for i in range(num_rows)]
    lines = ["{broken" if i in bad else json.dumps(row) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(spec: JobSpec, engines: StubEngines | None = None, stop: StopSignal | None = None) -> JobResult:
    engines = engines or StubEngines()
    result = run_job(spec, lambda: engines, stop=stop or StopSignal(), progress=ProgressReporter(io.StringIO()))
    assert engines.num_in_flight == 0 or result.exit_code != 0
    return result


def must_not_start() -> EngineClient:
    raise AssertionError("the engines were started")


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for name in ("part-00000.jsonl", "errors.jsonl") for x in (output / name).open()]


def check_exactly_once(output: Path, num_rows: int) -> None:
    ids = [line["id"] for line in lines_of(output)]
    assert sorted(ids) == sorted(f"batch_req_{i}" for i in range(num_rows))


def start_process(input_path: Path, output: Path, poll_s: float, limit: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(STUB_JOB), str(input_path), str(output), str(poll_s)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    if limit is not None:
        command.append(str(limit))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_every_row_ends_in_one_line(tmp_path: Path) -> None:
    engines = StubEngines(capacity=8, per_poll=3)
    result = run(make_spec(write_input(tmp_path / "in.jsonl", 50, bad=(7, 20)), tmp_path / "out"), engines)
    assert (result.exit_code, result.num_rows, result.completed, result.failed) == (3, 50, 48, 2)
    check_exactly_once(tmp_path / "out", 50)
    assert engines.closed
    assert engines.most_in_flight == 8
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert state["state"] == "completed"
    assert state["request_counts"] == {"total": 50, "completed": 48, "failed": 2}
    assert state["usage"] == {
        "prompt_tokens": sum(len(f"question {i}") + 1 for i in range(50) if i not in (7, 20)),
        "completion_tokens": 48 * 4,
    }
    assert state["digest"] == result.digest
    assert state["input"]["bad_rows"] == {"invalid_json": 2}
    assert state["input"]["prompt_lengths"] == {"<=16": 48}
    assert not (tmp_path / "out" / "custom_ids.sqlite").exists()


def test_a_line_has_the_answer_and_its_tokens(tmp_path: Path) -> None:
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
    }
    (tmp_path / "in.jsonl").write_text(json.dumps({**row, "body": body}))
    asked: list[Request] = []

    def reply(request: Request) -> RequestOutput:
        asked.append(request)
        return answer(request)

    run(make_spec(tmp_path / "in.jsonl", tmp_path / "out"), StubEngines(reply=reply))
    (line,) = lines_of(tmp_path / "out")
    expected = answer(asked[0])
    assert line["custom_id"] == "a"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert [c["token_ids"] for c in body["choices"]] == [c.token_ids for c in expected.outputs]
    choice = body["choices"][1]
    assert choice["message"] == {"role": "assistant", "content": expected.outputs[1].text}
    assert choice["finish_reason"] == "length"
    first = choice["logprobs"]["content"][0]
    token = expected.outputs[1].token_ids[0]
    assert (first["token_id"], first["logprob"]) == (token, -token / 7.0)
    assert [entry["token_id"] for entry in first["top_logprobs"]] == [token]


def test_a_table_becomes_conversations_whose_answers_repeat_its_columns(tmp_path: Path) -> None:
    """Two tables of which one has a bad row, answered in two runs."""
    first = [{"key": f"k{i}", "q": f"question {i}", "score": i / 2} for i in range(20)]
    second = [{"key": "k20", "q": None, "score": None}, {"key": "k21", "q": "last", "score": 0.0}]
    for name, rows in (("a", first), ("b", second)):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    columns = InputArgs(prompt_template="{q}?", id_column="key").columns
    source = job_input(tmp_path / "a.parquet", tmp_path / "b.parquet", columns=columns)
    spec = make_spec(tmp_path / "a.parquet", tmp_path / "out", input=source)
    stop = StopSignal()
    broken = StubEngines(
        capacity=4, per_poll=2, on_poll=lambda count: setattr(stop, "signum", 15 if count > 3 else None)
    )
    assert run(replace(spec, drain_grace_s=0), broken, stop).exit_code == ExitCode.DRAINED
    result = run(spec)
    assert (result.exit_code, result.num_rows, result.completed, result.failed) == (3, 22, 21, 1)
    check_exactly_once(tmp_path / "out", 22)
    lines = {line["custom_id"]: line for line in lines_of(tmp_path / "out")}
    assert lines["k4"]["columns"] == {"q": "question 4", "score": 2.0}
    assert lines["k21"]["columns"] == {"q": "last", "score": 0.0}
    (bad,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert bad["error"] == {
        "code": "missing_column",
        "message": "the row has no value in the column q",
        "file": str(tmp_path / "b.parquet"),
        "row": 1,
    }
    assert result.digest == run(make_spec(tmp_path, tmp_path / "other", input=source)).digest


def test_logprobs_are_always_computed_and_shown_when_asked(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "x", "max_tokens": 2}\n{"prompt": "x", "max_tokens": 2, "logprobs": 0}'
    )
    asked: list[int | None] = []

    def reply(request: Request) -> RequestOutput:
        asked.append(request.params.logprobs)
        return answer(request)

    run(make_spec(tmp_path / "in.jsonl", tmp_path / "out"), StubEngines(reply=reply))
    assert asked == [0, 0]
    shown = {
        line["custom_id"]: line["response"]["body"]["choices"][0]["logprobs"] for line in lines_of(tmp_path / "out")
    }
    assert shown["row-0"] is None
    assert len(shown["row-1"]["token_logprobs"]) == 2


class CountingEncoder(ByteEncoder):
    """Counts how often a prompt is tokenised."""

    def __init__(self) -> None:
        self.count = 0

    def encode_text(self, text: str) -> ChatPrompt:
        self.count += 1
        return super().encode_text(text)


def test_prompts_are_tokenised_once_whatever_happens(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    source = write_input(tmp_path / "in.jsonl", 20, bad=(7,))
    spec = make_spec(source, tmp_path / "out", rules=replace(RULES, encoder=encoder))

    def dies(request: Request) -> RequestOutput:
        if request.index == 9:
            raise RuntimeError("killed")
        return answer(request)

    assert run(spec, StubEngines(per_poll=1, reply=dies)).exit_code == 5
    spool = tmp_path / "out" / "rows.spool"
    assert spool.exists()
    source.write_text("nobody reads this any more")
    result = run(spec)
    assert (result.exit_code, result.completed, result.failed) == (3, 19, 1)
    assert encoder.count == 19
    assert not spool.exists()
    check_exactly_once(tmp_path / "out", 20)


def test_without_the_spool_the_input_is_checked_again(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 20, bad=(7,))
    whole = run(make_spec(source, tmp_path / "whole"))
    spec = make_spec(source, tmp_path / "out")

    def dies(request: Request) -> RequestOutput:
        raise RuntimeError("killed")

    assert run(spec, StubEngines(reply=dies)).exit_code == 5
    (tmp_path / "out" / "rows.spool").unlink()
    assert run(spec).digest == whole.digest
    check_exactly_once(tmp_path / "out", 20)


def test_the_digest_does_not_depend_on_order_or_capacity(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 40, bad=(3,))
    digests = set()
    for capacity in (1, 5, 64):
        digests.add(run(make_spec(source, tmp_path / f"out{capacity}"), StubEngines(capacity=capacity)).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("what", ["token", "logprob", "cumulative", "finish_reason"])
def test_the_digest_sees_every_bit(tmp_path: Path, what: str) -> None:
    source = write_input(tmp_path / "in.jsonl", 5)

    def changed(request: Request) -> RequestOutput:
        output = answer(request)
        if request.index == 3:
            completion = output.outputs[0]
            assert completion.logprobs is not None
            assert completion.cumulative_logprob is not None
            if what == "token":
                completion.token_ids[1] += 1
                completion.logprobs[1] = {completion.token_ids[1]: next(iter(completion.logprobs[1].values()))}
            elif what == "logprob":
                ((token, entry),) = completion.logprobs[1].items()
                completion.logprobs[1] = {token: type(entry)(entry.logprob * (1 + 2**-52), entry.rank)}
            elif what == "cumulative":
                completion.cumulative_logprob *= 1 + 2**-52
            else:
                completion.finish_reason = "stop"
        return output

    plain = run(make_spec(source, tmp_path / "a"))
    other = run(make_spec(source, tmp_path / "b"), StubEngines(reply=changed))
    assert plain.digest != other.digest


def test_a_finished_job_is_not_run_again(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 5), tmp_path / "out")
    first = run(spec)
    again = run_job(spec, must_not_start, stop=StopSignal(), progress=ProgressReporter(io.StringIO()))
    assert again == first
    assert again.exit_code == 0


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        ({"input": "sha256:1", "seed": 0, "sampling": {"temperature": 0.5}}, "another input"),
        ({"input": "sha256:0", "seed": 1, "sampling": {"temperature": 0.5}}, "another seed"),
        ({"input": "sha256:0", "seed": 0, "sampling": {"temperature": 0.6}}, "another sampling.temperature"),
        ({"input": "sha256:0", "seed": 0, "sampling": {}}, "another sampling.temperature"),
        ({"input": "sha256:0", "seed": 0, "sampling": {"temperature": 0.5}, "dtype": "auto"}, "another dtype"),
    ],
)
def test_another_job_in_the_same_directory_is_refused(tmp_path: Path, identity: dict[str, Any], name: str) -> None:
    source = write_input(tmp_path / "in.jsonl", 5)
    first = run(make_spec(source, tmp_path / "out"))
    other = make_spec(source, tmp_path / "out", identity=identity)
    with pytest.raises(ValueError, match=name):
        run(other)
    again = run(make_spec(source, tmp_path / "out", identity=identity, overwrite=True))
    assert again.digest == first.digest
    check_exactly_once(tmp_path / "out", 5)


def test_a_failed_request_is_an_error_row(tmp_path: Path) -> None:
    def reply(request: Request) -> RequestOutput:
        output = answer(request)
        if request.index == 1:
            output.outputs[0].finish_reason, output.outputs[0].error = "error", "the logits are not finite"
        return output

    spec = make_spec(write_input(tmp_path / "in.jsonl", 3), tmp_path / "out")
    result = run(spec, StubEngines(reply=reply))
    assert (result.exit_code, result.failed) == (3, 1)
    (line,) = [json.loads(x) for x in (tmp_path / "out" / "errors.jsonl").open()]
    assert line["custom_id"] == "c1"
    assert line["response"]["status_code"] == 500
    assert line["error"] == {
        "code": "generation_failed",
        "message": "the logits are not finite",
        "line": 2,
        "byte_offset": len(json.dumps({"custom_id": "c0", "prompt": "question 0", "max_tokens": 4})) + 1,
    }


@pytest.mark.parametrize("when", ["start", "submit", "poll"])
def test_a_dead_engine_leaves_a_job_that_can_be_resumed(tmp_path: Path, when: str) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 60), tmp_path / "out")
    undisturbed = run(make_spec(Path(spec.input.files[0].url), tmp_path / "other"))

    class Dying(StubEngines):
        def submit(self, requests: list[Request]) -> None:
            if when == "submit" and self.submitted:
                raise ValueError("rank 3 is gone")
            super().submit(requests)

    def die(count: int) -> None:
        if when == "poll" and count == 3:
            raise RuntimeError("rank 3 is gone")

    def start() -> EngineClient:
        if when == "start":
            raise RuntimeError("rank 3 is gone")
        return engines

    engines = Dying(on_poll=die)
    result = run_job(spec, start, stop=StopSignal(), progress=ProgressReporter(io.StringIO()))
    assert result.exit_code == 5
    assert "rank 3 is gone" in (result.message or "")
    assert engines.closed is (when != "start")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "failed"
    resumed = StubEngines()
    assert run(spec, resumed).digest == undisturbed.digest
    assert len(resumed.submitted) == 60 - result.completed
    check_exactly_once(tmp_path / "out", 60)


def test_a_resumed_job_goes_on_in_the_middle_of_answers(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 20), tmp_path / "out")
    undisturbed = run(make_spec(Path(spec.input.files[0].url), tmp_path / "other"))

    def die(count: int) -> None:
        if count == 3:
            raise RuntimeError("rank 3 is gone")

    result = run(spec, StubEngines(capacity=10, per_poll=2, on_poll=die))
    assert (result.exit_code, result.completed) == (5, 4)
    said = io.StringIO()
    resumed = StubEngines(capacity=4)  # checks that what it is given is how the answers begin
    last = run_job(spec, lambda: resumed, stop=StopSignal(), progress=ProgressReporter(said))
    assert (last.exit_code, last.digest) == (0, undisturbed.digest)
    # two of ten rows ended in each of two polls, and two came in between: of the eight left at most those two, by
    # chance, are one token in, the others two
    counts = [sum(len(g.token_ids) for g in generated) for generated in resumed.generated.values()]
    assert len(counts) == 8
    assert counts.count(1) + counts.count(2) == 8
    assert counts.count(1) <= 2
    assert f"resuming 8 partially generated rows ({sum(counts)} tokens)" in said.getvalue()


def test_an_answer_to_nothing_is_a_failure(tmp_path: Path) -> None:
    def reply(request: Request) -> RequestOutput:
        output = answer(request)
        output.request_id = "row-99"
        return output

    result = run(make_spec(write_input(tmp_path / "in.jsonl", 3), tmp_path / "out"), StubEngines(reply=reply))
    assert (result.exit_code, result.completed) == (5, 0)
    assert "row-99" in (result.message or "")


def test_on_error_fail_stops_before_the_engines_start(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 10, bad=(1, 2))
    spec = make_spec(source, tmp_path / "out", stop_at_error_limit=True, error_limit=AllowedErrors(1))
    result = run_job(spec, must_not_start, stop=StopSignal(), progress=ProgressReporter(io.StringIO()))
    assert (result.exit_code, result.digest) == (3, None)
    tolerant = make_spec(source, tmp_path / "out", stop_at_error_limit=True, error_limit=AllowedErrors(2))
    assert run(tolerant).exit_code == 0
    check_exactly_once(tmp_path / "out", 10)


def test_engines_with_less_context_than_was_checked_are_refused(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 3), tmp_path / "out")
    small = StubEngines(limits=RequestLimits(vocab_size=512, max_model_len=64))
    with pytest.raises(ValueError, match="give max_model_len 64 or less"):
        run(spec, small)
    assert small.closed


@pytest.mark.parametrize(
    ("signum", "exit_code", "state"), [(signal.SIGINT, 130, "cancelled"), (signal.SIGTERM, 75, "in_progress")]
)
def test_a_signal_drains_and_the_job_resumes(tmp_path: Path, signum: int, exit_code: int, state: str) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 60), tmp_path / "out")
    undisturbed = run(make_spec(Path(spec.input.files[0].url), tmp_path / "other"))
    engines = StubEngines(
        capacity=10, per_poll=2, on_poll=lambda count: os.kill(os.getpid(), signum) if count == 3 else None
    )
    with StopSignal() as stop:
        result = run(spec, engines, stop)
    assert (result.exit_code, result.digest) == (exit_code, None)
    # Two polls of two answers each were refilled, then nothing was admitted and what was running finished.
    assert result.completed == 14
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == state
    assert run(spec).digest == undisturbed.digest
    check_exactly_once(tmp_path / "out", 60)


def test_a_deadline_stops_a_job_that_can_be_resumed(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 40), tmp_path / "out", drain_grace_s=0.0)
    now = [0.0]
    engines = StubEngines(capacity=8, per_poll=4, on_poll=lambda count: now.__setitem__(0, float(count)))
    with StopSignal() as stop:
        progress = ProgressReporter(io.StringIO())
        limited = replace(spec, deadline_s=3.0)
        result = run_job(limited, lambda: engines, stop=stop, progress=progress, clock=lambda: now[0])
    assert (result.exit_code, result.message) == (75, "the deadline has come")
    assert 0 < result.completed < 40
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "in_progress"
    assert run(spec).exit_code == 0
    check_exactly_once(tmp_path / "out", 40)


def test_a_deadline_ends_the_check_of_the_input_too(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 40), tmp_path / "out", deadline_s=20.0)
    now = iter(range(1000))
    with StopSignal() as stop:
        progress = ProgressReporter(io.StringIO())
        result = run_job(spec, must_not_start, stop=stop, progress=progress, clock=lambda: float(next(now)))
    assert (result.exit_code, result.num_rows) == (75, None)


def test_a_signal_ends_a_start_that_takes_long(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 3), tmp_path / "out")

    def start() -> EngineClient:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError

    with StopSignal() as stop:
        assert run_job(spec, start, stop=stop, progress=ProgressReporter(io.StringIO())).exit_code == 75


@pytest.mark.parametrize("how", ["handler", "failure"])
def test_a_signal_that_the_engines_see_first_is_still_a_stop(tmp_path: Path, how: str) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 3), tmp_path / "out")

    def start() -> EngineClient:
        if how == "handler":
            signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except JobStopped as stopped:
            raise SystemError("returned a result with an exception set") from stopped
        raise AssertionError

    with StopSignal() as stop:
        assert run_job(spec, start, stop=stop, progress=ProgressReporter(io.StringIO())).exit_code == 75


def test_handlers_that_the_engines_installed_are_replaced(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.jsonl", 60), tmp_path / "out")

    def start() -> EngineClient:
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum))
        return StubEngines(on_poll=lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 1 else None)

    with StopSignal() as stop:
        assert run_job(spec, start, stop=stop, progress=ProgressReporter(io.StringIO())).exit_code == 75


def test_interrupting_raises_for_a_signal_that_came_before() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(JobStopped), stop.interrupting():
            raise AssertionError


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 100)
    process = start_process(source, tmp_path / "out", 3.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "answering\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    process.communicate()


def test_killed_at_any_time_every_row_is_answered_once(tmp_path: Path) -> None:
    num_rows = 300
    source = write_input(tmp_path / "in.jsonl", num_rows, bad=(0, 17, 299))
    undisturbed = run(make_spec(source, tmp_path / "undisturbed"))
    rng = random.Random(5)
    finished = 0
    part = tmp_path / "out" / "part-00000.jsonl"
    for kill_at_random in (True, False, False, True, False):
        process = start_process(source, tmp_path / "out", 0.1)
        if not kill_at_random:
            wait_for_rows(part, finished + 1)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        ids = [json.loads(x)["id"] for x in whole_lines(part)]
        assert len(ids) == len(set(ids))
        finished = max(finished, len(ids))
    assert 0 < finished < num_rows - 3, "the kills were meant to come in the middle"
    process = start_process(source, tmp_path / "out", 0.0)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 3, stderr
    assert stdout.splitlines()[-1] == undisturbed.digest
    check_exactly_once(tmp_path / "out", num_rows)
    for name in ("part-00000.jsonl", "errors.jsonl"):
        disturbed = sorted((tmp_path / "out" / name).read_bytes().splitlines())
        assert disturbed == sorted((tmp_path / "undisturbed" / name).read_bytes().splitlines())


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(whole_lines(path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole_lines(path: Path) -> list[bytes]:
    return [x for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")] if path.exists() else []


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 1500)
    undisturbed = run(make_spec(source, tmp_path / "undisturbed"), StubEngines(per_poll=99))
    full = (tmp_path / "undisturbed" / "part-00000.jsonl").stat().st_size
    process = start_process(source, tmp_path / "out", 0.0, full // 2)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    process = start_process(source, tmp_path / "out", 0.0)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert stdout.splitlines()[-1] == undisturbed.digest
    check_exactly_once(tmp_path / "out", 1500)


def test_a_file_system_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    """A real one of 160 KB, in a mount namespace of its own, which is enlarged before the job is run again."""
    source = write_input(tmp_path / "in.jsonl", 600)
    undisturbed = run(make_spec(source, tmp_path / "undisturbed"), StubEngines(per_poll=99))
    (tmp_path / "small").mkdir()
    job = f"{sys.executable} {STUB_JOB} {source} out 0.0"
    script = f"""
        mount -t tmpfs -o size=160k tmpfs {tmp_path}/small && cd {tmp_path}/small || exit 1
        {job}; echo "first $?"; wc -l < out/part-00000.jsonl
        mount -o remount,size=16m {tmp_path}/small || exit 1
        {job}; echo "second $?"; sort out/part-00000.jsonl > {tmp_path}/rows
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, env=env, timeout=600)
    lines = done.stdout.splitlines()
    assert "first 75" in lines, done.stderr
    kept = int(lines[lines.index("first 75") + 1])
    assert 0 < kept < 600
    assert lines[-2:] == [undisturbed.digest, "second 0"], done.stderr
    expected = sorted((tmp_path / "undisturbed" / "part-00000.jsonl").read_text().splitlines())
    assert sorted((tmp_path / "rows").read_text().splitlines()) == expected
