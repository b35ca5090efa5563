"""What must be true of every run, whatever fails in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.cluster.routing.request_router import RequestRouter
from shoal.runtime.response import without_text
from shoal.runtime.types import EngineOutput, RequestOutput, Tokens

from .engine import SimulatedEngine
from .model import BROKEN, Row


@dataclass
class Ledger:
    """What whoever asked was told: each row is answered once, with the right tokens, which are told in order."""

    rows: Mapping[str, Row]
    told: dict[tuple[str, int], int] = field(default_factory=dict)
    """Tokens by row and sample."""
    answered: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)

    @property
    def open(self) -> set[str]:
        return set(self.rows) - self.answered - self.aborted

    def take(self, output: EngineOutput | RequestOutput) -> None:
        name = output.request_id
        assert name not in self.aborted, f"{name}: was told of after it was aborted"
        assert name not in self.answered, f"{name}: was told of after its answer"
        if isinstance(output, Tokens):
            self._take_tokens(output)
        elif isinstance(output, RequestOutput):
            check_output(self.rows[name], output)
            self.answered.add(name)

    def _take_tokens(self, tokens: Tokens) -> None:
        name, index = tokens.request_id, tokens.sample_index
        told = self.told.get((name, index), 0)
        assert tokens.start == told, f"{name}: {told} tokens were told, and now those from {tokens.start} on"
        answer = self.rows[name].answers[index]
        end = told + len(tokens.token_ids)
        assert list(tokens.token_ids) == answer.output[told:end], f"{name}: wrong tokens are told from {told} on"
        if self.rows[name].request.params.logprobs is not None:
            logprobs = without_text(tokens.logprobs or ())
            assert list(logprobs) == answer.logprobs()[told:end], f"{name}: wrong logprobs"
        self.told[name, index] = end


def check_output(row: Row, output: RequestOutput) -> None:
    """The whole answer."""
    name = row.request.request_id
    assert output.finished, f"{name}: an unfinished answer"
    assert len(output.outputs) == len(row.answers), f"{name}: {len(output.outputs)} samples"
    for completion, answer in zip(output.outputs, row.answers, strict=True):
        assert completion.token_ids == answer.output, (
            f"{name}: {completion.token_ids} is not the answer {answer.output}"
        )
        assert completion.finish_reason == answer.finish_reason, f"{name}: {completion}"
        assert completion.error == (BROKEN if answer.finish_reason == "error" else None), f"{name}: {completion}"
        if row.request.params.logprobs is not None:
            assert completion.logprobs == answer.logprobs(), f"{name}: wrong logprobs"
    if row.request.params.prompt_logprobs is not None:
        assert output.prompt_logprobs == row.prompt_logprobs(), f"{name}: wrong logprobs of the prompt"


def check_run(ledger: Ledger, routing: RequestRouter | None, engines: Iterable[SimulatedEngine]) -> None:
    """After a run in which nothing more will happen: all is answered, and nobody holds anything for it any more."""
    assert not ledger.open, f"never answered: {sorted(ledger.open)}"
    for engine in engines:
        engine.check_nothing_left()
    if routing is not None:
        check_routing(routing)


def check_routing(routing: RequestRouter) -> None:
    assert routing.num_in_flight == 0
    routing.check_integrity()
    for number, group in enumerate(routing._groups):
        assert not group.requests, f"the router thinks that group {number} still has {group.requests}"
