"""Which faults a process has, when they strike, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.parallel.failpoints import POINTS, Failpoints

PROGRAM = """
import sys
from shoal.parallel.failpoints import Failpoints
failpoints = Failpoints(sys.argv[1], "decode:1", on_fault=lambda point: print("at", point, flush=True))
for number in range(6):
    print(number, flush=True)
    failpoints.reach("engine.run")
    failpoints.reach("engine.sample")
"""


def start(faults: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, faults], stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize(
    ("faults", "printed"),
    [
        ("", 6),
        ("decode:0:engine.run:1", 6),
        ("prefill:1:engine.run:1", 6),
        ("decode:1:engine.run:3", 3),
        ("decode:1:engine.sample:2:kill", 2),
        ("decode:1:kv.write:1,decode:1:engine.run:5,decode:0:engine.run:1", 5),
    ],
)
def test_a_process_is_killed_the_nth_time_at_its_own_points(faults: str, printed: int) -> None:
    process = start(faults)
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == (0 if printed == 6 else -signal.SIGKILL)
    numbers = [line for line in stdout.splitlines() if not line.startswith("at")]
    assert numbers == [str(i) for i in range(printed)]
    assert ("at engine." in stdout) == (printed < 6), "it is told before it happens"


def test_a_frozen_process_goes_on_when_it_is_let() -> None:
    process = start("decode:1:engine.run:2:stop")
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{process.pid}/stat").read_text().split(")")[1].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGCONT)
        stdout, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0
    assert stdout.splitlines()[-1] == "5"


def test_other_faults_replace_those_before_and_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[int] = []
    monkeypatch.setattr("shoal.parallel.failpoints.os.kill", lambda pid, signum: struck.append(signum))
    failpoints = Failpoints("spare:0:engine.run:3", "spare:0")
    failpoints.reach("engine.run")
    failpoints.arm("spare:0:engine.run:2:stop,spare:0:collective:1")
    for _ in range(4):
        failpoints.reach("engine.run")
    assert struck == [signal.SIGSTOP]
    failpoints.reach("collective")
    assert struck == [signal.SIGSTOP, signal.SIGKILL]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("decode:0:engine.run", "'decode:0:engine.run' is not of the form role:number:point:nth"),
        ("decode:x:engine.run:1", "is not of the form"),
        ("decode:0:engine.run:0", "is not of the form"),
        ("leader:0:engine.run:1", "has the role 'leader'; known are prefill, decode, mixed, spare, driver"),
        ("decode:0:engine.walk:1", "has the point 'engine.walk'; known are collective, engine.schedule,"),
        ("decode:0:engine.run:1:hurt", "has the action 'hurt'; known are kill, stop, hang, node"),
    ],
)
def test_what_means_nothing_is_refused(faults: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Failpoints(f"decode:1:{POINTS[0]}:1,{faults}")
