"""Sets of token ids as bits: token i is bit i % 32 of word i // 32."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

TokenMask = NDArray[np.uint32]
"""[ceil(vocab_size / 32)]; the bits after the vocabulary are 0."""


def num_words(vocab_size: int) -> int:
    """Length of the masks of a vocabulary."""
    return (vocab_size + 31) // 32


def mask_of(token_ids: Iterable[int], vocab_size: int) -> TokenMask:
    """The tokens of a vocabulary that are in `token_ids`; other ids are left out."""
    mask = np.zeros(num_words(vocab_size), np.uint32)
    for token_id in token_ids:
        if token_id < vocab_size:
            mask[token_id >> 5] |= np.uint32(1 << (token_id & 31))
    return mask


def full_mask(vocab_size: int) -> TokenMask:
    """Every token of a vocabulary."""
    mask = np.full(num_words(vocab_size), 0xFFFFFFFF, np.uint32)
    if vocab_size % 32:
        mask[-1] = (1 << vocab_size % 32) - 1
    return mask


def contains(mask: TokenMask, token_id: int) -> bool:
    """Whether a token is in the set."""
    return bool(mask[token_id >> 5] >> np.uint32(token_id & 31) & np.uint32(1))


def to_bools(mask: TokenMask, vocab_size: int) -> NDArray[np.bool_]:
    """[vocab_size], true for the tokens in the set."""
    return np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), count=vocab_size, bitorder="little").view(
        np.bool_
    )
