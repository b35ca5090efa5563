"""Kimi's vocabulary against tiktoken itself, on a vocabulary that is trained here."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.tokenization import tiktoken_file
from shoal.runtime.tokenization.tokenizer import Special, Tokenizer

TEXT = (
    "The tide tables of Saint-Malo, Brest and Le Havre. THE TIDE'S height isn't what they'll expect; we've 1234567 "
    "metres of rope.\r\n\tdef height(port: str) -> float:\n        return table[port] * 1.5  # naïve\n\n\n"
    "潮の高さは港によって違う。大潮と小潮。港港港。Ünïcödé ÀÉÎ ёлка Ёлка 한국어 العربية ⛵⛵🚢 a̐éö̲"
)
NAMED = {
    "0": ("[BOS]", True),
    "1": ("[EOS]", True),
    "2": ("<|im_end|>", True),
    "10": ("<think>", False),
}


def trained_ranks(num_merges: int) -> dict[bytes, int]:
    """Byte pairs merged by their count, over all of the text as one piece."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word] for word in map(str.encode, _pieces(TEXT))]
    while len(ranks) < 256 + num_merges:
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        counts = {token: count for token, count in counts.items() if token not in ranks}
        if not counts:
            break
        new = max(counts, key=lambda token: (counts[token], token))
        ranks[new] = len(ranks)
        words = [_merged(word, new) for word in words]
    return ranks


def _pieces(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")]


def _merged(word: list[bytes], new: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for part in word:
        if merged and merged[-1] + part == new:
            merged[-1] = new
        else:
            merged.append(part)
    return merged


def write(directory: Path, ranks: Mapping[bytes, int], **changes: Any) -> None:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    decoder = {
        str(len(ranks) + int(number)): {"content": content, "special": special}
        for number, (content, special) in NAMED.items()
    }
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "added_tokens_decoder": decoder,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return trained_ranks(220)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write(directory, ranks)
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def theirs(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("kimi", pat_str=tiktoken_file._SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_the_vocabulary_has_merges_of_merges(ranks: dict[bytes, int]) -> None:
    assert len(ranks) > 400
    assert max(map(len, ranks)) >= 5


@given(
    st.text() | st.lists(st.sampled_from([*TEXT.split(), "\n", "  ", "'LL", "12345", "…"]), max_size=30).map(" ".join)
)
@settings(max_examples=400, deadline=None)
def test_any_text_has_the_ids_that_tiktoken_gives(ours: Tokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_the_text_and_random_cuts_of_it(ours: Tokenizer, theirs: tiktoken.Encoding) -> None:
    rng = random.Random(5)
    assert len(ours.encode(TEXT)) < 0.7 * len(TEXT.encode())
    for _ in range(300):
        start = rng.randrange(len(TEXT))
        text = TEXT[start : start + rng.randrange(60)]
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_random_vocabularies(tmp_path: Path) -> None:
    """Ranks in an order that no training gives, so that a token has several cuts."""
    rng = random.Random(7)
    for _ in range(20):
        tokens = {bytes(rng.choices(b"abc", k=rng.randrange(2, 6))) for _ in range(40)}
        order = rng.sample(sorted(tokens), len(tokens))
        ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(order)}
        write(tmp_path, ranks)
        ours = Tokenizer.from_pretrained(tmp_path)
        assert ours is not None
        theirs = tiktoken.Encoding("x", pat_str=tiktoken_file._SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        for _ in range(100):
            text = "".join(rng.choices("abc", k=rng.randrange(20)))
            assert ours.encode(text) == theirs.encode_ordinary(text)


def test_names_of_added_tokens(ours: Tokenizer, ranks: dict[bytes, int]) -> None:
    first = len(ranks)
    assert ours.vocab_size == first + 256
    assert ours.eos_token_ids == (first + 1,)
    assert ours.special_id("<|im_end|>") == first + 2
    assert ours.special_id(f"<|reserved_token_{first + 3}|>") == first + 3
    assert ours.decode([first, first + 10, 97, first + 3]) == "<think>a"
    assert ours.encode_rendered([Special("[BOS]"), "[BOS]"]) == [first, *b"[BOS]"]
    assert ours.encode_prompt("a") == [97]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"YQ== 0\nYQ== 1\n", r"line 2: expected a new token and its rank 1, got b'YQ== 1'"),
        (b"YQ== 1\n", r"line 1: expected a new token and its rank 0"),
        (b"Y! 0\n", r"line 1: .*base64"),
        (b"YQ== 0\n", r"tiktoken\.model has no token for the byte 0"),
        (b"", r"no token for the byte 0"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, lines: bytes, message: str) -> None:
    write(tmp_path, {})
    (tmp_path / "tiktoken.model").write_bytes(lines)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_another_kind_of_tokenizer_is_an_error(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    write(tmp_path, ranks, tokenizer_class="QWenTokenizer")
    with pytest.raises(ValueError, match="tokenizer_class 'QWenTokenizer'; supported is TikTokenTokenizer"):
        Tokenizer.from_pretrained(tmp_path)
