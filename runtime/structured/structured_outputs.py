"""Structured outputs of one model: grammars of requests, compiled and kept for the requests that follow."""

from __future__ import annotations

import threading
from collections import OrderedDict

import msgspec

from ..tokenization.tokenizer import Tokenizer
from ..types import Request, SamplingParams
from .constraint import GrammarConstraint
from .llguidance_backend import Grammar, LlguidanceBackend
from .token_mask import full_mask, mask_of

MAX_TOTAL_BYTES = 2 << 20
"""Limit for n times the size of the form: every sample compiles its own."""
MAX_CACHED_GRAMMARS = 64
MAX_CACHED_BYTES = 4 << 20
"""Limit for the texts of all cached grammars together."""


class StructuredOutputs:
    """Makes the constraints of requests. llguidance is loaded for the first of them. Threads may share an object."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        """`vocab_size`: that of the model, which may be above the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._backend: LlguidanceBackend | None = None
        self._cache = _GrammarCache()

    def check(self, params: SamplingParams) -> None:
        """ValueError if requests with these parameters cannot be answered; requests without a form always pass."""
        if params.structured_outputs is not None:
            self._compiled(params)
            self._ends(params)

    def constraints(self, request: Request) -> list[GrammarConstraint]:
        """One per sample of a request that asks for a form; ValueError if it cannot be answered."""
        params = request.params
        grammar = self._compiled(params)
        ends = mask_of(self._ends(params), self._vocab_size)
        others = full_mask(self._vocab_size) & ~ends
        return [
            GrammarConstraint(
                grammar.matcher,
                ends=ends,
                others=others,
                reasoning_end_token_id=request.reasoning_end_token_id,
                min_tokens=params.min_tokens,
            )
            for _ in range(params.n)
        ]

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end an answer."""
        eos_token_ids = () if self._tokenizer is None else self._tokenizer.eos_token_ids
        ends = (*eos_token_ids, *(params.stop_token_ids or ()))
        if not ends:
            raise ValueError(
                "structured_outputs need a token that ends the answer, and the model names no end-of-sequence token; "
                "give stop_token_ids"
            )
        return ends

    def _compiled(self, params: SamplingParams) -> Grammar:
        key = msgspec.msgpack.encode(params.structured_outputs)
        if params.n * len(key) > MAX_TOTAL_BYTES:
            raise ValueError(
                f"n times the size of structured_outputs is {params.n * len(key)} bytes, at most {MAX_TOTAL_BYTES} are "
                "allowed; lower n"
            )
        with self._lock:
            grammar = self._cache.get(key)
            if grammar is None:
                assert params.structured_outputs is not None
                grammar = self._loaded_backend().compile(params.structured_outputs)
                self._cache.add(key, grammar)
            return grammar

    def _loaded_backend(self) -> LlguidanceBackend:
        if self._backend is None:
            if self._tokenizer is None:
                raise ValueError("structured_outputs need a tokenizer, and the model directory has none")
            self._backend = LlguidanceBackend(self._tokenizer, self._vocab_size)
        return self._backend


class _GrammarCache:
    """The compiled grammars that were used last."""

    def __init__(self) -> None:
        self._grammars: OrderedDict[bytes, Grammar] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: bytes) -> Grammar | None:
        grammar = self._grammars.get(key)
        if grammar is not None:
            self._grammars.move_to_end(key)
        return grammar

    def add(self, key: bytes, grammar: Grammar) -> None:
        self._grammars[key] = grammar
        self._num_bytes += len(key)
        while len(self._grammars) > MAX_CACHED_GRAMMARS or self._num_bytes > MAX_CACHED_BYTES:
            oldest, _ = self._grammars.popitem(last=False)
            self._num_bytes -= len(oldest)
