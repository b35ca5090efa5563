"""Kimi's vocabulary, a tiktoken file, as the content of a tokenizer.json.

tiktoken.model           one token per line: its bytes in base64, a space, its rank, which is its id
tokenizer_config.json    added_tokens_decoder: the names of the ids that follow the ranks
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .byte_level import byte_alphabet

VOCABULARY_FILE = "tiktoken.model"
TOKENIZER_CLASS = "TikTokenTokenizer"
"""`tokenizer_class` of Kimi's checkpoints; others split text in other ways."""
NUM_ADDED_TOKENS = 256
MAX_FILE_BYTES = 64 << 20

_LETTERS_BEFORE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LETTERS_AFTER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_BEFORE}*{_LETTERS_AFTER}+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_BEFORE}+{_LETTERS_AFTER}*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The pieces of text within which bytes are merged: `pat_str` of moonshotai/Kimi-K2-Instruct's tokenizer."""


def read_tiktoken(directory: str | Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the vocabulary of a directory, in the form of a tokenizer.json; None if it has no tiktoken file.

    `settings` is the content of tokenizer_config.json. ValueError for a damaged file or another kind of tokenizer.
    """
    path = Path(directory) / VOCABULARY_FILE
    if not path.is_file():
        return None
    if settings.get("tokenizer_class") != TOKENIZER_CLASS:
        raise ValueError(
            f"{path} is a tiktoken vocabulary, and tokenizer_config.json has tokenizer_class "
            f"{settings.get('tokenizer_class')!r}; supported is {TOKENIZER_CLASS}, or convert it to a tokenizer.json"
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes; it cannot be a vocabulary")
    ranks = _read_ranks(path)
    return tokenizer_spec(ranks, _added_tokens(settings, len(ranks)))


def tokenizer_spec(ranks: Mapping[bytes, int], added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes as tiktoken does.

    tiktoken merges the two neighbours whose bytes together have the lowest rank, and knows no list of merges: every
    cut of a token into two tokens is one.
    """
    characters = byte_alphabet()
    names = {token: "".join(map(characters.__getitem__, token)) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    merges = [[names[left], names[right]] for token in ranks for left, right in _cuts(token, ranks)]
    return {
        "version": "1.0",
        "added_tokens": added_tokens,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": merges,
            "ignore_merges": True,  # a piece that is a token is one, whatever merging would give
        },
    }


def _cuts(token: bytes, ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """All ways to put a token together from two others."""
    for position in range(1, len(token)):
        left, right = token[:position], token[position:]
        if left in ranks and right in ranks:
            yield left, right


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens in the order of their ranks, which are 0, 1, .."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{path}, line {number + 1}: {error}") from error
        if rank != str(number).encode() or not token or token in ranks:
            raise ValueError(
                f"{path}, line {number + 1}: expected a new token and its rank {number}, got {line[:80]!r}; "
                "download the file again"
            )
        ranks[token] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path} has no token for the byte {missing[0]}; download the file again")
    return ranks


def _added_tokens(settings: Mapping[str, Any], first_id: int) -> list[dict[str, Any]]:
    """The tokens of all ids after the ranks; those without a name are reserved."""
    named = settings.get("added_tokens_decoder") or {}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = []
    for token_id in range(first_id, first_id + NUM_ADDED_TOKENS):
        entry = named.get(str(token_id)) or {}
        content = entry.get("content", f"<|reserved_token_{token_id}|>")
        special = entry.get("special", True)
        if not isinstance(content, str) or not content or not isinstance(special, bool):
            raise ValueError(f"tokenizer_config.json: added_tokens_decoder has {entry!r} for id {token_id}")
        tokens.append({"id": token_id, "content": content, "special": special, **flags})
    return tokens
