"""Transfer of KV cache entries between replicas: chunks, and the interface of a transport.

The prefill replica publishes the entries of a prompt chunk by chunk; the decode replica reads them when it has room. A
chunk holds the entries of a range of positions in all layers and does not depend on the layout or the block size of
either side: MLA's entries are equal on every rank of an attention group.
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
    """A chunk cannot be read or is not the announced one; its positions must be recomputed."""


class KVChunk(RequestMessage, frozen=True, tag="k", kw_only=True):
    """KV cache entries of prompt positions `[start, end)` in all layers, and where to read them.

    layer 0: end - start latents, then as many indexer keys if it has an indexer | layer 1: .. | ..
    """

    start: int
    end: int
    fingerprint: bytes
    """Fingerprint of model, dtype and kernels, which determine the values."""
    epoch: int
    """Epoch of the publishing replica."""
    generation: int
    """Number of the chunk in the publishing process; never reused."""
    num_bytes: int
    checksum: int
    """`checksum_of` the payload, which detects memory that has been reused for another chunk."""
    address: bytes
    """Address of the payload in the transport's own format."""


class Fetch(Protocol):
    """A read in progress."""

    def poll(self) -> Tensor | None:
        """The payload, [num_bytes] uint8 in host memory, once it is complete and checked; None until then.

        TransferError when the read has failed. The tensor is valid until `close`, and the same in every call.
        """
        ...

    def close(self) -> None:
        """Release the payload, or cancel the read. Closing twice is allowed."""
        ...


class KVTransport(Protocol):
    """One rank's end of a transport; used by the thread that steps the engine."""

    def publish(self, payload: Tensor, *, generation: int) -> bytes:
        """Make a copy of `payload`, [n] uint8 in host memory, readable by other replicas; returns its address."""
        ...

    def release(self, generation: int) -> None:
        """Free a published chunk; reads in progress fail with TransferError. Unknown ones are ignored."""
        ...

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> Fetch:
        """Start to read a chunk of another replica; `poll` fails after `timeout_s`."""
        ...

    def close(self) -> None:
        """End all transfers. Closing twice is allowed."""
        ...


def checksum_of(payload: Tensor, *, epoch: int, generation: int, start: int, end: int) -> int:
    """CRC-32 over a chunk's identity and its payload, [n] uint8 in host memory."""
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
