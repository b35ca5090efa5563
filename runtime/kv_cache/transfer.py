"""How an engine exchanges the KV of prompts with other replicas (disaggregated prefill and decode)."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor

from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId

from ..scheduling.batch import KVWrite
from ..scheduling.sequence import Sequence
from ..types import PromptLoaded
from .receiver import KVReceiver
from .sender import KVSender

logger = logging.getLogger("shoal.kv_transfer")


class KVTransfer:
    """The prompts that one engine sends and receives. Only the leader of an attention group has one.

    A request with a remote decode is sent: `publish` after each step that computes its prompt, then `finish`. A request
    with a remote prefill is received: it waits in the scheduler until its chunks are in the cache, as `plan` and
    `commit` bring them there, or until its load fails; `resume` ends the wait either way.
    """

    def __init__(self, sender: KVSender, receiver: KVReceiver) -> None:
        self.sender = sender
        self.receiver = receiver
        self.num_failed = 0
        """Received prompts of which a part had to be computed here."""
        self._waiting: dict[RequestId, int] = {}
        """Sequence that waits for its prompt, by request."""
        self._resumed: list[PromptLoaded] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that were published or received so far."""
        return self.sender.num_bytes + self.receiver.num_bytes

    def send(self, request_id: RequestId, seq: Sequence) -> None:
        """Publish the prompt of a sequence that is about to be scheduled."""
        seq.remote_decode = True
        self.sender.add(request_id, seq)

    def receive(self, request_id: RequestId, seq: Sequence) -> None:
        """Let a sequence that is about to be scheduled wait for its prompt."""
        seq.remote_prefill_pending = True
        self.receiver.expect(request_id, seq)
        self._waiting[request_id] = seq.seq_id

    def waiting_sequence(self, request_id: RequestId) -> int | None:
        """The sequence of a request that waits for its prompt; None if the request does not wait."""
        return self._waiting.get(request_id)

    def add_chunk(self, chunk: KVChunk) -> None:
        """A chunk was published; ignored if its request does not wait for it."""
        if (seq_id := self._waiting.get(chunk.id)) is not None:
            self.receiver.add_chunk(seq_id, chunk)

    def end_prefill(self, request_id: RequestId, output_token_ids: list[int] | None) -> None:
        """The remote prefill of a waiting request is complete and these tokens follow, or (None) it failed."""
        self.receiver.end_prefill(self._waiting[request_id], output_token_ids)

    def drop(self, request_id: RequestId) -> None:
        """Neither send nor receive anything more of a request whose sequences left the scheduler."""
        if (seq_id := self._waiting.pop(request_id, None)) is not None:
            self.receiver.drop(seq_id)
        self.sender.release(request_id)

    def finish(self, request_id: RequestId, *, handed_over: bool) -> None:
        """A request with a remote decode left this engine; its KV is kept for a while if it was `handed_over`."""
        if handed_over:
            self.sender.start_lease(request_id)
        else:
            self.sender.release(request_id)

    def expire(self) -> None:
        """Release the prompts that nobody read in time."""
        self.sender.expire()

    def resume(self) -> list[int]:
        """Resume the sequences whose prompts are in the cache, or whose loads failed; returns their ids."""
        resumed = self.receiver.resume_complete()
        self._resumed += resumed
        for one in resumed:
            if one.error is not None:
                self.num_failed += 1
                logger.warning("request %s computes its prompt here: %s", one.id, one.error)
        return [self._waiting.pop(one.id) for one in resumed]

    def take_resumed(self) -> list[PromptLoaded]:
        """Requests that were resumed since the last call. A step that fails does not call it, so none is lost."""
        resumed = self._resumed
        self._resumed = []
        return resumed

    def plan(self) -> list[KVWrite]:
        """What this step writes to the cache before it computes anything; it is planned again if the step fails."""
        return self.receiver.plan()

    def payload(self, index: int) -> Tensor | None:
        """What the `index`-th planned write writes, [num_bytes] uint8."""
        return self.receiver.payload(index)

    def commit(self) -> None:
        """The planned writes are done on all ranks of the attention group."""
        self.receiver.commit()

    def publish(self, request_ids: Iterable[RequestId], *, epoch: int) -> list[KVChunk]:
        """Publish what the last step computed of the prompts of these requests."""
        return [chunk for request_id in request_ids for chunk in self.sender.publish(request_id, epoch=epoch)]

    def audit(self) -> list[str]:
        """What is left although no request is in flight."""
        counts = {"published": self.sender.num_requests, "awaited": self.receiver.num_requests}
        return [f"the KV of {count} requests is {what}" for what, count in counts.items() if count]


class NoTransfer:
    """The `KVTransfer` of an engine without a transport: every request is prefilled and decoded here."""

    num_failed = 0
    num_bytes = 0

    def send(self, request_id: RequestId, seq: Sequence) -> None:
        raise AssertionError(f"request {request_id} has a remote decode, but there is no KV transport")

    def receive(self, request_id: RequestId, seq: Sequence) -> None:
        raise AssertionError(f"request {request_id} has a remote prefill, but there is no KV transport")

    def waiting_sequence(self, request_id: RequestId) -> int | None:
        return None

    def add_chunk(self, chunk: KVChunk) -> None:
        pass

    def end_prefill(self, request_id: RequestId, output_token_ids: list[int] | None) -> None:
        pass

    def drop(self, request_id: RequestId) -> None:
        pass

    def finish(self, request_id: RequestId, *, handed_over: bool) -> None:
        pass

    def expire(self) -> None:
        pass

    def resume(self) -> list[int]:
        return []

    def take_resumed(self) -> list[PromptLoaded]:
        return []

    def plan(self) -> list[KVWrite]:
        return []

    def payload(self, index: int) -> Tensor | None:
        return None

    def commit(self) -> None:
        pass

    def publish(self, request_ids: Iterable[RequestId], *, epoch: int) -> list[KVChunk]:
        return []

    def audit(self) -> list[str]:
        return []
