"""Interface between a job and the engines that answer its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import EngineOutput, Request, RequestOutput

from ..supervision.fault import Fault


class EngineClient(Protocol):
    """Interface to engines that answer requests, whatever their number and place."""

    @property
    def limits(self) -> RequestLimits:
        """Limits of a request; `submit` rejects a larger one."""
        ...

    @property
    def capacity(self) -> int:
        """Number of requests in flight that keeps every engine busy."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Number of submitted requests whose whole answer has not been returned yet."""
        ...

    @property
    def faults(self) -> Sequence[Fault]:
        """Lost workers in order, with the progress of each recovery."""
        ...

    def stats(self) -> Mapping[str, EngineStats]:
        """Counters of every attention group's engine, by the group's name: decode:0 is the first of that role."""
        ...

    def submit(self, requests: list[Request]) -> None:
        """Queue requests; returns at once."""
        ...

    def poll(self, timeout_s: float) -> list[EngineOutput | RequestOutput]:
        """New parts of answers, and the whole answer of every finished request; waits at most `timeout_s`."""
        ...

    def take_losses(self) -> Mapping[str, int]:
        """Requests interrupted by a lost worker since the last call, with the total number of losses of each."""
        ...

    def close(self) -> None:
        """Stop the engines and release their resources."""
        ...


def stats_by_role(stats: Mapping[str, EngineStats]) -> dict[str, EngineStats]:
    """The sums of `EngineClient.stats` over the attention groups of each role."""
    sums: dict[str, EngineStats] = {}
    for name, group in stats.items():
        role = name.partition(":")[0]
        sums[role] = sums.get(role, EngineStats()) + group
    return sums
