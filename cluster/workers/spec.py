"""Specification of a worker process, and its reports of start-up and failure."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from shoal.parallel.collectives import CollectiveError
from shoal.runtime.request_limits import RequestLimits

from ..engine_args import EngineArgs
from .assignment import Assignment


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Settings of a worker process, independent of its rank."""

    args: EngineArgs
    name: str
    """Name of the actor, by which other workers of the cluster address it."""
    assignment: Assignment | None
    """First assignment; None for a spare, which waits for one."""
    num_threads: int
    dedicated_cores: bool
    """Whether the node has a core for every thread of every worker on it."""
    engine_factory: str
    """`module:function` with the signature of `build_engine`, resolved inside the worker."""
    supervisor: tuple[str, int] | None = None
    """Address to report to; None: ranks are not replaced, and a failure ends this one."""
    supervisor_key: str = field(default="", repr=False)
    """Secret shared by the processes of this run."""
    label: str = ""
    """Name in messages and failpoints: decode:0 for the first worker of that role, spare:1 for the second spare."""
    faults: str = ""
    """See `Failpoints`."""


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why a rank failed."""

    rank: int
    kind: Literal["value", "collective", "error"]
    """value: a setting of the user cannot work; collective: another rank did not answer and is the likelier cause."""
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A completed phase of the start-up."""

    name: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.seconds:.1f} s" + (f" ({self.detail})" if self.detail else "")


OnPhase = Callable[[Phase], None]


@dataclass(slots=True)
class StartReport:
    """Start-up of a rank; filled in as it proceeds."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds per phase, in order."""
    notices: list[str] = field(default_factory=list)
    """Messages to the user that are not errors."""
    limits: RequestLimits | None = None
    num_kv_tokens: int = 1 << 20
    """Capacity in tokens of the KV cache of this rank's attention group."""
    num_kv_blocks: int | None = None
    local_world_size: int = 1
    failure: WorkerFailure | None = None


def failure_of(rank: int, error: Exception) -> WorkerFailure:
    """An exception as plain data; call in its except block, for the traceback."""
    kind: Literal["value", "collective", "error"] = "error"
    if isinstance(error, CollectiveError):
        kind = "collective"
    elif isinstance(error, ValueError):
        kind = "value"
    return WorkerFailure(rank, kind, f"{type(error).__name__}: {error}", traceback.format_exc())
