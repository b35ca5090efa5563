"""Collectives of one group of ranks: each message says which collective it belongs to, and each wait has a deadline.

A collective is one exchange: every rank sends a message to each peer and receives one from it.

    message   [ header: epoch, step, layer, op, sequence number, dtype, payload size | payload ]

So ranks that are in different collectives find that out from the header, before a byte of the payload is used.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store, Work  # type: ignore[attr-defined]

from .spans import Spans
from .transport import SocketMesh

_SENDER = struct.Struct("<8sqq")  # magic, rank, payload bytes
_COMMON = struct.Struct(
    "<qqqq16s64s"
)  # epoch, step, layer, sequence, dtype, op: the same on every rank of a collective
_MAGIC = b"shoal-c1"
HEADER_BYTES = _SENDER.size + _COMMON.size
MAX_SEGMENT_BYTES = 1 << 36
"""A header that announces more is broken."""
REPORT_WAIT_S = 2.0  # after a timeout or a mismatch
LOST_REPORT_WAIT_S = 0.05  # after a lost connection: recovery waits for it


class CollectiveError(RuntimeError):
    """A collective failed; the message names this rank, the layer, the op and what is known of every other rank.

    The group is unusable afterwards: all ranks leave it and form a new one.
    """


class CollectiveTimeout(CollectiveError):  # noqa: N818
    """A collective did not complete before its deadline."""


class CollectiveMismatch(CollectiveError):  # noqa: N818
    """Two ranks were in different collectives, or disagreed on the number of bytes."""


class NcclBackend(Protocol):
    """What is used of ProcessGroupNCCL."""

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], /) -> Work: ...
    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Call:
    """One collective as this rank sees it: what goes to each peer, and how many bytes each peer should send."""

    common: bytes
    sends: Sequence[Tensor]
    expected: Sequence[int] | None
    """None: the peers' headers say it."""
    peers: Sequence[int]

    def __str__(self) -> str:
        return _describe(self.common)


class Communicator:
    """The ranks of one group. All ranks call the same collectives in the same order; one thread at a time.

    `epoch` and `step` (set by the engine) go into every header with the caller's `layer` (-1: none) and `op`.
    A group of one rank does nothing and needs no process group. `abort` may be called from another thread.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        name: str = "world",
        timeout_s: float = 60.0,
        spans: Spans | None = None,
        store_ranks: Sequence[int] | None = None,
    ) -> None:
        """With more than one rank it is ready after `connect`.

        After a failure ranks tell each other through the store where they were, each under its `store_ranks` entry.
        """
        assert 0 <= rank < size
        self.rank, self.size, self.name, self.epoch, self.step = rank, size, name, 0, 0
        self.timeout_s = timeout_s
        self._spans = spans or Spans()
        self._store_ranks = list(range(size)) if store_ranks is None else list(store_ranks)
        self._peers = [(rank + k) % size for k in range(1, size)]
        self._sequence = 0
        self._mesh: SocketMesh | None = None
        self._nccl: NcclBackend | None = None
        self._closed: str | None = "it was never formed" if size > 1 else None
        self._lock = threading.Lock()
        """Serialises connect() with abort(): a late abort of the old epoch must not close the new one."""

    def connect(
        self, epoch: int, mesh: SocketMesh | None = None, nccl: NcclBackend | None = None, store: Store | None = None
    ) -> None:
        """Begin an epoch, the first one or one after a failure; what was in flight in the last one is gone.

        `mesh` carries headers and CPU tensors, `nccl` (present when tensors are on a GPU) the bytes of tensors.
        """
        assert self.size == 1 or mesh is not None
        with self._lock:
            self._close_connections()
            self.epoch, self.step, self._sequence = epoch, 0, 0
            self._mesh, self._nccl, self._store = mesh, nccl, store
            self._recv_headers = [bytes(HEADER_BYTES)] * self.size
            self._closed = None

    def all_gather(self, x: Tensor, *, dim: int, layer: int, op: str) -> Tensor:
        """Concatenate the ranks' tensors (one shape, one dtype) along `dim` in rank order."""
        if self.size == 1:
            return x
        own = _as_bytes(x)
        out = x.new_empty((self.size, *x.shape))
        recvs = list(torch.split(_as_bytes(out), own.numel())) if own.numel() else [own] * self.size
        self._transfer("all_gather", [own] * self.size, recvs, dtype=x.dtype, layer=layer, op=op)()
        dim %= x.dim()
        return out.flatten(0, 1) if dim == 0 else torch.cat(list(out), dim=dim)

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], *, layer: int, op: str
    ) -> Callable[[], Tensor]:
        """Send `send_counts[r]` consecutive rows of `x` to rank r; what is returned waits for the rows received.

        x [sum(send_counts), ...], left as it is until then; the rows are [sum(recv_counts), ...] in rank order.
        `recv_counts[r]` is what rank r sends here. No other collective of this group may come in between.
        """
        assert len(send_counts) == len(recv_counts) == self.size
        assert sum(send_counts) == x.shape[0]
        if self.size == 1:
            return lambda: x
        row_bytes = prod(x.shape[1:]) * x.element_size()
        out = x.new_empty((sum(recv_counts), *x.shape[1:]))
        sends = list(torch.split(_as_bytes(x), [n * row_bytes for n in send_counts]))
        recvs = list(torch.split(_as_bytes(out), [n * row_bytes for n in recv_counts]))
        finish = self._transfer("all_to_all", sends, recvs, dtype=x.dtype, layer=layer, op=op)

        def receive() -> Tensor:
            finish()
            return out

        return receive

    def all_to_all_bytes(self, segments: Sequence[Tensor], *, layer: int, op: str) -> list[Tensor]:
        """Send `segments[r]` (uint8, one dimension, any length) to rank r; return what each rank sent here.

        The lengths need not be known: the headers carry them, so this is still one exchange.
        """
        assert len(segments) == self.size
        if self.size == 1:
            return list(segments)
        return self._transfer("all_to_all_bytes", segments, None, dtype=torch.uint8, layer=layer, op=op)()

    def all_gather_ints(self, values: list[int], *, layer: int, op: str) -> list[list[int]]:
        """Every rank's list (64-bit values; lengths may differ), in rank order. Host memory only."""
        if self.size == 1:
            return [list(values)]
        own = _as_bytes(torch.tensor(values, dtype=torch.int64))
        received = self._exchange(
            self._call("all_gather_ints", layer, op, torch.int64, [own] * self.size, None), None
        )()
        return [segment.view(torch.int64).tolist() for segment in received]

    def broadcast_bytes(self, data: bytes | None, num_bytes: int, root: int, *, layer: int, op: str) -> bytes:
        """The `num_bytes` bytes of `data` on rank `root` of this group; `data` is None elsewhere. Host memory only."""
        if self.rank == root:
            assert data is not None
            assert len(data) == num_bytes
            if self.size == 1:
                return data
        peers = self._peers if self.rank == root else [root]
        none = torch.empty(0, dtype=torch.uint8)
        payload = none if data is None else torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else none
        recvs = [none] * self.size
        if self.rank != root:
            recvs[root] = torch.empty(num_bytes, dtype=torch.uint8)
        kind = f"broadcast_bytes from rank {root}"
        call = self._call(kind, layer, op, torch.uint8, [payload] * self.size, [t.numel() for t in recvs], peers)
        self._exchange(call, recvs)()
        return data if data is not None else recvs[root].numpy().tobytes()

    def process_group(self) -> ProcessGroup:
        """This epoch's ranks as torch knows a group, for a library that takes one; tensors on a GPU only."""
        assert self._nccl is not None
        assert self._store is not None
        return as_process_group(self._nccl, PrefixStore(f"torch/{self.name}", self._store), self.rank, self.size)

    def abort(self, reason: str, *, epoch: int | None = None) -> None:
        """Leave the group: the collective that runs here, now and on every peer, fails at once. Any thread may call.

        With an `epoch`, only a group of that epoch or an earlier one is left.
        """
        with self._lock:
            if self._closed is None and (epoch is None or self.epoch <= epoch):
                self._closed = reason
                self._close_connections()

    def _call(
        self,
        kind: str,
        layer: int,
        op: str,
        dtype: torch.dtype,
        sends: Sequence[Tensor],
        expected: Sequence[int] | None,
        peers: Sequence[int] | None = None,
    ) -> _Call:
        text = f"{kind} '{op}'".encode()
        assert len(text) <= 64, f"{text!r} is longer than the header's field"
        self._sequence += 1
        dtype_name = str(dtype).removeprefix("torch.").encode()[:16]
        common = _COMMON.pack(self.epoch, self.step, layer, self._sequence, dtype_name, text)
        return _Call(common, sends, expected, self._peers if peers is None else peers)

    def _transfer(
        self, kind: str, sends: Sequence[Tensor], recvs: list[Tensor] | None, *, dtype: torch.dtype, layer: int, op: str
    ) -> Callable[[], list[Tensor]]:
        """Byte tensors to and from every rank, on the tensors' own device; fills `recvs` where given.

        Sends what it can; what is returned waits for the rest.
        """
        expected = None if recvs is None else [t.numel() for t in recvs]
        if self._nccl is None:
            return self._exchange(self._call(kind, layer, op, dtype, sends, expected), recvs)
        # On a GPU the messages carry the sizes, which are compared before any byte moves.
        sizes = [_as_bytes(torch.tensor([t.numel()])) for t in sends]
        call = self._call(kind, layer, op, dtype, sizes, None)
        announced = [int(t.view(torch.int64)) for t in self._exchange(call, None)()]
        if expected is not None and announced != expected:
            message = f"{self._who()} expected {expected} bytes from the ranks in {call}, they announced {announced}"
            self._give_up(message)
            raise CollectiveMismatch(message)
        received = [sends[0].new_empty(n) for n in announced] if recvs is None else recvs
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._spans("collective.wait"):
                self._wait_nccl(self._nccl.alltoall(received, list(sends)), deadline)
        except RuntimeError as error:
            raise self._diagnose(call, error, late=time.monotonic() >= deadline) from error
        return lambda: received

    def _wait_nccl(self, work: Work, deadline: float) -> None:
        """Wait until `work` is complete; RuntimeError when it failed, is late, or the group was left meanwhile."""
        pause_s = 0.0
        while not work.is_completed():
            if self._closed is not None or time.monotonic() >= deadline:
                raise RuntimeError("NCCL did not complete")
            time.sleep(pause_s)
            pause_s = min(pause_s + 5e-6, 1e-4)
        work.wait()  # complete: only orders the current stream after NCCL's
        if self._closed is not None:
            # NCCL reports aborted work as complete; what it received is not what was sent.
            raise RuntimeError("the group was left while NCCL ran")

    def _exchange(self, call: _Call, recvs: list[Tensor] | None) -> Callable[[], list[Tensor]]:
        """One exchange in host memory: sends what the connections take, and returns what does the rest.

        That one returns what each rank sent (own entry: what this rank sends itself).
        """
        if self._closed is not None:
            raise CollectiveError(f"{self._who()} cannot run {call}: the group ended before: {self._closed}")
        assert self._mesh is not None
        mesh, received = self._mesh, [call.sends[self.rank]] * self.size if recvs is None else recvs
        messages = {}
        for peer in call.peers:
            payload = call.sends[peer]
            header = _SENDER.pack(_MAGIC, self.rank, payload.numel()) + call.common
            messages[peer] = (header, payload.numpy().data)

        def on_header(peer: int, header: bytes) -> memoryview:
            self._recv_headers[peer] = header
            num_bytes = self._check_header(call, peer)
            if call.expected is None:
                received[peer] = torch.empty(num_bytes, dtype=torch.uint8)
            return received[peer].numpy().data

        with self._spans("collective"), self._diagnosing(call, time.monotonic() + self.timeout_s):
            exchange = mesh.begin(messages, on_header)

        def finish() -> list[Tensor]:
            deadline = time.monotonic() + self.timeout_s
            with self._spans("collective.wait"), self._diagnosing(call, deadline):
                mesh.finish(exchange, deadline)
            if recvs is not None and recvs[self.rank].numel():
                recvs[self.rank].copy_(call.sends[self.rank])
            return received

        return finish

    @contextmanager
    def _diagnosing(self, call: _Call, deadline: float) -> Iterator[None]:
        """Errors of the connections become errors of the collective; either ends the group."""
        try:
            yield
        except CollectiveMismatch as error:
            self._give_up(str(error))
            raise
        except OSError as error:
            raise self._diagnose(call, error, late=time.monotonic() >= deadline) from error

    def _check_header(self, call: _Call, peer: int) -> int:
        """The number of bytes `peer` sends; CollectiveMismatch if its frame belongs to another collective."""
        header = self._recv_headers[peer]
        sent: tuple[bytes, int, int] = _SENDER.unpack_from(header)
        magic, sender, num_bytes = sent
        assert (magic, sender) == (_MAGIC, peer), f"not a frame of rank {peer}: {header[: _SENDER.size]!r}"
        same_size = num_bytes <= MAX_SEGMENT_BYTES if call.expected is None else call.expected[peer] == num_bytes
        if same_size and header[_SENDER.size :] == call.common:
            return num_bytes
        expected = "any number of" if call.expected is None else call.expected[peer]
        raise CollectiveMismatch(
            f"{self._who()} is in {call}, sends {call.sends[peer].numel()} bytes to rank {peer} and expects {expected}"
            f" bytes from it; rank {peer} is in {_describe(header[_SENDER.size :])} and sends {num_bytes} bytes here"
        )

    def _who(self) -> str:
        return f"rank {self.rank} of {self.size} in group '{self.name}'"

    def _diagnose(self, call: _Call, error: Exception, *, late: bool) -> CollectiveError:
        """What went wrong in `call`, as far as headers and store tell; ends the group."""
        if self._closed is not None:
            return CollectiveError(f"{self._who()} left {call}: {self._closed}")
        entered = [peer for peer in call.peers if self._heard(peer) == self._sequence]
        for peer in entered:
            try:
                self._check_header(call, peer)
            except CollectiveMismatch as mismatch:
                self._give_up(str(mismatch))
                return mismatch
        what = f"waited {self.timeout_s:g} s in" if late else "lost a connection in"
        expected = "what the headers say" if call.expected is None else f"{list(call.expected)} bytes"
        message = f"{self._who()} {what} {call}; sends {[t.numel() for t in call.sends]} bytes, expects {expected}"
        reports = self._give_up(message, REPORT_WAIT_S if late else LOST_REPORT_WAIT_S)
        for peer in self._peers:
            message += f"; rank {peer} "
            if peer in entered:
                message += "entered it"
            elif self._heard(peer):
                message += f"did not send here, last heard in {_describe(self._recv_headers[peer][_SENDER.size :])}"
            else:
                message += "did not send here and was never heard"
            message += f" and reports: <{reports[peer]}>" if peer in reports else " and reports nothing"
        return CollectiveTimeout(message) if late else CollectiveError(f"{message}; cause: {error}")

    def _heard(self, peer: int) -> int:
        """The sequence number of the newest frame of `peer`; 0 before the first."""
        sequence: int = _COMMON.unpack_from(self._recv_headers[peer], _SENDER.size)[3]
        return sequence

    def _give_up(self, message: str, wait_s: float = REPORT_WAIT_S) -> dict[int, str]:
        """Tell the other ranks why this one leaves, wait until all tell or `wait_s` passed, and end the group.

        Connections stay open meanwhile, so that in a mismatch the other side finds it in this rank's frame too.
        """
        reports: dict[int, str] = {}
        if self._store is not None:
            # A daemon thread, because a call to a frozen store has no deadline.
            asking = threading.Thread(
                target=self._share_report, args=(self._store, message, wait_s, reports), daemon=True
            )
            asking.start()
            asking.join(wait_s + 0.5)
        self._closed = message
        self._close_connections()
        return dict(reports)

    def _share_report(self, store: Store, message: str, wait_s: float, reports: dict[int, str]) -> None:
        deadline = time.monotonic() + wait_s
        keys = {peer: f"left/{self._store_ranks[peer]}" for peer in self._peers}
        try:
            store.set(f"left/{self._store_ranks[self.rank]}", message.split("; rank ")[0])
            while True:
                for peer in [peer for peer in keys if store.check([keys[peer]])]:
                    reports[peer] = store.get(keys.pop(peer)).decode()
                if not keys or time.monotonic() >= deadline:
                    return
                time.sleep(0.02)
        except RuntimeError as error:
            for peer in keys:
                reports[peer] = f"the store did not answer: {error}"

    def _close_connections(self) -> None:
        """Frees whoever waits, here and on the peers."""
        if self._mesh is not None:
            self._mesh.shut_down()
        if self._nccl is not None:
            self._nccl.abort()


def as_process_group(backend: Any, store: Store, rank: int, size: int) -> ProcessGroup:
    """A backend (`ProcessGroupNCCL`, `ProcessGroupGloo`) as a group that no global of torch knows."""
    device, kind = {
        "nccl": (torch.device("cuda"), ProcessGroup.BackendType.NCCL),
        "gloo": (torch.device("cpu"), ProcessGroup.BackendType.GLOO),
    }[backend.name()]
    group = ProcessGroup(store, rank, size)
    group._set_default_backend(kind)
    group._register_backend(device, kind, backend)
    return group


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def _describe(common: bytes) -> str:
    epoch, step, layer, _, dtype, text = _COMMON.unpack(common)
    where = f"epoch {epoch}, step {step}, layer {layer}, {dtype.rstrip(bytes(1)).decode()}"
    return f"{text.rstrip(bytes(1)).decode()} ({where})"
