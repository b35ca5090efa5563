"""The values that users, drivers and engines exchange: sampling parameters, requests and outputs.

Field names are vLLM's where the meaning is the same. Structs travel between processes, as arrays of their fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from msgspec import Struct

from shoal.parallel.request_id import RequestId, RequestMessage

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_N = 1024
MAX_LOGPROBS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096
"""Of all stop strings of a request: each new token is held against each of them."""
MAX_STOP_TOKEN_IDS = 1024
MAX_INTEGER = 2**63 - 1
"""The largest integer that fits into a message between processes."""
REPORT_INTERVAL_S = 0.5
"""How often requests with `report="interval"` report new tokens: bounds the work that a crash can cost, in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen; validated when built, so that a bad value is a ValueError naming it.

    `seed=None` derives the seed from the run's seed and the request's index in the run, never from a clock.
    `logprobs=k` returns, per output token, the log-probability of the sampled token and of the k most likely ones under
    the model's own distribution (before penalties, bias, temperature and truncation).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps the whole vocabulary."""
    min_p: float = 0.0
    max_tokens: int | None = 16
    """None means: up to the model's context length."""
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(s, str) or not s for s in stop):
            raise ValueError("stop must be a non-empty string or a list of non-empty strings")
        if any(_is_surrogate(c) for s in stop for c in s):
            raise ValueError("stop has a lone surrogate, which is not a character and which no text can contain")
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS} are allowed")
        if (num_chars := sum(map(len, stop))) > MAX_STOP_CHARS:
            raise ValueError(f"stop has {num_chars} characters in all, at most {MAX_STOP_CHARS} are allowed")
        object.__setattr__(self, "stop", stop)
        if (count := len(self.stop_token_ids or ())) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids has {count} ids, at most {MAX_STOP_TOKEN_IDS} are allowed")
        object.__setattr__(
            self, "stop_token_ids", tuple(_integer("stop_token_ids", i, 0) for i in self.stop_token_ids or ())
        )
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be above 0")
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_INTEGER - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        if self.repetition_penalty == 0.0:
            raise ValueError("repetition_penalty must be above 0")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.logit_bias is not None:
            bias = {
                _integer("logit_bias key", int(k), 0): _number("logit_bias", v, -100.0, 100.0)
                for k, v in self.logit_bias.items()
            }
            object.__setattr__(self, "logit_bias", dict(sorted(bias.items())))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, which is how it is kept."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from plain data; an unknown name is a ValueError that lists it."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown sampling parameter {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


class Logprob(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probability of one token, with its rank (1 is the most likely) and its text where a tokenizer is there."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class GeneratedTokens(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Output tokens of one sample and their logprobs; the text follows from them."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    """Per token, the sampled one first; None where they were not asked for. Without the tokens' text."""

    def extended(self, new: GeneratedTokens) -> GeneratedTokens:
        """These tokens followed by the new ones."""
        logprobs = None if new.logprobs is None else (self.logprobs or ()) + new.logprobs
        return GeneratedTokens(self.token_ids + new.token_ids, logprobs)

    def head(self, count: int) -> GeneratedTokens:
        """The first `count` tokens; all but the last ones where `count` is negative, as in a slice."""
        return GeneratedTokens(self.token_ids[:count], None if self.logprobs is None else self.logprobs[:count])


class Request(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, tag="r"):
    """One row for the engine: a prompt and how to continue it."""

    request_id: str
    """Chosen by the driver, unique in the run; a user's `custom_id` never becomes one."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    attempt: int = 0
    """Counts how often the request was given to an engine before; set by the router."""
    index: int = 0
    """Position in the run; with the run's seed it replaces a missing `params.seed`."""
    report: Literal["interval", "step"] = "interval"
    """When new tokens are reported: after every step, for streams, or every `REPORT_INTERVAL_S`, which bounds what a
    crash can cost. Both report all tokens at the end."""
    generated: tuple[GeneratedTokens, ...] = ()
    """Per sample, output tokens that an earlier run or attempt generated: they count as generated here. Empty: none."""
    do_remote_decode: bool = False
    """Publish the prompt's KV cache, generate the first token of every sample, and leave the rest to another
    replica."""
    do_remote_prefill: bool = False
    """Wait for the prompt's KV cache and the first tokens from another replica (`Engine.add_chunk`,
    `Engine.end_prefill`)."""

    @property
    def id(self) -> RequestId:
        """The attempt that this request is."""
        return RequestId(self.request_id, self.attempt)


class Tokens(RequestMessage, frozen=True, tag="t", kw_only=True):
    """New output tokens of one sample. An attempt reports every token of the answer once, from the first on."""

    sample_index: int
    start: int
    """Number of output tokens of the sample before these."""
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    """Per token, the sampled one first; None where they were not asked for."""
    text_start: int = 0
    """Number of characters of the sample's text before `text`."""
    text: str = ""
    """Text that these tokens made certain; characters that may begin a stop string are held back."""


class Prefilled(RequestMessage, frozen=True, tag="p", kw_only=True):
    """The prompt of a request is computed, and every sample has its first token."""

    num_cached_tokens: int
    """Prompt tokens whose KV cache was found in the prefix cache."""
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    """Per prompt token, None for the first; None where they were not asked for."""
    handed_over: bool = False
    """This engine is done with the request: another replica goes on with it."""


class Finished(RequestMessage, frozen=True, tag="f", kw_only=True):
    """One sample of a request is finished."""

    sample_index: int
    reason: FinishReason
    num_tokens: int
    """Output tokens of the sample in all: whoever has fewer has missed some."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for the end-of-sequence token."""
    error: str | None = None
    """Why `reason` is "error"."""


EngineOutput = Tokens | Prefilled | Finished
"""What an engine reports of its requests, in order; `ResponseAssembler` adds it up."""


class PromptLoaded(RequestMessage, frozen=True, tag="l", kw_only=True):
    """A request no longer waits for its prompt's KV cache: the replica that published it can release it."""

    error: str | None = None
    """Why (a part of) the prompt is computed here after all."""


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One of the `n` samples of a request; while a request streams, everything generated so far."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token; the sampled token comes first."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for the end-of-sequence token."""
    error: str | None = None
    """Why `finish_reason` is "error"."""


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """What a request has produced; `finished` once every sample has a finish reason."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token; None for the first, which nothing precedes."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV cache was found, not computed (of the sample that was computed first)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowError:
    """Why a row could not be answered: a stable code for programs and a sentence for people."""

    code: str
    message: str
    details: dict[str, int | str] = field(default_factory=dict)


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int = MAX_INTEGER) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        bounds = f"at least {low}" if value < low and high == MAX_INTEGER else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value
