"""KV transfer through NIXL: a reader copies chunks out of the publisher's memory while both keep computing.

Published chunks and reads in progress own slices of memory that is registered once. An address consists of the slice's
address and the metadata with which NIXL reaches the process and the memory: a reader needs nothing else.

A cancelled read may still complete. Its slice stays in quarantine until NIXL reports that the read has ended: at once
if the publisher is dead; after TCP's timeout (a quarter of an hour) if its node is dead; if it is frozen, once it
continues or is killed. The slice is not reused before that, however long it takes; with too many bytes in quarantine no
new read starts.

UCX, which moves the bytes, has no authentication: a process that reaches its port can read and write all memory of this
process. It listens on one address only; the network of that address must be trusted.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.kernels.math_utils import round_up

from .kv_transport import Fetch, KVChunk, TransferError, check_payload
from .nixl_agent import NixlAgent, ReadState

PEER_IDLE_S = 600.0
"""A publisher without reads for this long is removed when another one appears."""

_ALIGNMENT = 64
"""Alignment of slices in bytes, so that a payload can be viewed in any dtype."""
_ADDRESS_BYTES = 8


class NixlTransport:
    """One rank's end of the transport. NIXL's thread moves the bytes; within a node a read copies them at its start."""

    def __init__(self, name: str, *, host: str, buffer_bytes: int) -> None:
        """`name` is unique per process; `host` is the address of this node to listen on.

        `buffer_bytes`: bytes registered at first, and limit of the bytes in quarantine. ValueError when the library is
        missing or does not work here.
        """
        agent = NixlAgent(name, host)
        self._agent: NixlAgent | None = agent
        self._memory = Memory(lambda t: agent.register(t.data_ptr(), t.numel()), buffer_bytes)
        self._max_quarantined = buffer_bytes
        self._published: dict[int, Slice] = {}
        self._reads: list[_Read] = []
        """Reads that have not ended, cancelled ones included."""
        self._peers: dict[str, _Peer] = {}

    def publish(self, payload: Tensor, *, generation: int) -> bytes:
        memory = self._memory.allocate(payload.numel())
        memory.tensor.copy_(payload)
        self._published[generation] = memory
        return memory.address.to_bytes(_ADDRESS_BYTES, "little") + memory.region.metadata

    def release(self, generation: int) -> None:
        memory = self._published.pop(generation, None)
        if memory is not None:
            memory.tensor[:1] += 1  # reads in progress find another checksum
            self._memory.free(memory)

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        self._end_cancelled()
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
        return sum(read.memory.num_bytes for read in self._reads if read.cancelled)

    def state(self, read: _Read) -> ReadState:
        """State of a read. Makes progress without waiting."""
        if read.state == "running" and self._agent is not None:
            read.state = self._agent.state(read.handle)
        return read.state

    def release_read(self, read: _Read) -> None:
        """Release the payload of a read, or cancel it."""
        read.cancelled = True
        if self._agent is not None and self.state(read) != "running":
            self._end(read)

    def _start(self, chunk: KVChunk) -> _Read:
        assert self._agent is not None, "fetch after close"
        if (held := self.num_quarantined_bytes) >= self._max_quarantined:
            raise TransferError(f"{held} bytes are still pinned by cancelled reads")
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
        """Free a read that has ended, so that nothing is written into its memory any more."""
        assert self._agent is not None
        assert read.state != "running"
        self._agent.release(read.handle)
        self._reads.remove(read)
        self._memory.free(read.memory)
        peer = read.peer
        peer.num_reads -= 1
        peer.lost |= read.state == "failed"
        # Removing a publisher while a read is in progress would hide whether the read has ended.
        if peer.lost and peer.num_reads == 0:
            self._forget(peer)

    def _end_cancelled(self) -> None:
        for read in [r for r in self._reads if r.cancelled and self.state(r) != "running"]:
            self._end(read)

    def _peer(self, metadata: bytes) -> _Peer:
        """The publisher that owns the memory described by `metadata`; connects to a new one."""
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
    """A connected publisher."""

    name: str
    last_read: float
    regions: set[bytes] = field(default_factory=set)
    """Metadata of its memory."""
    num_reads: int = 0
    """Reads that have not completed."""
    lost: bool = False
    """Whether a read has failed, after which the connection is unusable."""


@dataclass(eq=False, slots=True)
class _Read:
    """A read into `memory`."""

    peer: _Peer
    handle: int
    memory: Slice
    state: ReadState
    cancelled: bool = False


class _NixlFetch:
    def __init__(self, transport: NixlTransport, chunk: KVChunk, read: _Read, deadline: float) -> None:
        self._transport = transport
        self._chunk = chunk
        self._read = read
        self._deadline = deadline
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
        if not self._read.cancelled:
            self._transport.release_read(self._read)


class _FailedFetch:
    def __init__(self, error: TransferError) -> None:
        self._error = error

    def poll(self) -> Tensor | None:
        raise self._error

    def close(self) -> None:
        pass


@dataclass(eq=False, slots=True)
class Region:
    """Memory that was registered in one piece."""

    tensor: Tensor
    metadata: bytes
    """Description that a reader needs."""
    free: list[tuple[int, int]]
    """Free ranges `[start, end)` in ascending order, with gaps between them."""


@dataclass(eq=False, slots=True)
class Slice:
    """A part of a region with one owner."""

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
    """Allocator of slices of registered memory. It grows by regions and frees none: late reads may still use them."""

    def __init__(self, register: Callable[[Tensor], bytes], region_bytes: int) -> None:
        """`register` makes memory readable and returns its metadata; a region has at least `region_bytes`."""
        self._register = register
        self._region_bytes = region_bytes
        self.regions: list[Region] = []
        self._grow(region_bytes)

    def allocate(self, num_bytes: int) -> Slice:
        """Allocate a slice from the first free range that is large enough, or from a new region."""
        assert num_bytes > 0
        size = round_up(num_bytes, _ALIGNMENT)
        for region in self.regions:
            for i, (start, end) in enumerate(region.free):
                if end - start >= size:
                    region.free[i : i + 1] = [(start + size, end)] if end - start > size else []
                    return Slice(region, start, num_bytes)
        self._grow(size)
        return self.allocate(num_bytes)

    def free(self, memory: Slice) -> None:
        """Free a slice, once; adjacent free ranges are merged."""
        free = memory.region.free
        start = memory.start
        end = start + round_up(memory.num_bytes, _ALIGNMENT)
        i = bisect(free, (start, end))
        if i < len(free) and free[i][0] == end:
            end = free.pop(i)[1]
        if i > 0 and free[i - 1][1] == start:
            i -= 1
            start = free.pop(i)[0]
        free.insert(i, (start, end))

    def _grow(self, num_bytes: int) -> None:
        size = round_up(max(num_bytes, self._region_bytes), _ALIGNMENT)
        tensor = torch.empty(size, dtype=torch.uint8)  # its pages are allocated at first use, or when pinned
        self.regions.append(Region(tensor, self._register(tensor), [(0, size)]))
