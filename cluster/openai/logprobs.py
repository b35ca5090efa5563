"""Log-probabilities of tokens in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.runtime.tokenization.detokenizer import TokenOffsets
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Logprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""

Position = Mapping[int, Logprob]
"""The log-probabilities of a token and of its alternatives."""


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[Position], num_top: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """OpenAI's form for chat: per token its bytes and `num_top` alternatives."""
    content = []
    for token, position in zip(token_ids, positions, strict=True):
        top = sorted(position.items(), key=lambda item: (item[1].rank, item[0]))[:num_top]
        alternatives = [logprob_entry(*item, tokenizer) for item in top]
        content.append(logprob_entry(token, position[token], tokenizer) | {"top_logprobs": alternatives})
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Position | None],
    tokenizer: Tokenizer | None,
    offsets: TokenOffsets | None,
) -> dict[str, Any]:
    """OpenAI's older form: one list entry per token, null where a position is None.

    offsets: has the tokens before these; None without a tokenizer, where all text is empty.
    """
    return {
        "tokens": [_text(token, tokenizer) for token in token_ids],
        "token_logprobs": [
            None if position is None else _finite(position[token].logprob)
            for token, position in zip(token_ids, positions, strict=True)
        ],
        "top_logprobs": [position and _by_text(position, tokenizer) for position in positions],
        "text_offset": [0 if offsets is None else offsets.append(token) for token in token_ids],
    }


def _by_text(position: Mapping[int, Logprob], tokenizer: Tokenizer | None) -> dict[str, float]:
    """Log-probabilities by the tokens' texts; of tokens with the same text, the later ones go by their ids."""
    by_text: dict[str, float] = {}
    for token, entry in position.items():
        text = _text(token, tokenizer)
        by_text[f"token_id:{token}" if text in by_text else text] = _finite(entry.logprob)
    return by_text


def logprob_entry(token: int, entry: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token with its text, its bytes and its log-probability."""
    data = _bytes(token, tokenizer)
    return {
        "token": _text(token, tokenizer),
        "token_id": token,
        "logprob": _finite(entry.logprob),
        "bytes": None if data is None else list(data),
    }


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    r"""A token's text; `bytes:\xf0\x9f` where its bytes are no text by themselves, `token_id:5` where it has none."""
    data = _bytes(token, tokenizer)
    if data is None:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bytes(token: int, tokenizer: Tokenizer | None) -> bytes | None:
    return None if tokenizer is None else tokenizer.token_bytes(token, skip_special_tokens=False)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def first_offsets(tokenizer: Tokenizer | None, *, skip_special_tokens: bool) -> TokenOffsets | None:
    """Offsets at the beginning of an output."""
    return None if tokenizer is None else TokenOffsets(tokenizer, skip_special_tokens=skip_special_tokens)
