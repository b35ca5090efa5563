"""Diagnosis of a failed collective: which rank is late, lost or in another collective, and the text of the error.

Every message begins with a header that names its collective, so the newest header of a peer says where that peer is:

    message   [ header: epoch, step, layer, op, sequence number, dtype, payload size | payload ]

After a failure the ranks also report to each other through the store.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

_SENDER = struct.Struct("<8sqq")  # magic, rank, payload bytes
_COMMON = struct.Struct("<qqqq16s64s")  # epoch, step, layer, sequence, dtype, op: equal on all ranks of a collective
_MAGIC = b"shoal-c1"
HEADER_BYTES = _SENDER.size + _COMMON.size
MAX_SEGMENT_BYTES = 1 << 36
"""Largest payload of a valid header."""
_REPORT_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Call:
    """One collective as this rank sees it: what goes to each peer, and how many bytes each peer should send."""

    common: bytes
    """The part of the header that is equal on all ranks."""
    sequence: int
    """Number of the collective in its epoch, from 1."""
    sends: Sequence[Tensor]
    expected: Sequence[int] | None
    """None: the peers' headers say it."""
    peers: Sequence[int]

    def header(self, rank: int, peer: int) -> bytes:
        """Header of the message from `rank` to `peer`."""
        return _SENDER.pack(_MAGIC, rank, self.sends[peer].numel()) + self.common

    def __str__(self) -> str:
        return _describe(self.common)


def pack_common(*, epoch: int, step: int, layer: int, sequence: int, dtype: str, text: str) -> bytes:
    """The part of a header that is equal on all ranks; `text` names the collective and its op."""
    encoded = text.encode()
    assert len(encoded) <= 64, f"{encoded!r} is longer than the header's field"
    return _COMMON.pack(epoch, step, layer, sequence, dtype.encode()[:16], encoded)


class Diagnosis:
    """The newest header of every peer in one epoch, and the text of errors that follows from them."""

    def __init__(self, rank: int, size: int, name: str) -> None:
        self.own_rank = f"rank {rank} of {size} in group '{name}'"
        self._peers = [(rank + k) % size for k in range(1, size)]
        self._headers = [bytes(HEADER_BYTES)] * size

    def receive(self, peer: int, header: bytes) -> int:
        """Keep a header of `peer`; returns the number of payload bytes that it announces."""
        magic, sender, num_bytes = _SENDER.unpack_from(header)
        assert (magic, sender) == (_MAGIC, peer), f"not a message of rank {peer}: {header[: _SENDER.size]!r}"
        self._headers[peer] = header
        return int(num_bytes)

    def mismatch(self, call: Call, peer: int) -> str | None:
        """Description of how the collective that `peer` is in differs from `call`; None when they are the same."""
        header = self._headers[peer]
        num_bytes = _SENDER.unpack_from(header)[2]
        same_size = num_bytes <= MAX_SEGMENT_BYTES if call.expected is None else call.expected[peer] == num_bytes
        if same_size and header[_SENDER.size :] == call.common:
            return None
        expected = "any number of" if call.expected is None else call.expected[peer]
        return (
            f"{self.own_rank} is in {call}, sends {call.sends[peer].numel()} bytes to rank {peer} and expects "
            f"{expected} bytes from it; rank {peer} is in {_describe(header[_SENDER.size :])} and sends {num_bytes} "
            "bytes here"
        )

    def first_mismatch(self, call: Call) -> str | None:
        """`mismatch` with the first peer whose newest header is of another collective in the place of `call`."""
        texts = (self.mismatch(call, peer) for peer in self._entered(call))
        return next((text for text in texts if text is not None), None)

    def summary(self, call: Call, *, waited_s: float | None) -> str:
        """This rank's side of a failed `call`; `waited_s`: the time limit that passed, None for a lost connection."""
        what = "lost a connection in" if waited_s is None else f"waited {waited_s:g} s in"
        expected = "what the headers say" if call.expected is None else f"{list(call.expected)} bytes"
        return f"{self.own_rank} {what} {call}; sends {[t.numel() for t in call.sends]} bytes, expects {expected}"

    def peers(self, call: Call, reports: Mapping[int, str]) -> str:
        """Position of every peer when `call` failed, and its report if there is one; continues `summary`."""
        entered = self._entered(call)
        text = ""
        for peer in self._peers:
            text += f"; rank {peer} "
            if peer in entered:
                text += "entered it"
            elif self._sequence(peer):
                text += f"did not send here, last heard in {_describe(self._headers[peer][_SENDER.size :])}"
            else:
                text += "did not send here and was never heard"
            text += f" and reports: <{reports[peer]}>" if peer in reports else " and reports nothing"
        return text

    def _entered(self, call: Call) -> list[int]:
        return [peer for peer in call.peers if self._sequence(peer) == call.sequence]

    def _sequence(self, peer: int) -> int:
        """Sequence number of the newest header of `peer`; 0 before the first."""
        sequence: int = _COMMON.unpack_from(self._headers[peer], _SENDER.size)[3]
        return sequence


def share_report(store: Store, message: str, rank: int, keys: Mapping[int, str], *, wait_s: float) -> dict[int, str]:
    """Report `message`, without its part on the peers, and wait until all peers report or `wait_s` has passed.

    `keys`: the key of each rank's report in the store, this `rank` included. Returns the reports by peer.
    """
    reports: dict[int, str] = {}
    missing = {peer: key for peer, key in keys.items() if peer != rank}
    # A daemon thread, because a call to a frozen store has no deadline.
    thread = threading.Thread(
        target=_exchange_reports,
        args=(store, message.split("; rank ")[0], keys[rank], missing, wait_s, reports),
        daemon=True,
    )
    thread.start()
    thread.join(wait_s + 0.5)
    return dict(reports)


def _exchange_reports(
    store: Store, message: str, own_key: str, missing: dict[int, str], wait_s: float, reports: dict[int, str]
) -> None:
    deadline = time.monotonic() + wait_s
    try:
        store.set(own_key, message)
        while True:
            for peer in [peer for peer in missing if store.check([missing[peer]])]:
                reports[peer] = store.get(missing.pop(peer)).decode()
            if not missing or time.monotonic() >= deadline:
                return
            time.sleep(_REPORT_POLL_S)
    except RuntimeError as error:
        for peer in missing:
            reports[peer] = f"the store did not answer: {error}"


def _describe(common: bytes) -> str:
    epoch, step, layer, _, dtype, text = _COMMON.unpack(common)
    where = f"epoch {epoch}, step {step}, layer {layer}, {dtype.rstrip(bytes(1)).decode()}"
    return f"{text.rstrip(bytes(1)).decode()} ({where})"
