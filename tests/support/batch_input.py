"""Inputs of batch jobs, from files and from bytes."""

from __future__ import annotations

from pathlib import Path

from shoal.cluster.jobs.input.bad_row import Place
from shoal.cluster.jobs.input.columns import PLAIN_COLUMNS, Columns
from shoal.cluster.jobs.input.files import InputFile, find_files
from shoal.cluster.jobs.input.lines import InputLine
from shoal.cluster.jobs.input.rows import InputRow, JobInput


def job_input(*paths: Path, columns: Columns = PLAIN_COLUMNS) -> JobInput:
    """The whole of some files."""
    return JobInput(files=find_files([str(path) for path in paths]), columns=columns)


def input_file(path: Path) -> InputFile:
    """A whole file."""
    (file,) = find_files([str(path)])
    return file


def first_row(data: bytes) -> InputRow:
    """The row of a file with one line."""
    return InputRow(0, 0, Place("line", 1, 0), InputLine(1, 0, len(data), data))
