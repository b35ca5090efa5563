"""The values that users, drivers and engines exchange: sampling parameters, requests and outputs.

Field names are vLLM's where the meaning is the same. Structs travel between processes, as arrays of their fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from shoal.parallel.request_id import RequestId, RequestMessage
from shoal.parallel.settings import Declaration, Setting, SettingError, build_settings, check_settings

from .plain_numbers import plain_number, whole_number
from .structured_params import StructuredOutputsParams

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_N = 1024
MAX_LOGPROBS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096
"""Limit for all stop strings of a request together: every new token is compared with each of them."""
MAX_STOP_TOKEN_IDS = 1024
REPORT_INTERVAL_S = 0.5
"""How often requests with `report="interval"` report new tokens: bounds the work that a crash can cost, in time."""


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters of one request; a bad value is a ValueError that names it.

    Names and meanings are vLLM's.
    """

    n: Annotated[int, Setting("Continuations of the prompt.", ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Setting("0 always takes the most likely token.", ge=0, le=100)] = 1.0
    top_p: Annotated[
        float, Setting("Sample from the most likely tokens that together have this probability.", gt=0, le=1)
    ] = 1.0
    top_k: Annotated[int, Setting("Sample from this many most likely tokens; 0 or -1 keeps all.", ge=-1)] = 0
    min_p: Annotated[
        float,
        Setting("Sample from tokens that are at least this fraction as likely as the most likely one.", ge=0, le=1),
    ] = 0.0
    max_tokens: Annotated[
        int | None, Setting("Longest output, in tokens; null is up to the model's context length.", ge=1)
    ] = 16
    min_tokens: Annotated[int, Setting("Tokens before the output may end.", ge=0)] = 0
    stop: Annotated[str | Sequence[str] | None, Setting("Texts that end the output when they appear in it.")] = ()
    stop_token_ids: Annotated[Sequence[int] | None, Setting("Token ids that end the output.", ge=0)] = ()
    seed: Annotated[
        int | None, Setting("Seed of the request.", derived="from the run's seed and the request's index in the run")
    ] = None
    logprobs: Annotated[
        int | None,
        Setting(
            "Return, per output token, the log-probability of the sampled token and of this many most likely ones, "
            "under the model's own distribution (before penalties, bias, temperature and truncation).",
            ge=0,
            le=MAX_LOGPROBS,
        ),
    ] = None
    prompt_logprobs: Annotated[int | None, Setting("The same per prompt token.", ge=0, le=MAX_LOGPROBS)] = None
    presence_penalty: Annotated[
        float, Setting("Subtracted from the logits of tokens that are in the output.", ge=-2, le=2)
    ] = 0.0
    frequency_penalty: Annotated[
        float, Setting("Subtracted from the logits once per occurrence in the output.", ge=-2, le=2)
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Setting("Divides positive and multiplies negative logits of tokens in prompt or output.", gt=0, le=100),
    ] = 1.0
    ignore_eos: Annotated[bool, Setting("Do not stop at the end-of-sequence token.")] = False
    logit_bias: Annotated[
        Mapping[int, float] | None, Setting("Token id to a number between -100 and 100 that is added to its logit.")
    ] = None
    include_stop_str_in_output: Annotated[
        bool, Setting("Keep the stop string, or the text of the stop token, that ended the output.")
    ] = False
    skip_special_tokens: Annotated[bool, Setting("Leave special tokens out of the text.")] = True

    stop_in_reasoning: Annotated[bool, Setting("Apply stop strings to the reasoning before an answer, too.")] = False
    structured_outputs: Annotated[
        StructuredOutputsParams | None,
        Setting("Form that the text of the answer must have; see [structured-outputs.md](structured-outputs.md)."),
    ] = None

    def __post_init__(self) -> None:
        _use_plain_numbers(self)
        check_settings(self)
        if isinstance(self.structured_outputs, Mapping):
            force_setattr(self, "structured_outputs", StructuredOutputsParams.from_dict(self.structured_outputs))
        if self.structured_outputs is not None and self.ignore_eos:
            raise ValueError(
                "ignore_eos cannot be combined with structured_outputs, whose form says where the answer ends"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(map(_has_surrogate, stop)):
            raise SettingError(
                "stop", "stop has a lone surrogate, which is not a character and which no text can contain"
            )
        if len(stop) > MAX_STOP_STRINGS:
            raise SettingError("stop", f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS} are allowed")
        if (num_chars := sum(map(len, stop))) > MAX_STOP_CHARS:
            raise SettingError("stop", f"stop has {num_chars} characters in all, at most {MAX_STOP_CHARS} are allowed")
        stop_token_ids = tuple(self.stop_token_ids or ())
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            message = f"stop_token_ids has {len(stop_token_ids)} ids, at most {MAX_STOP_TOKEN_IDS} are allowed"
            raise SettingError("stop_token_ids", message)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})"
            raise SettingError("min_tokens", message)
        force_setattr(self, "stop", stop)
        force_setattr(self, "stop_token_ids", stop_token_ids)
        if self.logit_bias is not None:
            force_setattr(self, "logit_bias", _checked_bias(self.logit_bias))

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
        """Build from plain data; an unknown name is a ValueError that suggests the nearest known one."""
        return build_settings(cls, values)


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
    reasoning_end_token_id: int | None = None
    """The prompt ends inside the model's reasoning, which this token ends; None: the output is an answer from its first
    token. Stop strings apply to what follows the reasoning unless `params.stop_in_reasoning`."""
    generated: tuple[GeneratedTokens, ...] = ()
    """Per sample, output tokens that an earlier run or attempt generated: they count as generated here. Empty: none."""
    num_losses: int = 0
    """How often a worker was lost, in earlier runs, while it answered this request."""
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
    scheduled_at: float | None = None
    """When the first part of the prompt was scheduled, in seconds since 1970 by the clock of the engine's machine."""
    first_token_at: float | None = None
    """When the first token of a sample was known, by the same clock."""


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
    message: dict[str, Any] | None = None
    """`LLM.chat`: the answer as OpenAI's message, with `reasoning_content`, `content` and `tool_calls`."""


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """When a request got how far, in seconds since 1970. None: not known, or not there yet."""

    arrival_time: float | None = None
    first_scheduled_time: float | None = None
    """This and `first_token_time` are by the clock of the engine's machine."""
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def queue_s(self) -> float | None:
        """Seconds until the prompt was scheduled."""
        return _seconds(self.arrival_time, self.first_scheduled_time)

    @property
    def prefill_s(self) -> float | None:
        """Seconds from there to the first token."""
        return _seconds(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_s(self) -> float | None:
        """Seconds from there to the end."""
        return _seconds(self.first_token_time, self.finished_time)

    @property
    def time_to_first_token_s(self) -> float | None:
        return _seconds(self.arrival_time, self.first_token_time)

    @property
    def e2e_s(self) -> float | None:
        """Seconds from the arrival to the end."""
        return _seconds(self.arrival_time, self.finished_time)


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
    metrics: RequestMetrics = field(default_factory=RequestMetrics, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowError:
    """Why a row could not be answered: a stable code for programs and a sentence for people."""

    code: str
    message: str
    details: dict[str, int | str] = field(default_factory=dict)


def _seconds(begin: float | None, end: float | None) -> float | None:
    """None if either is not known. Clocks of two machines may disagree: never negative."""
    return None if begin is None or end is None else max(0.0, end - begin)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _checked_bias(biases: Mapping[Any, Any]) -> dict[int, float]:
    """Sorted by token id. JSON writes token ids, being keys, as texts."""
    checked = {}
    for key, bias in biases.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key
        _BIAS_KEY.check(token_id)
        _BIAS.check(bias)
        checked[token_id] = float(bias)
    return dict(sorted(checked.items()))


_WHOLE_NUMBERS = ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs")
_NO_STOP_TOKENS = ()
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _use_plain_numbers(params: SamplingParams) -> None:
    """Replace 16.0 and numpy's numbers, which mean the same, by plain ones; what is no number stays."""
    for name in _WHOLE_NUMBERS:
        value = getattr(params, name)
        if type(value) is not int and (number := whole_number(value)) is not None:
            force_setattr(params, name, number)
    for name in _NUMBERS:
        value = getattr(params, name)
        if type(value) is not float:
            force_setattr(params, name, plain_number(value))
    if params.stop_token_ids is _NO_STOP_TOKENS:
        return
    if isinstance(params.stop_token_ids, Iterable) and not isinstance(params.stop_token_ids, str):
        ids = [i if (number := whole_number(i)) is None else number for i in params.stop_token_ids]
        force_setattr(params, "stop_token_ids", tuple(ids))


_BIAS_KEY = Declaration("logit_bias key", int, Setting("Token id.", ge=0), None)
_BIAS = Declaration("logit_bias", float, Setting("Added to the logit.", ge=-100, le=100), None)
