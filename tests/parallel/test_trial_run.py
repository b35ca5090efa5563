"""A process of its own for native code that may crash or hang."""

from __future__ import annotations

from shoal.parallel.trial_run import trial_run


def test_a_statement_that_succeeds_has_no_reason() -> None:
    assert trial_run("pass", timeout_s=600) is None


def test_a_crash_names_the_signal() -> None:
    assert trial_run("import os; os.kill(os.getpid(), 11)", timeout_s=600) == "it was killed by SIGSEGV"


def test_an_exception_is_its_last_line() -> None:
    assert trial_run("raise ValueError('UCX does not start')", timeout_s=600) == "ValueError: UCX does not start"


def test_a_silent_end_is_its_exit_status() -> None:
    assert trial_run("import os; os._exit(3)", timeout_s=600) == "it ended with exit status 3"


def test_one_that_never_returns_is_killed() -> None:
    assert trial_run("import time; time.sleep(600)", timeout_s=0.5) == "it did not answer in 0.5 s"


def test_it_finds_this_package() -> None:
    assert trial_run("import shoal.parallel.trial_run", timeout_s=600) is None
