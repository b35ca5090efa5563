"""An engine that only counts tokens, for tests of the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.cluster.workers.wire import Abort, Command, EndPrefill, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import EngineOutput, Finished, Logprob, Prefilled, PromptLoaded, Request, Tokens


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


def chunk(attempt_id: RequestId, start: int = 0, end: int = 4) -> KVChunk:
    return KVChunk(
        id=attempt_id,
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
    num_given: list[int]
    """Tokens that are not worth a report by themselves."""
    num_reported: list[int]
    ended_samples: set[int] = field(default_factory=set)
    """Samples whose end was reported."""
    prefill_reported: bool = False
    sampled: bool = False
    num_chunked: int = 0
    waits: bool = False
    """Export of its prompt's KV cache entries."""
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
    rows: dict[RequestId, Row] = field(default_factory=dict)
    """In order of arrival."""

    def apply(self, command: Command) -> None:
        row = self.rows.get(command.id)
        match command:
            case Request() if row is None:
                self.rows[command.id] = self._row(command)
            case Abort():
                self.rows.pop(command.id, None)
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
        if tokens == answer:
            tokens = [known[:-1] for known in tokens]
        num_known = sum(map(len, tokens))
        return Row(
            request,
            answer,
            tokens,
            len(request.prompt_token_ids) + num_known,
            [len(t) for t in tokens],
            [0 for _ in tokens],
            waits=request.do_remote_prefill,
        )

    def work(self, attempt_id: RequestId, budget: int) -> list[Event]:
        """Compute up to so many tokens of a request that can run, and sample when they were the last."""
        row = self.rows[attempt_id]
        request, events = row.request, list[Event]()
        num_prompt = len(request.prompt_token_ids)
        if row.waits:
            row.waits = False
            row.num_pending = max(1, num_prompt - row.num_loaded + sum(map(len, row.tokens)))
            row.num_given = [len(t) for t in row.tokens]
            events.append(PromptLoaded(id=attempt_id, error="failed" if row.failed else None))
        taken = min(budget, row.num_pending)
        row.num_pending -= taken
        if request.do_remote_decode:
            start, row.num_chunked = row.num_chunked, num_prompt - row.num_pending
            events.append(chunk(attempt_id, start, row.num_chunked))
        if row.num_pending == 0:
            events += self._sample(attempt_id, row)
        return events

    def _sample(self, attempt_id: RequestId, row: Row) -> list[EngineOutput]:
        unfinished = [i for i, answer in enumerate(row.answer) if len(row.tokens[i]) < len(answer)]
        for i in unfinished:
            row.tokens[i].append(row.answer[i][len(row.tokens[i])])
        row.num_pending = len(unfinished)
        row.sampled = True
        if row.finished or row.request.do_remote_decode:
            del self.rows[attempt_id]
        elif row.request.report != "step":
            return []
        return self._report(row)

    def take_outputs(self, attempt_id: RequestId) -> list[EngineOutput]:
        """What a request generated since it was last asked."""
        row = self.rows[attempt_id]
        return [] if row.waits else self._report(row)

    def _report(self, row: Row) -> list[EngineOutput]:
        attempt_id, events = row.request.id, list[EngineOutput]()
        ends = [len(tokens) == len(answer) for tokens, answer in zip(row.tokens, row.answer, strict=True)]
        for index, tokens in enumerate(row.tokens):
            start = row.num_reported[index]
            if len(tokens) > (start if ends[index] else max(start, row.num_given[index])):
                row.num_reported[index] = len(tokens)
                text = letters(tokens[start:])
                events.append(
                    Tokens(
                        id=attempt_id,
                        sample_index=index,
                        start=start,
                        token_ids=tuple(tokens[start:]),
                        text_start=start,
                        text=text,
                    )
                )
        if row.sampled and not row.prefill_reported:
            row.prefill_reported = True
            scores = scores_of(row.request)
            handed_over = row.request.do_remote_decode and not row.finished
            events.append(
                Prefilled(
                    id=attempt_id,
                    num_cached_tokens=0,
                    prompt_logprobs=None if scores is None else tuple(scores),
                    handed_over=handed_over,
                )
            )
        for index in [i for i, end in enumerate(ends) if end and i not in row.ended_samples]:
            row.ended_samples.add(index)
            num_tokens = len(row.tokens[index])
            events.append(Finished(id=attempt_id, sample_index=index, reason="length", num_tokens=num_tokens))
        return events


def letters(token_ids: list[int]) -> str:
    """A letter for every token."""
    return "".join(chr(97 + token % 26) for token in token_ids)
