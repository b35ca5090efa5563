"""Cache records through Ray's object store: always there, wherever workers run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError
from torch import Tensor

from shoal.parallel.kv_transport import Fetch, KVChunk, TransferError, check_payload

NUM_READERS = 4

Read = Callable[[str, int, float], NDArray[np.uint8] | None]
"""(actor, generation, seconds) -> what that actor published; None when it did not, or released it."""


class RayTransport:
    """Payloads stay in the process that published them until an actor call brings them into the object store."""

    def __init__(self, name: str, *, read: Read | None = None) -> None:
        """`name`: of this process's actor, whose `read_chunk` must answer with `self.read`."""
        self._name = name
        self._read = read or _read_from_actor
        self._published: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="shoal-kv")

    def publish(self, payload: Tensor, *, generation: int) -> bytes:
        with self._lock:
            self._published[generation] = payload.numpy().copy()
        return self._name.encode()

    def release(self, generation: int) -> None:
        with self._lock:
            self._published.pop(generation, None)

    def read(self, generation: int) -> NDArray[np.uint8] | None:
        """What was published under this number. Any thread may call."""
        with self._lock:
            return self._published.get(generation)

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        return _RayFetch(self._readers.submit(self._bring, chunk, timeout_s), time.monotonic() + timeout_s)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._published.clear()

    def _bring(self, chunk: KVChunk, timeout_s: float) -> Tensor:
        try:
            found = self._read(chunk.address.decode(), chunk.generation, timeout_s)
        except (RayError, ValueError) as error:  # ValueError: no such actor
            raise TransferError(f"chunk {chunk.generation} of request {chunk.id}: {error}") from error
        if found is None:
            raise TransferError(f"chunk {chunk.generation} of request {chunk.id} was released")
        payload = torch.from_numpy(found.copy())  # what Ray returns is shared memory, and read-only
        check_payload(chunk, payload)
        return payload


class _RayFetch:
    def __init__(self, future: Future[Tensor], deadline: float) -> None:
        self._future, self._deadline = future, deadline

    def poll(self) -> Tensor | None:
        if self._future.done():
            return self._future.result()
        if time.monotonic() >= self._deadline:
            raise TransferError("a chunk did not arrive in time")
        return None

    def close(self) -> None:
        self._future.cancel()


def _read_from_actor(name: str, generation: int, timeout_s: float) -> NDArray[np.uint8] | None:
    actor: Any = ray.get_actor(name)
    found: NDArray[np.uint8] | None = ray.get(actor.read_chunk.remote(generation), timeout=timeout_s)
    return found
