"""Collectives of one group of ranks: each message names the collective it belongs to, and each wait has a deadline.

In a collective every rank sends a message to each peer and receives one from it. Ranks that are in different
collectives find that out from the header (see `diagnosis`), before a byte of the payload is used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store, Work  # type: ignore[attr-defined]

from .diagnosis import Call, Diagnosis, pack_common, share_report
from .spans import Spans
from .transport import SocketMesh

REPORT_WAIT_S = 2.0
"""Wait for the peers' reports after a timeout or a mismatch."""
LOST_REPORT_WAIT_S = 0.05
"""Wait for the peers' reports after a lost connection; recovery begins afterwards."""


class CollectiveError(RuntimeError):
    """A collective failed; the message names this rank, the layer, the op and what is known of every other rank.

    The group is unusable afterwards: all ranks leave it and form a new one.
    """


class CollectiveTimeout(CollectiveError):  # noqa: N818
    """A collective did not complete before its deadline."""


class CollectiveMismatch(CollectiveError):  # noqa: N818
    """Two ranks were in different collectives, or disagreed on the number of bytes."""


class NcclBackend(Protocol):
    """The methods of ProcessGroupNCCL in use."""

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], /) -> Work: ...
    def abort(self) -> None: ...


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
        """A group of more than one rank is ready after `connect`.

        `store_ranks`: number of each rank in the store, under which it reports after a failure; None: its rank here.
        """
        assert 0 <= rank < size
        self.rank = rank
        self.size = size
        self.name = name
        self.epoch = 0
        self.step = 0
        self.timeout_s = timeout_s
        self._spans = spans or Spans()
        self._store_ranks = list(range(size)) if store_ranks is None else list(store_ranks)
        self._peers = [(rank + k) % size for k in range(1, size)]
        self._sequence = 0
        self._diagnosis = Diagnosis(rank, size, name)
        self._mesh: SocketMesh | None = None
        self._nccl: NcclBackend | None = None
        self._store: Store | None = None
        self._closed: str | None = "it was never formed" if size > 1 else None
        self._lock = threading.Lock()
        """Serialises connect() with abort(): a late abort of the old epoch must not close the new one."""

    def connect(
        self, epoch: int, mesh: SocketMesh | None = None, nccl: NcclBackend | None = None, store: Store | None = None
    ) -> None:
        """Begin an epoch, the first one or one after a failure; collectives of the last one are dropped.

        `mesh` carries headers and CPU tensors, `nccl` (present when tensors are on a GPU) the bytes of tensors.
        """
        assert self.size == 1 or mesh is not None
        with self._lock:
            self._close_connections()
            self.epoch = epoch
            self.step = 0
            self._sequence = 0
            self._diagnosis = Diagnosis(self.rank, self.size, self.name)
            self._mesh = mesh
            self._nccl = nccl
            self._store = store
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
        """Send `send_counts[r]` consecutive rows of `x` to rank r; returns a function that waits for the rows received.

        x [sum(send_counts), ...], not to be changed until then; the rows are [sum(recv_counts), ...] in rank order.
        `recv_counts[r]`: number of rows that rank r sends here. No other collective of this group may come in between.
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

        The lengths need not be known: the headers carry them, so this is still one round.
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
        """This epoch's group as a torch ProcessGroup, for libraries that need one; tensors on a GPU only."""
        assert self._nccl is not None
        assert self._store is not None
        return as_process_group(self._nccl, PrefixStore(f"torch/{self.name}", self._store), self.rank, self.size)

    def abort(self, reason: str, *, epoch: int | None = None) -> None:
        """Leave the group: the collective in flight, here and on every peer, fails at once. Any thread may call.

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
    ) -> Call:
        self._sequence += 1
        common = pack_common(
            epoch=self.epoch,
            step=self.step,
            layer=layer,
            sequence=self._sequence,
            dtype=str(dtype).removeprefix("torch."),
            text=f"{kind} '{op}'",
        )
        return Call(common, self._sequence, sends, expected, self._peers if peers is None else peers)

    def _transfer(
        self, kind: str, sends: Sequence[Tensor], recvs: list[Tensor] | None, *, dtype: torch.dtype, layer: int, op: str
    ) -> Callable[[], list[Tensor]]:
        """Begin to move byte tensors to and from every rank, on the tensors' own device; fill `recvs` where given.

        Returns a function that waits for the transfer and returns the received tensors. With NCCL the transfer is
        complete when this returns.
        """
        expected = None if recvs is None else [t.numel() for t in recvs]
        if self._nccl is None:
            return self._exchange(self._call(kind, layer, op, dtype, sends, expected), recvs)
        # On a GPU the messages carry the sizes, which are compared before any byte moves.
        sizes = [_as_bytes(torch.tensor([t.numel()])) for t in sends]
        call = self._call(kind, layer, op, dtype, sizes, None)
        announced = [int(t.view(torch.int64)) for t in self._exchange(call, None)()]
        if expected is not None and announced != expected:
            message = (
                f"{self._diagnosis.own_rank} expected {expected} bytes from the ranks in {call}, they announced "
                f"{announced}"
            )
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

    def _exchange(self, call: Call, recvs: list[Tensor] | None) -> Callable[[], list[Tensor]]:
        """Begin one round in host memory: send what the connections take without waiting.

        Returns a function that completes the round and returns the tensor each rank sent (own entry: what this rank
        sends itself).
        """
        if self._closed is not None:
            raise CollectiveError(
                f"{self._diagnosis.own_rank} cannot run {call}: the group ended before: {self._closed}"
            )
        assert self._mesh is not None
        mesh = self._mesh
        received = [call.sends[self.rank]] * self.size if recvs is None else recvs
        messages = {peer: (call.header(self.rank, peer), call.sends[peer].numpy().data) for peer in call.peers}

        def on_header(peer: int, header: bytes) -> memoryview:
            num_bytes = self._diagnosis.receive(peer, header)
            if (mismatch := self._diagnosis.mismatch(call, peer)) is not None:
                raise CollectiveMismatch(mismatch)
            if call.expected is None:
                received[peer] = torch.empty(num_bytes, dtype=torch.uint8)
            return received[peer].numpy().data

        with self._spans("collective"), self._diagnosing(call, time.monotonic() + self.timeout_s):
            round_ = mesh.begin(messages, on_header)

        def finish() -> list[Tensor]:
            deadline = time.monotonic() + self.timeout_s
            with self._spans("collective.wait"), self._diagnosing(call, deadline):
                mesh.finish(round_, deadline)
            if recvs is not None and recvs[self.rank].numel():
                recvs[self.rank].copy_(call.sends[self.rank])
            return received

        return finish

    @contextmanager
    def _diagnosing(self, call: Call, deadline: float) -> Iterator[None]:
        """Turn errors of the connections into errors of the collective; either ends the group."""
        try:
            yield
        except CollectiveMismatch as error:
            self._give_up(str(error))
            raise
        except OSError as error:
            raise self._diagnose(call, error, late=time.monotonic() >= deadline) from error

    def _diagnose(self, call: Call, error: Exception, *, late: bool) -> CollectiveError:
        """The error of a `call` that did not complete, as far as headers and store explain it; ends the group."""
        if self._closed is not None:
            return CollectiveError(f"{self._diagnosis.own_rank} left {call}: {self._closed}")
        if (mismatch := self._diagnosis.first_mismatch(call)) is not None:
            self._give_up(mismatch)
            return CollectiveMismatch(mismatch)
        message = self._diagnosis.summary(call, waited_s=self.timeout_s if late else None)
        reports = self._give_up(message, REPORT_WAIT_S if late else LOST_REPORT_WAIT_S)
        message += self._diagnosis.peers(call, reports)
        return CollectiveTimeout(message) if late else CollectiveError(f"{message}; cause: {error}")

    def _give_up(self, message: str, wait_s: float = REPORT_WAIT_S) -> dict[int, str]:
        """Report why this rank leaves, wait until all peers report or `wait_s` has passed, and end the group.

        Connections stay open meanwhile, so that in a mismatch the other side finds it in this rank's header too.
        """
        reports: dict[int, str] = {}
        if self._store is not None:
            keys = {rank: f"left/{store_rank}" for rank, store_rank in enumerate(self._store_ranks)}
            reports = share_report(self._store, message, self.rank, keys, wait_s=wait_s)
        self._closed = message
        self._close_connections()
        return reports

    def _close_connections(self) -> None:
        """End all waits on the connections, here and on the peers."""
        if self._mesh is not None:
            self._mesh.shut_down()
        if self._nccl is not None:
            self._nccl.abort()


def as_process_group(backend: Any, store: Store, rank: int, size: int) -> ProcessGroup:
    """A backend (`ProcessGroupNCCL`, `ProcessGroupGloo`) as a group that is not registered in torch's globals."""
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
