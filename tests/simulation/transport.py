"""Cache entries between the processes of a world: late, lost, cut, swapped for others, or as they were published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.parallel import kv_transport
from shoal.parallel.kv_transport import KVChunk, TransferError

from .model import Payload

if TYPE_CHECKING:
    from .process import Process


@dataclass(frozen=True, kw_only=True, slots=True)
class Weather:
    """How often what is on its way meets with an accident."""

    lost: float = 0.0
    repeated: float = 0.0
    late: float = 0.0
    spoiled: float = 0.0
    """Entries only."""
    stale: float = 0.0
    """What a process told arrives after another one took its place."""

    @property
    def is_fair(self) -> bool:
        return not (self.lost or self.repeated or self.late or self.spoiled or self.stale)


class Transport:
    """One process's end."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.published: dict[int, Payload] = {}

    def publish(self, payload: Payload, *, generation: int) -> bytes:
        assert generation not in self.published
        self.published[generation] = payload
        return self.process.name.encode()

    def release(self, generation: int) -> None:
        self.published.pop(generation, None)

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        world = self.process.world
        fetch = Fetch(self.process, chunk, world.now + timeout_s)
        weather, rng = self.process.cluster.weather, world.rng
        if rng.random() >= weather.lost:
            world.at(world.latency() + (0.5 if rng.random() < weather.late else 0.0), fetch.arrive)
        return fetch


class Fetch:
    """A read; what it finds is what is there when it arrives."""

    def __init__(self, process: Process, chunk: KVChunk, deadline: float) -> None:
        self._process, self._chunk, self._deadline = process, chunk, deadline
        self._payload: Payload | None = None
        self._error = ""

    def arrive(self) -> None:
        cluster, rng = self._process.cluster, self._process.world.rng
        source = cluster.processes[self._chunk.address.decode()]
        if source.frozen:
            return
        published = source.transport.published
        if not source.alive:
            self._error = "its process is dead"
        elif (payload := published.get(self._chunk.generation)) is None:
            self._error = "it was released"
        elif rng.random() < cluster.weather.spoiled:
            self._payload = rng.choice([_flipped(payload), Payload(payload[:-8]), rng.choice(list(published.values()))])
        else:
            self._payload = payload
        self._process.kick()

    def poll(self) -> Payload | None:
        if self._error:
            raise TransferError(self._error)
        if self._payload is None:
            if self._process.world.now >= self._deadline:
                raise TransferError("it takes too long")
            return None
        kv_transport.check_payload(self._chunk, self._payload)  # type: ignore[arg-type]
        return self._payload

    def close(self) -> None:
        pass


def _flipped(payload: Payload) -> Payload:
    return Payload(bytes([payload[0] ^ 1]) + payload[1:])
