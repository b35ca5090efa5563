"""Parts of an output from its tokens, which never go beyond the engine's text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.chat.token_parts import TokenParts
from shoal.runtime.tokenization.detokenizer import IncrementalDetokenizer
from shoal.runtime.tokenization.tokenizer import Part, Special, Tokenizer
from tests.support.outputs import tokenizer_with

THINK, END = 256, 257  # ids; byte b has id b
VISIBLE = tokenizer_with(["</think>", "<end>"])
HIDDEN = tokenizer_with(["</think>", "<end>"], special=True)


def ids(*pieces: str | int) -> list[int]:
    return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else piece.encode())]


def merged(parts: Sequence[Part]) -> list[Part]:
    """The same parts with adjacent texts as one."""
    result: list[Part] = []
    for part in parts:
        if result and isinstance(part, str) and isinstance(result[-1], str):
            result[-1] += part
        else:
            result.append(part)
    return result


def all_parts(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, stop: Sequence[str] = (), skip: bool = True
) -> tuple[list[Part], str]:
    """Parts of an output that comes token by token, and the engine's text."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop, skip_special_tokens=skip)
    token_parts = TokenParts(tokenizer, skip_special_tokens=skip, end_token_ids=(END,))
    parts: list[Part] = []
    for token_id in token_ids:
        stopped = token_id == END or detokenizer.append(token_id) is not None
        parts += token_parts.append([token_id], len(detokenizer.text))
        if stopped:
            break
    detokenizer.finish()
    return merged(parts + token_parts.finish(len(detokenizer.text))), detokenizer.text


@pytest.mark.parametrize("tokenizer", [VISIBLE, HIDDEN])
@pytest.mark.parametrize("skip", [True, False])
def test_added_tokens_are_special_whether_or_not_the_text_has_them(tokenizer: Tokenizer, skip: bool) -> None:
    parts, text = all_parts(tokenizer, ids("a", THINK, "</think>é", THINK, END), skip=skip)
    assert parts == ["a", Special("</think>"), "</think>é", Special("</think>")]
    hidden = tokenizer is HIDDEN and skip
    assert text == ("a</think>é" if hidden else "a</think></think>é</think>")


@pytest.mark.parametrize("tokenizer", [VISIBLE, HIDDEN])
def test_a_stop_string_cuts_the_parts(tokenizer: Tokenizer) -> None:
    assert all_parts(tokenizer, ids("a", THINK, "b STOP"), stop=["STOP"])[0] == ["a", Special("</think>"), "b "]


def test_a_token_that_a_stop_string_cuts_is_text_as_far_as_it_is_there() -> None:
    assert all_parts(VISIBLE, ids("a", THINK), stop=["ink>"])[0] == ["a</th"]
    assert all_parts(VISIBLE, ids("a", THINK), stop=["a</think>"])[0] == []


def test_a_hidden_token_within_a_stop_string_is_dropped_and_one_before_it_is_not() -> None:
    assert all_parts(HIDDEN, ids("aST", THINK, "OP"), stop=["STOP"])[0] == ["a"]
    assert all_parts(HIDDEN, ids("a", THINK, "STOP"), stop=["STOP"])[0] == ["a", Special("</think>")]


def test_parts_wait_for_the_text_and_for_whole_characters() -> None:
    token_parts = TokenParts(VISIBLE)
    assert token_parts.append(ids("ab", THINK), 1) == ["a"]
    assert token_parts.append([], 5) == ["b"]  # the text has three characters of the token
    assert token_parts.append([0xC3], 10) == [Special("</think>")]
    assert token_parts.append([0xA9], 11) == ["é"]
    assert token_parts.append([0xC3], 11) == []
    assert token_parts.finish(12) == ["\ufffd"]


def test_end_tokens_are_left_out() -> None:
    token_parts = TokenParts(VISIBLE, end_token_ids=(END,))
    assert merged(token_parts.append(ids("a", END, "b"), 7)) == ["ab"]
    assert token_parts.finish(7) == []


TOKEN_IDS = st.lists(st.integers(0, 256) | st.sampled_from([*ids("é⛵ab"), THINK]))


@given(TOKEN_IDS, st.sampled_from([VISIBLE, HIDDEN]), st.booleans(), st.sampled_from([[], ["ab"], ["nk>", "b"], ["é"]]))
def test_parts_spell_the_text(token_ids: list[int], tokenizer: Tokenizer, skip: bool, stop: list[str]) -> None:
    parts, text = all_parts(tokenizer, token_ids, stop=stop, skip=skip)
    is_hidden = tokenizer is HIDDEN and skip
    shown = [p if isinstance(p, str) else "" if is_hidden else p.text for p in parts]
    assert "".join(shown) == text
    if not stop:
        assert parts.count(Special("</think>")) == token_ids.count(THINK)


def test_word_level_tokenizers_separate_tokens() -> None:
    words = {"a": 0, "b": 1, "<x>": 2}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "a"}
    tokenizer = Tokenizer({"version": "1.0", "added_tokens": [{"id": 2, "content": "<x>", **flags}], "model": model})
    assert all_parts(tokenizer, [0, 2, 1]) == (["a ", Special("<x>"), " b"], "a <x> b")
