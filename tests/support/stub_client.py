"""Engines without a model, as an engine client: a token for every sequence at a given pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.cluster.supervision.fault import Fault
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits, max_output_tokens
from shoal.runtime.types import (
    CompletionOutput,
    EngineOutput,
    Finished,
    Logprob,
    Prefilled,
    Request,
    RequestMetrics,
    RequestOutput,
    Tokens,
)

TOKEN = 100
"""The token of every answer."""
Outputs = list[EngineOutput | RequestOutput]


@dataclass(slots=True)
class _Sequence:
    request: Request
    length: int
    """Tokens of the whole answer."""
    logprobs: dict[int, Logprob] | None
    """Those of every token."""
    texts: list[str] = field(default_factory=list)
    first_token_at: float | None = None


class StubClient:
    """An engine client whose sequences are spread over `num_groups` groups; each makes a step every `interval_s`."""

    def __init__(
        self,
        limits: RequestLimits,
        *,
        interval_s: float = 0.0,
        num_groups: int = 1,
        capacity: int = 10_000,
        text: Callable[[bool, str], str] = lambda is_first, request_id: "x",
    ) -> None:
        """text: makes the text of a token, from whether it is an answer's first and the id of its request."""
        self.limits = limits
        self.capacity = capacity
        self.faults: Sequence[Fault] = ()
        self._pause_s = interval_s / num_groups
        self._text = text
        self._groups: list[dict[str, _Sequence]] = [{} for _ in range(num_groups)]
        self._turn = 0
        self._next_step = time.monotonic()

    @property
    def num_in_flight(self) -> int:
        return sum(map(len, self._groups))

    def stats(self) -> dict[str, EngineStats]:
        return {f"mixed:{i}": EngineStats(num_running_seqs=len(group)) for i, group in enumerate(self._groups)}

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            group = min(self._groups, key=len)
            length = max_output_tokens(request, self.limits.max_model_len)
            logprobs = _logprobs(TOKEN, request.params.logprobs)
            group[request.request_id] = _Sequence(request, length, logprobs)

    def abort(self, request_ids: Sequence[str]) -> None:
        for group in self._groups:
            for request_id in request_ids:
                group.pop(request_id, None)

    def poll(self, timeout_s: float) -> Outputs:
        """The outputs of the next group's step, if it is due in time."""
        now = time.monotonic()
        delay = self._next_step - now
        if delay > 0:
            time.sleep(min(delay, timeout_s))
        if delay > timeout_s:
            return []
        self._next_step = max(self._next_step + self._pause_s, now)
        group = self._groups[self._turn]
        self._turn = (self._turn + 1) % len(self._groups)
        outputs: Outputs = []
        for request_id, sequence in list(group.items()):
            outputs += self._step(sequence)
            if len(sequence.texts) == sequence.length:
                del group[request_id]
                outputs.append(_whole(sequence))
        return outputs

    def take_losses(self) -> dict[str, int]:
        return {}

    def step_profiles(self) -> list[StepProfile]:
        return []

    def close(self) -> None:
        self._groups = [{} for _ in self._groups]

    def _step(self, sequence: _Sequence) -> Outputs:
        """A token for every sample, the prompt before the first and the end after the last."""
        request = sequence.request
        start = len(sequence.texts)
        text = self._text(start == 0, request.request_id)
        sequence.texts.append(text)
        outputs: Outputs = []
        if start == 0:
            sequence.first_token_at = time.time()
            logprobs = _prompt_logprobs(request)
            outputs.append(Prefilled(id=request.id, num_cached_tokens=0, prompt_logprobs=logprobs))
        logprobs_of_token = sequence.logprobs
        for sample_index in range(request.params.n):
            if request.report == "step":
                outputs.append(
                    Tokens(
                        id=request.id,
                        sample_index=sample_index,
                        start=start,
                        token_ids=(TOKEN,),
                        logprobs=None if logprobs_of_token is None else (logprobs_of_token,),
                        text_start=start * len(text),
                        text=text,
                    )
                )
            if start + 1 == sequence.length:
                outputs.append(
                    Finished(id=request.id, sample_index=sample_index, reason="length", num_tokens=sequence.length)
                )
        return outputs


def _whole(sequence: _Sequence) -> RequestOutput:
    request = sequence.request
    logprobs = sequence.logprobs
    prompt_logprobs = _prompt_logprobs(request)
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[
            CompletionOutput(
                index=index,
                text="".join(sequence.texts),
                token_ids=[TOKEN] * sequence.length,
                logprobs=None if logprobs is None else [logprobs] * sequence.length,
                finish_reason="length",
            )
            for index in range(request.params.n)
        ],
        finished=True,
        prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
        metrics=RequestMetrics(first_token_time=sequence.first_token_at),
    )


def _logprobs(token: int, num_alternatives: int | None) -> dict[int, Logprob] | None:
    """A token with alternatives beside it."""
    if num_alternatives is None:
        return None
    return {token + i: Logprob(-1.0 - i, i + 1) for i in range(max(1, num_alternatives))}


def _prompt_logprobs(request: Request) -> tuple[dict[int, Logprob] | None, ...] | None:
    num_alternatives = request.params.prompt_logprobs
    if num_alternatives is None:
        return None
    return (None, *(_logprobs(token, min(num_alternatives, 1)) for token in request.prompt_token_ids[1:]))
