"""Streaming text: never half a character, never a character that a stop string takes back."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.detokenizer import IncrementalDetokenizer, TokenOffsets
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import MAX_STOP_CHARS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def byte_tokenizer(directory: Path) -> Tokenizer:
    write_byte_tokenizer(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return tokenizer


def feed(detokenizer: IncrementalDetokenizer, text: str) -> str | None:
    """Append the bytes of `text` until a stop string is met."""
    for byte in text.encode():
        if stop := detokenizer.append(3 + byte):
            return stop
    return None


BYTES = st.integers(3, 258) | st.sampled_from([3 + b for b in "é世😀".encode()])


@given(st.lists(BYTES | st.integers(0, 290)), st.booleans())
def test_the_final_text_is_decode_of_all_tokens(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["never met"], skip_special_tokens=skip)
    seen = ""
    for token_id in ids:
        assert detokenizer.append(token_id) is None
        assert detokenizer.text.startswith(seen)
        seen = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids, skip)
    assert detokenizer.text.startswith(seen)


@given(st.text())
def test_valid_text_never_shows_a_replacement_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    detokenizer = IncrementalDetokenizer(tokenizer)
    data = text.encode()
    for i, byte in enumerate(data):
        detokenizer.append(3 + byte)
        assert detokenizer.text == data[: i + 1].decode(errors="ignore")


def test_an_unfinished_character_at_the_end_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    for byte in "ok 😀".encode()[:-1]:
        detokenizer.append(3 + byte)
    assert detokenizer.text == "ok "
    detokenizer.finish()
    assert detokenizer.text == "ok \ufffd"


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one 世END")])
def test_a_stop_string_over_several_tokens(tokenizer: Tokenizer, include: bool, expected: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["世END"], include_stop_str_in_output=include)
    assert feed(detokenizer, "one 世END two") == "世END"
    assert detokenizer.text == expected
    detokenizer.finish()
    assert detokenizer.text == expected


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["abac", "##"])
    texts = []
    for byte in b"xabab-#a":
        assert detokenizer.append(3 + byte) is None
        texts.append(detokenizer.text)
    assert texts == ["x", "x", "x", "x", "xab", "xabab-", "xabab-", "xabab-#"]
    detokenizer.finish()
    assert detokenizer.text == "xabab-#a"


def test_overlapping_beginnings(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["aab"])
    assert feed(detokenizer, "caaaab") == "aab"
    assert detokenizer.text == "caa"


THINK_END_ID = 260


@pytest.mark.parametrize(
    ("stop", "met", "text"),
    [
        (["think", "/"], "/", "a<"),
        (["think", "</"], "</", "a"),
        (["<", "</think"], "<", "a"),
        (["</think", "<"], "</think", "a"),
        (["k>", "a<"], "a<", ""),
    ],
)
def test_the_first_position_wins_and_then_the_order_given(
    tokenizer: Tokenizer, stop: list[str], met: str, text: str
) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop)
    detokenizer.append(3 + ord("a"))
    assert detokenizer.append(THINK_END_ID) == met  # one token of eight characters
    assert detokenizer.text == text


def test_min_tokens_ignores_stop_strings_that_end_early(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["ab"], min_tokens=4)
    assert feed(detokenizer, "abab-ab") == "ab"
    assert detokenizer.text == "abab-"
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["ab"], min_tokens=3)
    assert feed(detokenizer, "abab-ab") == "ab"
    assert detokenizer.text == "ab"


@given(
    st.text("ab#", max_size=30),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.integers(0, 10),
)
def test_stop_strings_against_a_search_of_the_whole_text(
    tokenizer: Tokenizer, text: str, stop: list[str], include: bool, min_tokens: int
) -> None:
    detokenizer = IncrementalDetokenizer(
        tokenizer, stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens
    )
    met = feed(detokenizer, text)
    detokenizer.finish()
    expected, expected_text = None, text
    for end in range(min_tokens + 1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            expected = max(ending, key=len)
            expected_text = text[:end] if include else text[: end - len(expected)]
            break
    assert (met, detokenizer.text) == (expected, expected_text)


def test_words_are_separated(tmp_path: Path) -> None:
    special = {"id": 0, "content": "<s>", "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<s>"}
    words = Tokenizer({"version": "1.0", "added_tokens": [special], "decoder": None, "model": model})
    detokenizer = IncrementalDetokenizer(words, stop=["a b"])
    assert [detokenizer.append(i) for i in (0, 2, 0, 1, 9, 0, 2)] == [None] * 6 + ["a b"]
    assert detokenizer.text == "b "


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = IncrementalDetokenizer(None)
    assert detokenizer.append(5) is None
    detokenizer.finish()
    assert detokenizer.text == ""
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        IncrementalDetokenizer(None, stop=["x"])


def test_a_long_stop_string_takes_its_own_length_of_memory(tokenizer: Tokenizer) -> None:
    stop = "ab" * (MAX_STOP_CHARS // 2)
    tracemalloc.start()
    try:
        detokenizer = IncrementalDetokenizer(tokenizer, stop=[stop])
        assert feed(detokenizer, "ab" * 300 + "a") is None
        assert detokenizer.text == ""
        assert feed(detokenizer, "x") is None
        assert detokenizer.text == "ab" * 300 + "ax"
        assert tracemalloc.get_traced_memory()[1] < 100 * MAX_STOP_CHARS
    finally:
        tracemalloc.stop()


THINK_END_ID = 260


def test_stop_strings_apply_after_a_token(tokenizer: Tokenizer) -> None:
    def run(token_ids: list[int], stop: str, after: int | None) -> tuple[str | None, str]:
        detokenizer = IncrementalDetokenizer(tokenizer, stop=[stop], stop_after_token_id=after)
        for token_id in token_ids:
            if (matched := detokenizer.append(token_id)) is not None:
                return matched, detokenizer.text
        detokenizer.finish()
        return None, detokenizer.text

    inside = [3 + b for b in b"a\nb"]
    token_ids = [*inside, THINK_END_ID, *inside]
    assert run(token_ids, "\n", None) == ("\n", "a")
    assert run(token_ids, "\n", THINK_END_ID) == ("\n", "a\nb</think>a")
    assert run(inside, "\n", THINK_END_ID) == (None, "a\nb")
    # Neither the token's own text nor what is before it is a part of a stop string.
    assert run(token_ids, "think>a", THINK_END_ID) == (None, "a\nb</think>a\nb")
    # The same text, from ordinary tokens, does not end the part without stop strings.
    spelled = [*(3 + b for b in b"</think>\n"), THINK_END_ID, 3 + ord("x")]
    assert run(spelled, "\n", THINK_END_ID) == (None, "</think>\n</think>x")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"a", b"b"], [0, 1]),
        ([b"\xc3\xa9", b"x"], [0, 1]),
        ([b"a", b"\xf0", b"\x9f", b"\x98", b"\x80", b"b"], [0, 1, 1, 1, 1, 2]),
        ([b"\xf0", b"a"], [0, 1]),  # a broken character is U+FFFD
        ([b"\xf0\x9f", b"\xf0\x9f\x98\x80", b"a"], [0, 1, 2]),
        ([b"a\xc3", b"\xa9b", b"c"], [0, 1, 3]),
        ([b"\xff", b"\xfe", b"a"], [0, 1, 2]),
    ],
)
def test_offsets_of_tokens_in_the_text(tmp_path: Path, pieces: list[bytes], expected: list[int]) -> None:
    tokenizer = Pieces(pieces)
    offsets = TokenOffsets(cast(Tokenizer, tokenizer))
    assert [offsets.append(number) for number in range(len(pieces))] == expected


class Pieces:
    """A tokenizer whose token i is the i-th piece."""

    separator = b""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes | None:
        return self.pieces[token_id]


@given(st.lists(BYTES | st.integers(0, 290)), st.booleans())
def test_every_whole_token_is_found_at_its_offset(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    text = tokenizer.decode(ids, skip)
    offsets = TokenOffsets(tokenizer, skip_special_tokens=skip)
    for token_id, offset in zip(ids, map(offsets.append, ids), strict=True):
        data = tokenizer.token_bytes(token_id, skip)
        if data is not None and data.isascii():
            assert text[offset : offset + len(data)] == data.decode()
