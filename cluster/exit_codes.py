"""Exit status of the commands and of the worker processes."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """An exit status and, in `meaning`, when a process ends with it."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "Success: every row is answered, or no more rows failed than max_errors allows."
    DIFFERENT = 1, "demo: the answers differ. bench kernels: an op differs from its reference. doctor: something broke."
    USAGE = 2, "A setting, a file or the usage is wrong; stderr has one sentence that says what to mend."
    ROWS_FAILED = 3, "More rows failed than max_errors allows. validate: a row is bad."
    LAYOUT = 4, "The cluster cannot hold the layout."
    ENGINE = 5, "The engines failed; the same batch command resumes the job."
    ORPHAN = 70, "A worker process that lost its supervisor."
    DRAINED = 75, "SIGTERM, the deadline, or no room on the disk; the same batch command resumes the job."
    INTERRUPTED = 130, "Ctrl-C; the same batch command resumes the job."
