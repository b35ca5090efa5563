"""What a constraint allows around a grammar: reasoning, ends, min_tokens; and that it is a function of the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.structured.constraint import ConstraintError, GrammarConstraint
from shoal.runtime.structured.token_mask import TokenMask, contains, full_mask, mask_of, num_words, to_bools

VOCAB = 70
ENDS = [1, 64]
THINK_END = 9


class Word:
    """A grammar of one word of tokens, or its beginning from `min_length` on."""

    def __init__(self, word: Sequence[int], min_length: int | None = None) -> None:
        self.word = list(word)
        self.min_length = len(self.word) if min_length is None else min_length
        self.consumed: list[int] = []

    def mask(self) -> TokenMask:
        return mask_of(self.word[len(self.consumed) :][:1], VOCAB)

    def can_end(self) -> bool:
        return len(self.consumed) >= self.min_length

    def consume(self, token_id: int) -> None:
        assert token_id == self.word[len(self.consumed)]
        self.consumed.append(token_id)


def constraint(make: Callable[[], Word], *, reasoning_end: int | None = None, min_tokens: int = 0) -> GrammarConstraint:
    ends = mask_of(ENDS, VOCAB)
    return GrammarConstraint(
        make,
        ends=ends,
        others=full_mask(VOCAB) & ~ends,
        reasoning_end_token_id=reasoning_end,
        min_tokens=min_tokens,
    )


def allowed(one: GrammarConstraint, output: Sequence[int]) -> list[int]:
    mask = one.mask(output)
    assert mask.shape == (num_words(VOCAB),)
    return np.flatnonzero(to_bools(mask, VOCAB)).tolist()


def test_masks_are_sets() -> None:
    mask = mask_of([0, 31, 32, 69, 70, 500], VOCAB)
    assert mask.tolist() == [0x80000001, 1, 1 << 5]
    assert np.flatnonzero(to_bools(mask, VOCAB)).tolist() == [0, 31, 32, 69]
    assert [contains(mask, i) for i in (0, 1, 31, 32, 69)] == [True, False, True, True, True]
    assert to_bools(full_mask(VOCAB), VOCAB).all()
    assert full_mask(VOCAB).tolist() == [0xFFFFFFFF, 0xFFFFFFFF, 0x3F]
    assert full_mask(64).tolist() == [0xFFFFFFFF, 0xFFFFFFFF]


def test_an_answer_ends_where_the_grammar_may() -> None:
    one = constraint(lambda: Word([5, 6, 7], min_length=2))
    assert allowed(one, []) == [5]
    assert allowed(one, [5]) == [6]
    assert allowed(one, [5, 6]) == [1, 7, 64]
    assert allowed(one, [5, 6, 7]) == [1, 64]


def test_the_grammar_follows_the_reasoning() -> None:
    one = constraint(lambda: Word([THINK_END, 6]), reasoning_end=THINK_END)
    everything = [i for i in range(VOCAB) if i not in ENDS]
    assert allowed(one, []) == everything
    assert allowed(one, [5, 20]) == everything
    assert allowed(one, [5, 20, THINK_END]) == [THINK_END], "what ends the reasoning may stand in the answer"
    assert allowed(one, [5, 20, THINK_END, THINK_END]) == [6]
    assert allowed(one, [5, 20, THINK_END, THINK_END, 6]) == ENDS


def test_min_tokens_yield_where_nothing_else_may_follow() -> None:
    one = constraint(lambda: Word([5, 6, 7], min_length=1), min_tokens=5)
    assert allowed(one, [5]) == [6]
    assert allowed(one, [5, 6]) == [7]
    assert allowed(one, [5, 6, 7]) == ENDS
    reasoned = constraint(lambda: Word([5, 6], min_length=1), min_tokens=3, reasoning_end=THINK_END)
    assert allowed(reasoned, [8, THINK_END, 5]) == [1, 6, 64], "the reasoning counts"


def test_tokens_that_end_an_answer_are_no_part_of_it() -> None:
    one = constraint(lambda: Word([5, 64, 6]))
    assert allowed(one, []) == [5]
    for _ in range(2):
        with pytest.raises(ConstraintError, match="allow no token after this output"):
            one.mask([5])


def test_tokens_from_elsewhere_must_fit() -> None:
    one = constraint(lambda: Word([5, 6]))
    for _ in range(2):
        with pytest.raises(ConstraintError, match="token 7 of the output so far does not fit structured_outputs"):
            one.mask([5, 7])


def test_every_state_is_computed_once_and_in_order() -> None:
    """Whether a grammar reaches a limit depends on what was computed before, so a resumed sample computes the same."""
    log: list[str] = []

    class Logged(Word):
        def mask(self) -> TokenMask:
            log.append(f"mask {len(self.consumed)}")
            return super().mask()

        def consume(self, token_id: int) -> None:
            log.append(f"consume {token_id}")
            super().consume(token_id)

    word = [5, 6, 7, 8]
    stepwise = constraint(lambda: Logged(word))
    for length in (0, 0, 1, 2, 2, 3):
        stepwise.mask(word[:length])
    expected, log[:] = list(log), []
    constraint(lambda: Logged(word)).mask(word[:3])
    assert log == expected == ["mask 0", "consume 5", "mask 1", "consume 6", "mask 2", "consume 7", "mask 3"]


@given(st.lists(st.integers(0, 6), max_size=8), st.booleans(), st.integers(0, 9))
def test_it_does_not_matter_when_it_is_asked(lengths: list[int], reasons: bool, min_tokens: int) -> None:
    output = [8, THINK_END, 5, 6, 7, 10] if reasons else [5, 6, 7, 10, 11, 12]
    end = THINK_END if reasons else None

    def make() -> GrammarConstraint:
        return constraint(lambda: Word([5, 6, 7, 10, 11, 12], 2), reasoning_end=end, min_tokens=min_tokens)

    asked = make()
    for length in sorted(lengths):
        assert allowed(asked, output[:length]) == allowed(make(), output[:length])
