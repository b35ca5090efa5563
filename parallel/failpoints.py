"""Failpoints: named places at which tests and demonstrations kill or freeze a process.

    SHOAL_FAULT=decode:0:engine.run:5,prefill:1:kv.publish:2:stop

Here worker 0 of the decode role is killed before its 5th step, and worker 1 of the prefill role is frozen after it has
published its 2nd chunk. The actions:

    kill    kill the process (the default)
    stop    freeze the process
    hang    block the thread that reaches the point; others continue
    node    kill the parent process and all its children, as in a power failure of a node

Replacement processes are spare:0, spare:1, .., in order of their start, so that they do not fail at the same point; the
process that drives the workers is driver:0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from .spans import SPAN_NAMES, SpanName

VARIABLE = "SHOAL_FAULT"
DRIVER = "driver:0"
"""Label of the process that drives the workers."""

Point = Literal[
    "collective",  # before an exchange with other ranks, in a step or between
    "engine.schedule",
    "engine.run",  # before the model computes
    "engine.sample",
    "engine.update",  # after the step's tokens were added to their requests
    "kv.publish",  # after a chunk was published
    "kv.fetch",  # after a read was started
    "kv.write",  # after a chunk was written to the cache, before it counts
    "worker.take_in",  # before commands are applied
    "worker.hand_out",  # after tokens were queued for the driver, which may or may not receive them
    "worker.join",  # before an epoch is joined
    "worker.build",  # before weights are loaded
    "job.submit",  # before rows are submitted
    "job.answer",  # before answers are journalled
    "job.commit",  # after output lines were written, before they are journalled
    "job.finish",  # after the last line, before the job is marked as completed
]
Action = Literal["kill", "stop", "hang", "node"]
POINTS: tuple[Point, ...] = get_args(Point)
SPAN_POINTS = [name for name in SPAN_NAMES if name in POINTS]
"""Points that are reached by entering or leaving a span."""
_ON_LEAVE = {"engine.update", "kv.publish", "kv.fetch", "kv.write"}
ROLES = ("prefill", "decode", "mixed", "spare", "driver")


class Failpoints:
    """Faults to inject into one process, as a span listener; without any, `reach` does nothing."""

    def __init__(
        self, text: str = "", label: str = "", *, on_fault: Callable[[str], None] = lambda point: None
    ) -> None:
        """`text`: as in SHOAL_FAULT; the parts that begin with `label`, such as decode:0, apply to this process.

        `on_fault` is called before a fault happens. ValueError for a text that cannot be parsed.
        """
        self._label = label
        self._on_fault = on_fault
        self._faults: dict[tuple[str, int], str] = {}
        self._reached: Counter[str] = Counter()
        self.arm(text)

    def arm(self, text: str) -> None:
        """Replace the faults; points are counted from now on. Any thread may call."""
        faults = {}
        for part in filter(None, text.split(",")):
            label, point, nth, action = _parse(part)
            if label == self._label:
                faults[point, nth] = action
        self._reached = Counter()
        self._faults = faults

    def enter(self, name: SpanName) -> None:
        if name not in _ON_LEAVE:
            self._reach(name)

    def leave(self, name: SpanName) -> None:
        if name in _ON_LEAVE:
            self._reach(name)

    def reach(self, point: Point) -> None:
        """Inject the fault of this point, if its count is reached."""
        self._reach(point)

    def _reach(self, point: str) -> None:
        if not self._faults:
            return
        self._reached[point] += 1
        action = self._faults.pop((point, self._reached[point]), None)
        if action is None:
            return
        self._on_fault(point)
        if action == "node":
            _kill_family(os.getppid())
        while action == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)


def _kill_family(parent: int) -> None:
    """Kill a process and all its descendants except this process."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid, ppid = int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(ppid, []).append(pid)
    family = [parent]
    for pid in family:
        family += children.get(pid, [])
    for pid in family:
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parse(part: str) -> tuple[str, str, int, str]:
    fields = part.split(":")
    if len(fields) == 4:
        fields.append("kill")
    if len(fields) != 5 or not fields[1].isdecimal() or not fields[3].isdecimal() or int(fields[3]) < 1:
        raise ValueError(f"{VARIABLE}: {part!r} is not of the form role:number:point:nth[:action]")
    role, number, point, nth, action = fields
    for what, value, known in (("role", role, ROLES), ("point", point, POINTS), ("action", action, get_args(Action))):
        if value not in known:
            raise ValueError(f"{VARIABLE}: {part!r} has the {what} {value!r}; known are {', '.join(known)}")
    return f"{role}:{int(number)}", point, int(nth), action
