"""A model without weights: a cache entry is a hash of the tokens it stands for, and a token a hash of its entry.

An entry is computed from the entries before it, read through the block table; so one that is missing, stale, foreign or
out of place makes wrong tokens of all that follows. `Row` knows the right ones, and every read is compared with them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from msgspec.structs import replace

from shoal.runtime.sampling.sampler import SampledToken, Sampling, SamplingRow
from shoal.runtime.scheduling.batch import Batch, ScheduledSequence
from shoal.runtime.types import FinishReason, Logprob, Request, SamplingParams

VOCAB_SIZE = 13
EOS = 0
BYTES_PER_TOKEN = 8
GARBAGE = -7
BROKEN = "the model gave NaN"


def next_entry(before: Sequence[int], token: int) -> int:
    """The entry of a token after those that stand before it."""
    return hash((*before, token))


def next_token(entry: int, seed: int, sample_index: int) -> int:
    return hash((entry, seed, sample_index)) % VOCAB_SIZE


def is_broken(seed: int, num_output_tokens: int) -> bool:
    """Whether the logits of this row, after so many tokens, are NaN: for every fourth seed or so, sooner or later."""
    return seed % 4 == 3 and num_output_tokens == seed % 7


def logprob_of(entry: int, token: int) -> dict[int, Logprob]:
    return {token: Logprob(-(hash((entry, token)) % 1000) / 8, 1)}


@dataclass(frozen=True, slots=True)
class Answer:
    """One continuation of a row, from beginning to end."""

    token_ids: list[int]
    """Token ids of the prompt and the continuation."""
    num_prompt_tokens: int
    entries: list[int]
    finish_reason: FinishReason

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def logprobs(self) -> list[dict[int, Logprob]]:
        """Log-probabilities of the output tokens."""
        first = self.num_prompt_tokens
        return [logprob_of(self.entries[p - 1], self.token_ids[p]) for p in range(first, len(self.token_ids))]


@dataclass(slots=True)
class Row:
    """What is asked, and what the answer must be."""

    request: Request
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [_answer(self.request, index) for index in range(self.request.params.n)]

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None]:
        prompt, entries = self.request.prompt_token_ids, self.answers[0].entries
        return [None, *[logprob_of(entries[p - 1], prompt[p]) for p in range(1, len(prompt))]]


def _answer(request: Request, sample_index: int) -> Answer:
    params = request.params
    assert params.seed is not None
    assert params.max_tokens is not None
    tokens = list(request.prompt_token_ids)
    entries: list[int] = []
    for token in tokens:
        entries.append(next_entry(entries, token))
    for num_output in range(params.max_tokens):
        if is_broken(params.seed, num_output):
            return Answer(tokens, len(request.prompt_token_ids), entries, "error")
        tokens.append(next_token(entries[-1], params.seed, sample_index))
        if tokens[-1] == EOS and not params.ignore_eos:
            return Answer(tokens, len(request.prompt_token_ids), entries, "stop")
        entries.append(next_entry(entries, tokens[-1]))
    return Answer(tokens, len(request.prompt_token_ids), entries, "length")


def random_rows(rng: Random, num_rows: int, *, max_prompt: int, max_tokens: int) -> dict[str, Row]:
    """Rows of every kind, by request id; some begin like others."""
    rows: dict[str, Row] = {}
    beginning = tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(max_prompt))
    for index in range(num_rows):
        length = rng.randint(1, max_prompt)
        shared = rng.randint(0, length) if rng.random() < 0.5 else 0
        prompt = beginning[:shared] + tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(length - shared))
        params = SamplingParams(
            n=2 if rng.random() < 0.15 else 1,
            max_tokens=rng.randint(1, max_tokens),
            seed=rng.randrange(1 << 30),
            logprobs=0 if rng.random() < 0.3 else None,
            prompt_logprobs=0 if rng.random() < 0.1 else None,
            ignore_eos=rng.random() < 0.8,
        )
        request = Request(request_id=f"row-{index}", prompt_token_ids=prompt, params=params, index=index)
        rows[request.request_id] = Row(replace(request, report="step" if rng.random() < 0.1 else "interval"))
    return rows


class Payload(bytes):
    """Entries on their way, as much of a tensor as the hand-off uses."""

    def numel(self) -> int:
        return len(self)

    def numpy(self) -> Payload:
        return self

    def tobytes(self) -> bytes:
        return self

    @property
    def data(self) -> Payload:
        return self


class Cache:
    """One entry a slot, 0 where nothing was written."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.bytes_per_token = BYTES_PER_TOKEN
        self.entries = [0] * (num_blocks * block_size)

    def slots(self, block_table: list[int], start: int, end: int) -> list[int]:
        size = self.block_size
        return [block_table[p // size] * size + p % size for p in range(start, end)]

    def read_kv(self, slots: list[int]) -> Payload:
        return Payload(struct.pack(f"<{len(slots)}q", *[self.entries[slot] for slot in slots]))

    def write_kv(self, slots: list[int], payload: bytes) -> None:
        entries = struct.unpack(f"<{len(payload) // BYTES_PER_TOKEN}q", payload)
        for slot, entry in zip(slots, entries[len(entries) - len(slots) :], strict=True):
            self.entries[slot] = entry


class Logits(list[int]):
    """Entries in place of logits: the sampler takes its tokens from them."""

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)


CheckRead = Callable[[ScheduledSequence, list[int]], None]
"""(part of a batch, the entries that it builds on)"""
TakePromptLogits = Callable[[ScheduledSequence, int, Any], None]


class Runner:
    """Computes batches on one cache."""

    def __init__(self, cache: Cache, check_read: CheckRead) -> None:
        self.cache = cache
        self._check_read = check_read

    def run(self, batch: Batch, _num_prompt_slices: int, take: TakePromptLogits | None) -> Logits:
        """Reads first, for the whole batch, and then writes: the sequences of a batch do not wait for each other."""
        cache, logits = self.cache, Logits()
        work = []
        for part in batch.sequences:
            slots = cache.slots(part.block_table, 0, part.start + len(part.token_ids))
            entries = [cache.entries[slot] for slot in slots[: part.start]]
            self._check_read(part, entries)
            work.append((part, slots, entries))
        for part, slots, entries in work:
            for token in part.token_ids:
                entries.append(next_entry(entries, token))
                cache.entries[slots[len(entries) - 1]] = entries[-1]
            if part.num_prompt_logits and take is not None:
                take(part, len(entries) - part.num_prompt_logits, Logits(entries[-part.num_prompt_logits :]))
            logits.extend(entries[len(entries) - part.num_logits :])
        return logits

    def spoil(self, batch: Batch, rng: Random) -> None:
        """A batch that was broken off: some of its entries were written, and what they hold counts for nothing."""
        for part in batch.sequences:
            for slot in self.cache.slots(part.block_table, part.start, part.start + len(part.token_ids)):
                if rng.random() < 0.5:
                    self.cache.entries[slot] = GARBAGE


class Sampler:
    def begin(self, logits: list[int], rows: Sequence[SamplingRow], *, ahead: int = 0) -> Sampling:
        assert ahead == 0
        return Sampling(partial(self.sample, logits, rows))

    def sample(self, logits: list[int], rows: Sequence[SamplingRow]) -> list[SampledToken]:
        sampled = []
        for entry, row in zip(logits, rows, strict=True):
            token = next_token(entry, row.seed, row.sample_index)
            if is_broken(row.seed, len(row.output_token_ids)):
                sampled.append(SampledToken(-1, error=BROKEN))
            else:
                logprobs = None if row.params.logprobs is None else logprob_of(entry, token)
                sampled.append(SampledToken(token, logprobs))
        return sampled

    def prompt_logprobs(self, logits: list[int], following: Sequence[int], _k: int) -> list[SampledToken]:
        return [SampledToken(t, logprob_of(entry, t)) for entry, t in zip(logits, following, strict=True)]
