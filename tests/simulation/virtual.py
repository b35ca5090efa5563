"""A clock and a queue of events, and what stands for Ray: nothing happens but in `World.advance`."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from ray.exceptions import RayError

MAX_SECONDS = 150.0
"""In which everything must be over."""


class DriverKilled(BaseException):
    """The process that runs the job is gone; not an exception that anybody may catch."""


class World:
    """Everything that happens in one life of a driver; all of it follows from the state of `rng` at its beginning."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.num_events = 0
        self.driver_is_dead = False
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_planned = 0

    def monotonic(self) -> float:
        return self.now

    def at(self, delay: float, act: Callable[..., None], *arguments: Any) -> None:
        """Call `act` after a while."""
        self._num_planned += 1
        heapq.heappush(self._events, (self.now + delay, self._num_planned, act, arguments))

    def latency(self, longest: float = 0.005) -> float:
        """Random latency, seldom a long one."""
        return longest * self.rng.random() ** 2

    def advance(self, until: float) -> bool:
        """Let the next event happen, if it is one before that time; else it is that time now, and False."""
        if not self._events or self._events[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, act, arguments = heapq.heappop(self._events)
        self.num_events += 1
        assert self.now < MAX_SECONDS, "a hang"
        act(*arguments)
        return True

    def kill_driver(self) -> None:
        """What it does from now on, as Python unwinds it, it does not do."""
        self.driver_is_dead = True
        raise DriverKilled

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.advance(until):
            pass


class Ref:
    """The result of a call, once it is there."""

    __slots__ = ("done", "error", "value")
    num_settled = 0
    """Number of settled calls."""

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: RayError | None = None

    def settle(self, value: Any = None, error: RayError | None = None) -> None:
        if not self.done:
            self.done, self.value, self.error = True, value, error
            Ref.num_settled += 1


class Ray:
    """What routers and replicas use of the module."""

    def __init__(self, world: World) -> None:
        self._world = world

    def wait(self, refs: Sequence[Ref], *, num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Ref], list[Ref]]:
        deadline = self._world.now + timeout
        in_time = not self._world.driver_is_dead
        while True:
            ready = [ref for ref in refs if ref.done][:num_returns]
            if len(ready) >= num_returns or not in_time:
                return ready, [ref for ref in refs if ref not in ready]
            num_settled = Ref.num_settled
            while in_time and num_settled == Ref.num_settled:
                in_time = self._world.advance(deadline)

    def get(self, ref: Ref, *, timeout: float = 0.0) -> Any:
        assert ref.done, "a call that waits for another one"
        if ref.error is not None:
            raise ref.error
        return ref.value


class Method:
    """A method of an actor, as its caller sees it."""

    def __init__(self, call: Callable[..., Ref]) -> None:
        self._call = call

    def options(self, **_options: str) -> Method:
        return self

    def remote(self, *arguments: Any) -> Ref:
        return self._call(*arguments)
