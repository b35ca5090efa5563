"""Places where tests and demonstrations let a process fail: kill it, or freeze it, the n-th time that it comes by.

    SHOAL_FAULT=decode:0:engine.run:5,prefill:1:kv.publish:2:stop

Worker 0 of the decode role is killed before the 5th step that it runs, worker 1 of the prefill role frozen after its
2nd publication. What can happen:

    kill    the process is killed; this is meant when nothing is said
    stop    the process is frozen
    hang    the thread that comes by goes no further, others do
    node    the process that started this one is killed with all that it started: Ray's part of a node loses power

Processes that take the place of others are spare:0, spare:1, .., in the order in which they start, so that they do not
fail where those did; the process that drives the workers is driver:0.
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

VARIABLE = "SHOAL_FAULT"
DRIVER = "driver:0"
"""The title of the process that drives the workers."""

Point = Literal[
    "collective",  # before an exchange with other ranks, in a step or between
    "engine.schedule",
    "engine.run",  # before the model computes
    "engine.sample",
    "engine.update",  # after the step's tokens were taken over
    "kv.publish",  # after records were published
    "kv.fetch",  # after reads were begun
    "kv.write",  # records are written, but do not count yet
    "worker.take_in",
    "worker.hand_out",  # tokens are ready to be told, and may or may not be
    "worker.join",  # before an epoch is joined
    "worker.build",  # before weights are loaded
    "job.submit",  # before rows go to the engines
    "job.answer",  # answers are there, and not in the journal
    "job.commit",  # lines are written, and not in the journal
    "job.finish",  # every row has its line; the job is not marked as completed
]
Action = Literal["kill", "stop", "hang", "node"]
POINTS: tuple[Point, ...] = get_args(Point)
ROLES = ("prefill", "decode", "mixed", "spare", "driver")


class Failpoints:
    """The faults that one process is to have; without any, `reach` does nothing."""

    def __init__(
        self, text: str = "", title: str = "", *, on_fault: Callable[[str], None] = lambda point: None
    ) -> None:
        """`text` as in SHOAL_FAULT, of which a process has what begins with its `title`, such as decode:0.

        `on_fault` is told of a fault before it happens. ValueError for a text that means nothing.
        """
        self._title, self._on_fault = title, on_fault
        self._faults: dict[tuple[str, int], str] = {}
        self._reached: Counter[str] = Counter()
        self.arm(text)

    def arm(self, text: str) -> None:
        """Have these faults instead; points are counted from here on. Any thread may call."""
        faults = {}
        for part in filter(None, text.split(",")):
            title, point, nth, action = _parse(part)
            if title == self._title:
                faults[point, nth] = action
        self._reached = Counter()
        self._faults = faults

    def reach(self, point: Point) -> None:
        """The process is at this point."""
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
    """Kill a process and all that it started, but this one."""
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
