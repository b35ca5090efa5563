"""A prefill engine and a decode engine with a transport in memory between them, driven as a router drives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace
from torch import Tensor

from shoal.parallel.kv_transport import KVChunk, TransferError, check_payload
from shoal.runtime.engine.engine import Engine
from shoal.runtime.types import GeneratedTokens, Prefilled, PromptLoaded, Request, RequestOutput
from tests.support.answers import Answers

Published = dict[tuple[int, int], Tensor]


@dataclass
class MemoryTransport:
    """All transports with the same `published` reach each other; `spoil` changes what a fetch returns."""

    rank: int
    published: Published
    delay: int = 0
    """Polls before a payload is there."""
    spoil: Callable[[KVChunk, Tensor], Tensor | None] = lambda chunk, payload: payload
    fetched: list[KVChunk] = field(default_factory=list)

    def publish(self, payload: Tensor, *, generation: int) -> bytes:
        assert (self.rank, generation) not in self.published
        self.published[self.rank, generation] = payload.clone()
        return bytes([self.rank])

    def release(self, generation: int) -> None:
        self.published.pop((self.rank, generation), None)

    def fetch(self, chunk: KVChunk, *, timeout_s: float) -> MemoryFetch:
        self.fetched.append(chunk)
        return MemoryFetch(self, chunk, self.delay)

    def close(self) -> None:
        pass


@dataclass
class MemoryFetch:
    transport: MemoryTransport
    chunk: KVChunk
    polls_left: int

    def poll(self) -> Tensor | None:
        self.polls_left -= 1
        if self.polls_left >= 0:
            return None
        payload = self.transport.published.get((self.chunk.address[0], self.chunk.generation))
        if payload is None:
            raise TransferError(f"chunk {self.chunk.generation} was released")
        spoiled = self.transport.spoil(self.chunk, payload.clone())
        if spoiled is not None:
            check_payload(self.chunk, spoiled)
        return spoiled

    def close(self) -> None:
        pass


@dataclass
class Split:
    """What a router does for one prefill and one decode engine (each the leader of its ranks)."""

    prefill: Engine
    decode: Engine
    answers: Answers = field(default_factory=Answers)
    begun: set[str] = field(default_factory=set)
    prefilled: dict[str, tuple[GeneratedTokens, ...]] = field(default_factory=dict)
    """The first tokens of requests that were handed over."""
    loaded: list[PromptLoaded] = field(default_factory=list)

    @property
    def finished(self) -> dict[str, RequestOutput]:
        return self.answers.finished

    def submit(self, request: Request) -> None:
        self.answers.expect(request)
        self.prefill.add_request(replace(request, do_remote_decode=True, generated=()))

    def step_prefill(self) -> None:
        result = self.prefill.step()
        for chunk in result.chunks:
            if chunk.request_id not in self.begun:
                self.begun.add(chunk.request_id)
                request = self.answers.responses[chunk.request_id].request
                params = replace(request.params, prompt_logprobs=None)
                self.decode.add_request(replace(request, params=params, do_remote_prefill=True))
            self.decode.add_chunk(chunk)
        self.answers.take(result.outputs)
        for output in result.outputs:
            if isinstance(output, Prefilled) and output.handed_over:
                first = self.answers.responses[output.request_id].generated(limit=1)
                self.prefilled[output.request_id] = first
                self.decode.end_prefill(output.id, first)
            elif output.request_id in self.finished:
                self.decode.abort(output.id)

    def step_decode(self) -> None:
        result = self.decode.step()
        for one in result.loaded:
            self.loaded.append(one)
            self.prefill.abort(one.id)
        self.answers.take(result.outputs)

    def run(self, requests: list[Request], *, max_steps: int = 2000) -> dict[str, RequestOutput]:
        for request in requests:
            self.submit(request)
        for _ in range(max_steps):
            self.step_prefill()
            self.step_decode()
            for engine in (self.prefill, self.decode):
                engine.block_manager.check_integrity()
            if len(self.finished) == len(self.answers.responses):
                return self.finished
        raise AssertionError(f"only {sorted(self.finished)} finished in {max_steps} steps")


def flip_a_byte(_chunk: KVChunk, payload: Tensor) -> Tensor:
    payload[payload.numel() // 2] ^= torch.tensor(1, dtype=torch.uint8)
    return payload
