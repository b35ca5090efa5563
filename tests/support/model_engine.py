"""An engine that only counts tokens, for tests of the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.cluster.workers.wire import Abort, Command, EndPrefill, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import (
    CompletionOutput,
    GeneratedTokens,
    Logprob,
    PromptLoaded,
    Request,
    RequestOutput,
    RequestProgress,
)


def answer_of(request: Request) -> list[list[int]]:
    """What any engine answers: the last continuation is as long as it may be, each other one a token shorter."""
    params = request.params
    assert params.max_tokens is not None
    first = sum(request.prompt_token_ids) * 7 % 11
    lengths = [max(1, params.max_tokens - later) for later in range(params.n)][::-1]
    return [[first + 20 * index + i for i in range(length)] for index, length in enumerate(lengths)]


def scores_of(request: Request) -> list[dict[int, Logprob] | None] | None:
    """What any engine that computes the prompt says of it."""
    if request.params.prompt_logprobs is None:
        return None
    return [None, *[{t: Logprob(-0.5, 1)} for t in request.prompt_token_ids[1:]]]


def chunk(engine_id: str, start: int = 0, end: int = 4) -> KVChunk:
    return KVChunk(
        request_id=engine_id,
        start=start,
        end=end,
        fingerprint=b"",
        epoch=0,
        generation=0,
        num_bytes=1,
        checksum=0,
        address=b"",
    )


@dataclass
class Row:
    """A request in an engine."""

    request: Request
    answer: list[list[int]]
    tokens: list[list[int]]
    num_pending: int
    """Tokens to compute before the next one is sampled."""
    num_told: list[int]
    num_chunked: int = 0
    waits: bool = False
    """For its prompt's records."""
    num_loaded: int = 0
    ended: bool = False
    failed: bool = False

    @property
    def runnable(self) -> bool:
        return not self.waits or self.ended or self.failed

    @property
    def finished(self) -> bool:
        return [len(t) for t in self.tokens] == [len(a) for a in self.answer]


@dataclass
class ModelEngine:
    """Does with its requests what it is asked to, one at a time; what it is told twice counts once."""

    answer: Callable[[Request], list[list[int]]] = answer_of
    rows: dict[str, Row] = field(default_factory=dict)
    """In order of arrival."""

    def obey(self, command: Command) -> None:
        row = self.rows.get(command.request_id)
        match command:
            case Request() if row is None:
                self.rows[command.request_id] = self._row(command)
            case Abort():
                self.rows.pop(command.request_id, None)
            case KVChunk() if row is not None and row.waits and command.end > row.num_loaded:
                row.failed |= command.start != row.num_loaded
                row.num_loaded = row.num_loaded if row.failed else command.end
            case EndPrefill() if row is not None and row.waits:
                row.ended = True
                row.failed |= command.generated is None or row.num_loaded < len(row.request.prompt_token_ids)
                for tokens, told in zip(row.tokens, command.generated or (), strict=False):
                    tokens += told.token_ids[len(tokens) :]

    def _row(self, request: Request) -> Row:
        answer = self.answer(request)
        tokens = [list(g.token_ids) for g in request.generated] or [[] for _ in answer]
        num_known = sum(map(len, tokens))
        return Row(
            request,
            answer,
            tokens,
            len(request.prompt_token_ids) + num_known,
            [len(t) for t in tokens],
            waits=request.do_remote_prefill,
        )

    def work(self, engine_id: str, budget: int) -> list[Event]:
        """Compute up to so many tokens of a request that can run, and sample when they were the last."""
        row = self.rows[engine_id]
        request, events = row.request, list[Event]()
        num_prompt = len(request.prompt_token_ids)
        if row.waits:
            row.waits = False
            row.num_pending = max(1, num_prompt - row.num_loaded + sum(map(len, row.tokens)))
            row.num_told = [len(t) for t in row.tokens]
            events.append(PromptLoaded(request_id=engine_id, error="failed" if row.failed else None))
        taken = min(budget, row.num_pending)
        row.num_pending -= taken
        if request.do_remote_decode:
            start, row.num_chunked = row.num_chunked, num_prompt - row.num_pending
            events.append(chunk(engine_id, start, row.num_chunked))
        if row.num_pending == 0:
            events += self._sample(engine_id, row)
        return events

    def _sample(self, engine_id: str, row: Row) -> list[Event]:
        unfinished = [i for i, answer in enumerate(row.answer) if len(row.tokens[i]) < len(answer)]
        for i in unfinished:
            row.tokens[i].append(row.answer[i][len(row.tokens[i])])
        row.num_pending = len(unfinished)
        if row.finished or row.request.do_remote_decode:
            del self.rows[engine_id]
        elif not row.request.stream:
            return []
        outputs = [
            CompletionOutput(index=i, text="", token_ids=list(tokens), finish_reason="length" if row.finished else None)
            for i, tokens in enumerate(row.tokens)
        ]
        output = RequestOutput(
            request_id=engine_id,
            prompt_token_ids=[],
            outputs=outputs,
            finished=row.finished,
            prompt_logprobs=scores_of(row.request),
        )
        return [output]

    def take_progress(self, engine_id: str) -> list[Event]:
        """What a request generated since it was last asked."""
        row, events = self.rows[engine_id], list[Event]()
        for index, tokens in enumerate(row.tokens if row.request.report_progress and not row.waits else []):
            start, row.num_told[index] = row.num_told[index], len(tokens)
            if tokens[start:]:
                new = GeneratedTokens(tuple(tokens[start:]))
                events.append(RequestProgress(request_id=engine_id, index=index, start=start, new=new))
        return events
