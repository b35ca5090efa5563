"""Writes the bodies of a stream's events from what engines report of one request.

The deltas of all events of a choice add up to the whole response of `responses.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.runtime.chat.output import ContentDelta, OutputDelta, ReasoningDelta, ToolCallDelta, finish_reason
from shoal.runtime.chat.prompt import OutputReader
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Finished, Prefilled, Tokens

from .logprobs import Position, chat_logprobs, completion_logprobs, first_offsets
from .requests import ParsedRequest
from .responses import call_id, prompt_text
from .usage import Usage, num_reasoning_tokens

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamHead:
    """What all events of a response share."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    seed: int | None = None
    """The seed that was drawn for a request that samples and has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageOptions:
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    """Send the usage in a last event without choices."""
    continuous_usage_stats: bool = False
    """Send it in every event."""


class CompletionStream:
    """Events of a /v1/completions response."""

    object_name = "text_completion"

    def __init__(
        self,
        request: ParsedRequest,
        head: StreamHead,
        *,
        tokenizer: Tokenizer | None,
        usage: UsageOptions = UsageOptions(),
    ) -> None:
        self._request = request
        self._head = head
        self._tokenizer = tokenizer
        self._usage = usage
        self._num_tokens = [0] * request.params.n
        self._num_cached_tokens = 0
        self._early: list[Tokens | Finished] | None = None
        """What waits for the logprobs of the prompt, which is shown before it; None where nothing has to."""
        if request.echo and request.num_logprobs is not None:
            self._early = []
        skips = request.params.skip_special_tokens
        self._offsets = [first_offsets(tokenizer, skip_special_tokens=skips) for _ in range(request.params.n)]

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        return Usage(
            num_prompt_tokens=len(self._request.prompt_token_ids),
            num_output_tokens=sum(self._num_tokens),
            num_cached_tokens=self._num_cached_tokens,
        )

    def begin(self) -> list[Body]:
        """The events before the first token."""
        if self._request.echo and self._early is None:
            return self._echo(None)
        return []

    def prefill(self, prefilled: Prefilled) -> list[Body]:
        """The events of a prompt that is computed."""
        self._num_cached_tokens = prefilled.num_cached_tokens
        if self._early is None or prefilled.prompt_logprobs is None:
            return []
        early = self._early
        self._early = None
        events = self._echo(prefilled.prompt_logprobs)
        for output in early:
            events += self.add(output) if isinstance(output, Tokens) else self.finish(output)
        return events

    def add(self, tokens: Tokens) -> list[Body]:
        """The events of new tokens; none for tokens whose text is held back."""
        if self._early is not None:
            self._early.append(tokens)
            return []
        if self._request.scores_prompt:
            return []
        self._num_tokens[tokens.sample_index] += len(tokens.token_ids)
        logprobs = self._logprobs(tokens)
        if not tokens.text and logprobs is None and not self._request.return_token_ids:
            return []
        choice = {"index": tokens.sample_index, "text": tokens.text, "logprobs": logprobs, "finish_reason": None}
        return [self._event([choice | self._token_ids(tokens)])]

    def finish(self, end: Finished) -> list[Body]:
        """The event that ends a choice, which did not fail."""
        if self._early is not None:
            self._early.append(end)
            return []
        ending = {"finish_reason": "length", "stop_reason": None} if self._request.scores_prompt else _ending(end)
        return [self._event([{"index": end.sample_index, "text": "", "logprobs": None, **ending}])]

    def end(self, usage: Usage) -> list[Body]:
        """The event after the last choice ended, if it was asked for. usage: the counts of the whole response."""
        return [self._event([]) | {"usage": usage.body()}] if self._usage.include_usage else []

    def _echo(self, prompt_logprobs: Sequence[Position | None] | None) -> list[Body]:
        """The prompt as the beginning of every choice."""
        prompt = self._request.prompt_token_ids
        events = []
        for index, offsets in enumerate(self._offsets):
            choice: Body = {"index": index, "text": prompt_text(self._request, self._tokenizer), "finish_reason": None}
            choice["logprobs"] = None
            if prompt_logprobs is not None:
                choice["logprobs"] = completion_logprobs(prompt, prompt_logprobs, self._tokenizer, offsets)
            events.append(self._event([choice]))
        return events

    def _logprobs(self, tokens: Tokens) -> Body | None:
        if self._request.num_logprobs is None:
            return None
        offsets = self._offsets[tokens.sample_index]
        return completion_logprobs(tokens.token_ids, tokens.logprobs or (), self._tokenizer, offsets)

    def _token_ids(self, tokens: Tokens) -> Body:
        """vLLM's `token_ids` of an event, and `prompt_token_ids` in the first one of a choice."""
        if not self._request.return_token_ids:
            return {}
        ids: Body = {"token_ids": list(tokens.token_ids)}
        return ids | ({"prompt_token_ids": list(self._request.prompt_token_ids)} if not tokens.start else {})

    def _event(self, choices: list[Body]) -> Body:
        body: Body = {
            "id": self._head.id,
            "object": self.object_name,
            "created": self._head.created,
            "model": self._head.model,
            "choices": choices,
        }
        if self._head.seed is not None:
            body["seed"] = self._head.seed
        if self._usage.continuous_usage_stats:
            return body | {"usage": self.usage.body()}
        return body | {"usage": None} if self._usage.include_usage else body


class ChatStream(CompletionStream):
    """Events of a /v1/chat/completions response."""

    object_name = "chat.completion.chunk"

    def __init__(
        self,
        request: ParsedRequest,
        head: StreamHead,
        *,
        tokenizer: Tokenizer | None,
        usage: UsageOptions = UsageOptions(),
    ) -> None:
        super().__init__(request, head, tokenizer=tokenizer, usage=usage)
        self._choices = [_ChatChoice(request, f"{head.id}/{i}", tokenizer) for i in range(request.params.n)]

    @property
    def usage(self) -> Usage:
        counts = [choice.num_reasoning_tokens for choice in self._choices]
        return sum((Usage(num_reasoning_tokens=count) for count in counts), super().usage)

    def begin(self) -> list[Body]:
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(len(self._choices))
        ]
        return [self._event([choice]) for choice in choices]

    def add(self, tokens: Tokens) -> list[Body]:
        self._num_tokens[tokens.sample_index] += len(tokens.token_ids)
        delta = self._choices[tokens.sample_index].add(tokens)
        logprobs = self._logprobs(tokens)
        if not delta and logprobs is None and not self._request.return_token_ids:
            return []
        choice = {"index": tokens.sample_index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return [self._event([choice | self._token_ids(tokens)])]

    def finish(self, end: Finished) -> list[Body]:
        delta, ending = self._choices[end.sample_index].finish(end)
        choice = {"index": end.sample_index, "delta": delta, "logprobs": None, **ending}
        return [self._event([choice])]

    def _logprobs(self, tokens: Tokens) -> Body | None:
        num_top = self._request.num_logprobs
        if num_top is None:
            return None
        return chat_logprobs(tokens.token_ids, tokens.logprobs or (), num_top, self._tokenizer)


class _ChatChoice:
    """One choice of a chat response while it streams."""

    def __init__(self, request: ParsedRequest, answer_id: str, tokenizer: Tokenizer | None) -> None:
        self._answer_id = answer_id
        self._num_chars = 0
        self._has_calls = False
        self._reasoning_end: int | None = None
        """The token that ends the reasoning; None after it, and where there is none."""
        self.num_reasoning_tokens: int | None = None
        """Tokens of the reasoning so far; None where there is none."""
        self._reader: OutputReader | None = None
        if request.output_format is not None:
            assert tokenizer is not None, "a chat prompt was encoded without a tokenizer"
            skips = request.params.skip_special_tokens
            self._reader = OutputReader(request.output_format, tokenizer=tokenizer, skip_special_tokens=skips)
            self._reasoning_end = request.output_format.reasoning_end_token_id
            self.num_reasoning_tokens = None if self._reasoning_end is None else 0

    def add(self, tokens: Tokens) -> Body:
        """The delta of new tokens; empty where there is nothing to show yet."""
        self._num_chars = tokens.text_start + len(tokens.text)
        if self._reasoning_end is not None:
            assert self.num_reasoning_tokens is not None
            self.num_reasoning_tokens += num_reasoning_tokens(tokens.token_ids, self._reasoning_end)
            if self._reasoning_end in tokens.token_ids:
                self._reasoning_end = None
        if self._reader is None:
            return {"content": tokens.text} if tokens.text else {}
        return self._delta(self._reader.add(tokens.token_ids, self._num_chars))

    def finish(self, end: Finished) -> tuple[Body, Body]:
        """The last delta, and how the choice ended."""
        if self._reader is None:
            return {}, _ending(end)
        delta = self._delta(self._reader.finish(self._num_chars))
        ending = _ending(end) | {"finish_reason": finish_reason(end.reason, has_calls=self._has_calls)}
        return delta, ending | ({"is_malformed": True} if self._reader.is_malformed else {})

    def _delta(self, deltas: Sequence[OutputDelta]) -> Body:
        """One delta of a message from those of the parser, which may be of several kinds."""
        if len(deltas) == 1 and not isinstance(only := deltas[0], ToolCallDelta):
            field = "reasoning_content" if isinstance(only, ReasoningDelta) else "content"
            return {field: only.text} if only.text else {}
        reasoning = "".join(d.text for d in deltas if isinstance(d, ReasoningDelta))
        content = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
        calls = list(self._call_deltas(deltas))
        self._has_calls |= bool(calls)
        delta: Body = {"reasoning_content": reasoning} if reasoning else {}
        delta |= {"content": content} if content else {}
        return delta | ({"tool_calls": calls} if calls else {})

    def _call_deltas(self, deltas: Iterable[OutputDelta]) -> Iterable[Body]:
        for delta in deltas:
            if isinstance(delta, ReasoningDelta | ContentDelta):
                continue
            function: Body = {"arguments": delta.arguments}
            if delta.name is None:
                yield {"index": delta.index, "function": function}
                continue
            yield {
                "index": delta.index,
                "id": delta.id or call_id(self._answer_id, delta.index),
                "type": "function",
                "function": {"name": delta.name, **function},
            }


def _ending(end: Finished) -> Body:
    return {"finish_reason": end.reason, "stop_reason": end.stop_reason}
