"""A thread that owns an engine client, so that many threads and coroutines can use it concurrently."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import EngineOutput, Request, RequestOutput

from ..jobs.engine_client import EngineClient
from ..metrics.meter import RequestMeter, no_meter

T = TypeVar("T")
MIN_POLL_S, MAX_POLL_S = 0.002, 0.04
"""Poll timeout, for which a new request may wait: starts at MIN_POLL_S and doubles up to MAX_POLL_S while there are no
outputs."""

Deliver = Callable[[list[EngineOutput | RequestOutput] | BaseException], None]
"""Receives the outputs of one poll for the requests of one `submit`, or the error that ended one of them."""


class AbortableEngineClient(EngineClient, Protocol):
    """An engine client that can drop requests: `ReplicaPool` or `InProcessEngine`."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; no further outputs are returned for them. Unknown ids are ignored."""
        ...

    def step_profiles(self) -> list[StepProfile]:
        """Step profiles of every rank; the engines must measure their steps."""
        ...


class EngineThread:
    """Runs engines on its own thread and keeps them filled to their capacity. Any thread may call its methods."""

    def __init__(
        self, start: Callable[[], AbortableEngineClient], make_meter: Callable[[], RequestMeter] = no_meter
    ) -> None:
        """Start the engines and wait until they are ready; exceptions of `start` are raised here.

        `make_meter` is called once the engines run; its meter completes the metrics of every answer.
        """
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._deliver: dict[str, Deliver] = {}
        self._end: BaseException | None = None
        self._lock = threading.Lock()
        started: queue.SimpleQueue[RequestLimits | BaseException] = queue.SimpleQueue()
        self._make_meter = make_meter
        self._thread = threading.Thread(target=self._main, args=(start, started), name="shoal-engines", daemon=True)
        self._thread.start()
        limits = started.get()
        if isinstance(limits, BaseException):
            self._thread.join()
            raise limits
        self.limits = limits

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engines; None while they run."""
        with self._lock:
            return self._end

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """Queue requests; `deliver` is called on the engines' thread.

        It receives the outputs of every poll, or, once per request, the error that ended the engines.
        """
        with self._lock:
            if self._end is not None:
                raise self._end
            now = time.time()
            self._commands.put(lambda: self._accept(requests, deliver, now))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are ignored."""
        self._commands.put(lambda: self._drop(request_ids))

    def step_profiles(self) -> list[StepProfile]:
        """Step profiles of every rank; waits for the engines' thread."""
        return self._call(lambda: self._engines.step_profiles()).result()

    def look(self) -> Future[None]:
        """Let the meter read the engines' counters; done once it has."""
        return self._call(lambda: self._meter.look(self._engines, force=True))

    def close(self) -> None:
        """Drop everything, close the engines and wait for the thread. Closing twice is allowed."""
        self._commands.put(None)
        self._thread.join()

    def _call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function on the engines' thread."""
        answer: Future[T] = Future()

        def call() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # who asked waits no longer
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        with self._lock:
            if self._end is not None:
                raise self._end
            self._commands.put(call)
        return answer

    def _main(
        self, start: Callable[[], AbortableEngineClient], started: queue.SimpleQueue[RequestLimits | BaseException]
    ) -> None:
        try:
            self._engines = start()
            self._meter = self._make_meter()
        except BaseException as error:
            started.put(error)
            return
        started.put(self._engines.limits)
        end: BaseException = RuntimeError("the engines were closed")
        try:
            self._loop()
        except BaseException as error:
            end = error
        finally:
            self._finish(end)

    def _finish(self, end: BaseException) -> None:
        with self._lock:
            self._end = end
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command()  # requests that were queued too late receive the error, too
        for deliver in self._deliver.values():
            deliver(end)
        self._engines.close()
        del self._engines  # frees the model's memory

    def _loop(self) -> None:
        poll_s = MIN_POLL_S
        while self._run_commands():
            room = self._engines.capacity - self._engines.num_in_flight
            batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            if batch:
                self._engines.submit(batch)
            outputs = self._engines.poll(poll_s)
            poll_s = MIN_POLL_S if batch or outputs else min(2 * poll_s, MAX_POLL_S)
            self._meter.reported(outputs)
            self._meter.look(self._engines)
            self._hand_out(outputs)

    def _hand_out(self, outputs: Sequence[EngineOutput | RequestOutput]) -> None:
        """Call every `deliver` at most once, with the outputs of its requests in order."""
        batches: dict[Deliver, list[EngineOutput | RequestOutput]] = {}
        for output in outputs:
            is_last = isinstance(output, RequestOutput)
            request_id = output.request_id
            deliver = self._deliver.pop(request_id) if is_last else self._deliver[request_id]
            batches.setdefault(deliver, []).append(output)
        for deliver, batch in batches.items():
            deliver(batch)

    def _run_commands(self) -> bool:
        """Run all queued commands; wait for one when nothing is in flight. Returns False to close."""
        while not (self._commands.empty() and self._deliver):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _accept(self, requests: Sequence[Request], deliver: Deliver, arrived_at: float) -> None:
        self._meter.arrived(requests, arrived_at)
        self._waiting.extend(requests)
        self._deliver.update((request.request_id, deliver) for request in requests)

    def _drop(self, request_ids: Sequence[str]) -> None:
        known = {i for i in request_ids if self._deliver.pop(i, None) is not None}
        if not known:
            return
        self._meter.dropped(sorted(known))
        queued = {request.request_id for request in self._waiting} & known
        self._waiting = deque(request for request in self._waiting if request.request_id not in queued)
        if self._end is None and (running := sorted(known - queued)):
            self._engines.abort(running)
            self._meter.look(self._engines)
