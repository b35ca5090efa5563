"""Publishes the KV of prompts, chunk by chunk while they are computed, for the replicas that decode them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.parallel.kv_transport import KVChunk, KVTransport, checksum_of
from shoal.parallel.request_id import RequestId
from shoal.parallel.spans import Spans

from ..scheduling.sequence import Sequence
from ..scheduling.transfer_buffer import TransferBuffer
from .cache import KVCache

Clock = Callable[[], float]


@dataclass(slots=True)
class _Export:
    """A prompt whose KV other replicas read."""

    seq: Sequence
    num_published: int = 0
    generations: list[int] = field(default_factory=list)
    lease_ends: float | None = None
    """None while the prompt is being computed."""


class KVSender:
    """Publishes the KV of prompts and holds it until it is released or its lease ends."""

    def __init__(
        self,
        transport: KVTransport,
        cache: KVCache,
        buffer: TransferBuffer,
        *,
        fingerprint: bytes,
        chunk_tokens: int,
        lease_s: float,
        clock: Clock,
        spans: Spans,
    ) -> None:
        """`chunk_tokens`: most tokens per chunk. `buffer`: where the scheduler reserved room for the prompts."""
        self._transport = transport
        self._cache = cache
        self._buffer = buffer
        self._fingerprint = fingerprint
        self._chunk_tokens = chunk_tokens
        self._lease_s = lease_s
        self._clock = clock
        self._spans = spans
        self._exports: dict[RequestId, _Export] = {}
        self._num_chunks = 0
        self.num_bytes = 0
        """Published so far."""

    @property
    def num_requests(self) -> int:
        """Requests whose KV is published, or will be."""
        return len(self._exports)

    def add(self, request_id: RequestId, seq: Sequence) -> None:
        """Publish the prompt of `seq` as it is computed."""
        self._exports[request_id] = _Export(seq)

    def publish(self, request_id: RequestId, *, epoch: int) -> list[KVChunk]:
        """Publish what was computed of the prompt since the last call; call it before the blocks are freed."""
        export = self._exports[request_id]
        seq = export.seq
        computed = min(seq.num_computed_tokens, seq.num_prompt_tokens)
        chunks = []
        while (start := export.num_published) < computed:
            end = min(computed, start + self._chunk_tokens)
            with self._spans("kv.publish"):
                chunk = self._publish_chunk(request_id, seq, start, end, epoch)
            export.generations.append(chunk.generation)
            export.num_published = end
            self.num_bytes += chunk.num_bytes
            chunks.append(chunk)
        return chunks

    def start_lease(self, request_id: RequestId) -> None:
        """The prompt is complete and its sequence finished: it is held for `lease_s` from now on."""
        self._exports[request_id].lease_ends = self._clock() + self._lease_s

    def release(self, request_id: RequestId) -> None:
        """Forget what was published of a request whose sequence is finished; unknown requests are ignored."""
        export = self._exports.pop(request_id, None)
        if export is not None:
            for generation in export.generations:
                self._transport.release(generation)
            self._buffer.release(export.seq)

    def expire(self) -> None:
        """Release every prompt that nobody read within its lease."""
        now = self._clock()
        for request_id in [i for i, e in self._exports.items() if e.lease_ends is not None and e.lease_ends <= now]:
            self.release(request_id)

    def _publish_chunk(self, request_id: RequestId, seq: Sequence, start: int, end: int, epoch: int) -> KVChunk:
        payload = self._cache.read_kv(self._cache.slots(seq.block_table, start, end))
        generation = self._num_chunks
        self._num_chunks += 1
        return KVChunk(
            id=request_id,
            start=start,
            end=end,
            fingerprint=self._fingerprint,
            epoch=epoch,
            generation=generation,
            num_bytes=payload.numel(),
            checksum=checksum_of(payload, epoch=epoch, generation=generation, start=start, end=end),
            address=self._transport.publish(payload, generation=generation),
        )
