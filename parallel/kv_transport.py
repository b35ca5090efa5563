"""Moving cache records between replicas: what a chunk is, and what a transport does with it.

The replica that computed a prompt publishes its records chunk by chunk; the one that goes on reads them when it has
room. A chunk holds the records of some positions in all layers, and nothing in it depends on the layout or the block
size of either side: MLA's records are the same on every rank of an attention group.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Protocol

from .request_id import RequestMessage

if TYPE_CHECKING:
    from torch import Tensor

_IDENTITY = struct.Struct("<qqqq")


class TransferError(RuntimeError):
    """A chunk cannot be had, or is not what was announced; its records must be computed again."""


class KVChunk(RequestMessage, frozen=True, tag="k", kw_only=True):
    """The records of prompt positions `[start, end)` in all layers, and where to read them.

    layer 0: end - start records, then as many index keys if it has an indexer | layer 1: .. | ..
    """

    start: int
    end: int
    fingerprint: bytes
    """Fingerprint of model, dtype and kernels; KV of another one has other values."""
    epoch: int
    """Epoch of the publishing replica."""
    generation: int
    """Number of the chunk in the publishing process; never used twice."""
    num_bytes: int
    checksum: int
    """`checksum_of` the payload: memory that was given to another chunk does not pass for this one."""
    address: bytes
    """Where the payload is, in the transport's own terms."""


class Fetch(Protocol):
    """A chunk on its way here."""

    def poll(self) -> Tensor | None:
        """The payload, [num_bytes] uint8 in host memory, once it is complete and checked; None until then.

        TransferError when it will not come. The tensor is valid until `close`, and the same in every call.
        """
        ...

    def close(self) -> None:
        """Let go of the payload, or of the attempt. Closing twice is allowed."""
        ...


class KVTransport(Protocol):
    """One rank's end of the transport; used by the thread that steps the engine."""

    def publish(self, payload: Tensor, *, generation: int) -> bytes:
        """Make a copy of `payload`, [n] uint8 in host memory, readable for other replicas; returns its address."""
        ...

    def release(self, generation: int) -> None:
        """Forget a published chunk; who still reads it gets a TransferError. Unknown ones are ignored."""
        ...

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        """Start to read a chunk that another replica published; `poll` fails after `timeout_s`."""
        ...

    def close(self) -> None:
        """End all transfers. Closing twice is allowed."""
        ...


def checksum_of(payload: Tensor, *, epoch: int, generation: int, start: int, end: int) -> int:
    """CRC-32 of a chunk's identity and then its payload, [n] uint8 in host memory."""
    seed = zlib.crc32(_IDENTITY.pack(epoch, generation, start, end))
    return zlib.crc32(payload.numpy().data, seed)


def check_payload(chunk: KVChunk, payload: Tensor) -> None:
    """TransferError unless the bytes are those that were published as `chunk`."""
    if payload.numel() != chunk.num_bytes:
        raise TransferError(
            f"chunk {chunk.generation} of request {chunk.id} has {payload.numel()} bytes, "
            f"{chunk.num_bytes} were announced"
        )
    found = checksum_of(payload, epoch=chunk.epoch, generation=chunk.generation, start=chunk.start, end=chunk.end)
    if found != chunk.checksum:
        raise TransferError(
            f"chunk {chunk.generation} of request {chunk.id} has checksum {found:08x}, "
            f"{chunk.checksum:08x} was announced"
        )
