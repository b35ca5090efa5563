"""All messages between processes: to and from workers, and between workers and their supervisor.

A message is a tagged Struct, encoded as a msgpack array behind a fixed header:

    magic (4 bytes) | payload length (4 bytes, big endian) | payload

Types are checked when a message is decoded. Values round-trip exactly: floats as their 64 bits, None as None, integer
keys as integers.
"""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestMessage
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.types import EngineOutput, GeneratedTokens, PromptLoaded, Request

from .assignment import Assignment

MAX_MESSAGE_BYTES = 1 << 30
"""Upper bound of one command or event; a request within its limits stays far below."""
MAX_CONTROL_BYTES = 1 << 16
"""Upper bound of one message between a worker and its supervisor."""

_HEADER = struct.Struct(">4sI")


class EndPrefill(RequestMessage, frozen=True, tag="e"):
    """The prefill of a request that waits for it ended: see `Engine.end_prefill`."""

    generated: tuple[GeneratedTokens, ...] | None
    """The first tokens of every sample; None: it failed."""


class Abort(RequestMessage, frozen=True, tag="a"):
    """Drop a request: see `Engine.abort`."""


Command = Request | KVChunk | EndPrefill | Abort
"""What a worker is sent, in the order in which it must act on it."""
Event = EngineOutput | KVChunk | PromptLoaded
"""What a worker reports, in the order in which it came about."""


class _Control(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message between a worker and its supervisor."""


class Hello(_Control, frozen=True, tag="hello"):
    """A worker's first message: it has the key of this run."""

    key: str
    name: str
    node_id: str
    pid: int


class Heartbeat(_Control, frozen=True, tag="beat"):
    """A worker is alive."""

    num_steps: int
    """Grows while its loop makes progress; -1 outside the loop."""
    stats: EngineStats | None = None
    """Counters of the engine, once there is one."""


class Loaded(_Control, frozen=True, tag="loaded"):
    """A worker has the weights of the rank that it was given."""


class Joining(_Control, frozen=True, tag="joining"):
    """A worker began to join an epoch, and waits for its peers."""

    epoch: int


class Joined(_Control, frozen=True, tag="joined"):
    """A worker found all its peers of an epoch."""

    epoch: int


class Left(_Control, frozen=True, tag="left"):
    """A worker left an epoch because a peer did not answer."""

    epoch: int
    reason: str


class LogMessage(_Control, frozen=True, tag="log"):
    """A log record of a worker, for the driver's log."""

    logger: str
    level: int
    """As in `logging`."""
    text: str


class FaultNotice(_Control, frozen=True, tag="fault"):
    """A failpoint is about to strike, once `FaultNoted` has come."""

    point: str


class FaultNoted(_Control, frozen=True, tag="fault"):
    """The supervisor knows of the failpoint that is about to strike."""


class LeaveEpoch(_Control, frozen=True, tag="leave"):
    """Peers will not answer in this epoch or an earlier one."""

    epoch: int


class LoadRank(_Control, frozen=True, tag="load"):
    """Load the weights of a rank, to join an epoch to come."""

    assignment: Assignment


class JoinEpoch(_Control, frozen=True, tag="join"):
    """Join the other ranks in a new epoch."""

    assignment: Assignment


WorkerReport = Hello | Heartbeat | Loaded | Joining | Joined | Left | LogMessage | FaultNotice
"""What a worker tells its supervisor."""
SupervisorOrder = LeaveEpoch | LoadRank | JoinEpoch | FaultNoted
"""What a supervisor tells a worker."""


class WireError(ValueError):
    """Bytes that are not a message of the expected kind, or a value that no message can hold."""


T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes the messages of one direction."""

    def __init__(self, magic: bytes, kinds: Any, max_bytes: int) -> None:
        """`kinds`: the Struct, or union of Structs, that a message may be; `max_bytes` bounds the payload."""
        assert len(magic) == 4
        self.magic = magic
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kinds)

    def encode(self, message: T) -> bytes:
        """Encode with the header; WireError for a value that does not fit or a message above the size limit."""
        try:
            payload = self._encoder.encode(message)
        except OverflowError as error:
            raise WireError(f"{_subject(message)}: an integer does not fit in 64 bits") from error
        except UnicodeEncodeError as error:
            raise WireError(f"{_subject(message)}: a text has a lone surrogate, which is not a character") from error
        if len(payload) > self.max_bytes:
            raise WireError(
                f"{_subject(message)}: a message of {len(payload)} bytes is above the limit of {self.max_bytes}"
            )
        return _HEADER.pack(self.magic, len(payload)) + payload

    def decode(self, data: bytes) -> T:
        """Decode one whole message; WireError for anything else."""
        if not _HEADER.size <= len(data) <= _HEADER.size + self.max_bytes:
            raise WireError(
                f"a message has {len(data)} bytes, expected {_HEADER.size} to {_HEADER.size + self.max_bytes}"
            )
        size = self._check_header(data)
        if size != len(data) - _HEADER.size:
            raise WireError(f"a message announces {size} bytes and has {len(data) - _HEADER.size}")
        return self._decode(memoryview(data)[_HEADER.size :])

    def take(self, received: bytearray) -> list[T]:
        """Cut the complete messages off the front of a stream and decode them; WireError for anything else."""
        messages = []
        while received:
            if not received.startswith(self.magic[: len(received)]):
                raise WireError(f"a message starts with {bytes(received[:4])!r}, expected {self.magic!r}")
            if len(received) < _HEADER.size:
                break
            end = _HEADER.size + self._check_header(received)
            if len(received) < end:
                break
            messages.append(self._decode(bytes(received[_HEADER.size : end])))
            del received[:end]
        return messages

    def _check_header(self, data: bytes | bytearray) -> int:
        """The payload's length."""
        magic, size = _HEADER.unpack_from(data)
        if magic != self.magic:
            raise WireError(f"a message starts with {magic!r}, expected {self.magic!r}")
        if size > self.max_bytes:
            raise WireError(f"a message announces {size} bytes, at most {self.max_bytes} are allowed")
        assert isinstance(size, int)
        return size

    def _decode(self, payload: bytes | memoryview) -> T:
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"a message is not what its kind promises: {error}") from error


COMMANDS: Codec[Command] = Codec(b"SCM1", Command, MAX_MESSAGE_BYTES)
EVENTS: Codec[Event] = Codec(b"SEV1", Event, MAX_MESSAGE_BYTES)
REPORTS: Codec[WorkerReport] = Codec(b"SWR1", WorkerReport, MAX_CONTROL_BYTES)
ORDERS: Codec[SupervisorOrder] = Codec(b"SSO1", SupervisorOrder, MAX_CONTROL_BYTES)


def _subject(message: object) -> str:
    """What an error calls a message."""
    return f"request {message.id}" if isinstance(message, Request | RequestMessage) else type(message).__name__
