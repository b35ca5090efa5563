"""Faults: lost workers and how the replica recovered, and the file in which a job records them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Fault:
    """One lost worker and the recovery from it; `*_s` fields are seconds after the detection unless said otherwise."""

    at: str
    """Time of detection, UTC."""
    worker: str
    """Label it was started with: decode:0, spare:1."""
    node_id: str
    replica: int | None
    """None for a spare, which had no rank."""
    rank: int | None
    reason: str
    noticed_at: float
    """Time of detection, by the supervisor's clock."""
    silent_s: float
    """Seconds since its last message at the detection: an upper bound of the detection time."""
    point: str | None = None
    """Name of the failpoint that caused it."""
    detection_s: float | None = None
    """Seconds from the failpoint to the detection, on one machine."""
    filled_s: float | None = None
    """Until the rank was given to another worker."""
    loaded_s: float | None = None
    """Until the replacement worker had loaded its weights."""
    formed_s: float | None = None
    """Until all ranks of the replica had joined one group again."""
    first_token_s: float | None = None
    """Until the first new token of any interrupted request, on whichever replica it resumed."""
    num_replayed_requests: int = 0
    """Requests that were interrupted."""
    num_replayed_tokens: int = 0
    """Generated tokens of these requests, which are recomputed."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "noticed_at"}


class FaultJournal:
    """Writes the faults of a job to a file, those of earlier runs first, and reports every loss and recovery."""

    def __init__(
        self,
        path: Path,
        write: Callable[[Path, Mapping[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        """`write` replaces a JSON file atomically; `say` receives one line per loss and per recovery.

        The file does not exist until the first fault.
        """
        self._path = path
        self._write = write
        self._say = say
        self._earlier: list[dict[str, Any]] = []
        if path.exists():
            self._earlier = json.loads(path.read_text(encoding="utf-8"))["faults"]
        self._known: list[dict[str, Any]] = []

    def update(self, faults: Sequence[Fault]) -> None:
        """Write and report what is new; `faults`: those of this run so far."""
        records = [fault.to_dict() for fault in faults]
        if records == self._known:
            return
        for number, fault in enumerate(faults):
            before = self._known[number] if number < len(self._known) else None
            if before is None:
                self._say(f"lost {fault.worker}: {fault.reason}")
            if fault.first_token_s is not None and (before is None or before["first_token_s"] is None):
                self._say(describe(fault))
        self._known = records
        self._write(self._path, {"faults": self._earlier + records})


def read_faults(path: Path) -> list[str]:
    """One line per fault in such a file; empty when there is no file."""
    if not path.exists():
        return []
    return [describe(Fault(**record, noticed_at=0.0)) for record in json.loads(path.read_text("utf-8"))["faults"]]


def describe(fault: Fault) -> str:
    """One line on a lost worker and the recovery so far."""
    parts = [f"lost {fault.worker} ({fault.reason})"]
    if fault.detection_s is not None:
        parts.append(f"noticed after {1000 * fault.detection_s:.0f} ms")
    if fault.formed_s is not None:
        parts.append(f"all ranks in their groups again after {1000 * fault.formed_s:.0f} ms")
    if fault.num_replayed_requests:
        parts.append(f"{fault.num_replayed_requests} rows interrupted")
        parts.append(f"{fault.num_replayed_tokens} of their tokens computed again")
    if fault.first_token_s is not None:
        parts.append(f"first new token after {1000 * fault.first_token_s:.0f} ms")
    return ", ".join(parts)
