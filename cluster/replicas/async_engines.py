"""Engines on an event loop: outputs of all requests are handed over once per step."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress

from msgspec.structs import replace

from shoal.runtime.types import EngineOutput, Request, RequestOutput

from .engine_thread import EngineThread

LOOK_TIMEOUT_S = 1.0
MAX_OUTPUTS = 64
"""Outputs of a request that are handed on at a time, so that one that is behind does not hold up the others."""
Outputs = list[EngineOutput | RequestOutput]


class Generation:
    """The outputs of one request, as they come. One that is not waited for until its end needs `AsyncEngines.abort`."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._pending: Outputs = []
        self._took_part = False
        """Whether outputs were left behind the last time."""
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        """Done when something comes for the coroutine that waits."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    async def next(self) -> Outputs:
        """Wait for outputs and take them, MAX_OUTPUTS at most; the whole answer comes last, and nothing after it.

        Raises the error that ended the engines.
        """
        if self._error is None and self._pending:
            if self._took_part:
                await asyncio.sleep(0)
        elif self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        outputs = self._pending
        self._took_part = len(outputs) > MAX_OUTPUTS
        self._pending = outputs[MAX_OUTPUTS:] if self._took_part else []
        return outputs[:MAX_OUTPUTS] if self._took_part else outputs

    async def whole(self) -> RequestOutput:
        """The whole answer."""
        while True:
            last = (await self.next())[-1]
            if isinstance(last, RequestOutput):
                return last

    def put(self, output: EngineOutput | RequestOutput) -> None:
        self._pending.append(output)
        self._wake()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngines:
    """Requests of one event loop to the engines of an `EngineThread`."""

    def __init__(self, engines: EngineThread, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Call on the event loop."""
        self._clock = clock
        self.progressed_at = clock()
        """Time of the last output, or of a request that came when there was none."""
        self._engines = engines
        self._loop = asyncio.get_running_loop()
        self._generations: dict[str, Generation] = {}
        self.num_sequences = 0
        """Samples of the requests that are not finished."""
        self._numbers = itertools.count()

    @property
    def num_requests(self) -> int:
        """Requests that are not finished."""
        return len(self._generations)

    def generate(self, request: Request) -> Generation:
        """Queue a request, whose id is replaced by one of this object's."""
        if not self._generations:
            self.progressed_at = self._clock()
        generation = Generation(replace(request, request_id=f"s-{next(self._numbers)}"))
        self._engines.submit([generation.request], self._deliver)  # the outputs come through the event loop: later
        self._generations[generation.request_id] = generation
        self.num_sequences += request.params.n
        return generation

    def abort(self, generation: Generation) -> None:
        """Drop a request; nothing happens if it is finished."""
        if self._forget(generation.request_id) is not None:
            self._engines.abort([generation.request_id])

    async def look(self) -> None:
        """Bring the metrics up to date; an engine in a long step is not waited for."""
        try:
            looking = self._engines.look()
        except Exception:  # the engines have ended, and their metrics stay as they are
            return
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(looking), LOOK_TIMEOUT_S)

    def _deliver(self, item: Outputs | BaseException) -> None:
        """On the engines' thread: the outputs of a step, or the error that ended the engines."""
        with suppress(RuntimeError):  # the loop may have been closed before its last outputs came
            self._loop.call_soon_threadsafe(self._hand_out, item)

    def _hand_out(self, item: Outputs | BaseException) -> None:
        if isinstance(item, BaseException):
            for generation in self._generations.values():
                generation.fail(item)
            self._generations = {}
            self.num_sequences = 0
            return
        self.progressed_at = self._clock()
        for output in item:
            is_last = isinstance(output, RequestOutput)
            asker = self._forget(output.request_id) if is_last else self._generations.get(output.request_id)
            if asker is not None:  # it was not aborted meanwhile
                asker.put(output)

    def _forget(self, request_id: str) -> Generation | None:
        """Drop a request that is over; None for one that was dropped before."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            self.num_sequences -= generation.request.params.n
        return generation
