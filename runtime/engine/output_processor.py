"""From sampled tokens to outputs: text, log-probabilities and the reasons to stop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..sampling.sampler import SampledToken, SamplingRow
from ..tokenization.detokenizer import IncrementalDetokenizer
from ..tokenization.tokenizer import Tokenizer
from ..types import (
    CompletionOutput,
    FinishReason,
    GeneratedTokens,
    Logprob,
    Request,
    RequestOutput,
    RequestProgress,
)


@dataclass(slots=True)
class Completion:
    """One of a request's n continuations while it is being generated."""

    row: SamplingRow
    detokenizer: IncrementalDetokenizer
    output: CompletionOutput
    max_tokens: int
    num_reported: int = 0
    """Tokens that `take_progress` has told of, or that the request came with."""

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None


@dataclass(slots=True)
class RequestState:
    """A request and its continuations, from `add_request` until the last of them finishes."""

    request: Request
    completions: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(c.finished for c in self.completions)


class OutputProcessor:
    """Appends tokens to continuations and decides when they end. Knows nothing of scheduling or tensors."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids

    def start(self, request: Request, *, seed: int, max_tokens: int) -> RequestState:
        """The state of a new request, with the tokens that it came with."""
        params = request.params
        assert len(request.generated) <= params.n
        completions = []
        for index in range(params.n):
            token_ids: list[int] = []
            row = SamplingRow(
                params=params,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=token_ids,
                seed=seed,
                sample_index=index,
                eos_token_ids=self.eos_token_ids,
            )
            wants_logprobs = params.logprobs is not None
            output = CompletionOutput(
                index=index,
                text="",
                token_ids=token_ids,
                cumulative_logprob=0.0 if wants_logprobs else None,
                logprobs=[] if wants_logprobs else None,
            )
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                stop=params.stop_strings,
                include_stop_str_in_output=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                stop_after_token_id=None if params.stop_in_reasoning else request.reasoning_end_token_id,
            )
            completions.append(Completion(row, detokenizer, output, max_tokens))
        wants_prompt = params.prompt_logprobs is not None
        state = RequestState(request, completions, [None] if wants_prompt else None)
        self.extend(state, request.generated)
        return state

    def extend(self, state: RequestState, generated: Iterable[GeneratedTokens]) -> None:
        """Append what another engine generated, per continuation, where it is more than what is there."""
        for completion, tokens in zip(state.completions, generated, strict=False):
            self._replay(completion, tokens)

    def _replay(self, completion: Completion, generated: GeneratedTokens) -> None:
        for i in range(len(completion.output.token_ids), len(generated.token_ids)):
            logprobs = None if generated.logprobs is None else generated.logprobs[i]
            self.append(completion, SampledToken(generated.token_ids[i], logprobs))
        completion.num_reported = max(completion.num_reported, len(generated.token_ids))

    def append(self, completion: Completion, sampled: SampledToken) -> None:
        """Add one token; sets `finish_reason` when it is the last."""
        output, params = completion.output, completion.row.params
        if sampled.error is not None:
            output.finish_reason, output.error = "error", sampled.error
            return
        output.token_ids.append(sampled.token_id)
        if sampled.logprobs is not None:
            assert output.logprobs is not None
            assert output.cumulative_logprob is not None
            output.cumulative_logprob += sampled.logprobs[sampled.token_id].logprob
            output.logprobs.append(self.decoded(sampled.logprobs))
        reached_min = len(output.token_ids) >= params.min_tokens
        is_eos = sampled.token_id in self.eos_token_ids and not params.ignore_eos
        if reached_min and (is_eos or sampled.token_id in (params.stop_token_ids or ())):
            if params.include_stop_str_in_output:
                completion.detokenizer.append(sampled.token_id)
            self._finish(completion, "stop", None if is_eos else sampled.token_id)
        else:
            matched = completion.detokenizer.append(sampled.token_id)
            if matched is not None:
                self._finish(completion, "stop", matched)
            elif len(output.token_ids) >= completion.max_tokens:
                self._finish(completion, "length", None)
        output.text = completion.detokenizer.text

    def decoded(self, logprobs: dict[int, Logprob]) -> dict[int, Logprob]:
        """The same entries with their tokens' text, where a tokenizer is there."""
        if self.tokenizer is None:
            return logprobs
        decode = self.tokenizer.decode
        return {t: Logprob(p.logprob, p.rank, decode([t], skip_special_tokens=False)) for t, p in logprobs.items()}

    @staticmethod
    def output(state: RequestState) -> RequestOutput:
        """Everything that the request has produced so far."""
        return RequestOutput(
            request_id=state.request.request_id,
            prompt_token_ids=list(state.request.prompt_token_ids),
            outputs=[c.output for c in state.completions],
            finished=state.finished,
            prompt_logprobs=state.prompt_logprobs,
            num_cached_tokens=state.num_cached_tokens,
        )

    @staticmethod
    def take_progress(state: RequestState) -> list[RequestProgress]:
        """What the request's continuations have generated since the last call."""
        progress = []
        for completion in state.completions:
            output, start = completion.output, completion.num_reported
            completion.num_reported = len(output.token_ids)
            if start < len(output.token_ids):
                logprobs = None if output.logprobs is None else tuple(output.logprobs[start:])
                new = GeneratedTokens(tuple(output.token_ids[start:]), logprobs)
                request_id = state.request.request_id
                progress.append(RequestProgress(request_id=request_id, index=output.index, start=start, new=new))
        return progress

    @staticmethod
    def _finish(completion: Completion, reason: FinishReason, stop_reason: int | str | None) -> None:
        completion.detokenizer.finish()
        completion.output.finish_reason = reason
        completion.output.stop_reason = stop_reason
