"""The driver's side of what engines report: adds up the tokens of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from .types import (
    CompletionOutput,
    EngineOutput,
    Finished,
    GeneratedTokens,
    Logprob,
    Prefilled,
    Request,
    RequestMetrics,
    RequestOutput,
    Tokens,
)


@dataclass(slots=True)
class _Sample:
    """What is known of one sample."""

    num_given: int
    """Tokens that the request came with: whoever asked has them already, without their text."""
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    num_chars: int = 0
    end: Finished | None = None


class ResponseAssembler:
    """Adds up what engines report of one request, whatever happens to the engines meanwhile.

    Every attempt reports an answer from its first token on. Tokens that are known already are skipped, and so are
    tokens behind a gap: `lacks_tokens` finds that out at the end.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        wants_logprobs = request.params.logprobs is not None
        given = [len(g.token_ids) for g in request.generated]
        given += [0] * (request.params.n - len(given))
        self._samples = [
            _Sample(count, [] if wants_logprobs else None, 0.0 if wants_logprobs else None) for count in given
        ]
        self._prefilled: Prefilled | None = None

    def add(self, output: EngineOutput) -> EngineOutput | None:
        """Take a report; returns what is new in it for whoever asked, or None."""
        match output:
            case Tokens():
                return self._add_tokens(output)
            case Prefilled():
                return self._add_prefilled(output)
            case Finished():
                return self._add_end(output)

    def lacks_tokens(self, end: Finished) -> bool:
        """Whether tokens of the sample that is finished never arrived, so that its request must be tried again."""
        sample = self._samples[end.sample_index]
        return sample.end is None and len(sample.token_ids) < end.num_tokens

    @property
    def all_samples_finished(self) -> bool:
        """Whether every sample is finished; logprobs of the prompt may be missing yet."""
        return all(sample.end is not None for sample in self._samples)

    @property
    def finished(self) -> bool:
        """Whether nothing more can come: every sample is finished, and logprobs of the prompt are there if wanted."""
        has_failed = any(sample.end is not None and sample.end.reason == "error" for sample in self._samples)
        return self.all_samples_finished and (has_failed or not self._lacks_prompt_logprobs)

    @property
    def _lacks_prompt_logprobs(self) -> bool:
        wants_them = self.request.params.prompt_logprobs is not None
        return wants_them and (self._prefilled is None or self._prefilled.prompt_logprobs is None)

    def num_known_tokens(self, sample_index: int) -> int:
        """Output tokens of a sample that are known, those included that the request came with."""
        sample = self._samples[sample_index]
        return max(sample.num_given, len(sample.token_ids))

    def has_tokens(self, sample_index: int) -> bool:
        """Whether a sample has a token that was reported, or is finished without one."""
        sample = self._samples[sample_index]
        return bool(sample.token_ids) or sample.end is not None

    def generated(self, limit: int | None = None) -> tuple[GeneratedTokens, ...]:
        """Per sample, the known tokens for an engine that goes on from there, at most the first `limit`."""
        return tuple(self._generated(index, sample, limit) for index, sample in enumerate(self._samples))

    def _generated(self, index: int, sample: _Sample, limit: int | None) -> GeneratedTokens:
        if len(sample.token_ids) < sample.num_given:
            given = self.request.generated[index]
            return given if limit is None else given.head(limit)
        logprobs = None if sample.logprobs is None else without_text(sample.logprobs[:limit])
        return GeneratedTokens(tuple(sample.token_ids[:limit]), logprobs)

    def output(self) -> RequestOutput:
        """Everything that was reported so far; the lists are new."""
        prefilled = self._prefilled
        prompt_logprobs = None if prefilled is None else prefilled.prompt_logprobs
        return RequestOutput(
            request_id=self.request.request_id,
            prompt_token_ids=list(self.request.prompt_token_ids),
            outputs=[_completion(index, sample) for index, sample in enumerate(self._samples)],
            finished=self.finished,
            prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
            num_cached_tokens=0 if prefilled is None else prefilled.num_cached_tokens,
            metrics=RequestMetrics(
                first_scheduled_time=None if prefilled is None else prefilled.scheduled_at,
                first_token_time=None if prefilled is None else prefilled.first_token_at,
            ),
        )

    def _add_tokens(self, tokens: Tokens) -> Tokens | None:
        sample = self._samples[tokens.sample_index]
        num_tokens, num_chars = len(sample.token_ids), sample.num_chars
        end = tokens.start + len(tokens.token_ids)
        if sample.end is not None or not tokens.start <= num_tokens < end:
            return None
        new = _after(tokens, num_tokens, num_chars)
        sample.token_ids += new.token_ids
        sample.text.append(new.text)
        sample.num_chars += len(new.text)
        if sample.logprobs is not None:
            assert new.logprobs is not None
            assert sample.cumulative_logprob is not None
            sample.logprobs += new.logprobs
            for token_id, logprobs in zip(new.token_ids, new.logprobs, strict=True):
                sample.cumulative_logprob += logprobs[token_id].logprob
        return _after(new, max(num_tokens, sample.num_given), num_chars) if end > sample.num_given else None

    def _add_prefilled(self, prefilled: Prefilled) -> Prefilled | None:
        """The first one counts, unless only a later one has the logprobs of the prompt."""
        if self._prefilled is not None and not (self._lacks_prompt_logprobs and prefilled.prompt_logprobs is not None):
            return None
        self._prefilled = prefilled
        return prefilled

    def _add_end(self, end: Finished) -> Finished | None:
        sample = self._samples[end.sample_index]
        if sample.end is not None:
            return None
        assert not self.lacks_tokens(end), f"request {end.id}: tokens of sample {end.sample_index} are missing"
        sample.end = end
        return end


def refusal(request: Request, message: str) -> list[Finished]:
    """The end of every sample of a request that an engine does not take."""
    return [
        Finished(id=request.id, sample_index=i, reason="error", num_tokens=0, error=message)
        for i in range(request.params.n)
    ]


def without_text(logprobs: Sequence[dict[int, Logprob]]) -> tuple[dict[int, Logprob], ...]:
    """The same entries without the tokens' text, which engines know."""
    return tuple({token: Logprob(p.logprob, p.rank) for token, p in position.items()} for position in logprobs)


def _after(tokens: Tokens, num_tokens: int, num_chars: int) -> Tokens:
    """The part of a report that follows the first `num_tokens` tokens and `num_chars` characters of its sample."""
    skipped = num_tokens - tokens.start
    if not skipped and num_chars == tokens.text_start:
        return tokens
    return replace(
        tokens,
        start=num_tokens,
        token_ids=tokens.token_ids[skipped:],
        logprobs=None if tokens.logprobs is None else tokens.logprobs[skipped:],
        text_start=num_chars,
        text=tokens.text[num_chars - tokens.text_start :],
    )


def _completion(index: int, sample: _Sample) -> CompletionOutput:
    end = sample.end
    sample.text[:] = ["".join(sample.text)]
    return CompletionOutput(
        index=index,
        text=sample.text[0],
        token_ids=list(sample.token_ids),
        cumulative_logprob=sample.cumulative_logprob,
        logprobs=None if sample.logprobs is None else list(sample.logprobs),
        finish_reason=None if end is None else end.reason,
        stop_reason=None if end is None else end.stop_reason,
        error=None if end is None else end.error,
    )
