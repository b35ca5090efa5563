"""`shoal validate`, and the request defaults that it shares with `shoal batch`; needs no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from shoal.runtime.generation_config import sampling_notice

from ..engine_args import EngineArgs
from ..exit_codes import ExitCode
from ..jobs.check_pool import CheckFailed
from ..jobs.choose_checker import choose_checker
from ..jobs.config import InputArgs
from ..jobs.input.bad_row import BadRow
from ..jobs.input.custom_ids import CustomIdIndex
from ..jobs.input.files import find_files
from ..jobs.input.rows import InputRow, JobInput
from ..jobs.progress import JobProgress, ProgressReporter
from ..jobs.row_output import FinishedRow
from ..jobs.stop_signal import JobStopped, StopSignal
from ..jobs.validation import InputSummary, validate_input
from ..prompts import request_defaults
from ..report import EnginesFailed

MAX_SHOWN_BAD_ROWS = 20


def validate(
    inputs: Sequence[str],
    input_args: InputArgs,
    engine: EngineArgs,
    *,
    sampling: Mapping[str, Any],
    thinking: bool | None,
    stdout: TextIO,
    stderr: TextIO,
) -> int:
    """Check an input against a model and print the errors; returns 3 if a row is bad."""
    job_input = JobInput(files=find_files(inputs), columns=input_args.columns, limit=input_args.limit)
    rules = request_defaults(engine, sampling, thinking)
    progress = ProgressReporter(stderr)
    if defaults := engine.sampling_defaults:
        progress.message(sampling_notice(defaults))
    num_shown = 0

    def on_bad_row(_row: FinishedRow, error: BadRow, row: InputRow) -> None:
        nonlocal num_shown
        num_shown += 1
        if num_shown <= MAX_SHOWN_BAD_ROWS:
            offset = "" if row.place.byte_offset is None else f", byte {row.place.byte_offset}"
            print(f"{row.place}{offset}: {error.code}: {error.message}", file=stdout)

    try:
        with StopSignal() as stop, tempfile.TemporaryDirectory() as directory:

            def on_row(summary: InputSummary) -> None:
                stop.check()
                good = summary.num_rows - summary.num_bad_rows
                now = JobProgress(phase="checking", num_rows=None, completed=good, failed=summary.num_bad_rows)
                progress.update(now)

            custom_ids = CustomIdIndex(Path(directory) / "custom_ids.sqlite")
            try:
                summary = validate_input(
                    job_input,
                    rules,
                    custom_ids,
                    on_good_row=lambda index, payload: None,
                    on_bad_row=on_bad_row,
                    on_row=on_row,
                    checker=choose_checker(
                        input_args,
                        engine,
                        job_input.files,
                        limits=rules.limits,
                        sampling=sampling,
                        thinking=thinking,
                    ),
                )
            finally:
                custom_ids.close()
    except JobStopped:
        return stop.exit_code
    except CheckFailed as error:
        raise EnginesFailed(str(error)) from error
    finally:
        progress.close()
    if num_shown > MAX_SHOWN_BAD_ROWS:
        print(f"... and {num_shown - MAX_SHOWN_BAD_ROWS} more", file=stdout)
    print(
        f"{summary.num_rows} rows, {summary.num_bad_rows} bad, {summary.num_prompt_tokens} prompt tokens, the longest "
        f"prompt has {summary.max_prompt_tokens}",
        file=stdout,
    )
    if summary.notice is not None:
        print(f"notice: {summary.notice}", file=stdout)
    for length, count in summary.to_dict()["prompt_lengths"].items():
        print(f"  prompts of {length} tokens: {count}", file=stdout)
    return ExitCode.ROWS_FAILED if summary.num_bad_rows else ExitCode.OK
