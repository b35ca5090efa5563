"""Grammars compiled by llguidance: the one module that imports it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ..structured_params import StructuredOutputsParams
from ..tokenization.tokenizer import Tokenizer
from .constraint import ConstraintError
from .grammars import choice_grammar, lark_grammar, regex_grammar, schema_grammar
from .token_mask import TokenMask, num_words

if TYPE_CHECKING:
    from llguidance import LLMatcher

INSTALL = "structured_outputs need the package llguidance; install it with pip install 'shoal[structured]'"
MAX_REASON_CHARS = 300
NUM_TRIED_TOKENS = 4

_POSITION = re.compile(r"^at \d+\(\d+\): ")
_SOURCE_LINE = re.compile(r"\n +\d+ \| ")
_SPECIAL = b"\xff"
"""Before the text of a special token, which no text of a grammar matches."""


class LlguidanceBackend:
    """llguidance with the tokens of a model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """ValueError if llguidance is not installed, or cannot use the tokenizer."""
        if tokenizer.separator:
            raise ValueError("structured_outputs need a byte-level tokenizer; this one joins words with spaces")
        try:
            import llguidance
        except ImportError as error:
            raise ValueError(INSTALL) from error
        self._library = llguidance
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))
        # counts of work and not of time: a grammar that exceeds one does so on every machine
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=2_000,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=100_000,
            step_max_items=20_000,
            max_lexer_states=50_000,
            max_grammar_size=500_000,
            verbose_errors=False,
        )

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """ValueError, naming the field, for what cannot be compiled."""
        try:
            grammar = Grammar(self, self._text(params))
            _try_out(grammar.matcher())
        except (ValueError, ConstraintError) as error:
            reason = str(error) if params.grammar is not None else _POSITION.sub("", str(error))
            raise ValueError(f"structured_outputs.{params.kind}: {reason}") from error
        return grammar

    def matcher(self, grammar: str) -> LlguidanceMatcher:
        """A matcher at the beginning of a grammar."""
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        return LlguidanceMatcher(matcher, self._vocab_size)

    def _text(self, params: StructuredOutputsParams) -> str:
        if params.json_object:
            return schema_grammar('{"type": "object"}')
        if params.json is not None:
            assert isinstance(params.json, str)
            return schema_grammar(params.json)
        if params.choice is not None:
            return choice_grammar(params.choice)
        if params.regex is not None:
            return regex_grammar(self._library.regex_to_lark(params.regex))
        assert params.grammar is not None
        return lark_grammar(params.grammar)


def _try_out(matcher: LlguidanceMatcher) -> None:
    """Walk along some text of a grammar, so that one whose states are too large is found before it is used."""
    for _ in range(NUM_TRIED_TOKENS):
        allowed = np.flatnonzero(matcher.mask())
        if not len(allowed):
            break
        word = int(matcher.mask()[allowed[0]])
        matcher.consume(32 * int(allowed[0]) + (word & -word).bit_length() - 1)
    if not (matcher.can_end() or matcher.mask().any()):
        raise ValueError("no text of this model's tokens has this form")


class Grammar:
    """A grammar that compiles."""

    def __init__(self, backend: LlguidanceBackend, text: str) -> None:
        self._backend = backend
        self._text = text

    def matcher(self) -> LlguidanceMatcher:
        """A matcher at the beginning, which shares nothing with others: no sample can help or fail another."""
        return self._backend.matcher(self._text)


class LlguidanceMatcher:
    """A grammar after some tokens. ConstraintError once it has reached a limit."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._check()

    def mask(self) -> TokenMask:
        """The tokens that may follow, without those that end an answer."""
        self._check()
        if self._matcher.is_stopped():
            return np.zeros(num_words(self._vocab_size), np.uint32)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: num_words(self._vocab_size)].copy()
        self._check()
        if self._vocab_size % 32:
            mask[-1] &= (1 << self._vocab_size % 32) - 1  # the end that llguidance knows is after the vocabulary
        return mask

    def can_end(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_stopped() or self._matcher.is_accepting()

    def consume(self, token_id: int) -> None:
        """Append a token of the mask."""
        consumed = self._matcher.consume_token(token_id)
        self._check()
        assert consumed, f"token {token_id} is in the mask and was refused"

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(_reason(self._matcher.get_error()))


def _reason(error: str) -> str:
    """An error of llguidance in one line, without the lines of the grammar and settings that requests do not have."""
    if "Enable 'coerce_one_of'" in error:
        return "oneOf is supported only where no value fits two of its schemas; use anyOf"
    message = _SOURCE_LINE.split(error)[0].replace("failed to compile JSON schema: ", "").replace("<non-verbose/>", "")
    return " ".join(message.split())[:MAX_REASON_CHARS]


class _Vocabulary:
    """What llguidance reads of a tokenizer. Its end of sequence is a token after the vocabulary, which none samples."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self.tokens = [_token_bytes(tokenizer, i) for i in range(vocab_size)]
        self.tokens.append(_SPECIAL + b"<end>")

    def __call__(self, text: Any) -> list[int]:
        """Token ids of a text that a grammar forces. TypeError for bytes, with which llguidance tries, too."""
        if not isinstance(text, str):
            raise TypeError("texts only")
        return self._tokenizer.encode(text)


def _token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    if (special := tokenizer.special_text(token_id)) is not None:
        return _SPECIAL + special.encode()
    return tokenizer.token_bytes(token_id, skip_special_tokens=False) or b""
