"""Which tokens may follow in an answer that must have a form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from .token_mask import TokenMask, contains


class ConstraintError(Exception):
    """Why a sample cannot go on under its constraint."""


class TokenConstraint(Protocol):
    """What a sampler asks of the constraint of one sample."""

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        """The tokens that may follow these output tokens of the sample; ConstraintError if that cannot be told.

        A pure function of the sample: asking twice, or anew after a resume, gives the same answer.
        """
        ...


class Matcher(Protocol):
    """A grammar after some tokens."""

    def mask(self) -> TokenMask:
        """The tokens that may follow, without those that end an answer."""
        ...

    def can_end(self) -> bool:
        """Whether the text may end here."""
        ...

    def consume(self, token_id: int) -> None:
        """Append a token of the mask."""
        ...


class GrammarConstraint:
    """Keeps one sample to a grammar, from the end of its reasoning on.

    Tokens that end an answer are allowed exactly where the text may end, so an answer that ends by itself has its form.
    """

    def __init__(
        self,
        matcher: Callable[[], Matcher],
        *,
        ends: TokenMask,
        others: TokenMask,
        reasoning_end_token_id: int | None = None,
        min_tokens: int = 0,
    ) -> None:
        """`matcher`: makes the matcher of this sample, when its first mask is needed. `ends`: the tokens that end an
        answer; `others`: all other tokens of the vocabulary.

        Without a `reasoning_end_token_id` the grammar applies from the first token on. The text ends before
        `min_tokens` only where nothing else can follow.
        """
        self._make_matcher = matcher
        self._matcher: Matcher | None = None
        self._ends = ends
        self._others = others
        self._reasoning_end = reasoning_end_token_id
        self._in_reasoning = reasoning_end_token_id is not None
        self._min_tokens = min_tokens
        self._num_read = 0
        """Output tokens that the state below follows."""
        self._state: tuple[TokenMask, bool] | None = None
        """See `_matched`; None where it is not computed."""

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        """See `TokenConstraint`; the output tokens begin with those of the call before."""
        for token_id in output_token_ids[self._num_read :]:
            self._read(token_id)
            self._num_read += 1
        if self._in_reasoning:
            return self._others
        matched, can_end = self._matched()
        goes_on = not can_end or (len(output_token_ids) < self._min_tokens and matched.any())
        allowed = matched if goes_on else matched | self._ends
        if not allowed.any():
            raise ConstraintError(
                "structured_outputs allow no token after this output: no token of the model goes on with the form, "
                "except such that end an answer"
            )
        return allowed

    def _read(self, token_id: int) -> None:
        if self._in_reasoning:
            self._in_reasoning = token_id != self._reasoning_end
            return
        # The mask is also computed for tokens that came from elsewhere: whether a grammar reaches a limit depends on
        # everything that was computed before.
        matched, _ = self._matched()
        if not contains(matched, token_id):
            raise ConstraintError(
                f"token {token_id} of the output so far does not fit structured_outputs: it was generated with other "
                "parameters, or with another version of llguidance"
            )
        assert self._matcher is not None
        self._matcher.consume(token_id)
        self._state = None

    def _matched(self) -> tuple[TokenMask, bool]:
        """The tokens that may follow without ending the answer, and whether it may end here."""
        if self._state is None:
            if self._matcher is None:
                self._matcher = self._make_matcher()
            mask = self._matcher.mask() & self._others
            self._state = mask, self._matcher.can_end()
        return self._state
