"""From sampled tokens to reports: text, log-probabilities and the reasons to stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..sampling.sampler import SampledToken, SamplingRow
from ..structured.constraint import TokenConstraint
from ..structured.structured_outputs import StructuredOutputs
from ..tokenization.detokenizer import IncrementalDetokenizer
from ..tokenization.tokenizer import Tokenizer
from ..types import (
    EngineOutput,
    Finished,
    FinishReason,
    GeneratedTokens,
    Logprob,
    Prefilled,
    Request,
    Tokens,
)


@dataclass(slots=True)
class Completion:
    """One of a request's n samples while it is being generated."""

    row: SamplingRow
    detokenizer: IncrementalDetokenizer
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    """Output tokens; the list that `row` samples after."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_given: int = 0
    """Tokens that another engine generated: not worth a report by themselves."""
    num_reported: int = 0
    num_reported_chars: int = 0
    unreported_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    end_reported: bool = False

    @property
    def sample_index(self) -> int:
        return self.row.sample_index

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestState:
    """A request and its samples, from `add_request` until the last of them finishes."""

    request: Request
    completions: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int | None = None
    """None until a sample of this request was sampled here."""
    prefill_reported: bool = False
    scheduled_at: float | None = None
    """Time of the first step that computed a part of the prompt, in seconds since 1970."""
    first_token_at: float | None = None

    @property
    def finished(self) -> bool:
        return all(c.finished for c in self.completions)

    @property
    def prefilled(self) -> bool:
        """Whether the prompt is computed, with its logprobs where wanted, and every sample has a token."""
        prompt_logprobs = self.prompt_logprobs
        return (
            self.num_cached_tokens is not None
            and (prompt_logprobs is None or len(prompt_logprobs) == len(self.request.prompt_token_ids))
            and all(c.token_ids or c.finished for c in self.completions)
        )

    @property
    def handed_over(self) -> bool:
        """Whether another replica goes on with the request."""
        return self.request.do_remote_decode and self.prefilled and not self.finished


class OutputProcessor:
    """Appends tokens to samples and decides when they end. Knows nothing of scheduling or tensors."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        structured_outputs: StructuredOutputs | None = None,
    ) -> None:
        """`structured_outputs`: for requests that ask for them; None refuses those."""
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.structured_outputs = structured_outputs

    def start(self, request: Request, *, seed: int, max_tokens: int) -> RequestState:
        """The state of a new request, with the tokens that it came with. ValueError for structured outputs that fail.

        A request that comes with its whole answer, because the report of its end was lost, generates the last tokens
        again: the result is unfinished.
        """
        state = self._state(request, request.generated, seed, max_tokens)
        if state.finished:
            state = self._state(request, [g.head(-1) for g in request.generated], seed, max_tokens)
        return state

    def _state(
        self, request: Request, generated: Sequence[GeneratedTokens], seed: int, max_tokens: int
    ) -> RequestState:
        params = request.params
        assert len(generated) <= params.n
        completions = []
        for sample_index, constraint in enumerate(self._constraints(request)):
            token_ids: list[int] = []
            row = SamplingRow(
                params=params,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=token_ids,
                seed=seed,
                sample_index=sample_index,
                eos_token_ids=self.eos_token_ids,
                constraint=constraint,
            )
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                stop=params.stop_strings,
                include_stop_str_in_output=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                stop_after_token_id=None if params.stop_in_reasoning else request.reasoning_end_token_id,
            )
            completions.append(Completion(row, detokenizer, max_tokens, token_ids))
        wants_prompt = params.prompt_logprobs is not None
        state = RequestState(request, completions, [None] if wants_prompt else None)
        self.extend(state, generated)
        return state

    def _constraints(self, request: Request) -> Sequence[TokenConstraint | None]:
        """One per sample."""
        if request.params.structured_outputs is None:
            return [None] * request.params.n
        if self.structured_outputs is None:
            raise ValueError("this engine has no structured outputs")
        return self.structured_outputs.constraints(request)

    def extend(self, state: RequestState, generated: Iterable[GeneratedTokens]) -> None:
        """Append what another engine generated, per sample, where it is more than what is there."""
        for completion, tokens in zip(state.completions, generated, strict=False):
            for i in range(len(completion.token_ids), len(tokens.token_ids)):
                logprobs = None if tokens.logprobs is None else tokens.logprobs[i]
                self.append(completion, SampledToken(tokens.token_ids[i], logprobs))
            completion.num_given = max(completion.num_given, len(tokens.token_ids))

    def append(self, completion: Completion, sampled: SampledToken) -> None:
        """Add one token; sets `finish_reason` when it is the last."""
        if sampled.error is not None:
            completion.finish_reason = "error"
            completion.error = sampled.error
            return
        token_ids, params = completion.token_ids, completion.row.params
        token_ids.append(sampled.token_id)
        if sampled.logprobs is not None:
            completion.unreported_logprobs.append(self.decoded(sampled.logprobs))
        # a constraint allows the tokens that end an answer only where it may end, min_tokens considered
        reached_min = len(token_ids) >= params.min_tokens or completion.row.constraint is not None
        is_eos = sampled.token_id in self.eos_token_ids and not params.ignore_eos
        if reached_min and (is_eos or sampled.token_id in (params.stop_token_ids or ())):
            if params.include_stop_str_in_output:
                completion.detokenizer.append(sampled.token_id)
            self._finish(completion, "stop", None if is_eos else sampled.token_id)
        else:
            matched = completion.detokenizer.append(sampled.token_id)
            if matched is not None:
                self._finish(completion, "stop", matched)
            elif len(token_ids) >= completion.max_tokens:
                self._finish(completion, "length", None)

    def decoded(self, logprobs: dict[int, Logprob]) -> dict[int, Logprob]:
        """The same entries with their tokens' text, where a tokenizer is there."""
        if self.tokenizer is None:
            return logprobs
        decode = self.tokenizer.decode
        return {t: Logprob(p.logprob, p.rank, decode([t], skip_special_tokens=False)) for t, p in logprobs.items()}

    def take_outputs(self, state: RequestState) -> list[EngineOutput]:
        """What the request has produced since the last call: tokens, then the end of the prefill, then of samples."""
        outputs: list[EngineOutput] = [
            self._take_tokens(state.request, c)
            for c in state.completions
            if len(c.token_ids) > (c.num_reported if c.finished else max(c.num_reported, c.num_given))
        ]
        if state.prefilled and not state.prefill_reported:
            state.prefill_reported = True
            outputs.append(_prefilled(state))
        for completion in state.completions:
            if completion.finished and not completion.end_reported:
                completion.end_reported = True
                outputs.append(_end(state.request, completion))
        return outputs

    @staticmethod
    def _take_tokens(request: Request, completion: Completion) -> Tokens:
        start, text_start = completion.num_reported, completion.num_reported_chars
        text = completion.detokenizer.text
        logprobs = None if request.params.logprobs is None else tuple(completion.unreported_logprobs)
        completion.num_reported = len(completion.token_ids)
        completion.num_reported_chars = len(text)
        completion.unreported_logprobs.clear()
        return Tokens(
            id=request.id,
            sample_index=completion.sample_index,
            start=start,
            token_ids=tuple(completion.token_ids[start:]),
            logprobs=logprobs,
            text_start=text_start,
            text=text[text_start:],
        )

    @staticmethod
    def _finish(completion: Completion, reason: FinishReason, stop_reason: int | str | None) -> None:
        completion.detokenizer.finish()
        completion.finish_reason = reason
        completion.stop_reason = stop_reason


def _prefilled(state: RequestState) -> Prefilled:
    assert state.num_cached_tokens is not None
    return Prefilled(
        id=state.request.id,
        num_cached_tokens=state.num_cached_tokens,
        prompt_logprobs=None if state.prompt_logprobs is None else tuple(state.prompt_logprobs),
        handed_over=state.handed_over,
        scheduled_at=state.scheduled_at,
        first_token_at=state.first_token_at,
    )


def _end(request: Request, completion: Completion) -> Finished:
    assert completion.finish_reason is not None
    return Finished(
        id=request.id,
        sample_index=completion.sample_index,
        reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
        stop_reason=completion.stop_reason,
        error=completion.error,
    )
