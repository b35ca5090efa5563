"""A worker that was lost and how the loss was mended, and the file of a job that tells it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Fault:
    """One loss and how it was mended; `*_s` without another word are seconds after it was noticed."""

    at: str
    """When it was noticed, UTC."""
    worker: str
    """What it was started as: decode:0, spare:1."""
    node_id: str
    replica: int | None
    """None: it had no rank, it was a spare."""
    rank: int | None
    reason: str
    noticed_at: float
    """Time of detection, by the supervisor's clock."""
    silent_s: float
    """How long it was not heard when its loss was noticed: at most what it took to notice."""
    point: str | None = None
    """Name of the failpoint that caused it."""
    detection_s: float | None = None
    """From the failpoint until it was noticed, on one machine."""
    filled_s: float | None = None
    loaded_s: float | None = None
    """Until the worker that took the place had its weights."""
    formed_s: float | None = None
    """Until all ranks of the replica were in one group again."""
    first_token_s: float | None = None
    """Until one of the interrupted requests told new tokens, wherever it went on."""
    num_replayed_requests: int = 0
    num_replayed_tokens: int = 0
    """Generated tokens of these requests, which are computed again."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "noticed_at"}


class FaultJournal:
    """The file of a job's faults, those of earlier runs first, and a line for every loss and every recovery."""

    def __init__(
        self,
        path: Path,
        write: Callable[[Path, Mapping[str, Any]], None],
        tell: Callable[[str], None],
    ) -> None:
        """`write` replaces a JSON file in one step. There is no file while there was no fault."""
        self._path, self._write, self._tell = path, write, tell
        self._earlier: list[dict[str, Any]] = []
        if path.exists():
            self._earlier = json.loads(path.read_text(encoding="utf-8"))["faults"]
        self._known: list[dict[str, Any]] = []

    def update(self, faults: Sequence[Fault]) -> None:
        """Write and tell what is new; `faults` are those of this run so far."""
        records = [fault.to_dict() for fault in faults]
        if records == self._known:
            return
        for number, fault in enumerate(faults):
            before = self._known[number] if number < len(self._known) else None
            if before is None:
                self._tell(f"lost {fault.worker}: {fault.reason}")
            if fault.first_token_s is not None and (before is None or before["first_token_s"] is None):
                self._tell(describe(fault))
        self._known = records
        self._write(self._path, {"faults": self._earlier + records})


def read_faults(path: Path) -> list[str]:
    """A line for every fault in such a file; none when there is no file."""
    if not path.exists():
        return []
    return [describe(Fault(**record, noticed_at=0.0)) for record in json.loads(path.read_text("utf-8"))["faults"]]


def describe(fault: Fault) -> str:
    """What was lost, and how it was mended as far as that is known."""
    parts = [f"lost {fault.worker} ({fault.reason})"]
    if fault.detection_s is not None:
        parts.append(f"noticed after {1000 * fault.detection_s:.0f} ms")
    if fault.formed_s is not None:
        parts.append(f"all ranks in their groups again after {1000 * fault.formed_s:.0f} ms")
    if fault.num_replayed_requests:
        parts.append(f"{fault.num_replayed_requests} rows interrupted")
        parts.append(f"{fault.num_replayed_tokens} of their tokens computed again")
    if fault.first_token_s is not None:
        parts.append(f"a new token of theirs after {1000 * fault.first_token_s:.0f} ms")
    return ", ".join(parts)
