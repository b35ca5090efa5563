"""Cache records through NIXL: a reader takes them out of the publisher's memory while both go on computing.

Published chunks and reads under way have slices of memory that is registered once. An address is where a slice is, and
what NIXL needs to know to reach the process and the memory: a reader needs nothing else.

A read that is given up may still arrive. Its slice is in quarantine until NIXL says that the read has ended: at once
when the publisher is dead, when TCP gives up (a quarter of an hour) when its node is, and when it goes on or is killed
when it is frozen. Until then nobody gets the slice, for ever if need be; with too much in quarantine, nothing is read.

UCX, which moves the bytes, authenticates nobody: whoever reaches the port that it listens on can read and write all
memory of the process. It listens on one address only; everybody on the network of that address must be trusted.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_transport import Fetch, KVChunk, TransferError, check_payload
from .nixl_agent import NixlAgent, ReadState

PEER_IDLE_S = 600.0
"""A publisher that nothing was read from for so long is forgotten when another one appears."""

_ALIGNMENT = 64
"""Alignment of slices in bytes, so that a payload can be viewed in any dtype."""
_ADDRESS_BYTES = 8


class NixlTransport:
    """One rank's end. NIXL's own thread moves the bytes; those of a process on the same node are copied at once."""

    def __init__(self, name: str, *, host: str, buffer_bytes: int) -> None:
        """`name` is used for one process only, `host` the address to listen on, one of this node's.

        `buffer_bytes`: what is registered at first, and the bound of what is in quarantine. ValueError when the library
        is missing or does not work here.
        """
        agent = NixlAgent(name, host)
        self._agent: NixlAgent | None = agent
        self._memory = Memory(lambda t: agent.register(t.data_ptr(), t.numel()), buffer_bytes)
        self._max_quarantined = buffer_bytes
        self._published: dict[int, Slice] = {}
        self._reads: list[_Read] = []
        """Those that have not ended, given up or not."""
        self._peers: dict[str, _Peer] = {}

    def publish(self, payload: Tensor, *, generation: int) -> bytes:
        memory = self._memory.allocate(payload.numel())
        memory.tensor.copy_(payload)
        self._published[generation] = memory
        return memory.address.to_bytes(_ADDRESS_BYTES, "little") + memory.region.metadata

    def release(self, generation: int) -> None:
        memory = self._published.pop(generation, None)
        if memory is not None:
            memory.tensor[:1] += 1  # who still reads it finds another checksum
            self._memory.free(memory)

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        self._end_given_up()
        try:
            read = self._start(chunk)
        except TransferError as error:
            return _FailedFetch(error)
        return _NixlFetch(self, chunk, read, time.monotonic() + timeout_s)

    def close(self) -> None:
        if self._agent is None:
            return
        for read in self._reads:
            read.state = "failed"
        self._agent.close([read.handle for read in self._reads])
        self._agent = None

    @property
    def num_quarantined_bytes(self) -> int:
        """Bytes still pinned by cancelled reads that have not completed."""
        return sum(read.memory.num_bytes for read in self._reads if read.given_up)

    def state(self, read: _Read) -> ReadState:
        """How far a read is. Moves bytes that are there, but never waits for some."""
        if read.state == "running" and self._agent is not None:
            read.state = self._agent.state(read.handle)
        return read.state

    def let_go(self, read: _Read) -> None:
        """The read's payload is not needed any more, or not wanted."""
        read.given_up = True
        if self._agent is not None and self.state(read) != "running":
            self._end(read)

    def _start(self, chunk: KVChunk) -> _Read:
        assert self._agent is not None, "fetch after close"
        if (held := self.num_quarantined_bytes) >= self._max_quarantined:
            raise TransferError(f"reads that were given up and may still arrive hold {held} bytes")
        address = int.from_bytes(chunk.address[:_ADDRESS_BYTES], "little")
        peer = self._peer(chunk.address[_ADDRESS_BYTES:])
        memory = self._memory.allocate(chunk.num_bytes)
        try:
            handle = self._agent.prepare_read(peer.name, address, memory.address, memory.num_bytes)
        except TransferError:
            self._memory.free(memory)
            raise
        read = _Read(peer, handle, memory, self._agent.post(handle))
        self._reads.append(read)
        peer.num_reads += 1
        peer.last_read = time.monotonic()
        return read

    def _end(self, read: _Read) -> None:
        """Nothing will be written into the read's memory any more."""
        assert self._agent is not None
        assert read.state != "running"
        self._agent.release(read.handle)
        self._reads.remove(read)
        self._memory.free(read.memory)
        peer = read.peer
        peer.num_reads -= 1
        peer.lost |= read.state == "failed"
        # While a read is under way, forgetting its publisher would hide whether it has ended.
        if peer.lost and peer.num_reads == 0:
            self._forget(peer)

    def _end_given_up(self) -> None:
        for read in [r for r in self._reads if r.given_up and self.state(r) != "running"]:
            self._end(read)

    def _peer(self, metadata: bytes) -> _Peer:
        """The publisher whose memory this describes."""
        for peer in self._peers.values():
            if metadata in peer.regions:
                return peer
        assert self._agent is not None
        now = time.monotonic()
        for peer in [p for p in self._peers.values() if p.num_reads == 0 and p.last_read < now - PEER_IDLE_S]:
            self._forget(peer)
        name = self._agent.connect(metadata)
        peer = self._peers.setdefault(name, _Peer(name, now))
        peer.regions.add(metadata)
        return peer

    def _forget(self, peer: _Peer) -> None:
        assert self._agent is not None
        del self._peers[peer.name]
        self._agent.disconnect(peer.name)


@dataclass(slots=True)
class _Peer:
    """A publisher that NIXL knows how to reach."""

    name: str
    last_read: float
    regions: set[bytes] = field(default_factory=set)
    """Metadata of its memory."""
    num_reads: int = 0
    """Reads that have not completed."""
    lost: bool = False
    """A read failed: its connection is of no use any more."""


@dataclass(eq=False, slots=True)
class _Read:
    """What is being written into `memory`."""

    peer: _Peer
    handle: int
    memory: Slice
    state: ReadState
    given_up: bool = False


class _NixlFetch:
    def __init__(self, transport: NixlTransport, chunk: KVChunk, read: _Read, deadline: float) -> None:
        self._transport, self._chunk, self._read, self._deadline = transport, chunk, read, deadline
        self._is_checked = False

    def poll(self) -> Tensor | None:
        state = self._transport.state(self._read)
        if state == "failed":
            raise TransferError(f"chunk {self._chunk.generation} cannot be read from {self._read.peer.name}")
        if state == "running":
            if time.monotonic() >= self._deadline:
                raise TransferError(f"chunk {self._chunk.generation} did not arrive in time")
            return None
        if not self._is_checked:
            check_payload(self._chunk, self._read.memory.tensor)
            self._is_checked = True
        return self._read.memory.tensor

    def close(self) -> None:
        if not self._read.given_up:
            self._transport.let_go(self._read)


class _FailedFetch:
    def __init__(self, error: TransferError) -> None:
        self._error = error

    def poll(self) -> Tensor | None:
        raise self._error

    def close(self) -> None:
        pass


@dataclass(eq=False, slots=True)
class Region:
    """Memory that was registered at once."""

    tensor: Tensor
    metadata: bytes
    """What a reader must be told of it."""
    free: list[tuple[int, int]]
    """Ranges `[start, end)` that nobody has, in order and with gaps between them."""


@dataclass(eq=False, slots=True)
class Slice:
    """A part of a region that has one owner."""

    region: Region
    start: int
    num_bytes: int

    @property
    def tensor(self) -> Tensor:
        return self.region.tensor[self.start : self.start + self.num_bytes]

    @property
    def address(self) -> int:
        return self.region.tensor.data_ptr() + self.start


class Memory:
    """Registered memory, in slices. It grows by regions, and gives none back: late reads and writes must find them."""

    def __init__(self, register: Callable[[Tensor], bytes], region_bytes: int) -> None:
        """`register` makes memory readable and returns its metadata; a region has at least `region_bytes`."""
        self._register, self._region_bytes = register, region_bytes
        self.regions: list[Region] = []
        self._grow(region_bytes)

    def allocate(self, num_bytes: int) -> Slice:
        """The first room that is large enough, or a new region."""
        assert num_bytes > 0
        size = _aligned(num_bytes)
        for region in self.regions:
            for i, (start, end) in enumerate(region.free):
                if end - start >= size:
                    region.free[i : i + 1] = [(start + size, end)] if end - start > size else []
                    return Slice(region, start, num_bytes)
        self._grow(size)
        return self.allocate(num_bytes)

    def free(self, memory: Slice) -> None:
        """Give a slice back, once."""
        free = memory.region.free
        start, end = memory.start, memory.start + _aligned(memory.num_bytes)
        i = bisect(free, (start, end))
        before, after = i > 0 and free[i - 1][1] == start, i < len(free) and free[i][0] == end
        first, last = free[i - 1][0] if before else start, free[i][1] if after else end
        free[i - before : i + after] = [(first, last)]

    def _grow(self, num_bytes: int) -> None:
        size = _aligned(max(num_bytes, self._region_bytes))
        tensor = torch.empty(size, dtype=torch.uint8)  # its pages are taken when they are first used, or pinned
        self.regions.append(Region(tensor, self._register(tensor), [(0, size)]))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
