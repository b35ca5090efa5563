"""First pass over an input: check and count every row before any engine starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..openai.requests import RequestDefaults
from .check_row import CheckedRow, check_row
from .input.bad_row import BadRow
from .input.custom_ids import CustomIdIndex
from .input.rows import InputRow, JobInput
from .row_output import FinishedRow, failed_row


@dataclass(slots=True)
class InputSummary:
    """Counts of rows, bad rows and prompt tokens of an input."""

    num_rows: int = 0
    num_bad_rows: int = 0
    num_prompt_tokens: int = 0
    max_prompt_tokens: int = 0
    prompt_lengths: dict[str, int] = field(default_factory=dict)
    """Number of rows per prompt length, in powers of two: "<=16", "<=32", ..."""
    num_spelling_rows: int = 0
    """Rows whose text prompt spells an added token of the tokenizer."""
    spelled_token: str = ""
    """The first such token."""
    bad_rows: dict[str, int] = field(default_factory=dict)
    """Number of rows per error code."""

    @property
    def notice(self) -> str | None:
        """What a user should know about rows that are not wrong."""
        if not self.num_spelling_rows:
            return None
        return (
            f"{self.num_spelling_rows} rows have special tokens such as {self.spelled_token} in the text of their "
            "prompt; they are encoded as text: give messages or token ids instead"
        )

    def count_row(self, row: CheckedRow) -> None:
        self._count_prompt(row.num_prompt_tokens)
        if row.spelled_token is not None:
            self.num_spelling_rows += 1
            self.spelled_token = self.spelled_token or row.spelled_token

    def _count_prompt(self, length: int) -> None:
        self.num_prompt_tokens += length
        self.max_prompt_tokens = max(self.max_prompt_tokens, length)
        step = f"<={1 << max(length - 1, 0).bit_length()}"
        self.prompt_lengths[step] = self.prompt_lengths.get(step, 0) + 1

    def count_bad(self, code: str) -> None:
        self.num_bad_rows += 1
        self.bad_rows[code] = self.bad_rows.get(code, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        lengths = dict(sorted(self.prompt_lengths.items(), key=lambda item: int(item[0][2:])))
        return {
            "num_rows": self.num_rows,
            "num_bad_rows": self.num_bad_rows,
            "bad_rows": dict(sorted(self.bad_rows.items())),
            "num_prompt_tokens": self.num_prompt_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "prompt_lengths": lengths,
        }


Checker = Callable[[JobInput, RequestDefaults], Iterator[tuple[InputRow, CheckedRow]]]
"""Checks the rows of an input, and returns them in order."""


def check_here(job_input: JobInput, defaults: RequestDefaults) -> Iterator[tuple[InputRow, CheckedRow]]:
    """Check the rows in this process."""
    for source in job_input.rows():
        yield source, check_row(source, job_input.columns, defaults)


def validate_input(
    job_input: JobInput,
    defaults: RequestDefaults,
    custom_ids: CustomIdIndex,
    *,
    on_good_row: Callable[[int, bytes], None],
    on_bad_row: Callable[[FinishedRow, BadRow, InputRow], None],
    on_row: Callable[[InputSummary], None],
    checker: Checker = check_here,
) -> InputSummary:
    """Check and tokenise every row of an input; `on_row` is called after every row, good or bad.

    `on_good_row` is called with the index of a row and what the spool has of it.
    """
    summary = InputSummary()
    for source, checked in checker(job_input, defaults):
        error = _error(source, checked, job_input, custom_ids)
        if error is None:
            on_good_row(source.index, checked.payload)
            summary.count_row(checked)
        else:
            summary.count_bad(error.code)
            on_bad_row(failed_row(source.index, error.custom_id, error, source.place), error, source)
        summary.num_rows += 1
        on_row(summary)
    return summary


def _error(source: InputRow, checked: CheckedRow, job_input: JobInput, custom_ids: CustomIdIndex) -> BadRow | None:
    """Why a row is a bad one, which a repeated custom id is before anything else."""
    custom_id = checked.custom_id
    if custom_id is not None and (first := custom_ids.add(custom_id, source.file, source.place.number)) is not None:
        message = f"{source.place} repeats the custom_id {custom_id!r} of {job_input.place(*first)}"
        return BadRow("duplicate_custom_id", message, custom_id=custom_id)
    return None if checked.error is None else BadRow(*checked.error, custom_id=custom_id)
