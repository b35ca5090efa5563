"""For tests that drive an engine themselves: adds up what it reports."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.runtime.response import ResponseAssembler
from shoal.runtime.types import EngineOutput, Request, RequestOutput, Tokens


class Answers:
    """The requests that were given to an engine, and their answers."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self.responses = {request.request_id: ResponseAssembler(request) for request in requests}
        self.finished: dict[str, RequestOutput] = {}

    def expect(self, request: Request) -> None:
        self.responses[request.request_id] = ResponseAssembler(request)

    def take(self, outputs: Iterable[EngineOutput]) -> list[Tokens]:
        """Add reports; returns the tokens that are new in them."""
        new = []
        for output in outputs:
            response = self.responses[output.request_id]
            added = response.add(output)
            if isinstance(added, Tokens):
                new.append(added)
            if response.finished:
                self.finished[output.request_id] = response.output()
        return new
