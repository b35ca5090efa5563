"""Transports in processes of their own that a test can tell what to do, kill and freeze."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.parallel import nixl_transport
from shoal.parallel.kv_transport import Fetch, KVChunk, TransferError, checksum_of
from shoal.parallel.nixl_transport import NixlTransport, Slice
from shoal.parallel.request_id import RequestId
from tests.support.sockets import listening

DEADLINE_S = 300.0
"""Deadline of what must happen at once."""


class End:
    """In a child process: a transport, and the fetches that were begun with it."""

    def __init__(self, name: str, buffer_bytes: int) -> None:
        self.transport = NixlTransport(name, host="127.0.0.1", buffer_bytes=buffer_bytes)
        self.fetches: dict[int, Fetch] = {}

    def publish(self, generation: int, num_bytes: int, address: bytes | None = None) -> KVChunk:
        """A chunk with the bytes of `payload_of`; `address` of one that was published before."""
        payload = payload_of(generation, num_bytes)
        return KVChunk(
            id=RequestId("a"),
            start=0,
            end=num_bytes,
            fingerprint=b"",
            epoch=3,
            generation=generation,
            num_bytes=num_bytes,
            checksum=checksum_of(payload, epoch=3, generation=generation, start=0, end=num_bytes),
            address=self.transport.publish(payload, generation=generation) if address is None else address,
        )

    def release(self, generation: int) -> None:
        self.transport.release(generation)

    def fetch(self, chunk: KVChunk, timeout_s: float = DEADLINE_S) -> None:
        self.fetches[chunk.generation] = self.transport.fetch(chunk, timeout_s=timeout_s)

    def poll(self, generation: int) -> bool | str:
        """Whether the chunk came, with the right bytes; why it did not, if it never will."""
        try:
            found = self.fetches[generation].poll()
        except TransferError as error:
            return str(error)
        if found is None:
            return False
        assert torch.equal(found, payload_of(generation, found.numel())), f"{generation} has bytes of another one"
        return True

    def wait(self, generation: int) -> bool | str:
        """`poll`, until there is an outcome; the longest poll must not wait for anything."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if (outcome := self.poll(generation)) is not False:
                return outcome
            time.sleep(0.001)
        return "neither came nor failed"

    def read(self, chunk: KVChunk) -> bool | str:
        self.fetch(chunk)
        outcome = self.wait(chunk.generation)
        self.close(chunk.generation)
        return outcome

    def close(self, generation: int) -> None:
        self.fetches.pop(generation).close()

    def arrives_without_polls(self, generation: int) -> bool:
        memory = self._memory(generation)
        deadline = time.monotonic() + DEADLINE_S
        expected = payload_of(generation, memory.num_bytes)
        while not torch.equal(memory.tensor, expected) and time.monotonic() < deadline:
            time.sleep(0.01)
        return torch.equal(memory.tensor, expected)

    def place_of(self, generation: int) -> tuple[int, int]:
        memory = self._memory(generation)
        return memory.address, memory.num_bytes

    def bytes_at(self, address: int) -> int:
        """The first byte of a place that a fetch had."""
        region = self.transport._memory.regions[0].tensor
        return int(region[address - region.data_ptr()])

    def quarantined(self) -> int:
        return self.transport.num_quarantined_bytes

    def peers(self) -> list[str]:
        return sorted(self.transport._peers)

    def forget_idle_peers(self) -> None:
        nixl_transport.PEER_IDLE_S = 0.0

    def listeners(self) -> set[str]:
        return {host for host, _ in listening()}

    def handles_hangup(self) -> bool:
        caught = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)

    def close_transport(self) -> None:
        self.transport.close()
        self.transport.close()

    def _memory(self, generation: int) -> Slice:
        fetch = self.fetches[generation]
        assert isinstance(fetch, nixl_transport._NixlFetch)
        return fetch._read.memory


def payload_of(generation: int, num_bytes: int) -> Tensor:
    """Never 0 in the first byte."""
    return torch.arange(generation % 199 + 1, generation % 199 + 1 + num_bytes, dtype=torch.int32).to(torch.uint8)


class Process:
    """A child process with an `End` that does what it is told."""

    def __init__(self, name: str, output: Path, buffer_bytes: int, environment: dict[str, str]) -> None:
        self.output = output
        self._end, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "shoal.parallel.nixl_transport"])  # each of them takes seconds
        self._process = context.Process(target=_serve, args=(there, name, output, buffer_bytes, environment))
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid
        there.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self.call(name, *args)

    def call(self, name: str, *args: Any) -> Any:
        """The result of a method of `End`; AssertionError when the process died or does not answer."""
        self._end.send((name, args))
        assert self._end.poll(2 * DEADLINE_S), f"no answer to {name}"
        try:
            result, error = self._end.recv()
        except EOFError:
            self._process.join(10)
            raise AssertionError(f"died with {self._process.exitcode} in {name}") from None
        assert error is None, error
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)

    def freeze(self) -> None:
        """Stop it, and wait until all of its threads have stopped."""
        os.kill(self._pid, signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE_S
        while any(_state(task) != "T" for task in Path(f"/proc/{self._pid}/task").iterdir()):
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.001)

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def end(self) -> int | None:
        """Let it end by itself; its exit code."""
        self._end.close()
        self._process.join(10)
        return self._process.exitcode

    def remove(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(end: Connection, name: str, output: Path, buffer_bytes: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    served = End(name, buffer_bytes)
    while True:
        try:
            method, args = end.recv()
        except EOFError:
            sys.exit()
        try:
            end.send((getattr(served, method)(*args), None))
        except Exception as error:
            end.send((None, repr(error)))


def _state(task: Path) -> str:
    """State of a thread, such as R for running or T for stopped."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]
