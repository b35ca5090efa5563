"""Batch jobs: check every row, answer the unfinished rows, and finish with one digest.

A job is its output directory. `run_job` can be killed at any time and called again; each input row gets exactly one
output line, and the digest equals that of an undisturbed run.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from shoal.parallel.failpoints import Failpoints
from shoal.runtime.types import EngineOutput, Request, RequestOutput, Tokens

from ..exit_codes import ExitCode
from ..metrics.meter import RequestMeter, no_meter
from ..openai.requests import RequestDefaults
from ..supervision.fault import FaultJournal
from .check_pool import CheckFailed
from .engine_client import EngineClient, stats_by_role
from .input.bad_row import BadRow
from .input.custom_ids import CustomIdIndex
from .input.formats import has_byte_order_mark
from .input.identity import recorded_files, restrict_files
from .input.rows import InputRow, JobInput
from .output import CUSTOM_ID_FILE, FAULT_FILE, SPOOL_FILE, BatchOutput, RowCounts, State, write_json
from .progress import JobProgress, ProgressReporter
from .row_output import FinishedRow, answered_row
from .rows import BatchRow
from .spool import RowSpoolWriter, read_spool
from .stop_signal import JobStopped, StopSignal
from .validation import Checker, InputSummary, check_here, validate_input

POLL_TIMEOUT_S = 0.1
RUN_FILE_INTERVAL_S = 5.0

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class ErrorRule(Protocol):
    """Limit on the number of failed rows."""

    def allows(self, num_failed: int, num_rows: int) -> bool: ...


class EngineFailure(Exception):  # noqa: N818  (the name of the event)
    """The engines failed; the job can be resumed."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Resolved settings of a job."""

    input: JobInput
    output: Path
    identity: Mapping[str, Any]
    """Everything that determines the answers; a job is resumed only with an equal identity."""
    rules: RequestDefaults
    model_name: str
    stop_at_error_limit: bool
    error_limit: ErrorRule
    drain_grace_s: float = 10.0
    deadline_s: float | None = None
    checker: Checker = check_here
    overwrite: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Values for run.json that may change between runs: versions, layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """Result of a run of a job."""

    exit_code: int
    num_rows: int | None
    """None if it ended before the rows were counted."""
    completed: int
    failed: int
    digest: str | None = None
    """Digest of a finished job."""
    message: str | None = None
    """Why the job did not finish."""


def run_job(
    spec: JobSpec,
    start_engines: Callable[[], EngineClient],
    *,
    stop: StopSignal,
    progress: ProgressReporter,
    clock: Callable[[], float] = time.monotonic,
    failpoints: Failpoints | None = None,
    make_meter: Callable[[], RequestMeter] = no_meter,
) -> JobResult:
    """Run or resume a job until it is finished, a signal arrives, or a failure needs the user.

    `make_meter` is called once the engines run. ValueError for a directory or an input that cannot be used, and from
    `start_engines`.
    """
    failpoints = failpoints or Failpoints()
    try:
        output = BatchOutput(spec.output, overwrite=spec.overwrite, clock=clock, failpoints=failpoints)
    except OSError as error:
        return _disk_failed(spec, error)
    try:
        spec = _resumed(output.run, spec, progress.message)
        _check_same_job(output.run, spec)
        if output.run.get("state") == "completed":
            return _finished(spec, output)
        if output.num_dropped_bytes:
            progress.message(f"truncated {output.num_dropped_bytes} bytes of a torn record at the end of the journal")
        return _Run(spec, output, stop, progress, clock, failpoints, make_meter).run(start_engines)
    except OSError as error:
        return _disk_failed(spec, error, output)
    finally:
        output.close()


class _Run:
    """One run of a job over its open output directory."""

    def __init__(
        self,
        spec: JobSpec,
        output: BatchOutput,
        stop: StopSignal,
        progress: ProgressReporter,
        clock: Callable[[], float],
        failpoints: Failpoints,
        make_meter: Callable[[], RequestMeter],
    ) -> None:
        self.spec = spec
        self.output = output
        self.stop = stop
        self.progress = progress
        self.clock = clock
        self.failpoints = failpoints
        self.make_meter = make_meter
        self.faults = FaultJournal(spec.output / FAULT_FILE, write_json, progress.message)
        self.num_rows: int | None = None
        self.spool = output.directory / SPOOL_FILE
        self.in_flight: dict[str, BatchRow] = {}
        self.last_saved = clock()
        self.end = math.inf if spec.deadline_s is None else clock() + spec.deadline_s
        """When the job stops as if a signal had come."""

    def run(self, start_engines: Callable[[], EngineClient]) -> JobResult:
        output = self.output
        try:
            return self.run_to_end(start_engines)
        except JobStopped:
            return self.stopped()
        except EngineFailure as error:
            if self.stop.signum is not None:
                # A signal may interrupt the engines, which then fail with errors of their own.
                return self.stopped()
            output.commit()
            _save_state(output, "failed", error=str(error))
            return _ended(output, ExitCode.ENGINE, str(error))

    def stopped(self) -> JobResult:
        self.output.commit()
        _save_state(self.output, "cancelled" if self.stop.exit_code == ExitCode.INTERRUPTED else "in_progress")
        return _ended(self.output, self.stop.exit_code, self.stop.reason)

    def run_to_end(self, start_engines: Callable[[], EngineClient]) -> JobResult:
        output = self.output
        if not self.is_checked():
            try:
                self.validate()
            except CheckFailed as error:
                raise EngineFailure(str(error)) from error
        self.num_rows = output.run["input"]["num_rows"]
        if self.too_many_errors():
            return self.give_up()
        if output.counts.finished < self.num_rows:
            num_begun, num_tokens = output.num_begun
            if num_begun:
                self.progress.message(f"resuming {num_begun} partially generated rows ({num_tokens} tokens)")
            _save_state(output, "in_progress", error=None, **self.spec.facts)
            self.progress.message("starting the engines")
            # A ValueError at the start is an error of the user: a layout, a setting, a missing file.
            passing = (JobStopped, ValueError, ImportError)
            with self.stop.interrupting(), _engine_errors("the engines did not start", passing=passing):
                engines = start_engines()
            try:
                self.check_limits(engines)
                self.answer(engines)
            finally:
                engines.close()
            if self.too_many_errors():
                return self.give_up()
            if output.counts.finished < self.num_rows:
                raise JobStopped
        self.failpoints.reach("job.finish")
        _save_state(output, "finalizing")
        output.save_run(digest=output.digest(self.num_rows), finished_at=_now())
        self.spool.unlink(missing_ok=True)
        _save_state(output, "completed")
        return _finished(self.spec, output)

    def is_checked(self) -> bool:
        """Whether an earlier run has checked the input, so that every unfinished row is in the spool."""
        summary = self.output.run.get("input")
        if summary is None:
            return False
        return self.spool.exists() or self.output.counts.finished == summary["num_rows"]

    def validate(self) -> None:
        """First pass: write an error line for every bad row, spool every good one, and save the summary in run.json."""
        spec, output = self.spec, self.output
        job = {"job": dict(spec.identity), "input_files": recorded_files(spec.input.files)}
        output.save_run(state="validating", started_at=_now(), **job, **spec.facts)

        def on_bad_row(row: FinishedRow, _error: BadRow, _row: InputRow) -> None:
            if not output.is_finished(row.index):
                output.add(row)

        def on_row(summary: InputSummary) -> None:
            self.check_time()
            self.stop.check()
            output.commit_if_due()
            good = summary.num_rows - summary.num_bad_rows
            self.progress.update(
                JobProgress(phase="checking", num_rows=None, completed=good, failed=summary.num_bad_rows)
            )

        for file in filter(has_byte_order_mark, spec.input.files):
            self.progress.message(f"skipped the byte order mark at the start of {file.url}")
        with ExitStack() as cleanup:
            custom_ids = CustomIdIndex(output.directory / CUSTOM_ID_FILE)
            cleanup.callback(custom_ids.close)
            spool = RowSpoolWriter(self.spool)
            cleanup.callback(spool.discard)
            summary = validate_input(
                spec.input,
                spec.rules,
                custom_ids,
                on_good_row=spool.add,
                on_bad_row=on_bad_row,
                on_row=on_row,
                checker=spec.checker,
            )
            output.commit()
            spool.finish()
        output.save_run(input=summary.to_dict())
        self.progress.message(
            f"{summary.num_rows} rows checked: {summary.num_bad_rows} bad, {summary.num_prompt_tokens} prompt tokens, "
            f"the longest prompt has {summary.max_prompt_tokens}"
        )
        if summary.notice is not None:
            self.progress.message(f"notice: {summary.notice}")

    def check_limits(self, engines: EngineClient) -> None:
        """ValueError when the engines' context is shorter than the one the rows were checked for.

        Answers must not depend on the cache size of the cluster.
        """
        wanted = self.spec.rules.limits.max_model_len
        have = engines.limits.max_model_len
        if have < wanted:
            raise ValueError(
                f"the cache of these engines holds {have} tokens of context, and the rows were checked for {wanted}: "
                f"give max_model_len {have} or less, or more cache (num_kv_blocks)"
            )

    def answer(self, engines: EngineClient) -> None:
        """Second pass: keep the engines full until every row is finished or a signal arrives."""
        rows = self.open_rows()
        meter = self.make_meter()
        self.show(engines)
        deadline: float | None = None
        exhausted = False
        while True:
            self.check_time()
            if self.stop.signum is not None and deadline is None:
                deadline = self.clock() + self.spec.drain_grace_s
                # A cluster may not wait as long as that before it kills.
                self.output.commit()
                _save_state(self.output, "in_progress", engines=_shown_stats(engines))
                self.progress.message(
                    f"stopping: waiting up to {self.spec.drain_grace_s:g} s for {len(self.in_flight)} rows to finish"
                )
            if deadline is None and not exhausted:
                exhausted = self.admit(rows, engines, meter)
            if not self.in_flight or (deadline is not None and self.clock() >= deadline) or self.too_many_errors():
                break
            with _engine_errors("the engines failed"):
                outputs = engines.poll(POLL_TIMEOUT_S)
            if any(isinstance(output, RequestOutput) for output in outputs):
                self.failpoints.reach("job.answer")
            meter.reported(outputs)
            for output in outputs:
                self.take(output)
            for request_id, num_losses in engines.take_losses().items():
                if (row := self.in_flight.get(request_id)) is not None:
                    self.output.add_losses(row.index, num_losses)
            self.output.commit_if_due()
            self.faults.update(engines.faults)
            self.save_counts(engines)
            self.show(engines)
            meter.look(engines)
        self.output.commit()
        _save_state(self.output, "in_progress", engines=_shown_stats(engines))
        self.show(engines, force=True)

    def check_time(self) -> None:
        """Stop when the job's time is over."""
        if self.clock() >= self.end:
            self.stop.expire()

    def take(self, output: EngineOutput | RequestOutput) -> None:
        """Write the answer of a finished row, or new tokens of an unfinished one."""
        row = self.in_flight.get(output.request_id)
        if row is None:
            raise EngineFailure(f"the engines answered {output.request_id!r}, which is unknown or already finished")
        if isinstance(output, RequestOutput):
            del self.in_flight[output.request_id]
            self.output.add(answered_row(row, output, self.spec.model_name, self.spec.rules.tokenizer))
        elif isinstance(output, Tokens):
            self.output.add_progress(row.index, output)

    def admit(self, rows: Iterator[BatchRow], engines: EngineClient, meter: RequestMeter) -> bool:
        """Submit rows up to the engines' capacity; returns whether the rows are exhausted."""
        room = engines.capacity - len(self.in_flight)
        if room <= 0:
            return False
        new = list(itertools.islice(rows, room))
        if new:
            self.failpoints.reach("job.submit")
            self.in_flight |= {row.request_id: row for row in new}
            requests = [self.begun(row) for row in new]
            with _engine_errors("the engines failed"):
                engines.submit(requests)
            meter.arrived(requests)
        return len(new) < room

    def begun(self, row: BatchRow) -> Request:
        """The row's request, with the tokens generated and the worker losses counted by earlier runs."""
        generated = self.output.take_generated(row.index)
        num_losses = self.output.num_losses(row.index)
        return msgspec.structs.replace(row.request, generated=generated, num_losses=num_losses)

    def open_rows(self) -> Iterator[BatchRow]:
        """The unfinished rows in input order, as checked by the first pass."""
        return read_spool(self.spool, skip=self.output.is_finished)

    def too_many_errors(self) -> bool:
        counts = self.output.counts
        assert self.num_rows is not None
        return self.spec.stop_at_error_limit and not self.spec.error_limit.allows(counts.failed, self.num_rows)

    def give_up(self) -> JobResult:
        _save_state(self.output, "failed", error="too many rows failed")
        return _ended(self.output, ExitCode.ROWS_FAILED, "more rows failed than max_errors allows")

    def save_counts(self, engines: EngineClient) -> None:
        if self.clock() - self.last_saved >= RUN_FILE_INTERVAL_S:
            self.last_saved = self.clock()
            _save_state(self.output, "in_progress", engines=_shown_stats(engines))

    def show(self, engines: EngineClient, *, force: bool = False) -> None:
        counts = self.output.counts
        now = JobProgress(
            phase="answering",
            num_rows=self.num_rows,
            completed=counts.completed,
            failed=counts.failed,
            in_flight=len(self.in_flight),
            num_prompt_tokens=counts.num_prompt_tokens,
            num_output_tokens=counts.num_output_tokens + self.output.num_open_tokens,
        )
        self.progress.update(now, engines=lambda: stats_by_role(engines.stats()), force=force)


@contextmanager
def _engine_errors(what: str, *, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn exceptions other than `passing` into EngineFailure, which ends the run and leaves the job resumable."""
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise EngineFailure(f"{what}: {type(error).__name__}: {error}") from error


def _resumed(run: Mapping[str, Any], spec: JobSpec, say: Callable[[str], None]) -> JobSpec:
    """The spec of a job restricted to its original input, where files have grown or come since it was started."""
    if "input_files" not in run:
        return spec
    fingerprint = run["job"].get("input")
    files = restrict_files(spec.input.files, run["input_files"], fingerprint, say)
    if files is None:
        return spec
    return replace(spec, input=replace(spec.input, files=files), identity={**spec.identity, "input": fingerprint})


def _check_same_job(run: Mapping[str, Any], spec: JobSpec) -> None:
    """ValueError that names the first field of the identity that differs from the one the job was started with."""
    if "job" not in run:
        return
    before = run["job"]
    now = json.loads(json.dumps(spec.identity))
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            inner = next(key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
            name = f"{name}.{inner}"
            old = old.get(inner)
            new = new.get(inner)
        if old != new:
            raise ValueError(
                f"{spec.output} belongs to a job with another {name} ({old!r} then, {new!r} now): run it as it was "
                f"started, choose another output directory, or start over with --overwrite"
            )


def _save_state(output: BatchOutput, state: State, **changes: Any) -> None:
    counts = output.counts
    total = output.run.get("input", {}).get("num_rows")
    output.save_run(
        state=state,
        request_counts={"total": total, "completed": counts.completed, "failed": counts.failed},
        usage={"prompt_tokens": counts.num_prompt_tokens, "completion_tokens": counts.num_output_tokens},
        **changes,
    )


def _shown_stats(engines: EngineClient) -> dict[str, dict[str, int]]:
    """The engines' counters by role, for run.json: those of this run, which another process may resume."""
    return {role: msgspec.structs.asdict(stats) for role, stats in stats_by_role(engines.stats()).items()}


def _finished(spec: JobSpec, output: BatchOutput) -> JobResult:
    counts = output.run["request_counts"]
    num_rows = counts["total"]
    within = spec.error_limit.allows(counts["failed"], num_rows)
    return JobResult(
        exit_code=ExitCode.OK if within else ExitCode.ROWS_FAILED,
        num_rows=num_rows,
        completed=counts["completed"],
        failed=counts["failed"],
        digest=output.run["digest"],
    )


def _disk_failed(spec: JobSpec, error: OSError, output: BatchOutput | None = None) -> JobResult:
    """Result of a run that could not write to or open its directory; raises errors that are not of the disk."""
    if error.errno not in _DISK_ERRORS:
        raise error
    return _ended(output, ExitCode.DRAINED, f"cannot write to {spec.output}: {error.strerror}; make room there")


def _ended(output: BatchOutput | None, exit_code: int, message: str) -> JobResult:
    counts = RowCounts() if output is None else output.counts
    return JobResult(
        exit_code=exit_code,
        num_rows=None if output is None else output.run.get("input", {}).get("num_rows"),
        completed=counts.completed,
        failed=counts.failed,
        message=message,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
