"""An engine without a model for tests of what is around it; special prompts make it fail."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.workers.spec import StartReport
from shoal.parallel.groups import ParallelGroups
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import EngineOutput, Finished, GeneratedTokens, PromptLoaded, Request, Tokens

STUB = f"{__name__}:build"
BAD_VALUE = f"{__name__}:build_bad_value"
LATE = f"{__name__}:build_late"
DEAD = f"{__name__}:build_dead"

REFUSED, RAISES, KILLED, FROZEN = 900, 901, 902, 903
"""First prompt tokens with a meaning; REFUSED is not taken in, the others act in the next step."""


@dataclass(slots=True)
class Result:
    outputs: list[EngineOutput] = field(default_factory=list)
    idle: bool = False
    woke: bool = False
    stopped: bool = False
    chunks: list[KVChunk] = field(default_factory=list)
    loaded: list[PromptLoaded] = field(default_factory=list)


class StubEngine:
    """Token i of a request is the sum of its prompt plus i plus 1000 x the attention group's number."""

    def __init__(self, groups: ParallelGroups, *, max_model_len: int = 128) -> None:
        self.groups = groups
        self.limits = RequestLimits(vocab_size=1000, max_model_len=max_model_len)
        self.requests: dict[RequestId, tuple[Request, list[int]]] = {}
        self.aborted: list[RequestId] = []
        self.num_reported: dict[RequestId, int] = {}
        self.stop = False
        self.num_steps = 0

    def has_request(self, request_id: RequestId) -> bool:
        return request_id in self.requests

    def add_request(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REFUSED:
            logging.getLogger("shoal.stub").warning("request %s is refused", request.id)
            raise ValueError("refused by the stub")
        tokens = [token for generated in request.generated for token in generated.token_ids]
        self.requests[request.id] = (request, tokens)
        self.num_reported[request.id] = 0

    def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)
        self.requests.pop(request_id, None)

    def add_chunk(self, chunk: KVChunk) -> None:
        raise AssertionError("the stub hands nothing over")

    def end_prefill(self, request_id: RequestId, generated: tuple[GeneratedTokens, ...] | None) -> None:
        raise AssertionError("the stub hands nothing over")

    def take_outputs(self) -> list[EngineOutput]:
        return [output for request, tokens in self.requests.values() for output in self.report(request, tokens)]

    def report(self, request: Request, tokens: list[int]) -> list[EngineOutput]:
        """One character a token."""
        start = self.num_reported[request.id]
        self.num_reported[request.id] = len(tokens)
        new = tuple(tokens[start:])
        if not new:
            return []
        text = "x" * len(new)
        return [Tokens(id=request.id, sample_index=0, start=start, token_ids=new, text_start=start, text=text)]

    def rejoin(self, replaced: Collection[int]) -> None:
        pass

    def audit(self) -> list[str]:
        return [f"request {request_id} is not finished" for request_id in self.requests]

    def stats(self) -> EngineStats:
        """A counter that grows: a preemption in every step."""
        return EngineStats(num_running_seqs=len(self.requests), num_preemptions=self.num_steps)

    def request_stop(self) -> None:
        self.stop = True

    def step(self) -> Result:
        self.num_steps += 1
        for request, _ in self.requests.values():
            misbehave(request.prompt_token_ids[0])
        agreed = self.groups.world.all_gather_ints([len(self.requests), int(self.stop)], layer=-1, op="stub")
        if any(row[1] for row in agreed):
            return Result(stopped=True)
        outputs = [o for request, tokens in list(self.requests.values()) for o in self.advance(request, tokens)]
        return Result(outputs, idle=not any(row[0] for row in agreed))

    def advance(self, request: Request, tokens: list[int]) -> list[EngineOutput]:
        tokens.append(sum(request.prompt_token_ids) + len(tokens) + 1000 * self.groups.dp_rank)
        if len(tokens) == request.params.max_tokens:
            del self.requests[request.id]
            end = Finished(id=request.id, sample_index=0, reason="length", num_tokens=len(tokens))
            return [*self.report(request, tokens), end]
        return self.report(request, tokens) if request.report == "step" else []


def misbehave(token: int) -> None:
    if token == RAISES:
        raise RuntimeError("the stub broke")
    if token == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if token == FROZEN:
        os.kill(os.getpid(), signal.SIGSTOP)


def build(args: EngineArgs, groups: ParallelGroups, report: StartReport, _transport: object) -> StubEngine:
    report.phases["stub"] = 0.25
    report.notices.append("this is a stub")
    return StubEngine(groups)


def build_bad_value(args: EngineArgs, groups: ParallelGroups, report: StartReport, _transport: object) -> StubEngine:
    if groups.rank == groups.world.size - 1:
        raise ValueError("the stub's model is not there")
    time.sleep(3600)  # what a rank does whose peers never come
    raise AssertionError


def build_late(args: EngineArgs, groups: ParallelGroups, report: StartReport, _transport: object) -> StubEngine:
    time.sleep(3600)
    raise AssertionError


def build_dead(args: EngineArgs, groups: ParallelGroups, report: StartReport, _transport: object) -> StubEngine:
    os._exit(3)
