"""The token counts of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.runtime.types import RequestOutput

from .requests import ParsedRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """OpenAI's `usage`."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int | None = None
    """Output tokens up to the end of the reasoning; None for an answer that does not begin with one."""
    num_cached_tokens: int | None = None
    """Prompt tokens from the prefix cache. It depends on what ran before: None where answers must not."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens + other.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens + other.num_output_tokens,
            num_reasoning_tokens=_sum(self.num_reasoning_tokens, other.num_reasoning_tokens),
            num_cached_tokens=_sum(self.num_cached_tokens, other.num_cached_tokens),
        )

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        body: dict[str, Any] = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
        }
        if self.num_reasoning_tokens is not None:
            body["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning_tokens}
        if self.num_cached_tokens is not None:
            body["prompt_tokens_details"] = {"cached_tokens": self.num_cached_tokens}
        return body


def usage_of(output: RequestOutput, request: ParsedRequest) -> Usage:
    """The counts of a finished output, without what was cached."""
    answers = [] if request.scores_prompt else [sample.token_ids for sample in output.outputs]
    end = None if request.output_format is None else request.output_format.reasoning_end_token_id
    return Usage(
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=sum(map(len, answers)),
        num_reasoning_tokens=None if end is None else sum(num_reasoning_tokens(answer, end) for answer in answers),
    )


def num_reasoning_tokens(token_ids: Sequence[int], reasoning_end_token_id: int) -> int:
    """Tokens of an answer that begins in its reasoning up to the one that ends it, which counts."""
    if reasoning_end_token_id not in token_ids:
        return len(token_ids)
    return token_ids.index(reasoning_end_token_id) + 1


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None and second is None else (first or 0) + (second or 0)
