"""What a worker process is told when it starts, and what it says of its start and its end."""

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
    """What a worker process is, whatever rank it has."""

    args: EngineArgs
    name: str
    """Name of the actor, by which other workers of this cluster find it."""
    assignment: Assignment | None
    """Its first rank; None: a spare, which waits for one."""
    num_threads: int
    dedicated_cores: bool
    """Whether the node has a core for every thread of every worker on it."""
    engine_factory: str
    """`module:function` with the signature of `build_engine`, resolved inside the worker."""
    supervisor: tuple[str, int] | None = None
    """Where to report; None: nobody replaces ranks, and a failure ends this one."""
    supervisor_key: str = field(default="", repr=False)
    """Known to the processes of this run alone."""
    label: str = ""
    """What people and failpoints call it: decode:0 for the first worker of that role, spare:1 for the second spare."""
    faults: str = ""
    """See `Failpoints`."""


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why a rank cannot go on."""

    rank: int
    kind: Literal["value", "collective", "error"]
    """value: what the user asked for cannot work; collective: another rank did not answer, the likelier cause."""
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A finished part of the start-up."""

    name: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.seconds:.1f} s" + (f" ({self.detail})" if self.detail else "")


OnPhase = Callable[[Phase], None]


@dataclass(slots=True)
class StartReport:
    """How a rank started; filled while it does."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds, in order."""
    notices: list[str] = field(default_factory=list)
    """What a user should know although nothing is wrong."""
    limits: RequestLimits | None = None
    num_kv_tokens: int = 1 << 20
    """Tokens that the cache of this rank's attention group holds."""
    num_kv_blocks: int | None = None
    local_world_size: int = 1
    failure: WorkerFailure | None = None


def failure_of(rank: int, error: Exception) -> WorkerFailure:
    """The exception as plain data; call it while the exception is being handled."""
    kind: Literal["value", "collective", "error"] = "error"
    if isinstance(error, CollectiveError):
        kind = "collective"
    elif isinstance(error, ValueError):
        kind = "value"
    return WorkerFailure(rank, kind, f"{type(error).__name__}: {error}", traceback.format_exc())
