"""Trial of native code in a separate process, for libraries that may crash or hang on some machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

MAX_REASON_CHARS = 300


def trial_run(statement: str, *, timeout_s: float) -> str | None:
    """Run a Python statement in a new process; returns None if it succeeds, else the reason in a few words.

    The process has the module search path and environment of this one, and is killed after `timeout_s`.
    """
    search_path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {statement}",
    ]
    try:
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": search_path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer in {timeout_s:g} s"
    if result.returncode == 0:
        return None
    if result.returncode < 0:
        return f"it was killed by {_signal_name(-result.returncode)}"
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:MAX_REASON_CHARS] if lines else f"it ended with exit status {result.returncode}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
